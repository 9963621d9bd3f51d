"""The product of experts against torch's own."""
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from rmoe.moe.products import _HAS_ONEDNN, linear, pad_rows, unpadded

needs_onednn = pytest.mark.skipif(
    not _HAS_ONEDNN, reason='only a CPU with AVX-512 pads rows')


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('transposed', [False, True])
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('rows', [1, 37])
def test_is_a_linear_layer(rows, bias, transposed, dtype):
    x, weight = torch.randn(rows, 24).to(dtype), torch.randn(40, 24).to(dtype)
    if transposed:
        x, weight = (part.t().contiguous().t() for part in (x, weight))
    offset = torch.randn(40).to(dtype) if bias else None
    expected = x.double() @ weight.double().t() + (
        offset.double() if bias else 0)
    out = linear(x, weight, offset)
    assert out.dtype == dtype and out.is_contiguous()
    torch.testing.assert_close(
        out.double(), expected,
        atol=1e-5 if dtype == torch.float32 else .1, rtol=.01)


@needs_onednn
def test_rows_are_padded_to_sixteen_sizes_between_powers_of_two():
    sizes = [len(pad_rows(torch.ones(count, 2)))
             for count in range(1, 2049)]
    assert all(count <= size < count * 17 / 16 + 1
               for count, size in enumerate(sizes, 1))
    for low in (32, 256, 1024):
        assert len(set(sizes[low:2 * low])) == 16
    padded = pad_rows(torch.ones(33, 2))
    assert padded.sum() == 66 and not padded[33:].any()


@needs_onednn
def test_who_counts_or_needs_no_padding_gets_none():
    rows = torch.ones(33, 2)
    with unpadded():
        assert pad_rows(rows) is rows
    with torch.backends.mkldnn.flags(enabled=False):
        assert pad_rows(rows) is rows
    half = rows.bfloat16()
    assert pad_rows(half) is half
    assert len(pad_rows(rows)) == 34


def test_operations_are_counted():
    with FlopCounterMode(display=False) as counter:
        linear(torch.ones(3, 5), torch.ones(7, 5), torch.ones(7))
    assert counter.get_total_flops() == 2 * 3 * 5 * 7


@pytest.mark.torch('2.10')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('last', [8, 6])
def test_operations_of_a_grouped_product_are_counted(last, dtype):
    # 8 rows of width 16 by three experts to width 24. Rows behind the last
    # offset count too.
    rows = torch.ones(8, 16, dtype=dtype, requires_grad=True)
    weight = torch.ones(3, 16, 24, dtype=dtype, requires_grad=True)
    offsets = torch.tensor([2, 2, last], dtype=torch.int32)
    with FlopCounterMode(display=False) as counter:
        out = F.grouped_mm(rows, weight, offs=offsets)
        forward = counter.get_total_flops()
        out.backward(torch.ones_like(out))
    assert forward == 2 * 8 * 16 * 24
    # The gradients of rows and of weights are as much each.
    assert counter.get_total_flops() == 3 * forward


@pytest.mark.torch('2.10')
def test_a_frozen_weight_saves_its_product():
    rows = torch.ones(8, 16, requires_grad=True)
    offsets = torch.tensor([2, 5, 8], dtype=torch.int32)
    with FlopCounterMode(display=False) as counter:
        out = F.grouped_mm(rows, torch.ones(3, 16, 24), offs=offsets)
        out.backward(torch.ones_like(out))
    assert counter.get_total_flops() == 2 * (2 * 8 * 16 * 24)


@pytest.mark.torch('2.10')
def test_operations_of_a_batch_of_products_are_counted():
    with FlopCounterMode(display=False) as counter:
        F.grouped_mm(torch.ones(3, 8, 16), torch.ones(3, 16, 24))
    assert counter.get_total_flops() == 3 * (2 * 8 * 16 * 24)
