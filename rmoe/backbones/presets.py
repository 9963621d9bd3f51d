"""Configs of backbones by name: those that our configs use, and those of
published MoE models."""
from copy import deepcopy
from typing import Any

# Blocks whose FFNs are MoE: every second one of the last two stages, as in
# Swin-MoE.
SHALLOW = ((), (), (1, 3, 5), (1, ))
DEEP = ((), (), (1, 3, 5, 7, 9, 11, 13, 15, 17), (1, ))
GELU_TANH = dict(type='GELU', approximate='tanh')


def _swin(arch: str, layers: tuple, window: int = 7) -> dict[str, Any]:
    return dict(type='rmoe.SwinMoE', arch=arch, window_size=window,
                moe=dict(layers=layers, num_experts=8))


def _swin_moe(arch: str, num_experts: int, **router: Any) -> dict[str, Any]:
    """A published Swin-MoE model.

    It was trained at 192 pixels with windows of 12, and of 6 in the last
    stage, which cover its whole map. Experts have no core, gates are the
    softmax, and slots (a capacity factor of 1.25 in training) are given by
    Batch Prioritized Routing.
    """
    return dict(
        type='rmoe.SwinMoE', arch=arch, window_size=(12, 12, 12, 6),
        pretrained_window_size=(12, 12, 12, 6), fc2_bias=False,
        moe=dict(layers=DEEP, num_experts=num_experts, core=False,
                 align='none',
                 router=dict(type='TokenChoiceRouter', capacity_factor=1.25,
                             priority='bpr', **router)))


def _cvt(arch: str, layers: tuple, **options: Any) -> dict[str, Any]:
    return dict(type='rmoe.CvTMoE', arch=arch,
                moe=dict(layers=layers, num_experts=8), **options)


def _vit(arch: str, last_half: tuple, **options: Any) -> dict[str, Any]:
    return dict(type='rmoe.ViTMoE', arch=arch,
                moe=dict(layers=last_half, num_experts=8), **options)


def _vmoe(arch: str, patch_size: int, layers: dict[str, int]
          ) -> dict[str, Any]:
    """A V-MoE model (2106.05974): 32 experts without a core, two of them for
    each token, and softmax gates that are not renormalised."""
    return dict(
        type='rmoe.ViTMoE', arch=arch, patch_size=patch_size,
        act_cfg=GELU_TANH,
        moe=dict(layers=layers, num_experts=32, core=False, align='none',
                 router=dict(type='TokenChoiceRouter', top_k=2)))


PRESETS: dict[str, dict[str, Any]] = {
    'swin-tiny': _swin('tiny', SHALLOW),
    'swin-small': _swin('small', DEEP),
    'swin-base': _swin('base', DEEP),
    'swin-large': _swin('large', DEEP),
    'swin-moe-small-e8': _swin_moe('small', 8),
    'swin-moe-small-e16': _swin_moe('small', 16),
    'swin-moe-small-e32': _swin_moe('small', 32),
    'swin-moe-small-e32-cosine': _swin_moe(
        'small', 32, scorer=dict(type='CosineScorer')),
    'swin-moe-base-e8': _swin_moe('base', 8),
    'swin-moe-base-e16': _swin_moe('base', 16),
    'swin-moe-base-e32': _swin_moe('base', 32),
    'swin-moe-base-e32-cosine': _swin_moe(
        'base', 32, scorer=dict(type='CosineScorer')),
    'swin-moe-base-e32k2': _swin_moe('base', 32, top_k=2),
    'cvt-13': _cvt('13', ((), (1, ), (1, 3, 5, 7, 9))),
    'cvt-21': _cvt('21', ((), (1, 3), (1, 3, 5, 7, 9, 11, 13, 15))),
    'cvt-w24': _cvt('w24', ((), (1, ), tuple(range(1, 20, 2))),
                    drop_path_rates=(0., 0., 0.3)),
    'vit-tiny-p16': _vit('tiny', (7, 9, 11)),
    'vit-small-p16': _vit('small', (7, 9, 11)),
    'vit-base-p16': _vit('base', (7, 9, 11)),
    'vit-large-p16': _vit('large', (13, 15, 17, 19, 21, 23)),
    'dinov2-small-p14': _vit('small', (7, 9, 11), patch_size=14, img_size=518,
                             layer_scale_init_value=1e-5),
    'dinov2-base-p14': _vit('base', (7, 9, 11), patch_size=14, img_size=518,
                            layer_scale_init_value=1e-5),
    'vmoe-s32-every2': _vmoe('vmoe-small', 32, dict(every=2)),
    'vmoe-s32-last2': _vmoe('vmoe-small', 32, dict(last=2)),
    'vmoe-b32-every2': _vmoe('base', 32, dict(every=2)),
    'vmoe-b16-every2': _vmoe('base', 16, dict(every=2)),
    'vmoe-l32-every2': _vmoe('large', 32, dict(every=2)),
    'vmoe-l16-every2': _vmoe('large', 16, dict(every=2)),
    'vmoe-h14-last5': _vmoe('huge', 14, dict(last=5)),
    'vmoe-15b': _vmoe('vmoe-15b', 14, dict(every=2)),
}


def preset(name: str) -> dict[str, Any]:
    """Return a copy of the config of a backbone. Setting its ``moe`` to None
    gives the dense model of the same size.

    Args:
        name: a key of ``PRESETS``.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f'{name!r} is no preset; there are '
                         f'{", ".join(PRESETS)}')
    return deepcopy(PRESETS[name])
