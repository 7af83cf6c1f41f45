#!/usr/bin/env bash
# slime's advantage function on hand-made rollout data. slime itself needs GPUs, Megatron and SGLang: it is not installed.
#   tests/external/slime/run.sh [FOLDER of the environment, kept]
set -euo pipefail
. "$(dirname "$0")/../environment.sh"
pip install -q -c constraints.txt -e '.[test]'
python -m pytest tests/test_integrations_slime.py tests/test_integrations_functional.py tests/test_integrations_arguments.py
