"""Batches that do not divide into groups of images are found before
training."""
import copy

import pytest
from mmengine.runner import Runner
from toy import BACKBONE, toy_config

from rmoe.engine.group_check import check_groups


def make_runner(folder, images=32, batch_size=4, sampler='DefaultSampler',
                drop_last=False, **router) -> Runner:
    backbone = copy.deepcopy(BACKBONE)
    backbone['moe']['router'].update(capacity_factor=1., **router)
    config = toy_config(folder, 2, [dict(type='rmoe.MoELossHook')], backbone)
    config.train_dataloader.update(
        dataset=dict(type='ToyImages', size=images), batch_size=batch_size,
        sampler=dict(type=sampler), drop_last=drop_last)
    return Runner.from_cfg(config)


@pytest.mark.parametrize('options', [
    dict(group=2), dict(group=2, images=30), dict(group='image', images=31),
    dict(group='batch', images=31), dict(group=1, images=31),
    dict(group=2, images=31, drop_last=True),
    dict(group=2, images=31, sampler='InfiniteSampler'),
    # the option for evaluation is checked only where there is an evaluation
    dict(eval_group=3)], ids=str)
def test_whole_groups_train(tmp_path, options):
    runner = make_runner(tmp_path, **options)
    runner.train()
    assert runner.iter == 2


@pytest.mark.parametrize('options, message', [
    (dict(group=2, images=31), 'the last batch of train_dataloader: 31 images '
     'in batches of batch_size=4 leave 3. Set drop_last=True'),
    (dict(group=4, images=30), 'leave 2'),
    (dict(group=3), 'train_dataloader.batch_size=4, the images of one'),
    (dict(group=8), 'train_dataloader.batch_size=4, the images of one')],
    ids=lambda it: str(it)[:20])
def test_a_short_batch_is_found_before_training(tmp_path, options, message):
    runner = make_runner(tmp_path, **options)
    with pytest.raises(ValueError, match=(
            f'group={options["group"]} of the router of MoE layer of stage 1, '
            f'block 0 does not divide.*{message}')):
        runner.train()
    assert runner.iter == 0


@pytest.mark.parametrize('images, batch_size, message', [
    (5, 2, 'leave 1. An evaluation drops nothing'),
    (6, 3, 'val_dataloader.batch_size=3')])
def test_evaluation_has_groups_of_its_own(tmp_path, images, batch_size,
                                          message):
    runner = make_runner(tmp_path, images, batch_size, eval_group=2)
    loader = runner.build_dataloader(runner._train_dataloader)
    check_groups(runner.model, 'group', 'train', loader)
    with pytest.raises(ValueError, match='eval_group=2 .*' + message):
        check_groups(runner.model, 'eval_group', 'val', loader)


def test_mmdet_batches_by_shape(tmp_path):
    runner = make_runner(tmp_path, group=2, images=31)
    dataloader = runner._train_dataloader
    dataloader['batch_sampler'] = dict(type='mmdet.AspectRatioBatchSampler')
    dataloader.pop('drop_last')
    with pytest.raises(ValueError, match='leave 3'):
        runner.train()
    dataloader['batch_sampler']['drop_last'] = True
    runner = make_runner(tmp_path, group=2, images=31)
    loader = dict(dataloader)
    check_groups(runner.model, 'group', 'train',
                 runner.build_dataloader(loader))
