"""The checks of COCO annotations agree with what mmdet's CocoDataset does."""
import json
import re

import numpy as np
import pytest
from coco import (
    CLASSES,
    annotation,
    coco_config,
    coco_dataset,
    make_coco,
    write,
)
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope

from rmoe.checks.coco import CocoUse, check_coco
from rmoe.checks.coco_file import read_coco
from rmoe.checks.data import check_data


def fails(root, message, **more):
    with pytest.raises(ValueError, match=message):
        check_data(coco_config(root, **more), ('train', ))


def changed(root, change, name='train.json'):
    """The drawn data set with one mistake in it."""
    content = make_coco(root, name=name)
    change(content)
    write(root, content, name)


def test_a_good_file_passes(tmp_path):
    make_coco(tmp_path)
    assert check_data(coco_config(tmp_path), ('train', 'val')) == []


@pytest.mark.parametrize('keep', [.05, .3, .5, .8, .97, .999])
def test_a_file_cut_short(tmp_path, keep):
    make_coco(tmp_path)
    path = tmp_path / 'train.json'
    text = path.read_text()
    path.write_text(text[:int(len(text) * keep)])
    fails(tmp_path, rf'train\.json looks cut short: it breaks at character '
          rf'\d+ of {int(len(text) * keep)} \(line 1, column \d+\)')


@pytest.mark.parametrize('text, message', [
    ('', r'train\.json is empty \(0 bytes\)'),
    ('<html>404</html>', 'is no JSON: it breaks at character 0'),
    ('{"images": [1, 2,]}', r"is no JSON.*line 1.*after '.*1, 2,?'"),
    ('[1, 2]', 'no COCO annotation file: it is a list'),
    ('{"images": [], "labels": []}', r"it has no list 'annotations', it has "
     r"no list 'categories'; its keys are \['images', 'labels'\]"),
])
def test_a_file_of_another_kind(tmp_path, text, message):
    make_coco(tmp_path)
    (tmp_path / 'train.json').write_text(text)
    fails(tmp_path, message)


def test_a_binary_file(tmp_path):
    make_coco(tmp_path)
    (tmp_path / 'train.json').write_bytes(b'{"images": "\xff\xfe"}')
    fails(tmp_path, 'is no JSON: byte 12 of 16 is no UTF-8')


@pytest.mark.parametrize('part, key', [
    ('categories', 'name'), ('images', 'width'), ('annotations', 'area')])
def test_a_field_that_mmdet_would_end_on(tmp_path, part, key):
    changed(tmp_path, lambda content: content[part][1].pop(key))
    fails(tmp_path, rf"{part}\[1\] of .*train\.json \(id \d\) has no '{key}'")


@pytest.mark.parametrize('part', ['images', 'categories'])
def test_nothing_listed(tmp_path, part):
    changed(tmp_path, lambda content: content[part].clear())
    fails(tmp_path, rf'train\.json has no {part}')


def test_a_category_id_that_the_file_does_not_have(tmp_path):
    def change(content):
        for i in (0, 2):
            content['annotations'][i]['category_id'] = 9

    changed(tmp_path, change)
    fails(tmp_path, r'has 2 annotations with the category_id 9, and its '
          r'categories have the ids 3, 7')


def test_a_class_that_the_file_does_not_have(tmp_path):
    make_coco(tmp_path)
    fails(tmp_path, r"no category 'star', which train_dataloader\.dataset\."
          r"metainfo\.classes names.*The file has 'disk', 'square'",
          metainfo=dict(classes=('disk', 'star', 'square')))


def labels_of(root, **more):
    """The names that mmdet would print for the boxes of the first image."""
    with DefaultScope.overwrite_default_scope('mmdet'):
        dataset = DATASETS.build(coco_dataset(root, pipeline=[], **more))
    return [dataset.metainfo['classes'][instance['bbox_label']]
            for instance in dataset.get_data_info(0)['instances']]


def test_the_order_of_the_file_makes_the_labels(tmp_path):
    make_coco(tmp_path)
    wrong = dict(classes=CLASSES[::-1])
    # This is the mistake that the check prevents: the first box is a disk.
    assert labels_of(tmp_path) == ['disk', 'square']
    assert labels_of(tmp_path, metainfo=wrong) == ['square', 'disk']
    fails(tmp_path, r"classes is \('square', 'disk'\).*in the order "
          r"\('disk', 'square'\).*write metainfo=dict\(classes=\('disk', "
          r"'square'\)\)", metainfo=wrong)


def test_a_category_twice(tmp_path):
    changed(tmp_path, lambda content: content['categories'].append(
        dict(id=8, name='disk')))
    fails(tmp_path, "several categories with the name 'disk'")


def test_classes_without_a_comma(tmp_path):
    make_coco(tmp_path)
    fails(tmp_path, r"classes='disk' is one string.*classes=\('disk', \)",
          metainfo=dict(classes='disk'))


def test_categories_that_are_not_classes_are_counted(tmp_path):
    make_coco(tmp_path)
    notes = check_data(coco_config(tmp_path, metainfo=dict(
        classes=('square', ))), ('train', ))
    assert notes == [
        f'{tmp_path}/train.json: mmdet drops 4 of 8 annotations silently: '
        '4 of categories that are not in metainfo.classes (disk: 4)']
    changed(tmp_path, lambda content: content['annotations'].__delitem__(
        slice(1, None, 2)))
    fails(tmp_path, r'no box of .*train\.json is left for train_dataloader'
          r'\.dataset: of 4 annotations mmdet drops 4 of categories',
          metainfo=dict(classes=('square', )))


def test_boxes_outside_and_without_area(tmp_path):
    def change(content):
        for i, box in enumerate([(70, 5, 9, 9), (5, 5, 0, 9), (5, 5, .5, 9),
                                 (-9, 5, 20, 9), (44.6, 5, 20, 9)]):
            content['annotations'][i]['bbox'] = list(box)
        content['annotations'][5]['ignore'] = 1
        content['annotations'][6]['image_id'] = 99

    changed(tmp_path, change)
    notes = check_data(coco_config(tmp_path), ('train', ))
    assert notes[0].endswith(
        'mmdet drops 5 of 8 annotations silently: 2 without area; 1 '
        'outside their image; 1 marked "ignore"; 1 of images that it does '
        'not list')
    assert '1 boxes reach more than a pixel beyond their image' in notes[1]
    assert len(notes) == 2
    changed(tmp_path, lambda content: [
        ann.update(bbox=[100, 5, 9, 9]) for ann in content['annotations']])
    fails(tmp_path, 'no box of .* is left.*8 outside their image')


@pytest.mark.parametrize('beyond', [.9, 1.1])
@pytest.mark.parametrize('side', range(4))
def test_a_pixel_beyond_the_image_is_rounding(tmp_path, side, beyond):
    """The images have 64 x 48 pixels."""
    box = [[-beyond, 5, 9, 9], [5, -beyond, 9, 9], [50, 5, 14 + beyond, 9],
           [5, 40, 9, 8 + beyond]][side]
    changed(tmp_path, lambda content: content['annotations'][0].update(
        bbox=box))
    notes = check_data(coco_config(tmp_path), ('train', ))
    assert len(notes) == (beyond > 1)


@pytest.mark.parametrize('box', [
    [1, 2, 3], [1, 2, 3, float('nan')], 'four', [1, 2, 3, None]])
def test_what_is_no_box(tmp_path, box):
    changed(tmp_path, lambda content: content['annotations'][3].update(
        bbox=box))
    fails(tmp_path, r'annotation 3 of .* has the bbox')


def test_images_without_boxes(tmp_path):
    changed(tmp_path, lambda content: content['annotations'].__delitem__(
        slice(0, 4)))
    notes = check_data(coco_config(tmp_path), ('train', ))
    assert notes == [f'{tmp_path}/train.json: of 4 images 2 images have no '
                     'box of the classes, and filter_empty_gt=True leaves '
                     'them out']
    notes = check_data(coco_config(tmp_path, filter_cfg=None), ('train', ))
    assert notes[0].endswith('and train as background')
    # In validation they stay, as mmdet documents.
    cfg = coco_config(tmp_path, test_mode=True)
    cfg.val_dataloader = cfg.train_dataloader
    assert check_data(cfg, ('val', )) == []


def test_nothing_but_empty_images(tmp_path):
    changed(tmp_path, lambda content: content['annotations'].clear())
    fails(tmp_path, 'filter_cfg leaves none of the 4 images')
    # Images without boxes are a valid data set for training, but not for
    # validation.
    cfg = coco_config(tmp_path, filter_cfg=None)
    assert 'train as background' in check_data(cfg, ('train', ))[0]
    cfg.val_dataloader = coco_config(
        tmp_path, test_mode=True).train_dataloader
    with pytest.raises(ValueError, match=r'no box of .*of 0 annotations'):
        check_data(cfg, ('val', ))
    changed(tmp_path, lambda content: [
        ann.update(iscrowd=1) for ann in content['annotations']])
    fails(tmp_path, 'drops none, and 8 are crowds')


def test_images_that_are_all_too_small(tmp_path):
    make_coco(tmp_path, size=(64, 24))
    fails(tmp_path, r'leaves none of the 4 images .*4 are smaller than '
          'min_size=32')


def test_masks_that_are_not_there(tmp_path):
    pipeline = [dict(type='LoadImageFromFile'), dict(
        type='LoadAnnotations', with_bbox=True, with_mask=True)]
    changed(tmp_path, lambda content: content['annotations'][2].update(
        segmentation=[]))
    assert check_data(coco_config(tmp_path), ('train', )) == []
    fails(tmp_path, r'1 annotations .* have no segmentation',
          pipeline=pipeline)
    # This is the mistake that the check prevents.
    with DefaultScope.overwrite_default_scope('mmdet'):
        dataset = DATASETS.build(coco_dataset(tmp_path, pipeline=pipeline))
        with pytest.raises(KeyError, match='mask'):
            dataset[1]


def test_a_test_set_needs_no_ground_truth(tmp_path):
    changed(tmp_path, lambda content: content.pop('annotations'))
    cfg = coco_config(tmp_path, test_mode=True)
    cfg.test_dataloader = cfg.train_dataloader
    cfg.test_evaluator = dict(type='CocoMetric', format_only=True)
    assert check_data(cfg, ('test', )) == []
    cfg.test_evaluator.format_only = False
    with pytest.raises(ValueError, match="no list 'annotations'"):
        check_data(cfg, ('test', ))


def test_an_evaluator_that_reads_another_file(tmp_path):
    make_coco(tmp_path)
    make_coco(tmp_path, name='val.json')
    cfg = coco_config(tmp_path, test_mode=True, ann_file='val.json')
    cfg.val_dataloader = cfg.train_dataloader
    cfg.val_evaluator = dict(type='CocoMetric',
                             ann_file=f'{tmp_path}/val.json')
    assert check_data(cfg, ('val', )) == []
    cfg.val_evaluator.ann_file = f'{tmp_path}/train.json'
    with pytest.raises(ValueError, match=r'val_evaluator reads .*train\.json'
                       r', and val_dataloader .*val\.json'):
        check_data(cfg, ('val', ))


HEAD = dict(type='SomeHead', num_classes=2)


@pytest.mark.parametrize('model, name', [
    (dict(bbox_head=dict(HEAD, num_classes=80)), r'model\.bbox_head'),
    (dict(bbox_head=HEAD, mask_head=dict(HEAD, num_classes=3)),
     r'model\.mask_head'),
    (dict(roi_head=dict(bbox_head=dict(HEAD, num_classes=80))),
     r'model\.roi_head\.bbox_head'),
    (dict(roi_head=dict(bbox_head=HEAD, mask_head=dict(num_classes=1))),
     r'model\.roi_head\.mask_head'),
    (dict(roi_head=dict(bbox_head=[HEAD, HEAD, dict(num_classes=4)])),
     r'model\.roi_head\.bbox_head\.2'),
])
def test_heads_of_other_classes(tmp_path, model, name):
    make_coco(tmp_path)
    fails(tmp_path, rf"{name}\.num_classes=\d+ and train_dataloader\.dataset "
          rf"has 2 classes \('disk', 'square'\): set {name}\.num_classes=2",
          model=model)


def test_heads_that_tell_no_classes(tmp_path):
    make_coco(tmp_path)
    model = dict(rpn_head=dict(num_classes=1), roi_head=dict(
        bbox_head=[HEAD, HEAD],
        mask_head=dict(num_classes=80, class_agnostic=True)))
    assert check_data(coco_config(tmp_path, model), ('train', )) == []


def test_all_mistakes_are_named_at_once(tmp_path):
    def change(content):
        content['annotations'][0]['category_id'] = 9

    changed(tmp_path, change)
    (tmp_path / 'images/2.jpg').unlink()
    with pytest.raises(ValueError) as error:
        check_data(coco_config(tmp_path, dict(bbox_head=dict(num_classes=1))),
                   ('train', ))
    assert len(str(error.value).splitlines()) == 2
    assert 'num_classes=1' in str(error.value)
    assert 'category_id 9' in str(error.value)


def test_counts_are_those_of_mmdet(tmp_path):
    """A second implementation: mmdet's own data set, on random boxes."""
    rng = np.random.default_rng(1)
    content = make_coco(tmp_path, images=30)
    content['annotations'] = []
    for image in content['images']:
        image.update(width=int(rng.integers(20, 80)),
                     height=int(rng.integers(20, 80)))
    for number in range(200):
        x, y = rng.integers(-20, 80, 2).tolist()
        w, h = rng.choice([-3, 0, .4, 1, 8, 30], 2).tolist()
        content['annotations'].append(annotation(
            number, int(rng.integers(0, 30)), int(rng.choice([3, 7])),
            (x, y, w, h), iscrowd=int(rng.integers(0, 2)),
            area=float(rng.choice([-1, 0, 5])),
            ignore=bool(rng.integers(0, 5) == 0)))
    # Some images must be empty for the classes.
    content['annotations'] = [ann for ann in content['annotations']
                              if ann['image_id'] % 4]
    write(tmp_path, content)
    options = dict(classes=('square', )), dict(filter_empty_gt=True,
                                              min_size=32)
    with DefaultScope.overwrite_default_scope('mmdet'):
        whole, filtered = (DATASETS.build(coco_dataset(
            tmp_path, pipeline=[], metainfo=options[0], filter_cfg=filter_cfg))
            for filter_cfg in (None, options[1]))
    instances = sum(len(whole.get_data_info(i)['instances'])
                    for i in range(len(whole)))
    found = check_coco(
        read_coco(tmp_path / 'train.json'),
        CocoUse('file', 'option', ('square', ), options[1]))
    assert found.errors == []
    text = '\n'.join(found.notes)
    dropped, total = map(int, re.search(
        r'drops (\d+) of (\d+) annotations', text).groups())
    assert 0 < instances == total - dropped
    empty, small = map(int, re.search(
        r'of 30 images (\d+) images have no box.*; (\d+) are smaller',
        text).groups())
    assert 0 < len(filtered) == 30 - empty - small


def test_only_whether_there_is_a_mask_is_kept(tmp_path):
    make_coco(tmp_path)
    content = read_coco(tmp_path / 'train.json')
    assert content['annotations'][0]['segmentation'] is True
    raw = json.loads((tmp_path / 'train.json').read_text())
    raw['annotations'][0]['segmentation'] = True
    assert content['annotations'][0] == raw['annotations'][0]


def test_data_sets_that_read_otherwise_are_left_alone(tmp_path):
    """Objects365 sorts its categories."""
    changed(tmp_path, lambda content: content['categories'].reverse())
    cfg = coco_config(tmp_path)
    with pytest.raises(ValueError, match='stand in the order'):
        check_data(cfg, ('train', ))
    cfg.train_dataloader.dataset.type = 'Objects365V1Dataset'
    assert check_data(cfg, ('train', )) == []


def test_wrappers_are_opened(tmp_path):
    changed(tmp_path, lambda content: content['annotations'].clear())
    dataset = coco_dataset(tmp_path)
    cfg = Config(dict(default_scope='mmdet', train_dataloader=dict(
        dataset=dict(type='ConcatDataset', datasets=[
            dict(type='RepeatDataset', times=2, dataset=dataset)]))))
    with pytest.raises(ValueError, match=r'train_dataloader\.dataset\.datasets'
                       r'\.0\.dataset'):
        check_data(cfg, ('train', ))


def test_an_image_that_mmdet_leaves_out_need_not_be_there(tmp_path):
    content = make_coco(tmp_path)
    first = content['images'][0]
    changed(tmp_path, lambda content: content.update(annotations=[
        ann for ann in content['annotations']
        if ann['image_id'] != first['id']]))
    next(tmp_path.rglob(first['file_name'])).unlink()
    check_data(coco_config(tmp_path, filter_cfg=dict(filter_empty_gt=True)),
               ('train', ))
    fails(tmp_path, 'do not exist', filter_cfg=None)
