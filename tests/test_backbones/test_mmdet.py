"""mmdet's detectors with a MoE backbone and auxiliary losses."""
import mmdet.models  # noqa: F401
import numpy as np
import pytest
import torch
from mmcv.cnn.bricks import DropPath
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.registry import MODELS
from mmengine.structures import InstanceData
from zoo import LEAVES, load, scope, shrink

from rmoe.engine.amp import BFloat16OptimWrapper
from rmoe.engine.moe_loss_hook import install
from rmoe.engine.roles import role_of

# Odd sizes; the batch is padded to the larger of each side.
SIZES = ((75, 61), (50, 66))


def leaf(name):
    return pytest.param(name, id=name.split('_8xb2')[0])


each_detector = pytest.mark.parametrize('name', [
    leaf('mask-rcnn_swin-t-moe-e8k1-p4-w7_fpn_8xb2-1x_coco'),
    leaf('cascade-mask-rcnn_swin-b-moe-e8k1-p4-w7_fpn_8xb2-ms-crop-3x_coco'),
    leaf('retinanet_swin-t-moe-e8k1-p4-w7_fpn_8xb2-1x_coco'),
    leaf('dino-4scale_swin-t-moe-e8k1-p4-w7_8xb2-12e_coco'),
    leaf('mask-rcnn_cvt-13-moe-e8k1_fpn_8xb2-1x_coco'),
    leaf('mask-rcnn_vit-s-moe-e8k1-p16_sfp_8xb2-1x_coco'),
])


@pytest.fixture
def detector(name):
    cfg = shrink(load(next(path for path in LEAVES if path.stem == name)))
    if 'rcnn' in cfg.model.test_cfg:
        cfg.model.test_cfg.rcnn.score_thr = 0.
    elif 'score_thr' in cfg.model.test_cfg:
        cfg.model.test_cfg.score_thr = 0.
    with scope(cfg):
        model = MODELS.build(cfg.model)
        model.init_weights()
        yield model


def images(model, objects=(2, 1), training=True):
    """A batch as mmdet's pipeline hands it over."""
    samples = []
    for (height, width), count in zip(SIZES, objects):
        boxes = torch.tensor([[5., 9., 40., 38.], [20., 3., 58., 49.]])[:count]
        masks = np.ones((count, height, width), np.uint8)
        samples.append(DetDataSample(
            metainfo=dict(img_shape=(height, width), scale_factor=(1., 1.),
                          ori_shape=(height, width)),
            gt_instances=InstanceData(
                bboxes=boxes, labels=torch.tensor([3, 79])[:count],
                masks=BitmapMasks(masks, height, width))))
    inputs = [torch.randint(256, (3, *size), dtype=torch.uint8)
              for size in SIZES]
    return model.data_preprocessor(
        dict(inputs=inputs, data_samples=samples), training)


@each_detector
def test_task_loss_alone_reaches_every_router(detector):
    install(detector)
    for module in detector.modules():
        if isinstance(module, DropPath):  # a dropped branch has no gradient
            module.drop_prob = 0.
    losses = detector.train()(**images(detector), mode='loss')
    assert {'loss_moe_importance', 'loss_moe_load'} <= set(losses)
    total, _ = detector.parse_losses({
        key: value for key, value in losses.items() if 'moe' not in key})
    total.backward()
    routers = [parameter for name, parameter in detector.named_parameters()
               if role_of(name) == 'router']
    assert routers
    for parameter in routers:
        assert parameter.grad.abs().sum() > 0


@each_detector
def test_images_without_objects_train(detector):
    install(detector)
    losses = detector.train()(**images(detector, objects=(0, 0)), mode='loss')
    total, _ = detector.parse_losses(losses)
    total.backward()
    for parameter in detector.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()


@each_detector
def test_predictions_lie_in_their_images(detector):
    with torch.no_grad():
        results = detector.eval()(**images(detector, training=False),
                                  mode='predict')
    for result, (height, width) in zip(results, SIZES):
        found = result.pred_instances
        assert 0 < len(found) <= 20
        assert found.bboxes.min() >= 0
        assert found.bboxes[:, 0::2].max() <= width
        assert found.bboxes[:, 1::2].max() <= height
        assert found.labels.max() < 80
        if hasattr(detector, 'roi_head'):
            assert found.masks.shape == (len(found), height, width)


@each_detector
def test_prediction_repeats(detector):
    detector.eval()
    batch = images(detector, training=False)
    with torch.no_grad():
        first, second = (detector(**batch, mode='tensor') for _ in range(2))

    def tensors(node):
        if isinstance(node, torch.Tensor):
            return [node]
        return [] if node is None else [
            one for part in (node.values() if isinstance(node, dict) else node)
            for one in tensors(part)]

    first, second = tensors(first), tensors(second)
    assert first and all(map(torch.equal, first, second))


@each_detector
def test_bfloat16_training_step(detector):
    install(detector)
    detector.train()
    wrapper = BFloat16OptimWrapper(torch.optim.SGD(detector.parameters(), .1))
    data = images(detector)
    torch.manual_seed(1)
    exact, of_exact = detector.parse_losses(detector(**data, mode='loss'))
    torch.manual_seed(1)
    with wrapper.optim_context(detector):
        loss, of_loss = detector.parse_losses(detector(**data, mode='loss'))

    def total(losses):
        # Boxes of the second stage are those of a few sampled proposals.
        return sum(float(value) for key, value in losses.items()
                   if 'loss_' in key and not (
                       hasattr(detector, 'roi_head') and
                       key.endswith('loss_bbox') and 'rpn' not in key))

    assert total(of_loss) == pytest.approx(total(of_exact), rel=.05)
    assert exact.isfinite() and loss.isfinite()
    wrapper.backward(loss)
