"""The pipelines of the paper, which are one command each, and their costs."""
import io
import json
import re
from pathlib import Path

import _steps
import _training
import numpy as np
import pipeline
import pytest
import test as test_tool  # tools/test.py
import torch
import train
from commands import DENSE, command
from mmengine.config import Config
from PIL import Image

from rmoe.datasets.scenes import CLASSES, PALETTE
from rmoe.registry import MODELS
from rmoe.upcycling import read_checkpoint, state_dict_of

FAMILIES = sorted((Path(__file__).parents[2] / 'configs/pipelines').glob(
    '*.py'))
MOE = dict(layers=((), (), (1, 3), (1, )), num_experts=4)
HOOKS = [dict(type='rmoe.MoELossHook')]
STAGES = dict(type='rmoe.ResidualMoEHook', stages=[
    dict(roles=('core', 'head'), end=.25),
    dict(roles=('residual', 'router', 'head'), end=.5), dict(roles='all')])


@pytest.fixture(scope='module')
def family(work):
    """The four pipelines from 16 packed pictures to the scenes."""
    files = []
    random = np.random.default_rng(0)
    for _ in range(16):
        file = io.BytesIO()
        Image.fromarray(random.integers(255, size=(32, 32, 3), dtype=np.uint8)
                        ).save(file, 'JPEG')
        files.append(np.frombuffer(file.getvalue(), np.uint8))
    np.savez(work / 'packed.npz', bytes=np.concatenate(files),
             offsets=np.cumsum([0, *map(len, files)]),
             labels=np.arange(16) % 2, wnids=np.array(['a', 'b']))
    steps = {}
    for name, moe, hooks in (
            ('dense', None, []), ('moe', dict(MOE, core=False), HOOKS),
            ('rmoe-d', MOE, [*HOOKS, STAGES]), ('rmoe-i', MOE, HOOKS)):
        for level, cfg in (('upstream', classifier(work)),
                           ('downstream', segmentor(work))):
            cfg.model.backbone.moe = moe
            cfg.custom_hooks = [*hooks, dict(type='rmoe.CostHook')]
            steps[f'{name}-{level}'] = str(work / f'{name}-{level}.py')
            cfg.dump(steps[f'{name}-{level}'])
    path = work / 'family.py'
    base = FAMILIES[0].parents[1] / '_base_/pipelines.py'
    path.write_text(f'_base_ = {str(base)!r}\nsteps = {steps}\n')
    return path


def segmentor(work):
    cfg = Config.fromfile(DENSE)
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.update(
            data_root=str(work / 'scenes'),
            metainfo=dict(classes=CLASSES, palette=PALETTE))
    cfg.model.data_preprocessor.size = (64, 64)
    cfg.train_cfg.update(max_iters=4, val_interval=4)
    cfg.train_dataloader.batch_size = 2
    cfg.default_hooks.logger.interval = 1
    cfg.default_hooks.checkpoint.interval = 2
    return cfg


def classifier(work):
    """A config for a classifier of packed pictures, with the same backbone as
    the demo's config."""
    cfg = segmentor(work)
    loader = dict(
        batch_size=4, num_workers=0,
        sampler=dict(type='InfiniteSampler', shuffle=True),
        collate_fn=dict(type='default_collate'),
        dataset=dict(type='rmoe.PackedImages', ann_file='packed.npz',
                     data_root=str(work), transforms=[]))
    cfg.model = dict(
        type='rmoe.ImageClassifier', num_classes=2, in_channels=256,
        backbone=dict(cfg.model.backbone, out_indices=(3, )),
        data_preprocessor=dict(type='ImgDataPreprocessor'))
    cfg.train_dataloader = cfg.val_dataloader = cfg.test_dataloader = loader
    cfg.val_dataloader = dict(loader, sampler=dict(type='DefaultSampler',
                                                   shuffle=False))
    cfg.test_dataloader = cfg.val_dataloader
    cfg.val_evaluator = cfg.test_evaluator = dict(
        type='rmoe.Accuracy', topk=(1, ))
    cfg.default_hooks.pop('visualization')
    cfg.default_hooks.pop('label_check')
    cfg.default_hooks.report.enabled = False
    return cfg


@pytest.fixture
def runs(monkeypatch):
    """Train in this process, and record the names of the trained steps."""
    names = []

    def here(config, folder, *flags, gpus, label):
        names.append(folder.name)
        command(train, config, '--work-dir', folder, *flags)

    monkeypatch.setattr(_steps, 'train', here)
    return names


def test_all_pipelines_from_nothing(work, family, runs, capsys):
    out = work / 'pipelines'
    command(pipeline, family, 'all', '--work-dir', out)
    # A step that several pipelines begin with is trained once.
    assert runs == [
        'dense-upstream', 'dense-upstream+dense-downstream',
        'moe-upstream', 'moe-upstream+moe-downstream',
        'dense-upstream+rmoe-d-downstream', 'dense-upstream+rmoe-i-upstream',
        'dense-upstream+rmoe-i-upstream+rmoe-i-downstream']
    printed = capsys.readouterr().out
    costs = json.loads((out / 'costs.json').read_text())
    for name, pipe in costs.items():
        assert f'\n{name}  ' in printed
        assert 'mIoU' in pipe['score']
        for what in ('seconds', 'samples', 'flops'):
            assert pipe['total'][what] == sum(
                step[what] for step in pipe['steps'].values())
        assert pipe['total']['samples'] == 16 + 8 + 16 * (name == 'rmoe-i')
    # Routers cost a little, a frozen core saves its backward pass, and the
    # intermediate stage is one more step.
    flops = {name: pipe['total']['flops'] for name, pipe in costs.items()}
    assert flops['non-moe'] < flops['moe'] < flops['rmoe-i']
    assert flops['rmoe-d'] < flops['rmoe-i']
    # Each step starts from the one before.
    upstream = weights(out / 'dense-upstream')
    core = 'backbone.stages.2.blocks.1.ffn.layers.1.weight'
    intermediate = Config.fromfile(
        out / 'dense-upstream+rmoe-i-upstream/step.py')
    assert intermediate.load_from == str(
        (out / 'dense-upstream/iter_4.pth').resolve())
    assert core in upstream
    experts = 'backbone.stages.2.blocks.1.ffn.experts.residual_fc1_weight'
    assert weights(out / 'moe-upstream+moe-downstream')[experts].any()
    runs.clear()
    command(pipeline, family, 'rmoe-i', 'non-moe', '--work-dir', out)
    assert not runs
    assert json.loads((out / 'costs.json').read_text()) == costs


def weights(folder):
    path = (folder / 'last_checkpoint').read_text()
    return state_dict_of(read_checkpoint(path))


@pytest.mark.parametrize('bare', [False, True])
def test_from_a_dense_checkpoint_and_on_after_a_stop(
        work, family, runs, monkeypatch, capsys, bare):
    out, dense = work / f'given-{bare}', work / 'dense.pth'
    cfg = Config.fromfile(work / 'dense-upstream.py')
    torch.manual_seed(1)
    model = MODELS.build(cfg.model)
    torch.save(model.backbone.state_dict() if bare else
               dict(state_dict=model.state_dict()), dense)
    monkeypatch.setattr(_steps, 'train', _stopped(_steps.train))
    with pytest.raises(KeyboardInterrupt):
        command(pipeline, family, 'rmoe-d', '--dense', dense, '--work-dir',
                out)
    command(pipeline, family, 'rmoe-d', '--dense', dense, '--work-dir', out)
    log = max((out / 'dense+rmoe-d-downstream').rglob('*.log')).read_text()
    assert 'resumed epoch: 0, iter: 2' in log
    assert 'not counted' in capsys.readouterr().out
    steps = json.loads((out / 'costs.json').read_text())['rmoe-d']['steps']
    assert steps['dense-upstream'] is None
    assert steps['rmoe-d-downstream']['samples'] == 8
    first = min((out / 'dense+rmoe-d-downstream').rglob('*.log')).read_text()
    assert re.search(r'upcycled +12 ', first)


def test_a_run_that_lost_its_last_validation_is_evaluated(
        work, family, runs, monkeypatch):
    def lose(config, folder, *flags, gpus, label):
        run(config, folder, *flags, gpus=gpus, label=label)
        for log in folder.glob('*/vis_data/scalars.json'):
            log.write_text(re.sub('.*mIoU.*', '', log.read_text()))

    run = _steps.train
    monkeypatch.setattr(_steps, 'train', lose)
    monkeypatch.setattr(_steps, 'evaluate', evaluate_here)
    command(pipeline, family, 'non-moe', '--work-dir', work / 'lost')
    costs = json.loads((work / 'lost/costs.json').read_text())
    assert costs['non-moe']['score']['mIoU'] > 0


def evaluate_here(config, checkpoint, folder, gpus):
    command(test_tool, config, checkpoint, '--work-dir', folder)


def _stopped(run):
    """The first run is lost after two of its four iterations."""
    stops = [True]

    def stop(config, folder, *flags, gpus, label):
        run(config, folder, *flags, gpus=gpus, label=label)
        if stops:
            stops.clear()
            (folder / 'iter_4.pth').unlink()
            (folder / 'last_checkpoint').write_text(
                str(folder / 'iter_2.pth'))
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize('args, message', [
    (['rmoe-x'], r"'rmoe-x' is no pipeline .* non-moe, moe, rmoe-d, rmoe-i"),
    (['moe', '--dense', 'x.pth'], 'starts from a dense checkpoint'),
    (['rmoe-d', '--dense', 'x.pth'], 'x.pth does not exist'),
    (['rmoe-d', '--cfg-options', 'model.x=1'], r'write STEP\.key=value'),
])
def test_what_a_user_gets_wrong_ends_in_one_line(work, family, runs, args,
                                                 message):
    with pytest.raises(SystemExit, match=message):
        command(pipeline, family, *args, '--work-dir', work / 'wrong')
    assert not runs


def test_another_config_of_a_finished_step_is_refused(work, family, runs):
    out = work / 'other'
    (out / 'dense-upstream').mkdir(parents=True)
    (out / 'dense-upstream/step.json').write_text('{"config": "other"}')
    with pytest.raises(SystemExit, match='holds a run with other settings'):
        command(pipeline, family, 'non-moe', '--work-dir', out)


def test_a_config_that_is_no_family(work, configs):
    with pytest.raises(SystemExit, match='has no steps and pipelines'):
        command(pipeline, configs['dense'], 'non-moe')


def test_training_fails_with_its_last_words(tmp_path):
    config = tmp_path / 'broken.py'
    config.write_text(
        'optim_wrapper = dict()\n'
        'train_dataloader = dict(dataset=dict(data_root="nowhere"))\n')
    with pytest.raises(ValueError, match=r'train.py failed .error: nowhere '
                       r'does not exist.*train.log'):
        _training.train(config, tmp_path)


@pytest.mark.parametrize('path', FAMILIES, ids=lambda path: path.stem)
def test_steps_of_a_family_fit_each_other(path):
    family = Config.fromfile(path)
    for chain in family.pipelines.values():
        backbones = []
        for before, step in zip([None, *chain], chain):
            cfg = Config.fromfile(path.parent / family.steps[step])
            # If a step is run alone, it starts from the end of the step
            # before.
            if before and cfg.load_from:
                start = Path(cfg.load_from)
                last = Path(family.steps[before])
                assert start.parent.name == last.stem
                epochs = Config.fromfile(path.parent / last).train_cfg
                assert start.stem == f'epoch_{epochs.max_epochs}'
            moe = cfg.model.backbone.get('moe')
            assert bool(moe) == ('dense' not in step)
            if moe:
                assert moe.get('core', True) == step.startswith('rmoe')
            backbones.append({
                key: value for key, value in cfg.model.backbone.items()
                if key not in ('moe', 'init_cfg', 'out_indices', 'bn_cfg')
                and not key.startswith('drop_path')})
        assert all(backbone == backbones[0] for backbone in backbones)
