"""slime's advantage function on hand-made rollout data; slime itself needs GPUs and Megatron."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest
import torch

from acpo.integrations import slime
from acpo.integrations.functional import StepCredit
from acpo.policy import byte_tokenizer

TOKENIZER = byte_tokenizer()
PROMPT = TOKENIZER("2+3?\n")["input_ids"]
TEXTS = (
    "2+3=5.\nSo 5.\nThe answer is 5",
    "2+3=5.\nSo 6.\nThe answer is 6",
    "2+3=6.\nSo 6.",
    "5",
    "1.\nThe answer is 1",
    "1.\nThe answer is 2",
    "1.\n3.",
    "4",
)
REWARDS = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0]
ACPO = {"segmenter": {"min_tokens": 2, "max_tokens": 64, "target_tokens": 8}, "attribution.reliability": 0.8}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    TOKENIZER.save_pretrained(tmp_path)
    monkeypatch.setattr(slime, "_credit", None)
    return tmp_path


def arguments(folder, **changes) -> SimpleNamespace:
    settings = {"hf_checkpoint": str(folder), "n_samples_per_prompt": 4, "rewards_normalization": False, "context_parallel_size": 1, "acpo": ACPO}
    return SimpleNamespace(**{**settings, **changes})


def rollout_data(rows=range(8)) -> dict:
    """As slime's data-parallel split lays it: lists of one entry a sample."""
    responses = [TOKENIZER(TEXTS[b])["input_ids"] for b in rows]
    lengths = [len(r) for r in responses]
    return {
        "tokens": [torch.tensor(PROMPT + r) for r in responses],
        "response_lengths": lengths,
        "total_lengths": [len(PROMPT) + n for n in lengths],
        "loss_masks": [torch.ones(n, dtype=torch.int) for n in lengths],
        "rewards": [REWARDS[b] for b in rows],
        "sample_indices": [8 + b for b in rows],
        "truncated": [0 for _ in rows],
        "log_probs": [torch.zeros(n) for n in lengths],
        "kl": [torch.zeros(n, dtype=torch.bfloat16) for n in lengths],
        "values": None,
    }


def expected() -> list[torch.Tensor]:
    rows = [torch.tensor(TOKENIZER(t)["input_ids"]) for t in TEXTS]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(r) for r in rows]).unsqueeze(1)
    credit = StepCredit(TOKENIZER, group_size=4, settings={**ACPO, "attribution.source": "tree"})
    found = credit(ids, mask, torch.tensor(REWARDS))
    return [value[m] for value, m in zip(found.advantages, mask, strict=True)]


def test_it_is_the_credit_of_the_padded_tensors(folder):
    data = rollout_data()
    assert slime.step_credit(arguments(folder), data) is None
    wanted = expected()
    assert len(data["advantages"]) == len(data["returns"]) == 8
    for got, returned, value in zip(data["advantages"], data["returns"], wanted, strict=True):
        assert torch.equal(got, value) and torch.equal(returned, value) and returned is not got
    assert data["advantages"][1].unique().numel() > 1, "it shares its first line with a right one"


def test_samples_in_another_order(folder):
    order = [5, 0, 7, 2, 4, 1, 6, 3]
    data = rollout_data(order)
    slime.step_credit(arguments(folder), data)
    for got, b in zip(data["advantages"], order, strict=True):
        torch.testing.assert_close(got, expected()[b])


def test_masked_tokens_get_nothing(folder):
    data = rollout_data()
    data["loss_masks"][0][3:6] = 0
    slime.step_credit(arguments(folder), data)
    assert (data["advantages"][0][3:6] == 0).all() and (data["advantages"][0][:3] != 0).all()


def test_a_rollout_that_was_cut_off_keeps_its_outcome_advantage(folder):
    data = rollout_data()
    data["truncated"][1] = 1
    slime.step_credit(arguments(folder), data)
    for b, (got, value) in enumerate(zip(data["advantages"], expected(), strict=True)):
        assert got.unique().numel() == 1 if b == 1 else torch.equal(got, value)
    assert expected()[1].unique().numel() > 1 and float(data["advantages"][1][0]) < 0


def test_calibrators_live_on_between_batches(folder):
    args = arguments(folder, acpo={"segmenter": ACPO["segmenter"]})
    for _ in range(3):
        slime.step_credit(args, rollout_data())
    assert slime._credit.batches == 3 and len(slime._credit.panel.by_name["tree"].calibrator.batches) == 3


def _rank(rank: int, port: int, folder: str, queue) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    data = rollout_data([0, 2, 5, 6] if rank == 0 else [1, 3, 4, 7])  # both groups lie across the ranks
    slime.step_credit(arguments(folder), data)
    queue.put((rank, [value.tolist() for value in data["advantages"]]))
    torch.distributed.destroy_process_group()


def test_groups_across_data_parallel_ranks(folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    ranks = [context.Process(target=_rank, args=(r, port, str(folder), queue)) for r in range(2)]
    for process in ranks:
        process.start()
    got = dict(queue.get(timeout=300) for _ in ranks)
    for process in ranks:
        process.join()
    for rank, rows in enumerate(([0, 2, 5, 6], [1, 3, 4, 7])):
        for value, b in zip(got[rank], rows, strict=True):
            torch.testing.assert_close(torch.tensor(value), expected()[b])


def test_the_group_that_slime_trimmed_keeps_its_outcome_advantages(folder):
    """slime cuts a batch to a multiple of its global batch size, in the middle of a group; the whole ones' credit is as ever."""
    data = rollout_data(range(6))
    data["loss_masks"][5][2:4] = 0
    slime.step_credit(arguments(folder), data)
    alone = rollout_data(range(4))
    slime._credit = None
    slime.step_credit(arguments(folder), alone)
    assert all(torch.equal(a, b) for a, b in zip(data["advantages"][:4], alone["advantages"], strict=True))
    assert data["advantages"][1].unique().numel() > 1 and alone["acpo_left_out"] == [0.0] * 4
    torch.testing.assert_close(data["advantages"][4], torch.ones(data["response_lengths"][4]), atol=1e-5, rtol=0)
    wanted = torch.full((data["response_lengths"][5],), -1.0)
    wanted[2:4] = 0.0
    torch.testing.assert_close(data["advantages"][5], wanted, atol=1e-5, rtol=0)
    assert data["acpo_left_out"] == [0.0] * 4 + [1.0] * 2 and all(map(torch.equal, data["advantages"], data["returns"]))


def test_a_batch_of_the_trimmed_group_alone(folder):
    data = rollout_data([0])
    slime.step_credit(arguments(folder), data)
    assert (data["advantages"][0] == 0).all() and data["acpo_left_out"] == [1.0]
    data = rollout_data([0, 1])
    data["rewards"][0] = 2.0
    with pytest.raises(ValueError, match=r"outcome must lie in \[0, 1\]"):
        slime.step_credit(arguments(folder), data)


@pytest.mark.parametrize(("setting", "value"), [("sampler", "thompson"), ("dynamic_sampling", True)])
def test_a_curriculum_is_refused_where_the_loop_draws_the_prompts(folder, setting, value):
    slime._credit = None
    with pytest.raises(ValueError, match=rf"args\.acpo: curriculum\.{setting} must be left out, got {value!r}: the loop draws"):
        slime.step_credit(arguments(folder, acpo={**ACPO, f"curriculum.{setting}": value}), rollout_data())


def test_one_ratio_a_sequence_is_refused_but_without_credit(folder):
    for form in ("additive", "none"):
        args = arguments(folder, advantage_estimator="gspo", acpo={**ACPO, "credit.form": form})
        slime._credit = None
        if form == "none":
            slime.step_credit(args, rollout_data())
        else:
            with pytest.raises(ValueError, match=r"--advantage-estimator gspo: one ratio a sequence .* the credit of its steps cancels"):
                slime.step_credit(args, rollout_data())
    slime._credit = None
    slime.step_credit(arguments(folder, advantage_estimator="grpo"), rollout_data())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards_normalization": True}, "needs --disable-rewards-normalization"),
        ({"context_parallel_size": 2}, "does not support --context-parallel-size 2"),
        ({"acpo": {"attribution.source": "hindsight"}}, "attribution.source must be 'tree'"),
        ({"acpo": {"credit.from": "x"}}, "args.acpo: unknown setting 'credit.from'; the nearest is 'credit.form'"),
        ({"n_samples_per_prompt": 3}, "groups must hold group_size = 3 rollouts of every prompt"),
    ],
)
def test_what_cannot_be(folder, change, message):
    with pytest.raises(ValueError, match=message):
        slime.step_credit(arguments(folder, **change), rollout_data())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("loss_masks", [[1]], r"response_lengths must be .*, got 28 beside 1 loss_masks and \d+ tokens for rollout 8$"),
        ("response_lengths", [-1], r"response_lengths must be .*, got -1 beside 28 loss_masks and \d+ tokens for rollout 8$"),
        ("tokens", [[3]], r"response_lengths must be .*, got 28 beside 28 loss_masks and 1 tokens for rollout 8$"),
        ("loss_masks", [[0.5] * 28], "loss_masks must hold True and False, or 1 and 0, got 0.5 for rollout 8"),
    ],
)
def test_samples_whose_lengths_differ(folder, name, value, message):
    """One token more or less, and every credit behind it would be another token's."""
    data = rollout_data()
    data[name] = [*value, *data[name][1:]]
    with pytest.raises(ValueError, match=message):
        slime.step_credit(arguments(folder), data)
    assert slime._credit.batches == 0


def test_fields_that_cannot_be(folder):
    for change, message in (
        ({"truncated": None}, "rollout_data must hold 'truncated', got None"),
        ({"rewards": [1.0]}, "rollout_data must hold one entry a sample under each name, got 8 tokens, .*, 1 rewards, 8 sample_indices, 8 truncated"),
        ({name: [] for name in slime.NEEDED}, "rollout_data must hold samples, got none on any rank"),
    ):
        with pytest.raises(ValueError, match=message):
            slime.step_credit(arguments(folder), {**rollout_data(), **change})
    slime._credit = None
    with pytest.raises(TypeError, match=r"args\.acpo must be a mapping of the method's settings, got str"):
        slime.step_credit(arguments(folder, acpo="tree"), rollout_data())


def test_missing_fields_and_rewards_that_are_no_outcome(folder):
    data = rollout_data()
    del data["sample_indices"]
    with pytest.raises(ValueError, match="rollout_data must hold 'sample_indices'"):
        slime.step_credit(arguments(folder), data)
    data = rollout_data()
    data["rewards"][2] = -1.0
    with pytest.raises(ValueError, match=r"outcome must lie in \[0, 1\]"):
        slime.step_credit(arguments(folder), data)
