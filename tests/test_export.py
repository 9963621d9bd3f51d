"""A MoE segmentor through torch.export and ONNX: every expert is in the file,
and is used where an input needs it, though the example did not."""
import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from rmoe import compat
from rmoe.moe import moe_layers
from rmoe.moe.recording import record_routing

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')
pytestmark = pytest.mark.torch(compat.NEEDS[
    'export by torch.export or to ONNX'])

ROUTERS = {
    'token choice': dict(type='TokenChoiceRouter'),
    'token choice k=2': dict(type='TokenChoiceRouter', top_k=2),
    'by priority': dict(type='TokenChoiceRouter', eval_capacity_factor=.5,
                        capacity_multiple=1, priority='bpr'),
    'sinkhorn': dict(type='SinkhornTokenChoiceRouter', iterations=5),
    'bias balanced': dict(type='BiasBalancedRouter'),
    'expert choice': dict(type='ExpertChoiceRouter'),
    'soft': dict(type='SoftRouter', slots_per_expert=4),
}
# These may leave experts out; the others use them all by construction.
CHOOSY = ('token choice', 'token choice k=2', 'bias balanced')
E = 6


def segmentor(router: dict):
    """Swin + FCN head whose experts and routers are random."""
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(dict(
            type='EncoderDecoder',
            backbone=dict(
                type='rmoe.SwinMoE', embed_dims=8, depths=(1, 2),
                num_heads=(1, 2), strides=(4, 2), out_indices=(1, ),
                window_size=4, with_cp=True,
                moe=dict(layers=((), (0, 1)), num_experts=E, router=router)),
            decode_head=dict(type='FCNHead', in_channels=16, in_index=0,
                             channels=8, num_classes=5, num_convs=1)))
    for key, parameter in model.named_parameters():
        if 'residual' in key or 'router' in key:
            nn.init.normal_(parameter, std=.3)
    return model.eval()


def used_experts(model, image) -> dict[str, set[int]]:
    with record_routing(model) as records, torch.no_grad():
        model(image)
    return {name: set(routing.load_E.nonzero().flatten().tolist())
            for name, (routing, ) in records.items()}


# An older torch writes a file of expert choice that computes something else.
@pytest.fixture(params=[
    pytest.param(name, marks=pytest.mark.torch('2.14'))
    if name == 'expert choice' else name for name in ROUTERS])
def case(request):
    """A model, an example, and images that need other experts."""
    model = segmentor(ROUTERS[request.param])
    # one colour: every patch is the same
    example = torch.ones(1, 3, 48, 48)
    others = [torch.randn(1, 3, 48, 48) for _ in range(4)]
    if request.param in CHOOSY:
        seen = used_experts(model, example)
        for name in seen:
            new = set.union(*(used_experts(model, image)[name]
                              for image in others)) - seen[name]
            assert len(new) >= 2, (name, seen[name], new)
    return model, example, others


def assert_same(run, model, images):
    for image in images:
        with torch.no_grad():
            torch.testing.assert_close(run(image), model(image), rtol=1e-4,
                                       atol=1e-4)


def stacked_weights(model) -> list[torch.Tensor]:
    """(E, out, in) of both linear layers of every MoE layer."""
    return [layer.experts.weight(part, layer.core).detach()
            for layer in moe_layers(model).values()
            for part in ('fc1', 'fc2')]


def test_torch_export(case):
    model, example, others = case
    program = torch.export.export(model, (example, ))
    assert_same(program.module(), model, [example, *others])


@pytest.mark.parametrize('case', ['token choice k=2'], indirect=True)
def test_strict_export(case):
    model, example, others = case
    program = torch.export.export(model, (example, ), strict=True)
    assert_same(program.module(), model, [example, *others])


def test_onnx(case, tmp_path):
    model, example, others = case
    path = str(tmp_path / 'model.onnx')
    torch.onnx.export(model, (example, ), path, dynamo=True, verbose=False,
                      external_data=False)
    session = onnxruntime.InferenceSession(path)
    name = session.get_inputs()[0].name
    assert_same(lambda image: torch.from_numpy(
        session.run(None, {name: image.numpy()})[0]), model,
        [example, *others])
    arrays = [onnx.numpy_helper.to_array(array)
              for array in onnx.load(path).graph.initializer]
    stored = [torch.from_numpy(array.copy()) for array in arrays
              if array.ndim == 3 and len(array) == E]
    for weight in stacked_weights(model):
        # folded, or as it is multiplied: transposed
        assert any(each.shape == kind.shape and torch.allclose(each, kind)
                   for each in stored for kind in (weight, weight.mT))
