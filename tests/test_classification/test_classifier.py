"""ImageClassifier: features, losses, mixing, predictions."""
import copy

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from small_classifier import SWIN
from torch import nn
from torch.nn import functional as F

from rmoe.classification import ImageClassifier
from rmoe.engine.moe_loss_hook import install

VIT = dict(type='rmoe.ViTMoE', embed_dims=16, num_layers=2, num_heads=2,
           mlp_dims=32, img_size=32, patch_size=8)


def classifier(backbone=None, **options) -> ImageClassifier:
    return ImageClassifier(copy.deepcopy(backbone or SWIN),
                           num_classes=options.pop('num_classes', 3),
                           in_channels=16, **options)


def batch(count=6):
    return torch.randn(count, 3, 32, 32), torch.arange(count) % 3


def test_features_are_the_mean_of_the_last_map():
    model = classifier().eval()
    images, _ = batch()
    features = model.backbone(images)[-1].flatten(2).mean(2)
    torch.testing.assert_close(model(images), model.head(features))
    # norm3 of Swin normed the map: there is no other
    assert not list(model.norm.parameters())


def test_backbone_with_one_bare_map():
    model = classifier().eval()
    images, _ = batch()
    expected = model(images)
    model.backbone.register_forward_hook(lambda *call: call[-1][-1])
    assert torch.equal(model(images), expected)


def test_features_of_a_class_token():
    model = classifier(dict(VIT, output_cls_token=True)).eval()
    images, _ = batch()
    _, token = model.backbone(images)[-1]
    torch.testing.assert_close(model(images), model.head(token))


def test_norm_for_a_backbone_without_one():
    backbone = dict(VIT, final_norm=False, with_cls_token=False)
    model = classifier(backbone, norm_cfg=dict(type='LN')).eval()
    images, _ = batch()
    features = model.backbone(images)[-1].mean((2, 3))
    normed = F.layer_norm(features, (16, ))
    torch.testing.assert_close(model(images), model.head(normed))
    assert {key.split('.')[0] for key in model.state_dict()} == {
        'backbone', 'head', 'norm'}


def test_names_of_the_weights():
    state = classifier().state_dict()
    assert {key.split('.')[0] for key in state} == {'backbone', 'head'}
    assert state['head.weight'].shape == (3, 16)
    assert state['head.weight'].std() < 0.1 and not state['head.bias'].any()


def test_label_smoothing_against_its_definition():
    model = classifier(label_smoothing=0.3).eval()
    images, labels = batch()
    log_probs = model(images).log_softmax(1)
    targets = F.one_hot(labels, 3) * 0.7 + 0.1
    expected = -(targets * log_probs).sum(1).mean()
    losses = model(images, labels, mode='loss')
    torch.testing.assert_close(losses['loss_cls'], expected)
    hits = model(images).argmax(1) == labels
    assert losses['accuracy_top1'] == pytest.approx(
        100 * hits.float().mean().item())


@pytest.mark.parametrize('kind', ['mixup', 'cutmix'])
def test_mixed_targets_match_the_mixed_images(kind):
    """Image i is the number i all over: pixels tell the mix."""
    model = classifier(num_classes=8, **{kind: 1.})
    images = torch.arange(8.).view(8, 1, 1, 1).expand(8, 3, 32, 32).clone()
    labels = torch.arange(8)
    shares = set()
    for _ in range(20):
        mixed, targets = model.mix(images, labels)
        torch.testing.assert_close(targets.sum(1), torch.ones(8))
        # each image's pixels average to the mean label of its target
        torch.testing.assert_close(mixed.mean((1, 2, 3)),
                                   targets @ labels.float())
        # of its own label and that of one other
        assert ((targets > 0).sum(1) <= 2).all()
        shares.add(round(targets[3, 3].item(), 4))
        values = mixed[3].unique()
        if kind == 'cutmix':
            assert set(values.tolist()) <= {2., 3.}
        else:
            assert len(values) == 1
    assert len(shares) > 10 and all(0 <= share <= 1 for share in shares)
    assert torch.equal(images[:, 0, 0, 0], torch.arange(8.))


def test_the_loss_is_that_of_the_mixed_batch():
    model = classifier(dict(SWIN, drop_path_rate=0.), mixup=0.8,
                       label_smoothing=0.1)
    images, labels = batch()
    torch.manual_seed(5)
    mixed, targets = model.mix(images, labels)
    torch.manual_seed(5)
    losses = model(images, labels, mode='loss')
    smooth = 0.9 * targets + 0.1 / 3
    expected = -(smooth * model(mixed).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(losses['loss_cls'], expected)
    assert set(losses) == {'loss_cls'}


def test_mixup_and_cutmix_take_turns():
    model = classifier(num_classes=8, mixup=1., cutmix=1.)
    images = torch.arange(8.).view(8, 1, 1, 1).expand(8, 3, 32, 32)
    mixups = 0
    for _ in range(40):
        mixed, _ = model.mix(images, torch.arange(8))
        # a fraction of two numbers is in no image that was cut and pasted
        mixups += bool((mixed % 1).any())
    assert 8 < mixups < 32


def test_mixing_follows_torchs_seed_and_no_other():
    import random

    import numpy as np
    model = classifier(num_classes=3, mixup=1., cutmix=1.)
    images, labels = batch()

    def mix(seed, other_seed):
        torch.manual_seed(seed)
        np.random.seed(other_seed)
        random.seed(other_seed)
        return [model.mix(images, labels)[0] for _ in range(8)]

    for one, other in zip(mix(1, 2), mix(1, 3)):
        assert torch.equal(one, other)
    assert not all(map(torch.equal, mix(1, 2), mix(4, 2)))


def test_nothing_is_mixed_in_evaluation():
    model = classifier(mixup=1., cutmix=1.).eval()
    images, labels = batch()
    losses = model(images, labels, mode='loss')
    torch.testing.assert_close(
        losses['loss_cls'], F.cross_entropy(model(images), labels))


def test_dropout_is_before_the_head():
    model = classifier(dict(SWIN, drop_path_rate=0.), dropout=0.5)
    images, _ = batch()
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_predictions():
    model = classifier().eval()
    images, labels = batch()
    for given in (labels, labels.tolist()):  # of either collate function
        samples = model(images, given, mode='predict')
        probs = model(images).softmax(1)
        for i, sample in enumerate(samples):
            torch.testing.assert_close(sample['pred_score'], probs[i])
            assert sample['pred_label'] == int(probs[i].argmax())
            assert sample['gt_label'] == i % 3
    assert 'gt_label' not in model(images, mode='predict')[0]


@pytest.mark.parametrize('collate', ['default_collate', 'pseudo_collate'])
def test_steps_of_a_runner(collate):
    """uint8 images through the preprocessor, of either collate function."""
    from mmengine.optim import OptimWrapper
    from mmengine.registry import FUNCTIONS
    model = classifier(data_preprocessor=dict(
        type='ImgDataPreprocessor', mean=[128.] * 3, std=[64.] * 3))
    data = FUNCTIONS.get(collate)([
        dict(inputs=torch.randint(256, (3, 32, 32), dtype=torch.uint8),
             data_samples=i % 3) for i in range(4)])
    optimizer = OptimWrapper(torch.optim.SGD(model.parameters(), lr=.1))
    before = model.head.bias.clone()
    assert set(model.train_step(copy.deepcopy(data), optimizer)) == {
        'loss', 'loss_cls', 'accuracy_top1'}
    assert not torch.equal(model.head.bias, before)
    model.eval()
    samples = model.val_step(data)
    assert [sample['gt_label'] for sample in samples] == [0, 1, 2, 0]
    images = torch.stack(list(data['inputs'])).float()
    torch.testing.assert_close(
        torch.stack([sample['pred_score'] for sample in samples]),
        model((images - 128) / 64).softmax(1))


def test_losses_of_experts_are_added():
    model = classifier(dict(SWIN, moe=dict(layers=((), (1, )),
                                           num_experts=4)))
    install(model)
    losses = model(*batch(), mode='loss')
    assert 'loss_moe_importance' in losses
    total, _ = model.parse_losses(losses)
    total.backward()
    router = model.backbone.stages[1].blocks[1].ffn.router
    assert router.scorer.weight.grad.abs().sum() > 0


def test_backbones_of_other_libraries():
    """Built under any scope, by a name with or without one."""
    for scope in ('mmengine', 'mmseg', 'rmoe'):
        with DefaultScope.overwrite_default_scope(scope):
            model = MODELS.build(dict(
                type='rmoe.ImageClassifier', num_classes=3, in_channels=16,
                backbone=dict(VIT, type='rmoe.ViTMoE')))
            plain = MODELS.build(dict(
                type='rmoe.ImageClassifier', num_classes=3, in_channels=16,
                backbone=dict(VIT, type='ViTMoE')))
        assert type(plain.backbone) is type(model.backbone)
    import mmseg.models  # noqa: F401
    resnet = MODELS.build(dict(
        type='rmoe.ImageClassifier', num_classes=3, in_channels=2048,
        backbone=dict(type='mmseg.ResNet', depth=50, base_channels=64)))
    assert resnet.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize('options, message', [
    (dict(num_classes=0), 'num_classes=0'),
    (dict(dropout=1.), r'dropout=1\.0'),
    (dict(label_smoothing=-.1), r'label_smoothing=-0\.1'),
    (dict(mixup=-1.), r'mixup=-1\.0'),
    (dict(cutmix=-1.), r'cutmix=-1\.0'),
])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        classifier(**options)


def test_wrong_width_and_wrong_mode():
    images, labels = batch()
    model = ImageClassifier(copy.deepcopy(SWIN), 3, in_channels=32)
    with pytest.raises(ValueError, match='in_channels=32, but the last '
                       'output of the backbone has 16 channels'):
        model(images)
    model = classifier()
    with pytest.raises(ValueError, match="mode='losses'"):
        model(images, labels, mode='losses')
    with pytest.raises(ValueError, match='with data_samples'):
        model(images, mode='loss')
    assert isinstance(model.norm, nn.Identity)
