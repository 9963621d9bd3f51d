"""Data mistakes are found before training, by name."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from coco import coco_config, make_coco
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from mmseg.datasets import BaseSegDataset
from PIL import Image

from rmoe.engine import data_check
from rmoe.engine.data_check import check_data
from rmoe.engine.label_check import LabelCheckHook, check_labels


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
        check_data(config(root), ('train', ))
    (root / 'img').mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match='ann does not exist'):
        check_data(config(root), ('train', ))
    (root / 'ann').mkdir()
    check_data(config(root), ('train', 'val'))
    with pytest.raises(FileNotFoundError, match=r'train\.json'):
        check_data(config(root, ann_file='train.json'), ('train', ))


def test_what_lies_elsewhere_is_not_looked_for(tmp_path):
    check_data(config('s3://bucket/camvid'), ('train', ))
    check_data(config(tmp_path / 'camvid', backend_args=dict(
        backend='petrel')), ('train', ))


@pytest.mark.parametrize('name', ['RANK', 'SLURM_PROCID',
                                  'OMPI_COMM_WORLD_RANK'])
def test_one_process_looks_into_the_files(tmp_path, monkeypatch, name):
    make_coco(tmp_path)
    (tmp_path / 'train.json').write_text('')
    monkeypatch.setenv(name, '1')
    assert check_data(coco_config(tmp_path), ('train', )) == []
    monkeypatch.setenv(name, '0')
    with pytest.raises(ValueError, match='is empty'):
        check_data(coco_config(tmp_path), ('train', ))
    # That a folder is missing is for everyone to see.
    monkeypatch.setenv(name, '1')
    with pytest.raises(FileNotFoundError):
        check_data(coco_config(tmp_path / 'nowhere'), ('train', ))


def test_a_file_is_parsed_once(tmp_path, monkeypatch):
    make_coco(tmp_path)
    read, parsed = data_check.read_coco, []
    monkeypatch.setattr(data_check, 'read_coco', lambda *args: (
        parsed.append(args), read(*args))[1])
    cfg = coco_config(tmp_path)
    cfg.val_dataloader = cfg.test_dataloader = cfg.train_dataloader
    check_data(cfg, ('train', 'val', 'test'))
    assert len(parsed) == 1


def test_notes_are_logged(tmp_path, monkeypatch):
    make_coco(tmp_path)
    lines = []
    logger = MMLogger.get_current_instance()
    monkeypatch.setattr(logger, 'log', lambda level, text: lines.append(text))
    notes = check_data(coco_config(tmp_path, metainfo=dict(
        classes=('disk', ))), ('train', ))
    assert len(notes) == 1 and lines[-1:] == notes


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
        check_labels(dataset, 0, num_classes=3, ignore_index=255)
    with pytest.raises(ValueError, match=r'\[7, 255\]'):
        check_labels(dataset, 0, num_classes=3, ignore_index=100)
    assert check_labels(dataset, 0, num_classes=8, ignore_index=255) == {
        0, 1, 2, 7, 255}


@pytest.mark.parametrize('cascade', [False, True])
def test_the_hook_looks_before_training(dataset, cascade):
    class Segmentor(torch.nn.Module):

        def __init__(self, num_classes):
            super().__init__()
            head = torch.nn.Identity()
            head.num_classes, head.ignore_index = num_classes, 255
            self.decode_head = torch.nn.ModuleList(
                [torch.nn.Identity(), head]) if cascade else head

    logged = []
    runner = SimpleNamespace(
        model=Segmentor(8), logger=SimpleNamespace(info=logged.append),
        train_dataloader=SimpleNamespace(dataset=dataset))
    LabelCheckHook().before_train(runner)
    assert logged == ['labels of 1 of 1 training images lie in 0 to 7']
    runner.model = Segmentor(3)
    with pytest.raises(ValueError, match=r'a\.png has the labels \[7\]'):
        LabelCheckHook().before_train(runner)
    runner.model = torch.nn.Identity()
    LabelCheckHook().before_train(runner)
