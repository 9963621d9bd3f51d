"""A classifier from packed images to a downstream backbone."""
import json
import shutil

import pytest
import test as test_tool  # tools/test.py
import torch
import train
import upcycle
from commands import command
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from small_classifier import SWIN, classifier_config, pack, run_training

from rmoe.registry import MODELS
from rmoe.upcycling import read_checkpoint, state_dict_of

MOE = dict(layers=((), (1, )), num_experts=4)
STAGES = [dict(roles=('residual', 'router', 'head'), end=0.5),
          dict(roles='all')]
AUGMENTED = (dict(type='RandomResizedCrop', size=32, scale=(0.5, 1.)),
             dict(type='RandomHorizontalFlip'))


@pytest.fixture(scope='module')
def trained(packed, tmp_path_factory):
    """The work dir of four epochs of a dense classifier."""
    work = tmp_path_factory.mktemp('dense')
    torch.manual_seed(0)
    run_training(packed, work)
    return work


def scalars(work_dir) -> list[dict]:
    """All that was logged, in order."""
    file = next(work_dir.rglob('scalars.json'))
    return [json.loads(line) for line in file.read_text().splitlines()]


def weights(path) -> dict:
    return state_dict_of(read_checkpoint(path))


def test_the_loss_falls_and_the_best_is_kept(trained):
    logged = scalars(trained)
    losses = [line['loss_cls'] for line in logged if 'loss_cls' in line]
    assert len(losses) == 4 * 6
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])
    accuracies = [line['accuracy/top1'] for line in logged
                  if 'accuracy/top1' in line]
    assert len(accuracies) == 4 and max(accuracies) > 90
    assert all('accuracy/top2' in line for line in logged
               if 'accuracy/top1' in line)
    best = next(trained.glob('best_accuracy_top1_epoch_*.pth'))
    first = accuracies.index(max(accuracies)) + 1
    assert best.stem.endswith(f'epoch_{first}')
    torch.load(trained / 'epoch_4.pth', weights_only=True)


@pytest.mark.parametrize('unit', ['iterations', 'epochs'])
def test_resumed_is_uninterrupted(packed, tmp_path, unit):
    """With mixup, CutMix, stochastic depth and router noise."""
    options = dict(model=dict(mixup=0.8, cutmix=1.),
                   backbone=dict(SWIN, moe=MOE),
                   hooks=[dict(type='rmoe.MoELossHook')])
    if unit == 'epochs':
        # and validation and augmentation, which draw random numbers too
        options['transforms'] = AUGMENTED

    def go(name, **more):
        config = classifier_config(packed, tmp_path / name, **options, **more)
        if unit == 'iterations':
            config.train_dataloader.sampler.type = 'InfiniteSampler'
            config.train_cfg = dict(type='IterBasedTrainLoop', max_iters=4,
                                    val_interval=10)
            config.default_hooks.checkpoint.update(by_epoch=False)
            config.log_processor = dict(by_epoch=False)
        runner = Runner.from_cfg(config)
        runner.train()
        return runner.model.state_dict()

    whole = go('whole')
    name = dict(iterations='iter_2.pth', epochs='epoch_2.pth')[unit]
    (tmp_path / 'parts').mkdir()
    shutil.copy(tmp_path / 'whole' / name, tmp_path / 'parts')
    resumed = go('parts', load_from=str(tmp_path / 'parts' / name),
                 resume=True)
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]), key


def test_same_seed_same_run(packed, tmp_path):
    states = [run_training(packed, tmp_path / name, epochs=1,
                           model=dict(mixup=0.8, cutmix=1.),
                           transforms=AUGMENTED).model.state_dict()
              for name in 'ab']
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


def test_through_the_tools(packed, tmp_path):
    config = classifier_config(packed, tmp_path / 'work', epochs=3)
    path = tmp_path / 'small.py'
    config.dump(path)
    work = tmp_path / 'work'
    command(train, path, '--work-dir', work, '--cfg-options',
            'train_cfg.max_epochs=2')
    assert not (work / 'epoch_3.pth').exists()
    command(train, path, '--work-dir', work, '--resume')
    assert (work / 'epoch_3.pth').exists()
    command(test_tool, path, work / 'epoch_3.pth', '--work-dir',
            tmp_path / 'test')
    result = json.loads(next((tmp_path / 'test').rglob('*.json')).read_text())
    epoch_3 = [line['accuracy/top1'] for file in work.rglob('scalars.json')
               for line in map(json.loads, file.read_text().splitlines())
               if 'accuracy/top1' in line and line['step'] == 3]
    assert result['accuracy/top1'] == pytest.approx(epoch_3[-1])


def test_tools_name_what_is_missing(packed, tmp_path):
    config = classifier_config(packed, tmp_path / 'work')
    config.train_dataloader.dataset.ann_file = 'other.npz'
    config.dump(tmp_path / 'small.py')
    with pytest.raises(SystemExit, match=r'other\.npz does not exist'):
        command(train, tmp_path / 'small.py')


def test_dense_upcycles_and_trains_in_stages(packed, trained, tmp_path):
    """The intermediate stage of RMoE-I."""
    dense = weights(trained / 'epoch_4.pth')
    runner = run_training(
        packed, tmp_path, epochs=2, backbone=dict(SWIN, moe=MOE),
        load_from=str(trained / 'epoch_4.pth'),
        hooks=[dict(type='rmoe.ResidualMoEHook', stages=STAGES),
               dict(type='rmoe.MoELossHook'),
               dict(type='rmoe.RoutingStatsHook', interval=6)])
    first = weights(tmp_path / 'epoch_1.pth')
    still = [key for key in dense if key.startswith('backbone.')]
    for key in still:  # the core stood still
        assert torch.equal(first[key], dense[key]), key
    assert not torch.equal(first['head.weight'], dense['head.weight'])
    assert first['backbone.stages.1.blocks.1.ffn.experts.'
                 'residual_fc1_weight'].any()
    last = runner.model.state_dict()
    assert not all(torch.equal(last[key], dense[key]) for key in still)
    # it went on from the trained classifier
    logged = scalars(tmp_path)
    assert logged[0]['loss_cls'] < 1.1 * scalars(trained)[-2]['loss_cls'] + .2
    assert 'loss_moe_importance' in logged[0]


def test_from_scratch_with_plain_experts(packed, tmp_path):
    run_training(
        packed, tmp_path, epochs=2,
        backbone=dict(SWIN, moe=dict(MOE, core=False)),
        hooks=[dict(type='rmoe.MoELossHook'),
               dict(type='rmoe.RoutingStatsHook', interval=6)])
    state = weights(tmp_path / 'epoch_2.pth')
    experts = 'backbone.stages.1.blocks.1.ffn.experts.residual_fc1_weight'
    assert state[experts].shape == (4, 64, 16)
    assert not any('blocks.1.ffn.layers' in key for key in state
                   if 'stages.1' in key)


def upcycled(checkpoint, model: dict, folder) -> dict:
    """What tools/upcycle.py makes of a checkpoint for a model."""
    from mmengine.config import Config
    Config(dict(model=model)).dump(folder / 'moe.py')
    command(upcycle, checkpoint, '--config', folder / 'moe.py', '--out',
            folder / 'moe.pth', '--size', 32)
    return weights(folder / 'moe.pth')


def test_upcycled_classifier_is_the_same_classifier(packed, trained,
                                                    tmp_path):
    model = classifier_config(packed, tmp_path).model
    dense = MODELS.build(model)
    dense.load_state_dict(weights(trained / 'epoch_4.pth'))
    model.backbone.moe = MOE
    state = upcycled(trained / 'epoch_4.pth', model, tmp_path)
    moe = MODELS.build(model)
    moe.load_state_dict(state)  # strict: the head is in the file
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(moe.eval()(images), dense.eval()(images),
                               atol=1e-5, rtol=0)


def test_classifier_becomes_the_backbone_of_a_segmentor(trained, tmp_path):
    import mmseg.models  # noqa: F401
    backbone = dict(SWIN, out_indices=(0, 1), moe=MOE)
    model = dict(
        type='mmseg.EncoderDecoder', backbone=backbone,
        decode_head=dict(
            type='mmseg.FCNHead', in_channels=16, in_index=1, channels=8,
            num_classes=3, norm_cfg=dict(type='BN')),
        train_cfg=dict(), test_cfg=dict(mode='whole'))
    checkpoint = trained / 'epoch_4.pth'
    state = upcycled(checkpoint, model, tmp_path)
    # the head of the classifier is none of a segmentor's
    assert all(key.startswith('backbone.') for key in state)
    direct = MODELS.build(dict(
        backbone, init_cfg=dict(type='Pretrained', prefix='backbone.',
                                checkpoint=str(checkpoint))))
    direct.init_weights()
    classifier = MODELS.build(SWIN)
    classifier.load_state_dict({
        key.removeprefix('backbone.'): value
        for key, value in weights(checkpoint).items()
        if key.startswith('backbone.')})
    with DefaultScope.overwrite_default_scope('mmseg'):
        segmentor = MODELS.build(model)
    segmentor.backbone.load_state_dict({
        key.removeprefix('backbone.'): value for key, value in state.items()})
    images = torch.randn(2, 3, 32, 32)
    expected = classifier.eval()(images)[-1]
    for backbone in (direct, segmentor.backbone):
        torch.testing.assert_close(backbone.eval()(images)[-1], expected,
                                   atol=1e-5, rtol=0)


def test_head_that_does_not_fit_the_data(packed, tmp_path):
    config = classifier_config(packed, tmp_path / 'a')
    config.model.num_classes = 5
    runner = Runner.from_cfg(config)
    message = 'has 3 classes and the head .* num_classes=5: set .*=3'
    with pytest.raises(ValueError, match='the training data ' + message):
        runner.train()
    for split, go in (('validation', runner.val), ('test', runner.test)):
        with pytest.raises(ValueError, match=f'the {split} data ' + message):
            go()


def test_validation_with_other_classes(packed, tmp_path):
    import numpy as np
    content = np.load(packed / 'val.npz')
    np.savez(tmp_path / 'val.npz', **dict(
        content, wnids=np.array(['n01', 'n03', 'n02'])))
    config = classifier_config(packed, tmp_path / 'work')
    config.val_dataloader.dataset.data_root = str(tmp_path)
    with pytest.raises(ValueError, match="label 1 is the class 'n02' in "
                       "training and 'n03' in validation"):
        Runner.from_cfg(config).train()


def test_image_that_breaks_in_training_is_named(packed, tmp_path):
    from small_classifier import draw_images, encode
    good = [encode(image) for image in draw_images(48)]
    good[17] = good[17][:200]
    pack(tmp_path / 'train.npz', good, [i % 3 for i in range(48)])
    shutil.copy(packed / 'val.npz', tmp_path)
    with pytest.raises(ValueError, match=r'image 17 of .*train\.npz'):
        run_training(tmp_path, tmp_path / 'work')
