"""The buffer of finished rollouts: what was written is read back, what does not belong or was cut off is not."""

from __future__ import annotations

import threading

import pytest
import torch

from acpo.rollout import Sample
from acpo.rollout.kept import Kept


def sample(seed: int, length: int = 5) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(151_936, (length,), generator=generator)
    return Sample(ids, -torch.rand(length, generator=generator), bool(seed % 2))


def kept(tmp_path, key: str = "a") -> Kept:
    return Kept(tmp_path / "rollouts" / "pending-1-0.jsonl", key, torch.device("cpu"))


def same(a: Sample, b: Sample) -> bool:
    return torch.equal(a.ids, b.ids) and torch.equal(a.logp, b.logp) and a.finished == b.finished and a.ids.dtype == b.ids.dtype


def test_bitwise_round_trip(tmp_path):
    one = kept(tmp_path)
    for place in (3, 0, 7):
        one[place] = sample(place, place + 1)
    two = kept(tmp_path)
    assert list(two) == [3, 0, 7] and all(same(two[i], sample(i, i + 1)) for i in two)
    assert 1 not in two and 0 in two
    one.remove()
    assert len(kept(tmp_path)) == 0


def test_another_key_begins_anew(tmp_path):
    kept(tmp_path)[0] = sample(0)
    other = kept(tmp_path, "b")
    assert len(other) == 0
    other[1] = sample(1)
    assert list(kept(tmp_path, "b")) == [1] and len(kept(tmp_path)) == 0


@pytest.mark.parametrize("cut", range(1, 160, 7))
def test_a_write_that_was_cut_off(tmp_path, cut):
    one = kept(tmp_path)
    for place in range(3):
        one[place] = sample(place)
    text = one.path.read_bytes()
    one.path.write_bytes(text[:-cut])
    two = kept(tmp_path)
    whole = text[:-cut].count(b"\n") - 1
    assert list(two)[:whole] == list(range(whole)) and len(two) - whole in (0, 1), "a line that lacks nothing but its end is whole"
    assert all(same(two[i], sample(i)) for i in two)
    two[9] = sample(9)  # and the file goes on behind what was whole
    assert list(kept(tmp_path)) == [*two]


@pytest.mark.parametrize(
    "text",
    ["", "\n", "x", "[]", '{"key": "a"}\n{}\n', '{"key": "a"}\n[]\n', '{"key": "a"}\n{"place": 0, "ids": "?", "logp": "", "finished": true}\n'],
)
def test_what_it_cannot_read_it_leaves(tmp_path, text):
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "pending-1-0.jsonl").write_text(text)
    assert len(kept(tmp_path)) == 0


def test_what_is_taken_back_is_gone(tmp_path):
    one = kept(tmp_path)
    one[0], one[1] = sample(0), sample(1)
    del one[0]
    assert list(kept(tmp_path)) == [1]
    again = kept(tmp_path)
    again[0] = sample(2)
    del again[1]
    found = kept(tmp_path)
    assert list(found) == [0] and torch.equal(found[0].ids, sample(2).ids)


def test_taking_back_writes_a_line_and_not_the_file_anew(tmp_path):
    one = kept(tmp_path)
    for i in range(50):
        one[i] = sample(i, 1000)
    before = one.path.stat().st_size
    for i in range(50):
        del one[i]
    assert 0 < one.path.stat().st_size - before < 50 * 40 and not kept(tmp_path)


def test_many_threads(tmp_path):
    one = kept(tmp_path)

    def put(part: int) -> None:
        for i in range(part, 200, 8):
            one[i] = sample(i, 300)

    threads = [threading.Thread(target=put, args=(p,)) for p in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    two = kept(tmp_path)
    assert sorted(two) == list(range(200)) and all(same(two[i], sample(i, 300)) for i in two)
