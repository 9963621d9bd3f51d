"""bfloat16 on the CPU, where mmengine's AmpOptimWrapper raises."""
from contextlib import contextmanager

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import Runner
from toy import toy_config

from rmoe.moe import moe_layers

BF16 = dict(type='rmoe.BFloat16OptimWrapper')
MOE_LOSS = dict(type='rmoe.MoELossHook')


class Types(Hook):
    """Records the types of a router's input and logits, and of its experts'
    outputs."""

    def before_train(self, runner):
        self.seen, self.layer = {}, next(iter(
            moe_layers(runner.model).values()))
        self.layer.router.scorer.register_forward_hook(
            lambda module, inputs, out: self.seen.update(
                scorer=inputs[0].dtype, logits=out.dtype))
        self.layer.experts.register_forward_hook(
            lambda module, inputs, out: self.seen.update(experts=out.dtype))


def train(folder, wrapper=BF16, max_iters=8, hooks=(), **options):
    """Train, and return the runner and the loss of every iteration."""
    config = toy_config(folder, max_iters, [MOE_LOSS], **options)
    config.optim_wrapper.update(wrapper)
    runner = Runner.from_cfg(config)
    for hook in hooks:
        runner.register_hook(hook)
    runner.train()
    return runner, runner.message_hub.get_scalar('train/loss').data[0]


def test_experts_in_bfloat16_routers_in_float32(tmp_path):
    types = Types()
    runner, _ = train(tmp_path, hooks=[types], max_iters=1)
    assert types.seen == dict(scorer=torch.float32, logits=torch.float32,
                              experts=torch.bfloat16)
    assert {p.dtype for p in runner.model.parameters()} == {torch.float32}
    assert {value.dtype for state in runner.optim_wrapper.optimizer.state
            .values() for value in state.values()} == {torch.float32}


@pytest.mark.parametrize('options', [
    {}, dict(accumulative_counts=2), dict(clip_grad=dict(max_norm=.1))])
def test_the_loss_is_that_of_float32(tmp_path, options):
    runner, losses = train(tmp_path / 'a', dict(BF16, **options), 24)
    _, expected = train(tmp_path / 'b', options, 24)
    difference = abs(losses - expected)
    assert 0 < difference[0] < 1e-3  # of losses about 1.2
    # After that, rounding sends some tokens to other experts.
    assert difference.max() < 0.1
    assert losses[-8:].mean() < losses[:8].mean() - 0.05
    norms = runner.message_hub.log_scalars.get('train/grad_norm')
    assert ('clip_grad' in options) == (norms is not None)


def test_resume_equals_uninterrupted(tmp_path):
    whole, _ = train(tmp_path / 'whole')
    train(tmp_path / 'part', max_iters=4)
    part, _ = train(tmp_path / 'part', resume=True)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(part.model.state_dict()[key], value), key


def test_what_a_gpu_saved_is_resumed(tmp_path):
    runner, _ = train(tmp_path, max_iters=4)
    path = tmp_path / 'iter_4.pth'
    checkpoint = torch.load(path, weights_only=True)
    assert 'loss_scaler' not in checkpoint['optimizer']
    checkpoint['optimizer']['loss_scaler'] = dict(
        scale=65536., growth_factor=2., backoff_factor=.5,
        growth_interval=2000, _growth_tracker=4)
    torch.save(checkpoint, path)
    runner, _ = train(tmp_path, resume=True)
    assert runner.iter == 8
    state = runner.optim_wrapper.optimizer.state
    assert next(iter(state.values()))['step'] == 8


def test_ranks_meet_once_per_step():
    """With gradient accumulation, a wrapped model does not synchronise between
    steps, as under OptimWrapper."""
    model, synced = torch.nn.Linear(2, 2), []
    model.no_sync = lambda: recorded(synced)
    wrapper = OPTIM_WRAPPERS.build(dict(
        BF16, optimizer=torch.optim.SGD(model.parameters(), .1),
        accumulative_counts=3))
    wrapper.initialize_count_status(model, 0, 6)
    for _ in range(6):
        with wrapper.optim_context(model):
            loss = model(torch.ones(1, 2)).sum()
        synced.append(loss.dtype)
        wrapper.update_params(loss)
    # the context was entered for the first two of each three batches
    kept = ['no sync', torch.bfloat16]
    assert synced == 2 * [*kept, *kept, torch.bfloat16]


@contextmanager
def recorded(calls):
    calls.append('no sync')
    yield
