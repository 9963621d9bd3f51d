"""Every router inside a backbone: upcycled, trained, saved and resumed."""
import copy

import pytest
import torch
from routers import ROUTERS
from toy import BACKBONE, STAGES, copied_state, toy_runner
from two_ranks import run_two_ranks, train_every_router

from rmoe.backbones import SwinMoE
from rmoe.engine.roles import role_of
from rmoe.moe import moe_layers

SMALL = dict(embed_dims=16, depths=(1, 2, 2), num_heads=(1, 2, 4),
             strides=(4, 2, 2), out_indices=(0, 1, 2), window_size=4,
             drop_path_rate=0.)
every_router = pytest.mark.parametrize('name', ROUTERS)


def swin(router=None, experts=4, **options):
    moe = None if router is None else dict(
        layers=((), (1, ), (0, 1)), num_experts=experts,
        router=copy.deepcopy(router), **options)
    model = SwinMoE(**SMALL, moe=moe)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=.1)
    return model


@every_router
def test_upcycled_equals_dense_and_every_parameter_learns(name):
    dense, moe = swin(), swin(ROUTERS[name])
    moe.load_state_dict(dense.state_dict())
    x = torch.randn(2, 3, 50, 66)
    for mode in (True, False):
        moe.train(mode)
        for a, b in zip(moe(x), dense(x)):
            assert (a - b).abs().max() < 1e-5
    moe.train()
    sum(out.square().sum() for out in moe(x)).backward()
    for parameter_name, parameter in moe.named_parameters():
        assert parameter.grad is not None, parameter_name


@every_router
def test_a_checkpoint_comes_back_and_changes_its_expert_count(name):
    moe = swin(ROUTERS[name])
    for layer in moe_layers(moe).values():
        for key, buffer in layer.router.named_buffers():
            if key == 'balance_bias':
                buffer.normal_()
    again = swin(ROUTERS[name])
    again.load_state_dict(moe.state_dict())
    for key, value in again.state_dict().items():
        assert torch.equal(value, moe.state_dict()[key]), key
    with pytest.raises(ValueError, match='4 experts in the checkpoint'):
        swin(ROUTERS[name], experts=8).load_state_dict(moe.state_dict())
    tiled = swin(ROUTERS[name], experts=8, expert_mismatch='tile')
    tiled.load_state_dict(moe.state_dict())
    key = 'stages.1.blocks.1.ffn.router.'
    old, new = moe.state_dict(), tiled.state_dict()
    for part in (each for each in old if each.startswith(key)):
        if old[part].shape == new[part].shape:
            assert torch.equal(new[part], old[part]), part
        else:
            assert torch.equal(new[part], old[part].repeat(
                2, *[1] * (old[part].dim() - 1))), part


@pytest.mark.parametrize('theirs, ours, missing', [
    ('token choice', 'soft', 'embeddings'),
    ('token choice', 'bias balanced', 'balance_bias'),
    ('cosine', 'token choice', 'temperature')])
def test_another_router_is_no_silent_load(theirs, ours, missing):
    state = swin(ROUTERS[theirs]).state_dict()
    with pytest.raises(ValueError, match=f'{missing}.*Set moe.router to the '
                       'router the checkpoint was trained with'):
        swin(ROUTERS[ours]).load_state_dict(state)


def test_a_router_of_the_same_weights_is_interchangeable():
    moe = swin(ROUTERS['token choice'])
    swin(ROUTERS['expert choice']).load_state_dict(moe.state_dict())


def test_not_finite_features_name_stage_and_block():
    moe = swin(ROUTERS['token choice'])
    moe.stages[2].blocks[0].norm2.weight.data[3] = float('nan')
    with pytest.raises(ValueError, match='MoE layer of stage 2, block 0: '):
        moe(torch.randn(1, 3, 64, 64))


def test_ranks_stay_equal_with_every_router(tmp_path):
    first, second = run_two_ranks(train_every_router, str(tmp_path), ROUTERS)
    assert set(first) == set(ROUTERS)
    for name, state in first.items():
        for key, value in state.items():
            assert torch.equal(value, second[name][key]), (name, key)


@every_router
def test_stages_freeze_and_resume_repeats(name, tmp_path):
    backbone = copy.deepcopy(BACKBONE)
    backbone['moe']['router'] = copy.deepcopy(ROUTERS[name])
    hooks = [dict(type='rmoe.ResidualMoEHook', stages=STAGES),
             dict(type='rmoe.MoELossHook'),
             dict(type='rmoe.RoutingStatsHook', interval=2)]
    if 'bias' in name:
        hooks.append(dict(type='rmoe.BalanceBiasHook'))
    # iteration 2 to 5: residual, router and head train, the core stands
    whole = toy_runner(tmp_path / 'whole', max_iters=6, hooks=hooks,
                       backbone=backbone)
    whole.train()
    saved = torch.load(tmp_path / 'whole/iter_4.pth', weights_only=True)
    resumed = toy_runner(
        tmp_path / 'resumed', max_iters=6, hooks=hooks, backbone=backbone,
        resume=True, load_from=str(tmp_path / 'whole/iter_4.pth'))
    resumed.train()
    state, other = copied_state(whole.model), copied_state(resumed.model)
    moved = set()
    for key, value in state.items():
        assert torch.equal(value, other[key]), key
        if not torch.equal(value, saved['state_dict'][key]):
            moved.add(role_of(key))
    assert moved == {'core', 'residual', 'router', 'head'}
