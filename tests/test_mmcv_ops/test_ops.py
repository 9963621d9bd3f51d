"""Each operator against plain loops and, where mmcv has its own, against it.

Everything goes through mmcv's functions and modules, which call the stand-in
as they call compiled operators.
"""
import importlib
from itertools import product

import mmcv._ext
import pytest
import torch
import torchvision
from mmcv import ops
from mmcv.ops.multi_scale_deform_attn import (
    MultiScaleDeformableAttnFunction,
    multi_scale_deformable_attn_pytorch,
)
from torch import nn
from torch.nn import functional as F

from rmoe.mmcv_ops import extension, torchvision_ops

MODULES = ('bbox', 'deform_conv', 'focal_loss', 'masked_conv',
           'modulated_deform_conv', 'multi_scale_deform_attn', 'nms',
           'roi_align', 'roi_pool')
COMPILED = not mmcv._ext.__file__.endswith('.py')


@pytest.fixture
def stand_in(monkeypatch):
    """Also where mmcv has operators of its own."""
    for name in MODULES:
        module = importlib.import_module(f'mmcv.ops.{name}')
        monkeypatch.setattr(module, 'ext_module', extension)


def boxes(count=60):
    """(count, 4) float32 that overlap, and scores without ties."""
    corners = torch.rand(count, 2) * 40
    scores = torch.linspace(0.05, 0.95, count)[torch.randperm(count)]
    return torch.cat([corners, corners + 3 + torch.rand(count, 2) * 30],
                     1), scores


def regions():
    """Feature maps and regions: inside, over the edge, outside, empty."""
    maps = torch.randn(2, 3, 11, 13, requires_grad=True)
    return maps, torch.tensor([
        [0, 3.2, 5.1, 30.7, 40.3], [1, -7., 2., 20., 60.],
        [1, 10., 10., 10., 10.], [0, 90., 90., 99., 99.],
        [1, 4., 8., 7.9, 9.5]])


def with_gradients(output, *inputs):
    """A result and the gradients of its inputs."""
    weights = torch.randn(output.shape, generator=torch.Generator(
        ).manual_seed(1))
    return [output.detach(), *torch.autograd.grad(
        (output * weights).sum(), inputs)]


def nms(offset=0):
    return ops.nms(*boxes(), 0.4, offset=offset)


def soft_nms(method, offset=0):
    return ops.soft_nms(*boxes(), 0.3, 0.5, 0.05, method, offset)


def batched(**options):
    """As mmdet's heads call it: nothing of one class touches another."""
    found, scores = boxes()
    return ops.batched_nms(found, scores, torch.arange(60) % 3, dict(
        iou_threshold=0.4, **options))


def nms_match():
    return ops.nms_match(torch.cat([boxes()[0], boxes()[1][:, None]], 1), 0.4)


def overlaps(mode, aligned, offset):
    first, second = boxes(20)[0], boxes(20)[0]
    return [ops.bbox_overlaps(first, second, mode, aligned, offset)]


def roi_align(aligned, ratio):
    maps, rois = regions()
    return with_gradients(
        ops.roi_align(maps, rois, (3, 4), 0.25, ratio, 'avg', aligned), maps)


def deform_conv(groups, deform_groups, stride):
    layer = ops.DeformConv2d(4, 6, 3, stride, 1, 1, groups, deform_groups)
    x = torch.randn(2, 4, 7, 8, requires_grad=True)
    # Two pixels away at most, over the edge too.
    size = layer.weight.new_empty(2, 4, 7, 8)[..., ::stride, ::stride].shape
    offset = torch.randn(2, deform_groups * 18, *size[2:]).requires_grad_()
    return with_gradients(layer(x, offset), x, offset, layer.weight)


def modulated(groups, deform_groups, bias):
    layer = ops.ModulatedDeformConv2d(
        4, 6, 3, 1, 1, 1, groups, deform_groups, bias=bias)
    nn.init.normal_(layer.weight)
    x = torch.randn(2, 4, 7, 8, requires_grad=True)
    offset = torch.randn(2, deform_groups * 18, 7, 8).requires_grad_()
    mask = torch.rand(2, deform_groups * 9, 7, 8, requires_grad=True)
    return with_gradients(layer(x, offset, mask), x, offset, mask,
                          *layer.parameters())


ON_CPU = {
    'nms': nms,
    'nms_offset': lambda: nms(1),
    'soft_nms_naive': lambda: soft_nms('naive'),
    'soft_nms_linear': lambda: soft_nms('linear', 1),
    'soft_nms_gaussian': lambda: soft_nms('gaussian'),
    'nms_match': nms_match,
    'batched_nms': batched,
    'batched_soft_nms': lambda: batched(type='soft_nms'),
    **{f'overlaps_{mode}_{aligned}_{offset}':
       lambda o=(mode, aligned, offset): overlaps(*o)
       for mode, aligned, offset in product(
           ('iou', 'iof'), (False, True), (0, 1))},
    'roi_align': lambda: roi_align(True, 0),
    'roi_align_not_aligned': lambda: roi_align(False, 2),
    'deform_conv': lambda: deform_conv(1, 1, 1),
    'deform_conv_groups': lambda: deform_conv(2, 2, 2),
    'modulated': lambda: modulated(1, 1, True),
    'modulated_groups': lambda: modulated(2, 2, False),
}


@pytest.mark.mmcv_ops
@pytest.mark.skipif(not COMPILED, reason='make test MMCV=full builds them')
@pytest.mark.parametrize('name', ON_CPU)
def test_equals_compiled_mmcv(name, request):
    torch.manual_seed(0)
    expected = ON_CPU[name]()
    request.getfixturevalue('stand_in')
    torch.manual_seed(0)
    found = ON_CPU[name]()
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)


def iou(one, other, offset=0):
    width, height = (max(0., min(one[2 + i], other[2 + i]) -
                         max(one[i], other[i]) + offset) for i in (0, 1))
    areas = [(box[2] - box[0] + offset) * (box[3] - box[1] + offset)
             for box in (one, other)]
    return width * height / (sum(areas) - width * height)


@pytest.mark.parametrize('offset', [0, 1])
def test_nms_keeps_what_a_loop_keeps(stand_in, offset):
    found, scores = boxes()
    kept = []
    for i in scores.argsort(descending=True).tolist():
        if all(iou(found[i].tolist(), found[j].tolist(), offset) <= 0.4
               for j in kept):
            kept.append(i)
    dets, indices = ops.nms(found, scores, 0.4, offset=offset)
    assert indices.tolist() == kept
    assert 5 < len(kept) < 50
    torch.testing.assert_close(dets, torch.cat(
        [found[kept], scores[kept, None]], 1))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_nms_takes_half_precision_on_the_cpu(stand_in, dtype):
    found, scores = (part.to(dtype) for part in boxes(12))
    _, indices = ops.nms(found, scores, 0.4)
    assert torch.equal(indices, ops.nms(
        found.float(), scores.float(), 0.4)[1])


def test_a_soft_nms_loop(stand_in):
    found, scores = boxes(30)
    left, current, expected = set(range(30)), scores.tolist(), []
    while left:
        best = max(left, key=lambda i: current[i])
        left.remove(best)
        expected.append([*found[best].tolist(), current[best]])
        for i in list(left):
            overlap = iou(found[best].tolist(), found[i].tolist())
            current[i] *= 1 - overlap if overlap >= 0.3 else 1
            if current[i] < 0.05:
                left.remove(i)
    dets, indices = ops.soft_nms(found, scores, 0.3, method='linear',
                                 min_score=0.05)
    torch.testing.assert_close(dets, torch.tensor(expected))
    torch.testing.assert_close(dets[:, :4], found[indices])
    assert dets[-1, 4] < scores.max()


def test_nms_of_nothing(stand_in):
    empty = torch.zeros(0, 4), torch.zeros(0)
    for found in (ops.nms(*empty, 0.5), ops.soft_nms(*empty)):
        assert found[0].shape == (0, 5) and len(found[1]) == 0


def test_nms_match_groups_every_box_once(stand_in):
    found, scores = boxes()
    groups = ops.nms_match(torch.cat([found, scores[:, None]], 1), 0.4)
    assert [int(group[0]) for group in groups] == ops.nms(
        found, scores, 0.4)[1].tolist()
    assert sorted(torch.cat(groups).tolist()) == list(range(60))
    for group in groups:
        assert scores[group].tolist() == sorted(scores[group], reverse=True)
        for i in group[1:].tolist():
            assert iou(found[int(group[0])].tolist(),
                       found[i].tolist()) >= 0.4


@pytest.mark.parametrize('offset', [0, 1])
def test_overlaps_of_pairs_and_of_all(stand_in, offset):
    first, second = boxes(9)[0], boxes(9)[0]
    every = ops.bbox_overlaps(first, second, offset=offset)
    expected = torch.tensor([[iou(a, b, offset) for b in second.tolist()]
                             for a in first.tolist()])
    torch.testing.assert_close(every, expected)
    torch.testing.assert_close(
        ops.bbox_overlaps(first, second, aligned=True, offset=offset),
        expected.diagonal())
    if not offset:
        torch.testing.assert_close(
            every, torchvision.ops.box_iou(first, second))


def test_roi_align_averages_a_ramp(stand_in):
    """Bilinear samples of a plane are the plane, so a bin is its centre."""
    y, x = torch.meshgrid(torch.arange(16.), torch.arange(20.), indexing='ij')
    maps = torch.stack([x, y])[None]
    # In pixels of the maps: 2.5 to 10.5 and 3.5 to 7.5, after half a pixel.
    rois = torch.tensor([[0, 12., 16., 44., 32.]])
    found = ops.roi_align(maps, rois, (2, 4), 0.25, 0, 'avg', True)[0]
    torch.testing.assert_close(found[0], torch.tensor(
        [3.5, 5.5, 7.5, 9.5]).expand(2, 4))
    torch.testing.assert_close(found[1], torch.tensor(
        [[4.5], [6.5]]).expand(2, 4))


def test_roi_align_is_torchvisions_with_its_gradient(stand_in):
    maps, rois = regions()
    found = roi_align_of(ops.roi_align(
        maps, rois, (3, 4), 0.25, 2, 'avg', True), maps)
    expected = roi_align_of(torchvision.ops.roi_align(
        maps, rois, (3, 4), 0.25, 2, True), maps)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other)
    assert found[1].any()


def roi_align_of(output, maps):
    return with_gradients(output, maps)


def test_roi_align_in_bfloat16(stand_in):
    maps, rois = regions()
    found = ops.roi_align(maps.bfloat16(), rois.bfloat16(), (3, 4), 0.25)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(
        found.float(), ops.roi_align(maps, rois.bfloat16().float(), (3, 4),
                                     0.25), rtol=0.02, atol=0.02)


def test_what_torchvision_lacks_is_named(stand_in):
    maps, rois = regions()
    with pytest.raises(NotImplementedError, match="pool_mode='avg'"):
        ops.roi_align(maps, rois, 2, 1., 0, 'max')


def test_roi_pool_takes_the_largest_of_each_bin(stand_in):
    maps, rois = regions()
    scale, expected = 0.25, []
    for image, *corners in rois.tolist():
        x, y, right, bottom = (
            (corner + end) * scale for corner, end in zip(
                corners, (0, 0, 1, 1)))
        for row, column in product(range(3), range(2)):
            part = maps[int(image)][:, bins(y, bottom, row, 3, 11)]
            part = part[:, :, bins(x, right, column, 2, 13)].flatten(1)
            expected.append(part.amax(1) if part.numel() else
                            torch.zeros(3))
    expected = torch.stack(expected).view(5, 3, 2, 3).permute(0, 3, 1, 2)
    found = ops.roi_pool(maps, rois, (3, 2), scale)
    for one, other in zip(with_gradients(found, maps),
                          with_gradients(expected, maps)):
        torch.testing.assert_close(one, other)
    assert not found[3].any(), 'outside'


def bins(start, end, index, count, size):
    step = (end - start) / count
    first, last = start + index * step, start + (index + 1) * step
    return slice(min(max(int(first // 1), 0), size),
                 min(max(int(-(-last // 1)), 0), size))


def sample(maps, y, x):
    """Bilinear, zero outside; differentiable in y and x."""
    total = 0.
    for at_y, at_x in product((int(y // 1), int(y // 1) + 1),
                              (int(x // 1), int(x // 1) + 1)):
        if 0 <= at_y < maps.shape[-2] and 0 <= at_x < maps.shape[-1]:
            total = total + maps[..., at_y, at_x] * (
                1 - (y - at_y).abs()) * (1 - (x - at_x).abs())
    return total if torch.is_tensor(total) else maps[..., 0, 0] * 0


def test_deformable_convolutions_are_a_loop(stand_in):
    """Version 1 has no mask: version 2 with a mask of ones."""
    x = torch.randn(1, 2, 4, 5, requires_grad=True)
    offset = torch.randn(1, 18, 4, 5).requires_grad_()
    mask = torch.rand(1, 9, 4, 5, requires_grad=True)
    weight = torch.randn(3, 2, 3, 3, requires_grad=True)
    bias = torch.randn(3, requires_grad=True)

    def loop(mask):
        out = []
        for i, j in product(range(4), range(5)):
            total = 0.
            for k, (a, b) in enumerate(product(range(3), range(3))):
                value = sample(x[0], i + a - 1 + offset[0, 2 * k, i, j],
                               j + b - 1 + offset[0, 2 * k + 1, i, j])
                total = total + weight[:, :, a, b] @ value * mask[0, k, i, j]
            out.append(total)
        return torch.stack(out, 1).view(1, 3, 4, 5)

    first = ops.deform_conv2d(x, offset, weight, 1, 1)
    for one, other in zip(
            with_gradients(first, x, offset, weight),
            with_gradients(loop(torch.ones_like(mask)), x, offset, weight)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    second = ops.modulated_deform_conv2d(x, offset, mask, weight, bias, 1, 1)
    inputs = (x, offset, mask, weight, bias)
    for one, other in zip(
            with_gradients(second, *inputs),
            with_gradients(loop(mask) + bias[:, None, None], *inputs)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_deformable_attention_and_its_gradients(stand_in):
    """mmcv's function, which it uses on a GPU, against its PyTorch form."""
    shapes = torch.tensor([[6, 5], [3, 2]])
    starts = torch.tensor([0, 30])
    value = torch.randn(2, 36, 4, 8, requires_grad=True)
    places = torch.rand(2, 7, 4, 2, 3, 2, requires_grad=True)
    weights = torch.rand(2, 7, 4, 2, 3, requires_grad=True)
    inputs = (value, places, weights)
    found = MultiScaleDeformableAttnFunction.apply(
        value, shapes, starts, places, weights, 64)
    expected = multi_scale_deformable_attn_pytorch(value, shapes, places,
                                                   weights)
    assert found.shape == (2, 7, 32)
    for one, other in zip(with_gradients(found, *inputs),
                          with_gradients(expected, *inputs)):
        torch.testing.assert_close(one, other)


def test_focal_loss_and_its_gradient(stand_in):
    logits = (torch.randn(12, 5) * 20).requires_grad_()
    target = torch.arange(12) % 6  # 5 is background
    found = ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, None, 'none')
    one_hot = F.one_hot(target, 6)[:, :5].float()
    expected = torchvision.ops.sigmoid_focal_loss(logits, one_hot, 0.25, 2.0)
    for one, other in zip(with_gradients(found, logits),
                          with_gradients(expected, logits)):
        torch.testing.assert_close(one, other)
    weight = torch.rand(5)
    weighted = ops.sigmoid_focal_loss(logits[:5], target[:5], 2.0, 0.25,
                                      weight, 'none')
    torch.testing.assert_close(weighted, found[:5] * weight[:, None])


def test_masked_convolution_is_a_masked_convolution(stand_in):
    layer = ops.MaskedConv2d(3, 4, (3, 5), padding=(1, 2)).eval()
    x, mask = torch.randn(1, 3, 6, 7), torch.rand(1, 6, 7) > 0.6
    with torch.no_grad():
        expected = F.conv2d(x, layer.weight, layer.bias, padding=(1, 2))
        torch.testing.assert_close(layer(x, mask), expected * mask)


def test_an_operator_without_stand_in_is_named_when_it_is_called():
    with pytest.raises(NotImplementedError, match='carafe_forward is compil'):
        extension.carafe_forward(1, 2, three=3)
    assert not hasattr(extension, '__wrapped__')
    # What mmcv's report of its environment asks for.
    assert 'rmoe' in extension.get_compiler_version()
    assert extension.get_compiling_cuda_version()


def test_every_name_that_is_served_is_a_function():
    for name in extension.__all__:
        assert extension.__dict__[name].__module__.startswith(
            'rmoe.mmcv_ops'), name


def test_a_torchvision_of_another_torch_is_named(monkeypatch):
    torchvision_ops.load.cache_clear()
    monkeypatch.setitem(__import__('sys').modules, 'torchvision', None)
    with pytest.raises(ImportError, match='torchvision that belongs to it'):
        extension.nms(*boxes(2), 0.5, 0)
