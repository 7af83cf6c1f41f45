"""What the kernels over the ragged hierarchy share: chunks of units, and exp without the error of a rounded product.

A UNIT is a segment or a sequence. It is cut into chunks of CHUNK tokens counted from its own first token, so that the order of its
sums depends on nothing but its own tokens, and a huge unit is spread over as many programs as it needs. Unit u owns the slots
u + begin_u // CHUNK, ..., at least one and at least as many as it has chunks: the grid follows from N and the number of units
alone, offsets are never read back, and a slot finds its unit by bisection. A program takes ROWS neighbouring slots.

One launch. A launch costs some 3 us on the GPU and more on the host, as long as these operations take at 65,536 tokens. What a later
launch would do with all results of this one is done by the program that arrives last (`_arrive`): which one that is changes no bit. What
every program must know of tokens that others read, it reads itself, out of L2, as long as that is less than REDUNDANT bytes in all.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
import triton.language as tl
from torch import Tensor

# A program is a tile of 1024 tokens, 4 for each of 256 threads. Reasoning steps hold 8 to 256 tokens (section 2 of docs/method.md),
# so eight chunks of 128; a rollout is long, so one chunk of 1024. The first token of a chunk lies anywhere: loads are as wide as
# an element, 32 neighbouring ones a warp.
TILES = {"segment": {"ROWS": 8, "CHUNK": 128}, "sequence": {"ROWS": 1, "CHUNK": 1024}}
# With a limit of its own choice ptxas weighs occupancy and puts values on the stack to fit 32, 56, 80 or 128 registers; with this one it does not.
LAUNCH = {"num_warps": 8, "maxnreg": 255}
REDUNDANT = 2**24  # bytes: 3 us of an H200's L2 at 5.5 TB/s, what the launch that they spare would cost

LOG2E = tl.constexpr(1.4426950408889634)
TINY = tl.constexpr(2.0**-126)  # the least normal float32
LN2_HIGH = tl.constexpr(0.693115234375)  # 13 bits: its product with an integer of up to 11 bits is exact
LN2_LOW = tl.constexpr(0.693147180559945309 - 0.693115234375)


@triton.jit
def _unit_begin(unit, token_offsets_ptr, sequence_offsets_ptr, SEQUENCE: tl.constexpr):
    if SEQUENCE:
        unit = tl.load(sequence_offsets_ptr + unit)
    return tl.load(token_offsets_ptr + unit)


@triton.jit
def _chunk(slot, token_offsets_ptr, sequence_offsets_ptr, num_tokens, num_units, bisections, SEQUENCE: tl.constexpr, CHUNK: tl.constexpr):
    """(unit, its first slot, its number of chunks, first token and end of the chunk, end of the unit) of each slot; past the last chunk
    of a unit the chunk is empty and `slot - first slot >= chunks`."""
    low = slot * 0
    high = low + num_units
    for _ in range(bisections):
        middle = (low + high) // 2
        below = middle + _unit_begin(middle, token_offsets_ptr, sequence_offsets_ptr, SEQUENCE) // CHUNK <= slot
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    # Offsets are the caller's promise; held to [0, N] a broken one still reads nothing outside.
    begin = tl.minimum(tl.maximum(_unit_begin(low, token_offsets_ptr, sequence_offsets_ptr, SEQUENCE), 0), num_tokens)
    end = tl.minimum(tl.maximum(_unit_begin(low + 1, token_offsets_ptr, sequence_offsets_ptr, SEQUENCE), begin), num_tokens)
    first = low + begin // CHUNK
    chunks = tl.maximum((end - begin + CHUNK - 1) // CHUNK, 1)
    start = begin + (slot - first) * CHUNK
    return low, first, chunks, start, tl.minimum(start + CHUNK, end), end


@triton.jit
def _arrive(counter_ptr, wanted, here):
    """Counts an arrival and tells who was the last of `wanted`, who then sees what all others have stored, and leaves the counter 0."""
    tl.debug_barrier()  # every thread's stores come before the one arrival of its program
    last = here & (tl.atomic_add(counter_ptr, 1, mask=here, sem="acq_rel", scope="gpu") == wanted - 1)
    tl.store(counter_ptr, 0, mask=last)
    tl.debug_barrier()
    return last


@triton.jit
def _reciprocal(x):
    """1/x to 1e-16, as a float64, by two of Newton's steps. A division is a call of a routine, for whose registers ptxas may put others
    on the stack: there is none in these kernels, nor a square root."""
    x = tl.cast(x, tl.float64)
    one = tl.full([], 1.0, tl.float64)
    y = (1.0 / x.to(tl.float32)).to(tl.float64)
    y = tl.fma(y, tl.fma(-x, y, one), y)
    return tl.fma(y, tl.fma(-x, y, one), y)


@triton.jit
def _inverse_root(x):
    """1/sqrt(x) likewise; 0 of what is 0 in float32, or so small that the approximation takes it for 0."""
    x = tl.cast(x, tl.float64)
    y = tl.where(x.to(tl.float32) >= TINY, tl.rsqrt(x.to(tl.float32)), 0.0).to(tl.float64)
    half = tl.full([], 0.5, tl.float64)
    y = tl.fma(y * half, tl.fma(-x * y, y, 2.0 * half), y)
    return tl.fma(y * half, tl.fma(-x * y, y, 2.0 * half), y)


@triton.jit
def _k3(x):
    """exp(x) - 1 - x: Taylor for |x| < 0.5, where the difference would cancel; the term left out is 2e-10 of the first."""
    series = 1.0 + x * (1.0 / 9) * (1.0 + x * (1.0 / 10))
    series = 1.0 + x * (1.0 / 6) * (1.0 + x * (1.0 / 7) * (1.0 + x * (1.0 / 8) * series))
    series = 0.5 * x * x * (1.0 + x * (1.0 / 3) * (1.0 + x * (1.0 / 4) * (1.0 + x * (1.0 / 5) * series)))
    return series


@triton.jit
def _exp(x):
    """exp for |x| <= 100. The integer part of x log2(e) is split off first (a product of 28 rounded to float32 costs exp 1e-6 of
    itself), and the rest goes through the series, half a unit more exact than ex2.approx."""
    n = tl.floor(x * LOG2E + 0.5)
    f = (x - n * LN2_HIGH) - n * LN2_LOW
    return (1.0 + (f + _k3(f))) * tl.exp2(n)


@triton.jit
def _exp_wide(x):
    """The same before it is rounded, as a float64 good to 2e-8: for sums whose terms cancel."""
    n = tl.floor(x * LOG2E + 0.5)
    f = (x - n * LN2_HIGH) - n * LN2_LOW
    return (1.0 + (f + _k3(f)).to(tl.float64)) * tl.exp2(n)


@triton.jit
def _exp_minus_1_minus(x):
    return tl.where(tl.abs(x) < 0.5, _k3(tl.where(tl.abs(x) < 0.5, x, 0.0)), (_exp(x) - 1.0) - x)


def slots(num_tokens: int, num_units: int, level: str) -> int:
    return num_units + num_tokens // TILES[level]["CHUNK"]


def bisections(num_units: int) -> int:
    return max(num_units, 1).bit_length()


_ARRIVALS: dict[tuple[torch.device, int], Tensor] = {}
_CAPTURED: dict[torch.device, tuple[Tensor, int]] = {}  # counters, and how many of them graphs have


def arrivals(number: int, tensor: Tensor) -> Tensor:
    """Counters that hold 0, and 0 again when a kernel is done with them: zeroed once for a device and a stream, whose kernels follow one
    another. A CUDA graph may run beside any stream: each call in it gets counters that nobody else has, out of 65,536 zeroed beforehand,
    or, where nothing ran before the capture or those are spent, some that the graph itself zeroes."""
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        held, taken = _CAPTURED.get(tensor.device, (None, 0))
        end = taken + triton.cdiv(number, 4) * 4  # whole 16 bytes: what is aligned is not compiled again
        if held is None or end > held.shape[0]:
            return torch.zeros(number, dtype=torch.int32, device=tensor.device)
        _CAPTURED[tensor.device] = held, end
        return held[taken:end]
    key = tensor.device, torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0
    held = _ARRIVALS.get(key)
    if held is None or held.shape[0] < number:
        held = _ARRIVALS[key] = _kept_zeros(max(1024, triton.next_power_of_2(number)), tensor.device)
        if tensor.device not in _CAPTURED:
            _CAPTURED[tensor.device] = _kept_zeros(2**16, tensor.device), 0
    return held


def _kept_zeros(size: int, device: torch.device) -> Tensor:
    """Zeros of the current stream that outlive the call. torch.compile(mode="reduce-overhead") runs a call before it captures it, and meanwhile
    gives its thread memory of the graphs alone, where it takes what stays allocated for a leak: another thread has everyone's."""
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def zeros() -> Tensor:
        with torch.cuda.stream(stream):  # whose kernels then follow the zeros
            return torch.zeros(size, dtype=torch.int32, device=device)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(zeros).result()


def device(tensor: Tensor):
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def compact(tensor: Tensor | None) -> Tensor | None:
    """Packed vectors are contiguous; a strided one is copied. Booleans are read as bytes."""
    if tensor is None:
        return None
    tensor = tensor.contiguous()
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
