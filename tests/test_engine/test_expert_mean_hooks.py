"""Hooks that act on the mean over a layer's experts."""
import copy
from types import SimpleNamespace

import pytest
import torch
from mmengine.runner import Runner
from toy import BACKBONE, ToySegmentor, toy_config, toy_model, toy_runner

from rmoe.engine.expert_mean_hooks import (
    ExpertAveragingHook,
    pull_to_means,
    share_moments,
    subtract_means,
)
from rmoe.moe import moe_layers

HOOKS = [dict(type='rmoe.MoELossHook'), dict(type='rmoe.ZeroMeanHook')]


def backbone(**moe):
    config = copy.deepcopy(BACKBONE)
    config['moe'].update(moe)
    return config


def residuals(model):
    return {f'{name}.{key}': value for name, layer in moe_layers(model).items()
            for key, value in layer.experts.named_parameters()}


def test_residuals_train_and_their_mean_stays_zero(tmp_path):
    runner = toy_runner(tmp_path, hooks=HOOKS, max_iters=6)
    model = runner.train()
    for key, value in residuals(model).items():
        assert value.abs().max() > 1e-4, key
        assert value.mean(0).abs().max() < 1e-6, key


def test_they_act_once_per_step_of_the_optimizer(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr('rmoe.engine.expert_mean_hooks.subtract_means',
                        lambda model: steps.append(model))
    config = toy_config(tmp_path, hooks=HOOKS, max_iters=4)
    config.optim_wrapper.accumulative_counts = 2
    Runner.from_cfg(config).train()
    assert len(steps) == 2


def test_one_expert_is_the_dense_model(tmp_path):
    """All runs have the same weights, images and optimizer. Without the hook,
    a single expert trains further away than the dense model."""
    trained, start = {}, tmp_path / 'start.pth'
    torch.save(ToySegmentor(dict(BACKBONE, moe=None)).state_dict(), start)
    for name, moe, hooks in (
            ('dense', None, []), ('e1', backbone(num_experts=1), HOOKS),
            ('free', backbone(num_experts=1), HOOKS[:1])):
        config = dict(BACKBONE, moe=None) if moe is None else moe
        runner = toy_runner(tmp_path / name, hooks=hooks, backbone=config,
                            max_iters=6, load_from=str(start))
        trained[name] = runner.train().state_dict()
    for name in ('e1', 'free'):
        far = max((trained[name][key].float() - value.float()).abs().max()
                  for key, value in trained['dense'].items())
        assert (far < 1e-6) == (name == 'e1'), (name, far)


def test_what_is_frozen_stays():
    model = toy_model()
    for value in residuals(model).values():
        torch.nn.init.normal_(value)
    frozen, *others = residuals(model).values()
    frozen.requires_grad_(False)
    before = frozen.clone()
    subtract_means(model)
    assert torch.equal(frozen, before)
    for value in others:
        assert value.mean(0).abs().max() < 1e-6 < value.abs().max()


def spread_out(model):
    """The mean distance of experts from their mean."""
    return torch.stack([(value - value.mean(0)).abs().mean()
                        for value in residuals(model).values()]).mean()


def averaged(tmp_path, **shares):
    hook = dict(type='rmoe.ExpertAveragingHook', **shares)
    runner = toy_runner(tmp_path, hooks=[HOOKS[0], hook], max_iters=6)
    return runner.train()


def test_experts_end_at_their_mean_or_start_there(tmp_path):
    free = spread_out(toy_runner(tmp_path / 'free', hooks=HOOKS[:1],
                                 max_iters=6).train())
    one = averaged(tmp_path / 'one', first=0., last=1.)
    # The last step alone pulls them all the way.
    assert spread_out(one) < 1e-9
    assert max(value.abs().max() for value in residuals(one).values()) > 1e-4
    falling = spread_out(averaged(tmp_path / 'falling', first=1., last=0.))
    assert 1e-2 * free < falling < .8 * free
    none = spread_out(averaged(tmp_path / 'none', first=0., last=0.))
    assert none == free


def test_the_share_changes_linearly(monkeypatch):
    shares = []
    monkeypatch.setattr('rmoe.engine.expert_mean_hooks.pull_to_means',
                        lambda model, share: shares.append(share))
    for step in range(5):
        ExpertAveragingHook(.4, .2).after_step(
            SimpleNamespace(iter=step, max_iters=5, model=None))
    assert shares == pytest.approx([.4, .35, .3, .25, .2])
    ExpertAveragingHook(.4, .2).after_step(
        SimpleNamespace(iter=0, max_iters=1, model=None))
    assert shares[-1] == .4


def test_a_share_by_hand():
    model = toy_model(num_experts=2)
    value = next(iter(residuals(model).values()))
    with torch.no_grad():
        value[0], value[1] = 1., 3.
    pull_to_means(model, .25)
    assert torch.equal(value[0], torch.full_like(value[0], 1.25))
    assert torch.equal(value[1], torch.full_like(value[1], 2.75))


@pytest.mark.parametrize('shares, message', [
    (dict(first=1.5), 'first=1.5 must lie between 0 and 1'),
    (dict(last=-.1), 'last=-0.1 must lie between 0 and 1')])
def test_shares_out_of_range_are_refused(shares, message):
    with pytest.raises(ValueError, match=message):
        ExpertAveragingHook(**shares)


def test_experts_have_one_second_moment(tmp_path):
    runner = toy_runner(tmp_path, hooks=[
        HOOKS[0], dict(type='rmoe.SharedMomentsHook')], max_iters=3)
    model = runner.train()
    state = runner.optim_wrapper.optimizer.state
    for key, value in residuals(model).items():
        moment = state[value]['exp_avg_sq']
        assert torch.equal(moment, moment[:1].expand_as(moment)), key
        assert moment.max() > 0, key
        first = state[value]['exp_avg']
        assert not torch.equal(first, first[:1].expand_as(first)), key


def test_a_shared_moment_by_hand():
    """Two experts whose gradients are 1 and 3: the second moments 1 and 9
    become 5 (times 1 - beta2)."""
    model = toy_model(num_experts=2)
    value = next(iter(residuals(model).values()))
    optimizer = torch.optim.AdamW([value], lr=0.)
    value.grad = torch.ones_like(value)
    value.grad[1] = 3.
    optimizer.step()
    share_moments(model, optimizer)
    moment = optimizer.state[value]['exp_avg_sq']
    assert torch.allclose(moment, torch.full_like(moment, 5e-3))


def test_experts_without_a_gradient_yet_have_no_moment_to_share():
    model = toy_model(num_experts=2)
    optimizer = torch.optim.AdamW(model.parameters())
    share_moments(model, optimizer)
    assert not optimizer.state


def test_an_optimizer_without_second_moments_is_refused(tmp_path):
    config = toy_config(tmp_path, hooks=[dict(type='rmoe.SharedMomentsHook')])
    config.optim_wrapper.optimizer = dict(type='SGD', lr=0.1, momentum=0.9)
    runner = Runner.from_cfg(config)
    with pytest.raises(ValueError, match=r'SGD keeps no second moment.*'
                                         r'momentum_buffer. Use AdamW'):
        runner.train()


@pytest.mark.parametrize('moe, message', [
    (None, 'found no MoE layer'),
    (dict(core=False), 'core=False; it needs core=True'),
    (dict(rank=2), 'rank=2; it needs rank=None')])
def test_what_has_no_mean_is_refused(tmp_path, moe, message):
    config = dict(BACKBONE, moe=None) if moe is None else backbone(**moe)
    runner = toy_runner(tmp_path, hooks=HOOKS[1:], backbone=config)
    with pytest.raises(ValueError, match=message):
        runner.train()


def test_spread_experts_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr('rmoe.engine.expert_mean_hooks.is_laid_out',
                        lambda module: True)
    runner = toy_runner(tmp_path, hooks=HOOKS[1:])
    with pytest.raises(ValueError, match='are spread over processes'):
        runner.train()
