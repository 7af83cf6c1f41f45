"""Memory of large gradients that is kept for the next call."""

from __future__ import annotations

import pytest
import torch

from acpo_kernels import _cpu, linear_logprob_entropy

pytestmark = pytest.mark.skipif(not _cpu.available, reason="built without the C++ extension")


@pytest.fixture(autouse=True)
def ordinary(deterministic):
    """Without the NaN that deterministic algorithms write into fresh memory, for which torch.empty is asked."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_of_a_freed_gradient_serves_the_next(dtype):
    shape = torch.Size((3, _cpu._C.RECYCLED // dtype.itemsize // 3 + 1))
    first = _cpu.empty(shape, dtype)
    assert first.shape == shape and first.dtype == dtype and first.is_contiguous()
    where, second = first.data_ptr(), _cpu.empty(shape, dtype)
    first.fill_(1.0), second.fill_(2.0)
    assert second.data_ptr() != where  # while the first lives
    view = first[1:]
    del first
    third = _cpu.empty(shape, dtype)
    assert third.data_ptr() != where  # while a view of it lives
    assert (view == 1.0).all() and (second == 2.0).all()
    del view
    assert _cpu.empty(shape, dtype).data_ptr() == where
    assert _cpu.empty(torch.Size((4, 5)), dtype).untyped_storage().resizable()  # small ones are torch's own


def test_gradients_of_two_calls_do_not_share_memory():
    hidden, weight, ids = torch.randn(3, 600), torch.randn(15_000, 600, requires_grad=True), torch.tensor([1, 2, 3])

    def gradient(sign):
        (out,) = torch.autograd.grad(sign * linear_logprob_entropy(hidden, weight, ids).logp.sum(), weight)
        return out

    plus = gradient(1.0)
    before, minus = plus.clone(), gradient(-1.0)
    assert torch.equal(plus, before) and torch.equal(minus, -plus)
    where = plus.data_ptr()
    del plus
    again = gradient(1.0)
    assert again.data_ptr() == where and torch.equal(again, before)
    linear_logprob_entropy(hidden, weight, ids).logp.sum().backward()
    linear_logprob_entropy(hidden, weight, ids).logp.sum().backward()
    assert torch.equal(weight.grad, 2 * before)
