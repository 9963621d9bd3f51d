"""Tools that concern routers: the report of upcycle.py, the capacity sweep,
and rescore.py."""
import json

import capacity_sweep
import pytest
import rescore
import test as test_tool  # tools/test.py
import torch
import train
import upcycle
from commands import command, miou, options
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope


@pytest.mark.parametrize('moe, preserves', [
    (['num_experts=4'], True),
    (['router.type=SoftRouter'], True),
    (['router.type=SoftRouter', 'align=none'], False),
    (['router.type=ExpertChoiceRouter'], True),
    (['router.type=ExpertChoiceRouter', 'unrouted=zero'], False),
    # drops in training only, so that features in evaluation are equal
    (['router.type=TokenChoiceRouter', 'router.capacity_factor=0.5',
      'unrouted=zero'], None),
], ids=str)
def test_upcycling_says_whether_it_preserves_the_function(
        work, configs, dense_checkpoint, capsys, moe, preserves):
    command(upcycle, dense_checkpoint, '--config', configs['moe'], '--out',
            work / 'm.pth', '--size', 64, '--cfg-options',
            *(f'model.backbone.moe.{option}' for option in moe))
    report = json.loads((work / 'm.report.json').read_text())
    assert report['preserves_function'] == bool(preserves)
    assert (report['largest_feature_difference'] < 1e-5) == (
        preserves is not False)
    out = capsys.readouterr().out
    for mode, changes in (('training', not preserves),
                          ('evaluation', preserves is False)):
        text = f'compute the dense function in {mode}: '
        assert (text in out) == changes
        assert bool(report['layers_that_change_the_function'][mode]
                    ) == changes


@pytest.fixture(scope='module')
def moe_checkpoint(work, configs, upcycled):
    command(train, configs['moe'], *options(
        work, 'sweep-train', f'load_from={upcycled}',
        'custom_hooks.2.interval=2'))
    return work / 'sweep-train/iter_4.pth'


def test_capacity_sweep(work, configs, moe_checkpoint, capsys):
    command(capacity_sweep, configs['moe'], moe_checkpoint, '--capacities',
            '0.25', '1', '8', '--repeats', '3', *options(work, 'sweep'))
    found = json.loads((work / 'sweep/capacity_sweep.json').read_text())
    rows = found['rows']
    assert [(row['order'], row['capacity']) for row in rows] == [
        ('reference', None)] + [
            (order, capacity)
            for order in ('first come', 'batch prioritised')
            for capacity in (.25, 1., 8.)]
    full, few, _, eight, prioritised, *_ = rows
    # eight slots over the fair share of eight experts: nothing is dropped
    assert eight['score'] == full['score'] and eight['skipped'] == 0
    assert eight['gflops'] == pytest.approx(full['gflops'])
    assert full['gflops'] == pytest.approx(full['dense_gflops'], rel=.02)
    for row in (few, prioritised):
        # 16 tokens and 8 experts: one slot each; 4 tokens: one each too
        assert row['skipped'] > .3
        assert row['gflops'] < full['gflops']
    assert few['gflops'] == pytest.approx(prioritised['gflops'], rel=.05)
    for row in rows:
        assert row['milliseconds'] > 0 and row['dense_milliseconds'] > 0
    command(test_tool, configs['moe'], moe_checkpoint,
            *options(work, 'sweep-reference'))
    assert full['score'] == pytest.approx(miou(work / 'sweep-reference'),
                                          abs=.01)
    assert set(found['kept']) == {'first come', 'batch prioritised'}
    assert 'keeps 99 % of the score' in capsys.readouterr().out
    assert (work / 'sweep/capacity_sweep.png').stat().st_size > 10_000


def test_capacity_sweep_of_expert_choice(work, configs, dense_checkpoint):
    # an upcycled model is the dense one; left-out tokens get the core
    command(test_tool, configs['dense'], dense_checkpoint,
            *options(work, 'sweep-dense'))
    reference = miou(work / 'sweep-dense')
    command(capacity_sweep, configs['moe'], dense_checkpoint, '--capacities',
            '0.5', '2', *options(
                work, 'sweep-ec',
                'model.backbone.moe.router.type=ExpertChoiceRouter'))
    found = json.loads((work / 'sweep-ec/capacity_sweep.json').read_text())
    assert [row['order'] for row in found['rows']] == [
        'reference', 'expert choice', 'expert choice']
    assert found['rows'][0]['score'] == pytest.approx(reference, abs=.01)
    _, half, double = (row['gflops'] for row in found['rows'])
    assert half < double


def test_rescore(work, configs, moe_checkpoint, dense_checkpoint):
    command(rescore, configs['moe'], moe_checkpoint,
            *options(work, 'rescore'))
    rows = json.loads((work / 'rescore/rescore.json').read_text())['rows']
    assert [row['model'] for row in rows] == ['as it is', 'core', 'mean']
    # the dense models that tools/upcycle.py makes of the same checkpoint
    for row in rows[1:]:
        images = ['--images', work / 'scenes/images/validation']
        command(upcycle, moe_checkpoint, '--config', configs['moe'], '--out',
                work / 'd.pth', '--size', 64, '--to-dense', row['model'],
                *(images if row['model'] == 'mean' else []))
        command(test_tool, configs['dense'], work / 'd.pth',
                *options(work, f'rescore-{row["model"]}'))
        # 'mean' of that tool weights experts by their load
        assert row['score'] == pytest.approx(
            miou(work / f'rescore-{row["model"]}'),
            abs=.01 if row['model'] == 'core' else 1.)
    command(rescore, configs['dense'], dense_checkpoint,
            *options(work, 'rescore-dense'))
    row, = json.loads(
        (work / 'rescore-dense/rescore.json').read_text())['rows']
    command(test_tool, configs['dense'], dense_checkpoint,
            *options(work, 'rescore-reference'))
    assert row['score'] == pytest.approx(miou(work / 'rescore-reference'),
                                         abs=.01)


@torch.no_grad()
def test_flips_are_averaged_in_their_place(configs):
    cfg = Config.fromfile(configs['dense']).model
    cfg.backbone.init_cfg = None
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg).eval()
    x = torch.randn(1, 3, 64, 64)
    metas = [dict(img_shape=(64, 64), ori_shape=(64, 64))]
    plain, mirrored = (model.inference(image, metas)
                       for image in (x, x.flip(3)))
    once, twice = rescore.both(model, x, metas)
    assert torch.equal(once, plain)
    torch.testing.assert_close(twice, (plain + mirrored.flip(3)) / 2)
    assert not torch.equal(twice, plain)


@pytest.mark.parametrize('flags, more, message', [
    (['--capacities', '0'], [], 'must be positive'),
    (['--repeats', '0'], [], '--repeats 0 must be at least 1'),
    (['--launcher', 'pytorch'], [], 'runs in one process'),
    (['--metric', 'PQ'], [], "none of ..PQ"),
    ([], ['model.backbone.moe.router.type=SoftRouter'],
     'SoftRouter.*no capacity to change'),
    ([], ['model.backbone.moe=None'], 'no MoE layer'),
    (['--unrouted', 'core'], ['model.backbone.moe.core=False'],
     'needs a model with core=True'),
])
def test_capacity_sweep_of_what_has_none(work, configs, dense_checkpoint,
                                         flags, more, message):
    with pytest.raises(SystemExit, match=message):
        command(capacity_sweep, configs['moe'], dense_checkpoint, *flags,
                *options(work, 'sweep-bad', *more))


def test_the_smallest_capacity_is_one_that_holds():
    rows = [dict(order='reference', score=50.)] + [
        dict(order='bpr', capacity=c, score=s) for c, s in
        ((.1, 49.9), (.3, 40.), (.5, 49.6), (1., 49.4), (2., 50.))]
    # 99 % of 50 is 49.5: 1.0 has less, so .5 and .1 are luck
    assert capacity_sweep.smallest_capacity(rows, 'bpr') == 2.
    rows[4]['score'] = 49.5
    assert capacity_sweep.smallest_capacity(rows, 'bpr') == .5
    rows[5]['score'] = float('nan')
    assert capacity_sweep.smallest_capacity(rows, 'bpr') is None
