"""Values worked out by hand or taken from the papers' definitions."""
import pytest
import torch

from rmoe.moe import losses

G1 = torch.tensor([[.5, .4, .1], [.3, .3, .4], [.1, .2, .7], [.8, .2, 0.]])


def test_importance():
    # sums 1.7, 1.1, 1.2: mean 4/3, var .20667/3 -> .03875
    assert losses.importance_loss(G1).item() == pytest.approx(0.03875)


def test_load():
    logits = torch.tensor([[.9, .06, .04], [.7, .18, .12], [.85, .05, .1]])
    noise = torch.tensor([[-.037, .026, -.018], [-.074, .045, -.015],
                          [-.067, -.059, .073]])
    loss = losses.load_loss(logits, logits + noise, top_k=2, noise_std=.1)
    assert loss.item() == pytest.approx(0.4857386, rel=1e-5)


def test_gshard():
    # first choices: experts 0, 2, 2, 0 -> f = .5, 0, .5;
    # P = .425, .275, .3; 3 * (.5 * .425 + .5 * .3) = 1.0875
    assert losses.gshard_loss(G1).item() == pytest.approx(1.0875)


@pytest.mark.parametrize('num_experts', [2, 8])
def test_gshard_is_one_when_balanced_and_e_when_collapsed(num_experts):
    balanced = torch.eye(num_experts)
    collapsed = balanced[:1].repeat(num_experts, 1)
    assert losses.gshard_loss(balanced).item() == pytest.approx(1)
    assert losses.gshard_loss(collapsed).item() == pytest.approx(num_experts)


def test_z_of_constant_logits():
    # logsumexp of four zeros is log 4
    loss = losses.z_loss(torch.zeros(5, 4))
    assert loss.item() == pytest.approx(torch.tensor(4.).log().item()**2)


@pytest.mark.parametrize('name', ['importance', 'gshard', 'z'])
def test_no_tokens_is_zero_and_differentiable(name):
    empty = torch.zeros(0, 4, requires_grad=True)
    loss = getattr(losses, f'{name}_loss')(empty)
    loss.backward()
    assert loss.item() == 0


def test_gradient_pushes_towards_balance():
    logits = torch.tensor([[2., 0.], [2., 0.], [2., 1.]], requires_grad=True)
    losses.importance_loss(logits.softmax(1)).backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1] < 0).all()


def random_logits() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits without noise, and with noise of standard deviation .3, in
    float64 for numerical gradients."""
    logits = torch.randn(6, 4, dtype=torch.float64)
    noisy = logits + .3 * torch.randn_like(logits)
    return logits.requires_grad_(), noisy.requires_grad_()


VALID = pytest.mark.parametrize('valid', [
    None, torch.tensor([True, False, True, True, True, False])],
    ids=['all valid', 'padded'])


def test_gradient_of_the_variation():
    values = (1 + torch.rand(2, 5, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(losses.squared_variation, values)


@VALID
@pytest.mark.parametrize('k', [1, 2, 4])
def test_gradients_of_the_load(k, valid):
    """The loss has gradients with respect to the logits, and to the noisy
    logit that is the threshold."""
    assert torch.autograd.gradcheck(
        lambda *inputs: losses.load_loss(*inputs, k, .3, valid),
        random_logits())


@VALID
@pytest.mark.parametrize('k', [1, 2])
def test_both_balance_losses_are_one_and_the_other(k, valid):
    found, wanted = [], []
    logits, noisy = random_logits()
    for out, (importance, load) in (
            (found, losses.balance_losses(logits, noisy, k, .3, valid)),
            (wanted, (losses.importance_loss(logits.softmax(1), valid),
                      losses.load_loss(logits, noisy, k, .3, valid)))):
        out += [importance, load, *torch.autograd.grad(
            2 * importance + 3 * load, (logits, noisy))]
    torch.testing.assert_close(found, wanted)
