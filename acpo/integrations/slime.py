"""Step-level credit inside slime: one function for `--custom-advantage-function-path acpo.integrations.slime.step_credit`.

slime hands each data-parallel rank its samples, and a group may lie across ranks: what the credit needs is gathered over the data-parallel group
and every rank computes the same. The sources that need no forward of their own can be used (tree). Settings of the method come from
`args.acpo`, a mapping that `--custom-config-path` can set. See docs/integrations/slime.md.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from ..credit import outcome_advantages
from .arguments import layered, outcomes, truth
from .functional import StepCredit

SETTINGS = {"attribution.source": "tree"}
LEFT_OUT = "acpo_left_out"
NEEDED = ("tokens", "response_lengths", "loss_masks", "rewards", "sample_indices", "truncated")

_credit: StepCredit | None = None  # one run a process: calibrators live as long as it does


def step_credit(args, rollout_data: dict[str, Any]) -> None:
    """Sets rollout_data["advantages"] and ["returns"], lists of one tensor [response length] a sample, and ["acpo_left_out"], 1.0 for the samples of
    a group that slime trimmed: these get their outcome advantages.

    Needs `--disable-rewards-normalization`: rewards are then the verifier's outcomes in [0, 1], and groups are compared here. Errors: ValueError that
    names the flag or the field.
    """
    global _credit
    _check(args, rollout_data)
    if _credit is None:
        _credit = make_credit(args)
    own = _samples(rollout_data)
    everyone, first = _gathered(own)
    everyones, left_out = _advantages(_credit, everyone, args.n_samples_per_prompt)
    here, device = slice(first, first + len(own)), _device(rollout_data)
    advantages = [value.to(device) for value in everyones[here]]
    rollout_data["advantages"], rollout_data["returns"] = advantages, [value.clone() for value in advantages]
    rollout_data[LEFT_OUT] = [float(value) for value in left_out[here]]  # slime logs the mean of every list in it, as rollout/acpo_left_out


def _samples(rollout_data: dict[str, Any]) -> list[tuple]:
    """(index, response, loss mask, reward, whether it ended by itself) of each of this rank's samples."""
    counts = {name: len(rollout_data[name]) for name in NEEDED}
    if len(set(counts.values())) > 1:
        raise ValueError(f"rollout_data must hold one entry a sample under each name, got {', '.join(f'{n} {name}' for name, n in counts.items())}")
    samples = []
    for tokens, length, mask, reward, index, cut in zip(*(rollout_data[name] for name in NEEDED), strict=True):
        n, name = int(length), int(index)
        written = truth("loss_masks", _tensor(mask, torch.float32).reshape(1, -1), torch.tensor([name])).flatten()
        if not 0 <= n <= len(tokens) or len(written) != n:
            raise ValueError(
                f"rollout_data: response_lengths must be the number of a sample's loss_masks, and of the last of its tokens, got {n} beside "
                f"{len(written)} loss_masks and {len(tokens)} tokens for rollout {name}"
            )
        samples.append((name, _tensor(tokens, torch.int64)[len(tokens) - n :], written, float(reward), not cut))
    return samples


def _advantages(credit: StepCredit, samples: list[tuple], size: int) -> tuple[list[Tensor], list[bool]]:
    """Token advantages of each sample, and which of them have no whole group.

    slime trims the batch to a multiple of its global batch size, which cuts one group at most: what is left of it gets the advantages of its
    outcomes. Several incomplete groups are none of its doing, and the credit refuses them.
    """
    if not samples:
        raise ValueError("rollout_data must hold samples, got none on any rank")
    index, ids, masks, rewards, ended = zip(*samples, strict=True)
    groups, outcome = [i // size for i in index], outcomes(torch.tensor(rewards), torch.tensor(index))
    short = [name for name, count in Counter(groups).items() if count < size]
    left_out = [len(short) == 1 and name == short[0] for name in groups]
    rows = [b for b, out in enumerate(left_out) if not out]
    advantages = [torch.zeros(len(row)) for row in ids]
    if rows:
        padded = torch.nn.utils.rnn.pad_sequence([ids[b] for b in rows], batch_first=True)
        there = torch.arange(padded.shape[1]) < torch.tensor([len(ids[b]) for b in rows]).unsqueeze(1)
        found = credit(
            padded, there, outcome[rows], groups=[groups[b] for b in rows],
            written=torch.nn.utils.rnn.pad_sequence([masks[b] for b in rows], batch_first=True), finished=torch.tensor([ended[b] for b in rows]),
        )  # fmt: skip
        for value, b in zip(found.advantages, rows, strict=True):
            advantages[b] = value[: len(ids[b])]
    rest = [b for b, out in enumerate(left_out) if out]
    if rest:
        plain = outcome_advantages(outcome[rest], len(rest), credit.settings.credit.advantage)
        for value, b in zip(plain, rest, strict=True):
            advantages[b] = torch.where(masks[b], value, 0.0)
    return advantages, left_out


def make_credit(args) -> StepCredit:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.hf_checkpoint, trust_remote_code=True)
    settings = layered(SETTINGS, getattr(args, "acpo", None), "args.acpo")
    credit = StepCredit(
        tokenizer, group_size=args.n_samples_per_prompt, vocab_size=getattr(args, "vocab_size", None), settings=settings, where="args.acpo"
    )
    if credit.needs_hindsight or credit.needs_entropy:
        raise ValueError(
            "args.acpo: slime's advantage function sees neither hidden states nor entropies, so attribution.source must be 'tree', credit.token "
            f"and entropy.controller 'none'; got {settings}"
        )
    if getattr(args, "advantage_estimator", None) == "gspo" and credit.settings.attribution.sources and credit.settings.credit.form != "none":
        raise ValueError(
            "--advantage-estimator gspo: one ratio a sequence gives its tokens one gradient, in which the credit of its steps cancels; use grpo, or "
            "acpo: {credit: {form: none}}"
        )
    return credit


def _check(args, rollout_data: dict[str, Any]) -> None:
    if getattr(args, "rewards_normalization", True):
        raise ValueError("acpo.integrations.slime needs --disable-rewards-normalization: the rewards must be the verifier's outcomes")
    if getattr(args, "context_parallel_size", 1) > 1:
        raise ValueError(
            f"acpo.integrations.slime does not support --context-parallel-size {args.context_parallel_size}: each rank must hold whole rollouts"
        )
    for name in NEEDED:
        if rollout_data.get(name) is None:
            got = "None" if name in rollout_data else ", ".join(map(repr, rollout_data)) or "nothing"
            raise ValueError(f"rollout_data must hold {name!r}, got {got}")


def _gathered(own: list[tuple]) -> tuple[list[tuple], int]:
    """The samples of all data-parallel ranks in the order of the ranks, and where this rank's begin."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return own, 0
    group = _data_parallel_group()
    parts: list[list[tuple]] = [[] for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather_object(parts, own, group=group)
    rank = torch.distributed.get_rank(group)
    return [sample for part in parts for sample in part], sum(map(len, parts[:rank]))


def _data_parallel_group():
    """Megatron's; without Megatron all processes."""
    try:
        from megatron.core import mpu
    except ImportError:
        return None
    return mpu.get_data_parallel_group()


def _tensor(values, dtype: torch.dtype) -> Tensor:
    return torch.as_tensor(values).detach().to("cpu", dtype)


def _device(rollout_data: dict[str, Any]) -> torch.device:
    for name in ("kl", "log_probs", "rollout_log_probs"):
        values = rollout_data.get(name)
        if values:
            return values[0].device
    return torch.device("cpu")
