"""Auxiliary losses of sparse routers: pure functions, tensors in, scalar out.

All are float32. In each, (T,) ``valid_T`` is False for the tokens that do not
count; None means that all do. Axis letters as in routing.py.
"""
import torch
from torch import Tensor


def of_valid(values: Tensor, valid_T: Tensor | None) -> Tensor:
    """(T, ...) with zeros for tokens that do not count: not cut off, so that
    shapes do not depend on their number."""
    if valid_T is None:
        return values
    return values.masked_fill(
        ~valid_T.view(-1, *[1] * (values.dim() - 1)), 0.)


def squared_variation(values_E: Tensor) -> Tensor:
    """(std / mean)^2 with the population variance (V-MoE, 2106.05974)."""
    mean = values_E.mean()
    # An all-zero vector (no tokens) is balanced, not 0/0.
    return values_E.var(unbiased=False) / mean.square().clamp_min(1e-12)


def importance_loss(probs_TE: Tensor, valid_T: Tensor | None = None
                    ) -> Tensor:
    """CV^2 of the summed gate probabilities per expert (2106.05974, A.2)."""
    return squared_variation(of_valid(probs_TE, valid_T).sum(0))


def load_loss(logits_TE: Tensor, noisy_logits_TE: Tensor, top_k: int,
              noise_std: float, valid_T: Tensor | None = None) -> Tensor:
    """CV^2 of each expert's smooth probability of being chosen.

    p_e(x) = 1 - Phi((threshold - logit_e) / noise_std), the threshold being
    the k-th largest noisy logit of the token (2106.05974, A.2).

    Args:
        logits_TE: (T, E) noise-free logits.
        noisy_logits_TE: (T, E) the logits the choice was made by.
        top_k: K.
        noise_std: standard deviation of the noise that was added, > 0.
        valid_T: (T,) bool.
    """
    threshold_T1 = noisy_logits_TE.topk(top_k, dim=1).values[:, -1:]
    normal = torch.distributions.Normal(0., 1., validate_args=False)
    chosen_TE = 1. - normal.cdf((threshold_T1 - logits_TE) / noise_std)
    return squared_variation(of_valid(chosen_TE, valid_T).sum(0))


def gshard_loss(probs_TE: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """E * sum_e f_e P_e (2006.16668; equal to Switch's, 2101.03961, eq. 4).

    f_e is the share of tokens whose first choice is e, P_e the mean
    probability of e: 1 when balanced, E when collapsed.
    """
    num_experts = probs_TE.shape[1]
    experts = torch.arange(num_experts, device=probs_TE.device)
    first_TE = (probs_TE.argmax(1, keepdim=True) == experts).to(probs_TE.dtype)
    share_E = of_valid(first_TE, valid_T).sum(0)
    mass_E = of_valid(probs_TE, valid_T).sum(0)
    scale = num_experts / _count(probs_TE, valid_T)**2
    return scale * (share_E * mass_E).sum()


def z_loss(logits_TE: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """Mean squared log-partition of the logits (ST-MoE, 2202.08906, eq. 5)."""
    squared_T = torch.logsumexp(logits_TE, 1).square()
    return of_valid(squared_T, valid_T).sum() / _count(logits_TE, valid_T)


def _count(values: Tensor, valid_T: Tensor | None) -> Tensor | int:
    """How many tokens count, at least one."""
    if valid_T is None:
        return max(len(values), 1)
    return valid_T.sum().clamp_min(1)
