"""Names of weights in Swin checkpoints. Ours are those of mmseg and mmdet."""
from collections.abc import Callable
from typing import Any

from torch import Tensor

from rmoe.upcycling.keymaps.resizing import (
    resize_bias_table,
    resize_position_embedding,
)
from rmoe.upcycling.keymaps.source import Architecture, Rule, Source
from rmoe.upcycling.keymaps.swin_moe import (
    LEFT_OUT,
    MOE_RULES,
    POSITION_BIAS,
    SWIN_V2,
    check_settings,
)


def to_unfold_order(tensor: Tensor) -> Tensor:
    """Reorder the channels of patch merging from (w, h, C) to nn.Unfold's
    (C, h, w).

    Microsoft's release, timm and Hugging Face join the four neighbours in the
    order (0,0), (1,0), (0,1), (1,1), and the channels of each stay together.
    OpenMMLab uses nn.Unfold, where the four values of each channel are
    together.

    Args:
        tensor: the reduction's weight (O, 4C) or the norm's vector (4C,).
    """
    parts = tensor.unflatten(-1, (2, 2, -1))
    return parts.movedim(-1, -3).transpose(-1, -2).flatten(-3)


def swin_rules(downsample_stage: Callable[[int], int]) -> tuple[Rule, ...]:
    """Rules for the original names.

    Args:
        downsample_stage: maps the number in the name of a merging step to the
            stage that it ends.
    """
    block = r'layers\.(\d+)\.blocks\.(\d+)\.'
    return (
        (r'patch_embed\.proj\.(.+)', r'patch_embed.projection.\1', None),
        (r'patch_embed\.norm\.(.+)', r'patch_embed.norm.\1', None),
        (r'absolute_pos_embed', r'absolute_pos_embed', None),
        (block + r'(norm[12]\..+)', r'stages.\1.blocks.\2.\3', None),
        (block + r'attn\.(.+)', r'stages.\1.blocks.\2.attn.w_msa.\3', None),
        (block + r'mlp\.fc1\.(.+)', r'stages.\1.blocks.\2.ffn.layers.0.0.\3',
         None),
        (block + r'mlp\.fc2\.(.+)', r'stages.\1.blocks.\2.ffn.layers.1.\3',
         None),
        (r'layers\.(\d+)\.downsample\.((?:norm|reduction)\..+)',
         lambda match: (f'stages.{downsample_stage(int(match[1]))}'
                        f'.downsample.{match[2]}'), to_unfold_order),
    )


def _hf_rules() -> tuple[Rule, ...]:
    block = r'encoder\.layers\.(\d+)\.blocks\.(\d+)\.'
    to = r'stages.\1.blocks.\2.'
    qkv: list[Rule] = [
        (block + rf'attention\.self\.{part}\.(weight|bias)',
         to + rf'attn.w_msa.qkv.\3[{i}/3]', None)
        for i, part in enumerate(('query', 'key', 'value'))]
    return (
        (r'embeddings\.patch_embeddings\.projection\.(.+)',
         r'patch_embed.projection.\1', None),
        (r'embeddings\.norm\.(.+)', r'patch_embed.norm.\1', None),
        (r'embeddings\.position_embeddings', 'absolute_pos_embed', None),
        *qkv,
        (block + r'attention\.self\.(relative_position_bias_table)',
         to + r'attn.w_msa.\3', None),
        (block + r'attention\.output\.dense\.(.+)', to + r'attn.w_msa.proj.\3',
         None),
        (block + r'layernorm_before\.(.+)', to + r'norm1.\3', None),
        (block + r'layernorm_after\.(.+)', to + r'norm2.\3', None),
        (block + r'intermediate\.dense\.(.+)', to + r'ffn.layers.0.0.\3',
         None),
        (block + r'output\.dense\.(.+)', to + r'ffn.layers.1.\3', None),
        (r'encoder\.layers\.(\d+)\.downsample\.((?:norm|reduction)\..+)',
         r'stages.\1.downsample.\2', to_unfold_order),
        # The norms on the outputs of a SwinBackbone, whose stage1 is our stage
        # 0.
        (r'hidden_states_norms\.stage(\d+)\.(.+)',
         lambda match: f'norm{int(match[1]) - 1}.{match[2]}', None),
    )


def _resize_absolute(table: Tensor, current: Tensor, model: Any
                     ) -> Tensor | None:
    return resize_position_embedding(table, current, model.position_grid,
                                     antialias=False)


COMPUTED = (
    (r'.*attn_mask', 'buffer that is computed'),
    (r'.*relative_position_index', 'buffer that is computed'),
)
MASK_TOKEN = (
    # The names of SimMIM and of iBOT.
    (r'mask_token|masked_embed', 'token of masked images'),
)
CLASSIFIER = (
    # EsViT has a second head, for regions.
    (r'head(?:_dense)?\..+', 'classification head'),
    (r'norm\..+', 'final norm, fitted to the classifier'),
    *MASK_TOKEN,
    *COMPUTED,
)

SWIN = Architecture(
    'Swin',
    sources=(
        Source('mmseg, mmdet or mmpretrain Swin',
               marks=('stages.0.blocks.0.attn.w_msa.qkv.weight', ),
               rules=((r'(.+)', r'\1', None), ),
               left_out=(*MASK_TOKEN, *COMPUTED)),
        Source('timm Swin',
               marks=('layers.0.blocks.0.attn.qkv.weight',
                      'layers.0.blocks.0.norm1.weight'),
               absent=('layers.0.downsample.reduction.weight',
                       POSITION_BIAS),
               rules=swin_rules(lambda stage: stage - 1),
               left_out=CLASSIFIER),
        Source('original Swin release',
               marks=('layers.0.blocks.0.attn.qkv.weight',
                      'layers.0.downsample.reduction.weight'),
               absent=(POSITION_BIAS, ),
               rules=swin_rules(lambda stage: stage),
               left_out=CLASSIFIER),
        Source('Microsoft Swin-MoE',
               marks=(POSITION_BIAS, 'layers.0.blocks.0.attn.qkv.weight'),
               absent=(SWIN_V2, ),
               rules=(*MOE_RULES, *swin_rules(lambda stage: stage)),
               left_out=(*LEFT_OUT, *CLASSIFIER),
               verify=check_settings),
        Source('Hugging Face Swin',
               marks=('encoder.layers.0.blocks.0.attention.self.query.weight',
                      ),
               rules=_hf_rules(),
               left_out=(
                   # Files of a SwinBackbone have 'swin.' in front.
                   (r'(?:swin\.)?layernorm\..+',
                    'final norm, fitted to the classifier'),
                   (r'embeddings\.mask_token', 'token of masked images'),
                   *COMPUTED)),
    ),
    # Classification checkpoints have no norms on the outputs of the stages.
    new=(r'norm\d+\.(weight|bias)', ),
    spare=((r'norm\d+\.(weight|bias)', 'norm of a stage not in out_indices'),
           ),
    resize=((r'.*relative_position_bias_table',
             lambda table, current, _: resize_bias_table(table, current)),
            (r'absolute_pos_embed', _resize_absolute)),
    computed=(r'.*relative_position_index', ),
)
