"""A gradient norm is torch's; parts of gradients: test_fully_sharded.py."""
import pytest
import torch
from torch.nn.utils import clip_grad_norm_ as by_torch

pytestmark = pytest.mark.torch('2.8')


def parameters(scale=1.):
    torch.manual_seed(0)
    made = [torch.nn.Parameter(torch.zeros(shape))
            for shape in ((3, 4), (5, ), (), (0, 2), (2, ))]
    for parameter in made[:-1]:
        parameter.grad = scale * torch.randn(parameter.shape)
    return made


@pytest.mark.parametrize('norm_type', [1, 2, 3.5, float('inf'), 'inf'])
@pytest.mark.parametrize('max_norm', [.5, 1e3])
def test_it_is_torchs(norm_type, max_norm):
    from rmoe.parallel.clipping import clip_grad_norm_
    ours, theirs = parameters(), parameters()
    # torch has no infinity norm of nothing; a rank may have none of a short
    # parameter.
    torch.testing.assert_close(
        clip_grad_norm_(ours, max_norm, norm_type), by_torch(
            [one for one in theirs if one.numel()], max_norm, norm_type))
    for one, other in zip(ours[:-1], theirs):
        torch.testing.assert_close(one.grad, other.grad)
    assert ours[-1].grad is None


def test_not_finite():
    from rmoe.parallel.clipping import clip_grad_norm_
    made = parameters()
    made[0].grad[0, 0] = float('nan')
    before = made[1].grad.clone()
    with pytest.raises(RuntimeError, match=r'norm of order 2\.0 .* is nan'):
        clip_grad_norm_(made, 1., error_if_nonfinite=True)
    assert torch.equal(made[1].grad, before)
    assert clip_grad_norm_(made, 1.).isnan()


def test_nothing_to_clip():
    from rmoe.parallel.clipping import clip_grad_norm_
    assert clip_grad_norm_(parameters()[-1], 1.) == 0


def test_a_process_may_have_an_empty_part_of_all_there_is():
    from rmoe.parallel.clipping import clip_grad_norm_
    empty = torch.nn.Parameter(torch.zeros(0, 3))
    empty.grad = torch.zeros(0, 3)
    assert clip_grad_norm_(empty, 1.) == 0
