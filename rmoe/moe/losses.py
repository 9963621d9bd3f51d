"""Auxiliary losses of sparse routers, as pure functions.

They push a router towards balanced loads of the experts. The functions named
``*_loss`` take tensors and return a float32 scalar, to which routers apply a
weight. ``valid_T``, (T,), is False for tokens that do not count (padding);
None means that all count. Axis letters as in routing.py.
"""
import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def of_valid(values: Tensor, valid_T: Tensor | None) -> Tensor:
    """(T, ...), the values with zeros for tokens that do not count. These are
    not cut off, so that shapes do not depend on their number."""
    if valid_T is None:
        return values
    return values.masked_fill(
        ~valid_T.view(-1, *[1] * (values.dim() - 1)), 0.)


def squared_variation(values: Tensor) -> Tensor:
    """CV^2, the squared coefficient of variation (std / mean)^2, over the last
    axis, with the population variance (V-MoE, 2106.05974). It is 0 if all
    values are equal."""
    return _SquaredVariation.apply(values)


class _SquaredVariation(torch.autograd.Function):
    """:func:`squared_variation` in a quarter of the operators that autograd
    would need."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        var, mean = torch.var_mean(values, -1, correction=0, keepdim=True)
        # The minimum makes an all-zero vector (no tokens) balanced; without
        # it the result would be 0 / 0.
        square = mean.square().clamp_min(1e-12)
        out = var / square
        ctx.save_for_backward(values, mean, square, out)
        return out[..., 0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        values, mean, square, out = ctx.saved_tensors
        # d = 2 / E ((v - mean) - (var / mean^2) mean) / mean^2
        slope = values - (1 + out) * mean
        return slope * (grad[..., None] / square) * (2 / values.shape[-1])


def importance_loss(probs_TE: Tensor, valid_T: Tensor | None = None
                    ) -> Tensor:
    """CV^2 of the gate probabilities per expert, summed over tokens
    (2106.05974, A.2)."""
    return squared_variation(of_valid(probs_TE, valid_T).sum(0))


def load_loss(logits_TE: Tensor, noisy_logits_TE: Tensor, top_k: int,
              noise_std: float, valid_T: Tensor | None = None) -> Tensor:
    """CV^2 of each expert's probability of being chosen, summed over tokens.

    The load itself, a count, has no gradient. The probability has one: expert
    e is chosen for token x, if its noise were drawn anew, with p_e(x) =
    1 - Phi((threshold - logit_e) / noise_std). The threshold is the k-th
    largest noisy logit of the token, Phi the normal distribution function
    (2106.05974, A.2).

    Args:
        logits_TE: (T, E) noise-free logits.
        noisy_logits_TE: (T, E) logits by which the choice was made.
        top_k: K.
        noise_std: standard deviation of the noise that was added, > 0.
        valid_T: (T,) bool, False for tokens that do not count.
    """
    return squared_variation(twice_chosen(logits_TE, noisy_logits_TE, top_k,
                                          noise_std, valid_T))


def twice_chosen(logits_TE: Tensor, noisy_logits_TE: Tensor, top_k: int,
                 noise_std: float, valid_T: Tensor | None = None) -> Tensor:
    """(E,), twice the sum over tokens of each expert's probability p of being
    chosen. Arguments as for :func:`load_loss`, which is CV^2 of the result.

    Twice the probability is cheaper, because 2 p is
    erfc((threshold - logit) / (sqrt(2) noise_std)); CV^2 is the same.
    """
    return _TwiceChosen.apply(logits_TE, noisy_logits_TE, top_k, noise_std,
                              valid_T)


class _TwiceChosen(torch.autograd.Function):
    """:func:`twice_chosen` in a third of the operators that autograd would
    need."""

    @staticmethod
    def forward(ctx, logits_TE: Tensor, noisy_logits_TE: Tensor, top_k: int,
                noise_std: float, valid_T: Tensor | None) -> Tensor:
        if top_k == 1:
            threshold_T1, chosen_T1 = noisy_logits_TE.max(1, keepdim=True)
        else:
            best = noisy_logits_TE.topk(top_k, dim=1)
            threshold_T1, chosen_T1 = (best.values[:, -1:],
                                       best.indices[:, -1:])
        scale = 1 / (math.sqrt(2) * noise_std)
        missing_TE = (threshold_T1 - logits_TE).mul_(scale)
        ctx.save_for_backward(missing_TE, chosen_T1, valid_T)
        ctx.scale = scale
        return of_valid(torch.erfc(missing_TE), valid_T).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_E: Tensor):
        missing_TE, chosen_T1, valid_T = ctx.saved_tensors
        # erfc'(z) = -2 / sqrt(pi) exp(-z^2)
        slope_TE = missing_TE.square().neg_().exp_()
        slope_TE.mul_(grad_E * (2 * ctx.scale / math.sqrt(math.pi)))
        slope_TE = of_valid(slope_TE, valid_T)
        grad_noisy = None
        if ctx.needs_input_grad[1]:
            # The threshold is one of the noisy logits, and takes part in the
            # probabilities of all experts: its gradient is minus their sum.
            grad_noisy = torch.zeros_like(slope_TE).scatter_(
                1, chosen_T1, slope_TE.sum(1, keepdim=True).neg_())
        return slope_TE, grad_noisy, None, None, None


def balance_losses(logits_TE: Tensor, noisy_logits_TE: Tensor, top_k: int,
                   noise_std: float, valid_T: Tensor | None = None
                   ) -> tuple[Tensor, Tensor]:
    """Return :func:`importance_loss` of the noise-free softmax and
    :func:`load_loss`. Computing both together takes fewer operators than
    computing one after the other."""
    mass_E = of_valid(logits_TE.softmax(1), valid_T).sum(0)
    chosen_E = twice_chosen(logits_TE, noisy_logits_TE, top_k, noise_std,
                            valid_T)
    importance, load = squared_variation(
        torch.stack([mass_E, chosen_E])).unbind()
    return importance, load


def gshard_loss(probs_TE: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """E * sum_e f_e P_e (2006.16668; equal to Switch's, 2101.03961, eq. 4).

    f_e is the share of tokens whose first choice is expert e, and P_e the mean
    probability of e. The loss is 1 if loads are balanced, and E if all tokens
    choose one expert with probability 1.
    """
    num_experts = probs_TE.shape[1]
    experts = torch.arange(num_experts, device=probs_TE.device)
    first_TE = (probs_TE.argmax(1, keepdim=True) == experts).to(probs_TE.dtype)
    share_E = of_valid(first_TE, valid_T).sum(0)
    mass_E = of_valid(probs_TE, valid_T).sum(0)
    scale = num_experts / _count(probs_TE, valid_T)**2
    return scale * (share_E * mass_E).sum()


def z_loss(logits_TE: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """Mean over tokens of the squared logsumexp of the logits (ST-MoE,
    2202.08906, eq. 5). It keeps the logits small."""
    squared_T = torch.logsumexp(logits_TE, 1).square()
    return of_valid(squared_T, valid_T).sum() / _count(logits_TE, valid_T)


def _count(values: Tensor, valid_T: Tensor | None) -> Tensor | int:
    """The number of tokens that count, but at least one."""
    if valid_T is None:
        return max(len(values), 1)
    return valid_T.sum().clamp_min(1)
