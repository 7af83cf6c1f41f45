"""The head over two processes, each with a slice of the vocabulary, against one that holds all of it."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from acpo_kernels import _vocabulary_parallel, linear_logprob_entropy

N, H, V, CUT = 24, 48, 301, 130  # slices of different lengths
CASES = {
    "float32": {},
    "float64": {"dtype": torch.float64},
    "bias, cap, temperatures": {"bias": True, "softcap": 5.0, "temperature": True},
    "log-probs alone": {"by_entropy": 0.0},
    "log-probs alone, float64": {"by_entropy": 0.0, "dtype": torch.float64},
    "entropies alone": {"by_logp": 0.0},
    "a little entropy": {"by_entropy": 1e-6},
    "confident": {"scale": 12.0},
    "bfloat16": {"dtype": torch.bfloat16},
    "frozen": {"frozen": True},
}


def arguments(dtype=torch.float32, bias=False, softcap=None, temperature=False, by_logp=1.0, by_entropy=0.3, scale=1.0, frozen=False):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, H, generator=g).to(dtype), (scale * torch.randn(V, H, generator=g) / H**0.5).to(dtype)
    ids = torch.randint(V, (N,), generator=g)
    ids[:4] = torch.tensor([0, CUT - 1, CUT, V - 1])
    if scale > 1:  # targets that have nearly everything
        hidden[:8] = 3 * weight[ids[:8]]
    ids[7] = -100
    mask = torch.rand(N, generator=g) < 0.9
    mask[:4] = True
    upstream = by_logp * torch.randn(N, generator=g).to(dtype).float(), by_entropy * torch.randn(N, generator=g)
    return {
        "hidden": hidden, "weight": weight, "ids": ids, "mask": mask, "softcap": softcap, "frozen": frozen, "upstream": upstream,
        "bias": torch.randn(V, generator=g).to(dtype) if bias else None,
        "temperature": 0.5 + torch.rand(N, generator=g) if temperature else 0.8,
    }  # fmt: skip


def run(case: dict, own: slice, group=None) -> dict[str, torch.Tensor]:
    hidden = case["hidden"].clone().requires_grad_(True)
    weight = case["weight"][own].clone().requires_grad_(not case["frozen"])
    bias = None if case["bias"] is None else case["bias"][own].clone().requires_grad_(True)
    keywords = {name: case[name] for name in ("mask", "softcap", "temperature")}
    logp, entropy = linear_logprob_entropy(hidden, weight, case["ids"], bias=bias, group=group, **keywords)
    by_logp, by_entropy = (u.to(logp.dtype) for u in case["upstream"])
    terms = [(u * x).sum() for u, x in ((by_logp, logp), (by_entropy, entropy)) if u.any()]  # an output that nobody uses has no gradient at all
    sum(terms).backward()
    found = {"logp": logp.detach(), "entropy": entropy.detach(), "hidden": hidden.grad, "weight": weight.grad}
    return found | ({} if bias is None else {"bias": bias.grad})


def rank_of_two(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2, timeout=datetime.timedelta(minutes=5))
    own = (slice(0, CUT), slice(CUT, V))[rank]
    out = {name: run(arguments(**case), own, dist.group.WORLD) for name, case in CASES.items()}
    case = arguments()
    case["ids"] = case["ids"].clone()
    case["ids"][2] = V
    try:
        run(case, own, dist.group.WORLD)
    except ValueError as error:
        out["error"] = str(error)
    torch.save(out, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(rank_of_two, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_slices_are_the_whole(both, name):
    case = arguments(**CASES[name])
    wanted = run(case, slice(0, V))
    first, second = both[0][name], both[1][name]
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 1.6e-2}.get(case["hidden"].dtype, 1e-5)
    for key in ("logp", "entropy", "hidden"):
        assert torch.equal(first[key], second[key]), f"{key} differs between ranks"
        allowed = 1e-5 if key != "hidden" and tolerance > 1e-5 else tolerance  # log-probs are never rounded to bfloat16
        assert (first[key] - wanted[key]).abs().max() <= allowed * wanted[key].abs().max(), key
    for key in ("weight", "bias"):
        if wanted.get(key) is None:
            assert first.get(key) is None
            continue
        whole = torch.cat([first[key], second[key]])
        assert (whole - wanted[key]).abs().max() <= tolerance * wanted[key].abs().max(), key
    out = ~case["mask"] | (case["ids"] == -100)
    assert out.any() and not first["logp"][out].any() and not first["hidden"][out].any()
    if name == "confident":
        small = (wanted["logp"] > -1e-3) & ~out
        assert small.any()
        torch.testing.assert_close(first["logp"][small], wanted["logp"][small], rtol=1e-3, atol=0)


@pytest.mark.slow
def test_an_id_outside_the_whole_vocabulary(both):
    assert all(rank["error"] == f"ids must lie in [0, {V}), the vocabulary of the whole group, or be -100; got {V}" for rank in both)


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_where_ids_are_not_read_back_one_outside_is_nan_forward_and_backward(alone, dtype, monkeypatch):
    case = arguments(dtype)
    clean = run(case, slice(0, V), alone)
    case["ids"] = case["ids"].clone()
    case["ids"][2] = V
    monkeypatch.setattr(_vocabulary_parallel, "_check_ids", lambda *arguments: None)  # as on CUDA
    broken = run(case, slice(0, V), alone)
    others = torch.arange(N) != 2
    for name in ("logp", "entropy", "hidden"):
        assert broken[name][2].isnan().all() and torch.equal(broken[name][others], clean[name][others]), name
    assert broken["weight"].isnan().any()


def test_nothing_is_copied_to_the_device(alone, monkeypatch):
    """A tensor from the host's numbers waits for the copy, and no CUDA graph can be captured over it."""

    def refused(*arguments, **keywords):
        raise AssertionError("torch.tensor")

    monkeypatch.setattr(torch, "tensor", refused)
    hidden, weight, ids = torch.randn(3, 4), torch.randn(5, 4), torch.arange(3)
    found, wanted = linear_logprob_entropy(hidden, weight, ids, group=alone), linear_logprob_entropy(hidden, weight, ids)
    torch.testing.assert_close(found.logp, wanted.logp)


def test_what_is_no_group():
    for group in ("x", 0, object()):
        with pytest.raises(TypeError, match=f"group must be a torch.distributed process group, got {type(group).__name__}"):
            linear_logprob_entropy(torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1, dtype=torch.int64), group=group)
