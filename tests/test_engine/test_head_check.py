"""A head that a checkpoint cannot fill is a warning before training, and an
error before an evaluation and in a resumed run."""
import copy

import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS
from mmengine.runner import Runner
from torch import nn
from toy import toy_config, toy_model

from rmoe.engine.head_check import unfilled


@METRICS.register_module(force=True)
class Count(BaseMetric):

    def process(self, data_batch, data_samples):
        self.results.append(len(data_samples))

    def compute_metrics(self, results):
        return dict(images=sum(results))


LOADER = dict(
    dataset=dict(type='ToyImages', size=4), batch_size=4, num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='default_collate'))
SPLITS = dict(
    val_cfg=dict(type='ValLoop'), val_dataloader=LOADER,
    val_evaluator=dict(type='Count'), test_cfg=dict(type='TestLoop'),
    test_dataloader=LOADER, test_evaluator=dict(type='Count'))


def state(**head):
    """The toy's weights with another head."""
    weights = toy_model().state_dict()
    for name in ('weight', 'bias'):
        del weights[f'head.{name}']
    return weights | {f'head.{name}': value for name, value in head.items()}


FITTING = dict(weight=torch.zeros(3, 16, 1, 1), bias=torch.zeros(3))
FIVE = dict(weight=torch.zeros(5, 16, 1, 1), bias=torch.zeros(5))


@pytest.mark.parametrize('head, found', [
    (FITTING, ''),
    (FIVE, '2 of 2 tensors outside the backbone: '
     'head.weight (3, 16, 1, 1) (in the checkpoint: (5, 16, 1, 1)), '
     'head.bias (3,) (in the checkpoint: (5,))'),
    (dict(bias=torch.zeros(3)), '1 of 2 tensors outside the backbone: '
     'head.weight (3, 16, 1, 1) (in the checkpoint: missing)'),
])
def test_what_is_not_filled(head, found):
    weights = state(**head)
    assert unfilled(toy_model(), dict(state_dict=weights)) == found
    # a bare state dict, and one of a model that DDP had wrapped
    assert unfilled(toy_model(), weights) == found
    assert unfilled(toy_model(), dict(state_dict={
        f'module.{key}': value for key, value in weights.items()})) == found


def test_classes_are_named():
    meta = dict(dataset_meta=dict(classes=['cat', 'dog', 'cow', 'car', 'bus']))
    assert unfilled(toy_model(), dict(state_dict=state(**FIVE), meta=meta)
                    ).endswith('is for 5 classes (cat, dog, cow, ...)')


def test_a_counter_of_batches_may_be_missing():
    model = nn.Sequential(nn.BatchNorm2d(3), *[
        nn.Conv2d(3, 3, 1) for _ in range(3)])
    weights = model.state_dict()
    del weights['0.num_batches_tracked']
    assert unfilled(model, weights) == ''
    weights = {key: value for key, value in weights.items() if key[0] == '0'}
    assert unfilled(model, weights).endswith(
        '2.bias (3,) (in the checkpoint: missing) and 2 more')


def make_runner(folder, head, **options) -> Runner:
    torch.save(dict(state_dict=state(**head)), folder / 'weights.pth')
    config = toy_config(folder, 2, load_from=str(folder / 'weights.pth'),
                        **copy.deepcopy(SPLITS), **options)
    config.train_cfg.val_interval = 1
    return Runner.from_cfg(config)


@pytest.mark.parametrize('what', ['val', 'test'])
def test_no_evaluation_of_random_weights(tmp_path, what):
    assert getattr(make_runner(tmp_path, FITTING), what)()['images'] == 4
    with pytest.raises(ValueError, match=r'random weights.*head\.weight'):
        getattr(make_runner(tmp_path, FIVE), what)()


def test_training_says_it_once_and_validates(tmp_path):
    runner = make_runner(tmp_path, FIVE)
    runner.train()
    runner.test()
    log = next(tmp_path.rglob('*.log')).read_text()
    assert log.count('initial values: the checkpoint cannot fill 2 of 2'
                     ) == 1
    assert log.index('Load checkpoint') < log.index('initial values')
