"""The curriculum: what it learns about difficulty, and which problems it then chooses."""

from __future__ import annotations

import json

import numpy as np
import pytest

from acpo.config import CurriculumConfig
from acpo.curriculum import Curriculum
from acpo.problems import Problem

CELLS = ("easy", "half", "third", "never")
RATES = {"easy": 1.0, "half": 0.5, "third": 0.35, "never": 0.0}


def problems(a_cell: int = 50) -> list[Problem]:
    """The cells' problems interleaved, so that an index says nothing about a cell."""
    return [Problem(f"{i}{cell}", "p", "a", cell=cell) for i in range(a_cell) for cell in CELLS]


def taught(config: CurriculumConfig | None = None, visits: int = 60) -> Curriculum:
    curriculum = Curriculum(problems(), config or CurriculumConfig())
    for _ in range(visits):
        for index, cell in enumerate(CELLS):
            curriculum.update(np.array([index]), np.array([20 * RATES[cell]]), 20)
    return curriculum


def shares(curriculum: Curriculum, draws: int = 200) -> dict[str, float]:
    rng = np.random.default_rng(0)
    chosen = [CELLS[i % 4] for _ in range(draws) for i in curriculum.sample(8, rng)]
    return {cell: chosen.count(cell) / len(chosen) for cell in CELLS}


def test_posterior_by_hand():
    curriculum = Curriculum(problems(2), CurriculumConfig(decay=0.9))
    assert curriculum.prior(np.array([0, 1])).tolist() == [0.5, 0.5]
    curriculum.update(np.array([1]), np.array([3.0]), 8)
    a, b = 0.9 + 0.1 + 3, 0.9 + 0.1 + 5
    assert curriculum.prior(np.array([5]))[0] == pytest.approx(a / (a + b)), "problems of one cell share what was seen"
    assert curriculum.prior(np.array([0]))[0] == 0.5
    curriculum.update(np.array([5]), np.array([8.0]), 8)
    assert curriculum.prior(np.array([1]))[0] == pytest.approx((0.9 * a + 0.1 + 8) / (0.9 * (a + b) + 0.2 + 8))


def test_problems_without_a_cell_are_their_own():
    curriculum = Curriculum([Problem("a", "p", "1"), Problem("b", "p", "1")], CurriculumConfig())
    curriculum.update(np.array([0]), np.array([8.0]), 8)
    assert curriculum.prior(np.array([0, 1])).tolist() == [0.9, 0.5]


def test_each_problem_its_own_cell_whatever_the_data_names():
    named = [Problem(str(i), "p", "1", cell="easy" if i % 2 else "hard") for i in range(10)]
    assert len(Curriculum(named, CurriculumConfig(cells="problems")).cells) == 10 and len(Curriculum(named, CurriculumConfig()).cells) == 2


def test_within_the_band_all_are_equally_near():
    """Cells known to succeed at 0.2, 0.3 and 0.9: nearest to 0.22 is the first alone, within 0.15 of it the first two."""
    problems = [Problem(str(i), "p", "1", cell=str(i % 3)) for i in range(300)]
    share = {}
    for band in (0.0, 0.15):
        config = CurriculumConfig(centre=0.22, band=band, candidates=3, uniform_share=0.0, mastered_share=0.0)
        curriculum, rng = Curriculum(problems, config), np.random.default_rng(0)
        curriculum.a, curriculum.b = np.array([20_000.0, 30_000, 90_000]), np.array([80_000.0, 70_000, 10_000])
        taken = np.concatenate([curriculum.cell[curriculum.sample(30, rng)] for _ in range(20)])
        share[band] = np.bincount(taken, minlength=3) / len(taken)
    assert share[0.0][0] > 0.9 and share[0.0][2] == 0
    assert 0.4 < share[0.15][0] < 0.6 and share[0.15][2] == 0


def test_without_named_cells_draws_are_those_without_a_curriculum():
    """To the number: what the method adds is then compared on the same problems."""
    bare = [Problem(str(i), "p", "1") for i in range(100)]
    methods = {"named": CurriculumConfig(), "problems": CurriculumConfig(cells="problems"), "uniform": CurriculumConfig(sampler="uniform")}
    drawn = {}
    for name, config in methods.items():
        curriculum, rng = Curriculum(bare, config), np.random.default_rng(3)
        drawn[name] = [curriculum.sample(8, rng).tolist() for _ in range(5)]
    assert drawn["named"] == drawn["uniform"] != drawn["problems"]


def test_old_visits_fade():
    curriculum = taught()
    for _ in range(60):
        curriculum.update(np.array([0]), np.array([0.0]), 20)
    assert curriculum.prior(np.array([0]))[0] < 0.02


def test_the_centre_chooses_the_open_problems():
    curriculum = taught(CurriculumConfig(candidates=25, centre=0.5))
    plain = {"uniform_share": 0.0, "mastered_share": 0.0, "candidates": 25}  # all two hundred problems are looked at
    for centre, cell in ((0.5, "half"), (0.35, "third"), (0.0, "never")):
        assert shares(taught(CurriculumConfig(centre=centre, **plain)))[cell] > 0.8
    mixed = shares(curriculum)
    # a tenth uniform over all four, a tenth from the mastered cell
    assert mixed["easy"] == pytest.approx(0.125, abs=0.03) and mixed["never"] == pytest.approx(0.025, abs=0.02)
    assert mixed["half"] == pytest.approx(0.82, abs=0.05)


def test_few_candidates_keep_the_mixture():
    """Of twice as many problems drawn from everything the nearer half: all of the open ones, and nothing that is far while they last."""
    found = shares(taught(CurriculumConfig(uniform_share=0.0, mastered_share=0.0, candidates=2, centre=0.5)))
    assert found["half"] > 0.35 and found["third"] > 0.35 and found["easy"] + found["never"] < 0.12
    assert all(0.2 < share < 0.3 for share in shares(taught(CurriculumConfig(candidates=1, mastered_share=0.0, centre=0.5))).values())


def test_nothing_mastered_yet():
    fresh = shares(Curriculum(problems(), CurriculumConfig(mastered_share=0.9, uniform_share=0.0)))
    assert all(0.15 < share < 0.35 for share in fresh.values())


def test_uniform_sampler_does_not_look():
    found = shares(taught(CurriculumConfig(sampler="uniform")))
    assert all(0.2 < share < 0.3 for share in found.values())


@pytest.mark.parametrize("sampler", ["thompson", "uniform"])
def test_no_problem_twice_while_there_are_enough(sampler):
    curriculum = taught(CurriculumConfig(sampler=sampler))
    rng = np.random.default_rng(0)
    for _ in range(50):
        chosen = curriculum.sample(12, rng)
        assert len(set(chosen.tolist())) == len(chosen) == 12
        assert chosen.dtype.kind == "i"


@pytest.mark.parametrize("sampler", ["thompson", "uniform"])
def test_small_cells_and_small_sets(sampler):
    few = [Problem("a", "p", "1", cell="x"), Problem("b", "p", "1", cell="y"), Problem("c", "p", "1", cell="y")]
    curriculum = Curriculum(few, CurriculumConfig(sampler=sampler, uniform_share=0.0, mastered_share=0.0))
    for _ in range(20):
        curriculum.update(np.array([0]), np.array([4.0]), 8)  # x is at one half, y unknown
    rng = np.random.default_rng(0)
    complete = sum(sorted(curriculum.sample(3, rng).tolist()) == [0, 1, 2] for _ in range(50))
    assert complete == 50 if sampler == "uniform" else complete > 40
    assert len(curriculum.sample(8, rng)) == 8, "more than there are: some stand twice"
    assert len(Curriculum(few[:1], CurriculumConfig(sampler=sampler)).sample(2, rng)) == 2


def test_same_seed_same_problems_and_state_round_trip():
    one, other = taught(), Curriculum(problems(), CurriculumConfig())
    other.load(json.loads(json.dumps(one.state())))
    draws = [[c.sample(6, rng).tolist() for _ in range(5)] for c, rng in ((one, np.random.default_rng(4)), (other, np.random.default_rng(4)))]
    assert draws[0] == draws[1]
    assert one.sample(6, np.random.default_rng(5)).tolist() != draws[0][0]


def test_state_of_other_problems_is_refused():
    with pytest.raises(ValueError, match="other problems"):
        Curriculum([Problem("z", "p", "1")], CurriculumConfig()).load(taught().state())
