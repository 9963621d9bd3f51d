"""Names of weights in ViT checkpoints. Our own are those of mmseg."""
from typing import Any

import torch
from torch import Tensor

from rmoe.upcycling.keymaps.clip import CLIP, check_embedding
from rmoe.upcycling.keymaps.resizing import resize_position_embedding
from rmoe.upcycling.keymaps.source import Architecture, Rule, Source
from rmoe.upcycling.keymaps.vmoe import VMOE

TO = r'layers.\1.'
# Names that several sources share.
EMBEDDINGS: tuple[Rule, ...] = (
    (r'(cls_token|pos_embed)', r'\1', None),
    (r'patch_embed\.proj\.(.+)', r'patch_embed.projection.\1', None),
)


def _timm_rules(block: str = r'blocks\.(\d+)\.') -> tuple[Rule, ...]:
    return (
        *EMBEDDINGS,
        (block + r'norm([12])\.(.+)', TO + r'ln\2.\3', None),
        (block + r'attn\.qkv\.(.+)', TO + r'attn.attn.in_proj_\2', None),
        (block + r'attn\.proj\.(.+)', TO + r'attn.attn.out_proj.\2', None),
        # The first name is that of timm and DINOv2, the second of DeiT III.
        (block + r'(?:ls1\.gamma|gamma_1)', TO + r'attn.gamma1.weight', None),
        (block + r'(?:ls2\.gamma|gamma_2)', TO + r'ffn.gamma2.weight', None),
        (block + r'mlp\.fc1\.(.+)', TO + r'ffn.layers.0.0.\2', None),
        (block + r'mlp\.fc2\.(.+)', TO + r'ffn.layers.1.\2', None),
        (r'norm\.(.+)', r'ln1.\1', None),
        (r'norm_pre\.(.+)', r'ln_pre.\1', None),
    )


def _mmpretrain_rules() -> tuple[Rule, ...]:
    block = r'layers\.(\d+)\.'
    return (
        (block + r'attn\.qkv\.(.+)', TO + r'attn.attn.in_proj_\2', None),
        (block + r'attn\.proj\.(.+)', TO + r'attn.attn.out_proj.\2', None),
        (r'pre_norm\.(.+)', r'ln_pre.\1', None),
        (r'((?:cls_token|pos_embed|patch_embed|layers|ln1)(?:\..+)?)', r'\1',
         None),
    )


def _hf_qkv(block: str) -> list[Rule]:
    return [(block + rf'attention\.attention\.{part}\.(weight|bias)',
             TO + rf'attn.attn.in_proj_\2[{i}/3]', None)
            for i, part in enumerate(('query', 'key', 'value'))]


HF_BLOCK = r'encoder\.layer\.(\d+)\.'
HF_COMMON: tuple[Rule, ...] = (
    (r'embeddings\.cls_token', 'cls_token', None),
    (r'embeddings\.position_embeddings', 'pos_embed', None),
    (r'embeddings\.patch_embeddings\.projection\.(.+)',
     r'patch_embed.projection.\1', None),
    *_hf_qkv(HF_BLOCK),
    (HF_BLOCK + r'attention\.output\.dense\.(.+)',
     TO + r'attn.attn.out_proj.\2', None),
    (r'layernorm\.(.+)', r'ln1.\1', None),
)
HF_VIT_RULES: tuple[Rule, ...] = (
    *HF_COMMON,
    (HF_BLOCK + r'layernorm_before\.(.+)', TO + r'ln1.\2', None),
    (HF_BLOCK + r'layernorm_after\.(.+)', TO + r'ln2.\2', None),
    (HF_BLOCK + r'intermediate\.dense\.(.+)', TO + r'ffn.layers.0.0.\2',
     None),
    (HF_BLOCK + r'output\.dense\.(.+)', TO + r'ffn.layers.1.\2', None),
)
HF_DINOV2_RULES: tuple[Rule, ...] = (
    *HF_COMMON,
    (HF_BLOCK + r'norm([12])\.(.+)', TO + r'ln\2.\3', None),
    (HF_BLOCK + r'layer_scale1\.lambda1', TO + r'attn.gamma1.weight', None),
    (HF_BLOCK + r'layer_scale2\.lambda1', TO + r'ffn.gamma2.weight', None),
    (HF_BLOCK + r'mlp\.fc1\.(.+)', TO + r'ffn.layers.0.0.\2', None),
    (HF_BLOCK + r'mlp\.fc2\.(.+)', TO + r'ffn.layers.1.\2', None),
)


def _resize_positions(table: Tensor, current: Tensor, model: Any
                      ) -> Tensor | None:
    patches_only = round(table.shape[1]**0.5)**2 == table.shape[1]
    if model.cls_token is not None and patches_only:
        # As in DeiT III, the file has no position for the class token.
        table = torch.cat([torch.zeros_like(table[:, :1]), table], 1)
    elif model.cls_token is None and not patches_only:
        table = table[:, 1:]
    if table.shape == current.shape:
        return table
    return resize_position_embedding(table, current, model.position_grid,
                                     model.antialias)


CLASSIFIER = (
    (r'(?:head|fc_norm|pre_logits)\..+', 'classification head'),
    # The first name is that of MAE and SimMIM, the second of iBOT.
    (r'mask_token|masked_embed', 'token of masked images'),
    (r'decoder(?:_.+|\..+)', 'decoder of the pre-training'),
)

VIT = Architecture(
    'ViT',
    sources=(
        Source('mmseg ViT',
               marks=('layers.0.attn.attn.in_proj_weight', ),
               rules=((r'(.+)', r'\1', None), ),
               left_out=CLASSIFIER[1:2],
               verify=check_embedding),
        Source('mmpretrain ViT',
               marks=('layers.0.attn.qkv.weight', 'layers.0.ln1.weight'),
               rules=_mmpretrain_rules(),
               left_out=CLASSIFIER[1:2],
               verify=check_embedding),
        Source('timm, DeiT or DINOv2 ViT',
               marks=('blocks.0.attn.qkv.weight', 'patch_embed.proj.weight',
                      'pos_embed'),
               rules=_timm_rules(),
               left_out=CLASSIFIER,
               verify=check_embedding),
        Source('DINOv2 training checkpoint',
               marks=('blocks.0.0.attn.qkv.weight', 'patch_embed.proj.weight',
                      'pos_embed'),
               # Blocks are in chunks. The first number is that of the chunk,
               # the second counts all blocks.
               rules=_timm_rules(r'blocks\.\d+\.(\d+)\.'),
               left_out=CLASSIFIER),
        Source('Hugging Face ViT',
               marks=('encoder.layer.0.attention.attention.query.weight',
                      'encoder.layer.0.intermediate.dense.weight'),
               rules=HF_VIT_RULES,
               left_out=((r'pooler\..+', 'pooler of the classifier'),
                         (r'embeddings\.mask_token',
                          'token of masked images'))),
        Source('Hugging Face DINOv2',
               marks=('encoder.layer.0.attention.attention.query.weight',
                      'encoder.layer.0.mlp.fc1.weight'),
               rules=HF_DINOV2_RULES,
               left_out=((r'embeddings\.mask_token',
                          'token of masked images'), )),
        *CLIP,
        VMOE,
    ),
    # Models that average their patches have no final norm of this kind, and
    # mmseg's models have by default no final norm at all.
    new=(r'ln1\.(weight|bias)', ),
    spare=((r'ln1\.(weight|bias)', 'final norm, which the model has not'),
           (r'cls_token', 'class token, which the model has not')),
    resize=((r'pos_embed', _resize_positions), ),
)
