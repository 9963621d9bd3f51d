"""What cannot be served is refused before training, by name."""
import re

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODEL_WRAPPERS
from mmengine.runner import Runner
from routers import ROUTERS
from sharded_ranks import build
from torch import nn
from toy import toy_config

from rmoe import compat
from rmoe.moe import MoEMixFFN
from rmoe.parallel import FullySharded
from rmoe.parallel.data_parallel import choose_wrapper

needs_fully_shard = pytest.mark.torch('2.8')


@needs_fully_shard
@pytest.mark.parametrize('options, message', [
    (dict(expert_parallel=3), 'expert_parallel=3 does not divide the 4 '
     'experts of backbone.stages.1.blocks.0.ffn'),
    (dict(param_dtype='float16'), "param_dtype='float16' is not one of")])
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        FullySharded(build(ROUTERS['token choice']), **options)


@needs_fully_shard
def test_a_dense_model():
    with pytest.raises(ValueError, match=r'found no MoE layer in the model.*'
                       'or remove model_wrapper_cfg'):
        FullySharded(nn.Linear(2, 2))


@needs_fully_shard
def test_a_layer_that_looks_at_its_neighbours():
    from mmseg.models.backbones.mit import MixFFN
    ffn = MixFFN(8, 16, dict(type='GELU'))
    with pytest.raises(ValueError, match='expert_parallel=2 does not work with '
                       '0: the experts of a MoEMixFFN'):
        FullySharded(nn.Sequential(MoEMixFFN(ffn, num_experts=4)),
                     expert_parallel=2)


@needs_fully_shard
@pytest.mark.parametrize('ranks, shard, expert_parallel, message', [
    (8, 3, 1, 'shard=3 does not divide the 8 processes'),
    (8, 0, 1, 'shard=0 does not divide the 8 processes'),
    (8, None, 16, 'expert_parallel=16 does not divide the 8 processes'),
    (8, None, 3, 'expert_parallel=3 does not divide the 8 processes'),
    (8, 2, 4, 'expert_parallel=4 does not divide shard=2')])
def test_numbers_of_processes(ranks, shard, expert_parallel, message):
    from rmoe.parallel.mesh import lay_out
    with pytest.raises(ValueError, match=message):
        lay_out('cpu', ranks, shard, expert_parallel)


def test_an_old_torch(monkeypatch):
    monkeypatch.setattr(compat, 'has_torch', lambda version: False)
    with pytest.raises(ValueError, match='rmoe.FullySharded needs torch >= '
                       rf'2\.8, this is torch {re.escape(torch.__version__)}'):
        FullySharded(build(ROUTERS['token choice']))


def test_configs_name_it():
    assert MODEL_WRAPPERS.get('rmoe.FullySharded') is FullySharded


def test_a_compiled_step():
    cfg = Config(dict(compile=True, model_wrapper_cfg=dict(
        type='rmoe.FullySharded')))
    with pytest.raises(ValueError, match=r'compile=True does not work with '
                       'rmoe.FullySharded.*leave one of the two out'):
        choose_wrapper(cfg)


@pytest.mark.parametrize('hook', [
    dict(type='rmoe.MoELossHook'),
    dict(type='rmoe.ResidualMoEHook', stages=[dict(roles='all')])])
def test_a_hook_that_saves_one_part(tmp_path, monkeypatch, hook):
    """Each of our hooks finds it, before training."""
    monkeypatch.setattr('rmoe.engine.wrappers.is_laid_out', lambda model: True)
    cfg = toy_config(tmp_path, max_iters=1, hooks=[hook])
    cfg.default_hooks.checkpoint.type = 'CheckpointHook'
    with pytest.raises(ValueError, match='save the part of the first process '
                       r"alone: set default_hooks\.checkpoint\.type='rmoe\.Ch"):
        Runner.from_cfg(cfg).train()
    cfg.default_hooks.checkpoint.type = 'rmoe.CheckpointHook'
    Runner.from_cfg(cfg).train()


@needs_fully_shard
def test_a_stack_that_no_width_divides():
    from rmoe.parallel.sharding import _placement
    stack = nn.Parameter(torch.empty(4, 6, 9))
    # Where each process has all experts, the first dimension may be padded.
    assert [_placement(parts, False, stack) and
            _placement(parts, False, stack).dim for parts in (4, 3, 5)] == [
        0, 1, None]
    assert _placement(9, True, stack).dim == 2
    with pytest.raises(ValueError, match=r'\(4, 6, 9\) is a multiple of 4 '
                       'processes: set shard to the value of expert_'):
        _placement(4, True, stack)
