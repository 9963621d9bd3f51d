import pytest
import torch
from mmengine.registry import METRICS
from small_classifier import accuracy_of_a_rank
from two_ranks import run_two_ranks

from rmoe.classification import Accuracy


def samples():
    # Places of the right class among the scores: first, third, second,
    # second, fourth.
    return [
        dict(pred_score=torch.tensor(scores), gt_label=label)
        for scores, label in (([.7, .1, .2, 0.], 0), ([.5, .2, .3, .0], 1),
                              ([.1, .2, .3, .4], 2), ([.0, .4, .6, .0], 1),
                              ([.4, .3, .2, .1], 3))]


def test_worked_by_hand():
    metric = Accuracy(topk=(1, 2, 3))
    metric.process(None, samples()[:3])
    metric.process(None, samples()[3:])
    results = metric.evaluate(5)
    assert results == {'accuracy/top1': pytest.approx(20.),
                       'accuracy/top2': pytest.approx(60.),
                       'accuracy/top3': pytest.approx(80.)}


def test_padding_of_the_last_batch_is_not_counted():
    # The sampler repeats images so that all ranks have as many.
    metric = Accuracy(topk=(1, ))
    metric.process(None, samples() + samples()[:1])
    assert metric.evaluate(5)['accuracy/top1'] == pytest.approx(20.)


def test_two_ranks_count_every_image_once(tmp_path):
    for results in run_two_ranks(accuracy_of_a_rank, str(tmp_path),
                                 [0, 1, 3, 0, 0]):
        assert results == {'accuracy/top1': pytest.approx(60.),
                           'accuracy/top2': pytest.approx(80.)}


def test_is_found_by_name():
    metric = METRICS.build(dict(type='rmoe.Accuracy'))
    assert metric.topk == (1, 5)


@pytest.mark.parametrize('topk', [(), (0, 1), (-1, )])
def test_bad_topk(topk):
    with pytest.raises(ValueError, match='topk='):
        Accuracy(topk=topk)


def test_more_places_than_classes():
    metric = Accuracy(topk=(1, 5))
    with pytest.raises(ValueError, match=r'topk=\(1, 5\) asks for more than '
                       'the 4 classes'):
        metric.process(None, samples())
