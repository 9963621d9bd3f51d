"""Names of weights in CvT checkpoints. Our own follow those of OpenMMLab's
Swin."""
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rmoe.upcycling.keymaps.activation import check_activation
from rmoe.upcycling.keymaps.source import Architecture, Rule, Source


def _original_rules() -> tuple[Rule, ...]:
    block = r'stage(\d+)\.blocks\.(\d+)\.'
    to = r'stages.\1.blocks.\2.'
    return (
        (r'stage(\d+)\.patch_embed\.proj\.(.+)',
         r'stages.\1.patch_embed.projection.\2', None),
        (r'stage(\d+)\.(patch_embed\.norm\..+|cls_token)', r'stages.\1.\2',
         None),
        (block + r'mlp\.fc1\.(.+)', to + r'ffn.layers.0.0.\3', None),
        (block + r'mlp\.fc2\.(.+)', to + r'ffn.layers.1.\3', None),
        (block + r'((?:norm[12]|attn)\..+)', to + r'\3', None),
    )


def _hf_rules() -> tuple[Rule, ...]:
    stage = r'encoder\.stages\.(\d+)\.'
    block = stage + r'layers\.(\d+)\.'
    to = r'stages.\1.blocks.\2.'
    attention = block + r'attention\.attention\.'
    rules: list[Rule] = [
        (stage + r'embedding\.convolution_embeddings\.projection\.(.+)',
         r'stages.\1.patch_embed.projection.\2', None),
        (stage + r'embedding\.convolution_embeddings\.normalization\.(.+)',
         r'stages.\1.patch_embed.norm.\2', None),
        (stage + 'cls_token', r'stages.\1.cls_token', None),
        (block + r'attention\.output\.dense\.(.+)', to + r'attn.proj.\3',
         None),
        (block + r'layernorm_before\.(.+)', to + r'norm1.\3', None),
        (block + r'layernorm_after\.(.+)', to + r'norm2.\3', None),
        (block + r'intermediate\.dense\.(.+)', to + r'ffn.layers.0.0.\3',
         None),
        (block + r'output\.dense\.(.+)', to + r'ffn.layers.1.\3', None),
    ]
    for ours, theirs in (('q', 'query'), ('k', 'key'), ('v', 'value')):
        convolution = (attention + rf'convolution_projection_{theirs}\.'
                       r'convolution_projection\.')
        rules += [
            (convolution + r'convolution\.(.+)',
             to + rf'attn.conv_proj_{ours}.conv.\3', None),
            (convolution + r'normalization\.(.+)',
             to + rf'attn.conv_proj_{ours}.bn.\3', None),
            (attention + rf'projection_{theirs}\.(.+)',
             to + rf'attn.proj_{ours}.\3', None),
        ]
    return tuple(rules)


def _check_quick_gelu(model: Any, state: Mapping[str, Tensor]) -> None:
    check_activation(model.stages[0].blocks[0].ffn, 'QuickGELU',
                     "dict(type='rmoe.QuickGELU')")


def _check_gelu(model: Any, state: Mapping[str, Tensor]) -> None:
    check_activation(model.stages[0].blocks[0].ffn, 'GELU',
                     "dict(type='GELU')")


CVT = Architecture(
    'CvT',
    sources=(
        Source('rmoe CvT',
               marks=('stages.0.blocks.0.attn.conv_proj_q.conv.weight', ),
               rules=((r'(.+)', r'\1', None), )),
        Source('original CvT release',
               marks=('stage0.blocks.0.attn.conv_proj_q.conv.weight', ),
               rules=_original_rules(),
               left_out=((r'head\..+', 'classification head'),
                         (r'norm\..+', 'final norm, fitted to the class '
                          'token')),
               verify=_check_quick_gelu),
        Source('Hugging Face CvT',
               marks=('encoder.stages.0.layers.0.attention.attention.'
                      'projection_query.weight', ),
               rules=_hf_rules(),
               left_out=((r'layernorm\..+', 'final norm, fitted to the class '
                          'token'), ),
               verify=_check_gelu),
    ),
    # Classification checkpoints have no norms on the stages' outputs.
    new=(r'norm\d+\.(weight|bias)', ),
    spare=((r'norm\d+\.(weight|bias)', 'norm of a stage not in out_indices'),
           (r'stages\.\d+\.cls_token', 'class token, which the model has '
            'not')),
)
