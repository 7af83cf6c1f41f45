#!/usr/bin/env bash
# The TRL integration in an environment of its own.
#   tests/external/trl/run.sh [FOLDER of the environment, kept]
set -euo pipefail
root=$(cd "$(dirname "$0")/../../.." && pwd)
cd "$root"
folder=${1:-}
if [ -z "$folder" ]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
fi
[ -x "$folder/bin/python" ] || python3 -m venv "$folder"
. "$folder/bin/activate"
pip install -q -c constraints.txt -c tests/external/trl/constraints.txt torch -e '.[trl]' peft pytest hypothesis
ACPO_EXTERNAL=trl python -m pytest tests/external/trl
