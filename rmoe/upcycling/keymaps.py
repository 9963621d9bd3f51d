"""How each source names its weights: ordered rules, data and not code.

The target names are those of OpenMMLab, which our backbones use. A rule is
(pattern, replacement, transform); the first whose pattern matches a whole key
applies. A source is recognised by the key its ``mark`` names.
"""
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

Rename = str | Callable[[re.Match], str]
Rule = tuple[str, Rename, Callable[[Tensor], Tensor] | None]


@dataclass(frozen=True)
class Source:
    """One way to name the weights of one architecture.

    Attributes:
        name: for messages.
        mark: a key that every such file has.
        absent: a key that tells it from a source with the same mark.
        rules: ordered (pattern, replacement, transform).
        left_out: (pattern, reason) of keys that a dense-prediction backbone
            has no use for.
    """
    name: str
    mark: str
    rules: tuple[Rule, ...]
    left_out: tuple[tuple[str, str], ...]
    absent: str | None = None


def to_unfold_order(tensor: Tensor) -> Tensor:
    """Patch-merging channels from (w, h, C) to nn.Unfold's (C, h, w).

    Microsoft's release and timm join neighbours in the order (0,0), (1,0),
    (0,1), (1,1) with channels inside; mm unfolds with channels outside.
    Takes the reduction's weight (O, 4C) or the norm's vector (4C,).
    """
    parts = tensor.unflatten(-1, (2, 2, -1))
    return parts.movedim(-1, -3).transpose(-1, -2).flatten(-3)


def _swin_rules(downsample_stage: Callable[[int], int]) -> tuple[Rule, ...]:
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


_CLASSIFIER = (
    (r'head\..+', 'classification head'),
    (r'norm\..+', 'final norm, fitted to the classifier'),
    (r'.*attn_mask', 'buffer that is computed'),
    (r'.*relative_position_index', 'buffer that is computed'),
)

SOURCES = (
    Source('mmseg, mmdet or mmpretrain Swin',
           mark='stages.0.blocks.0.attn.w_msa.qkv.weight',
           rules=((r'(.+)', r'\1', None), ),
           left_out=_CLASSIFIER[2:]),
    Source('timm Swin',
           mark='layers.0.blocks.0.attn.qkv.weight',
           absent='layers.0.downsample.reduction.weight',
           rules=_swin_rules(lambda stage: stage - 1),
           left_out=_CLASSIFIER),
    Source('original Swin release',
           mark='layers.0.blocks.0.attn.qkv.weight',
           rules=_swin_rules(lambda stage: stage),
           left_out=_CLASSIFIER),
)


def recognise(keys: Iterable[str], prefix: str = '') -> Source | None:
    """The source whose mark is among the keys under a prefix."""
    keys = set(keys)
    for source in SOURCES:
        if prefix + source.mark in keys and not (
                source.absent and prefix + source.absent in keys):
            return source
    return None


def find_prefix(keys: Iterable[str]) -> str | None:
    """The prefix under which some source's weights lie, or None."""
    keys = list(keys)
    for source in SOURCES:
        for key in keys:
            if key.endswith(source.mark):
                prefix = key[:-len(source.mark)]
                if not prefix or prefix.endswith('.'):
                    return prefix
    return None


def rename(state: Mapping[str, Tensor], source: Source
           ) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Translate a source's state dict to OpenMMLab names.

    Returns:
        The renamed weights, and the reason for each key left out.

    Raises:
        ValueError: for a key that no rule knows.
    """
    renamed: dict[str, Tensor] = {}
    left_out: dict[str, str] = {}
    for key, tensor in state.items():
        reason = next((reason for pattern, reason in source.left_out
                       if re.fullmatch(pattern, key)), None)
        if reason:
            left_out[key] = reason
            continue
        for pattern, replacement, transform in source.rules:
            match = re.fullmatch(pattern, key)
            if match:
                name = (replacement(match) if callable(replacement)
                        else match.expand(replacement))
                renamed[name] = transform(tensor) if transform else tensor
                break
        else:
            raise ValueError(f'{key!r} is no weight of a {source.name} '
                             'checkpoint; is this another architecture?')
    return renamed, left_out
