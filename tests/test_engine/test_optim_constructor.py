"""Learning rate and weight decay of every parameter."""
import pytest
import torch
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from toy import toy_model

LR, WD = 0.01, 0.1


def build(model, **paramwise):
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.build(dict(
        type='rmoe.LayerDecayOptimWrapperConstructor',
        optim_wrapper_cfg=dict(optimizer=dict(type='AdamW', lr=LR,
                                              weight_decay=WD)),
        paramwise_cfg=paramwise))
    return constructor(model).optimizer


def settings(model, **paramwise):
    """name -> (lr multiplier, decay multiplier)."""
    optimizer = build(model, **paramwise)
    found = {}
    for group in optimizer.param_groups:
        for parameter in group['params']:
            assert parameter not in found, 'in two groups'
            found[parameter] = (round(group['lr'] / LR, 9),
                                round(group['weight_decay'] / WD, 9))
    return {name: found[p] for name, p in model.named_parameters()}


EXPERTS = 'backbone.stages.1.blocks.0.ffn.experts.residual_'
ROUTER = 'backbone.stages.1.blocks.0.ffn.router.scorer.weight'


def test_stacked_biases_are_biases():
    # mmengine recognises a bias only by the name "bias"
    table = settings(toy_model())
    assert table[EXPERTS + 'fc1_bias'] == (1, 0)
    assert table[EXPERTS + 'fc1_weight'] == (1, 1)
    assert table['head.bias'] == (1, 1)
    table = settings(toy_model(), bias_decay_mult=.5)
    assert table[EXPERTS + 'fc2_bias'] == (1, .5)
    assert table['head.bias'] == (1, .5)


def test_roles_norms_and_custom_keys_multiply():
    table = settings(
        toy_model(), norm_decay_mult=0.,
        roles=dict(residual=dict(lr_mult=4., decay_mult=.5),
                   router=dict(decay_mult=0.), head=dict(lr_mult=10.)),
        custom_keys={'blocks.0': dict(lr_mult=.5),
                     'blocks.0.attn': dict(lr_mult=.25)})
    assert table[EXPERTS + 'fc1_weight'] == (2, .5)
    assert table[ROUTER] == (.5, 0)
    assert table['head.weight'] == (10, 1)
    assert table['backbone.norm1.weight'] == (1, 0)
    assert table['backbone.bn.bias'] == (1, 0)
    block = 'backbone.stages.1.blocks.0.'
    assert table[block + 'attn.w_msa.qkv.weight'] == (.25, 1)
    assert table[block + 'norm1.weight'] == (.5, 1)  # the longest key wins


def test_layer_decay():
    # three blocks: depths 0 (patches), 1, 2, 3, and 4 (norms, head)
    table = settings(toy_model(), layer_decay_rate=.5)
    assert table['backbone.patch_embed.projection.weight'][0] == .5**4
    assert table['backbone.stages.0.blocks.0.norm1.weight'][0] == .5**3
    assert table[EXPERTS + 'fc1_weight'][0] == .5**2
    assert table['backbone.norm1.weight'][0] == 1
    assert table['head.weight'][0] == 1


def test_every_trainable_parameter_is_in_one_group():
    model = toy_model()
    model.backbone.patch_embed.requires_grad_(False)
    grouped = [p for group in build(model).param_groups
               for p in group['params']]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {p for p in model.parameters() if p.requires_grad}


def test_groups_hold_plain_values_only():
    state = build(toy_model()).state_dict()
    assert all(isinstance(value, (int, float, bool, type(None), list, tuple))
               for group in state['param_groups'] for value in group.values())


@pytest.mark.parametrize('paramwise, message', [
    (dict(layer_decay=.9), "'layer_decay'"),
    (dict(roles=dict(gate={})), "'gate'"),
])
def test_unknown_options_are_named(paramwise, message):
    with pytest.raises(ValueError, match=message):
        build(toy_model(), **paramwise)


def test_layer_decay_needs_a_backbone_that_knows_its_depths():
    model = torch.nn.Module()
    model.backbone = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match='Linear has none'):
        build(model, layer_decay_rate=.9)
