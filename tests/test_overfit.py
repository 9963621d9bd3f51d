"""A detector with an upcycled backbone learns eight real images by heart."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from pretrained import ROOT, WEIGHTS
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

REPOSITORY = Path(__file__).resolve().parents[1]
LEAF = (REPOSITORY / 'configs/vit_moe/mask-rcnn_vit-ti-moe-e8k1-p16_sfp_'
        '1xb2-400_coco-mini-8.py')
ANNOTATIONS = ROOT / 'coco_mini/annotations/instances_train2017.json'
CROWDS = [0, 7, 8]
pytestmark = pytest.mark.skipif(
    not (ANNOTATIONS.exists() and WEIGHTS.exists()),
    reason='coco_mini or vit_tiny is not under data/ or RMOE_DATA')


def annotations_of(coco):
    return {image: coco.loadAnns(coco.getAnnIds([image]))
            for image in coco.getImgIds()}


def average_precision(coco, predictions, image_ids, kind):
    """COCO's evaluator with its own settings, on a part of a file."""
    results = [{key: value for key, value in result.items()
                if key != 'bbox' or kind == 'bbox'} for result in predictions]
    evaluation = COCOeval(coco, coco.loadRes(results), kind)
    evaluation.params.imgIds = image_ids
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats[:3]


def test_the_images_follow_the_rule_of_the_config():
    annotations = annotations_of(COCO(ANNOTATIONS))
    fit = [i for i, found in enumerate(annotations.values())
           if 2 <= len(found) <= 6 and not any(
               one['iscrowd'] or one['area'] < 32**2 for one in found)]
    cfg = Config.fromfile(LEAF)
    for split in ('train', 'val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert dataset.indices == fit[:8]
        assert dataset.ann_file == 'annotations/instances_train2017.json'


def dilated(mask):
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:, 1:] |= mask[:, :-1]
    return grown


def test_ground_truth_of_the_samples_is_that_of_the_file():
    """The config's evaluator and COCO's own score made-up predictions alike,
    among them some of objects in a crowd."""
    from mmdet.evaluation import CocoMetric
    from mmdet.registry import DATASETS
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData
    cfg = Config.fromfile(LEAF).val_dataloader.dataset
    cfg.update(data_root=str(ROOT / 'coco_mini'),
               indices=CROWDS + cfg.indices)
    with DefaultScope.overwrite_default_scope('mmdet'):
        dataset = DATASETS.build(cfg)
    metric = CocoMetric(metric=['bbox', 'segm'],
                        metric_items=['mAP', 'mAP_50', 'mAP_75'])
    metric.dataset_meta = dataset.metainfo
    coco = COCO(ANNOTATIONS)
    category_ids = coco.getCatIds()
    generator = np.random.default_rng(0)
    predictions, image_ids = [], []
    for index in range(len(dataset)):
        sample = dataset[index]['data_samples']
        image_ids.append(sample.img_id)
        masks, labels = [], []
        for one in coco.loadAnns(coco.getAnnIds([sample.img_id])):
            mask = coco.annToMask(one).astype(bool)
            for _ in range(generator.integers(8)):
                mask = dilated(mask)
            # Half a crowd is ignored, and would be false were it an object.
            if one['iscrowd']:
                mask[:, mask.shape[1] // 2:] = False
            masks.append(mask)
            labels.append(category_ids.index(one['category_id']))
        scores = generator.random(len(masks))
        boxes = [coco_masks.toBbox(coco_masks.encode(np.asfortranarray(
            mask.astype(np.uint8)))) for mask in masks]
        corners = [[x, y, x + w, y + h] for x, y, w, h in boxes]
        predicted = DetDataSample(
            metainfo=sample.metainfo, pred_instances=InstanceData(
                bboxes=torch.tensor(corners), labels=torch.tensor(labels),
                scores=torch.tensor(scores),
                masks=torch.from_numpy(np.stack(masks))))
        metric.process({}, [predicted.to_dict()])
        for mask, label, score, box in zip(masks, labels, scores, boxes):
            predictions.append(dict(
                image_id=sample.img_id, category_id=category_ids[label],
                score=float(score), bbox=list(map(float, box)),
                segmentation=coco_masks.encode(
                    np.asfortranarray(mask.astype(np.uint8)))))
    ours = metric.evaluate(len(dataset))
    for kind in ('bbox', 'segm'):
        expected = average_precision(coco, predictions, image_ids, kind)
        assert 0.2 < expected[0] < 0.9
        np.testing.assert_allclose(
            [ours[f'coco/{kind}_{item}']
             for item in ('mAP', 'mAP_50', 'mAP_75')], expected, atol=6e-4)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_mask_rcnn_with_upcycled_experts_overfits(tmp_path):
    data = [f'{split}_dataloader.dataset.data_root={ROOT / "coco_mini"}'
            for split in ('train', 'val')]
    run = subprocess.run(
        [sys.executable, 'tools/train.py', LEAF, '--work-dir', tmp_path,
         '--cfg-options', *data,
         f'model.backbone.init_cfg.checkpoint={WEIGHTS}',
         f'val_evaluator.outfile_prefix={tmp_path / "results"}'],
        cwd=REPOSITORY, env=dict(os.environ, OMP_NUM_THREADS='1'),
        capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    log = run.stdout + run.stderr
    assert re.search(r'upcycled +12 ', log)
    assert re.findall(r"stage '(\w+)' trains", log) == [
        'core', 'residual', 'joint']

    lines = [json.loads(line) for line in next(
        tmp_path.glob('*/vis_data/scalars.json')).read_text().splitlines()]
    scores = next(line for line in lines if 'coco/segm_mAP' in line)
    assert scores['coco/segm_mAP'] > 0.6

    # The same from the files themselves, by COCO's evaluator alone.
    coco = COCO(ANNOTATIONS)
    indices = Config.fromfile(LEAF).val_dataloader.dataset.indices
    image_ids = [coco.getImgIds()[index] for index in indices]
    predictions = json.loads((tmp_path / 'results.segm.json').read_text())
    category_ids = coco.getCatIds()
    for result in predictions:  # the samples know labels and no ids
        result['category_id'] = category_ids[result['category_id']]
    expected = average_precision(coco, predictions, image_ids, 'segm')
    assert abs(expected[0] - scores['coco/segm_mAP']) < 6e-4

    # Every expert has its share in the last window, and left the core.
    loads = [value for line in lines for key, value in line.items()
             if '/load_' in key and line['step'] == 400]
    assert len(loads) == 3 * 8
    assert min(loads) > 0.5 / 8
    state = torch.load(tmp_path / 'iter_400.pth')['state_dict']
    for block in (7, 9, 11):
        ffn = f'backbone.layers.{block}.ffn.'
        norms_E = state[f'{ffn}experts.residual_fc1_weight'].flatten(1).norm(
            dim=1)
        core = state[f'{ffn}layers.0.0.weight'].norm()
        assert norms_E.min() > 0.05 * core
