"""--amp, --auto-scale-lr, and a checkpoint whose head does not fit."""
import re

import pytest
import test as test_tool  # tools/test.py
import torch
import train
from coco import make_coco
from commands import command, options
from toy_detection import detection_config


@pytest.fixture
def detector(tmp_path):
    """A detector's config file."""
    make_coco(tmp_path)
    detection_config(tmp_path).dump(tmp_path / 'detector.py')
    return tmp_path / 'detector.py'


def log_of(folder) -> str:
    return max(folder.rglob('*.log'), key=lambda f: f.stat().st_mtime
               ).read_text()


def losses(folder) -> list[float]:
    return [float(value) for value in re.findall(
        r'\(train\).* loss: ([\d.]+)', log_of(folder))]


def test_amp_on_the_cpu_is_bfloat16(tmp_path, detector):
    make = {'float32': [], 'flag': ['--amp'], 'config': [
        '--cfg-options', 'optim_wrapper.type=AmpOptimWrapper',
        'optim_wrapper.loss_scale=512.', 'optim_wrapper.dtype=float16']}
    for name, flags in make.items():
        command(train, detector, '--work-dir', tmp_path / name, *flags)
        notes = log_of(tmp_path / name).count('is in bfloat16')
        assert notes == (name != 'float32')
    expected = losses(tmp_path / 'float32')
    assert len(expected) == 2
    for name in ('flag', 'config'):
        found = losses(tmp_path / name)
        assert found != expected
        assert found == pytest.approx(expected, rel=0.01)


def test_amp_with_another_wrapper_ends_in_one_line(tmp_path, detector):
    with pytest.raises(SystemExit, match=r"--amp works with .*'ApexOptim"):
        command(train, detector, '--amp', '--work-dir', tmp_path / 'x',
                '--cfg-options', 'optim_wrapper.type=ApexOptimWrapper')


def test_auto_scale_lr_scales_every_group_alike(tmp_path, detector):
    decay = ['--cfg-options', 'optim_wrapper.constructor='
             'rmoe.LayerDecayOptimWrapperConstructor',
             'optim_wrapper.paramwise_cfg.layer_decay_rate=0.5']
    rates = {}
    for name, flags in {'plain': decay, 'scaled': [
            '--auto-scale-lr', *decay,
            'auto_scale_lr.base_batch_size=16']}.items():
        command(train, detector, '--work-dir', tmp_path / name, *flags)
        groups = torch.load(tmp_path / name / 'epoch_1.pth')[
            'optimizer']['param_groups']
        rates[name] = [group['lr'] for group in groups]
    # Four blocks, patches before them, head after them; experts' biases have
    # groups of their own.
    assert len(rates['plain']) == 8
    assert sorted(set(rates['plain'])) == pytest.approx(
        [1e-3 * .5**i for i in (5, 4, 3, 2, 1, 0)])
    # batches of 2 where the rate was chosen for 16
    assert rates['scaled'] == pytest.approx(
        [rate / 8 for rate in rates['plain']])
    with pytest.raises(SystemExit, match='base_batch_size'):
        command(train, detector, '--work-dir', tmp_path / 'x',
                '--auto-scale-lr')


def test_another_class_count_is_seen(work, configs, dense_checkpoint):
    nine = ['model.decode_head.num_classes=9']
    tensors = (r'decode_head\.conv_seg\.weight \(9, \d+, 1, 1\) \(in the '
               r'checkpoint: \(7, \d+, 1, 1\)\)')
    classes = r'The checkpoint is for 7 classes \(background, '
    # Fine-tuning with a new head gives one warning, after the load,
    command(train, configs['dense'], *options(
        work, 'nine', f'load_from={dense_checkpoint}', *nine))
    log = log_of(work / 'nine')
    warnings = re.findall(r'WARNING - (some weights keep .*)', log)
    assert len(warnings) == 1
    assert re.search(tensors, warnings[0])
    assert re.search(classes, warnings[0])
    assert '2 of ' in warnings[0]  # weight and bias
    # an evaluation is refused,
    with pytest.raises(SystemExit, match='random weights.*' + tensors):
        command(test_tool, configs['dense'], dense_checkpoint,
                *options(work, 'nine-test', *nine))
    # and so is a resumed run.
    with pytest.raises(SystemExit, match=f'{tensors}.*without --resume'):
        command(train, configs['dense'], '--resume', dense_checkpoint,
                *options(work, 'nine-resume', *nine))


def test_a_backbone_alone_is_not_evaluated(work, configs, dense_checkpoint):
    state = torch.load(dense_checkpoint)['state_dict']
    torch.save(dict(state_dict={
        key: value for key, value in state.items()
        if key.startswith('backbone.')}), work / 'backbone.pth')
    with pytest.raises(SystemExit, match=r'(\d+) of \1 tensors outside the '
                       r'backbone: .*missing.* and \d+ more'):
        command(test_tool, configs['moe'], work / 'backbone.pth',
                *options(work, 'backbone-test'))
    command(train, configs['moe'], *options(
        work, 'backbone', f'load_from={work / "backbone.pth"}',
        'custom_hooks=[]', 'train_cfg.max_iters=1'))
    assert log_of(work / 'backbone').count('some weights keep') == 1


def test_resume_of_a_first_run_starts_from_load_from(work, configs,
                                                     dense_checkpoint):
    command(train, configs['dense'], '--resume', *options(
        work, 'first', f'load_from={dense_checkpoint}'))
    assert f'Load checkpoint from {dense_checkpoint}' in log_of(work / 'first')
