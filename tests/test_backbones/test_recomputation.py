"""Blocks of other libraries' backbones that recompute their activations."""
import copy
import pickle

import pytest
import torch

from rmoe.moe import collect_losses, moe_layers
from rmoe.registry import MODELS

SWIN = dict(embed_dims=8, depths=(2, 2), num_heads=(1, 2), strides=(4, 2),
            out_indices=(0, 1), window_size=4, drop_path_rate=.3)
HOSTS = {
    'mmseg Swin': dict(SWIN, type='mmseg.SwinTransformer'),
    'mmdet Swin': dict(SWIN, type='mmdet.SwinTransformer'),
    'ViT': dict(type='mmseg.VisionTransformer', embed_dims=16, num_layers=4,
                num_heads=2, img_size=(32, 32), patch_size=8,
                drop_path_rate=.3),
    'MiT': dict(type='mmseg.MixVisionTransformer', embed_dims=16, num_stages=2,
                num_layers=[2, 2], patch_sizes=[7, 3], num_heads=[1, 2],
                strides=[4, 2], sr_ratios=[2, 1], out_indices=(0, 1),
                drop_path_rate=.3),
}
every_host = pytest.mark.parametrize('name', HOSTS)


def moe_of(name, with_cp):
    model = MODELS.build(dict(
        type='rmoe.UpcycledBackbone',
        backbone=dict(HOSTS[name], with_cp=with_cp),
        moe=dict(layers=(1, 3), num_experts=3)))
    model.train()  # returns None
    return model


def step(model):
    """Outputs, auxiliary losses and gradients of one step with noise."""
    model.zero_grad()
    torch.manual_seed(0)
    collect_losses(model, True)
    outs = model(torch.randn(2, 3, 32, 32, requires_grad=True))
    losses = collect_losses(model, False)
    (sum(out.square().mean() for out in outs) + sum(losses.values())
     ).backward()
    return dict(losses, **{str(i): out for i, out in enumerate(outs)},
                **{name: p.grad for name, p in model.named_parameters()})


def pair(name):
    torch.manual_seed(1)
    plain, saved = moe_of(name, False), moe_of(name, True)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=.2)
    saved.load_state_dict(plain.state_dict())
    return plain, saved


@every_host
def test_a_step_is_that_without_recomputation(name):
    plain, saved = pair(name)
    expected, found = step(plain), step(saved)
    assert list(found) == list(expected) and 'importance' in str(list(found))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, msg=key)
    for a, b in zip(moe_layers(plain).values(), moe_layers(saved).values()):
        assert torch.equal(a.loads_2E, b.loads_2E)
        assert b.router.scorer.weight.grad.any()


def count_calls(model, ends):
    calls = {}
    for name, module in model.named_modules():
        if name.endswith(ends):
            module.register_forward_hook(
                lambda *_, key=name: calls.update({key: calls.get(key, 0) + 1}))
    return calls


@pytest.mark.parametrize('name', ['mmseg Swin', 'mmdet Swin'])
def test_attention_and_experts_run_twice_and_routers_once(name):
    model = pair(name)[1]
    calls = count_calls(model, ('.router', '.experts', '.w_msa'))
    step(model)
    assert len(calls) == 8
    for key, count in calls.items():
        assert count == (1 if key.endswith('.router') else 2), key


@every_host
def test_evaluation_runs_once(name):
    model = pair(name)[1]
    model.eval()
    calls = count_calls(model, ('.attn', '.router'))
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert set(calls.values()) == {1}


@every_host
def test_it_can_be_copied_and_pickled(name):
    model = pair(name)[1]
    model.eval()
    x = torch.randn(1, 3, 32, 32)
    attention = next(iter(moe_layers(model))).removesuffix('.ffn') + '.attn'
    kind = type(model.get_submodule(attention))
    twin = copy.deepcopy(model)
    block = twin.get_submodule(attention.removesuffix('.attn'))
    block.attn = pickle.loads(pickle.dumps(block.attn))
    assert type(block.attn) is kind
    for a, b in zip(twin(x), model(x)):
        assert torch.equal(a, b)
