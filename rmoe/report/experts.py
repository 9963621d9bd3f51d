"""Records which experts the tokens of validation images are sent to by the last
checkpoint of a run, for the pictures and the class chart of its report."""
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
from rmoe.moe.recording import record_routing
from rmoe.report.labels import class_names, label_map
from rmoe.upcycling import read_checkpoint, state_dict_of
from rmoe.visualization.routing_maps import expert_map, token_map
from rmoe.visualization.segmentor import short_name
from rmoe.visualization.specialisation import (
    Tally,
    expert_shares,
    patch_classes,
)


@dataclass(frozen=True)
class ExpertMap:
    """The expert that each patch of an image was sent to in one MoE layer.

    Attributes:
        experts: (h, w) integers, the expert with the largest weight; -1 if no
            expert kept the patch.
        stride: the side of a patch in pixels. The last row and column may
            reach beyond the edge of the image.
    """
    experts: np.ndarray
    stride: int


@dataclass(frozen=True)
class Overlay:
    """An image with the experts that its patches were sent to.

    Attributes:
        name: the file name, or the number of the image in the data set.
        image: (H, W, 3) RGB uint8.
        maps: the expert map of each MoE layer, in order.
    """
    name: str
    image: np.ndarray
    maps: list[ExpertMap]


@dataclass
class Experts:
    """The results of running a checkpoint on images.

    Attributes:
        num_experts: the number of experts of each MoE layer, by its short
            name.
        overlays: some of the images with their expert maps.
        classes: names of the classes; empty if no classes were counted.
        tokens_LE: for each layer, the number of tokens of each class (L, for
            label) that each expert (E) got.
        images: number of images over which classes were counted.
        costs: total and active parameters of the backbone and of its dense
            twin, and the operations of one forward pass, by name.
        size: height and width of the image of that forward pass.
        notes: lines that say what is missing, and why.
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

    If something is missing, such as files, data or classes, ``notes`` of the
    result says so, and nothing is raised: a report without pictures is still
    useful.

    Args:
        cfg: the whole config.
        checkpoint: the file; None if there is none.
        shown: number of images that are kept with their expert maps.
        counted: number of images over which classes are counted, evenly
            spaced over the validation set; the images shown are among them.
    """
    found = Experts()
    # ReportHook calls this during a run. Messages about loading the checkpoint
    # would look in the log as if the run had loaded it.
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
    # Anything may be missing that the config needs: data, a package or enough
    # memory.
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
            f'{checkpoint.name} is a folder with the parts of all ranks: make '
            'a file of it in the work dir with tools/gather_checkpoint.py')
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
            found.notes.append('the validation set has no labels, so no '
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
    """A tally for each MoE layer. If classes cannot be counted, the result is
    empty, and a note says why."""
    if not classes:
        found.notes.append('the validation set has no names of classes, so '
                           'no classes are counted')
        return {}
    layers = {short_name(name): layer
              for name, layer in moe_layers(model).items()}
    if any(layer.router.soft for layer in layers.values()):
        found.notes.append(
            'a soft router mixes all tokens of an image into every slot, so '
            'that no expert gets tokens of one class: no classes are counted')
        return {}
    return {name: Tally(len(classes), layer.num_experts)
            for name, layer in layers.items()}


def _spread(length: int, count: int) -> list[int]:
    """``count`` indices below ``length``, evenly spaced; all of them if there
    are fewer."""
    count = min(count, length)
    return [i * length // count for i in range(count)]


def _route(model: BaseModel, item: dict
           ) -> tuple[Tensor, dict[str, Routing | SoftRouting]]:
    """Run the model on one image.

    Returns:
        The image as the backbone got it, and the routing of each MoE layer.
    """
    data = model.data_preprocessor(pseudo_collate([item]), False)
    with record_routing(model) as records:
        # The whole model runs, because it tells the backbone which tokens are
        # padding.
        model(**data, mode='predict')
        if any(len(routings) != 1 for routings in records.values()):
            # With sliding windows there are several passes, in which the
            # same patch has several tokens. So the backbone is run once
            # more, on the whole image.
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
    """The expert map without the rows and columns that are only padding."""
    stride = token_map(routing.num_tokens, padded_hw)[-1]
    rows, columns = (-(-side // stride) for side in image_hw)
    return ExpertMap(expert_map(routing, padded_hw)[:rows, :columns], stride)


def _add(tally: Tally, routing: Routing | SoftRouting, labels: Tensor,
         image_hw: tuple[int, int], padded_hw: tuple[int, int]) -> None:
    """Count the tokens of an image, without the rows and columns that are only
    padding."""
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
    # The costs shown are those of one image, so the batch is cut to one.
    image = inputs[:1]
    try:
        twin = MODELS.build(dense_twin(cfg.model.backbone)).to(image.device)
        found.costs = {'this model': complexity(model.backbone, image),
                       'dense twin': complexity(twin, image)}
    except Exception as error:
        found.notes.append('the costs of the backbone were not counted: '
                           f'{type(error).__name__}: {error}')


def _size(image: Tensor) -> tuple[int, int]:
    """Height and width of an image tensor."""
    return image.shape[-2], image.shape[-1]
