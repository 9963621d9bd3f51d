"""Stages: which parameters train and which are frozen, resuming, and two
ranks."""
import copy

import pytest
import torch
from mmengine.hooks import Hook
from toy import (
    BACKBONE,
    STAGES,
    ToySegmentor,
    copied_state,
    toy_model,
    toy_runner,
)
from two_ranks import Watch, run_two_ranks, train

from rmoe.engine.roles import role_of, trainable_table

STAGE_HOOK = dict(type='rmoe.ResidualMoEHook', stages=STAGES)
HOOKS = (STAGE_HOOK, dict(type='rmoe.MoELossHook'))
TRAINS = {0: {'core', 'head'}, 1: {'core', 'head'},
          2: {'residual', 'router', 'head'},
          3: {'residual', 'router', 'head'},
          4: {'residual', 'router', 'head'},
          5: {'core', 'residual', 'router', 'head'}}


def test_each_stage_changes_its_roles_and_nothing_else(tmp_path):
    runner = toy_runner(tmp_path, max_iters=6, hooks=HOOKS)
    watch = Watch()
    runner.register_hook(watch, priority='LOWEST')
    runner.train()
    # the running statistics of the backbone's BatchNorm count as core
    assert watch.changed == TRAINS
    assert watch.routed == {i: i >= 2 for i in range(6)}
    # the first stage is the dense model: residuals are still zero after it
    log = next(tmp_path.rglob('*.log')).read_text()
    for stage in STAGES:
        assert f"stage '{stage['name']}' trains" in log
    core = sum(p.numel() for n, p in runner.model.named_parameters()
               if role_of(n) in ('core', 'head'))
    total = sum(p.numel() for p in runner.model.parameters())
    assert (f'trainable: {core:,} of {total:,} ({100 * core / total:.1f} %)'
            in log)


def test_core_stage_is_the_dense_model(tmp_path):
    # same seed, same data: the MoE's core stage and a dense run agree
    moe = toy_runner(tmp_path / 'moe', max_iters=2, hooks=[
        dict(type='rmoe.ResidualMoEHook', stages=[
            dict(roles=('core', 'head'))])])
    dense_backbone = dict(moe.cfg.model.backbone, moe=None)
    dense = toy_runner(tmp_path / 'dense', max_iters=2)
    dense.model = ToySegmentor(dense_backbone)
    dense.model.load_state_dict(
        {key: value for key, value in moe.model.state_dict().items()
         if role_of(key) in ('core', 'head')})
    dense._init_model_weights = moe._init_model_weights = lambda: None
    moe.train(), dense.train()
    state = moe.model.state_dict()
    for key, value in dense.model.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize('stop', [1, 3, 4, 6])
def test_resume_equals_uninterrupted(tmp_path, stop):
    # with router noise and stochastic depth
    backbone = copy.deepcopy(BACKBONE)
    backbone['drop_path_rate'] = .5
    backbone['moe']['router']['noise_std'] = 4.
    options = dict(hooks=HOOKS, backbone=backbone)
    whole = toy_runner(tmp_path / 'whole', **options)
    whole.train()
    part = toy_runner(tmp_path / 'part', **options)
    part.register_hook(StopAt(stop), priority='LOWEST')
    next(hook for hook in part.hooks
         if type(hook).__name__ == 'CheckpointHook').interval = stop
    with pytest.raises(KeyboardInterrupt):
        part.train()
    torch.manual_seed(1234)
    rest = toy_runner(tmp_path / 'part', resume=True, **options)
    rest.train()
    assert rest.iter == whole.iter
    expected = whole.model.state_dict()
    for key, value in rest.model.state_dict().items():
        assert torch.equal(value, expected[key]), key


class StopAt(Hook):

    def __init__(self, iteration):
        self.iteration = iteration

    def after_train_iter(self, runner, batch_idx, data_batch=None,
                         outputs=None):
        if batch_idx + 1 == self.iteration:
            raise KeyboardInterrupt


def test_resume_into_other_stages_says_what_to_do(tmp_path):
    toy_runner(tmp_path, max_iters=4, hooks=[
        dict(type='rmoe.ResidualMoEHook', stages=STAGES[:1] + STAGES[2:])
    ]).train()
    other = toy_runner(tmp_path, max_iters=8, hooks=HOOKS, resume=True)
    with pytest.raises(ValueError, match='load_from=CHECKPOINT'):
        other.train()


def test_frozen_stages_stay_frozen_in_every_stage(tmp_path):
    runner = toy_runner(tmp_path, max_iters=6, hooks=HOOKS)
    runner.model.backbone.patch_embed.requires_grad_(False)
    before = copied_state(runner.model.backbone.patch_embed)
    runner._init_model_weights = lambda: None
    runner.train()
    for key, value in runner.model.backbone.patch_embed.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_epochs_and_fractions(tmp_path):
    stages = [dict(roles=('core', ), end=1), dict(roles='all')]
    runner = toy_runner(tmp_path / 'a', max_iters=20, hooks=[
        dict(type='rmoe.ResidualMoEHook', stages=stages, by_epoch=True)])
    runner.train()
    hook = runner.hooks[[type(h).__name__ for h in runner.hooks].index(
        'ResidualMoEHook')]
    assert [stage.end for stage in hook.plan] == [8, 20]  # 32 images, 4 each
    stages = [dict(roles=('core', ), end=.25), dict(roles='all', end=1.)]
    hook.__init__(stages)
    assert [stage.end for stage in hook._resolve(runner)] == [5, 20]


@pytest.mark.parametrize('stages, message', [
    ([], 'stages is empty'),
    ([dict(roles=('expert', ))], "role 'expert'"),
    ([dict(end=3)], 'needs roles'),
    ([dict(roles='all', lr=1)], 'may have name and end'),
    ([dict(roles='all'), dict(roles='all')], r'stages\[0\] needs an end'),
    ([dict(roles='all', end=1.5)], 'fraction'),
    ([dict(roles='core', end=5), dict(roles='all', end=5)], 'ends at'),
    ([dict(roles='all', end=5)], 'leave its end out'),
])
def test_bad_stages_name_the_value(tmp_path, stages, message):
    with pytest.raises(ValueError, match=message):
        toy_runner(tmp_path, hooks=[
            dict(type='rmoe.ResidualMoEHook', stages=stages)]).train()


def test_core_only_stage_needs_a_core(tmp_path):
    runner = toy_runner(tmp_path, hooks=HOOKS)
    runner.model = toy_model(core=False)
    with pytest.raises(ValueError, match='core=False'):
        runner.train()


@pytest.mark.parametrize('hook', [STAGE_HOOK, dict(type='rmoe.MoELossHook'),
                                  dict(type='rmoe.RoutingStatsHook')])
def test_model_without_moe_is_refused(tmp_path, hook):
    runner = toy_runner(tmp_path, hooks=[hook])
    runner.model = ToySegmentor(dict(runner.cfg.model.backbone, moe=None))
    with pytest.raises(ValueError, match='no MoE layer'):
        runner.train()


def test_role_of():
    assert role_of('backbone.stages.2.blocks.1.ffn.layers.0.0.weight') == (
        'core')
    assert role_of('backbone.stages.2.blocks.1.ffn.router.scorer.weight'
                   ) == 'router'
    assert role_of('backbone.stages.2.blocks.1.ffn.experts.residual_fc1_up'
                   ) == 'residual'
    assert role_of('decode_head.conv_seg.weight') == 'head'
    assert role_of('backbone.bn.running_mean') == 'core'


def test_trainable_table_counts():
    model = toy_model()
    model.head.bias.requires_grad_(False)
    table = trainable_table(model)
    assert '1 of 2' in table  # the head's two tensors
    total = sum(p.numel() for p in model.parameters())
    assert f'trainable: {total - 3:,} of {total:,}' in table


@pytest.mark.parametrize('collapsed', [False, True])
def test_two_ranks_stay_equal_across_stages(tmp_path, collapsed):
    ranks = run_two_ranks(train, str(tmp_path), collapsed)
    for key, value in ranks[0]['state'].items():
        # running statistics are local to a rank, as mmengine has it
        if 'running' not in key:
            assert torch.equal(value, ranks[1]['state'][key]), key
    for rank in ranks:
        for i, roles in TRAINS.items():
            assert rank['changed'][i] <= roles
            assert rank['changed'][i] >= roles - {'router'}
