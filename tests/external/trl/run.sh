#!/usr/bin/env bash
# The TRL integration in an environment of its own.   tests/external/trl/run.sh [FOLDER of the environment, kept]
set -euo pipefail
. "$(dirname "$0")/../environment.sh"
pip install -q -c constraints.txt -c tests/external/trl/constraints.txt torch -e '.[trl,math]' peft pytest hypothesis
ACPO_EXTERNAL=trl python -m pytest tests/external/trl
