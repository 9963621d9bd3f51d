"""Auxiliary losses of sparse routers: pure functions, tensors in, scalar out.

All are float32. Axis letters as in routing.py.
"""
import torch
from torch import Tensor


def squared_variation(values_E: Tensor) -> Tensor:
    """(std / mean)^2 with the population variance (V-MoE, 2106.05974)."""
    mean = values_E.mean()
    # An all-zero vector (no tokens) is balanced, not 0/0.
    return values_E.var(unbiased=False) / mean.square().clamp_min(1e-12)


def importance_loss(probs_TE: Tensor) -> Tensor:
    """CV^2 of the summed gate probabilities per expert (2106.05974, A.2)."""
    return squared_variation(probs_TE.sum(0))


def load_loss(logits_TE: Tensor, noisy_logits_TE: Tensor, top_k: int,
              noise_std: float) -> Tensor:
    """CV^2 of each expert's smooth probability of being chosen.

    p_e(x) = 1 - Phi((threshold - logit_e) / noise_std), the threshold being
    the k-th largest noisy logit of the token (2106.05974, A.2).

    Args:
        logits_TE: (T, E) noise-free logits.
        noisy_logits_TE: (T, E) the logits the choice was made by.
        top_k: K.
        noise_std: standard deviation of the noise that was added, > 0.
    """
    threshold_T1 = noisy_logits_TE.topk(top_k, dim=1).values[:, -1:]
    normal = torch.distributions.Normal(0., 1., validate_args=False)
    chosen_TE = 1. - normal.cdf((threshold_T1 - logits_TE) / noise_std)
    return squared_variation(chosen_TE.sum(0))


def gshard_loss(probs_TE: Tensor) -> Tensor:
    """E * sum_e f_e P_e (2006.16668; equal to Switch's, 2101.03961, eq. 4).

    f_e is the share of tokens whose first choice is e, P_e the mean
    probability of e: 1 when balanced, E when collapsed.
    """
    num_tokens, num_experts = probs_TE.shape
    first_choice_T = probs_TE.argmax(1)
    share_E = torch.bincount(
        first_choice_T, minlength=num_experts).to(probs_TE.dtype)
    scale = num_experts / max(num_tokens, 1)**2
    return scale * (share_E * probs_TE.sum(0)).sum()


def z_loss(logits_TE: Tensor) -> Tensor:
    """Mean squared log-partition of the logits (ST-MoE, 2202.08906, eq. 5)."""
    return torch.logsumexp(logits_TE, 1).square().sum() / max(
        len(logits_TE), 1)
