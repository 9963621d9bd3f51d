"""tools/experiments: the models and data sets of single plans."""
import json

import cv2
import numpy as np
import pytest
import torch
from experiments import cut_ffn, two_data_sets
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from mmseg.registry import DATASETS, MODELS
from mmseg.structures import SegDataSample

from rmoe.backbones import ViTMoE
from rmoe.moe import moe_layers
from rmoe.moe.routers import TokenChoiceRouter

VIT = dict(embed_dims=32, num_layers=3, num_heads=2, mlp_dims=64, img_size=32)


def cut_vit(experts):
    return cut_ffn.CutViT(**VIT, moe=dict(
        layers=(0, 2), num_experts=experts, expert_mismatch='raise')).eval()


@pytest.fixture
def dense():
    torch.manual_seed(0)
    model = ViTMoE(**VIT).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=.2)
    return model


@pytest.mark.parametrize('experts', [1, 4])
def test_a_cut_model_computes_the_dense_function(dense, experts):
    model = cut_vit(experts)
    layers = moe_layers(model)
    assert list(layers) == [f'layers.{block}.ffn.routed.{half}'
                            for block in (0, 2) for half in (0, 1)]
    model.load_state_dict(dense.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(x)[0], dense(x)[0], atol=1e-4, rtol=1e-4)
    for layer in layers.values():
        assert layer.experts.widths == (32, 16)
        torch.nn.init.normal_(layer.experts.residual_fc1_weight)
    assert not torch.allclose(model(x)[0], dense(x)[0], atol=.1)
    again = cut_vit(experts)  # its own checkpoint is not cut a second time
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x)[0], model(x)[0])


def test_units_are_shared_by_size_and_split_by_direction():
    fc1_HD, fc2_DH = torch.zeros(8, 2), torch.zeros(2, 8)
    small = torch.tensor([1, 2, 4, 7])
    fc1_HD[small] = torch.tensor([[1., 0.], [.1, 1.], [0., 1.], [1., .1]])
    fc2_DH[:, small] = .5
    large = torch.tensor([0, 3, 5, 6])
    fc1_HD[large] = torch.tensor([[3., 0.], [0., 5.], [4., 0.], [0., 2.]])
    fc2_DH[:, large] = 1.
    shared, *split = cut_ffn.cut(fc1_HD, fc2_DH)
    assert shared.tolist() == [3, 5, 0, 6]
    assert sorted(sorted(part.tolist()) for part in split) == [[1, 7], [2, 4]]


@pytest.fixture
def cells(tmp_path):
    """A data set of one image, with a white cell and a platelet on it."""
    cv2.imwrite(str(tmp_path / 'a.jpg'), np.full((40, 60, 3), 200, np.uint8))
    (tmp_path / 'train.json').write_text(json.dumps(dict(
        images=[dict(id=5, file_name='a.jpg')],
        annotations=[
            dict(image_id=5, category_id=3, bbox=[28, 18, 4, 4]),
            dict(image_id=5, category_id=2, bbox=[20, 10, 20, 20])])))

    def build(*transforms):
        with DefaultScope.overwrite_default_scope('mmseg'):
            return DATASETS.build(dict(
                type='CellDataset', ann_file='train.json',
                data_root=str(tmp_path), data_prefix=dict(img_path='.'),
                pipeline=[dict(type='LoadImageFromFile'), *transforms]))

    return build


def test_cells_are_drawn_as_ellipses(cells):
    resize = dict(type='Resize', scale=(30, 20))
    dataset = cells(resize, dict(type='DrawCells'),
                    dict(type='NameDataset', name='bccd'),
                    dict(type='PackSegInputs',
                         meta_keys=('ori_shape', 'dataset')))
    item = dataset[0]
    assert item['inputs'].shape == (3, 20, 30)
    assert item['data_samples'].dataset == 'bccd'
    labels = item['data_samples'].gt_sem_seg.data[0]
    assert labels.shape == (40, 60)  # that of the file
    assert labels[20, 30] == 3 and labels[20, 25] == 2
    assert labels[11, 21] == 0  # in the box and outside of the ellipse
    assert (labels > 0).sum() == pytest.approx(np.pi * 10.5 ** 2, rel=.01)


def samples(*names, size=8, classes=3):
    made = []
    for name in names:
        sample = SegDataSample(metainfo=dict(
            dataset=name, img_shape=(size, size), ori_shape=(size, size)))
        sample.gt_sem_seg = PixelData(
            data=torch.randint(classes, (1, size, size)))
        made.append(sample)
    return made


HEAD = dict(
    type='FCNHead', in_channels=32, channels=8, num_convs=1, kernel_size=1,
    concat_input=False, dropout_ratio=0., norm_cfg=dict(type='BN'),
    align_corners=False,
    loss_decode=dict(type='CrossEntropyLoss', loss_weight=1.))
HEADS = dict(type='HeadForEachDataset', heads=dict(
    streets=dict(HEAD, num_classes=5), cells=dict(HEAD, num_classes=3)))


def test_each_image_goes_to_the_head_of_its_data_set():
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmseg'):
        head = MODELS.build(HEADS).eval()
    maps, batch = torch.randn(4, 32, 2, 2), samples(
        'streets', 'cells', 'streets', 'streets')
    losses = head.loss([maps], batch, {})
    for name, mine in (('streets', [0, 2, 3]), ('cells', [1])):
        alone = head.heads[name].loss(
            [maps[mine]], [batch[i] for i in mine], {})
        assert losses[f'{name}.loss_ce'].item() == pytest.approx(
            alone['loss_ce'].item() * len(mine) / 4)
        assert losses[f'{name}.acc_seg'] == alone['acc_seg']
    assert list(head.loss([maps[:1]], batch[:1], {})) == [
        'streets.loss_ce', 'streets.acc_seg']
    found = head.predict([maps[:1]], [batch[1].metainfo], {})
    assert found.shape == (1, 3, 8, 8)


def test_a_router_that_knows_the_data_set():
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(dict(
            type='SegmentorOfDatasets', decode_head=HEADS,
            test_cfg=ConfigDict(mode='whole'),
            backbone=dict(
                type='rmoe.ViTMoE', **VIT, moe=dict(
                    layers=(1, ), num_experts=4, router=dict(
                        type='TokenChoiceRouter', loss_weights={},
                        scorer=dict(type='DatasetScorer'))))))
    layer, = moe_layers(model).values()
    assert isinstance(layer.router, TokenChoiceRouter)
    x, batch = torch.randn(3, 3, 32, 32), samples(
        'streets', 'cells', 'cells', size=32)
    losses = model(x, batch, 'loss')
    assert {'decode.streets.loss_ce', 'decode.cells.loss_ce'} <= set(losses)
    # Experts 0 and 2 get the 5 tokens of the first image, 1 and 3 all others.
    assert layer.demand_E[::2].sum() == 5 and layer.demand_E[1::2].sum() == 10
    model.eval()
    found, = model(x[:1], batch[:1], 'predict')
    assert found.seg_logits.data.shape == (5, 32, 32)


def test_the_score_of_two_data_sets():
    metric = two_data_sets.IoUOfDatasets(
        dict(streets=('a', 'b'), cells=('c', 'd', 'e')))
    for name, truth, found in (
            ('cells', [0, 1, 2, 2], [0, 1, 2, 1]),
            ('streets', [0, 0, 1, 1], [0, 0, 0, 1]),
            ('streets', [0, 0, 0, 0], [0, 0, 0, 0])):
        metric.process({}, [dict(
            dataset=name, img_path='',
            gt_sem_seg=dict(data=torch.tensor([truth])),
            pred_sem_seg=dict(data=torch.tensor([found])))])
    # streets: 6 / 7 and 1 / 2; cells: 1, 1 / 2 and 1 / 2
    scores = metric.evaluate(3)
    assert scores == {
        'mIoU': pytest.approx((67.86 + 66.67) / 2),
        'streets/mIoU': 67.86, 'cells/mIoU': 66.67}
