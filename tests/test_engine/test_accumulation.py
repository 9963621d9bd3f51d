"""Gradient accumulation with auxiliary losses, stages and balance biases."""
import copy

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from toy import (
    BACKBONE,
    STAGES,
    ToyImages,
    copied_state,
    toy_config,
    toy_model,
)
from two_ranks import Watch

from rmoe.engine.roles import role_of

RATE = 0.1


def make_runner(folder, stages, counts=4, max_iters=8, **options) -> Runner:
    """Plain SGD, whose steps show the gradients."""
    config = toy_config(
        folder, max_iters, [
            dict(type='rmoe.ResidualMoEHook', stages=stages),
            dict(type='rmoe.MoELossHook')], **options)
    config.optim_wrapper = dict(
        optimizer=dict(type='SGD', lr=RATE), accumulative_counts=counts)
    config.param_scheduler = None
    return Runner.from_cfg(config)


def first_steps(runner) -> dict[int, set[str]]:
    """Return the roles whose parameters change in each iteration. The
    statistics of the toy's batch norm do not count, because they are no
    parameters."""
    watch = Watch()
    runner.register_hook(watch, priority='LOWEST')
    runner.train()
    return watch.changed


def test_stages_that_end_with_a_window(tmp_path):
    stages = [dict(STAGES[0], end=4), dict(STAGES[1], end=8), STAGES[2]]
    changed = first_steps(make_runner(tmp_path, stages, max_iters=12))
    steps = {i: roles for i, roles in changed.items() if roles - {'core'}}
    assert steps == {3: {'core', 'head'},
                     7: {'residual', 'router', 'head'},
                     11: {'core', 'residual', 'router', 'head'}}


class Gradients(Hook):
    """Records the state of the model before every iteration and at the end,
    and every batch."""
    priority = 'LOWEST'

    def __init__(self):
        self.states, self.batches = [], []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.states.append(copied_state(runner.model))
        self.batches.append(data_batch)

    def after_train(self, runner):
        self.states.append(copied_state(runner.model))


def test_a_stage_that_ends_inside_a_window(tmp_path):
    """Batches 0 and 1 train core and head, 2 and 3 experts and head. Frozen
    parameters do not change, although they had accumulated gradients. Unfrozen
    ones get the gradients of their own batches, and the head those of all
    four."""
    backbone = copy.deepcopy(BACKBONE)
    backbone['moe']['router']['loss_weights'] = {}
    runner = make_runner(
        tmp_path, [dict(STAGES[0], end=2), dict(roles=STAGES[1]['roles'])],
        max_iters=4, backbone=backbone)
    seen = Gradients()
    runner.register_hook(seen)
    runner.train()
    before, after = seen.states[0], seen.states[-1]
    gradients = {name: 0. for name in before}
    for i, batch in enumerate(seen.batches):
        model = toy_model(**backbone['moe']).train()
        model.load_state_dict(seen.states[i])
        for layer in model.modules():
            if hasattr(layer, 'core_only'):
                layer.core_only = i < 2
        # The batch norm of a frozen core uses its running statistics.
        model.backbone.bn.train(i < 2)
        model(**batch, mode='loss')['loss_ce'].backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and role_of(name) in (
                    STAGES[i // 2]['roles']):
                gradients[name] = gradients[name] + parameter.grad
    for name, _ in runner.model.named_parameters():
        if role_of(name) == 'core':
            assert torch.equal(after[name], before[name]), name
        else:
            torch.testing.assert_close(
                after[name], before[name] - RATE * gradients[name] / 4,
                msg=name)
            assert not torch.equal(after[name], before[name]), name


def test_a_window_is_the_batch_it_gathers(tmp_path):
    """A step over two batches equals a step over one batch with the images of
    both. The batch norm and the balance losses, which depend on the batch, are
    left out."""
    backbone = copy.deepcopy(BACKBONE)
    backbone['moe']['router']['loss_weights'] = {}
    backbone['frozen_stages'] = 0
    states = []
    for counts in (2, 1):
        runner = make_runner(tmp_path / str(counts), [dict(
            roles=('residual', 'router', 'head'))], counts=counts,
            max_iters=counts, backbone=backbone)
        runner._train_dataloader['batch_size'] = 8 // counts
        runner.train()
        states.append(copied_state(runner.model))
    assert len(ToyImages()) >= 8
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], msg=key)


@pytest.mark.parametrize('counts, steps', [(3, [2, 5, 7]), (8, [7])])
def test_the_last_window_may_be_short(tmp_path, counts, steps):
    changed = first_steps(make_runner(
        tmp_path, [dict(roles='all')], counts=counts))
    assert [i for i, roles in changed.items() if 'head' in roles] == steps
