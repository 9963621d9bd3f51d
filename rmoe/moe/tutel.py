"""The capacity rule and the losses of Tutel, where they differ from V-MoE's.

``tutel_compat=True`` of a token-choice router uses them, for checkpoints and
configs that were trained with Tutel (Swin-MoE).

Tutel: 2206.03382, github.com/microsoft/tutel. Axis letters as in routing.py.
"""
import torch
from torch import Tensor

from rmoe.moe.losses import of_valid
from rmoe.moe.routing import Count, ceil


def compute_capacity(num_tokens: Count, top_k: int, num_experts: int,
                     capacity_factor: float, multiple_of: int = 1) -> Count:
    """Slots per expert: k * floor(factor * ceil(S / E)), rounded up to a
    multiple.

    Args:
        num_tokens: S; a number, or a float64 tensor of numbers.
        top_k: K.
        num_experts: E.
        capacity_factor: only its absolute value counts. In Tutel, a negative
            factor also shortens buffers to the largest load, which does not
            change results.
        multiple_of: the result is a multiple of this.

    Raises:
        ValueError: if there are tokens but no slot; not checked for tensors.
    """
    capacity = top_k * (
        abs(capacity_factor) * ceil(num_tokens / num_experts) // 1)
    if isinstance(num_tokens, int) and num_tokens and not capacity:
        raise ValueError(
            f'capacity_factor={capacity_factor} leaves no slot per expert for '
            f"{num_tokens} tokens and {num_experts} experts by Tutel's rule: "
            'raise it, or set tutel_compat=False')
    return ceil(capacity / multiple_of) * multiple_of


def importance_loss(probs_TE: Tensor, valid_T: Tensor | None = None
                    ) -> Tensor:
    """CV^2, the squared coefficient of variation (std / mean)^2, of the summed
    gate probabilities per expert, with the unbiased variance."""
    return _squared_variation(of_valid(probs_TE, valid_T).sum(0))


def load_loss(logits_TE: Tensor, noisy_logits_TE: Tensor, top_k: int,
              noise_std: float, valid_T: Tensor | None = None) -> Tensor:
    """CV^2 of sum_t Phi((p_te - threshold_t) / noise_std).

    As in Tutel, p is the softmax of the noise-free logits, but the threshold
    is the k-th largest noisy *logit*. A probability is compared with a logit,
    so this is not the loss of V-MoE; ``rmoe.moe.losses.load_loss`` is.

    Args:
        logits_TE: (T, E) noise-free logits.
        noisy_logits_TE: (T, E) logits by which the choice was made.
        top_k: K.
        noise_std: standard deviation of the noise that was added, > 0.
        valid_T: (T,) bool, False for tokens that do not count; None means
            that all count.
    """
    threshold_T1 = noisy_logits_TE.topk(top_k, dim=1).values[:, -1:]
    distance_TE = (logits_TE.softmax(1) - threshold_T1) / noise_std
    chosen_TE = torch.special.ndtr(distance_TE)
    return _squared_variation(of_valid(chosen_TE, valid_T).sum(0))


def _squared_variation(values_E: Tensor) -> Tensor:
    if len(values_E) == 1:
        # One expert is always balanced, but its unbiased variance is 0 / 0.
        return 0 * values_E.sum()
    return values_E.var() / (values_E.mean().square() + 1e-10)
