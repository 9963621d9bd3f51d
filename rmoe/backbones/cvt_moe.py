"""Convolutional vision Transformer (CvT) with mixture-of-experts FFNs.

CvT: 2103.15808. The original model has three stages, whose maps have strides
of 4, 8 and 16 pixels.
"""
from collections.abc import Mapping, Sequence
from math import prod

import torch
from mmcv.cnn import build_norm_layer
from mmengine.model import constant_init, trunc_normal_init
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rmoe.backbones.base import MoEBackbone, PreNormBlock
from rmoe.backbones.conv_attention import ConvAttention
from rmoe.backbones.ffn import FFNPlan
from rmoe.backbones.padding import ValidArea, area_of
from rmoe.registry import MODELS
from rmoe.upcycling.keymaps import CVT

# embed_dims, depths, num_heads
ARCHITECTURES = {
    '13': ((64, 192, 384), (1, 2, 10), (1, 3, 6)),
    '21': ((64, 192, 384), (1, 4, 16), (1, 3, 6)),
    'w24': ((192, 768, 1024), (2, 2, 20), (3, 12, 16)),
}


class ConvEmbed(nn.Module):
    """Embedding of overlapping patches: a convolution with a stride, then a
    norm."""

    def __init__(self, in_channels: int, embed_dims: int, kernel: int,
                 stride: int, padding: int, norm_cfg: Mapping) -> None:
        super().__init__()
        self.projection = nn.Conv2d(in_channels, embed_dims, kernel, stride,
                                    padding)
        self.norm = build_norm_layer(dict(norm_cfg), embed_dims)[1]

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(B, C, height, width) to (B, h w, D) and (h, w)."""
        x = self.projection(x)
        height, width = x.shape[2:]
        return self.norm(x.flatten(2).transpose(1, 2)), (height, width)


class CvTStage(nn.Module):
    """The embedding and the blocks of one resolution."""

    def __init__(self, patch_embed: ConvEmbed, blocks: Sequence[PreNormBlock],
                 cls_dims: int | None, drop_rate: float, stride: int
                 ) -> None:
        super().__init__()
        self.stride = stride  # Pixels of the image per token of the stage.
        self.patch_embed = patch_embed
        self.cls_token = nn.Parameter(
            torch.zeros(1, 1, cls_dims)) if cls_dims else None
        self.drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, area: ValidArea | None
                ) -> tuple[Tensor, tuple[int, int]]:
        """Compute the stage.

        Args:
            x: (B, C, height, width), the image or the map of the stage before.
            area: the part of the batch that is not padding; None for all.

        Returns:
            (B, h w, D), without the class token, and (h, w).
        """
        x, hw = self.patch_embed(x)
        leading = 0
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
            leading = 1
        x = self.drop(x)
        valid = area and area.tokens(hw, self.stride, x.device, leading)
        for block in self.blocks:
            x = block(x, hw, valid=valid)
        return (x if self.cls_token is None else x[:, 1:]), hw


@MODELS.register_module()
class CvTMoE(MoEBackbone):
    """CvT whose FFNs can be mixtures of experts.

    It returns maps with strides of 4, 8 and 16 pixels. UPerNet takes these
    three as they are; mmdet's FPN adds coarser ones (``add_extra_convs``,
    ``num_outs``). A checkpoint that does not fill every dense weight is
    refused; see ``rmoe.upcycling``.

    Args:
        arch: '13', '21' or 'w24', or None to give ``embed_dims``, ``depths``
            and ``num_heads``.
        moe: None for a dense backbone, or a dict with ``layers`` (block
            indices per stage, e.g. ``((), (), (1, 3, 5, 7, 9))``),
            ``expert_mismatch`` ('raise', 'tile', 'slice' or 'merge': what to
            do with a checkpoint of another expert count), and arguments of
            :class:`rmoe.moe.MoEFFN`.
        in_channels: image channels.
        embed_dims: width of each stage.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        patch_sizes: kernel of each stage's embedding.
        strides: stride of each stage's embedding.
        patch_padding: padding of each stage's embedding.
        mlp_ratio: hidden width of the FFNs divided by the model width.
        out_indices: stages whose feature maps are returned.
        qkv_bias: bias of query, key and value.
        drop_rate: dropout in embeddings, projections and FFNs.
        attn_drop_rate: dropout on attention weights.
        drop_path_rates: for each stage, the rate of stochastic depth in its
            last block; it rises linearly from 0 in the first one.
        with_cls_token: True gives the last stage a class token, as for
            classification. It takes part in attention and FFNs and is left
            out of the map.
        act_cfg: activation; None means QuickGELU, which the original weights
            need. Weights of Hugging Face need ``dict(type='GELU')``.
        norm_cfg: norm layer; None means LN.
        bn_cfg: batch norm of the convolutional projections; None means BN,
            ``dict(type='SyncBN')`` shares statistics between GPUs.
        norm_eval: True keeps the statistics of batch norms as they were
            loaded, for training with small batches.
        with_cp: activation checkpointing (non-reentrant).
        frozen_stages: freeze the first n stages; 0 freezes none, and so does
            -1, which is the default of other backbones too.
        init_cfg: mmengine's initialisation config.

    Raises:
        ValueError: for an unknown ``arch``, a stage out of range, or a
            ``moe`` that selects no block.
    """

    architecture = CVT

    def __init__(self,
                 arch: str | None = None,
                 moe: Mapping | None = None,
                 in_channels: int = 3,
                 embed_dims: Sequence[int] = (64, 192, 384),
                 depths: Sequence[int] = (1, 2, 10),
                 num_heads: Sequence[int] = (1, 3, 6),
                 patch_sizes: Sequence[int] = (7, 3, 3),
                 strides: Sequence[int] = (4, 2, 2),
                 patch_padding: Sequence[int] = (2, 1, 1),
                 mlp_ratio: float = 4,
                 out_indices: Sequence[int] = (0, 1, 2),
                 qkv_bias: bool = True,
                 drop_rate: float = 0.,
                 attn_drop_rate: float = 0.,
                 drop_path_rates: Sequence[float] = (0., 0., 0.1),
                 with_cls_token: bool = True,
                 act_cfg: Mapping | None = None,
                 norm_cfg: Mapping | None = None,
                 bn_cfg: Mapping | None = None,
                 norm_eval: bool = False,
                 with_cp: bool = False,
                 frozen_stages: int = -1,
                 init_cfg: Mapping | None = None) -> None:
        super().__init__(init_cfg=init_cfg)
        if arch is not None:
            if arch not in tuple(ARCHITECTURES):
                raise ValueError(f'arch={arch!r} is not one of '
                                 f'{tuple(ARCHITECTURES)}')
            embed_dims, depths, num_heads = ARCHITECTURES[arch]
        _check_structure(
            len(depths), out_indices, frozen_stages, embed_dims=embed_dims,
            num_heads=num_heads, patch_sizes=patch_sizes, strides=strides,
            patch_padding=patch_padding, drop_path_rates=drop_path_rates)
        act_cfg = act_cfg or dict(type='rmoe.QuickGELU')
        norm_cfg = norm_cfg or dict(type='LN')
        self.depths = tuple(depths)
        self.embed_dims = tuple(embed_dims)
        self.out_indices = tuple(out_indices)
        self.frozen_stages = max(frozen_stages, 0)
        self.norm_eval = norm_eval

        plan = FFNPlan(depths, moe, with_cp)
        self.stages = nn.ModuleList()
        for stage, (depth, width) in enumerate(zip(depths, embed_dims)):
            blocks = []
            for block in range(depth):
                drop_path = dict(
                    type='DropPath', drop_prob=drop_path_rates[stage] *
                    block / max(depth - 1, 1))
                attn = ConvAttention(width, num_heads[stage], qkv_bias,
                                     attn_drop_rate, drop_rate, drop_path,
                                     bn_cfg or dict(type='BN'))
                ffn = plan.build(stage, block, width, int(mlp_ratio * width),
                                 act_cfg, drop_rate, drop_path)
                blocks.append(PreNormBlock(width, norm_cfg, attn, ffn,
                                           with_cp))
            embed = ConvEmbed(
                embed_dims[stage - 1] if stage else in_channels, width,
                patch_sizes[stage], strides[stage], patch_padding[stage],
                norm_cfg)
            last = stage == len(depths) - 1
            self.stages.append(CvTStage(
                embed, blocks, width if last and with_cls_token else None,
                drop_rate, prod(strides[:stage + 1])))
        for i in self.out_indices:
            self.add_module(
                f'norm{i}', build_norm_layer(dict(norm_cfg), embed_dims[i])[1])
        self.finish(moe)

    def init_weights(self) -> None:
        """Load as ``init_cfg`` says; without one, initialise as CvT does."""
        if self.init_cfg is not None:
            super().init_weights()
            return
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_init(module, std=.02, bias=0.)
            elif isinstance(module, (nn.LayerNorm, _BatchNorm)):
                constant_init(module, val=1.0, bias=0.)
            elif isinstance(module, CvTStage) and (
                    module.cls_token is not None):
                nn.init.trunc_normal_(module.cls_token, std=.02)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, C, height, width) images to the maps (B, D_i, h_i, w_i) of the
        stages in ``out_indices``."""
        area = area_of(self, x)
        outs = []
        for i, stage in enumerate(self.stages):
            tokens, hw = stage(x, area)
            x = tokens.transpose(1, 2).unflatten(2, hw)
            if i in self.out_indices:
                out = getattr(self, f'norm{i}')(tokens)
                outs.append(out.transpose(1, 2).unflatten(2, hw).contiguous())
        return tuple(outs)

    def train(self, mode: bool = True) -> 'CvTMoE':
        """Set training or evaluation mode; frozen modules stay in evaluation
        mode, and with ``norm_eval`` all batch norms do."""
        super().train(mode)
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def frozen_modules(self) -> list[nn.Module]:
        norms = [getattr(self, f'norm{i}') for i in self.out_indices
                 if i < self.frozen_stages]
        return [*self.stages[:self.frozen_stages], *norms]

    def get_layer_depth(self, param_name: str,
                        prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter, for layer-wise learning-rate decay.

        Args:
            param_name: full name of the parameter.
            prefix: prefix of this backbone's names, e.g. ``'backbone.'``.

        Returns:
            The depth (0: the first embedding) and the number of depths.
            Parameters outside this backbone get the last depth.
        """
        num_layers = sum(self.depths) + 2
        parts = param_name.removeprefix(prefix).split('.')
        if not param_name.startswith(prefix) or parts[0] != 'stages':
            return num_layers - 1, num_layers
        stage = int(parts[1])
        # The embedding of a later stage has the depth of the block before it.
        block = int(parts[3]) + 1 if parts[2] == 'blocks' else 0
        return sum(self.depths[:stage]) + block, num_layers


def _check_structure(stages: int, out_indices: Sequence[int],
                     frozen_stages: int, **per_stage: Sequence) -> None:
    for name, values in per_stage.items():
        if len(values) != stages:
            raise ValueError(f'{name}={values} must have one entry for each '
                             f'of the {stages} stages in depths')
    for index in out_indices:
        if not 0 <= index < stages:
            raise ValueError(f'out_indices points at stage {index}, but the '
                             f'{stages} stages are numbered from 0')
    for width, heads in zip(per_stage['embed_dims'], per_stage['num_heads']):
        if width % heads:
            raise ValueError(f'num_heads={heads} must divide the width '
                             f'{width} of its stage')
    if not -1 <= frozen_stages <= stages:
        raise ValueError(f'frozen_stages={frozen_stages} must lie between -1 '
                         f'and the {stages} stages')
