"""Names of weights in CLIP's visual towers (2103.00020), which are ViTs with a
norm before their blocks and no bias in their patch embedding."""
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rmoe.upcycling.keymaps.source import Rule, Source

TO = r'layers.\1.'
OPEN_BLOCK = r'transformer\.resblocks\.(\d+)\.'
HF_BLOCK = r'encoder\.layers\.(\d+)\.'
# Names of the patch embedding in all sources of ViTs.
PROJECTIONS = ('patch_embed.projection', 'patch_embed.proj', 'conv1',
               'embeddings.patch_embedding')
PRE_NORMS = ('ln_pre.weight', 'pre_norm.weight', 'norm_pre.weight',
             'pre_layrnorm.weight')


def check_embedding(model: Any, state: Mapping[str, Tensor]) -> None:
    """Check that a ViT has a norm before its blocks, and a bias in its patch
    embedding, if and only if the file has them.

    Raises:
        ValueError: if they differ. Names the settings to write.
    """
    names = [name for name in PROJECTIONS if f'{name}.weight' in state]
    wanted = dict(pre_norm=any(key in state for key in PRE_NORMS))
    if names:
        wanted['patch_bias'] = f'{names[0]}.bias' in state
    has = dict(pre_norm=model.ln_pre is not None,
               patch_bias=model.patch_embed.projection.bias is not None)
    wrong = {key: value for key, value in wanted.items() if value != has[key]}
    if wrong:
        settings = ', '.join(f'{key}={value}' for key, value in wrong.items())
        raise ValueError(
            'the checkpoint is that of a ViT '
            f'{"with" if wanted["pre_norm"] else "without"} a norm before its '
            f'blocks, whose patch embedding is {names}: set '
            f'{settings} in the backbone, which has '
            f'{", ".join(f"{key}={has[key]}" for key in wrong)}')


def _first_axes(tensor: Tensor) -> Tensor:
    """Reshape (D,) to (1, 1, D), or (N, D) to (1, N, D)."""
    return tensor.view(1, -1, tensor.shape[-1])


OPEN_RULES: tuple[Rule, ...] = (
    (r'class_embedding', 'cls_token', _first_axes),
    (r'positional_embedding', 'pos_embed', _first_axes),
    (r'conv1\.(.+)', r'patch_embed.projection.\1', None),
    (r'ln_pre\.(.+)', r'ln_pre.\1', None),
    (OPEN_BLOCK + r'ln_([12])\.(.+)', TO + r'ln\2.\3', None),
    (OPEN_BLOCK + r'ls_1\.gamma', TO + r'attn.gamma1.weight', None),
    (OPEN_BLOCK + r'ls_2\.gamma', TO + r'ffn.gamma2.weight', None),
    (OPEN_BLOCK + r'attn\.(.+)', TO + r'attn.attn.\2', None),
    (OPEN_BLOCK + r'mlp\.c_fc\.(.+)', TO + r'ffn.layers.0.0.\2', None),
    (OPEN_BLOCK + r'mlp\.c_proj\.(.+)', TO + r'ffn.layers.1.\2', None),
    (r'ln_post\.(.+)', r'ln1.\1', None),
)
HF_RULES: tuple[Rule, ...] = (
    (r'embeddings\.class_embedding', 'cls_token', _first_axes),
    (r'embeddings\.position_embedding\.weight', 'pos_embed', _first_axes),
    (r'embeddings\.patch_embedding\.(.+)', r'patch_embed.projection.\1', None),
    (r'pre_layrnorm\.(.+)', r'ln_pre.\1', None),
    (HF_BLOCK + r'layer_norm([12])\.(.+)', TO + r'ln\2.\3', None),
    *((HF_BLOCK + rf'self_attn\.{part}_proj\.(weight|bias)',
       TO + rf'attn.attn.in_proj_\2[{i}/3]', None)
      for i, part in enumerate('qkv')),
    (HF_BLOCK + r'self_attn\.out_proj\.(.+)', TO + r'attn.attn.out_proj.\2',
     None),
    (HF_BLOCK + r'mlp\.fc1\.(.+)', TO + r'ffn.layers.0.0.\2', None),
    (HF_BLOCK + r'mlp\.fc2\.(.+)', TO + r'ffn.layers.1.\2', None),
    (r'post_layernorm\.(.+)', r'ln1.\1', None),
)
CLIP = (
    Source('CLIP or OpenCLIP visual tower',
           marks=('transformer.resblocks.0.attn.in_proj_weight',
                  'class_embedding', 'conv1.weight'),
           rules=OPEN_RULES,
           left_out=((r'proj', 'projection to the space of the text'), ),
           verify=check_embedding),
    Source('Hugging Face CLIP visual tower',
           marks=('encoder.layers.0.self_attn.q_proj.weight',
                  'pre_layrnorm.weight', 'embeddings.class_embedding'),
           rules=HF_RULES,
           left_out=((r'embeddings\.position_ids', 'numbers of positions'), ),
           verify=check_embedding),
)
