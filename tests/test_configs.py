"""Every leaf config loads, builds and says in its name what it is."""
import copy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS, DefaultScope

ROOT = Path(__file__).parent.parent / 'configs'
LEAVES = sorted(path for folder in ('swin_moe', 'demo')
                for path in (ROOT / folder).glob('*.py'))


def leaf(path):
    return pytest.param(path, id=path.stem)


@pytest.mark.parametrize('path', map(leaf, LEAVES))
def test_builds_and_computes_a_loss(path, monkeypatch):
    import mmseg.models  # noqa: F401
    cfg = Config.fromfile(path)
    backbone = cfg.model.backbone
    with DefaultScope.overwrite_default_scope('mmseg'):
        with torch.device('meta'):
            whole = MODELS.build(copy.deepcopy(backbone))
        widths = whole.num_features
        assert cfg.model.decode_head.in_channels == widths
        if cfg.model.get('auxiliary_head'):
            assert cfg.model.auxiliary_head.in_channels == widths[2]
        shrink(cfg, whole)
        model = MODELS.build(cfg.model)
        model.train()
        # frozen statistics: one pooled value per channel is no batch
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()
        inputs = torch.randn(1, 3, 64, 64)
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample
        sample = SegDataSample(
            metainfo=dict(img_shape=(64, 64)),
            gt_sem_seg=PixelData(data=torch.zeros(1, 64, 64).long()))
        losses = model(inputs, [sample], mode='loss')
        total, _ = model.parse_losses(losses)
        total.backward()
        for hook in cfg.get('custom_hooks', []):
            HOOKS.build(hook)
        assert total.isfinite()


def shrink(cfg, whole):
    """The same depths and MoE layers, at eight channels."""
    backbone = cfg.model.backbone
    backbone.update(arch=None, embed_dims=8, depths=whole.depths,
                    num_heads=(1, 1, 2, 2), init_cfg=None)
    cfg.model.decode_head.update(in_channels=[8, 16, 32, 64], channels=8)
    if cfg.model.get('auxiliary_head'):
        cfg.model.auxiliary_head.update(in_channels=32, channels=8)


@pytest.mark.parametrize('path', map(leaf, LEAVES))
def test_name_tells_the_content(path):
    cfg = Config.fromfile(path)
    moe = cfg.model.backbone.get('moe')
    assert ('-moe-' in path.stem) == bool(moe)
    if moe:
        top_k = moe.get('router', {}).get('top_k', 1)
        assert f'-moe-e{moe.num_experts}k{top_k}' in path.stem
        hooks = [hook.type for hook in cfg.custom_hooks]
        assert 'rmoe.ResidualMoEHook' in hooks
        assert 'rmoe.MoELossHook' in hooks
    else:
        assert 'custom_hooks' not in cfg
    size = cfg.model.data_preprocessor.size
    assert path.stem.endswith(f'{size[0]}x{size[1]}')
    for window in (7, 12):
        if f'window{window}' in path.stem:
            assert cfg.model.backbone.window_size == window
    for arch in ('tiny', 'large'):
        if f'swin-{arch}-' in path.stem:
            width = dict(tiny=96, large=192)[arch]
            assert cfg.model.decode_head.in_channels[0] == width
    batch = int(path.stem.split('xb')[1].split('-')[0]) if 'xb' in (
        path.stem) else cfg.train_dataloader.batch_size
    assert cfg.train_dataloader.batch_size == batch
    if '160k' in path.stem:
        assert cfg.train_cfg.max_iters == 160000


@pytest.mark.parametrize('path', map(leaf, LEAVES))
def test_leaves_are_short(path):
    assert len(path.read_text().splitlines()) <= 40


@pytest.mark.parametrize('path', map(leaf, LEAVES))
def test_moe_leaf_has_a_dense_twin(path):
    if '-moe-' not in path.stem:
        return
    twin = path.with_name(path.name.replace('-moe-e8k1', ''))
    moe, dense = Config.fromfile(path), Config.fromfile(twin)
    assert moe.optim_wrapper == dense.optim_wrapper
    assert moe.param_scheduler == dense.param_scheduler
    moe.model.backbone.pop('moe')
    assert moe.model == dense.model


def test_every_dataset_config_names_a_registered_type():
    from mmseg.registry import DATASETS
    for path in (ROOT / '_base_/datasets').glob('*.py'):
        cfg = Config.fromfile(path)
        assert DATASETS.get(cfg.train_dataloader.dataset.type)
