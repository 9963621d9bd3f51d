"""mmengine's EMAHook with experts, balance biases, counters and stages."""
import copy

import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.registry import METRICS
from mmengine.runner import Runner
from toy import (
    BACKBONE,
    STAGES,
    ToyImages,
    ToySegmentor,
    copied_state,
    toy_config,
    toy_model,
)

from rmoe.moe import moe_layers
from rmoe.upcycling import add_noise

MOMENTUM = 0.25
EMA = dict(type='EMAHook', momentum=MOMENTUM)
# The order of the documentation: what steps the bias, then what copies it.
HOOKS = (dict(type='rmoe.ResidualMoEHook', stages=STAGES),
         dict(type='rmoe.BalanceBiasHook'), EMA)
BIASED = copy.deepcopy(BACKBONE)
BIASED['moe']['router'] = dict(type='BiasBalancedRouter', update_rate=0.125)
VALIDATION = dict(
    val_cfg=dict(type='ValLoop'),
    val_dataloader=dict(
        dataset=dict(type='ToyImages', size=4), batch_size=4, num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=False),
        collate_fn=dict(type='default_collate')),
    val_evaluator=dict(type='MeanLogit'))


@METRICS.register_module(force=True)
class MeanLogit(BaseMetric):
    default_prefix = 'toy'

    def process(self, data_batch, data_samples):
        self.results.append(torch.stack(list(data_samples)).mean())

    def compute_metrics(self, results):
        return dict(mean=float(torch.stack(results).mean()))


def biases_of(state):
    """The biases of all layers, because that of one layer can return to
    zero."""
    return torch.cat([value for key, value in state.items()
                      if key.endswith('balance_bias')])


def make_runner(folder, hooks=HOOKS, backbone=BIASED, **options) -> Runner:
    config = toy_config(folder, hooks=copy.deepcopy(hooks),
                        backbone=copy.deepcopy(backbone),
                        **copy.deepcopy(VALIDATION), **options)
    config.train_cfg.val_interval = 2
    return Runner.from_cfg(config)


def find(runner, name):
    return next(h for h in runner.hooks if type(h).__name__ == name)


class ByHand(Hook):
    """A second implementation of the average."""
    priority = 'LOWEST'

    def __init__(self):
        self.average, self.values, self.biases = {}, [], []

    def after_train_iter(self, runner, batch_idx, data_batch=None,
                         outputs=None):
        for name, parameter in runner.model.named_parameters():
            if batch_idx == 0:
                self.average[name] = parameter.detach().clone()
            else:
                self.average[name] += MOMENTUM * (
                    parameter.detach() - self.average[name])

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        self.biases.append(biases_of(runner.model.state_dict()))
        self.live = find(runner, 'EMAHook').ema_model.module

    def after_val_epoch(self, runner, metrics=None):
        self.values.append(metrics['toy/mean'])


def test_the_average_goes_through_all_stages(tmp_path):
    runner = make_runner(tmp_path)
    by_hand = ByHand()
    runner.register_hook(by_hand)
    runner.train()
    saved = torch.load(tmp_path / 'iter_8.pth', weights_only=True)
    assert saved['ema_state_dict']['steps'] == 8
    for name, average in by_hand.average.items():
        torch.testing.assert_close(saved['state_dict'][name], average)
    # The other weights in the file are those with which training continues.
    for name, value in runner.model.state_dict().items():
        assert torch.equal(saved['ema_state_dict'][f'module.{name}'], value)


def test_what_was_validated_is_what_the_file_holds(tmp_path):
    runner = make_runner(tmp_path)
    by_hand = ByHand()
    runner.register_hook(by_hand)
    runner.train()
    images = torch.stack([image['inputs'] for image in ToyImages(size=4)])
    for iteration, value, bias in zip((2, 4, 6, 8), by_hand.values,
                                      by_hand.biases):
        assert torch.tensor(value).isfinite()
        if iteration % 4 == 0:  # a checkpoint
            saved = torch.load(tmp_path / f'iter_{iteration}.pth',
                               weights_only=True)
            model = ToySegmentor(BIASED).eval()
            model.load_state_dict(saved['state_dict'])
            with torch.no_grad():
                assert float(model(images).mean()) == pytest.approx(
                    value, abs=1e-6)
            # The bias is an integrator, with which the average balances.
            assert torch.equal(biases_of(saved['state_dict']), bias)
    assert by_hand.biases[-1].any()
    assert torch.equal(by_hand.biases[-1], biases_of(
        runner.model.state_dict()))


class StopAt(Hook):
    priority = 'LOWEST'

    def __init__(self, iteration):
        self.iteration = iteration

    def after_train_iter(self, runner, batch_idx, data_batch=None,
                         outputs=None):
        if batch_idx + 1 == self.iteration:
            raise KeyboardInterrupt


def test_resume_equals_uninterrupted(tmp_path):
    make_runner(tmp_path / 'whole').train()
    part = make_runner(tmp_path / 'part')
    part.register_hook(StopAt(4))
    with pytest.raises(KeyboardInterrupt):
        part.train()
    make_runner(tmp_path / 'part', resume=True).train()
    whole, part = (torch.load(tmp_path / name / 'iter_8.pth',
                              weights_only=True) for name in ('whole', 'part'))
    for content in ('state_dict', 'ema_state_dict'):
        assert part[content].keys() == whole[content].keys()
        for key, value in whole[content].items():
            assert torch.equal(part[content][key], value), key


@pytest.mark.parametrize('update_buffers', [False, True])
def test_the_average_is_an_onlooker(tmp_path, update_buffers):
    """Training, biases and counters are equal to those of a run without the
    hook."""
    runs = []
    for hooks in (HOOKS[:-1], (*HOOKS[:-1],
                               dict(EMA, update_buffers=update_buffers))):
        runner = make_runner(tmp_path / str(len(hooks)), hooks)
        runner.train()
        runs.append(runner.model)
    expected = dict(runs[0].state_dict(), **dict(runs[0].named_buffers()))
    found = dict(runs[1].state_dict(), **dict(runs[1].named_buffers()))
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    layers = moe_layers(runs[1]).values()
    assert all(layer.demand_E.sum() > 0 for layer in layers)


@pytest.mark.parametrize('noise', [0., 0.01])
def test_the_copy_upcycles_as_the_model_does(tmp_path, noise):
    torch.manual_seed(1)
    if noise:
        source = toy_model()
        add_noise(source.backbone, noise, seed=0)
    else:
        source = ToySegmentor(dict(BACKBONE, moe=None))
    torch.save(dict(state_dict=source.state_dict()), tmp_path / 'source.pth')
    runner = make_runner(tmp_path, [dict(type='rmoe.MoELossHook'), EMA],
                         BACKBONE, load_from=str(tmp_path / 'source.pth'))
    first = First()
    runner.register_hook(first)
    runner.train()
    weights = source.state_dict()
    for key, value in first.loaded.items():
        if '.router.' not in key and 'residual' not in key:
            assert torch.equal(value, weights[key]), key
        if 'residual' in key:
            assert bool(value.any()) == (bool(noise) and 'weight' in key), key
    for key, value in first.ema.items():
        assert torch.equal(value, first.model[key]), key


class First(Hook):
    """The copy after loading; both after the first iteration."""
    priority = 'LOWEST'

    def before_train(self, runner):
        self.loaded = copied_state(find(runner, 'EMAHook').ema_model.module)

    def after_train_iter(self, runner, batch_idx, data_batch=None,
                         outputs=None):
        if batch_idx == 0:
            self.model = copied_state(runner.model)
            self.ema = copied_state(find(runner, 'EMAHook').ema_model.module)
            # as it was loaded, before the step
            assert any(not torch.equal(value, self.loaded[key])
                       for key, value in self.ema.items())


def test_loading_the_copy_leaves_the_model_alone():
    model = toy_model()
    twin = copy.deepcopy(model)
    before = copied_state(model)
    dense = ToySegmentor(dict(BACKBONE, moe=None))
    routers = [layer.router.scorer.weight.data.fill_(7.)
               for layer in moe_layers(twin).values()]
    twin.load_state_dict(dense.state_dict())
    # Weights that the file lacks keep the values of the averaged model, not
    # those of the model.
    assert all(bool((weight == 7).all()) for weight in routers)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    core = 'backbone.stages.1.blocks.0.ffn.layers.0.0.weight'
    assert torch.equal(twin.state_dict()[core], dense.state_dict()[core])
    small = copy.deepcopy(toy_model(num_experts=2))
    with pytest.raises(ValueError, match='4 experts in the checkpoint and 2'):
        small.load_state_dict(model.state_dict())


def test_accumulation_needs_the_interval_of_its_steps(tmp_path):
    """One average per optimizer step, as without accumulation."""
    config = toy_config(tmp_path, max_iters=8, hooks=[
        dict(EMA, interval=2), dict(type='rmoe.MoELossHook')])
    config.optim_wrapper.accumulative_counts = 2
    runner = Runner.from_cfg(config)
    steps = Steps()
    runner.register_hook(steps)
    runner.train()
    # Copied at once, then averaged after the first batch of each window,
    # with the weights of the step before.
    average = steps.weights[0].clone()
    for weight in steps.weights[2::2]:
        average += MOMENTUM * (weight - average)
    ema = find(runner, 'EMAHook').ema_model.module
    torch.testing.assert_close(ema.head.weight, average)


class Steps(Hook):
    priority = 'LOWEST'

    def __init__(self):
        self.weights = []

    def after_train_iter(self, runner, batch_idx, data_batch=None,
                         outputs=None):
        self.weights.append(runner.model.head.weight.detach().clone())
