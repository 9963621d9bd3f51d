"""Vision Transformer with mixture-of-experts FFNs.

ViT: 2010.11929; V-MoE: 2106.05974. Parameters have the names of mmseg's
VisionTransformer, so its checkpoints load as they are.
"""
from collections.abc import Mapping, Sequence

import torch
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks.drop import build_dropout
from mmcv.cnn.bricks.transformer import PatchEmbed
from mmengine.model import constant_init, trunc_normal_init
from torch import Tensor, nn
from torch.nn import functional as F

from rmoe.backbones.base import MoEBackbone, PreNormBlock
from rmoe.backbones.ffn import FFNPlan
from rmoe.backbones.padding import area_of
from rmoe.moe.ffn import LayerScale
from rmoe.moe.placement import choose_blocks
from rmoe.registry import MODELS
from rmoe.upcycling.keymaps import VIT

# embed_dims, depth, num_heads, hidden width of the FFNs
ARCHITECTURES = {
    'tiny': (192, 12, 3, 768),
    'small': (384, 12, 6, 1536),
    'base': (768, 12, 12, 3072),
    'large': (1024, 24, 16, 4096),
    'huge': (1280, 32, 16, 5120),
    'vmoe-small': (512, 8, 8, 2048),
    'vmoe-15b': (1408, 48, 16, 6400),
}


class InProjection(nn.Module):
    """Multi-head self-attention with the parameter names of
    torch.nn.MultiheadAttention.

    Args:
        embed_dims: D.
        num_heads: heads; must divide ``embed_dims``.
        bias: whether query, key and value have biases.
        drop_rate: dropout on attention weights.
    """

    def __init__(self, embed_dims: int, num_heads: int, bias: bool,
                 drop_rate: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.drop_rate = drop_rate
        self.in_proj_weight = nn.Parameter(
            torch.empty(3 * embed_dims, embed_dims))
        self.in_proj_bias = nn.Parameter(
            torch.empty(3 * embed_dims)) if bias else None
        self.out_proj = nn.Linear(embed_dims, embed_dims)
        self.init_weights()

    def init_weights(self) -> None:
        nn.init.trunc_normal_(self.in_proj_weight, std=0.02)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dims = x.shape
        query, key, value = F.linear(
            x, self.in_proj_weight, self.in_proj_bias).reshape(
                batch, tokens, 3, self.num_heads, dims // self.num_heads
            ).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(
            query, key, value,
            dropout_p=self.drop_rate if self.training else 0.)
        return self.out_proj(x.transpose(1, 2).reshape(batch, tokens, dims))


class SelfAttention(nn.Module):
    """The attention branch of a block: self-attention, dropout, LayerScale
    and drop path. The block adds the identity."""

    def __init__(self, embed_dims: int, num_heads: int, qkv_bias: bool,
                 attn_drop_rate: float, drop_rate: float,
                 layer_scale_init_value: float, drop_path: Mapping) -> None:
        super().__init__()
        self.attn = InProjection(embed_dims, num_heads, qkv_bias,
                                 attn_drop_rate)
        self.proj_drop = nn.Dropout(drop_rate)
        self.gamma1 = (LayerScale(embed_dims, layer_scale_init_value)
                       if layer_scale_init_value else nn.Identity())
        self.dropout_layer = build_dropout(dict(drop_path))

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout_layer(self.gamma1(self.proj_drop(self.attn(x))))


@MODELS.register_module()
class ViTMoE(MoEBackbone):
    """Vision Transformer whose FFNs can be mixtures of experts.

    Without ``moe`` it computes what mmseg's VisionTransformer computes, with
    the same parameter names. A checkpoint that does not fill every dense
    weight is refused; see ``rmoe.upcycling``.

    Args:
        arch: 'tiny', 'small', 'base', 'large', 'huge', 'vmoe-small' or
            'vmoe-15b', or None to give ``embed_dims``, ``num_layers``,
            ``num_heads`` and ``mlp_dims``.
        moe: None for a dense backbone, or a dict with ``layers`` (block
            indices, ``dict(every=n)`` or ``dict(last=n)``),
            ``expert_mismatch`` ('raise', 'tile', 'slice' or 'merge': what to
            do with a checkpoint of another expert count), and arguments of
            :class:`rmoe.moe.MoEFFN`.
        img_size: image size in pixels, a side or (height, width), for which
            the position embedding is stored; it is resized for other images.
        patch_size: side of a patch in pixels.
        in_channels: image channels.
        patch_bias: whether the patch embedding has a bias; in mmseg's configs
            and in CLIP it has none.
        pre_norm: norm before the first block, as in CLIP.
        embed_dims: model width.
        num_layers: blocks.
        num_heads: attention heads.
        mlp_dims: hidden width of the FFNs.
        out_indices: blocks whose feature maps are returned.
        qkv_bias: bias of query, key and value.
        drop_rate: dropout in projections and FFNs.
        attn_drop_rate: dropout on attention weights.
        drop_path_rate: stochastic depth, rising linearly over blocks.
        with_cls_token: prepend a class token.
        output_cls_token: return (map, class token) for each output.
        final_norm: norm after the last block.
        layer_scale_init_value: initial value of LayerScale's factors, as in
            DeiT III and DINOv2; 0 for no LayerScale.
        antialias: whether the position embedding is resized with
            antialiasing. timm does so; mmseg and Hugging Face do not.
        act_cfg: activation; None means exact GELU.
        norm_cfg: norm layer; None means LN with eps 1e-6.
        with_cp: activation checkpointing (non-reentrant).
        frozen_stages: freeze the embeddings (0) and the first n blocks; -1
            freezes nothing.
        init_cfg: mmengine's initialisation config.

    Raises:
        ValueError: for an unknown ``arch``, a block out of range, or a
            ``moe`` that selects no block.
    """

    architecture = VIT

    def __init__(self,
                 arch: str | None = None,
                 moe: Mapping | None = None,
                 img_size: int | tuple[int, int] = 224,
                 patch_size: int = 16,
                 in_channels: int = 3,
                 patch_bias: bool = True,
                 pre_norm: bool = False,
                 embed_dims: int = 768,
                 num_layers: int = 12,
                 num_heads: int = 12,
                 mlp_dims: int = 3072,
                 out_indices: Sequence[int] = (-1, ),
                 qkv_bias: bool = True,
                 drop_rate: float = 0.,
                 attn_drop_rate: float = 0.,
                 drop_path_rate: float = 0.,
                 with_cls_token: bool = True,
                 output_cls_token: bool = False,
                 final_norm: bool = True,
                 layer_scale_init_value: float = 0.,
                 antialias: bool = True,
                 act_cfg: Mapping | None = None,
                 norm_cfg: Mapping | None = None,
                 with_cp: bool = False,
                 frozen_stages: int = -1,
                 init_cfg: Mapping | None = None) -> None:
        super().__init__(init_cfg=init_cfg)
        if arch is not None:
            if arch not in tuple(ARCHITECTURES):
                raise ValueError(f'arch={arch!r} is not one of '
                                 f'{tuple(ARCHITECTURES)}')
            embed_dims, num_layers, num_heads, mlp_dims = ARCHITECTURES[arch]
        if output_cls_token and not with_cls_token:
            raise ValueError('output_cls_token=True needs '
                             'with_cls_token=True')
        if embed_dims % num_heads:
            raise ValueError(f'num_heads={num_heads} must divide embed_dims='
                             f'{embed_dims}')
        act_cfg = act_cfg or dict(type='GELU')
        norm_cfg = norm_cfg or dict(type='LN', eps=1e-6)
        self.num_layers = num_layers
        self.patch_size = patch_size
        self.embed_dims = embed_dims
        self.out_indices = _check_blocks(out_indices, num_layers,
                                         frozen_stages)
        self.frozen_stages = frozen_stages
        self.output_cls_token = output_cls_token
        self.antialias = antialias
        height, width = ((img_size, img_size) if isinstance(img_size, int)
                         else img_size)
        self.position_grid = (height // patch_size, width // patch_size)

        self.patch_embed = PatchEmbed(
            in_channels=in_channels, embed_dims=embed_dims,
            conv_type='Conv2d', kernel_size=patch_size, stride=patch_size,
            padding='corner', bias=patch_bias)
        tokens = self.position_grid[0] * self.position_grid[1]
        self.cls_token = nn.Parameter(
            torch.zeros(1, 1, embed_dims)) if with_cls_token else None
        self.pos_embed = nn.Parameter(
            torch.zeros(1, tokens + with_cls_token, embed_dims))
        self.drop_after_pos = nn.Dropout(drop_rate)
        self.ln_pre = build_norm_layer(
            dict(norm_cfg), embed_dims)[1] if pre_norm else None

        if moe and 'layers' in moe:
            moe = dict(moe, layers=(choose_blocks(moe['layers'],
                                                  num_layers), ))
        plan = FFNPlan([num_layers], moe, with_cp)
        self.layers = nn.ModuleList()
        for block in range(num_layers):
            drop_path = dict(
                type='DropPath',
                drop_prob=drop_path_rate * block / max(num_layers - 1, 1))
            attn = SelfAttention(embed_dims, num_heads, qkv_bias,
                                 attn_drop_rate, drop_rate,
                                 layer_scale_init_value, drop_path)
            ffn = plan.build(
                0, block, embed_dims, mlp_dims, act_cfg, drop_rate, drop_path,
                layer_scale_init_value=layer_scale_init_value)
            self.layers.append(
                PreNormBlock(embed_dims, norm_cfg, attn, ffn, with_cp,
                             norms=('ln1', 'ln2')))
        # The final norm has the name that mmseg gives it.
        self.ln1 = build_norm_layer(
            dict(norm_cfg), embed_dims)[1] if final_norm else None
        self.finish(moe)
        if frozen_stages >= 0:
            self.pos_embed.requires_grad = False
            if self.cls_token is not None:
                self.cls_token.requires_grad = False

    def init_weights(self) -> None:
        """Load as ``init_cfg`` says; without one, initialise as timm's ViT
        does."""
        if self.init_cfg is not None:
            super().init_weights()
            return
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_init(module, std=.02, bias=0.)
            elif isinstance(module, nn.LayerNorm):
                constant_init(module, val=1.0, bias=0.)
            elif isinstance(module, InProjection):
                module.init_weights()
        nn.init.trunc_normal_(self.pos_embed, std=.02)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=1e-6)

    def forward(self, x: Tensor) -> tuple:
        """(B, C, height, width) images to the maps (B, D, h, w) of the blocks
        in ``out_indices``. With ``output_cls_token``, each output is a pair of
        the map and the class token (B, D)."""
        area = area_of(self, x)
        x, hw = self.patch_embed(x)
        valid = area and area.tokens(
            hw, self.patch_size, x.device,
            leading=int(self.cls_token is not None))
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        x = self.drop_after_pos(x + self._positions(hw))
        if self.ln_pre is not None:
            x = self.ln_pre(x)
        outs = []
        for i, layer in enumerate(self.layers):
            x = layer(x, valid=valid)
            if i == self.num_layers - 1 and self.ln1 is not None:
                x = self.ln1(x)
            if i in self.out_indices:
                out = x if self.cls_token is None else x[:, 1:]
                out = out.transpose(1, 2).unflatten(2, hw).contiguous()
                outs.append((out, x[:, 0]) if self.output_cls_token else out)
        return tuple(outs)

    def _positions(self, hw: tuple[int, int]) -> Tensor:
        """The position embedding, resized for a map of size ``hw``."""
        if hw == self.position_grid:
            return self.pos_embed
        first = 0 if self.cls_token is None else 1
        grid = self.pos_embed[:, first:].transpose(1, 2).unflatten(
            2, self.position_grid)
        grid = F.interpolate(grid.float(), hw, mode='bicubic',
                             align_corners=False, antialias=self.antialias)
        grid = grid.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)
        return torch.cat([self.pos_embed[:, :first], grid], 1)

    def frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        first = [self.patch_embed, self.drop_after_pos]
        if self.ln_pre is not None:
            first.append(self.ln_pre)
        return [*first, *self.layers[:self.frozen_stages]]

    def get_layer_depth(self, param_name: str,
                        prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter, for layer-wise learning-rate decay.

        Args:
            param_name: full name of the parameter.
            prefix: prefix of this backbone's names, e.g. ``'backbone.'``.

        Returns:
            The depth (0: embeddings) and the number of depths. Parameters
            outside this backbone get the last depth.
        """
        num_depths = self.num_layers + 2
        parts = param_name.removeprefix(prefix).split('.')
        if param_name.startswith(prefix):
            if parts[0] in ('patch_embed', 'cls_token', 'pos_embed',
                            'ln_pre'):
                return 0, num_depths
            if parts[0] == 'layers':
                return int(parts[1]) + 1, num_depths
        return num_depths - 1, num_depths


def _check_blocks(out_indices: Sequence[int], num_layers: int,
                  frozen_stages: int) -> tuple[int, ...]:
    """Return the indices of blocks with negative ones, which count from the
    last block, made positive.

    Raises:
        ValueError: for a block that does not exist.
    """
    if not -1 <= frozen_stages <= num_layers:
        raise ValueError(f'frozen_stages={frozen_stages} must lie between -1 '
                         f'and the {num_layers} blocks')
    for index in out_indices:
        if not -num_layers <= index < num_layers:
            raise ValueError(f'out_indices={tuple(out_indices)} points at '
                             f'block {index}, but the {num_layers} blocks '
                             'are numbered from 0')
    return tuple(index % num_layers for index in out_indices)
