"""Data mistakes are found before training, by name."""
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.datasets import BaseSegDataset
from PIL import Image

from rmoe.engine.data_check import _check_labels, check_data_roots


def config(root, **dataset):
    return Config(dict(train_dataloader=dict(dataset=dict(
        type='RepeatDataset', times=2, dataset=dict(
            data_root=str(root),
            data_prefix=dict(img_path='img', seg_map_path='ann'),
            **dataset)))))


def test_missing_folders_are_named_with_the_option(tmp_path):
    root = tmp_path / 'camvid'
    with pytest.raises(FileNotFoundError, match=r'camvid does not exist.*'
                       r'train_dataloader\.dataset\.dataset\.data_root='):
        check_data_roots(config(root), ('train', ))
    (root / 'img').mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match='ann does not exist'):
        check_data_roots(config(root), ('train', ))
    (root / 'ann').mkdir()
    check_data_roots(config(root), ('train', 'val'))
    with pytest.raises(FileNotFoundError, match=r'train\.json'):
        check_data_roots(config(root, ann_file='train.json'), ('train', ))


@pytest.fixture
def dataset(tmp_path):
    for folder in ('img', 'ann'):
        (tmp_path / folder).mkdir()
    label = np.zeros((4, 4), np.uint8)
    label[0] = [1, 2, 255, 7]
    Image.fromarray(label).save(tmp_path / 'ann/a.png')
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / 'img/a.jpg')
    with DefaultScope.overwrite_default_scope('mmseg'):
        yield BaseSegDataset(
            data_root=str(tmp_path), metainfo=dict(classes=('a', 'b', 'c')),
            data_prefix=dict(img_path='img', seg_map_path='ann'),
            pipeline=[dict(type='LoadImageFromFile'),
                      dict(type='LoadAnnotations')])


def test_labels_outside_the_classes_are_named(dataset):
    with pytest.raises(ValueError, match=r'a\.png has the labels \[7\].*'
                       'num_classes=3.*reduce_zero_label'):
        _check_labels(dataset, 0, num_classes=3, ignore_index=255)
    with pytest.raises(ValueError, match=r'\[7, 255\]'):
        _check_labels(dataset, 0, num_classes=3, ignore_index=100)
    _check_labels(dataset, 0, num_classes=8, ignore_index=255)
