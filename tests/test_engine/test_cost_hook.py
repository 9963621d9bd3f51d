"""Costs are compared with values worked out by hand, and counting does not
change the training."""
import copy
import json

import pytest
import torch
from cost_ranks import train_and_count
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from toy import (
    BACKBONE,
    STAGES,
    ToyImages,
    ToySegmentor,
    copied_state,
    toy_config,
    toy_runner,
)
from two_ranks import run_two_ranks

from rmoe.engine import cost_hook
from rmoe.moe import moe_layers

COST = dict(type='rmoe.CostHook')
STAGED = (dict(type='rmoe.ResidualMoEHook', stages=STAGES),
          dict(type='rmoe.MoELossHook'), COST)
EXACT = ('iterations', 'samples', 'flops', 'stages')
PIXELS, HIDDEN, CLASSES = 3 * 32 * 32, 20, 3
IMAGES = 4  # of a batch


class Linears(BaseModel):
    """Two linear layers on whole images, then maybe attention of a token to
    itself."""

    def __init__(self, attention=False):
        super().__init__()
        self.fc1 = nn.Linear(PIXELS, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, CLASSES)
        self.attention = attention

    def forward(self, inputs, labels=None, mode='tensor'):
        hidden = self.fc1(inputs.flatten(1)).relu()
        if self.attention:
            tokens = hidden.view(-1, 2, 5, 2)  # two heads, five tokens
            hidden = scaled_dot_product_attention(
                tokens, tokens, tokens).flatten(1)
        return dict(loss=cross_entropy(self.fc2(hidden), labels[:, 0, 0]))


def train(folder, model=None, **options):
    runner = toy_runner(folder, **options)
    if model is not None:
        runner.model = model
        runner._init_model_weights = lambda: None
    runner.train()
    return runner


def cost(folder) -> dict:
    return json.loads((folder / 'cost.json').read_text())


def operations(folder, model=None, **options) -> float:
    """The operations for one image."""
    train(folder, model, max_iters=1, **options)
    return cost(folder)['flops'] / IMAGES


def test_operations_of_linear_layers_are_six_per_weight(tmp_path):
    # Forward, gradient of the weight and of the input, two each; the images
    # need no gradient.
    first, second = PIXELS * HIDDEN, HIDDEN * CLASSES
    assert operations(tmp_path / 'a', Linears(), hooks=[COST]) == (
        4 * first + 6 * second)
    frozen = Linears()
    frozen.fc1.requires_grad_(False)
    assert operations(tmp_path / 'b', frozen, hooks=[COST]) == (
        2 * first + 4 * second)


def test_attention_is_counted_as_it_runs(tmp_path):
    without = operations(tmp_path / 'a', Linears(), hooks=[COST])
    # q k and p v forward; backward those of p, v, q and k, and q k again.
    products = 2 + 5
    assert operations(tmp_path / 'b', Linears(True), hooks=[COST]) == (
        without + products * 2 * (2 * 5 * 5 * 2))


def test_totals_are_those_of_all_iterations(tmp_path):
    train(tmp_path, Linears(), max_iters=6, hooks=[COST])
    found = cost(tmp_path)
    per_image = 4 * PIXELS * HIDDEN + 6 * HIDDEN * CLASSES
    assert (found['iterations'], found['samples']) == (6, 6 * IMAGES)
    assert found['flops'] == 6 * IMAGES * per_image
    assert found['device_seconds'] == found['seconds']
    assert 0 < found['seconds'] < found['wall_seconds']
    assert found['world_size'] == 1 and found['device'].startswith('cpu')
    # a process with torch in it, in bytes
    assert 50e6 < found['peak_memory'] <= cost_hook._resident()


def test_stages_cost_what_trains_in_them(tmp_path):
    train(tmp_path / 'moe', hooks=STAGED)
    found = cost(tmp_path / 'moe')
    core, residual, joint = found['stages'].values()
    assert [stage['iterations'] for stage in (core, residual, joint)] == [
        2, 3, 3]
    assert [stage['core_only_layers'] for stage in (core, residual, joint)
            ] == [2, 0, 0]
    assert found['flops'] == sum(
        stage['flops'] for stage in (core, residual, joint))
    each = [stage['flops'] / stage['samples']
            for stage in (core, residual, joint)]
    dense = operations(
        tmp_path / 'dense', hooks=[COST],
        model=ToySegmentor(dict(BACKBONE, moe=None)))
    assert each[0] == dense
    # The core needs no gradient of its weights in the residual stage.
    assert each[1] < each[2] and dense < each[2]
    # Full-rank residuals and top_k=1: the experts cost the dense FFN, the
    # router is a linear layer on 16 patches, of width 16 to 4 experts.
    assert each[2] - dense == 2 * 6 * 16 * 16 * 4


class Wake(Hook):
    """A hook that runs only the experts from iteration 2 on, without changing
    which parameters train."""
    priority = 'HIGH'

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        for layer in moe_layers(runner.model).values():
            layer.core_only = batch_idx < 2


def test_layers_that_wake_begin_a_stage(tmp_path):
    runner = toy_runner(tmp_path, max_iters=4, hooks=[COST])
    runner.register_hook(Wake())
    runner.train()
    stages = cost(tmp_path)['stages'].values()
    assert [(stage['iterations'], stage['core_only_layers'])
            for stage in stages] == [(2, 2), (2, 0)]
    first, second = (stage['flops'] for stage in stages)
    assert first < second


def test_recomputed_activations_count_again(tmp_path):
    plain = operations(tmp_path / 'a', hooks=[COST])
    again = operations(tmp_path / 'b', hooks=[COST],
                       backbone=dict(BACKBONE, with_cp=True))
    assert plain < again < plain * 4 / 3


def test_counting_changes_nothing(tmp_path):
    backbone = copy.deepcopy(BACKBONE)
    backbone['drop_path_rate'] = .5
    backbone['moe']['router']['noise_std'] = 4.
    results = []
    for name, hooks in (('with', STAGED), ('without', STAGED[:-1])):
        runner = train(tmp_path / name, hooks=hooks, backbone=backbone)
        results.append((
            copied_state(runner.model), torch.get_rng_state(),
            [layer.demand_E for layer in moe_layers(runner.model).values()]))
        assert 'train_step' not in vars(runner.model)
    for key, value in results[0][0].items():
        assert torch.equal(value, results[1][0][key]), key
    assert torch.equal(results[0][1], results[1][1])
    for ours, theirs in zip(results[0][2], results[1][2]):
        assert ours.sum() > 0 and torch.equal(ours, theirs)


def test_attention_runs_the_kernel_it_always_runs(tmp_path):
    states = []
    for hooks in ([], [COST]):
        torch.manual_seed(0)
        states.append(copied_state(train(
            tmp_path / str(len(hooks)), Linears(True), max_iters=2,
            hooks=hooks).model))
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


@pytest.mark.parametrize('stop', [1, 4, 6])
def test_a_resumed_run_costs_what_an_uninterrupted_one_does(
        tmp_path, monkeypatch, stop):
    train(tmp_path / 'whole', hooks=STAGED)
    part = toy_runner(tmp_path / 'part', hooks=STAGED)
    part.register_hook(StopAt(stop), priority='LOWEST')
    next(hook for hook in part.hooks
         if type(hook).__name__ == 'CheckpointHook').interval = stop
    with pytest.raises(KeyboardInterrupt):
        part.train()
    before = cost(tmp_path / 'part')
    assert before['iterations'] == stop
    measured, count_once = [], cost_hook._count_once
    monkeypatch.setattr(
        cost_hook, '_count_once',
        lambda model, stage: measured.append(count_once(model, stage)))
    train(tmp_path / 'part', hooks=STAGED, resume=True)
    # the stage it was in is not measured a second time
    assert len(measured) == {1: 2, 4: 1, 6: 0}[stop]
    whole, after = cost(tmp_path / 'whole'), cost(tmp_path / 'part')
    for what in EXACT:
        assert after[what] == whole[what], what
    assert list(after['stages']) == list(whole['stages'])
    for what in ('seconds', 'device_seconds', 'wall_seconds'):
        assert after[what] > before[what]
    assert after['peak_memory'] >= before['peak_memory']
    torch.load(tmp_path / 'part/iter_8.pth', weights_only=True)


class StopAt(Hook):

    def __init__(self, iteration):
        self.iteration = iteration

    def after_train_iter(self, runner, batch_idx, data_batch=None,
                         outputs=None):
        if batch_idx + 1 == self.iteration:
            raise KeyboardInterrupt


def test_a_checkpoint_without_a_cost_is_told_of(tmp_path):
    train(tmp_path, max_iters=4)
    train(tmp_path, hooks=[COST], resume=True)
    found = cost(tmp_path)
    assert (found['from_iteration'], found['iterations']) == (4, 4)
    assert 'counts from iteration 4 on' in ''.join(
        file.read_text() for file in tmp_path.rglob('*.log'))


def test_epochs_whose_last_batch_is_small(tmp_path):
    config = toy_config(tmp_path, hooks=[COST])
    config.train_dataloader.batch_size = 5
    config.train_dataloader.sampler = dict(type='DefaultSampler')
    config.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=2)
    config.default_hooks.checkpoint.update(by_epoch=True, interval=1)
    runner = Runner.from_cfg(config)
    runner.model = Linears()
    runner.train()
    found = cost(tmp_path)
    assert (found['iterations'], found['samples']) == (14, 64)
    assert found['flops'] == 64 * (4 * PIXELS * HIDDEN + 6 * HIDDEN * CLASSES)


@pytest.mark.parametrize('wrapper', [
    dict(accumulative_counts=3), dict(type='rmoe.BFloat16OptimWrapper')])
def test_accumulation_and_mixed_precision_cost_the_same(tmp_path, wrapper):
    train(tmp_path / 'plain', hooks=STAGED)
    config = toy_config(tmp_path / 'other', hooks=STAGED)
    config.optim_wrapper.update(wrapper)
    Runner.from_cfg(config).train()
    for what in EXACT:
        assert cost(tmp_path / 'other')[what] == cost(tmp_path / 'plain')[what]


def test_two_ranks_cost_twice(tmp_path):
    assert run_two_ranks(train_and_count, str(tmp_path)) == [True, False]
    train(tmp_path / 'one', max_iters=6, hooks=[STAGED[0], COST])
    one, two = cost(tmp_path / 'one'), cost(tmp_path / '0')
    assert two['world_size'] == 2 and two['iterations'] == one['iterations']
    for what in ('samples', 'flops'):
        assert two[what] == 2 * one[what]
    assert two['device_seconds'] == 2 * two['seconds']


class Time:
    """A clock that stands still unless a test moves it."""

    def __init__(self):
        self.now = 0.

    def perf_counter(self):
        return self.now


class Spend(Hook):
    """Iterations take 10 s, checkpoints 100 s, and the validation after the
    second iteration 1000 s."""
    priority = 'LOW'

    def __init__(self, time, cost):
        self.time, self.cost = time, cost

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.time.now += 10

    def after_train_iter(self, runner, batch_idx, data_batch=None,
                         outputs=None):
        if batch_idx == 1:
            self.cost.before_val_epoch(runner)
            self.time.now += 1000
            self.cost.after_val_epoch(runner)

    def before_save_checkpoint(self, runner, checkpoint):
        self.time.now += 100


class Slow(ToyImages):
    """Images take a second each to load."""
    time = None

    def __getitem__(self, index):
        self.time.now += 1
        return super().__getitem__(index)


def test_seconds_are_those_of_training(tmp_path, monkeypatch):
    time = Time()
    monkeypatch.setattr(cost_hook, 'time', time)
    monkeypatch.setattr(Slow, 'time', time)
    runner = toy_runner(tmp_path, hooks=[COST], max_iters=6)
    runner._train_dataloader['dataset'] = Slow()
    runner.register_hook(Spend(time, next(
        hook for hook in runner.hooks if type(hook).__name__ == 'CostHook')))
    runner.train()
    training = 6 * (10 + IMAGES)
    # Iteration 5 follows a checkpoint: when its batch was loaded is not seen.
    assert cost(tmp_path)['seconds'] == training - IMAGES
    # checkpoints after iterations 4 and 6
    assert cost(tmp_path)['wall_seconds'] == training + 2 * 100 + 1000
