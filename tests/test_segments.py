"""Segments, pack, unpack."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import LENGTHS, TERMINAL, hierarchies, segments_of, sequences, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from acpo_kernels import Segments, pack, segment_reduce, unpack
from acpo_kernels import segments as segments_module

# 1. Oracle: a hand-written example


def test_by_hand(device):
    segments = segments_of([[2, 1], [], [3]], terminal=[True, True, False], device=device)
    assert (segments.num_tokens, segments.num_segments, segments.num_sequences) == (6, 3, 3)
    assert segments.token_offsets.tolist() == [0, 2, 3, 6]
    assert segments.sequence_offsets.tolist() == [0, 2, 2, 3]
    assert segments.cu_seqlens.tolist() == [0, 3, 3, 6]
    assert segments.lengths.tolist() == [2, 1, 3]
    assert segments.segment_ids().tolist() == [0, 0, 1, 2, 2, 2]
    assert segments.sequence_ids().tolist() == [0, 0, 0, 2, 2, 2]
    assert segments.segment_sequence_ids().tolist() == [0, 0, 2]
    assert segments.is_terminal().tolist() == [False, True, False]  # the empty sequence's mark falls on no segment of another
    assert repr(segments) == f"Segments(6 tokens, 3 segments, 3 sequences, {segments.device})"


def test_from_padded_by_hand(device):
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool, device=device)
    # The mark at [0,0] lies on padding and counts for nothing; the last token of a sequence ends a segment unasked.
    boundaries = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1], [0, 1, 1, 0]], dtype=torch.bool, device=device)
    terminal = torch.tensor([True, False, False], device=device)
    segments = Segments.from_padded(mask, boundaries, terminal=terminal)
    assert segments.token_offsets.tolist() == [0, 1, 3, 5]
    assert segments.sequence_offsets.tolist() == [0, 2, 2, 3]
    assert segments.terminal.tolist() == [True, False, False]
    whole = Segments.from_padded(mask)
    assert whole.token_offsets.tolist() == [0, 3, 5]
    assert whole.sequence_offsets.tolist() == [0, 1, 1, 2]


def test_pack_and_unpack_by_hand(device):
    mask = torch.tensor([[0, 1, 1], [1, 0, 1]], dtype=torch.bool, device=device)  # left padding, and a hole
    values = torch.arange(6.0, device=device).reshape(2, 3)
    assert pack(values, mask).tolist() == [1.0, 2.0, 3.0, 5.0]
    assert unpack(pack(values, mask), mask).tolist() == [[0.0, 1.0, 2.0], [3.0, 0.0, 5.0]]
    assert unpack(pack(values, mask), mask, fill=-7).tolist() == [[-7.0, 1.0, 2.0], [3.0, -7.0, 5.0]]
    ids = torch.tensor([[9, 8, 7], [6, 5, 4]], device=device)
    assert unpack(pack(ids, mask), mask, fill=-100).tolist() == [[-100, 8, 7], [6, -100, 4]]
    assert pack(values.unsqueeze(-1).expand(2, 3, 4), mask).shape == (4, 4)


def test_gradients_of_pack_and_unpack():
    mask = torch.rand(3, 5) < 0.6
    values = torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True)
    packed = torch.randn(int(mask.sum()), 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda v: pack(v, mask), values)
    torch.autograd.gradcheck(lambda v: unpack(v, mask, fill=3.0), packed)


# 2. The offsets against loops over plain ranges


def test_ids_are_those_of_the_loops(device):
    segments = segments_of(LENGTHS, TERMINAL, device)
    segment_ids, sequence_ids, of_segment, terminal = [], [], [], []
    for b, of_sequence in sequences(segments):
        for s in of_sequence:
            of_segment.append(b)
            terminal.append(TERMINAL[b] and s == of_sequence[-1])
            segment_ids += [s] * len(tokens(segments, s))
            sequence_ids += [b] * len(tokens(segments, s))
    assert segments.segment_ids().tolist() == segment_ids
    assert segments.sequence_ids().tolist() == sequence_ids
    assert segments.segment_sequence_ids().tolist() == of_segment
    assert segments.is_terminal().tolist() == terminal
    assert segments_of(LENGTHS, None, device).is_terminal().tolist() == [False] * segments.num_segments


# 3. Properties


@given(hierarchies())
def test_levels_agree(case):
    segments, _ = case
    assert segments.lengths.sum() == segments.num_tokens
    assert torch.equal(segments.segment_ids().bincount(minlength=segments.num_segments), segments.lengths)
    assert torch.equal(segments.sequence_ids().bincount(minlength=segments.num_sequences), segments.cu_seqlens.diff())
    assert torch.equal(segments.sequence_ids(), segments.segment_sequence_ids()[segments.segment_ids()])
    assert torch.equal(segments.segment_sequence_ids().bincount(minlength=segments.num_sequences), segments.sequence_offsets.diff())


@given(st.integers(0, 4), st.integers(0, 7), st.integers(0, 2**32 - 1))
def test_padded_and_packed_agree(batch, width, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, width, generator=generator) < 0.6
    boundaries = torch.rand(batch, width, generator=generator) < 0.3
    values = torch.randn(batch, width, 2, generator=generator)
    packed = pack(values, mask)
    assert torch.equal(unpack(packed, mask), torch.where(mask.unsqueeze(-1), values, 0.0))
    assert torch.equal(pack(unpack(packed, mask, fill=float("nan")), mask), packed)
    segments = Segments.from_padded(mask, boundaries)
    assert (segments.num_tokens, segments.num_sequences) == (packed.shape[0], batch)
    assert (segments.lengths > 0).all()  # from_padded makes no empty segment
    assert torch.equal(segments.cu_seqlens.diff(), mask.sum(1))
    last = segments.token_offsets[1:] - 1  # each ends at a boundary or at the end of its sequence
    ends = pack(boundaries, mask)
    ends[segments.cu_seqlens[1:][mask.any(1)] - 1] = True
    assert torch.equal(last, ends.nonzero().squeeze(1))


# 4. Edges


def test_empty_hierarchies(device):
    nothing = segments_of([], [], device)
    assert (nothing.num_tokens, nothing.num_segments, nothing.num_sequences) == (0, 0, 0)
    assert nothing.segment_ids().shape == nothing.sequence_ids().shape == nothing.is_terminal().shape == (0,)
    hollow = segments_of([[], []], [True, True], device)
    assert hollow.is_terminal().shape == (0,)
    assert hollow.cu_seqlens.tolist() == [0, 0, 0]
    empty = segments_of([[0], [0, 0]], [True, False], device)
    assert empty.is_terminal().tolist() == [True, False, False]
    assert empty.segment_ids().shape == (0,)
    for shape in ((0, 4), (3, 0)):
        mask = torch.ones(shape, dtype=torch.bool, device=device)
        assert Segments.from_padded(mask).cu_seqlens.tolist() == [0] * (shape[0] + 1)
        assert unpack(pack(torch.ones(shape, device=device), mask), mask).shape == shape


def test_more_rows_than_a_grid_dimension(device):
    segments = segments_of([[1] * 70_000, [3] * 10], None, device)
    assert segments.segment_ids()[-1] == 70_009
    assert segments.sequence_ids().bincount().tolist() == [70_000, 30]


def test_int32_and_views_are_taken(device):
    offsets = torch.tensor([0, 9, 2, 9, 3, 9], dtype=torch.int32, device=device)[::2]
    segments = Segments(offsets, torch.tensor([0, 2], dtype=torch.int32, device=device))
    assert segments.token_offsets.dtype == segments.sequence_offsets.dtype == torch.int64
    assert segments.segment_ids().tolist() == [0, 0, 1]
    values = torch.randn(3, 4, device=device).T
    mask = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 0, 0], [0, 1, 0]], dtype=torch.bool, device=device)
    assert torch.equal(pack(values, mask), pack(values.contiguous(), mask))


def test_num_tokens_is_kept_and_moves_with_the_device(device):
    segments = Segments(torch.tensor([0, 2, 3]), torch.tensor([0, 2]), terminal=torch.tensor([True]), num_tokens=3).to(device)
    assert segments.num_tokens == 3
    assert segments.device.type == device.type
    assert segments.terminal.device.type == device.type
    assert segments.is_terminal().tolist() == [False, True]


def test_nan_in_padding_does_not_travel():
    mask = torch.tensor([[True, False]])
    values = torch.tensor([[1.0, float("nan")]], requires_grad=True)
    pack(values, mask).sum().backward()
    assert values.grad.tolist() == [[1.0, 0.0]]


# 5. Registration: nothing is registered here, but the objects go through torch.compile


def test_compiles_in_one_graph():
    segments = segments_of(LENGTHS, TERMINAL)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def mean_of_steps(values, segments):
        return segment_reduce(values, segments, reduce="mean")[segments.segment_ids()] + segments.is_terminal()[segments.segment_ids()]

    values = torch.randn(segments.num_tokens)
    wanted = segment_reduce(values, segments, reduce="mean")[segments.segment_ids()] + segments.is_terminal()[segments.segment_ids()]
    assert torch.equal(mean_of_steps(values, segments), wanted)


def test_unpack_compiles_in_one_graph():
    mask = torch.rand(3, 5) < 0.6
    values = torch.randn(int(mask.sum()), 2)
    assert torch.equal(torch.compile(lambda v: unpack(v, mask), fullgraph=True, backend="aot_eager")(values), unpack(values, mask))


# 6. Bad input


def offsets(*values):
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        ((offsets(1, 2), offsets(0, 1)), {}, "token_offsets must start at 0, got 1"),
        ((offsets(0, 3, 2), offsets(0, 2)), {}, "token_offsets must not decrease, got 3 then 2 at index 1"),
        ((offsets(0, 3), offsets(0, 1)), {"num_tokens": 4}, "token_offsets must end at num_tokens = 4, got 3"),
        ((offsets(0, 3), offsets(0, 1)), {"num_tokens": -1}, "num_tokens must be at least 0, got -1"),
        ((offsets(0, 3), offsets(1, 1)), {}, "sequence_offsets must start at 0, got 1"),
        ((offsets(0, 3, 4), offsets(0, 2, 1, 2)), {}, "sequence_offsets must not decrease, got 2 then 1 at index 1"),
        ((offsets(0, 3), offsets(0, 2)), {}, "sequence_offsets must end at the number of segments = 1, got 2"),
        ((offsets(), offsets(0)), {}, "token_offsets must have dtype"),
        ((torch.zeros(0, dtype=torch.int64), offsets(0)), {}, "token_offsets must hold at least the leading 0"),
        ((offsets(0), torch.zeros(0, dtype=torch.int64)), {}, "sequence_offsets must hold at least the leading 0"),
        ((offsets(0.0, 3.0), offsets(0, 1)), {}, "token_offsets must have dtype int64, int32, got float32"),
        ((offsets(0, 3), offsets(0, 1)[None]), {}, "sequence_offsets must have 1 dimension"),
        ((offsets(0, 3), offsets(0, 1)), {"terminal": torch.tensor([True, False])}, "terminal must have shape"),
        ((offsets(0, 3), offsets(0, 1)), {"terminal": torch.tensor([1])}, "terminal must have dtype bool"),
    ],
)
def test_bad_segments(arguments, keywords, message):
    with pytest.raises(ValueError, match=message):
        Segments(*arguments, **keywords)


def test_bad_types():
    with pytest.raises(TypeError, match=r"token_offsets must be a torch\.Tensor, got list"):
        Segments([0, 1], offsets(0, 1))
    for count in (3.0, "3", [3], torch.tensor(3.0), True, np.True_, torch.tensor(True)):  # a float would be cut, and on CUDA nobody would see it
        with pytest.raises(TypeError, match="num_tokens must be an integer, got"):
            Segments(offsets(0, 3), offsets(0, 1), num_tokens=count)
    assert Segments(offsets(0, 3), offsets(0, 1), num_tokens=torch.tensor(3)).num_tokens == 3


def test_meta_offsets_want_the_number_of_tokens():
    token_offsets, sequence_offsets = (torch.zeros(2, dtype=torch.int64, device="meta") for _ in range(2))
    with pytest.raises(ValueError, match="num_tokens must be given with token_offsets that hold no values, got a meta tensor and None"):
        Segments(token_offsets, sequence_offsets)
    assert Segments(token_offsets, sequence_offsets, num_tokens=3).num_tokens == 3


@pytest.mark.parametrize(
    ("dtype", "fill"),
    [
        (torch.int64, 0.5), (torch.int64, float("nan")), (torch.int32, float("inf")), (torch.int64, 2**63), (torch.uint8, -1), (torch.int8, 128),
        (torch.bool, 2), (torch.float16, 1e5), (torch.bfloat16, -1e39), (torch.float32, 10**400), (torch.float32, 1j),
    ],
)  # fmt: skip
def test_a_fill_that_the_dtype_does_not_hold(dtype, fill):
    with pytest.raises(ValueError, match=f"fill must be a number that the dtype of values holds, {str(dtype)[6:]}, got"):
        unpack(torch.zeros(1, dtype=dtype), torch.tensor([[True, False]]), fill=fill)


def test_a_fill_that_is_held_or_rounded():
    mask = torch.tensor([[True, False]])
    for dtype, fill in (
        (torch.int64, -(2**63)),
        (torch.uint8, 255.0),
        (torch.bool, True),
        (torch.float16, float("-inf")),
        (torch.int32, np.int64(-7)),
    ):
        assert unpack(torch.zeros(1, dtype=dtype), mask, fill=fill)[0, 1].item() == fill
    assert unpack(torch.zeros(1, dtype=torch.bfloat16), mask, fill=0.1)[0, 1] == torch.tensor(0.1, dtype=torch.bfloat16)
    assert unpack(torch.zeros(1), mask, fill=float("nan"))[0, 1].isnan()
    with pytest.raises(TypeError, match="fill must be a number, got str"):
        unpack(torch.zeros(1), mask, fill="0")


class Waits(TorchDispatchMode):
    """Counts what waits for a GPU: numbers that are read, and indices of as many elements as a mask has True."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, tensors = function.overloadpacket.__name__, [x for x in args[1] if x is not None] if len(args) > 1 and isinstance(args[1], list) else []
        by_mask = name in ("index", "index_put_") and any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in tensors)
        self.count += name in ("_local_scalar_dense", "nonzero") or by_mask
        return function(*args, **(kwargs or {}))


def test_how_often_from_padded_waits(monkeypatch):
    monkeypatch.setattr(segments_module, "_check_offsets", lambda *_: None)  # not on a GPU
    mask = torch.rand(3, 5) < 0.6
    for boundaries in (None, torch.rand(3, 5) < 0.3):
        with Waits() as waits:
            Segments.from_padded(mask, boundaries)
        assert waits.count == 2


def test_bad_padded():
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="mask must have dtype bool, got float32"):
        Segments.from_padded(mask.float())
    with pytest.raises(ValueError, match="mask must have 2 dimensions"):
        Segments.from_padded(mask[0])
    with pytest.raises(ValueError, match="boundaries must have shape"):
        Segments.from_padded(mask, mask[:, :2])
    with pytest.raises(ValueError, match="mask must have dtype bool"):
        pack(torch.ones(2, 3), mask.long())
    with pytest.raises(ValueError, match=r"values must be \[B,T,...\] with the mask's"):
        pack(torch.ones(3, 2), mask)
    with pytest.raises(ValueError, match=r"values must be \[B,T,...\] with the mask's"):
        pack(torch.ones(6), mask)
    with pytest.raises(ValueError, match="values must be on cpu, got meta"):
        pack(torch.ones(2, 3, device="meta"), mask)
    with pytest.raises(ValueError, match="mask must hold N = 5 times True, got 6"):
        unpack(torch.ones(5), mask)
    with pytest.raises(ValueError, match="mask must have 2 dimensions"):
        unpack(torch.ones(6), mask[0])
    with pytest.raises(ValueError, match="got a 0-d tensor"):
        unpack(torch.tensor(1.0), mask)
