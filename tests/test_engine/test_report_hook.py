"""A report is written at the end of training, and an error in it does not make
the training fail."""
import json

import pytest
from mmengine.runner import Runner
from toy import STAGES, toy_config, toy_runner

from rmoe.engine import report_hook
from rmoe.engine.report_hook import ReportHook
from rmoe.report.work_dir import read_runs

pytest.importorskip('plotly')
HOOKS = [dict(type='rmoe.ResidualMoEHook', stages=STAGES),
         dict(type='rmoe.MoELossHook'), dict(type='rmoe.CostHook'),
         dict(type='rmoe.RoutingStatsHook', interval=1)]


def log_of(folder) -> str:
    file, = folder.glob('*/*.log')
    return file.read_text()


def test_a_training_leaves_a_report(tmp_path):
    config = toy_config(tmp_path, hooks=[*HOOKS, dict(type='rmoe.ReportHook')])
    config.default_hooks.logger = dict(type='LoggerHook', interval=1)
    Runner.from_cfg(config).train()
    page = (tmp_path / 'report.html').read_text()
    assert 'stage 1 block 1' in page and 'Load of experts' in page
    # The report shows the run that was just trained.
    run, = read_runs([tmp_path])
    assert [(stage.name, stage.begin, stage.end) for stage in run.log.stages
            ] == [('core', 0, 2), ('residual', 2, 5), ('joint', 5, 8)]
    assert list(run.scalars.train['loss']) == list(range(1, 9))
    assert list(run.scalars.layers['backbone.stages.1.blocks.0.ffn'][
        'load_3']) == list(range(3, 9))
    assert run.cost == json.loads((tmp_path / 'cost.json').read_text())
    assert run.checkpoint == tmp_path / 'iter_8.pth'
    assert run.log.environment['rmoe']
    # The toy has no validation set. The report says so, and is written.
    assert 'val_dataloader' in page
    assert f'a report of this run: {tmp_path}' in log_of(tmp_path)


def test_off_with_one_line(tmp_path):
    hook = dict(type='rmoe.ReportHook', enabled=False)
    toy_runner(tmp_path, max_iters=1, hooks=[hook]).train()
    assert not (tmp_path / 'report.html').exists()
    assert 'of this run' not in log_of(tmp_path)


def test_no_reason_for_training_to_fail(tmp_path, monkeypatch):
    def write(*args, **options):
        raise RuntimeError('the disk is full')

    monkeypatch.setattr(report_hook, 'write_report', write)
    toy_runner(tmp_path, max_iters=1,
               hooks=[dict(type='rmoe.ReportHook')]).train()
    said = [line for line in log_of(tmp_path).splitlines()
            if 'no report.html was written' in line]
    assert len(said) == 1 and 'RuntimeError: the disk is full' in said[0]


def test_missing_packages_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(report_hook, 'missing_packages',
                        lambda: 'a report needs x: python -m pip install x')
    toy_runner(tmp_path, max_iters=1,
               hooks=[dict(type='rmoe.ReportHook')]).train()
    said = [line for line in log_of(tmp_path).splitlines()
            if 'pip install x' in line]
    assert len(said) == 1 and 'WARNING' in said[0]
    assert not (tmp_path / 'report.html').exists()


def test_only_the_first_rank_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(report_hook, 'is_main_process', lambda: False)
    toy_runner(tmp_path, max_iters=1,
               hooks=[dict(type='rmoe.ReportHook')]).train()
    assert not (tmp_path / 'report.html').exists()


def test_a_sharded_model_is_not_built_again(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(report_hook, 'is_laid_out', lambda model: True)
    monkeypatch.setattr(report_hook, 'write_report', lambda folders, **options:
                        asked.append((folders, options)))
    toy_runner(tmp_path, max_iters=1,
               hooks=[dict(type='rmoe.ReportHook')]).train()
    assert asked == [([tmp_path], dict(images=0, count_images=32))]


@pytest.mark.parametrize('option', ['images', 'count_images'])
def test_negative_numbers(option):
    with pytest.raises(ValueError, match=f'{option}=-1 must not be negative'):
        ReportHook(**{option: -1})
