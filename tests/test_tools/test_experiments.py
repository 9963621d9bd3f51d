"""tools/experiments: plans, runs with seeds, records and the report."""
import json
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import _figures
import _record
import _results
import _steps
import _tables
import pytest
import run as experiment
import specialisation
import torch
import train
import upcycle
from commands import command
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from rmoe.report.scalars import read_scalars

ROOT = Path(__file__).parents[2]
PLANS = sorted((ROOT / 'configs/experiments').glob('*.py'))
# It is imported by its path, because tools/report.py has the same name.
SPEC = spec_from_file_location('experiments_report',
                               ROOT / 'tools/experiments/report.py')
report = module_from_spec(SPEC)
SPEC.loader.exec_module(report)


@pytest.fixture
def trained(monkeypatch):
    """Train in this process, and record the work dirs of the trainings."""
    folders = []

    def here(config, folder, *flags, gpus, label):
        folders.append('/'.join(folder.parts[-2:]))
        command(train, config, '--work-dir', folder, *flags)

    monkeypatch.setattr(_steps, 'train', here)
    monkeypatch.setattr(experiment, 'start_tool', lambda tool, log, *args: (
        command({'upcycle': upcycle, 'specialisation': specialisation}[
            Path(tool).stem], *args)))
    return folders


@pytest.fixture(scope='module')
def plan(work, configs):
    """One dense run for all seeds; from it, dense, MoE and noisy MoE."""
    short = {
        'train_cfg': dict(max_iters=2, val_interval=2),
        'param_scheduler': [], 'train_dataloader.batch_size': 2,
        'model.data_preprocessor.size': (64, 64),
        'default_hooks.logger.interval': 1,
        'default_hooks.checkpoint.interval': 1,
        **{f'{split}_dataloader.dataset.data_root': str(work / 'scenes')
           for split in ('train', 'val', 'test')}}
    joint = {**short, 'custom_hooks': [
        dict(type='rmoe.MoELossHook'), dict(type='rmoe.CostHook'),
        dict(type='rmoe.RoutingStatsHook', interval=1)]}
    dense = {**short, 'custom_hooks': [dict(type='rmoe.CostHook')]}
    path = work / 'plan.py'
    Config(dict(
        steps={name: str(configs['moe' if 'moe' in name else 'dense'])
               for name in ('first', 'dense', 'moe', 'noisy-moe')},
        pipelines={'non-moe': ['first', 'dense'], 'moe': ['first', 'moe'],
                   'noisy': ['first', 'noisy-moe']},
        options={'first': dense, 'dense': dense, 'moe': {
            **joint, 'optim_wrapper.clip_grad': dict(
                _delete_=True, type='value', clip_value=.5)},
                 'noisy-moe': joint},
        once=['first'],
        upcycle={'noisy-moe': ['--noise', '.1', '--size', '64']},
        analyse={'moe': ['specialisation']})).dump(path)
    return path


def test_an_experiment(work, plan, trained, monkeypatch, capsys):
    arguments = (plan, '--seeds', 3, 4, '--only', 'moe', '--work-dir',
                 work / 'runs', '--records', work / 'records')
    command(experiment, *arguments)
    assert trained == ['once/first', 'seed3/first+moe', 'seed4/first+moe']
    file = work / 'records/plan.jsonl'
    (_, three), (name, one) = ((record['seed'], record) for record in
                               _record.read_records(file))
    assert (three['seed'], name, one['pipeline']) == (3, 4, 'moe')
    assert one['steps']['first']['seed'] == 0  # shared by all seeds
    assert one['steps']['moe']['seed'] == 4
    assert one['scores'] == one['steps']['moe']['scores']
    curve = one['steps']['moe']['curve']
    assert [step for step, _ in curve['loss']] == [1, 2]
    assert [entry[:2] for entry in curve['score']] == [[2, 'mIoU']]
    assert one['steps']['moe']['cost']['samples'] == 4
    assert one['steps']['moe']['commit']
    layers = one['steps']['moe']['routing']
    assert len(layers) == 3
    for layer in layers.values():
        assert len(layer['load']) == 8
        assert sum(layer['load']) == pytest.approx(1, abs=1e-3)
    measured = one['analyses']['specialisation']
    assert measured['images'] == 3 and len(measured['layers']) == 3
    assert not {'config', 'checkpoint'} & set(measured)  # someone's paths
    runs = work / 'runs/plan'
    for seed in (3, 4):
        path = runs / f'seed{seed}/first+moe/step.py'
        text = path.read_text()
        assert f'seed={seed}' in text and 'clip_value=0.5' in text
        assert 'max_norm' not in text and '_delete_' not in text
        assert Config.fromfile(path).default_hooks.report.enabled is False
    # a second time nothing is trained, and records come out the same
    again = file.read_text()
    trained.clear()
    monkeypatch.setattr(experiment, 'start_tool', None)
    command(experiment, *arguments)
    assert not trained
    assert file.read_text() == again


def test_what_fails_does_not_stop_the_others(work, plan, trained,
                                             monkeypatch, capsys):
    run = _steps.train

    def fail(config, folder, *flags, gpus, label):
        if folder.name == 'first+dense':
            raise ValueError('train.py failed (no memory)')
        run(config, folder, *flags, gpus=gpus, label=label)

    monkeypatch.setattr(_steps, 'train', fail)
    with pytest.raises(SystemExit, match='1 of 2 failed; non-moe, seed 0'):
        command(experiment, plan, '--seeds', 0, '--only', 'non-moe', 'noisy',
                '--work-dir', work / 'failing', '--records',
                work / 'failing')
    record, = _record.read_records(work / 'failing/plan.jsonl')
    assert (record['pipeline'], record['seed']) == ('noisy', 0)
    assert 'upcycled.pth' in (
        work / 'failing/plan/seed0/first+noisy-moe/step.py').read_text()


def test_scores_of_single_data_sets():
    assert list(_record.scores({
        'b/mIoU': 2., 'aAcc': 9., 'a/mIoU': 1., 'mIoU': 1.50001})) == [
        'mIoU', 'b/mIoU', 'a/mIoU']
    runs = {name: make(name, {0: 0., 1: 0., 2: 0.})
            for name in ('dense', 'e1')}
    for shift, each in enumerate(runs.values()):
        for seed, record in each.records.items():
            record['scores'] = {'mIoU': 0., 'a/mIoU': 50. + shift,
                                'b/mIoU': 60. + shift * seed}
    assert _tables.data_sets(runs).splitlines() == [
        '| variant | a, seeds | over dense | b, seeds | over dense '
        '| training loss / dense | operations |',
        '| --- | --- | --- | --- | --- | --- | --- |',
        '| dense | 50.0, 50.0, 50.0 |  | 60.0, 60.0, 60.0 |  | 1.000 | 1.000 '
        '|',
        # Gains of 0, 1 and 2: 4.303 * 1 / sqrt(3).
        '| e1 | 51.0, 51.0, 51.0 | +1.00 ± 0.00 | 60.0, 61.0, 62.0 | '
        '+1.00 ± 2.48 | 1.000 | 1.000 |']


@pytest.mark.parametrize('flags, message', [
    (['--only', 'rmoe-x'], 'rmoe-x: .* has the pipelines moe, noisy, non-moe'),
    (['--jobs', 0], r'--jobs=0 must be at least 1'),
])
def test_wrong_flags(work, plan, trained, flags, message):
    with pytest.raises(SystemExit, match=message):
        command(experiment, plan, *flags, '--work-dir', work / 'wrong')
    assert not trained


@pytest.mark.parametrize('path', PLANS, ids=lambda path: path.stem)
def test_every_plan_builds(path):
    """Each step exists, accepts its options, and has settings that no other
    step has."""
    plan = Config.fromfile(path)
    used = {step for chain in plan.pipelines.values() for step in chain}
    assert used == set(plan.steps)
    assert set(plan.options) <= used
    assert set(plan.get('upcycle', ())) <= used
    assert set(plan.get('once', ())) <= used
    assert set(plan.get('analyse', ())) <= set(plan.pipelines)
    texts, backbones = set(), {}
    # Two steps are the same if their settings and their starting points are.
    places = {(tuple(chain[:chain.index(step)]), step)
              for chain in plan.pipelines.values() for step in chain}
    for before, step in places:
        cfg = Config.fromfile(path.parent / plan.steps[step])
        cfg.merge_from_dict(dict(plan.options.get(step, {})))
        cfg.model.backbone.init_cfg = None
        for module in cfg.get('custom_imports', {}).get('imports', ()):
            import_module(module)
        backbones[str(cfg.model.backbone)] = cfg.model.backbone
        texts.add(cfg.pretty_text + str(plan.get('upcycle', {}).get(step))
                  + str(before))
    assert len(texts) == len(places)
    # Only shapes are compared, so nothing is initialised.
    with DefaultScope.overwrite_default_scope('mmseg'), torch.device('meta'):
        for backbone in backbones.values():
            MODELS.build(backbone)
    assert path.stem in {each.plan for each in report.REPORTS.values()}


def logged(folder, *starts):
    """What the starts of a run logged, each a list of lines."""
    files = []
    for number, lines in enumerate(starts):
        files.append(folder / f'{number}.json')
        files[-1].write_text('\n'.join(map(json.dumps, lines)))
    return read_scalars(files, epoch_length=None)


def test_the_curve_of_a_resumed_run(tmp_path):
    scalars = logged(
        tmp_path,
        [dict(loss=4., step=10), dict(loss=3., step=20),
         dict(mIoU=11., step=20), dict(loss=2., step=30)],
        [dict(loss=2.5, step=30),
         dict(loss=1.75, loss_moe_load=.5, loss_moe_importance=.25, step=40),
         dict(mIoU=22., step=40)])
    assert _record.curve(scalars) == dict(
        loss=[[10, 4.], [20, 3.], [30, 2.5], [40, 1.]],
        score=[[20, 'mIoU', 11.], [40, 'mIoU', 22.]])


def test_loads_of_the_last_window(tmp_path):
    layers = _record.routing(logged(tmp_path, [
        {'moe/a/load_0': .9, 'moe/a/load_1': .1, 'moe/a/entropy': .5,
         'step': 10},
        {'moe/a/load_0': .75, 'moe/a/load_1': .25, 'moe/a/entropy': .8,
         'moe/a/unrouted': .125, 'moe/a/dropped': 0., 'step': 20}]))
    assert layers == dict(a=dict(load=[.75, .25], entropy=.8, unrouted=.125))
    layers['b'] = dict(load=[.5, .5], entropy=1., unrouted=0.)
    assert _results.summarise(layers.values()) == dict(
        entropy=.9, unrouted=.0625, smallest_load=.5)
    assert _results.summarise([]) == {}


def test_records_of_several_trainings_at_a_time(tmp_path):
    step = dict(checkpoint='a.pth', cost=None, metrics=dict(mIoU=1.))

    def write(seed):
        _record.write_record(tmp_path, 'plan', f'p{seed % 2}', seed // 2,
                             dict(last=dict(step, metrics=dict(mIoU=seed))),
                             {})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, [*range(16), 5]))
    lines = (tmp_path / 'plan.jsonl').read_text().splitlines()
    assert [(each['pipeline'], each['seed'], each['scores']['mIoU'])
            for each in map(json.loads, lines)] == [
        (f'p{which}', seed, 2 * seed + which)
        for which in (0, 1) for seed in range(8)]


def make(name, scores, flops=2e12, upstream=20.):
    """Records of a pipeline of three steps."""
    return _results.Runs(name, {seed: dict(
        pipeline=name, seed=seed, scores=dict(mIoU=score), analyses={},
        steps=dict(
            first=dict(scores={'accuracy/top1': 10.}, routing={},
                       cost=dict(flops=5e11, seconds=30)),
            second=dict(scores={'accuracy/top1': upstream}, routing={},
                        cost=dict(flops=5e11, seconds=30)),
            last=dict(scores=dict(mIoU=score), routing={},
                      curve=dict(loss=[[50, 2.], [100, 1.]], score=[]),
                      cost=dict(flops=flops, seconds=120))))
        for seed, score in scores.items()})


def test_gains_are_paired_by_seed():
    dense, moe = make('dense', {0: 10., 1: 20.}), make('moe', {0: 11., 1: 22.})
    assert moe.gain(dense) == 1.5
    assert make('moe', {1: 23., 5: 0.}).gain(dense) == 3.
    with pytest.raises(ValueError, match='share no seed'):
        make('moe', {7: 1.}).gain(dense)


def test_average_precision_is_in_percent():
    runs = make('x', {0: 50.})
    assert runs.scores() == {0: 50.}
    runs.records[0]['scores'] = {'coco/bbox_mAP': .5}
    assert runs.scores() == {0: 50.}


def test_losses_are_those_of_the_last_quarter_and_of_common_seeds():
    dense, moe = make('dense', {0: 1., 1: 1.}), make('moe', {1: 1., 2: 1.})
    assert dense.loss() == {0: 1., 1: 1.}
    for runs, seed, last in ((dense, 0, 9.), (dense, 1, 2.), (moe, 1, 3.)):
        runs.last_step(seed)['curve']['loss'] = [[75, 7.], [80, last],
                                                 [100, last]]
    assert moe.loss_over(dense) == 1.5


def test_the_table_of_pipelines():
    runs = {each.name: each for each in (
        make('non-moe', {0: 30., 1: 32., 2: 31.}),
        make('moe', {0: 33., 1: 33., 2: 35.}, flops=4e12))}
    rows = [[cell.strip() for cell in line.split('|')[1:-1]]
            for line in _tables.pipelines(runs).splitlines()]
    assert rows[2] == ['non-moe', '20.0', '30.0, 32.0, 31.0', '31.00', '',
                       '1.000', '3', '1.000', '0.600', '3']
    # Gains of 3, 1 and 4: 4.303 * 1.528 / sqrt(3).
    assert rows[3] == ['moe', '20.0', '33.0, 33.0, 35.0', '33.67',
                       '+2.67 ± 3.79', '1.000', '5', '1.667', '1.000', '3']


def test_the_tables_of_variants_and_routers():
    dense, moe = make('non-moe', {0: 30.}), make('moe', {0: 33.}, flops=4e12)
    moe.records[0]['steps']['last']['routing'] = {
        'layer': dict(load=[.25, .75], entropy=.8, unrouted=.1),
        'other': dict(load=[.5, .5], entropy=1., unrouted=0.)}
    runs = {'non-moe': dense, 'moe': moe}
    assert _tables.variants(runs).splitlines()[2:] == [
        '| non-moe | 30.0 | 30.00 |  | 1.000 | 1.000 |  |',
        '| moe | 33.0 | 33.00 | +3.00 | 1.000 | 2.000 | 0.50 |']
    assert _tables.routers(runs).splitlines()[2:] == [
        '| non-moe | 30.0 | 30.00 |  | 1.000 |  |  |  |',
        '| moe | 33.0 | 33.00 | +3.00 | 2.000 | 0.900 | 0.50 | 5 % |']


def test_the_report(work, tmp_path, capsys):
    records = tmp_path / 'records'
    records.mkdir()
    (records / 'rmoe-swin.jsonl').write_text('\n'.join(
        json.dumps(record)
        for name, score in (('non-moe', 30.), ('rmoe-d', 31.))
        for record in make(name, {0: score, 1: score}).records.values()))
    out = tmp_path / 'results.md'
    out.write_text('before\n<!-- rmoe-swin: begin -->\nold\n'
                   '<!-- rmoe-swin: end -->\nafter\n')
    command(report, '--records', records, '--out', out)
    text = out.read_text()
    assert text.startswith('before\n') and text.endswith('after\n')
    assert 'old' not in text and '| rmoe-d | 20.0 | 31.0, 31.0 |' in text
    assert (tmp_path / 'figures/rmoe-swin.png').stat().st_size > 5000
    assert 'ablation: no records' in capsys.readouterr().out
    (records / 'ablation.jsonl').write_text('\n'.join(
        json.dumps(make(name, {0: 30.}).records[0])
        for name in ('non-moe', 'joint', 'staged')))
    out.write_text(text + ''.join(
        f'<!-- {name}: begin --><!-- {name}: end -->'
        for name in ('ablation', 'routers-downstream')))
    command(report, '--records', records, '--out', out)
    assert 'vmoe: no records of ablation' in capsys.readouterr().out
    assert out.read_text().count('| joint | 30.0 | 30.00 | +0.00 |') == 2
    assert out.read_text().count('| staged |') == 1
    for text in ('no markers', '<!-- rmoe-swin: end -->'):
        out.write_text(text)
        with pytest.raises(SystemExit, match=r'must have the lines .*-swin'):
            command(report, '--records', records, '--out', out)
        assert out.read_text() == text


def test_curves_are_means_of_the_seeds_that_all_have(tmp_path, monkeypatch):
    used = []
    mean_loss = _figures.mean_loss

    def note(runs, seeds):
        used.append((runs.name, list(seeds)))
        return mean_loss(runs, seeds)

    monkeypatch.setattr(_figures, 'mean_loss', note)
    runs = {'non-moe': make('non-moe', {0: 1., 1: 2., 2: 3.}),
            'moe': make('moe', {2: 3., 0: 1.})}
    runs['non-moe'].records[1]['steps']['last']['curve']['loss'] = [[50, 99.]]
    _figures.curves(runs, tmp_path / 'curves.png')
    assert used == [('non-moe', [0, 2]), ('moe', [0, 2])]
    assert mean_loss(runs['non-moe'], [0, 2]) == ([50, 100], [2., 1.])


def test_the_table_of_capacities():
    runs = make('k2', {0: 50., 1: 50.})
    for seed, low in ((0, 40.), (1, 42.)):
        runs.records[seed]['analyses']['capacity_sweep'] = dict(rows=[
            dict(order='reference', capacity=None, score=50., gflops=4.,
                 skipped=0., dense_gflops=2.),
            dict(order='first come', capacity=.5, score=low, gflops=2.,
                 skipped=.5),
            dict(order='batch prioritised', capacity=.5, score=low + 4,
                 gflops=2., skipped=.25)])
    dense = make('non-moe', {0: 51., 1: 52., 2: 90.})
    lines = _tables.capacities({'non-moe': dense, 'k2': runs}).splitlines()
    assert lines[2] == '| non-moe, same seeds |  | 1.000 |  | 51.50 |  |'
    assert lines[-1] == '| k2 | 0.5 | 1.000 | 25 % | 41.00 | 45.00 |'
    for seed, milliseconds in ((0, 3.), (1, 9.)):
        for row in runs.records[seed]['analyses']['capacity_sweep']['rows']:
            row.update(milliseconds=milliseconds, dense_milliseconds=2.)
    lines = _tables.times({'dense': dense, 'k2': runs}).splitlines()
    # Scores are means over seeds, the time is that of the first seed.
    assert lines[2:] == [
        '| k2 | all kept | 0 % | 50.00 | -1.50 |  | 2.000 | 1.500 |',
        '| k2 | 0.5 | 25 % | 45.00 | -6.50 | +4.00 | 1.000 | 1.500 |']


def rescored(name, scores, **models):
    """Records with what rescore.py found: (score, with flips) by seed."""
    runs = make(name, dict(enumerate(scores)))
    for seed, record in runs.records.items():
        rows = [dict(model='as it is', score=scores[seed],
                     flips=scores[seed] + 1)]
        rows += [dict(model=model, score=values[seed], flips=values[seed])
                 for model, values in models.items()]
        record['analyses'] = dict(rescore=dict(rows=rows))
    return runs


def test_intervals_are_those_of_students_t():
    dense, moe = make('dense', {0: 1., 1: 1., 2: 1.}), make(
        'e4', {0: 2., 1: 3., 2: 4., 9: 70.})
    # mean 2, deviation 1, three pairs: 4.303 / sqrt(3)
    assert moe.gain(dense) == 2
    assert moe.interval(dense) == pytest.approx(2.484, abs=1e-3)
    with pytest.raises(ValueError, match=r'share the seeds \[0\]'):
        make('e4', {0: 2.}).interval(dense)


def test_the_tables_of_the_recipe():
    runs = {each.name: each for each in (
        rescored('dense', [50., 52.]), rescored('e1', [51., 52.]),
        rescored('e4', [52., 55.], mean=[52., 53.]),
        rescored('dense-drop', [50., 50.]), rescored('e4-drop', [50., 54.]))}
    rows = {line.split('|')[1].strip(): line for line in
            _tables.paired({name: runs[name] for name in (
                'dense', 'e1', 'e4')}).splitlines()}
    assert rows['dense'] == '| dense | 50.0, 52.0 |  |  |  | 1.000 | 1.000 |'
    assert rows['e4'] == ('| e4 | 52.0, 55.0 | +2.50 | +2.00 | +1.50 | 1.000 '
                          '| 1.000 |')
    # The first variant is the dense one, whatever its name.
    heads = _tables.paired({each.name: each for each in (
        make('head-dense', {0: 50.}), make('head-e1', {0: 51.}),
        make('head-e4', {0: 53.}))}).splitlines()
    # Nothing was scored with the mean of the experts: there is no such column.
    assert heads[0] == ('| variant | seeds | over dense | over one expert | '
                        'training loss / dense | operations |')
    assert [row.split('|')[3:5] for row in heads[2:]] == [
        ['  ', '  '], [' +1.00 ', '  '], [' +3.00 ', ' +2.00 ']]
    # The control is the one with one expert, whatever else is in its name.
    assert _tables.paired({each.name: each for each in (
        make('dense-long', {0: 50.}), make('e1-long', {0: 51.}),
        make('e4-straight-long', {0: 53.}))}).splitlines()[-1].startswith(
            '| e4-straight-long | 53.0 | +3.00 | +2.00 |')
    lines = _tables.noise(runs).splitlines()
    assert lines[2] == ('| with stochastic depth | no | 2 | 0.00 | 2.83 '
                        '| 2.83 | +2.00 |')
    assert [line.split('|')[2].strip() for line in lines[2:]] == [
        'no', 'yes'] * 2
    del runs['e4'].records[1]  # a single pair has no deviation
    assert len(_tables.noise(runs).splitlines()) == 4
