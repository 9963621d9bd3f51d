"""tools/train.py: core, residual and joint stage on a few drawn scenes."""
import pytest
import torch
import train
from commands import MOE, command, options
from mmengine.config import Config

from rmoe.datasets.scenes import CLASSES, PALETTE, write_scenes
from rmoe.engine.roles import role_of

pytestmark = pytest.mark.gpu
STAGES = [dict(name='core', roles=('core', 'head'), end=2),
          dict(name='residual', roles=('residual', 'router', 'head'), end=4),
          dict(name='joint', roles='all')]
WRAPPERS = {
    'float32': dict(type='OptimWrapper'),
    'bf16': dict(type='rmoe.BFloat16OptimWrapper'),
    # On a CPU tools/train.py makes it bfloat16.
    'fp16': dict(type='AmpOptimWrapper', dtype='float16',
                 loss_scale='dynamic'),
}


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    root = tmp_path_factory.mktemp('work')
    write_scenes(root / 'scenes', num_train=8, num_val=3, size=64)
    return root


@pytest.mark.parametrize('kind', WRAPPERS)
def test_each_stage_trains_its_roles(device, work, kind):
    config = config_file(work, kind)
    command(train, config, *options(work, kind, 'train_cfg.max_iters=6'))
    states = [torch.load(work / kind / f'iter_{i}.pth', map_location='cpu',
                         weights_only=True)['state_dict'] for i in (2, 4, 6)]
    assert changed(*states[:2]) == {'residual', 'router', 'head'}
    assert changed(*states[1:]) == {'core', 'residual', 'router', 'head'}
    for key, value in states[-1].items():
        assert value.isfinite().all(), key
    log, = (work / kind).glob('*/*.log')
    said = log.read_text()
    assert 'loss_moe_' in said
    # What CUDA's allocator has; mmengine tells it nowhere else.
    assert (' memory: ' in said) == (device == 'cuda')


def test_resume_in_a_stage(device, work):
    """From the third iteration, inside the residual stage."""
    config = config_file(work, 'float32')
    iterations = ['train_cfg.max_iters=6',
                  'default_hooks.checkpoint.interval=1',
                  'default_hooks.checkpoint.max_keep_ckpts=-1']
    command(train, config, *options(work, 'whole', *iterations))
    start = work / 'whole/iter_3.pth'
    command(train, config, '--resume', start,
            *options(work, 'resumed', *iterations))
    states = [torch.load(path, map_location='cpu',
                         weights_only=True)['state_dict']
              for path in (start, *(work / f'resumed/iter_{i}.pth'
                                    for i in (4, 5)))]
    assert changed(*states[:2]) == {'residual', 'router', 'head'}
    assert 'core' in changed(*states[1:])


def config_file(work, kind):
    cfg = Config.fromfile(MOE)
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.metainfo = dict(
            classes=CLASSES, palette=PALETTE)
    cfg.optim_wrapper.update(WRAPPERS[kind])
    # Every step moves every weight: no warming up from next to nothing.
    cfg.param_scheduler = []
    for hook in cfg.custom_hooks:
        if hook.type == 'rmoe.ResidualMoEHook':
            hook.stages = STAGES
    path = work / f'{kind}.py'
    cfg.dump(path)
    return path


def changed(before, after) -> set[str]:
    """Roles of the parameters that differ; statistics of norms have none."""
    return {role_of(key) for key, value in before.items()
            if 'running_' not in key and 'num_batches' not in key
            and not torch.equal(value, after[key])}
