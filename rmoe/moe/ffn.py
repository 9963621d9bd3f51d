"""The MoE layer that replaces mmcv's FFN; our own backbones use it."""
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rmoe.moe.layer import MoELayer
from rmoe.moe.registry import MODELS


@MODELS.register_module()
class MoEFFN(MoELayer):
    """A FFN whose weights depend on the token: core + residual (2204.09636).

    The core has the parameter names of mmcv's FFN (``layers.0.0``,
    ``layers.1``), so a dense checkpoint is a valid core. Since residuals
    start at zero, a fresh layer computes the dense function exactly.

    Args:
        embed_dims: D.
        feedforward_channels: H.
        num_experts: E.
        router: config of a registered router; ``dim`` and ``num_experts``
            are filled in. None means ``dict(type='TokenChoiceRouter')``.
        core: False for plain experts without a core (the upper-bound MoE).
        rank: rank of the residuals; None for full rank.
        align: how the gates w weight the outputs E of the n experts that kept
            a token; sg is stop-gradient.
            'stopgrad' (RMoE): sum sg[(1/n - w) E] + w E. Forward is the mean
            of the experts, which has the scale of the dense FFN. Backward is
            that of the gated sum: with a gate of 0.2, the expert and the
            layers below get a fifth of the gradient of what forward computed.
            'straight_through': sum (1/n + w - sg[w]) E. Forward is the same.
            Experts and the layers below get the gradient of the mean, and the
            router gets the same as with 'stopgrad'.
            'none': sum w E.
            'renormalize': sum (w / sum w) E. With n = 1 the gate is then the
            constant 1, and the router gets no gradient from the task.
            With a soft router, experts are applied to slots and w are the
            combine weights.
            'difference': core(x) + sum w (E - core). This is the dense
            function as long as residuals are zero; it costs one more FFN on
            the tokens and one more on the slots.
            'none': sum w E, as published.
            None means 'stopgrad'; for a soft router it means 'difference' if
            there is a core and 'none' otherwise.
        unrouted: what a token gets that no expert kept: the output of the
            'core', or 'zero'. None means 'core' if there is one.
        act_cfg: activation; None means exact GELU.
        ffn_drop: dropout on hidden activations and on the output.
        dropout_layer: config of the layer (DropPath) applied before the
            identity is added; None for none.
        add_identity: whether to add the input or ``identity``.
        layer_scale_init_value: initial value of a learned factor per channel
            of the output (``gamma2``); 0 for no such factor.
        fc2_bias: False leaves out the bias of the second linear layer, as
            the published Swin-MoE models do.
        with_cp: recompute the experts in backward instead of keeping their
            activations. The router is not recomputed, so a token cannot
            change its expert between the two passes.

    Raises:
        ValueError: for an unknown option, or two options that contradict each
            other.
    """
    layers: nn.Sequential | None
    gamma2: nn.Module
    core_keys: Mapping[str, tuple[str, ...]] = {
        'fc1': ('layers.0.0', ), 'fc2': ('layers.1', )}

    def __init__(self,
                 embed_dims: int,
                 feedforward_channels: int,
                 num_experts: int = 8,
                 router: Mapping | None = None,
                 core: bool = True,
                 rank: int | None = None,
                 align: str | None = None,
                 unrouted: str | None = None,
                 act_cfg: Mapping | None = None,
                 ffn_drop: float = 0.,
                 dropout_layer: Mapping | None = None,
                 add_identity: bool = True,
                 layer_scale_init_value: float = 0.,
                 fc2_bias: bool = True,
                 with_cp: bool = False) -> None:
        act_cfg = act_cfg or dict(type='GELU')
        layers = nn.Sequential(
            nn.Sequential(
                nn.Linear(embed_dims, feedforward_channels),
                MODELS.build(act_cfg), nn.Dropout(ffn_drop)),
            nn.Linear(feedforward_channels, embed_dims, bias=fc2_bias),
            nn.Dropout(ffn_drop)) if core else None
        super().__init__(
            embed_dims, feedforward_channels, MODELS.build(act_cfg),
            core=dict(layers=layers) if layers is not None else None,
            num_experts=num_experts, router=router, rank=rank, align=align,
            unrouted=unrouted, dropout=ffn_drop, fc2_bias=fc2_bias,
            with_cp=with_cp)
        self.layers = layers
        self.add_identity = add_identity
        self.out_drop = nn.Dropout(ffn_drop)
        self.gamma2 = (LayerScale(embed_dims, layer_scale_init_value)
                       if layer_scale_init_value else nn.Identity())
        self.dropout_layer = (
            MODELS.build(dropout_layer) if dropout_layer else nn.Identity())

    @classmethod
    def from_dense(cls, ffn: Any, **moe: Any) -> 'MoEFFN':
        """Turn mmcv's FFN into a MoE FFN; its modules and weights become the
        core.

        Args:
            ffn: mmcv's FFN.
            moe: arguments of this class: any of ``num_experts``, ``router``,
                ``core``, ``rank``, ``align``, ``unrouted`` and ``with_cp``.

        Raises:
            ValueError: for a FFN that does not have two linear layers.
        """
        if ffn.num_fcs != 2:
            raise ValueError(f'a FFN with num_fcs={ffn.num_fcs} is not two '
                             'linear layers: it cannot become a MoE FFN')
        layer = cls(ffn.embed_dims, ffn.feedforward_channels,
                    ffn_drop=ffn.layers[0][2].p,
                    add_identity=ffn.add_identity, **moe)
        layer.experts.act = ffn.layers[0][1]
        layer.gamma2, layer.dropout_layer = ffn.gamma2, ffn.dropout_layer
        if layer.layers is not None:
            layer.layers = ffn.layers
        else:
            layer.experts.copy_from([ffn.layers[0][0]], [ffn.layers[1]])
        return layer

    def forward(self, x: Tensor, identity: Tensor | None = None,
                valid: Tensor | None = None) -> Tensor:
        """Compute the layer, with the signature and the identity of mmcv's
        FFN.

        Args:
            x: (..., D) tokens.
            identity: (..., D), added to the output; None means ``x``.
            valid: (...) bool, False for padded tokens, which go to no
                expert; None means all are valid.
        """
        if self.core_only:
            out = self._dense(x)
        else:
            out = self.out_drop(self.mixture(x, valid))
        out = self.dropout_layer(self.gamma2(out))
        if not self.add_identity:
            return out
        return (x if identity is None else identity) + out

    def _dense(self, x: Tensor) -> Tensor:
        assert self.layers is not None
        return self.layers(x)


class LayerScale(nn.Module):
    """A learned factor per channel (CaiT, 2103.17239), with the parameter
    name of mmcv's LayerScale."""

    def __init__(self, dim: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim, ), float(scale)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight
