"""The learning rate of every parameter of every backbone, by depth."""
import re

import pytest
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from rmoe.backbones import CvTMoE, SwinMoE, ViTMoE

EXPERTS = dict(num_experts=2)
# Options, and the depth of what each pattern finds, in order; the rest (last
# norms and head) has the last depth.
BACKBONES = {
    'swin': (SwinMoE, dict(
        embed_dims=8, depths=(1, 2), num_heads=(1, 2), strides=(4, 2),
        out_indices=(0, 1), moe=dict(EXPERTS, layers=((), (1, )))), {
            r'patch_embed\.': 0,
            r'stages\.0\.(blocks\.0|downsample)\.': 1,
            r'stages\.1\.blocks\.0\.': 2,
            r'stages\.1\.blocks\.1\.': 3}, 4),
    'cvt': (CvTMoE, dict(
        embed_dims=(8, 16, 32), depths=(1, 2, 1), num_heads=(1, 2, 4),
        drop_path_rates=(0., 0., 0.),
        moe=dict(EXPERTS, layers=((), (1, ), (0, )))), {
            r'stages\.0\.patch_embed\.': 0,
            # An embedding between blocks has the depth of the block before
            # it.
            r'stages\.0\.blocks\.0\.|stages\.1\.patch_embed\.': 1,
            r'stages\.1\.blocks\.0\.': 2,
            r'stages\.1\.blocks\.1\.|stages\.2\.(patch_embed|cls_token)': 3,
            r'stages\.2\.blocks\.0\.': 4}, 5),
    'vit': (ViTMoE, dict(
        embed_dims=24, num_layers=3, num_heads=2, mlp_dims=48, img_size=32,
        patch_size=8, out_indices=(1, 2),
        moe=dict(EXPERTS, layers=(1, 2))), {
            r'patch_embed\.|cls_token|pos_embed': 0, r'layers\.0\.': 1,
            r'layers\.1\.': 2, r'layers\.2\.': 3}, 4),
}
RATE, LR = 0.5, 0.01


@pytest.mark.parametrize('name', BACKBONES)
def test_every_parameter_has_the_rate_of_its_depth(name):
    kind, options, depths, last = BACKBONES[name]
    model = nn.Module()
    model.backbone, model.head = kind(**options), nn.Linear(3, 3)
    optimizer = OPTIM_WRAPPER_CONSTRUCTORS.build(dict(
        type='rmoe.LayerDecayOptimWrapperConstructor',
        optim_wrapper_cfg=dict(optimizer=dict(type='SGD', lr=LR)),
        paramwise_cfg=dict(layer_decay_rate=RATE)))(model).optimizer
    rates = {parameter: group['lr'] for group in optimizer.param_groups
             for parameter in group['params']}
    met = set()
    for key, parameter in model.named_parameters():
        pattern = next((p for p in depths if re.match(
            rf'backbone\.({p})', key)), None)
        met.add(pattern)
        expected = LR * RATE**(last - depths.get(pattern, last))
        assert rates[parameter] == pytest.approx(expected, rel=1e-9), key
    assert met == {*depths, None}
    assert any('.router.' in key for key, _ in model.named_parameters())
