"""The table of costs agrees with counting a real forward pass, and with values
worked out by hand."""
import pytest
import summary
import torch
from commands import command

from rmoe.backbones import PRESETS, preset
from rmoe.moe import moe_layers
from rmoe.moe.complexity import complexity
from rmoe.registry import MODELS

SWIN = dict(type='rmoe.SwinMoE', embed_dims=16, depths=(1, 2),
            num_heads=(1, 2), strides=(4, 2), out_indices=(1, ),
            window_size=4, moe=dict(layers=((), (1, )), num_experts=4))
VIT = dict(type='rmoe.ViTMoE', embed_dims=24, num_layers=4, num_heads=2,
           mlp_dims=48, img_size=64, patch_size=8)
CASES = {
    'swin': SWIN,
    'k=2': dict(SWIN, moe=dict(SWIN['moe'], router=dict(
        type='TokenChoiceRouter', top_k=2))),
    'expert choice': dict(VIT, moe=dict(
        layers=(1, 3), num_experts=4, router=dict(type='ExpertChoiceRouter'))),
    'soft': dict(VIT, moe=dict(
        layers=(1, 3), num_experts=4, router=dict(type='SoftRouter'))),
    'no core': dict(VIT, moe=dict(layers=dict(every=2), core=False)),
    'segformer': dict(
        type='rmoe.UpcycledBackbone',
        backbone=dict(type='mmseg.MixVisionTransformer', embed_dims=16,
                      num_stages=2, num_layers=[2, 2], num_heads=[1, 2],
                      patch_sizes=[7, 3], strides=[4, 2], sr_ratios=[2, 1],
                      out_indices=(0, 1)),
        moe=dict(layers=dict(every=2), num_experts=4)),
}


@pytest.mark.parametrize('backbone', CASES.values(), ids=CASES)
def test_equals_a_real_forward_pass(backbone):
    row = summary.summarise('name', backbone, 64)
    model = MODELS.build(backbone)
    found = complexity(model, torch.randn(1, 3, 64, 64))
    assert row[0] == 'name' and row[1] == '64x64'
    assert row[3:5] == (f'{found.total_params / 1e6:.1f}',
                        f'{found.active_params / 1e6:.1f}')
    assert row[6] == f'{found.flops / 1e9:.1f}'


def test_one_block_by_hand():
    """ViT, D = 24, H = 48, two heads of 12, 64 patches and a class token."""
    backbone = dict(VIT, num_layers=1, moe=dict(
        layers=(0, ), num_experts=4,
        router=dict(type='TokenChoiceRouter', top_k=2)))
    tokens, d, h = 65, 24, 48
    patches = 2 * 64 * 3 * 8 * 8 * d
    attention = 2 * tokens * d * 3 * d + 2 * tokens * d * d + 2 * (
        2 * tokens * tokens * d)
    ffn = 2 * 2 * tokens * d * h
    router = 2 * tokens * d * 4
    with torch.device('meta'):
        model = MODELS.build(backbone)
        dense = MODELS.build(dict(backbone, moe=None))
        image = torch.empty(1, 3, 64, 64)
    assert complexity(dense, image).flops == patches + attention + ffn
    key, layer = next(iter(moe_layers(model).items()))
    shapes = summary.input_shapes(dense, [key], image)
    assert shapes == {key: ((1, 65, 24), )}
    assert summary.operations(layer, shapes[key]) == 2 * ffn + router


def test_the_command(capsys, tmp_path):
    command(summary, '--preset', 'swin-tiny', 'vmoe-15b', '--size', 224,
            '--markdown')
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('| backbone | image |')
    assert lines[1] == '|---|---|---|---|---|---|---|'
    # Swin-T: 4.5 GMACs at 224 px as published for the classifier
    name, _, dense, total, active, flops, _ = lines[2].strip('| ').split(' | ')
    assert (name, dense, total, active) == ('swin-tiny', '27.5', '93.7',
                                            '27.5')
    assert float(flops) == pytest.approx(2 * 4.5, rel=.02)
    assert lines[3].startswith('| vmoe-15b |')
    (tmp_path / 'config.py').write_text(f'model = dict(backbone={SWIN})\n')
    command(summary, tmp_path / 'config.py', '--size', 64)
    assert 'config' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command(summary)


def test_presets_are_configs():
    assert all(preset(name)['type'].startswith('rmoe.') for name in PRESETS)
