"""The router of Soft MoE, which mixes tokens instead of choosing among them.

Axis letters as in routing.py.
"""
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rmoe.moe.registry import MODELS
from rmoe.moe.routers.base import Router
from rmoe.moe.routing import SoftRouting

# Added under the square root of the norm, as in the published code.
EPS = 1e-6


@MODELS.register_module()
class SoftRouter(Router):
    """Each slot is a mixture of all tokens of a group, and each token gets a
    mixture of the outputs of all slots (Soft MoE, 2308.00951).

    Logits are scale * cos(x, mu), where mu is a learned embedding of each
    slot. No token is dropped, tokens do not compete for slots, and there is no
    auxiliary loss. The cost grows with the number of slots and not with that
    of tokens.

    Args:
        dim: D, width of the tokens.
        num_experts: E.
        slots_per_expert: C, the same for every image size. If E * C equals
            the number of tokens of an image, the experts cost as much as the
            dense FFN.
        noise_std: in training, logits get Gaussian noise with the standard
            deviation noise_std / E.
        group: the tokens that are mixed with each other in training: those of
            an 'image', of the 'batch', or of a number of images.
        eval_group: the same in evaluation; 'image' makes results independent
            of the other images in the batch.

    Raises:
        ValueError: for options that make no sense.
    """
    soft = True

    def __init__(self,
                 dim: int,
                 num_experts: int,
                 slots_per_expert: int = 32,
                 noise_std: float = 0.,
                 group: str | int = 'image',
                 eval_group: str | int = 'image') -> None:
        super().__init__(num_experts, noise_std, group, eval_group)
        if slots_per_expert < 1:
            raise ValueError(f'slots_per_expert={slots_per_expert} must be at '
                             'least 1')
        self.slots_per_expert = slots_per_expert
        self.embeddings = nn.Parameter(
            torch.empty(num_experts, slots_per_expert, dim))
        self.scale = nn.Parameter(torch.empty(()))
        self.init_weights()

    def init_weights(self) -> None:
        # The standard deviation is that of a linear layer. Any other would
        # do, since embeddings are normalised.
        nn.init.trunc_normal_(self.embeddings,
                              std=math.sqrt(1 / self.embeddings.shape[-1]))
        nn.init.ones_(self.scale)

    @property
    def experts_per_token(self) -> float:
        return self.num_experts

    def _route(self, x_TD: Tensor, valid_T: Tensor | None,
               num_groups: int) -> SoftRouting:
        slots_ND = self._normalise(self.embeddings.float()).flatten(0, 1)
        # The scale is applied to the slots, of which there are usually fewer
        # than tokens.
        logits_TN = F.linear(self._normalise(x_TD),
                             self.scale.float() * slots_ND)
        logits_TN = self._add_noise(self._finite(logits_TN))
        logits_GSN = logits_TN.unflatten(
            0, (num_groups, len(x_TD) // num_groups))
        dispatch_logits = logits_GSN
        if valid_T is not None:
            # Not -inf, with which the softmax over a group of padding alone
            # would be nan.
            dispatch_logits = logits_GSN.masked_fill(
                ~valid_T.view(num_groups, -1, 1),
                torch.finfo(logits_GSN.dtype).min)
        return SoftRouting(
            dispatch_GSN=dispatch_logits.softmax(1),
            combine_GSN=logits_GSN.softmax(2),
            num_experts=self.num_experts, valid_T=valid_T)

    def _normalise(self, x: Tensor) -> Tensor:
        # The squared norms are checked, because after the normalisation even
        # a vector whose square overflows would give finite logits.
        squared = self._finite(
            x.square().sum(-1, keepdim=True).flatten(0, -2))
        return x * torch.rsqrt(squared.view(*x.shape[:-1], 1) + EPS)

    def extra_repr(self) -> str:
        return (f'num_experts={self.num_experts}, '
                f'slots_per_expert={self.slots_per_expert}')
