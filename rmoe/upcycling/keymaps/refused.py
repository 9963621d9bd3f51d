"""Transformers whose weights have names like those of a ViT or a Swin, but
which compute something else. Their checkpoints are refused, with the reason."""
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Refused:
    """Weights that none of our backbones can hold.

    Attributes:
        name: name of the model or models.
        marks: patterns. Each of them matches the end of some key in a file of
            this model.
        reason: what the model has that our backbones do not have, and which
            backbone can hold its weights.
    """
    name: str
    marks: tuple[str, ...]
    reason: str


BY_HOST = ('. Use it through rmoe.UpcycledBackbone, around a backbone that '
           'has them, such as ')

IN_TIMM = ('. Use it through rmoe.UpcycledBackbone, around dict(type='
           "'mmseg.TIMMBackbone', features_only=True, pretrained=False, "
           'model_name=...), such as ')

REFUSED = (
    Refused('DINOv2 with gates in its FFNs (ViT-g)',
            (r'layer\.0\.mlp\.weights_in\.weight', ),
            "the model's FFNs have none. rmoe.HuggingFaceBackbone takes it"),
    Refused('SAM or ViTDet encoder',
            (r'(?:blocks|layers)\.0\.attn\.rel_pos_h', ),
            'its attention has decomposed relative positions and windows'
            + BY_HOST + 'mmpretrain.ViTSAM'),
    Refused('SAM 2 or Hiera encoder',
            (r'(?:(?:trunk|hiera)\.(?:.+\.)?blocks\.0\.attn\.qkv\.weight|'
             r'blocks\.[1-9]\d*\.proj\.weight|'
             r'encoder\.stages\.0\.layers\.0\.attn\.qkv\.weight)', ),
            'its stages pool queries. rmoe.HuggingFaceBackbone has Hiera'),
    Refused('DINOv3',
            (r'(?:rope_embed\.periods|storage_tokens|'
             r'(?:layer|layers)\.0\.attention\.q_proj\.weight)', ),
            'it has rotary positions and register tokens' + IN_TIMM
            + "'vit_base_patch16_dinov3'"),
    # The marks of DINOv3 in timm, which has no table of positions.
    Refused('DINOv3', (r'reg_token', r'blocks\.0\.gamma_1'),
            'it has rotary positions and register tokens' + IN_TIMM
            + "'vit_base_patch16_dinov3'"),
    Refused('ViT with register tokens (DINOv2 with registers)',
            (r'(?:register_tokens|reg_token)', ),
            'the model has no register tokens' + IN_TIMM
            + "'vit_base_patch14_reg4_dinov2'"),
    Refused('distilled DeiT',
            (r'(?:dist_token|embeddings\.distillation_token)', ),
            'the model has no distillation token. The releases that were '
            'not distilled, deit_*_patch16_224, load'),
    Refused('data2vec 2.0',
            (r'modality_encoders\.IMAGE\.local_encoder\.proj\.weight', ),
            'it normalises after each block and not before it'),
    Refused('CLIP or OpenCLIP',
            (r'(?:visual\.ln_pre\.weight|vision_model\.pre_layrnorm\.weight)',
             ),
            'its visual tower is a ViT, which rmoe.ViTMoE with pre_norm=True '
            'and patch_bias=False can hold, the rest is not'),
    Refused('SigLIP',
            (r'(?:vision_model\.head\.attention\.in_proj_weight|'
             r'attn_pool\.latent)', ),
            'it has no class token and names that are not known here'
            + IN_TIMM + "'vit_base_patch16_siglip_224'"),
    Refused('EVA', (r'blocks\.0\.attn\.(?:q_proj\.weight|rope\.freqs_cos)', ),
            'it has gated FFNs or rotary positions' + IN_TIMM
            + "'eva02_base_patch14_224'"),
    Refused('Swin Transformer V2',
            (r'blocks\.0\.(?:attn|attention\.self)\.logit_scale', ),
            'it normalises after each block and compares by cosine'
            + BY_HOST + 'mmpretrain.SwinTransformerV2'),
    # This comes after Swin V2 and EVA-02, which have such biases too.
    Refused('BEiT, data2vec or EVA',
            (r'(?:(?:blocks|layers)\.0\.attn\.q_bias|layer\.0\.lambda_1)', ),
            'its attention has relative positions or no bias of keys'
            + BY_HOST + "mmseg.BEiT, or timm's EVA in mmseg.TIMMBackbone"),
)


def refused(keys: Iterable[str]) -> Refused | None:
    """The model that these names belong to, if none of our backbones can hold
    its weights; otherwise None."""
    keys = list(keys)
    for model in REFUSED:
        if all(any(re.search(rf'(?:^|\.){mark}$', key) for key in keys)
               for mark in model.marks):
            return model
    return None


def explain_refusal(state: Mapping[str, Tensor], prefix: str = '') -> str:
    """The reason for which weights are refused; empty if they are not.

    Args:
        state: weights by name.
        prefix: only names that begin with it count.
    """
    model = refused(key for key in state if key.startswith(prefix))
    if model is None:
        return ''
    return f'the checkpoint is that of {model.name}: {model.reason}'
