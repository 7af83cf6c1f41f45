#!/usr/bin/env bash
# The page of `acpo inspect` in a real headless Chromium (Debian: apt-get install chromium), driven by playwright in an environment of its own.
#   tests/external/browser/run.sh [FOLDER of the environment, kept]          the tests; skipped, with the reason, where there is no Chromium
#   tests/external/browser/run.sh FOLDER measure.py [COUNT]                  load, scroll and sort times of 64 rollouts of 4,096 tokens
#   tests/external/browser/run.sh FOLDER screenshot.py PAGE.html OUT.png     a picture of a page (docs/inspect.png)
set -euo pipefail
. "$(dirname "$0")/../environment.sh"
pip install -q 'playwright==1.*' pytest
export PYTHONPATH="$root:$root/tests"
if [ $# -gt 1 ]; then
    shift
    script=$1
    shift
    python "tests/external/browser/$script" "$@"
else
    ACPO_EXTERNAL=browser python -m pytest --confcutdir=tests/external/browser -c /dev/null --rootdir="$root" -rs tests/external/browser
fi
