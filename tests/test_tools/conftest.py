"""A small data set and a dense checkpoint for all tests of the tools."""
import pytest
import train
import upcycle
from commands import DENSE, MOE, command, options
from mmengine.config import Config

from rmoe.datasets.scenes import CLASSES, PALETTE, write_scenes


@pytest.fixture(scope='session')
def work(tmp_path_factory):
    root = tmp_path_factory.mktemp('work')
    write_scenes(root / 'scenes', num_train=8, num_val=3, size=64)
    return root


@pytest.fixture(scope='session')
def configs(work):
    """The demo's configs with the scenes' class names filled in."""
    made = {}
    for name, path in (('dense', DENSE), ('moe', MOE)):
        cfg = Config.fromfile(path)
        for split in ('train', 'val', 'test'):
            cfg[f'{split}_dataloader'].dataset.metainfo = dict(
                classes=CLASSES, palette=PALETTE)
        made[name] = work / f'{name}.py'
        cfg.dump(made[name])
    return made


@pytest.fixture(scope='session')
def dense_checkpoint(work, configs):
    command(train, configs['dense'], *options(work, 'dense'))
    return work / 'dense/iter_4.pth'


@pytest.fixture(scope='session')
def upcycled(work, configs, dense_checkpoint):
    command(upcycle, dense_checkpoint, '--config', configs['moe'],
            '--out', work / 'moe.pth', '--size', 64)
    return work / 'moe.pth'
