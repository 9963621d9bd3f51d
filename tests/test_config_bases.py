"""The bases of the configs: against the host libraries, and on real images."""
from pathlib import Path

import huggingface_hub
import mmdet.models
import mmseg.models
import numpy as np
import pytest
import torch
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner
from mmengine.runner.checkpoint import CheckpointLoader
from PIL import Image
from pretrained import ROOT as DATA
from zoo import LEAVES, ROOT, SIDE, load, parts, scope, shrink

from rmoe import safe_loading


def installed(package, name):
    """A config that a host library ships."""
    return Config.fromfile(
        Path(package.__path__[0]) / '.mim/configs' / name)


def without(node, *keys):
    """A config without some keys, tuples as lists."""
    if isinstance(node, dict):
        return {key: without(value, *keys) for key, value in node.items()
                if key not in keys}
    return [without(item, *keys) for item in node] if isinstance(
        node, (list, tuple)) else node


@pytest.mark.parametrize('ours, theirs', [
    ('mask-rcnn_swin_fpn', 'swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco'),
    ('mask-rcnn', 'swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco'),
    ('mask-rcnn_cvt_fpn', 'swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco'),
    ('mask-rcnn_vit_sfp', 'swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco'),
    ('cascade-mask-rcnn_swin_fpn', '_base_/models/cascade-mask-rcnn_r50_fpn'),
    ('retinanet_swin_fpn', 'swin/retinanet_swin-t-p4-w7_fpn_1x_coco'),
    ('dino-4scale_swin', 'dino/dino-4scale_r50_8xb2-12e_coco'),
])
def test_detectors_are_mmdets(ours, theirs):
    ours = Config.fromfile(ROOT / f'configs/_base_/models/{ours}.py').model
    theirs = installed(mmdet, f'{theirs}.py').model
    own = ('backbone', 'neck', 'use_torchvision')
    assert without(ours, *own) == without(theirs, *own)


@pytest.mark.parametrize('name', ['ade20k', 'ade20k_640x640'])
def test_ade20k_is_read_as_mmseg_reads_it(name):
    ours = Config.fromfile(ROOT / f'configs/_base_/datasets/{name}.py')
    theirs = installed(mmseg, f'_base_/datasets/{name}.py')
    for key in ('train_dataloader', 'val_dataloader', 'val_evaluator'):
        assert without(ours[key], 'batch_size') == without(
            theirs[key], 'batch_size')


def test_schedules_are_mmdets():
    for ours, theirs in (('1x', '1x'), ('3x', 'ms-crop-3x')):
        ours = Config.fromfile(
            ROOT / f'configs/_base_/schedules/coco_{ours}.py')
        theirs = installed(
            mmdet, f'swin/mask-rcnn_swin-t-p4-w7_fpn_{theirs}_coco.py')
        assert ours.train_cfg == theirs.train_cfg
        assert ours.param_scheduler == theirs.param_scheduler
        assert without(ours.optim_wrapper.optimizer) == without(
            theirs.optim_wrapper.optimizer)
        assert ours.optim_wrapper.paramwise_cfg.custom_keys == (
            theirs.optim_wrapper.paramwise_cfg.custom_keys)


@pytest.mark.parametrize('ours, theirs', [
    ('coco_instance', '_base_/datasets/coco_instance'),
    ('coco_detection', '_base_/datasets/coco_detection'),
    ('coco_instance_ms-crop',
     'swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco'),
    ('coco_detection_ms-crop', 'dino/dino-4scale_r50_8xb2-12e_coco'),
])
def test_coco_is_read_as_mmdet_reads_it(ours, theirs):
    ours = Config.fromfile(ROOT / f'configs/_base_/datasets/{ours}.py')
    theirs = installed(mmdet, f'{theirs}.py')
    own = ['backend_args', 'format_only']
    if 'dino' in str(theirs.filename):
        # Its leaf says so, for DINO alone.
        own.append('filter_cfg')
    for key in ('train_dataloader', 'val_dataloader', 'test_evaluator'):
        assert without(ours[key], *own) == without(theirs[key], *own)


def test_upernet_is_mmsegs():
    ours = Config.fromfile(ROOT / 'configs/_base_/models/upernet_swin.py')
    theirs = installed(
        mmseg, 'swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_'
        'ade20k-512x512.py')
    own = ('backbone', 'data_preprocessor', 'pretrained')
    assert without(ours.model, *own) == without(theirs.model, *own)


def leaf(name):
    return load(next(path for path in LEAVES if path.stem == name))


SEG = ('swin-tiny-patch4-window7-moe-e8k1-in1k-pre_upernet_8xb2-160k_'
       'ade20k-512x512')
MASKS = 'mask-rcnn_swin-t-moe-e8k1-p4-w7_fpn_8xb2-1x_coco'
BOXES = 'retinanet_swin-t-moe-e8k1-p4-w7_fpn_8xb2-1x_coco'


@pytest.mark.parametrize('path', [
    pytest.param(path, id=path.stem)
    for path in sorted((ROOT / 'configs/_base_/datasets').glob('*.py'))
    if 'tta_model' in Config.fromfile(path)])
def test_test_time_augmentation(path, tmp_path):
    data = Config.fromfile(path)
    cfg = shrink(leaf(SEG if data.tta_model.type == 'SegTTAModel' else BOXES))
    picture = tmp_path / 'picture.png'
    Image.fromarray(np.full((48, 64, 3), 99, np.uint8)).save(picture)
    # The pictures stay as small as the model.
    for part in parts(data.tta_pipeline):
        if part.get('type') == 'Resize':
            part.scale = tuple(max(side // 16, 32) for side in part.scale)
    item = dict(img_path=str(picture), img_id=0, instances=[],
                seg_map_path=str(tmp_path / 'labels.png'), seg_fields=[],
                reduce_zero_label=True)
    Image.fromarray(np.zeros((48, 64), np.uint8)).save(item['seg_map_path'])
    with scope(cfg):
        views = Compose(data.tta_pipeline)(item)
        model = MODELS.build(dict(data.tta_model, module=cfg.model)).eval()
        flips = {sample.flip for sample in views['data_samples']}
        assert flips == {True, False} and len(views['inputs']) >= 2
        result = model.test_step(
            {key: [[view] for view in value]
             for key, value in views.items()})[0]
    if 'pred_sem_seg' in result:
        assert result.pred_sem_seg.shape == (48, 64)
    else:
        assert result.pred_instances.bboxes.shape[1] == 4


def short_run(cfg, work_dir, root, batches):
    """``batches`` training batches and as many pictures to evaluate."""
    cfg.work_dir = str(work_dir)
    cfg.experiment_name = work_dir.name
    cfg.default_hooks.report.enabled = False
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = f'{root}/'
        loader.dataset.indices = 2 * batches if split == 'train' else batches
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert any(work_dir.glob('best_*'))
    return runner


def test_ade20k_leaf_on_real_images(tmp_path):
    root = DATA / 'ade20k_sample'
    if not root.exists():
        pytest.skip('no data')
    cfg = shrink(leaf(SEG))
    for part in parts([cfg.train_dataloader, cfg.val_dataloader]):
        if part.get('type') == 'RandomCrop':
            part.crop_size = (SIDE, SIDE)
        elif part.get('scale'):
            part.scale = (512, 128)
    cfg.train_cfg.update(max_iters=4, val_interval=4)
    cfg.default_hooks.logger.interval = 1
    runner = short_run(cfg, tmp_path, root, 2)
    scalars = runner.message_hub.log_scalars
    assert len(scalars['train/loss'].data[0]) == 4
    assert np.isfinite(scalars['train/loss'].data[0]).all()
    assert 'train/loss_moe_load' in scalars


def test_coco_leaf_on_real_images(tmp_path):
    root = DATA / 'coco_mini'
    if not root.exists():
        pytest.skip('no data')
    cfg = shrink(leaf(MASKS))
    for part in parts([cfg.train_dataloader, cfg.test_dataloader]):
        if part.get('type') == 'Resize':
            part.scale = (160, 120)
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        evaluator.ann_file = f'{root}/annotations/instances_val2017.json'
    # So little training finds nothing above the usual threshold.
    cfg.model.test_cfg.rcnn.score_thr = 0.
    cfg.train_cfg.max_epochs = 1
    cfg.default_hooks.logger.interval = 1
    runner = short_run(cfg, tmp_path, root, 4)
    scalars = runner.message_hub.log_scalars
    assert np.isfinite(scalars['train/loss'].data[0]).all()
    assert {'train/loss_moe_load', 'train/loss_mask'} <= set(scalars)
    metrics = runner.test()
    assert {'coco/bbox_mAP', 'coco/segm_mAP_50'} <= set(metrics)


def test_checkpoint_of_a_cvt_leaf(tmp_path, monkeypatch):
    from transformers import CvtConfig, CvtForImageClassification
    theirs = CvtForImageClassification(CvtConfig())
    file = tmp_path / 'weights.bin'
    torch.save(theirs.state_dict(), file)
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download',
                        lambda repo, name: file)
    monkeypatch.setattr(CheckpointLoader, '_schemes',
                        dict(CheckpointLoader._schemes))
    safe_loading.install()
    cfg = leaf('cvt-13-moe-e8k1-in1k-pre_upernet_8xb2-160k_ade20k-512x512')
    cfg.model.backbone.bn_cfg = None
    backbone = MODELS.build(cfg.model.backbone)
    backbone.init_weights()
    assert torch.equal(
        backbone.stages[2].blocks[1].ffn.layers[1].weight,
        theirs.cvt.encoder.stages[2].layers[1].output.dense.weight)
