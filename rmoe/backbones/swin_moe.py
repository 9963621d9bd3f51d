"""Swin Transformer with mixture-of-experts FFNs.

Swin: 2103.14030. Parameters have the names of mmseg's and mmdet's
SwinTransformer, so its checkpoints load as they are.
"""
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks.transformer import PatchEmbed
from mmengine.model import constant_init, trunc_normal_init
from torch import Tensor, nn
from torch.nn import functional as F

from rmoe.backbones.base import MoEBackbone, PreNormBlock
from rmoe.backbones.ffn import FFNPlan
from rmoe.backbones.padding import area_of
from rmoe.backbones.window_attention import (
    ShiftedWindowAttention,
    WindowAttention,
    shift_mask,
)
from rmoe.registry import MODELS
from rmoe.upcycling.keymaps import SWIN

# embed_dims, depths, num_heads
ARCHITECTURES = {
    'tiny': (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    'small': (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    'base': (128, (2, 2, 18, 2), (4, 8, 16, 32)),
    'large': (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}


class PatchMerging(nn.Module):
    """Join 2x2 neighbouring tokens: halve the map and double the width.

    The joined channels have the order of nn.Unfold, as in mmcv's
    PatchMerging.
    """

    def __init__(self, in_channels: int, out_channels: int,
                 norm_cfg: Mapping | None) -> None:
        super().__init__()
        self.norm = build_norm_layer(
            dict(norm_cfg), 4 * in_channels)[1] if norm_cfg else None
        self.reduction = nn.Linear(4 * in_channels, out_channels, bias=False)

    def forward(self, x: Tensor, hw: tuple[int, int]
                ) -> tuple[Tensor, tuple[int, int]]:
        batch, _, dims = x.shape
        height, width = hw
        x = x.view(batch, height, width, dims)
        if height % 2 or width % 2:
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        hw = (x.shape[1] // 2, x.shape[2] // 2)
        x = x.view(batch, hw[0], 2, hw[1], 2, dims).permute(0, 1, 3, 5, 2, 4)
        x = x.reshape(batch, hw[0] * hw[1], 4 * dims)
        if self.norm is not None:
            x = self.norm(x)
        return self.reduction(x), hw


class SwinStage(nn.Module):
    """The blocks of one resolution, and the merging step to the next."""

    def __init__(self, blocks: Sequence[PreNormBlock],
                 downsample: PatchMerging | None, window_size: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.window_size = window_size

    def forward(self, x: Tensor, hw: tuple[int, int],
                valid: Tensor | None) -> Tensor:
        # All shifted blocks of the stage use the same mask.
        mask = shift_mask(hw, self.window_size, x.device)
        for block in self.blocks:
            x = block(x, hw, mask, valid=valid)
        return x

    def step_down(self, x: Tensor, hw: tuple[int, int]
                  ) -> tuple[Tensor, tuple[int, int]]:
        """Reduce the map to the next stage's resolution. In the last stage,
        return it unchanged."""
        return (x, hw) if self.downsample is None else self.downsample(x, hw)


@MODELS.register_module()
class SwinMoE(MoEBackbone):
    """Swin Transformer whose FFNs can be mixtures of experts.

    Without ``moe`` it computes what mmseg's and mmdet's SwinTransformer
    compute, with the same parameter names. A checkpoint that does not fill
    every dense weight is refused; see ``rmoe.upcycling``.

    Args:
        arch: 'tiny', 'small', 'base' or 'large', or None to give
            ``embed_dims``, ``depths`` and ``num_heads``.
        moe: None for a dense backbone, or a dict with ``layers`` (block
            indices per stage, e.g. ``((), (), (1, 3, 5), (1,))``),
            ``expert_mismatch`` ('raise', 'tile', 'slice' or 'merge': what to
            do with a checkpoint of another expert count), and arguments of
            :class:`rmoe.moe.MoEFFN`.
        pretrain_img_size: side of the images in pixels, or height and width,
            for which the absolute position table is stored.
        in_channels: image channels.
        embed_dims: width of the first stage.
        patch_size: side of a patch in pixels.
        window_size: side of an attention window in tokens, one for all
            stages or one for each.
        pretrained_window_size: None for Swin V1's table of position biases.
            A size, or one for each stage, selects Swin-MoE's log-spaced
            continuous bias, whose coordinates are normalised for windows of
            that size.
        shift_small_maps: True shifts windows even if one covers a whole side
            of the map, as mmseg and mmdet do. The original Swin, timm's and
            Swin-MoE do not.
        mlp_ratio: hidden width of the FFNs divided by the model width.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        strides: strides of the patch embedding and of each merging step.
        out_indices: stages whose feature maps are returned.
        qkv_bias: bias of query, key and value.
        qk_scale: attention scale; None means head_dim ** -0.5.
        fc2_bias: bias of the FFNs' second layer; Swin-MoE has none.
        patch_norm: norm after patch embedding and before merging.
        drop_rate: dropout in projections and FFNs.
        attn_drop_rate: dropout on attention weights.
        drop_path_rate: stochastic depth, rising linearly over blocks.
        use_abs_pos_embed: add an absolute position table.
        act_cfg: activation; None means exact GELU.
        norm_cfg: norm layer; None means LN.
        with_cp: activation checkpointing (non-reentrant).
        pretrained: checkpoint to start from. Older configs use this name, and
            mmseg's segmentors pass on their own ``pretrained`` to it.
        convert_weights: ignored. In mmdet's configs it says that the file is
            one of the original Swin; here a file is recognised by its keys.
        frozen_stages: freeze the patch embedding (0) and the first n stages;
            -1 freezes nothing.
        init_cfg: mmengine's initialisation config.

    Raises:
        ValueError: for an unknown ``arch``, a stage out of range, a
            ``moe`` that selects no block, a ``pretrain_img_size`` of more
            than two sides, or ``pretrained`` beside ``init_cfg``.
    """

    architecture = SWIN

    def __init__(self,
                 arch: str | None = None,
                 moe: Mapping | None = None,
                 pretrain_img_size: int | Sequence[int] = 224,
                 in_channels: int = 3,
                 embed_dims: int = 96,
                 patch_size: int = 4,
                 window_size: int | Sequence[int] = 7,
                 pretrained_window_size: int | Sequence[int] | None = None,
                 shift_small_maps: bool = True,
                 mlp_ratio: float = 4,
                 depths: Sequence[int] = (2, 2, 6, 2),
                 num_heads: Sequence[int] = (3, 6, 12, 24),
                 strides: Sequence[int] = (4, 2, 2, 2),
                 out_indices: Sequence[int] = (0, 1, 2, 3),
                 qkv_bias: bool = True,
                 qk_scale: float | None = None,
                 fc2_bias: bool = True,
                 patch_norm: bool = True,
                 drop_rate: float = 0.,
                 attn_drop_rate: float = 0.,
                 drop_path_rate: float = 0.1,
                 use_abs_pos_embed: bool = False,
                 act_cfg: Mapping | None = None,
                 norm_cfg: Mapping | None = None,
                 with_cp: bool = False,
                 pretrained: str | None = None,
                 convert_weights: bool = False,
                 frozen_stages: int = -1,
                 init_cfg: Mapping | None = None) -> None:
        super().__init__(init_cfg=_start(pretrained, init_cfg))
        if arch is not None:
            if arch not in tuple(ARCHITECTURES):
                raise ValueError(f'arch={arch!r} is not one of '
                                 f'{tuple(ARCHITECTURES)}')
            embed_dims, depths, num_heads = ARCHITECTURES[arch]
        _check_structure(depths, num_heads, strides, patch_size, out_indices,
                         frozen_stages)
        sides = _two_sides(pretrain_img_size)
        act_cfg = act_cfg or dict(type='GELU')
        norm_cfg = norm_cfg or dict(type='LN')
        merge_norm_cfg = norm_cfg if patch_norm else None
        self.depths = tuple(depths)
        self.patch_size = patch_size
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        windows = _per_stage('window_size', window_size, len(depths))
        self.pretrained_window_sizes = _per_stage(
            'pretrained_window_size', pretrained_window_size, len(depths))
        self.num_features = [embed_dims * 2**i for i in range(len(depths))]

        self.patch_embed = PatchEmbed(
            in_channels=in_channels, embed_dims=embed_dims,
            conv_type='Conv2d', kernel_size=patch_size, stride=strides[0],
            padding='corner',
            norm_cfg=dict(norm_cfg) if patch_norm else None)
        self.absolute_pos_embed = None
        if use_abs_pos_embed:
            self.position_grid = (sides[0] // patch_size,
                                  sides[1] // patch_size)
            self.absolute_pos_embed = nn.Parameter(torch.zeros(
                1, self.position_grid[0] * self.position_grid[1], embed_dims))
        self.drop_after_pos = nn.Dropout(drop_rate)

        plan = FFNPlan(depths, moe, with_cp)
        last_block = max(sum(depths) - 1, 1)
        drop_paths = [drop_path_rate * i / last_block
                      for i in range(sum(depths))]
        self.stages = nn.ModuleList()
        for stage, (depth, width) in enumerate(
                zip(depths, self.num_features)):
            blocks = []
            for block in range(depth):
                drop_path = dict(
                    type='DropPath',
                    drop_prob=drop_paths[sum(depths[:stage]) + block])
                attn = ShiftedWindowAttention(
                    windows[stage], windows[stage] // 2 if block % 2 else 0,
                    drop_path, shift_small_maps,
                    dict(embed_dims=width, num_heads=num_heads[stage],
                         qkv_bias=qkv_bias, qk_scale=qk_scale,
                         attn_drop_rate=attn_drop_rate,
                         proj_drop_rate=drop_rate,
                         pretrained_window_size=self.pretrained_window_sizes[
                             stage]))
                ffn = plan.build(stage, block, width, int(mlp_ratio * width),
                                 act_cfg, drop_rate, drop_path,
                                 fc2_bias=fc2_bias)
                blocks.append(PreNormBlock(width, norm_cfg, attn, ffn, with_cp))
            last = stage == len(depths) - 1
            downsample = None if last else PatchMerging(
                width, 2 * width, merge_norm_cfg)
            self.stages.append(
                SwinStage(blocks, downsample, windows[stage]))
        for i in self.out_indices:
            self.add_module(
                f'norm{i}',
                build_norm_layer(dict(norm_cfg), self.num_features[i])[1])

        self.finish(moe)
        if frozen_stages >= 0 and self.absolute_pos_embed is not None:
            self.absolute_pos_embed.requires_grad = False

    def init_weights(self) -> None:
        """Load as ``init_cfg`` says; without one, initialise as Swin does."""
        if self.init_cfg is None:
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    trunc_normal_init(module, std=.02, bias=0.)
                elif isinstance(module, nn.LayerNorm):
                    constant_init(module, val=1.0, bias=0.)
                elif isinstance(module, WindowAttention):
                    module.init_table()
            if self.absolute_pos_embed is not None:
                nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)
        else:
            super().init_weights()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, C, height, width) images to the maps (B, D_i, h_i, w_i) of the
        stages in ``out_indices``."""
        area = area_of(self, x)
        x, hw = self.patch_embed(x)
        if self.absolute_pos_embed is not None:
            x = x + self._position_table(self.absolute_pos_embed, hw)
        x = self.drop_after_pos(x)
        outs = []
        for i, stage in enumerate(self.stages):
            assert isinstance(stage, SwinStage)
            x = stage(x, hw, area and area.tokens(
                hw, self.patch_size * 2**i, x.device))
            if i in self.out_indices:
                out = getattr(self, f'norm{i}')(x)
                out = out.transpose(1, 2).reshape(len(out), -1, *hw)
                outs.append(out.contiguous())
            x, hw = stage.step_down(x, hw)
        return tuple(outs)

    def _position_table(self, table: Tensor,
                        hw: tuple[int, int]) -> Tensor:
        """The absolute position table, resized for a map of size ``hw``."""
        if hw == self.position_grid:
            return table
        grid = table.transpose(1, 2).unflatten(2, self.position_grid)
        grid = F.interpolate(grid, hw, mode='bicubic', align_corners=False)
        return grid.flatten(2).transpose(1, 2)

    def frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        frozen: list[nn.Module] = [self.patch_embed, self.drop_after_pos]
        for i in range(self.frozen_stages):
            frozen.append(self.stages[i])
            if i in self.out_indices:
                frozen.append(getattr(self, f'norm{i}'))
        return frozen

    def get_layer_depth(self, param_name: str,
                        prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter, for layer-wise learning-rate decay.

        Args:
            param_name: full name of the parameter.
            prefix: prefix of this backbone's names, e.g. ``'backbone.'``.

        Returns:
            The depth (0: patch embedding) and the number of depths.
            Parameters outside this backbone get the last depth.
        """
        num_layers = sum(self.depths) + 2
        parts = param_name.removeprefix(prefix).split('.')
        if not param_name.startswith(prefix) or parts[0] not in (
                'patch_embed', 'absolute_pos_embed', 'stages'):
            return num_layers - 1, num_layers
        if parts[0] != 'stages':
            return 0, num_layers
        stage = int(parts[1])
        block = (int(parts[3]) if parts[2] == 'blocks'
                 else self.depths[stage] - 1)
        return sum(self.depths[:stage]) + block + 1, num_layers


def _per_stage(name: str, value: Any, stages: int) -> list:
    """Return a list with one value for each stage, from such a list or from
    one value for all.

    Args:
        name: the option's name, for the message.
        value: its value.
        stages: number of stages.
    """
    if value is None or isinstance(value, int):
        return [value] * stages
    if len(value) != stages:
        raise ValueError(f'{name}={value} must be one size or one for each '
                         f'of the {stages} stages')
    return list(value)


def _two_sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Return height and width, given one number for both or two."""
    sides = (size, ) if isinstance(size, int) else tuple(size)
    if len(sides) not in (1, 2) or not all(
            isinstance(side, int) for side in sides):
        raise ValueError(f'pretrain_img_size={size!r} must be one side of the '
                         'image in pixels, or height and width')
    return sides[0], sides[-1]


def _start(pretrained: str | None, init_cfg: Mapping | None
           ) -> Mapping | None:
    """Return ``init_cfg``, or the one that has the meaning of the option
    ``pretrained`` of older configs."""
    if pretrained is None:
        return init_cfg
    if init_cfg:
        raise ValueError(f'pretrained={pretrained!r} and init_cfg='
                         f'{dict(init_cfg)} both say what to start from; '
                         'remove one')
    if not isinstance(pretrained, str):
        raise ValueError(f'pretrained={pretrained!r} is no path or URL of a '
                         'checkpoint; pretrained=None starts from scratch')
    return dict(type='Pretrained', checkpoint=pretrained)


def _check_structure(depths: Sequence[int], num_heads: Sequence[int],
                     strides: Sequence[int], patch_size: int,
                     out_indices: Sequence[int], frozen_stages: int) -> None:
    stages = len(depths)
    if len(num_heads) != stages or len(strides) != stages:
        raise ValueError(f'depths={depths}, num_heads={num_heads} and '
                         f'strides={strides} must be of one length')
    if strides[0] != patch_size:
        raise ValueError(f'strides[0]={strides[0]} must equal patch_size='
                         f'{patch_size}')
    if any(stride != 2 for stride in strides[1:]):
        raise ValueError(f'strides={strides}: merging steps have stride 2')
    for value in out_indices:
        if not 0 <= value < stages:
            raise ValueError(f'out_indices points at stage {value}, but the '
                             f'{stages} stages are numbered from 0')
    if not -1 <= frozen_stages <= stages:
        raise ValueError(f'frozen_stages={frozen_stages} must lie between -1 '
                         f'and the {stages} stages')
