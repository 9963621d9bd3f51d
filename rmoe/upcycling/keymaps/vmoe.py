"""Names of weights in the ViTs and V-MoEs that Google trained with Flax.

In a key the names of modules are joined by '/'. The parts of a block have
different names in V-MoE (google-research/vmoe) and ViT (vision_transformer,
big_vision). Some names also depend on the age of the file: before Flax's linen
API, modules of all kinds were numbered together (``LayerNorm_2`` is the second
norm).
"""
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rmoe.upcycling.keymaps.activation import check_activation
from rmoe.upcycling.keymaps.source import Rule, Source

ENCODER = r'(?:Encoder|Transformer)/'
BLOCK = ENCODER + r'encoderblock_(\d+)/'
ATTENTION = BLOCK + r'(?:SelfAttention|MultiHeadDotProductAttention_[01])/'
MLP = BLOCK + r'(?:Mlp|MlpBlock_[03])/'
EXPERTS = BLOCK + r'Moe/Mlp/'
TO = r'layers.\1.'


def _to_conv(kernel: Tensor) -> Tensor:
    """Transpose (height, width, in, D) to (D, in, height, width)."""
    return kernel.permute(3, 2, 0, 1)


def _to_linear(kernel: Tensor) -> Tensor:
    """Transpose (in, out) to (out, in)."""
    return kernel.permute(1, 0)


def _to_experts(kernel: Tensor) -> Tensor:
    """Transpose (E, in, out) to (E, out, in)."""
    return kernel.permute(0, 2, 1)


def _from_heads(kernel: Tensor) -> Tensor:
    """Reshape (heads, head width, D) to (D, heads x head width)."""
    return kernel.permute(2, 0, 1).flatten(1)


def _to_heads(kernel: Tensor) -> Tensor:
    """Reshape (D, heads, head width) to (heads x head width, D)."""
    return kernel.permute(1, 2, 0).flatten(0, 1)


def _qkv() -> list[Rule]:
    rules: list[Rule] = []
    for i, part in enumerate(('query', 'key', 'value')):
        to = TO + r'attn.attn.in_proj_'
        rules += [
            (ATTENTION + f'{part}/kernel', to + f'weight[{i}/3]', _to_heads),
            (ATTENTION + f'{part}/bias', to + f'bias[{i}/3]', Tensor.flatten),
        ]
    return rules


def _norms() -> list[Rule]:
    return [(theirs + name, ours + part, None)
            for theirs, ours in ((BLOCK + r'LayerNorm_0/', TO + 'ln1.'),
                                 (BLOCK + r'LayerNorm_[12]/', TO + 'ln2.'),
                                 (ENCODER + r'encoder_norm/', 'ln1.'))
            for name, part in (('scale', 'weight'), ('bias', 'bias'))]


RULES: tuple[Rule, ...] = (
    (r'cls', 'cls_token', None),
    (rf'(?:{ENCODER}(?:posembed_input/)?)?pos_embedding', 'pos_embed', None),
    (r'embedding/kernel', 'patch_embed.projection.weight', _to_conv),
    (r'embedding/bias', 'patch_embed.projection.bias', None),
    *_norms(),
    *_qkv(),
    (ATTENTION + 'out/kernel', TO + 'attn.attn.out_proj.weight', _from_heads),
    (ATTENTION + 'out/bias', TO + 'attn.attn.out_proj.bias', None),
    (MLP + 'Dense_0/kernel', TO + 'ffn.layers.0.0.weight', _to_linear),
    (MLP + 'Dense_0/bias', TO + 'ffn.layers.0.0.bias', None),
    (MLP + 'Dense_1/kernel', TO + 'ffn.layers.1.weight', _to_linear),
    (MLP + 'Dense_1/bias', TO + 'ffn.layers.1.bias', None),
    (EXPERTS + 'Dense_0/kernel', TO + 'ffn.experts.residual_fc1_weight',
     _to_experts),
    (EXPERTS + 'Dense_0/bias', TO + 'ffn.experts.residual_fc1_bias', None),
    (EXPERTS + 'Dense_1/kernel', TO + 'ffn.experts.residual_fc2_weight',
     _to_experts),
    (EXPERTS + 'Dense_1/bias', TO + 'ffn.experts.residual_fc2_bias', None),
    (BLOCK + 'Moe/Router/dense/kernel', TO + 'ffn.router.scorer.weight',
     _to_linear),
)


def _check_gelu(model: Any, state: Mapping[str, Tensor]) -> None:
    # Flax's gelu is by default the approximation with tanh.
    check_activation(model.layers[0].ffn, 'GELU',
                     "dict(type='GELU', approximate='tanh')", 'tanh')


VMOE = Source(
    'Google V-MoE or ViT (Flax)',
    marks=('embedding/kernel', 'embedding/bias'),
    rules=RULES,
    left_out=(
        (r'(?:head|pre_logits)/.+', 'classification head'),
        (r'(?:MapHead|MAPHead_0)/.+', 'pooling of the classifier'),
        (r'(?:opt|opt_state|optimizer|state)/.+', 'state of the optimizer'),
        (r'(?:.+/)?(?:step|rngs(?:/.+)?)', 'progress of the training'),
    ),
    verify=_check_gelu)
