"""Mistakes in the data are found before training, and messages name the
file."""
import pytest
from coco import coco_config, make_coco
from mmengine.config import Config
from mmengine.logging import MMLogger
from parallel_ranks import data_of_ranks
from two_ranks import run_two_ranks

from rmoe.checks import data as data_check
from rmoe.checks.data import check_data


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
    # Only one process reads the files.
    assert first[:2] == (True, []) and second[:2] == (False, [])
    assert first[2] == second[2]
    assert first[2].endswith('train.json is empty (0 bytes)')
    # Every process checks that folders exist.
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
