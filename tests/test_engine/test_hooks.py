"""Losses, statistics and checkpoints, on a real runner and toy data."""
import copy
import json
import pickle
import re

import pytest
import torch
from accelerator import accelerated
from engine_ranks import meet_nan, train_in_windows
from mmengine.optim import OptimWrapper
from toy import BACKBONE, STAGES, ToyImages, copied_state, toy_model, toy_runner
from two_ranks import aux_gradient, run_two_ranks, who_stops

from rmoe.anywhere.statistics import normalised_entropy
from rmoe.engine.moe_loss_hook import MoELossHook, install
from rmoe.moe import moe_layers
from rmoe.moe.routers.base import NotFiniteError

STATS = dict(type='rmoe.RoutingStatsHook', interval=4)


def batch(size=4):
    images = ToyImages()
    return (torch.stack([images[i]['inputs'] for i in range(size)]),
            torch.stack([images[i]['labels'] for i in range(size)]))


def test_losses_are_added_in_loss_mode_only():
    model = toy_model()
    install(model), install(model)
    inputs, labels = batch()
    losses = model(inputs, labels, mode='loss')
    assert set(losses) == {'loss_ce', 'loss_moe_importance'}
    assert losses['loss_moe_importance'].requires_grad
    assert isinstance(model(inputs), torch.Tensor)
    assert isinstance(model.eval()(inputs), torch.Tensor)
    assert all(layer.losses is None for layer in moe_layers(model).values())


def router_gradients(model, scale=1., micro_batches=1):
    """The gradients of the auxiliary losses alone, through mmengine's sum of
    losses."""
    install(model)
    model.zero_grad()
    inputs, labels = batch()
    for _ in range(micro_batches):
        losses = model(inputs, labels, mode='loss')
        losses = {key: value for key, value in losses.items()
                  if key != 'loss_ce'}
        total, _ = model.parse_losses(losses)
        (total * scale / micro_batches).backward()
    return torch.stack([layer.router.scorer.weight.grad / scale
                        for layer in moe_layers(model).values()])


def test_auxiliary_gradient_is_the_same_everywhere(tmp_path):
    model = toy_model()
    expected = router_gradients(model)
    assert expected.abs().sum() > 0
    saved = copy.deepcopy(model)
    for block in saved.backbone.stages[1].blocks:
        block.with_cp = block.ffn.with_cp = True
    torch.testing.assert_close(router_gradients(saved), expected)
    # the loss scale of mixed precision
    torch.testing.assert_close(router_gradients(model, scale=65536.),
                               expected)
    # gradient accumulation
    torch.testing.assert_close(router_gradients(model, micro_batches=4),
                               expected)
    # two ranks with the same images: their mean is the same gradient
    for grads in run_two_ranks(aux_gradient, str(tmp_path),
                               copied_state(model)):
        torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize('when', ['training', 'evaluation'])
def test_nan_on_an_accelerator_is_found_at_the_next_look(tmp_path, when):
    """Between two checks nothing waits for the device."""
    runner = toy_runner(tmp_path, max_iters=9, hooks=[
        dict(type='rmoe.MoELossHook', interval=4)])
    runner.load_or_resume()
    layer = next(iter(moe_layers(runner.model).values()))
    if when == 'training':
        with torch.no_grad():
            layer.router.scorer.weight[0, 0] = float('nan')
    with accelerated(), pytest.raises(
            NotFiniteError, match=re.escape(layer.name) + ': router logits '
            'are nan or inf for [1-9][0-9]* tokens.*clip_grad'):
        if when == 'training':
            runner.train()
        else:
            layer.router.not_finite += 3
            runner.call_hook('after_val_epoch', metrics=None)
    assert runner.iter == (3 if when == 'training' else 0)
    assert all(each.router.not_finite == 0
               for each in moe_layers(runner.model).values())


def test_an_interval_that_never_comes_is_refused():
    with pytest.raises(ValueError, match='interval=0 must be at least 1'):
        MoELossHook(interval=0)


def test_ranks_stop_together(tmp_path):
    first, second = run_two_ranks(who_stops, str(tmp_path))
    assert first == second and 'block 1: router logits are nan' in first
    assert 'for 3 tokens on rank 1: ' in first


def test_ranks_on_a_cpu_stop_together(tmp_path):
    """Both ranks raise in the iteration in which one of them met nan."""
    first, second = run_two_ranks(meet_nan, str(tmp_path))
    assert first == second
    message, iteration = first
    assert iteration == 2
    assert re.match('MoE layer of stage 1, block 1: router logits are nan or '
                    'inf for 1 tokens on rank 1: .*clip_grad', message)


def test_two_ranks_average_accumulate_and_clip_as_one(tmp_path):
    """Two ranks with half of the batch each, through two stages."""
    backbone = copy.deepcopy(BACKBONE)
    # The balance of a batch is not the mean of two halves.
    backbone['moe']['router']['loss_weights'] = {}
    options = dict(backbone=backbone)
    ranks = run_two_ranks(train_in_windows, str(tmp_path), 2, options)
    one = train_in_windows(0, str(tmp_path), 1, options)
    for part, state in one.items():
        for key, value in state.items():
            for rank in ranks:
                torch.testing.assert_close(
                    rank[part][key], value, rtol=1e-5, atol=1e-5, msg=key)
            assert torch.equal(ranks[0][part][key], ranks[1][part][key])
    key = 'head.weight'
    assert not torch.equal(one['model'][key], one['average'][key])


def test_losses_are_logged_and_summed(tmp_path):
    runner = toy_runner(tmp_path, max_iters=4, hooks=[
        dict(type='rmoe.MoELossHook')])
    next(h for h in runner.hooks
         if type(h).__name__ == 'LoggerHook').interval = 1
    runner.train()
    lines = [json.loads(line) for line in
             next(tmp_path.rglob('scalars.json')).read_text().splitlines()]
    first = lines[0]
    assert first['loss'] == pytest.approx(
        first['loss_ce'] + first['loss_moe_importance'])


@pytest.mark.parametrize('names, layer', [
    ('backbone', 0), (['head', 'backbone.stages.1.blocks.1'], 1),
    ('backbone.stages.1.blocks.0.ffn.router', 0)], ids=str)
def test_checkpoints_that_drop_auxiliary_gradients_are_refused(
        tmp_path, names, layer):
    runner = toy_runner(tmp_path, hooks=[dict(type='rmoe.MoELossHook')],
                        activation_checkpointing=names)
    with pytest.raises(ValueError, match=re.escape(
            f'activation_checkpointing={names!r} wraps the router of backbone'
            f'.stages.1.blocks.{layer}.ffn') + '.*with_cp=True'):
        runner.train()


def test_checkpoints_of_dense_modules_are_not_refused(tmp_path):
    runner = toy_runner(
        tmp_path, max_iters=1, hooks=[dict(type='rmoe.MoELossHook')],
        activation_checkpointing=['backbone.stages.1.blocks.0.norm1', 'head'])
    runner.train()
    assert runner.iter == 1


@pytest.mark.parametrize('hook', [
    dict(type='rmoe.MoELossHook'),
    dict(type='rmoe.ResidualMoEHook', stages=STAGES)],
    ids=lambda hook: hook['type'])
def test_a_core_that_experts_would_bypass_is_refused(tmp_path, hook):
    runner = toy_runner(tmp_path, hooks=[hook])
    # The layer itself checks in its first forward pass.
    runner.model(batch()[0])
    linear = runner.model.backbone.stages[1].blocks[0].ffn.layers[1]
    linear.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(ValueError, match=r'MoE layer of stage 1, block 0: '
                       r'layers\.1 has a hook'):
        runner.train()
    assert runner.iter == 0


def test_collapse_is_named_with_a_remedy(tmp_path):
    runner = toy_runner(tmp_path, max_iters=8, hooks=[
        dict(type='rmoe.MoELossHook'), STATS])
    runner._init_model_weights = lambda: None
    layer = runner.model.backbone.stages[1].blocks[0].ffn
    torch.nn.init.zeros_(layer.router.scorer.weight)  # ties: expert 0 takes all
    layer.router.scorer.weight.requires_grad_(False)
    runner.train()
    log = next(tmp_path.rglob('*.log')).read_text()
    name = 'backbone.stages.1.blocks.0.ffn'
    for expert in (1, 2, 3):
        # warned of once, although two windows found it dead
        assert log.count(f'expert {expert} of {name} is dead') == 1
    assert f'expert 0 of {name} is dead' not in log
    assert 'router.loss_weights' in log
    assert f'{name}: load % [100 0 0 0]  entropy 0.000' in log
    scalars = [json.loads(line) for line in
               next(tmp_path.rglob('scalars.json')).read_text().splitlines()]
    assert [line[f'moe/{name}/load_0'] for line in scalars
            if f'moe/{name}/load_0' in line] == [1., 1.]


def test_statistics_count_every_token_once(tmp_path):
    runner = toy_runner(tmp_path, max_iters=4, hooks=[
        dict(type='rmoe.MoELossHook'), dict(STATS, interval=3)])
    runner._init_model_weights = lambda: None
    runner.train()
    # three iterations were taken, one of 4 images x 16 patches is left
    for layer in moe_layers(runner.model).values():
        assert int(layer.demand_E.sum()) == 64
        assert torch.equal(layer.demand_E, layer.kept_E)
    hub = runner.message_hub
    assert hub.get_scalar('train/moe_dropped').current() == 0
    assert 0 < hub.get_scalar('train/moe_entropy').current() <= 1


def test_balanced_load_is_not_warned_of():
    assert normalised_entropy(torch.full((8, ), 1 / 8)) == pytest.approx(1)
    assert normalised_entropy(torch.eye(8)[0]) == 0
    assert normalised_entropy(torch.ones(1)) == 1


@pytest.mark.parametrize('options', [dict(interval=0), dict(dead_below=1.)])
def test_bad_statistics_options(options):
    from rmoe.engine import RoutingStatsHook
    with pytest.raises(ValueError, match=f'{next(iter(options))}='):
        RoutingStatsHook(**options)


def test_checkpoints_are_plain_and_whole(tmp_path):
    runner = toy_runner(tmp_path, max_iters=8, hooks=[
        dict(type='rmoe.MoELossHook'), STATS])
    hook = next(h for h in runner.hooks
                if type(h).__name__ == 'CheckpointHook')
    hook.max_keep_ckpts = 1
    runner.train()
    names = {file.name for file in tmp_path.glob('*.pth')}
    assert names == {'iter_8.pth'}
    assert not list(tmp_path.glob('.*.tmp'))
    content = torch.load(tmp_path / 'iter_8.pth', weights_only=True)
    assert content['meta']['iter'] == 8
    assert len(content['message_hub']['log_scalars']['train/loss']['log']
               ) == 8
    again = toy_runner(tmp_path, max_iters=8, resume=True)
    again.load_or_resume()
    assert again.message_hub.get_scalar('train/loss').data[0].size >= 8


def test_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    from rmoe.upcycling import formats
    runner = toy_runner(tmp_path, max_iters=8)
    next(h for h in runner.hooks
         if type(h).__name__ == 'CheckpointHook').max_keep_ckpts = 1
    real, calls = formats.os.fsync, []

    def full_from_the_third(descriptor):
        calls.append(descriptor)
        if len(calls) > 2:  # iter_4.pth and last_checkpoint were written
            raise OSError(28, 'No space left on device')
        real(descriptor)

    monkeypatch.setattr(formats.os, 'fsync', full_from_the_third)
    with pytest.raises(OSError, match='No space left'):
        runner.train()
    monkeypatch.undo()
    assert [f.name for f in tmp_path.glob('*.pth')] == ['iter_4.pth']
    assert (tmp_path / 'last_checkpoint').read_text().endswith('iter_4.pth')
    toy_runner(tmp_path, max_iters=8, resume=True).train()
    assert (tmp_path / 'iter_8.pth').exists()


def test_checkpoint_of_plain_mmengine_resumes(tmp_path):
    from mmengine.hooks import CheckpointHook
    runner = toy_runner(tmp_path, max_iters=4)
    hook = next(h for h in runner.hooks
                if type(h).__name__ == 'CheckpointHook')
    hook.before_save_checkpoint = CheckpointHook().before_save_checkpoint
    runner.train()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / 'iter_4.pth', weights_only=True)
    again = toy_runner(tmp_path, max_iters=8, resume=True)
    again.train()
    assert again.iter == 8


def test_weights_alone_are_not_resumed(tmp_path):
    torch.save(dict(state_dict=toy_model().state_dict(), meta={}),
               tmp_path / 'w.pth')
    runner = toy_runner(tmp_path, load_from=str(tmp_path / 'w.pth'),
                        resume=True)
    with pytest.raises(ValueError, match='no training state'):
        runner.train()


def test_wrong_prefix_is_named_at_load_from(tmp_path):
    path = tmp_path / 'bare.pth'
    torch.save(dict(state_dict=toy_model().backbone.state_dict()), path)
    runner = toy_runner(tmp_path, load_from=str(path))
    with pytest.raises(ValueError, match="looked for weights under the "
                       r"prefix 'backbone\.'.* under ''"):
        runner.train()


def test_every_micro_batch_adds_its_losses(tmp_path):
    runner = toy_runner(tmp_path, max_iters=4, hooks=[
        dict(type='rmoe.MoELossHook')])
    runner.optim_wrapper = OptimWrapper(
        torch.optim.SGD(runner.model.parameters(), lr=.1),
        accumulative_counts=2)
    runner.train()
    # every micro batch adds its own losses
    logged = runner.message_hub.get_scalar('train/loss_moe_importance')
    assert logged.data[0].size == 4
    assert all(layer.losses is None
               for layer in moe_layers(runner.model).values())
