"""rmoe.upcycle and what goes with it, on models of several libraries."""
import copy
import warnings

import pytest
import torch
from any_models import INPUT, MODELS, Own
from torch import nn

import rmoe
from rmoe.moe import moe_layers

every_model = pytest.mark.parametrize('name', MODELS)

def output(model):
    torch.manual_seed(1)  # the same masks of dropout
    size = 32 if (hasattr(model, 'config') and getattr(
        model.config, 'image_size', 0) == 32) or hasattr(
            model, 'patch_embed') else 64
    out = model(INPUT[..., :size, :size])
    if not isinstance(out, torch.Tensor):
        out = next(value for value in out.to_tuple()
                   if isinstance(value, torch.Tensor))
    return out


def last(model):
    return list(rmoe.upcycle(copy.deepcopy(model), layers=(0, )).layers) + (
        list(rmoe.upcycle(copy.deepcopy(model), (0, )).left_dense)[-1:])


@every_model
def test_upcycled_equals_dense_and_comes_back(name):
    model = MODELS[name]().eval()
    dense, keys = output(model), list(model.state_dict())
    report = rmoe.upcycle(model, last(model), num_experts=3, rank=2)
    assert list(moe_layers(model)) == list(report.layers)
    assert (output(model) - dense).abs().max() < 1e-5
    assert [key for key in model.state_dict() if key in keys] == keys
    experts_out = copy.deepcopy(model)
    for layer in moe_layers(experts_out).values():
        nn.init.normal_(layer.experts.residual_fc1_bias)
        nn.init.normal_(layer.experts.residual_fc2_up)
    assert (output(experts_out) - dense).abs().max() > 1e-4
    rmoe.to_dense(experts_out)
    assert list(experts_out.state_dict()) == keys
    assert torch.equal(output(experts_out), dense)


@every_model
def test_every_parameter_of_the_layers_learns(name):
    model = MODELS[name]().train()
    rmoe.upcycle(model, last(model), num_experts=2,
                 router=dict(type='TokenChoiceRouter', top_k=2))
    for layer in moe_layers(model).values():
        nn.init.normal_(layer.experts.residual_fc2_weight)
    (output(model).square().mean() + rmoe.auxiliary_loss(model)).backward()
    for key, layer in moe_layers(model).items():
        for part, parameter in layer.named_parameters():
            assert parameter.grad is not None and parameter.grad.any(), (
                key, part)
        if hasattr(layer, 'second'):
            assert layer.second[0].dense.weight.grad.any()


@every_model
def test_core_stage_is_the_dense_model(name):
    dense = MODELS[name]().train()
    model = copy.deepcopy(dense)
    rmoe.upcycle(model, last(model), num_experts=2)
    for layer in moe_layers(model).values():
        nn.init.normal_(layer.experts.residual_fc1_weight)
    rmoe.set_stage(model, 'core')
    torch.testing.assert_close(output(model), output(dense))
    assert rmoe.auxiliary_loss(model) == 0
    assert all(one.demand == 0 for one in rmoe.routing_stats(model).values())


def test_report_names_all_ffns():
    report = rmoe.upcycle(MODELS['timm ViT'](), layers=dict(every=2))
    assert list(report.layers) == ['blocks.1.mlp']
    assert list(report.left_dense) == ['blocks.0.mlp', 'blocks.2.mlp']
    assert report.parameters[1] > report.parameters[0]
    assert 'blocks.2.mlp (Mlp)' in str(report)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.act = nn.GELU()

    def forward(self, x):
        return self.down(self.act(self.up(x))) * 2


class Functional(Gated):
    def forward(self, x):
        x = self.down(self.act(self.up(x)))
        return nn.functional.dropout(x, .5, self.training)


@pytest.mark.parametrize('ffn', [
    Gated(), Functional(), nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)),
    nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.Sigmoid()),
    nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
    nn.TransformerEncoderLayer(4, 2, 8)], ids=str)
def test_what_is_no_plain_ffn_is_left_alone(ffn):
    before = torch.random.get_rng_state()
    with pytest.raises(ValueError, match='has no FFN that can become'):
        rmoe.upcycle(nn.ModuleList([ffn]), layers=(0, ))
    if not isinstance(ffn, Functional):
        assert torch.equal(before, torch.random.get_rng_state())
    assert ffn.training and not any(
        child._forward_hooks for child in ffn.modules())


def test_traced_models_are_left_alone():
    traced = torch.fx.symbolic_trace(Own().ffn)
    with pytest.raises(ValueError, match='traced models'):
        rmoe.upcycle(nn.ModuleList([traced]), layers=(0, ))


@pytest.mark.parametrize('options, match', [
    (dict(layers=(3, )), 'names FFN 3; VisionTransformer has FFNs 0 to 2'),
    (dict(layers='blocks.7.mlp'), 'no FFN of VisionTransformer; those are bl'),
    (dict(layers=()), 'selects none of the 3'),
    (dict(layers=(0, 1), rank=999), 'rank=999 must lie between'),
    (dict(layers=(0, ), router=dict(type='Nobody')), 'Nobody'),
])
def test_a_refusal_changes_nothing(options, match):
    model = MODELS['timm ViT']()
    with pytest.raises((ValueError, KeyError), match=match):
        rmoe.upcycle(model, **options)
    assert not moe_layers(model) and not model._forward_pre_hooks


def test_twice_is_refused():
    model = Own()
    rmoe.upcycle(model, (0, ))
    with pytest.raises(ValueError, match='upcycle it once'):
        rmoe.upcycle(model, (0, ))


def test_losses_nobody_takes_are_dropped_with_a_warning():
    model = Own()
    rmoe.upcycle(model, (0, ), num_experts=4)
    output(model)
    first = rmoe.auxiliary_loss(model)
    assert first > 0 and first.requires_grad
    assert rmoe.auxiliary_loss(model) == 0
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        output(model)
    with pytest.warns(UserWarning, match='were not taken and are dropped'):
        output(model)
    torch.testing.assert_close(rmoe.auxiliary_loss(model), first, atol=.2,
                               rtol=1)


def test_without_moe_layers_each_function_says_so():
    for function in (rmoe.auxiliary_loss, rmoe.routing_stats):
        with pytest.raises(ValueError, match='has no MoE layer'):
            function(Own())
    with pytest.raises(ValueError, match='found no MoE layer'):
        rmoe.set_stage(Own(), 'all')
    with pytest.raises(ValueError, match=r'not what rmoe\.upcycle changed'):
        rmoe.to_dense(Own())


def test_stages_train_what_they_say_and_norms_stand_still():
    model = Own()
    rmoe.upcycle(model, (0, ), num_experts=2)

    def trained(stage, head=()):
        rmoe.set_stage(model, stage, head)
        return {name for name, p in model.named_parameters()
                if p.requires_grad}

    everything = trained('all')
    experts = {name for name in everything
               if '.experts.' in name or '.router.' in name}
    head = {'head.weight', 'head.bias'}
    assert trained('core') == everything - experts
    assert trained('residual') == experts and experts
    assert trained('residual', 'head') == experts | head
    mean = model.norm.running_mean.clone()
    model.train()
    output(model)
    assert torch.equal(model.norm.running_mean, mean)
    rmoe.set_stage(model, 'all')
    model.train()
    output(model)
    assert not torch.equal(model.norm.running_mean, mean)
    for arguments, match in ((('joint', ), 'is not one of'),
                             (('all', 'neck'), "head names 'neck'")):
        with pytest.raises(ValueError, match=match):
            rmoe.set_stage(model, *arguments)


def test_routers_stay_float32_in_a_bfloat16_model():
    model = Own().bfloat16()
    rmoe.upcycle(model, (0, ))
    layer = moe_layers(model)['ffn']
    assert layer.router.scorer.weight.dtype == torch.float32
    assert layer.experts.residual_fc1_weight.dtype == torch.bfloat16
    assert model(INPUT.bfloat16()).dtype == torch.bfloat16


def test_ffns_of_openmmlab():
    from mmcv.cnn.bricks.transformer import FFN
    from mmseg.models.backbones.mit import MixFFN
    model = nn.ModuleDict(dict(
        plain=FFN(8, 16), mix=MixFFN(8, 16, dropout_layer=None))).eval()
    keys, x = list(model.state_dict()), INPUT[:, :1, :2, :8].flatten(1, 2)
    dense = model.plain(x), model.mix(x, (1, 2))
    report = rmoe.upcycle(model, layers=(0, 1), num_experts=2)
    assert list(report.layers.values()) == ['FFN', 'MixFFN']
    for _ in range(2):
        for out, other in zip(dense, (model.plain(x), model.mix(x, (1, 2)))):
            torch.testing.assert_close(out, other)
        if moe_layers(model):
            rmoe.to_dense(model)
    assert list(model.state_dict()) == keys


def mlp(width=8):
    return nn.Sequential(nn.Linear(width, 16), nn.GELU(),
                         nn.Linear(16, width))


def test_a_module_that_is_used_twice_gets_experts_in_both_places():
    shared = mlp()
    model = nn.Sequential(nn.Linear(8, 8), shared, nn.Linear(8, 8), shared)
    rmoe.upcycle(model, layers=(0, ), num_experts=2)
    assert model[1] is model[3] and list(moe_layers(model)) == ['1']
    rmoe.to_dense(model)
    assert model[1] is model[3] is shared


def test_hooks_that_nobody_would_call_are_refused():
    model = nn.Sequential(mlp(), mlp())
    model[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r'has hooks \(_forward_hooks\)'):
        rmoe.upcycle(model, layers=(0, 1))
    assert not moe_layers(model)
    rmoe.upcycle(model, layers=(0, ))


def test_a_router_of_somebody_else_is_no_router_of_ours():
    model = nn.ModuleDict(dict(
        gate=nn.ModuleDict(dict(router=nn.Linear(8, 2))), ffn=mlp()))
    rmoe.upcycle(model, layers=(0, ), num_experts=2)
    rmoe.set_stage(model, 'residual')
    assert not model.gate.router.weight.requires_grad
    rmoe.set_stage(model, 'core')
    assert model.gate.router.weight.requires_grad
    assert not model.ffn.router.scorer.weight.requires_grad


def test_dense_models_train_again():
    model = Own()
    rmoe.upcycle(model, (0, ), num_experts=2)
    rmoe.set_stage(model, 'residual')
    rmoe.to_dense(model)
    assert all(p.requires_grad for p in model.parameters())
    mean = model.norm.running_mean.clone()
    output(model.train())
    assert not torch.equal(model.norm.running_mean, mean)
    # what somebody froze without a stage stays frozen
    model.head.requires_grad_(False)
    rmoe.upcycle(model, (0, ), num_experts=2)
    rmoe.to_dense(model)
    assert not model.head.weight.requires_grad


def test_a_model_that_is_entered_by_another_method():
    model = MODELS['timm ViT']().train()
    rmoe.upcycle(model, (0, ), num_experts=4)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model.forward_features(INPUT[..., :32, :32])
    assert rmoe.auxiliary_loss(model) > 0


def test_a_second_half_that_was_replaced_is_refused():
    model = MODELS['HF ViT']().eval()
    rmoe.upcycle(model, (0, ), num_experts=2)
    copied = copy.deepcopy(model)
    assert torch.equal(output(copied), output(model))
    block = model.encoder.layer[0]
    block.output = copy.deepcopy(block.output)
    with pytest.raises(ValueError, match='second half of a MoE FFN was repl'):
        output(model)


@pytest.mark.parametrize('options, match', [
    (dict(num_experts=2.5), 'num_experts=2.5 must be a whole number'),
    (dict(router='TokenChoiceRouter'), "router='TokenChoiceRouter' must be a"),
    (dict(router=dict(type='Nobody')), "type='Nobody' is neither one of"),
    (dict(layers=None), 'layers=None must be indices'),
    (dict(layers=0), 'layers=0 must be indices'),
    (dict(layers=dict(every=0)), r"^layers={'every': 0} is neither")])
def test_wrong_options_are_value_errors(options, match):
    with pytest.raises(ValueError, match=match):
        rmoe.upcycle(Own(), **dict(dict(layers=(0, )), **options))
