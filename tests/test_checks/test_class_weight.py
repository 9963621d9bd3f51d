"""mmseg's losses with class weights on label maps that have ignored pixels."""
import copy
import pickle

import pytest
import torch
from mmseg.models.losses import CrossEntropyLoss
from torch import nn
from torch.nn import functional as F

from rmoe.checks.class_weight import let_weights_meet_ignored_pixels

WEIGHTS = [.5, 1., 4.]
pytestmark = pytest.mark.filterwarnings('ignore:Default')


def loss_of(class_weight=WEIGHTS, **options):
    return CrossEntropyLoss(class_weight=class_weight, **options)


def stood_in(loss):
    assert let_weights_meet_ignored_pixels(nn.Sequential(loss)) == ['0']
    return loss


def pixels(ignored=True):
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, requires_grad=True)
    label = torch.randint(3, (2, 4, 5))
    if ignored:
        label[:, 1] = 255
    return logits, label


def test_mmseg_fails_and_the_stand_in_equals_torch():
    logits, label = pixels()
    loss = loss_of(avg_non_ignore=True)
    with pytest.raises(IndexError, match='index 255 is out of bounds'):
        loss(logits, label, ignore_index=255)
    ours = stood_in(loss)(logits, label, ignore_index=255)
    theirs = F.cross_entropy(logits, label, torch.tensor(WEIGHTS),
                             ignore_index=255)
    torch.testing.assert_close(ours, theirs)
    ours, theirs = (torch.autograd.grad(value, logits)[0]
                    for value in (ours, theirs))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize('options', [
    {}, dict(avg_non_ignore=True), dict(reduction='sum'),
    dict(reduction='none')])
def test_without_ignored_pixels_it_is_mmsegs(options):
    logits, label = pixels(ignored=False)
    loss = loss_of(**options)
    weight = torch.rand(2, 4, 5)
    before = [loss(logits, label, weight=each, ignore_index=255)
              for each in (None, weight)]
    stood_in(loss)
    for value, each in zip(before, (None, weight), strict=True):
        torch.testing.assert_close(
            loss(logits, label, weight=each, ignore_index=255), value)


@pytest.mark.parametrize('avg_non_ignore', [False, True])
def test_weights_of_one_change_nothing(avg_non_ignore):
    logits, label = pixels()
    plain = loss_of(None, avg_non_ignore=avg_non_ignore)
    ours = stood_in(loss_of([1., 1., 1.], avg_non_ignore=avg_non_ignore))
    torch.testing.assert_close(ours(logits, label, ignore_index=255),
                               plain(logits, label, ignore_index=255))


def test_nothing_but_ignored_pixels():
    logits, label = pixels()
    loss = stood_in(loss_of(avg_non_ignore=True))
    assert loss(logits, label.fill_(255), ignore_index=255) == 0


def test_other_losses_stay():
    model = nn.ModuleList([loss_of(None), loss_of(use_sigmoid=True),
                           nn.Conv2d(1, 1, 1)])
    criteria = [model[i].cls_criterion for i in (0, 1)]
    assert let_weights_meet_ignored_pixels(model) == []
    assert [model[i].cls_criterion for i in (0, 1)] == criteria
    # Another loss of mmseg is not changed, and a second call does nothing.
    loss = stood_in(loss_of())
    assert let_weights_meet_ignored_pixels(loss) == []
    assert loss_of().cls_criterion is criteria[0]
    for again in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        logits, label = pixels()
        assert again(logits, label, ignore_index=255).isfinite()
