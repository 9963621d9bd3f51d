"""What the experts of a run's last checkpoint do with validation images."""
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.logging import MMLogger
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, init_default_scope
from torch import Tensor

from rmoe.backbones.from_config import dense_twin
from rmoe.moe import Routing, SoftRouting, moe_layers
from rmoe.moe.complexity import Complexity, complexity
from rmoe.report.labels import class_names, label_map
from rmoe.upcycling import read_checkpoint, state_dict_of
from rmoe.visualization.recording import expert_map, record_routing, token_map
from rmoe.visualization.segmentor import short_name
from rmoe.visualization.specialisation import (
    Tally,
    expert_shares,
    patch_classes,
)


@dataclass(frozen=True)
class ExpertMap:
    """Who took the patches of an image in one MoE layer.

    Attributes:
        experts: (h, w) integers, the strongest expert; -1 where none kept
            the patch.
        stride: side of a patch in pixels. The last row and column may reach
            over the image's edge.
    """
    experts: np.ndarray
    stride: int


@dataclass(frozen=True)
class Overlay:
    """An image and who took its patches.

    Attributes:
        name: file name, or number in the data set.
        image: (H, W, 3) RGB uint8.
        maps: of each MoE layer, in order.
    """
    name: str
    image: np.ndarray
    maps: list[ExpertMap]


@dataclass
class Experts:
    """What was found.

    Attributes:
        num_experts: of each MoE layer, by its short name.
        overlays: of the first images.
        classes: names; empty where the data set says nothing of classes.
        tokens_LE: for each layer, tokens of each class at each expert.
        images: that were counted.
        costs: of one forward pass of the backbone and of its dense twin, by
            name: total and active parameters and operations; ``size`` is of
            the image.
        size: height and width of that image.
        notes: what is missing, and why.
    """
    num_experts: dict[str, int] = field(default_factory=dict)
    overlays: list[Overlay] = field(default_factory=list)
    classes: tuple[str, ...] = ()
    tokens_LE: dict[str, np.ndarray] = field(default_factory=dict)
    images: int = 0
    costs: dict[str, Complexity] = field(default_factory=dict)
    size: tuple[int, int] = (0, 0)
    notes: list[str] = field(default_factory=list)


@torch.no_grad()
def observe(cfg: Config, checkpoint: Path | None, shown: int,
            counted: int) -> Experts:
    """Run a checkpoint on validation images, one by one, as in evaluation.

    Whatever is missing (files, data, classes) is said in ``notes``: a report
    without pictures is one, too.

    Args:
        cfg: whole config.
        checkpoint: file; None if there is none.
        shown: images that are kept, with their expert maps.
        counted: images over which classes are counted, evenly spaced over
            the validation set; those shown are some of them.
    """
    found = Experts()
    # What it says of a load would pass for the run's own in its log.
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel('WARNING')
    try:
        init_default_scope(cfg.get('default_scope') or 'mmengine')
        model = _build(cfg, checkpoint)
        found.num_experts = {
            short_name(name): layer.num_experts
            for name, layer in moe_layers(model).items()}
        if found.num_experts:
            _look(cfg, model, found, shown, counted)
    # Whatever a config names may be gone: its data, a package, memory.
    except Exception as error:
        found.notes.append(f'{type(error).__name__}: {error}')
    finally:
        logger.setLevel(level)
    return found


def _build(cfg: Config, checkpoint: Path | None) -> BaseModel:
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    if not moe_layers(model):
        return model
    if checkpoint is None:
        raise ValueError('the work dir has no checkpoint')
    if checkpoint.is_dir():
        raise ValueError(
            f'{checkpoint.name} is a folder of parts: make a file of it with '
            'tools/gather_checkpoint.py, beside it')
    model.load_state_dict(state_dict_of(read_checkpoint(str(checkpoint))))
    model.to('cuda' if torch.cuda.is_available() else 'cpu')
    model.eval()
    return model


def _look(cfg: Config, model: BaseModel, found: Experts, shown: int,
          counted: int) -> None:
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    model.dataset_meta = dataset.metainfo
    classes = class_names(dataset)
    tallies = _tallies(model, classes, found)
    indices = _spread(len(dataset), counted if tallies else shown)
    pictured = {indices[i] for i in _spread(len(indices), shown)}
    for index in indices:
        item = dataset[index]
        inputs, routings = _route(model, item)
        image_hw = _size(item['inputs'])
        if index in pictured:
            found.overlays.append(_overlay(item, index, inputs, routings))
        if not found.costs:
            found.size = _size(inputs)
            _count_costs(cfg, model, inputs, found)
        if not tallies:
            continue
        labels = label_map(dataset, index, item,
                           len(dataset.metainfo['classes']))
        if labels is None:
            found.notes.append('the validation set gives no labels, so no '
                               'classes are counted')
            tallies = {}
            continue
        found.images += 1
        for name, tally in tallies.items():
            _add(tally, routings[name], labels, image_hw, _size(inputs))
    found.classes = classes if tallies else ()
    found.tokens_LE = {name: tally.counts_LE.numpy()
                       for name, tally in tallies.items()}


def _tallies(model: BaseModel, classes: Sequence[str], found: Experts
             ) -> dict[str, Tally]:
    """None where no class can be counted."""
    if not classes:
        found.notes.append('the validation set names no classes, so none are '
                           'counted')
        return {}
    layers = {short_name(name): layer
              for name, layer in moe_layers(model).items()}
    if any(layer.router.soft for layer in layers.values()):
        found.notes.append(
            'a soft router mixes all tokens of an image into every slot: no '
            'expert takes a token of a class, so none are counted')
        return {}
    return {name: Tally(len(classes), layer.num_experts)
            for name, layer in layers.items()}


def _spread(length: int, count: int) -> list[int]:
    """So many numbers below the length, evenly spaced."""
    count = min(count, length)
    return [i * length // count for i in range(count)]


def _route(model: BaseModel, item: dict
           ) -> tuple[Tensor, dict[str, Routing | SoftRouting]]:
    """What the backbone got, and what the routers made of it."""
    data = model.data_preprocessor(pseudo_collate([item]), False)
    with record_routing(model) as records:
        # Not the backbone alone: the model tells it the padding.
        model(**data, mode='predict')
        if any(len(routings) != 1 for routings in records.values()):
            # Sliding windows have no one place for a token.
            for routings in records.values():
                routings.clear()
            model.extract_feat(data['inputs'])
    return data['inputs'], {short_name(name): routings[0]
                            for name, routings in records.items()}


def _overlay(item: dict, index: int, inputs: Tensor,
             routings: dict[str, Routing | SoftRouting]) -> Overlay:
    image = item['inputs'].permute(1, 2, 0).cpu().numpy()
    sample = item.get('data_samples')
    if not isinstance(sample, int):  # mmcv reads BGR
        image = image[..., ::-1]
    if image.dtype != np.uint8:
        raise ValueError(f'the validation set gives images of {image.dtype}, '
                         'not of uint8, which cannot be drawn')
    path = getattr(sample, 'img_path', None)
    return Overlay(
        Path(path).name if path else f'image {index}', image,
        [_cropped(routing, _size(inputs), _size(item['inputs']))
         for routing in routings.values()])


def _cropped(routing: Routing | SoftRouting, padded_hw: tuple[int, int],
             image_hw: tuple[int, int]) -> ExpertMap:
    """The expert map without rows and columns that are all padding."""
    stride = token_map(routing.num_tokens, padded_hw)[-1]
    rows, columns = (-(-side // stride) for side in image_hw)
    return ExpertMap(expert_map(routing, padded_hw)[:rows, :columns], stride)


def _add(tally: Tally, routing: Routing | SoftRouting, labels: Tensor,
         image_hw: tuple[int, int], padded_hw: tuple[int, int]) -> None:
    """Count an image, without rows and columns that are all padding."""
    assert isinstance(routing, Routing)
    leading, height, width, stride = token_map(routing.num_tokens, padded_hw)
    shares_HWE = expert_shares(routing)[leading:].view(height, width, -1)
    rows, columns = (-(-side // stride) for side in image_hw)
    tally.add(
        shares_HWE[:rows, :columns],
        patch_classes(labels, (rows, columns), stride, image_hw,
                      tally.counts_LE.shape[0]))


def _count_costs(cfg: Config, model: BaseModel, inputs: Tensor,
                 found: Experts) -> None:
    # A sum over whole images says nothing of their number.
    image = inputs[:1]
    try:
        twin = MODELS.build(dense_twin(cfg.model.backbone)).to(image.device)
        found.costs = {'this model': complexity(model.backbone, image),
                       'dense twin': complexity(twin, image)}
    except Exception as error:
        found.notes.append('the backbone was not counted: '
                           f'{type(error).__name__}: {error}')


def _size(image: Tensor) -> tuple[int, int]:
    """Height and width."""
    return image.shape[-2], image.shape[-1]
