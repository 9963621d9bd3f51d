"""The numbers of a plan against those of real processes and steps, and against
values worked out by hand."""
import json
from dataclasses import asdict, replace

import plan_parallel
import pytest
import torch
from _plan import activations as plan_activations
from _plan.activations import Run, experts_of, find
from _plan.layouts import Group, Layout, layouts, memory, units
from _plan.model import (
    build,
    image_size,
    moment_bytes,
    set_stage,
    stages_of,
)
from _plan.samples import loss_inputs
from _plan.traffic import Links, Rows, row_bytes, traffic
from accelerator import accelerated
from commands import command
from mmengine.config import Config
from toy import BACKBONE, STAGES, toy_config
from two_ranks import held_and_sent, run_two_ranks
from zoo import LEAVES, load, scope, shrink

from rmoe.moe import collect_losses
from rmoe.registry import MODELS

GB = 10**9
LINKS = Links(300 * GB, 200 * GB, 8)
# The arguments of FullySharded for each layout of two processes.
WRAPPERS = {'sharded': {}, 'expert parallel': dict(shard=1,
                                                   expert_parallel=2),
            'both': dict(expert_parallel=2)}


def parameters_of(cfg, bfloat16=False):
    with scope(cfg):
        return set_stage(build(cfg), stages_of(cfg), bfloat16)


@pytest.mark.torch('2.6')
def test_two_processes_hold_and_send_what_was_planned(tmp_path):
    ranks = run_two_ranks(held_and_sent, str(tmp_path), WRAPPERS)
    cfg = toy_config(tmp_path)
    parameters = parameters_of(cfg)
    # (4, 3, 32, 32) images; a token is 8 x 8 pixels; K = 1
    rows = [Rows(4 * 4 * 4, 16, 4, False)] * 2
    for layout in layouts(2, 8, 2)[1:]:
        planned = memory(parameters, layout, 2, 8, False, 0)
        sent = traffic(units(parameters, layout, 2, False), layout, rows, 2,
                       False, True, LINKS)
        for part in ('weights', 'gradients', 'moments'):
            held = [rank[layout.name][part] for rank in ranks]
            assert max(held) == getattr(planned, part), (layout.name, part)
            assert min(held) > .9 * max(held)
        assert ranks[0][layout.name]['parameters'] == pytest.approx(
            sent.parameters, rel=.02)
        # The process that has the busier experts sends more back. Half of the
        # rows stay in their process.
        rows_sent = sum(rank[layout.name]['rows'] for rank in ranks) / 2 / 2
        assert rows_sent == sent.rows
    assert {one.name for one in layouts(2, 8, 2)[1:]} == set(WRAPPERS)


class Saved:
    """A second implementation that counts the bytes that autograd keeps."""

    def __init__(self, model):
        self.own = {one.untyped_storage().data_ptr()
                    for one in [*model.parameters(), *model.buffers()]}
        self.kept = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(
            self.pack, lambda tensor: tensor)

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.kept[storage.data_ptr()] = storage
        return tensor

    def bytes_of(self, function):
        with self.hooks:
            self.result = function()
        return sum(one.nbytes() for one in self.kept.values())


def real_step(cfg, run):
    """Return the bytes that a step keeps, with real weights."""
    with scope(cfg):
        model = MODELS.build(cfg.model).train()
        model.init_weights()
        inputs = loss_inputs(model, run.batch, run.size)
        collect_losses(model, start=True)
        with accelerated(run.gpu), torch.autocast(
                'cpu', torch.bfloat16, enabled=run.bfloat16):
            return Saved(model).bytes_of(
                lambda: model.parse_losses(model(**inputs, mode='loss')))


def small(name, with_cp=False):
    cfg = shrink(load(next(path for path in LEAVES if path.stem == name)))
    cfg.model.backbone.with_cp = with_cp
    for part in (cfg.model.decode_head, cfg.model.get('auxiliary_head') or {}):
        if part:
            part.norm_cfg = dict(type='BN')
    return cfg


ADE20K = 'in1k-pre_upernet_8xb2-160k_ade20k-512x512'
SWIN = f'swin-tiny-patch4-window7-moe-e8k1-{ADE20K}'
VIT = f'vit-small-patch16-moe-e8k2-{ADE20K}'


@pytest.mark.parametrize('name, gpu, bfloat16, with_cp', [
    (SWIN, False, False, False), (VIT, False, False, False),
    (VIT, True, False, False), (VIT, True, False, True),
    pytest.param(VIT, True, True, False, marks=pytest.mark.torch('2.10')),
], ids=['swin cpu', 'vit cpu', 'vit', 'with_cp', 'bfloat16'])
def test_activations_at_a_size_that_was_not_measured(name, gpu, bfloat16,
                                                     with_cp):
    cfg = small(name, with_cp)
    run = Run((320, 416), 3, bfloat16, gpu, [('core', 'residual', 'router',
                                             'head')])
    with scope(cfg):
        planned = find(cfg, run, {8})
    assert planned.notes[0].startswith('backbone: traced')
    found = real_step(cfg, run)
    total = planned.total(8, converted=False) - planned.recomputed
    assert total == pytest.approx(found, rel=.1 if not gpu else .03)
    assert bool(planned.recomputed) == with_cp
    assert planned.recomputed < total


def test_fewer_experts_keep_fewer_folded_weights():
    cfg = small(VIT)
    run = Run((64, 64), 2, False, True, [('core', 'residual', 'router',
                                          'head')])
    with scope(cfg):
        planned = find(cfg, run, {8, 2})
    assert planned.moe[2] < planned.moe[8]
    assert planned.tokens == dict.fromkeys(planned.tokens, 2 * (16 + 1))


def test_a_backbone_that_looks_at_values_is_measured():
    cfg = small(VIT)
    cfg.model.backbone.moe.router = dict(type='SparseExpertChoiceRouter')
    run = Run((320, 416), 2, False, True, [('core', 'residual', 'router',
                                            'head')])
    with scope(cfg):
        planned = find(cfg, run, {8})
    assert 'cannot be traced' in planned.notes[0]
    found = real_step(cfg, replace(run, gpu=False))
    assert planned.total(8, False) == pytest.approx(found, rel=.1)


def test_detectors_are_measured_too():
    cfg = shrink(load(next(path for path in LEAVES if path.stem == (
        'mask-rcnn_swin-t-moe-e8k1-p4-w7_fpn_8xb2-1x_coco'))))
    assert image_size(cfg, None) == (800, 1344)
    with scope(cfg):
        planned = find(cfg, Run((128, 160), 2, False, True, [
            ('core', 'residual', 'router', 'head')]), {8})
    assert planned.rest > 0 < planned.backbone


def test_layouts_by_hand():
    """A rest of 10, one block of 6 with two experts of 40, in numbers."""
    parameters = [
        one for one in parameters_of(toy_config('x')) if one.experts][:1]
    expert = parameters[0]
    assert expert.shape[0] == 4 and expert.unit.endswith('.experts')
    assert expert.unit.startswith(expert.block)
    count = expert.numel
    for layout, share in ((Layout('data parallel', 1, 1, ddp=True), 1),
                          (Layout('sharded', 16, 1), 16),
                          (Layout('in nodes', 8, 1), 8),
                          (Layout('expert parallel', 1, 4), 4),
                          (Layout('both', 16, 4), 16)):
        found = memory(parameters, layout, 16, 8, False, 5)
        assert found.weights == 4 * count // share
        assert found.moments == 2 * found.gradients == 2 * found.weights
        assert found.activations == 5
        assert found.total == sum(asdict(found).values())
    # The terms are the experts of the block, the same again as the next unit,
    # their gradient, and its sum.
    assert memory(parameters, Layout('sharded', 16, 1), 16, 8, False,
                  0).gathered == 4 * 4 * count
    assert memory(parameters, Layout('both', 16, 4), 16, 8, True,
                  0).gathered == (2 + 2 + 2 + 4) * count // 4
    assert memory(parameters, Layout('data parallel', 1, 1, True), 16, 8,
                  False, 0, buckets=False).gathered == 0


def test_traffic_by_hand():
    """A unit of 800 bytes on two nodes of eight."""
    parameters = [one for one in parameters_of(toy_config('x'))
                  if one.experts][:1]
    size = 4 * parameters[0].numel

    def sent(layout, bfloat16=False, reshard=True):
        return traffic(units(parameters, layout, 16, bfloat16), layout,
                       [], 16, bfloat16, reshard, LINKS)

    ddp = sent(Layout('data parallel', 1, 1, ddp=True))
    assert ddp.parameters == 2 * 15 / 16 * size
    # The bytes leave a node once for all of its eight GPUs.
    assert ddp.seconds == ddp.parameters / (200 * GB)
    sharded = Layout('sharded', 16, 1)
    assert sent(sharded).parameters == 3 * 15 / 16 * size
    assert sent(sharded, reshard=False).parameters == 2 * 15 / 16 * size
    assert sent(sharded, bfloat16=True).parameters == 2 * 15 / 16 * size
    nodes = sent(Layout('in nodes', 8, 1))
    assert nodes.parameters == 3 * 7 / 8 * size + 2 / 2 * size / 8
    assert nodes.seconds == pytest.approx(
        3 * 7 / 8 * size / (300 * GB) + size / 8 * 8 / (200 * GB))
    experts = sent(Layout('expert parallel', 1, 8))
    assert experts.parameters == 2 / 2 * size / 8


def test_rows_by_hand():
    """100 rows of 16 float32 numbers among four processes."""
    layer = Rows(100, 16, 8, recomputed=False)
    assert row_bytes(layer, 4, False) == 3 / 4 * (4 * 100 * 16 * 4 + 8 * 4)
    again = Rows(100, 16, 8, recomputed=True)
    assert row_bytes(again, 4, True) == 3 / 4 * (6 * 100 * 16 * 2 + 2 * 8 * 4)
    assert row_bytes(layer, 1, False) == 0
    # Of 15 others 7 are in the same node. The shares of the other 8 leave the
    # node, for each of its eight GPUs.
    assert LINKS.exchange_seconds(15 * GB, Group(16)) == pytest.approx(
        8 * 8 / 200)
    assert LINKS.exchange_seconds(7 * GB, Group(8)) == pytest.approx(7 / 300)


def test_the_most_expensive_stage_is_planned():
    def trained(stages):
        hooks = [dict(type='rmoe.ResidualMoEHook', stages=stages)]
        cfg = toy_config('x', hooks=hooks)
        assert len(stages_of(cfg)) == len(stages)
        parameters = parameters_of(cfg)
        found = memory(parameters, Layout('data parallel', 1, 1, ddp=True), 1,
                       8, False, 0)
        return found.gradients / found.weights, found.moments / found.weights

    assert trained(STAGES) == (1, 2)
    gradients, moments = trained(STAGES[:1] + [dict(
        name='residual', roles=('residual', 'router'))])
    # The optimizer keeps the moments of the first stage.
    assert gradients < 1 and moments == 2


@pytest.mark.parametrize('optimizer, found', [
    (dict(type='AdamW'), 8), (dict(type='SGD', lr=1.), 0),
    (dict(type='SGD', lr=1., momentum=.9), 4)])
def test_moments(optimizer, found):
    cfg = Config(dict(optim_wrapper=dict(optimizer=optimizer)))
    assert moment_bytes(cfg, None) == found


def test_optimizers_that_cannot_be_planned():
    cfg = Config(dict(optim_wrapper=dict(optimizer=dict(type='Nothing'))))
    with pytest.raises(ValueError, match="'Nothing' is not registered"):
        moment_bytes(cfg, None)
    assert moment_bytes(cfg, 'AdamW') == 8
    if hasattr(torch.optim, 'Adafactor'):
        with pytest.raises(ValueError, match='does not grow with its'):
            moment_bytes(cfg, 'Adafactor')
    with pytest.raises(ValueError, match=r'no optim_wrapper\.optimizer'):
        moment_bytes(Config(), None)


def test_the_command(configs, tmp_path, capsys):
    command(plan_parallel, configs['moe'], '--gpus', 8, 16, '--memory', 1,
            '--json', tmp_path / 'plan.json')
    out = capsys.readouterr().out
    assert '9.4 M parameters' in out
    assert 'Choose data parallel, the simplest that fits: no setting' in out
    plans = json.loads((tmp_path / 'plan.json').read_text())
    assert [(one['gpus'], one['layout']) for one in plans] == [
        (8, 'data parallel'), (8, 'sharded'), (8, 'expert parallel'),
        (8, 'both'), (16, 'data parallel'), (16, 'sharded'),
        (16, 'sharded in nodes'), (16, 'expert parallel'), (16, 'both'),
        (16, 'both in nodes')]
    for one in plans:
        assert one['total_bytes'] == sum(
            one[f'{part}_bytes'] for part in (
                'weights', 'gradients', 'moments', 'gathered', 'activations'))
    tight = 1.05 * plans[1]['total_bytes'] / .9 / GB
    command(plan_parallel, configs['moe'], '--memory', tight)
    assert ("Choose sharded, the simplest that fits: model_wrapper_cfg=dict("
            "type='rmoe.FullySharded')") in capsys.readouterr().out
    command(plan_parallel, configs['moe'], '--memory', .001, '--amp')
    out = capsys.readouterr().out
    assert 'Nothing fits.' in out and 'in bfloat16' in out


@pytest.mark.parametrize('arguments, message', [
    (['--gpus', 0], '--gpus 0 must be at least 1'),
    (['--gpus', 12], 'not a whole number of nodes with 8 GPUs each: set '
     '--gpus-per-node'),
    (['--memory', -1], '--memory -1.0 must be greater'),
    (['--link', 0], '--link 0.0 must be greater'),
    (['--batch-size', 0], '--batch-size 0 must be greater'),
    (['--image-size', 1, 2, 3], 'must be a side'),
    (['--expert-parallel', 3], '3 does not divide the 8 experts'),
    (['--expert-parallel', 8, '--gpus', 4], '8 does not divide --gpus 4'),
    (['--optimizer', 'None'], "'None' is not registered"),
])
def test_bad_input(configs, arguments, message):
    with pytest.raises(SystemExit, match=message):
        command(plan_parallel, configs['moe'], *arguments)


def test_a_dense_config(configs):
    with pytest.raises(SystemExit, match='it is a dense model'):
        command(plan_parallel, configs['dense'])


def test_models_and_sizes_that_are_not_known(tmp_path):
    cfg = toy_config(tmp_path)
    with scope(cfg):
        with pytest.raises(ValueError, match='ToySegmentor cannot be planned, '
                           'because the form of its labels'):
            loss_inputs(build(cfg), 2, (32, 32))
    with pytest.raises(ValueError, match='give --image-size'):
        image_size(cfg, None)
    assert image_size(cfg, [64]) == (64, 64)
    assert experts_of(cfg) == BACKBONE['moe']['num_experts']
    assert plan_activations._sizes((256, 256)) == [(256, 256)]
    assert plan_activations._sizes((800, 1344)) == [(224, 352), (416, 672)]
