"""Configs of classifiers, beyond what tests/test_configs.py asks of all."""
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from small_classifier import draw_images

from rmoe.classification.transforms import build_transforms

ROOT = Path(__file__).parents[2] / 'configs'
LEAVES = [path for data in ('in1k-224x224', 'tiny-imagenet-100-64x64')
          for path in sorted(ROOT.glob(f'*/*_{data}.py'))]
DENSE = [path for path in LEAVES if '-moe-' not in path.stem]


@pytest.mark.parametrize('path', DENSE, ids=lambda path: path.stem)
def test_transforms_give_the_size_in_the_name(path):
    cfg = Config.fromfile(path)
    side = int(path.stem.split('x')[-1])
    # Tiny-ImageNet's images all have 64 pixels and are not resized.
    for split, given in (('train', (70, 90)),
                         ('val', (64, 64) if side == 64 else (300, 400))):
        transform = build_transforms(
            cfg[f'{split}_dataloader'].dataset.get('transforms', ()))
        image = transform(draw_images(1)[0].resize(given))
        assert image.shape == (3, side, side) and image.dtype == torch.uint8


@pytest.mark.parametrize('path', [
    path for path in LEAVES if 'intermediate' in path.stem],
    ids=lambda path: path.stem)
def test_intermediate_stage_goes_on_from_the_dense_twin(path):
    """From its last epoch, more gently, all of its schedule's way."""
    cfg = Config.fromfile(path)
    twin, = path.parent.glob(re.sub(
        r'-moe-e8k1(.*)-\d+e-intermediate', r'\1-*', path.name))
    dense = Config.fromfile(twin)
    assert cfg.load_from == (
        f'work_dirs/{twin.stem}/epoch_{dense.train_cfg.max_epochs}.pth')
    assert cfg.optim_wrapper.optimizer.lr < dense.optim_wrapper.optimizer.lr
    assert cfg.param_scheduler[-1].end == cfg.train_cfg.max_epochs
    assert cfg.train_dataloader == dense.train_dataloader
    residual, joint = cfg.custom_hooks[0].stages
    assert 'core' not in residual.roles and joint.roles == 'all'
