"""Backbones of Hugging Face's transformers, dense or with experts."""
import logging
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from mmengine.model import BaseModule
from torch import Tensor

from rmoe.backbones.base import load_pretrained
from rmoe.backbones.upcycled import finish, put_experts
from rmoe.registry import MODELS
from rmoe.upcycling.say import say


@MODELS.register_module()
class HuggingFaceBackbone(BaseModule):
    """A model of ``transformers.AutoBackbone`` as a backbone of mmseg and
    mmdet.

    The model is built from its settings alone: nothing is downloaded, and no
    code of a repository is executed. Weights come from ``init_cfg``, which
    reads a file (``pytorch_model.bin``, ``model.safetensors``). They have the
    names that transformers saves them under, for the model alone or for a
    classifier that contains it.

    Args:
        config: ``model_type``, e.g. 'dinov2', and any setting of that
            model's config, e.g. ``out_indices``. The contents of a
            ``config.json`` can be copied here, with its
            ``transformers_version``.
        moe: None for the dense model, or as for
            :func:`rmoe.backbones.upcycled.upcycled_backbone`.
        init_cfg: mmengine's initialisation config.

    Raises:
        ImportError: if transformers is not installed.
        ValueError: for a setting that the model does not have, or a ``moe``
            that does not fit it.
    """

    def __init__(self, config: Mapping, moe: Mapping | None = None,
                 init_cfg: Mapping | None = None) -> None:
        super().__init__(init_cfg)
        self.model = _build(dict(config))
        if moe:
            put_experts(self, moe)
        # AutoBackbone adds norms to the outputs. Files of a model that is not
        # a backbone lack them, so they may start untrained.
        finish(self, moe, inner='model.',
               new=(r'model\.hidden_states_norms\..+', ))

    def init_weights(self) -> None:
        """Load the file that ``init_cfg`` names. Without one, the weights stay
        as transformers has initialised them."""
        if self.init_cfg is not None:
            load_pretrained(self, super().init_weights)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, C, height, width) image -> maps (B, D_i, h_i, w_i)."""
        return tuple(self.model(x).feature_maps)


def _build(config: dict[str, Any]) -> Any:
    try:
        from transformers import AutoBackbone, AutoConfig
    except ImportError as error:
        raise ImportError('rmoe.HuggingFaceBackbone needs the package '
                          'transformers: pip install transformers') from error
    kind = config.pop('model_type', None)
    if kind is None:
        raise ValueError("config needs model_type, e.g. dict(model_type="
                         f"'dinov2', ...); it has {sorted(config)}")
    # transformers silently accepts settings that it does not know, so they
    # are checked here.
    known = {*AutoConfig.for_model(kind).to_dict(), 'out_indices',
             'out_features'}
    unknown = sorted(set(config) - known)
    if unknown and 'transformers_version' in config:
        # The config was copied from a file, which may hold settings of older
        # versions. These are left out instead of refused.
        say(f'{kind!r} has no settings {unknown}, which are left out',
            logging.WARNING)
    elif unknown:
        close = {key: get_close_matches(key, known, 3) for key in unknown}
        raise ValueError(f'config has {unknown}, which are no settings of '
                         f'{kind!r}; similar ones are {close}')
    config = {key: list(value) if isinstance(value, tuple) else value
              for key, value in config.items() if key in known}
    return AutoBackbone.from_config(AutoConfig.for_model(kind, **config))
