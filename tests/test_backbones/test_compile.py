"""torch.compile of whole backbones: one graph, equal results."""
import pytest
import torch
from torch import nn

from rmoe.backbones.padding import KnownBatch, ValidArea
from rmoe.moe import collect_losses, moe_layers
from rmoe.moe.recording import record_routing
from rmoe.registry import MODELS

pytestmark = pytest.mark.torch('2.9')  # older ones break the graph
MOE = dict(num_experts=4, router=dict(
    type='TokenChoiceRouter', noise_std=0., top_k=2,
    loss_weights=dict(importance=1.)))
SWIN = dict(embed_dims=8, depths=(1, 2), num_heads=(1, 2), strides=(4, 2),
            out_indices=(0, 1), window_size=4, drop_path_rate=0.)
BACKBONES = {
    'Swin': dict(SWIN, type='rmoe.SwinMoE',
                 moe=dict(MOE, layers=((), (0, 1)))),
    'Swin, recomputed': dict(SWIN, type='rmoe.SwinMoE', with_cp=True,
                             moe=dict(MOE, layers=((), (0, 1)))),
    'CvT': dict(type='rmoe.CvTMoE', embed_dims=(8, 16), depths=(1, 2),
                num_heads=(1, 2), patch_sizes=(7, 3), strides=(4, 2),
                patch_padding=(2, 1), drop_path_rates=(0., 0.),
                out_indices=(0, 1), moe=dict(MOE, layers=((), (0, 1)))),
    'ViT, resized': dict(type='rmoe.ViTMoE', embed_dims=16, num_layers=2,
                         num_heads=2, mlp_dims=32, img_size=64,
                         moe=dict(MOE, layers=(0, 1))),
    'MiT': dict(
        type='rmoe.UpcycledBackbone', moe=dict(MOE, layers=(0, 1)),
        backbone=dict(type='mmseg.MixVisionTransformer', embed_dims=8,
                      num_stages=2, num_layers=(1, 1), num_heads=(1, 2),
                      patch_sizes=(7, 3), strides=(4, 2), sr_ratios=(2, 1),
                      out_indices=(0, 1), drop_path_rate=0.)),
    'mmseg Swin': dict(type='rmoe.UpcycledBackbone',
                       moe=dict(MOE, layers=(0, 1)),
                       backbone=dict(SWIN, type='mmseg.SwinTransformer')),
}
every_backbone = pytest.mark.parametrize('name', BACKBONES)


def backbone_of(name: str):
    """A model whose experts differ, and whose router has clear
    preferences."""
    backbone = MODELS.build(BACKBONES[name])
    for key, parameter in backbone.named_parameters():
        if 'residual' in key or 'router' in key:
            nn.init.normal_(parameter, std=.3)
    return backbone


def fullgraph(module):
    torch._dynamo.reset()
    return torch.compile(module, backend='eager', fullgraph=True)


@pytest.mark.parametrize('training', [True, False])
@every_backbone
def test_one_graph_for_five_batches(name, training):
    backbone = backbone_of(name)
    backbone.train(training)
    layers = moe_layers(backbone).values()
    compiled = fullgraph(backbone)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(5):
            images = torch.randn(2, 3, 48, 48)
            results = []
            for module in (compiled, backbone):
                for layer in layers:
                    layer.token_counts.zero_()
                collect_losses(backbone, start=True)
                outs = module(images)
                losses = collect_losses(backbone, start=False)
                assert bool(losses) == training
                total = sum(out.square().mean() for out in outs) + sum(
                    losses.values())
                backbone.zero_grad()
                total.backward()
                tokens = [int(layer.token_counts[0]) for layer in layers]
                assert all(tokens) == any(tokens) == training
                results.append([outs, losses, tokens, {
                    key: parameter.grad
                    for key, parameter in backbone.named_parameters()}])
            torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('name', ['Swin', 'CvT', 'ViT, resized',
                                  'mmseg Swin'])
def test_padding_of_another_size_is_the_same_graph(name):
    backbone = backbone_of(name)
    backbone.eval()
    compiled = fullgraph(backbone)
    images = torch.randn(2, 3, 48, 48)
    plain = backbone(images)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for width in (28, 33, 40):
            sizes = torch.tensor([[48, 48], [20, width]])
            backbone.known_batches = (
                KnownBatch(0, images, ValidArea(sizes, (48, 48))), )
            wanted = backbone(images)
            torch.testing.assert_close(compiled(images), wanted)
            assert not torch.allclose(plain[-1], wanted[-1])


@pytest.mark.parametrize('autocast', [False, True])
@every_backbone
def test_bfloat16(name, autocast):
    if name == 'mmseg Swin' and not autocast:
        pytest.skip('it adds its float32 mask')
    backbone = backbone_of(name)
    images = torch.randn(2, 3, 48, 48)
    if not autocast:
        backbone, images = backbone.bfloat16(), images.bfloat16()
    kinds = {key: value.dtype for key, value in backbone.state_dict().items()}
    with record_routing(backbone) as records, torch.autocast(
            'cpu', torch.bfloat16, enabled=autocast):
        outs = backbone(images)
    sum(out.float().square().mean() for out in outs).backward()
    for key, parameter in backbone.named_parameters():
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.dtype == kinds[key]
    assert kinds == {key: value.dtype
                     for key, value in backbone.state_dict().items()}
    for routing, in records.values():
        logits = routing.logits_TE
        assert logits.dtype == routing.weights_N.dtype == torch.float32
        # not rounded to bfloat16 on their way
        assert not torch.equal(logits, logits.bfloat16().float())
    backbone.eval()
    compiled = fullgraph(backbone)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        for found, wanted in zip(compiled(images), backbone(images)):
            # in the second MoE layer some tokens may choose anew
            difference = (found - wanted).float().abs()
            assert difference.quantile(.9) < .02 * wanted.float().std()
