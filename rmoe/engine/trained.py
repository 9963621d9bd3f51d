"""A trained model: what a config builds, with the weights of a checkpoint."""
from copy import deepcopy
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import load_checkpoint

from rmoe import safe_loading


def trained_model(cfg: Config, checkpoint: str, device: str | None = None,
                  strict: bool = False) -> Any:
    """The whole model in evaluation mode.

    Args:
        cfg: of its training; its default scope becomes the current one.
        checkpoint: file with its weights.
        device: where to put it; the first GPU, or else the CPU by default.
        strict: whether tensors outside the backbone, which checks its own
            loads, may not be missing or left over.
    """
    safe_loading.install()
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    model: Any = revert_sync_batchnorm(MODELS.build(deepcopy(cfg.model)))
    load_checkpoint(model, checkpoint, 'cpu', strict=strict)
    model.to(device or ('cuda:0' if torch.cuda.is_available() else 'cpu'))
    model.eval()  # which returns None in some of mmseg's
    return model


def build_test_data(cfg: Config) -> Any:
    """The data set that a config is tested on; it takes a scope from
    :func:`trained_model`."""
    return DATASETS.build(cfg.test_dataloader.dataset)
