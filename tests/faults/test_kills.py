"""SIGKILL at random instants: a run goes on from its newest checkpoint and ends bitwise as if nothing had been.

`make faults` kills 200 times, and every phase at least once; `pytest -m long` ACPO_KILLS = 10 times, and says which phases it hit.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter

from nursery import PHASES
from runs import same

from acpo import checkpoint

KILLS = int(os.environ.get("ACPO_KILLS", "10"))
SEED = int(os.environ.get("ACPO_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 31)
PER_RUN = 6  # kills of one run before it is left to end


def test_killed_at_random_instants_and_continued(nursery, undisturbed, tmp_path, capsys):
    draw = random.Random(SEED)
    hit: Counter[str] = Counter()
    number = runs = 0
    said = ""
    while number < KILLS:
        run = tmp_path / str(runs)
        found = None
        for _ in range(min(PER_RUN, KILLS - number)):
            job = nursery.start(run)
            # Half of the kills seek the phase that was hit least; the others come at any instant.
            rare = min(PHASES[:-1], key=lambda phase: (hit[phase], draw.random()))
            if draw.random() < 0.5 or not all(hit[phase] for phase in PHASES[:-1]):
                job.until(rare)
                time.sleep(draw.random() * 0.004)
            else:
                time.sleep(draw.random() * 1.5)
            phase = job.kill()
            if phase is None:
                break  # it had ended: it is compared below, and the next one starts anew
            hit[phase] += 1
            number += 1
            found = checkpoint.newest(run / "checkpoints")
            checkpoint.latest(run / "checkpoints")
            assert "trying the one before it" not in capsys.readouterr().out, f"seed {SEED}: a kill left a damaged checkpoint under its name"
        job = nursery.start(run)
        code, said = job.wait(), job.said()
        assert code == 0, f"seed {SEED}, run {runs}: {said}"
        assert found is None or "resumed from" in said
        same(undisturbed, run)
        runs += 1
    with capsys.disabled():
        print(f"\n{number} kills of {runs} runs, seed {SEED}: {', '.join(f'{phase} {hit[phase]}' for phase in PHASES)}")
    missed = [phase for phase in PHASES[:-1] if not hit[phase]]
    if KILLS >= 100:  # some phases last a millisecond: a few kills may miss one, on a busy machine above all
        assert not missed, f"seed {SEED}: never hit {', '.join(missed)}"
