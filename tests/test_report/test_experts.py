"""What a checkpoint does with validation images, against a second count."""
import re

import numpy as np
import pytest
import torch
from coco import make_coco
from commands import MOE
from mmengine.config import Config
from mmengine.registry import DefaultScope
from PIL import Image
from toy_detection import detection_config

from rmoe.datasets.scenes import CLASSES, PALETTE, write_scenes
from rmoe.registry import MODELS
from rmoe.report.experts import observe

LAYERS = ['stage 2 block 1', 'stage 2 block 3', 'stage 3 block 1']


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    """A config on drawn scenes, and a checkpoint at random."""
    root = tmp_path_factory.mktemp('scenes')
    write_scenes(root, num_train=1, num_val=5, size=64)
    cfg = Config.fromfile(MOE)
    cfg.val_dataloader.dataset.update(
        data_root=str(root), metainfo=dict(classes=CLASSES, palette=PALETTE))
    return cfg, save(cfg, root, 'mmseg')


def save(cfg, root, scope):
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(cfg.model)
    path = root / 'iter_1.pth'
    torch.save(dict(state_dict=model.state_dict()), path)
    return path


@pytest.fixture(scope='module')
def found(scenes):
    return observe(*scenes, shown=2, counted=4)


def test_layers_images_and_classes(found):
    assert not found.notes
    assert found.num_experts == dict.fromkeys(LAYERS, 8)
    assert found.classes == tuple(CLASSES)
    # the first and the third of 0, 1, 2 and 3
    names = [overlay.name for overlay in found.overlays]
    assert len(names) == 2 and names == sorted(names)
    assert found.images == 4


def test_maps_and_counts_are_of_whole_images(found):
    for overlay in found.overlays:
        assert overlay.image.shape == (64, 64, 3)
        assert [each.experts.shape for each in overlay.maps] == [
            (4, 4), (4, 4), (2, 2)]
        assert [each.stride for each in overlay.maps] == [16, 16, 32]
        for each in overlay.maps:
            assert each.experts.min() >= 0 and each.experts.max() < 8
    # Every patch has a class, and each goes to one expert.
    assert [tokens.sum() for tokens in found.tokens_LE.values()] == [
        4 * 16, 4 * 16, 4 * 4]


def test_counts_agree_with_the_maps_that_are_shown(scenes, found):
    """The shown images alone, patch by patch."""
    alone = observe(*scenes, shown=4, counted=1)
    assert alone.images == 1, 'as many as are counted, here one'
    overlay, = alone.overlays
    cfg, _ = scenes
    root = cfg.val_dataloader.dataset.data_root
    labels = np.asarray(Image.open(
        f'{root}/annotations/validation/{overlay.name[:-4]}.png'))
    counts = np.zeros((len(CLASSES), 8))
    for row in range(4):
        for column in range(4):
            patch = labels[16 * row:16 * row + 16,
                           16 * column:16 * column + 16]
            most = np.bincount(patch[patch != 255], minlength=1).argmax()
            counts[most, overlay.maps[0].experts[row, column]] += 1
    assert (alone.tokens_LE[LAYERS[0]] == counts).all()


def test_the_image_is_rgb(scenes, found):
    cfg, _ = scenes
    root = cfg.val_dataloader.dataset.data_root
    overlay = found.overlays[0]
    file = Image.open(f'{root}/images/validation/{overlay.name}')
    assert (np.asarray(file.convert('RGB')) == overlay.image).mean() > .99


def test_the_backbone_and_its_twin(found):
    model, twin = found.costs.values()
    assert model.total_params > twin.total_params
    # one expert per token, and a router
    assert twin.total_params < model.active_params < 1.01 * twin.total_params
    assert found.size == (64, 64)


def test_a_detector_has_a_background(tmp_path):
    make_coco(tmp_path)
    cfg = detection_config(tmp_path)
    found = observe(cfg, save(cfg, tmp_path, 'mmdet'), 1, 4)
    assert not found.notes
    assert found.classes == ('disk', 'square', 'background')
    overlay, = found.overlays
    # 64 x 48 pixels, padded to 64 x 64, at stride 16
    assert overlay.maps[0].experts.shape == (3, 4)
    assert overlay.image.shape == (48, 64, 3)
    # Two layers of 12 patches in each of four images. By hand: the disk
    # covers most of one of them, the square of two and half of a third,
    # where it comes before the background.
    assert len(found.tokens_LE) == 2
    for tokens_LE in found.tokens_LE.values():
        assert tokens_LE.sum(1).tolist() == [4, 12, 32]


@pytest.mark.parametrize('change, message', [
    (dict(checkpoint=None), 'ValueError: the work dir has no checkpoint'),
    (dict(data='nowhere'), 'FileNotFoundError: .*nowhere'),
    (dict(router='SoftRouter'), 'a soft router mixes all tokens'),
    (dict(checkpoint='folder'), 'ValueError: .* is a folder with the parts'),
    (dict(step='LoadAnnotations'), 'the validation set has no labels'),
    (dict(metainfo=dict()), 'the validation set has no names of classes'),
    (dict(to_float32=True), 'ValueError: .* gives images of float32'),
])
def test_what_is_missing_is_said(scenes, tmp_path, change, message):
    cfg, checkpoint = Config(scenes[0].to_dict()), scenes[1]
    dataset = cfg.val_dataloader.dataset
    if change.get('checkpoint') == 'folder':
        change = dict(checkpoint=tmp_path)
    dataset.pipeline = [step for step in dataset.pipeline
                        if step.type != change.get('step')]
    if 'metainfo' in change:
        dataset.pop('metainfo')
    if 'to_float32' in change:
        dataset.pipeline[0].to_float32 = True
    if 'router' in change:
        cfg.model.backbone.moe.router = dict(type=change['router'])
        checkpoint = save(cfg, tmp_path, 'mmseg')
    dataset.data_root = change.get('data', dataset.data_root)
    found = observe(cfg, change.get('checkpoint', checkpoint), 1, 1)
    assert len(found.notes) == 1
    assert re.match(message, found.notes[0]), found.notes
    assert set(found.num_experts) <= set(LAYERS)
    assert bool(found.overlays) == bool(
        {'router', 'step', 'metainfo'} & change.keys())
