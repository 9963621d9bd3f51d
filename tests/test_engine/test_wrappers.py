"""Hooks under wrappers for parallel training, on two ranks."""
from types import SimpleNamespace

import pytest
import torch
from engine_ranks import (
    keep_norms_still,
    refuse,
    train_compiled,
    train_sharded,
    train_with_communication_hooks,
)
from mmengine.model import BaseTTAModel
from mmengine.registry import MODEL_WRAPPERS
from test_engine.test_residual_moe_hook import TRAINS
from toy import toy_model, toy_runner
from two_ranks import run_two_ranks

from rmoe import compat
from rmoe.engine.wrappers import check_wrapper, unwrapped, wrap_again


class Averaging(BaseTTAModel):

    def merge_preds(self, data_samples_list):
        return data_samples_list


def test_a_model_inside_wrappers_is_found():
    model = toy_model()
    model.test_step = None
    assert unwrapped(model) is model
    assert unwrapped(Averaging(model)) is model


@pytest.mark.parametrize('options', [
    dict(disable=True),  # skips what takes torch.compile a minute
    pytest.param(dict(backend='eager'), marks=[
        pytest.mark.slow, pytest.mark.torch('2.6')])], ids=str)
def test_compiled_steps_are_compiled_again(tmp_path, options):
    for rank in run_two_ranks(train_compiled, str(tmp_path), options):
        assert rank['compiled']['compiled'] == [True] * 6
        assert not any(rank['plain']['compiled'])
        for run in rank.values():
            # three stages, of whose wrappers only the last one still exists
            assert run['alive'] == [False, False, True]
        for key, value in rank['plain']['state'].items():
            torch.testing.assert_close(
                rank['compiled']['state'][key], value, msg=key)


def test_communication_hooks_come_back_or_are_refused(tmp_path):
    for rank in run_two_ranks(train_with_communication_hooks, str(tmp_path)):
        if compat.has_torch('2.6'):
            calls = rank['calls']
            assert 0 < calls[0] and len(calls) == 6
            assert all(a < b for a, b in zip(calls, calls[1:]))
        else:  # this DDP does not keep its communication hooks
            assert 'communication hook Count.reduce was' in rank['refused']
        assert 'communication hook powerSGD_hook was' in rank['power']
        assert 'FP16_COMPRESS' in rank['builtin']
        assert 'model_wrapper_cfg' in rank['builtin']
        # once when the runner is built, then at each stage
        assert rank['made'] == 4 and rank['own'] == 'fp16_compress_hook'


def test_frozen_norms_are_those_of_the_new_wrapper(tmp_path):
    for rank in run_two_ranks(keep_norms_still, str(tmp_path)):
        assert rank['new']
        for key, value in rank['before'].items():
            assert torch.equal(rank['after'][key], value), key


def test_wrappers_that_break_hooks_are_refused(tmp_path):
    first, second = run_two_ranks(refuse, str(tmp_path))
    assert ('under MMSeparateDistributedDataParallel' in first['separate']
            and 'rmoe.FullySharded' in first['separate'])
    for hook in ('MoELossHook', 'RoutingStatsHook'):
        assert 'broadcast_buffers=False in model_wrapper_cfg' in first[hook]
    # rank 0 has five of nine images, and its last batch one; both say so
    assert first['odd'].startswith('ValueError: rank 0: group=2')
    assert 'batch_size=2 leave 1. Set drop_last=True' in first['odd']
    assert first == second


@MODEL_WRAPPERS.register_module(force=True)
class MMFullyShardedDataParallel(torch.nn.Module):

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_a_wrapper_of_another_kind_is_refused(tmp_path):
    runner = toy_runner(tmp_path, hooks=[dict(
        type='rmoe.ResidualMoEHook', stages=[dict(roles='all')])])
    runner.model = MMFullyShardedDataParallel(runner.model)
    with pytest.raises(ValueError, match='cannot change what trains under '
                       r'MMFullyShardedDataParallel.*rmoe\.FullySharded'):
        check_wrapper(runner)
    with pytest.raises(ValueError, match='cannot change what trains'):
        wrap_again(runner)


def test_a_runner_that_cannot_wrap_is_named(monkeypatch):
    ddp = torch.nn.parallel.DistributedDataParallel.__new__(
        torch.nn.parallel.DistributedDataParallel)
    torch.nn.Module.__init__(ddp)
    with pytest.raises(ValueError, match='under SimpleNamespace: remove '
                       'runner_type'):
        check_wrapper(SimpleNamespace(model=ddp))


@pytest.mark.torch('2.8')
def test_fully_sharded_models_go_through_stages(tmp_path):
    torch.save(dict(state_dict=toy_model().state_dict(), meta={}),
               tmp_path / 'start.pth')
    ranks = run_two_ranks(train_sharded, str(tmp_path))
    for rank in ranks:
        sharded, ddp = rank['sharded'], rank['ddp']
        for i, changed in enumerate(sharded['changed']):
            assert changed <= TRAINS[i]
        for role in ('core', 'residual', 'router', 'head'):
            assert any(role in each['changed'][-1] for each in (
                ranks[0]['sharded'], ranks[1]['sharded']))
        # sizes are those of whole parameters
        assert sharded['table'] == ddp['table']
        for key, value in ddp['state'].items():
            torch.testing.assert_close(
                sharded['state'][key], value, rtol=1e-5, atol=1e-5, msg=key)
            assert torch.equal(ranks[0]['sharded']['state'][key],
                               ranks[1]['sharded']['state'][key])
            # counting operations changes nothing
            assert torch.equal(sharded['state'][key],
                               rank['uncounted']['state'][key]), key
        assert sharded['entropy'] == pytest.approx(ddp['entropy'])
    both = sum(sum(rank['sharded']['sizes'].values()) for rank in ranks)
    assert both == sum(ranks[0]['ddp']['sizes'].values())
    sharded, ddp = ranks[0]['sharded']['cost'], ranks[0]['ddp']['cost']
    for what in ('flops', 'samples', 'iterations'):
        assert sharded[what] == ddp[what]
    assert [stage['trainable_parameters']
            for stage in sharded['stages'].values()] == [
        stage['trainable_parameters'] for stage in ddp['stages'].values()]
