"""How the verifier agrees with the verdicts that came with two public sets of scored rollouts, and what it costs.

    python -m benchmarks.verifier_agreement [FOLDER]     # default: ../shared/data

scored_gsm8k_models: GPT-3 rollouts on GSM8K with OpenAI's own verdicts; scored_qwen_cot100: a Qwen model on MATH with its harness's. Prints one line
a set and verifier, the rollouts in dispute, and the time of 200 different pairs behind the start of the workers.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from acpo.config import VerifyConfig
from acpo.problems import Problem
from acpo.verify import Verifier

SETS = {"scored_gsm8k_models": "A:", "scored_qwen_cot100": ""}  # what the gold answer stands behind


def agreement(rows: list[dict], verifier: Verifier, after: str) -> tuple[list[dict], dict[str, float]]:
    """The rows in dispute, and the verifier's counts."""
    verifier.metrics()
    problems = [Problem(r["id"], r["problem"], r["gold"].rsplit(after, 1)[1].strip() if after else r["gold"]) for r in rows]
    verdicts = verifier(problems, [r["solution"] for r in rows])
    return [r | {"ours": v} for r, v in zip(rows, verdicts, strict=True) if (v.reward == 1.0) != r["is_correct"]], verifier.metrics()


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parents[2] / "shared" / "data")
    begin = time.perf_counter()
    mathematics = Verifier(VerifyConfig(), "math")
    print(f"{mathematics.describe()}; started in {time.perf_counter() - begin:.2f} s; load {os.getloadavg()[0]:.1f}")
    try:
        for name, after in SETS.items():
            rows = [json.loads(line) for line in (folder / name / "dev.jsonl").read_text(encoding="utf-8").split("\n") if line]
            for verifier in (mathematics, Verifier(VerifyConfig(), "exact")):
                dispute, counts = agreement(rows, verifier, after)
                said = ", ".join(f"{v:g} {k.removeprefix('verify/')}" for k, v in counts.items() if v and k != "verify/seconds")
                share, seconds = 1 - len(dispute) / len(rows), counts["verify/seconds"]
                print(f"{name:20} {verifier.kind:5} agrees on {share:.4f} of {len(rows)} in {seconds:.1f} s {said}")
                for row in dispute[:5]:
                    print(
                        f"    {row['id']}: upstream {row['is_correct']}, ours {row['ours'].reward} ({row['ours'].status}); gold {row['gold'][-30:]!r}"
                    )
        pairs = [Problem(str(i), "", rf"\frac{{{i}}}{{7}}") for i in range(1, 201)]
        begin = time.perf_counter()
        right = sum(v.reward == 1.0 for v in mathematics(pairs, [rf"thus \boxed{{{i}/7}}" for i in range(1, 201)]))
        print(f"200 pairs: {right} right, {time.perf_counter() - begin:.2f} s")
    finally:
        mathematics.close()


if __name__ == "__main__":
    main()
