"""What the local engine's decoder of Qwen2 models saves against transformers' own forward in the same loop, in the same process.

    python -m benchmarks.decode [--rounds 30] [--rows 32] [--tokens 64] [--sizes tiny,small]

Interleaved rounds, lower quartiles, with the load average; both give the same rollouts, bit for bit, or the script ends with an error.
"""

from __future__ import annotations

import argparse
import os
import time
from unittest import mock

import numpy as np
import torch

from acpo import config
from acpo.policy import build
from acpo.rollout import decode
from acpo.rollout.local import LocalEngine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--sizes", default="tiny,small")
    options = parser.parse_args()
    for size in options.sizes.split(","):
        torch.manual_seed(0)
        policy, _ = build(config.load(None, ["problems.task=chain", f"policy.from_config={size}", "policy.device=cpu"]))
        engine = LocalEngine(policy, [], 2**24)  # nothing ends a rollout: every round decodes the same tokens
        prompts = [[3 + (i * k) % 11 for k in range(20)] for i in range(options.rows)]
        taken: dict[str, list[float]] = {"transformers": [], "ours": []}
        for _ in range(options.rounds + 1):
            found = []
            for name, times in taken.items():
                with mock.patch.object(decode, "dense", decode.dense if name == "ours" else lambda _: False):
                    begin = time.perf_counter()
                    generator = torch.Generator().manual_seed(0)
                    found.append(engine.generate(prompts, max_new_tokens=options.tokens, temperature=1.0, generator=generator))
                    times.append(time.perf_counter() - begin)
            if not all(torch.equal(a.ids, b.ids) and torch.equal(a.logp, b.logp) for a, b in zip(*found, strict=True)):
                raise SystemExit(f"{size}: the two decoders differ")
        theirs, ours = (float(np.quantile(times[1:], 0.25)) for times in taken.values())
        print(
            f"{size}: {options.rows} rollouts of {options.tokens} tokens, {torch.get_num_threads()} threads: {theirs * 1e3:.1f} ms with the"
            f" forward of transformers, {ours * 1e3:.1f} ms with ours, {theirs / ours:.2f} times; load {os.getloadavg()[0]:.1f}"
        )


if __name__ == "__main__":
    main()
