#!/usr/bin/env bash
# trainer.log with the real packages, in an environment of its own, nothing sent anywhere.
#   tests/external/loggers/run.sh [FOLDER of the environment, kept]
set -euo pipefail
. "$(dirname "$0")/../environment.sh"
pip install -q -c constraints.txt -e '.[tensorboard,wandb,trackio]'
python tests/external/loggers/check_loggers.py
