#!/usr/bin/env bash
# The verl plug-in in an environment of its own; Ray is installed and never started.   tests/external/verl/run.sh [FOLDER of the environment, kept]
set -euo pipefail
. "$(dirname "$0")/../environment.sh"
pins=tests/external/verl/constraints.txt
pip install -q -c "$pins" torch numpy setuptools pybind11 ninja cmake
pip install -q --no-deps -c "$pins" verl # its rollout engines and loggers are not needed for the trainer's own modules
pip install -q -c "$pins" transformers tensordict ray hydra-core omegaconf codetiming torchdata pylatexenc accelerate datasets peft pandas pyarrow dill \
    cachetools uvicorn fastapi aiohttp TransferQueue pytest hypothesis triton pyyaml rich matplotlib safetensors
pip install -q --no-deps --no-build-isolation -e .
ACPO_EXTERNAL=verl python -m pytest tests/external/verl
