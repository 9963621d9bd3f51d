"""Any backbone as an image classifier, to pre-train a dense or MoE core."""
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch.nn import functional as F

from rmoe.registry import MODELS


@MODELS.register_module()
class ImageClassifier(BaseModel):
    """Backbone, global average pooling, linear head.

    The features are the mean over the backbone's last map. If its outputs are
    pairs of map and class token (``output_cls_token=True`` of ViTMoE), the
    features are the last class token instead.

    Mixup (1710.09412) and CutMix (1905.04899) are those of torchvision,
    because they draw from torch's random state, which ``randomness.seed`` sets
    and a resumed run restores. Those of timm draw from NumPy's random state,
    which no checkpoint holds. If both are on, each batch gets one of them,
    both equally often.

    The weights are called ``backbone.*`` and ``head.*``, so that a segmentor
    or detector takes the backbone from the checkpoint with ``load_from`` or
    ``init_cfg=dict(type='Pretrained', checkpoint=..., prefix='backbone.')``.

    Args:
        backbone: config of any backbone.
        num_classes: C.
        in_channels: D, channels of the features.
        norm_cfg: config of a norm of the features, for a backbone that does
            not norm its last map itself, as SwinMoE, CvTMoE and ViTMoE do.
        dropout: dropout rate before the head, in training.
        label_smoothing: share of a target that is spread over all classes.
        mixup: alpha of mixup's Beta distribution; 0 switches it off.
        cutmix: alpha of CutMix's Beta distribution; 0 switches it off.
        data_preprocessor: config of the module that normalises images; None
            leaves images as they are.
        init_cfg: mmengine's initialisation config.

    Raises:
        ValueError: for less than one class, a rate outside [0, 1), a negative
            alpha and, from the first batch, features of other width than
            ``in_channels``.
    """

    def __init__(self,
                 backbone: Mapping[str, Any],
                 num_classes: int,
                 in_channels: int,
                 norm_cfg: Mapping[str, Any] | None = None,
                 dropout: float = 0.,
                 label_smoothing: float = 0.,
                 mixup: float = 0.,
                 cutmix: float = 0.,
                 data_preprocessor: dict[str, Any] | None = None,
                 init_cfg: Mapping[str, Any] | None = None) -> None:
        super().__init__(data_preprocessor, init_cfg)
        if num_classes < 1:
            raise ValueError(f'num_classes={num_classes} must be at least 1')
        for name, rate in (('dropout', dropout),
                           ('label_smoothing', label_smoothing)):
            if not 0 <= rate < 1:
                raise ValueError(f'{name}={rate} must lie in [0, 1)')
        self.backbone = MODELS.build(
            backbone, default_args=dict(_scope_='rmoe'))
        self.norm = (build_norm_layer(dict(norm_cfg), in_channels)[1]
                     if norm_cfg else nn.Identity())
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(in_channels, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=.02)
        nn.init.zeros_(self.head.bias)
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.mix = _build_mix(mixup, cutmix, num_classes)

    def forward(self, inputs: Tensor,
                data_samples: Tensor | Sequence[int] | None = None,
                mode: str = 'tensor') -> Any:
        """Losses, predictions or logits of a batch.

        Args:
            inputs: (B, 3, H, W) normalised images.
            data_samples: B labels.
            mode: 'loss', 'predict' or 'tensor'.

        Returns:
            'loss': a dict with ``loss_cls`` and, where targets are not mixed,
            the percentage ``accuracy_top1``. 'predict': B dicts with
            ``pred_score`` (C), ``pred_label`` and, where labels are given,
            ``gt_label``. 'tensor': logits (B, C).
        """
        if mode == 'tensor':
            return self._logits(inputs)
        labels_B = None if data_samples is None else torch.as_tensor(
            data_samples, device=inputs.device)
        if mode == 'predict':
            return self._predict(inputs, labels_B)
        if mode == 'loss' and labels_B is not None:
            return self._loss(inputs, labels_B)
        raise ValueError(f"mode={mode!r} must be 'loss' (with data_samples), "
                         "'predict' or 'tensor'")

    def _logits(self, inputs: Tensor) -> Tensor:
        outs = self.backbone(inputs)
        last = outs if isinstance(outs, Tensor) else outs[-1]
        features_BD = (last.mean((2, 3)) if isinstance(last, Tensor)
                       else last[1])
        if features_BD.shape[1] != self.head.in_features:
            raise ValueError(
                f'in_channels={self.head.in_features}, but the last output '
                f'of the backbone has {features_BD.shape[1]} channels: set '
                'in_channels to that number')
        return self.head(self.dropout(self.norm(features_BD)))

    def _loss(self, inputs: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
        mix = self.mix if self.training else None
        targets = labels_B
        if mix is not None:
            inputs, targets = mix(inputs, labels_B)
        logits_BC = self._logits(inputs)
        losses = dict(loss_cls=F.cross_entropy(
            logits_BC, targets, label_smoothing=self.label_smoothing))
        if mix is None:
            hits_B = logits_BC.argmax(1) == labels_B
            losses['accuracy_top1'] = 100 * hits_B.float().mean()
        return losses

    def _predict(self, inputs: Tensor, labels_B: Tensor | None
                 ) -> list[dict[str, Any]]:
        scores_BC = self._logits(inputs).softmax(1)
        samples = [dict(pred_score=scores_C, pred_label=label)
                   for scores_C, label in zip(
                       scores_BC, scores_BC.argmax(1).tolist())]
        if labels_B is not None:
            for sample, label in zip(samples, labels_B.tolist()):
                sample['gt_label'] = label
        return samples


def _build_mix(mixup: float, cutmix: float, num_classes: int
               ) -> nn.Module | None:
    """A module that maps images and labels (B) to mixed images and targets
    (B, C); None if neither mixup nor CutMix is on."""
    # Imported here, because segmentors and detectors need no torchvision.
    from torchvision.transforms import v2
    mixes = []
    for name, alpha, kind in (('mixup', mixup, v2.MixUp),
                              ('cutmix', cutmix, v2.CutMix)):
        if alpha < 0:
            raise ValueError(f'{name}={alpha} must not be negative')
        if alpha:
            mixes.append(kind(alpha=alpha, num_classes=num_classes))
    return v2.RandomChoice(mixes) if mixes else None
