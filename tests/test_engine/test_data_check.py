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
from parallel_ranks import data_of_ranks, labels_of_ranks
from PIL import Image
from two_ranks import run_two_ranks

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


def test_ranks_check_their_data_together(tmp_path):
    make_coco(tmp_path)
    cfg = coco_config(tmp_path)
    empty = tmp_path / 'empty'
    empty.mkdir()
    make_coco(empty)
    (empty / 'train.json').write_text('')
    lost = [coco_config(tmp_path), coco_config(tmp_path / 'nowhere')]
    first, second = run_two_ranks(
        data_of_ranks, str(tmp_path), [cfg, cfg], [coco_config(empty)] * 2,
        lost)
    # One process looks into the files.
    assert first[:2] == (True, []) and second[:2] == (False, [])
    assert first[2] == second[2]
    assert first[2].endswith('train.json is empty (0 bytes)')
    # That a folder is missing is for everyone to see.
    assert first[3] == second[3]
    assert f'{tmp_path}/nowhere does not exist' in first[3]


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


def test_ranks_share_label_maps(tmp_path):
    ranks = run_two_ranks(labels_of_ranks, str(tmp_path), 5, 3)
    (even, first), (odd, second) = ranks
    # 0, 2, 4 of five files, then 0, 3, 6 of seven; the second has index 5.
    assert (even, odd) == ([0, 4, 0, 6], [2, 3])
    assert first == second == [
        'labels of 3 of 5 training images lie in 0 to 1',
        'labels of 3 of 7 training images lie in 0 to 1']
    ranks = run_two_ranks(labels_of_ranks, str(tmp_path), 5, 100)
    # Rank 1 meets the wrong one; both raise it.
    assert [says for _, says in ranks] == [
        ['labels of 5 of 5 training images lie in 0 to 1', '5 is wrong']] * 2
