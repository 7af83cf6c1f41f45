#!/usr/bin/env bash
# trainer.log with the real packages, in an environment of its own, nothing sent anywhere.
#   tests/external/loggers/run.sh [FOLDER of the environment, kept]
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
pip install -q -c constraints.txt -e '.[tensorboard,wandb,trackio]'
python tests/external/loggers/check_loggers.py
