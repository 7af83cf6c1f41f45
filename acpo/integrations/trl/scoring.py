"""The passes over a generation batch that the credit needs: log-probs and entropies, and the hindsight stream. No gradient.

The policy is in eval mode for them: dropout would be noise, and the random state of training stays where it was.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..functional import hinted_prompt
from .head import Scored

IMAGES = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles", "image_sizes", "token_type_ids",
    "mm_token_type_ids", "image_position_ids",
)  # fmt: skip


def plain(trainer, output: dict[str, Any]) -> dict[str, Tensor]:
    """logp and entropy [B,T] of this process's rollouts, where anything needs them: one forward."""
    credit = trainer._acpo
    if not (credit.needs_entropy or credit.needs_logp or credit.settings.segmenter.entropy):
        return {}
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    attention = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    with _evaluating(trainer.model):
        logp, entropy, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, attention, output["completion_ids"].size(1), batch_size=trainer.args.per_device_train_batch_size,
            compute_entropy=True, **{name: output[name] for name in IMAGES if name in output},
        )  # fmt: skip
    return {"logp": logp, "entropy": entropy}


def with_hindsight(
    trainer, inputs: list[dict], output: dict[str, Any], answers: list[str], looks: list[bool], scored: dict[str, Tensor]
) -> dict[str, Tensor]:
    """logp, entropy, and of the rollouts that are looked at log_ratio and kl, [B,T].

    One forward of every rollout (of those that are looked at, where TRL scored all of them before), and one of those that are looked at with the
    answer in the prompt.
    """
    hinted = _hinted(trainer, inputs, output, answers, looks)
    width, size = output["completion_ids"].size(1), trainer.args.per_device_train_batch_size
    names = ("logp", "entropy", "log_ratio", "kl")
    values = {name: torch.zeros(output["completion_ids"].shape, device=output["completion_ids"].device) for name in names}
    with _evaluating(trainer.model):
        for start in range(0, len(inputs), size):
            part = list(range(start, min(start + size, len(inputs))))
            chosen = [b for b in part if looks[b]]
            rows = chosen if scored else part
            if not rows and _lockstep(trainer):
                rows = part[:1]
            if rows:
                found = _pairs(trainer, output, rows, chosen, hinted)
                for name in names:
                    values[name][rows] = found[name][:, -width:]
    return {**values, **scored}


def _lockstep(trainer) -> bool:
    """Whether a forward is a collective operation, so that every process must make as many."""
    plugin = trainer.args.deepspeed_plugin
    return trainer.accelerator.num_processes > 1 and (trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3))


@contextmanager
def _evaluating(model):
    model.eval()
    try:
        yield
    finally:
        model.train()


def _pairs(trainer, output: dict[str, Any], rows: list[int], chosen: list[int], hinted: dict[int, list[int]]) -> Scored:
    """One forward of the given rows, and of those chosen among them once more behind their hinted prompts."""
    fill, device = trainer._tokenizer.pad_token_id, output["prompt_ids"].device
    width = max([output["prompt_ids"].size(1), *(len(hinted[b]) for b in chosen)])
    more = width - output["prompt_ids"].size(1)
    prompts, seen = pad(output["prompt_ids"][rows], (more, 0), value=fill), pad(output["prompt_mask"][rows], (more, 0))
    if chosen:
        own = [torch.tensor(hinted[b], device=device) for b in chosen]
        prompts = torch.cat([prompts, torch.stack([pad(ids, (width - len(ids), 0), value=fill) for ids in own])])
        seen = torch.cat([seen, torch.stack([pad(torch.ones_like(ids), (width - len(ids), 0)) for ids in own])])
    both = [*rows, *chosen]
    ids = torch.cat([prompts, output["completion_ids"][both]], dim=1)
    attention = torch.cat([seen, output["completion_mask"][both]], dim=1)
    labels = ids.masked_fill(attention == 0, -100)
    labels[:, :width] = -100
    with trainer.accelerator.autocast():
        return trainer.model(input_ids=ids, attention_mask=attention, labels=labels, acpo_pairs=[rows.index(b) for b in chosen])


def _hinted(trainer, inputs: list[dict], output: dict[str, Any], answers: list[str], looks: list[bool]) -> dict[int, list[int]]:
    """Token ids of the prompt with the answer in it, of each rollout that is looked at."""
    chosen = [b for b, wanted in enumerate(looks) if wanted]
    if not chosen:
        return {}
    if trainer.rollout_func is not None:  # it makes its own prompts: the hinted ones are right only where those are the dataset's
        ids, _, _ = trainer._tokenize_prompts([example["prompt"] for example in inputs])
        got = [row[mask.bool()].tolist() for row, mask in zip(output["prompt_ids"], output["prompt_mask"], strict=True)]
        if got != [list(row) for row in ids]:
            raise ValueError("acpo_source='hindsight' needs the dataset's prompts as they are, and rollout_func made others; use acpo_source='tree'")
    ids, _, _ = trainer._tokenize_prompts([hinted_prompt(inputs[b]["prompt"], answers[b], trainer.args.acpo_hint) for b in chosen])
    return dict(zip(chosen, ids, strict=True))
