#!/usr/bin/env bash
# slime's advantage function on hand-made rollout data. slime itself needs GPUs, Megatron and SGLang: it is not installed.
#   tests/external/slime/run.sh [FOLDER of the environment, kept]
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
pip install -q -c constraints.txt -e '.[test]'
pytest tests/test_integrations_slime.py tests/test_integrations_functional.py
