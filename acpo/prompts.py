"""From a problem to the token ids in front of a rollout."""

from __future__ import annotations

from .config import ProblemsConfig
from .problems import Problem


class Prompts:
    def __init__(self, config: ProblemsConfig, tokenizer):
        self.config, self.tokenizer = config, tokenizer

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt(self, text: str) -> list[int]:
        """Token ids in front of a rollout: the text as it is, or as a user message of the tokenizer's chat template."""
        if not self.config.chat:
            return self.encode(text)
        system = [{"role": "system", "content": self.config.system}] if self.config.system else []
        message = self.tokenizer.apply_chat_template([*system, {"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
        return self.encode(message)

    def hinted(self, problem: Problem) -> list[int]:
        """The prompt with the answer in it."""
        return self.prompt(problem.hinted_prompt(problem.answer))

    def spellings(self, answer: str) -> list[list[int]]:
        """How the answer may stand in a rollout: a tokenizer of text may merge a space in front of it."""
        return [self.encode(answer)] if self.config.task else [self.encode(answer), self.encode(" " + answer)]
