"""Builds the model of a config with the weights of a checkpoint, for tools that
examine trained models."""
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
    """Build a trained model in evaluation mode.

    Args:
        cfg: the config of its training. Its default scope becomes the current
            one.
        checkpoint: the file with its weights.
        device: the device of the model; by default the first GPU, or the CPU
            if there is none.
        strict: whether missing or unexpected tensors outside the backbone are
            an error. The backbone always checks its own loads.
    """
    safe_loading.install()
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    model: Any = revert_sync_batchnorm(MODELS.build(deepcopy(cfg.model)))
    load_checkpoint(model, checkpoint, 'cpu', strict=strict)
    model.to(device or ('cuda:0' if torch.cuda.is_available() else 'cpu'))
    # eval() is not chained, because that of some models of mmseg returns None.
    model.eval()
    return model


def build_test_data(cfg: Config) -> Any:
    """Build the data set that a config is tested on. :func:`trained_model`
    must have been called before, because it sets the default scope in which
    the names of data sets are looked up."""
    return DATASETS.build(cfg.test_dataloader.dataset)
