"""The backbone of the variants 'e2-cut' and 'e8-cut' of the plan 'recipe'."""
from collections.abc import Mapping
from typing import Any

import torch
from mmcv.cnn.bricks.transformer import FFN
from mmseg.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

from rmoe import compat
from rmoe.backbones import ViTMoE
from rmoe.backbones.ffn import layer_args
from rmoe.moe import MoEFFN
from rmoe.upcycling.clusters import spherical_kmeans

PARTS = ('shared', 'routed.0', 'routed.1')


class CutFFN(nn.Module):
    """A FFN that was cut: identity + shared(x) + moe_0(x) + moe_1(x).

    The first part has half of the hidden units and serves all tokens. Each of
    the other two has a quarter, and experts, of which a token gets one. So a
    token chooses two small experts, at the operations of the whole FFN
    (fine-grained and shared experts, 2401.06066).

    Args:
        embed_dims: D.
        feedforward_channels: H, a multiple of 4.
        moe: arguments of the two MoE FFNs.
    """

    def __init__(self, embed_dims: int, feedforward_channels: int,
                 moe: Mapping[str, Any]) -> None:
        super().__init__()
        self.shared = FFN(embed_dims, feedforward_channels // 2,
                          act_cfg=dict(type='GELU'), add_identity=False)
        self.routed = nn.ModuleList(
            MoEFFN(embed_dims, feedforward_channels // 4, fc2_bias=False,
                   add_identity=False, **moe) for _ in range(2))

    def forward(self, x: Tensor, identity: Tensor) -> Tensor:
        return identity + self.shared(x) + sum(
            part(x) for part in self.routed)


@MODELS.register_module()
class CutViT(ViTMoE):
    """A ViTMoE whose MoE FFNs are cut as in :class:`CutFFN`.

    ``moe.num_experts`` is the number of experts for each quarter of the hidden
    units. It loads checkpoints of a dense ViTMoE, whose function it computes
    until residuals move, and its own.
    """

    def finish(self, moe: Mapping | None) -> None:
        for block in self.layers:
            if isinstance(block.ffn, MoEFFN):
                block.ffn = CutFFN(*block.ffn.experts.widths, layer_args(moe))
        # Checkpoints are cut before they are compared with the model.
        compat.register_load_hook(self, _cut_checkpoint)
        super().finish(moe)


def _cut_checkpoint(model: nn.Module, state_dict: dict[str, Tensor],
                    prefix: str, *_: Any) -> None:
    """Replace the weights of each dense FFN by those of its three parts."""
    for name, module in model.named_modules():
        if not isinstance(module, CutFFN):
            continue
        at = f'{prefix}{name}.'
        if f'{at}layers.1.weight' not in state_dict:
            continue  # It was cut before.
        (fc1_HD, bias_H), (fc2_DH, bias_D) = (
            [state_dict.pop(f'{at}layers.{layer}.{part}')
             for part in ('weight', 'bias')] for layer in ('0.0', '1'))
        for part, units in zip(PARTS, cut(fc1_HD, fc2_DH)):
            to = f'{at}{part}.layers.'
            state_dict[f'{to}0.0.weight'] = fc1_HD[units]
            state_dict[f'{to}0.0.bias'] = bias_H[units]
            state_dict[f'{to}1.weight'] = fc2_DH[:, units]
        state_dict[f'{at}shared.layers.1.bias'] = bias_D


def cut(fc1_HD: Tensor, fc2_DH: Tensor) -> list[Tensor]:
    """Choose the hidden units of the three parts of a FFN.

    Those that can change the output most, by the product of the lengths of
    their input and output weights, are shared. The others are split into two
    clusters of equal size, by the directions of their input weights.

    Args:
        fc1_HD: (H, D), the weight of the first linear layer.
        fc2_DH: (D, H), the weight of the second.

    Returns:
        The indices of the H / 2 shared units and of twice H / 4 others.
    """
    size_H = fc1_HD.norm(dim=1) * fc2_DH.norm(dim=0)
    shared, others = size_H.argsort(descending=True, stable=True).chunk(2)
    x_ND = F.normalize(fc1_HD[others].float(), dim=1)
    first_D, second_D = spherical_kmeans(x_ND, 2,
                                         torch.Generator().manual_seed(0))
    nearer = (x_ND @ (first_D - second_D)).argsort(descending=True,
                                                   stable=True)
    return [shared, *others[nearer].chunk(2)]
