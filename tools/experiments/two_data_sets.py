"""One backbone for two data sets, each with a head of its own: the parts of
the plan 'mixed'."""
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModule
from mmseg.datasets import BaseSegDataset
from mmseg.evaluation import IoUMetric
from mmseg.models.segmentors import EncoderDecoder
from mmseg.registry import DATASETS, METRICS, MODELS, TRANSFORMS
from torch import Tensor, nn

from rmoe.moe.registry import MODELS as ROUTING
from rmoe.moe.routers.scorers import LinearScorer

# The logit of an expert that belongs to another data set.
FORBIDDEN = -1e4


@DATASETS.register_module()
class CellDataset(BaseSegDataset):
    """The blood cells of BCCD as a data set for segmentation.

    BCCD has boxes and no masks. Cells are nearly round, so :class:`DrawCells`
    draws each as the ellipse that fills its box.
    """
    METAINFO: ClassVar[dict] = dict(
        classes=('Background', 'RBC', 'WBC', 'Platelets'),
        palette=[[0, 0, 0], [220, 20, 60], [119, 11, 32], [0, 0, 142]])

    def load_data_list(self) -> list[dict[str, Any]]:
        content = json.loads(Path(self.ann_file).read_text())
        cells: dict[int, list] = {image['id']: []
                                  for image in content['images']}
        for cell in content['annotations']:
            cells[cell['image_id']].append((cell['category_id'],
                                            *cell['bbox']))
        folder = Path(self.data_prefix['img_path'])
        return [
            dict(img_path=str(folder / image['file_name']),
                 cells=sorted(cells[image['id']]), label_map=None,
                 reduce_zero_label=False, seg_fields=[])
            for image in content['images']]


@TRANSFORMS.register_module()
class DrawCells(BaseTransform):
    """Draw the cells of an image into its map of classes, at the size of the
    file. Where cells overlap, the rarer class is on top."""

    def transform(self, results: dict) -> dict:
        classes = np.zeros(results['ori_shape'], np.uint8)
        for label, left, top, width, height in results['cells']:
            centre = left + width // 2, top + height // 2
            cv2.ellipse(classes, centre, (width // 2, height // 2), 0, 0, 360,
                        label, thickness=cv2.FILLED)
        results['gt_seg_map'] = classes
        results['seg_fields'].append('gt_seg_map')
        return results


@TRANSFORMS.register_module()
class NameDataset(BaseTransform):
    """Note for each image which data set it is from."""

    def __init__(self, name: str) -> None:
        self.name = name

    def transform(self, results: dict) -> dict:
        return dict(results, dataset=self.name)


@MODELS.register_module()
class HeadForEachDataset(BaseModule):
    """A decode head that gives each image to the head of its data set.

    Args:
        heads: the configs of the heads, by the name of the data set.
    """

    def __init__(self, heads: Mapping[str, Mapping]) -> None:
        super().__init__()
        self.heads = nn.ModuleDict(
            {name: MODELS.build(dict(head)) for name, head in heads.items()})
        # mmseg's segmentor asks for these.
        first: Any = next(iter(self.heads.values()))
        self.align_corners = first.align_corners
        self.num_classes = first.num_classes
        self.out_channels = first.out_channels

    def loss(self, inputs: Sequence[Tensor], batch_data_samples: Sequence,
             train_cfg: Mapping) -> dict[str, Tensor]:
        """The losses of all heads. Their sum is the mean over images."""
        losses = {}
        for name, head in self.heads.items():
            mine = [i for i, sample in enumerate(batch_data_samples)
                    if sample.dataset == name]
            if not mine:
                continue
            found = head.loss([maps[mine] for maps in inputs],
                              [batch_data_samples[i] for i in mine], train_cfg)
            share = len(mine) / len(batch_data_samples)
            losses.update({
                f'{name}.{key}': share * value if 'loss' in key else value
                for key, value in found.items()})
        return losses

    def predict(self, inputs: Sequence[Tensor],
                batch_img_metas: Sequence[Mapping], test_cfg: Mapping
                ) -> Tensor:
        name, = {meta['dataset'] for meta in batch_img_metas}
        return self.heads[name].predict(inputs, batch_img_metas, test_cfg)


@MODELS.register_module()
class SegmentorOfDatasets(EncoderDecoder):
    """An EncoderDecoder that tells each :class:`DatasetScorer` which data set
    each image is from."""

    def forward(self, inputs: Tensor, data_samples: Sequence | None = None,
                mode: str = 'tensor') -> Any:
        names = list(self.decode_head.heads)
        sets_B = torch.tensor([names.index(sample.dataset)
                               for sample in data_samples or ()])
        for module in self.modules():
            if isinstance(module, DatasetScorer):
                module.sets_B = sets_B.to(inputs.device)
        return super().forward(inputs, data_samples, mode)


@ROUTING.register_module()
class DatasetScorer(LinearScorer):
    """A LinearScorer for a router that knows the data set: each data set has
    experts of its own. Expert e belongs to data set e mod 2.

    Attributes:
        sets_B: the data set of each image, 0 or 1.
    """
    sets_B: Tensor

    def forward(self, x_TD: Tensor) -> Tensor:
        logits_TE = super().forward(x_TD)
        sets_T = self.sets_B.repeat_interleave(len(x_TD) // len(self.sets_B))
        owner_E = torch.arange(logits_TE.shape[1], device=x_TD.device) % 2
        return logits_TE.masked_fill(sets_T[:, None] != owner_E, FORBIDDEN)


@METRICS.register_module()
class IoUOfDatasets(BaseMetric):
    """The mIoU of each data set, and their mean.

    Args:
        classes: the names of the classes, by the name of the data set.
    """

    def __init__(self, classes: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.metrics: dict[str, IoUMetric] = {}
        for name, names in classes.items():
            self.metrics[name] = IoUMetric()
            self.metrics[name].dataset_meta = dict(classes=names)

    def process(self, data_batch: Any, data_samples: Sequence[Mapping]
                ) -> None:
        for sample in data_samples:
            self.metrics[sample['dataset']].process({}, [sample])

    def evaluate(self, size: int) -> dict[str, float]:
        # The images of a data set are counted here, because ``size`` is the
        # number of all images.
        found = {
            f'{name}/mIoU': metric.evaluate(len(metric.results))['mIoU']
            for name, metric in self.metrics.items()}
        return dict(mIoU=float(np.mean(list(found.values()))), **found)

    def compute_metrics(self, results: list) -> dict[str, float]:
        raise NotImplementedError('each data set computes its own')
