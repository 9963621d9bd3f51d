"""The inferencers of the host libraries, with checkpoints of our tools. Each
runs in a process that only imports rmoe, whose types are named in the
config."""
import json
import subprocess
import sys

import numpy as np
import torch
import train
from coco import make_coco
from commands import command, options
from mmengine.config import Config
from mmengine.registry import DefaultScope
from toy_detection import detection_config

from rmoe.registry import MODELS

SEGMENT = '''
import sys
import rmoe  # mmcv may have no operators of its own
from mmseg.apis import MMSegInferencer, inference_model, init_model
config, checkpoint, image, out = sys.argv[1:]
model = init_model(config, checkpoint, device='cpu')
assert type(model.backbone).__module__ == 'rmoe.backbones.swin_moe'
first = inference_model(model, image).pred_sem_seg.data[0].numpy()
assert len(model.dataset_meta['classes']) == 7
import numpy
numpy.save(out, first)
for source in (config, None):  # None: the config inside the checkpoint
    inferencer = MMSegInferencer(source, checkpoint, device='cpu')
    found = inferencer(image)['predictions']
    assert (found == first).all()
    assert len(inferencer.model.dataset_meta['classes']) == 7
'''
DETECT = '''
import json
import sys
import rmoe
from mmdet.apis import DetInferencer, inference_detector, init_detector
config, checkpoint, image, out = sys.argv[1:]
model = init_detector(config, checkpoint, device='cpu')
assert type(model.backbone).__module__ == 'rmoe.backbones.swin_moe'
first = inference_detector(model, image).pred_instances
assert model.dataset_meta['classes'] == ('disk', 'square'), model.dataset_meta
boxes = first.bboxes.tolist()
json.dump(boxes, open(out, 'w'))
assert len(boxes) == 5
for source in (config, None):
    inferencer = DetInferencer(source, checkpoint, device='cpu')
    found = inferencer(image)['predictions'][0]
    assert found['bboxes'] == boxes
    assert found['labels'] == first.labels.tolist()
'''


def run(code, folder, *args):
    """Run code in a process of its own, which finds the installed package and
    no other files of this repository."""
    result = subprocess.run(
        [sys.executable, '-c', code, *map(str, args)], cwd=folder,
        capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


def test_segmentors(work, configs, dense_checkpoint):
    command(train, configs['moe'], *options(
        work, 'infer', f'load_from={dense_checkpoint}'))
    checkpoint = work / 'infer/iter_4.pth'
    image = next((work / 'scenes/images/validation').iterdir())
    # what train.py wrote beside the checkpoint
    run(SEGMENT, work, work / 'infer/moe.py', checkpoint, image,
        work / 'infer.npy')
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(Config.fromfile(configs['moe']).model).eval()
    model.load_state_dict(torch.load(checkpoint)['state_dict'])
    from mmcv import imread
    pixels = torch.from_numpy(imread(str(image)).transpose(2, 0, 1))
    with torch.no_grad():
        data = model.data_preprocessor(dict(inputs=[pixels]), False)
        expected = model(data['inputs'], mode='tensor')
    height, width = pixels.shape[1:]
    expected = torch.nn.functional.interpolate(
        expected, (height, width), mode='bilinear',
        align_corners=model.align_corners).argmax(1)[0]
    assert np.array_equal(np.load(work / 'infer.npy'), expected)


def test_detectors(tmp_path):
    make_coco(tmp_path)
    config = tmp_path / 'detector.py'
    detection_config(tmp_path).dump(config)
    command(train, config, '--work-dir', tmp_path / 'run')
    run(DETECT, tmp_path, tmp_path / 'run/detector.py',
        tmp_path / 'run/epoch_1.pth', tmp_path / 'images/0.jpg',
        tmp_path / 'boxes.json')
    boxes = np.array(json.loads((tmp_path / 'boxes.json').read_text()))
    # inside an image of 64 x 48
    assert (boxes >= 0).all() and (boxes[:, [0, 2]] <= 64).all() and (
        boxes[:, [1, 3]] <= 48).all()
