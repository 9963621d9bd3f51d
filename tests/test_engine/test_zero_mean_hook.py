"""Residuals whose mean stays zero: what all experts share is the core's."""
import copy

import pytest
import torch
from toy import BACKBONE, ToySegmentor, toy_model, toy_runner

from rmoe.engine.zero_mean_hook import subtract_means
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


def test_one_expert_is_the_dense_model(tmp_path):
    """Same weights, images and optimizer; without the hook it moves on."""
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


@pytest.mark.parametrize('moe, message', [
    (None, 'found no MoE layer'),
    (dict(core=False), 'core=False and rank=None; it needs core=True'),
    (dict(rank=2), 'core=True and rank=2; it needs core=True and rank=None')])
def test_what_has_no_mean_is_refused(tmp_path, moe, message):
    config = dict(BACKBONE, moe=None) if moe is None else backbone(**moe)
    runner = toy_runner(tmp_path, hooks=HOOKS[1:], backbone=config)
    with pytest.raises(ValueError, match=message):
        runner.train()


def test_spread_experts_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr('rmoe.engine.zero_mean_hook.is_laid_out',
                        lambda module: True)
    runner = toy_runner(tmp_path, hooks=HOOKS[1:])
    with pytest.raises(ValueError, match='are spread over processes'):
        runner.train()
