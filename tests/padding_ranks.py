"""What two ranks know of their padding; see two_ranks.py."""
import torch
from mmdet.structures import DetDataSample
from mmengine.model import BaseModel
from torch.nn.parallel import DistributedDataParallel

from rmoe.backbones.padding import install_padding
from rmoe.moe import moe_layers
from rmoe.registry import MODELS


class Segmentor(BaseModel):
    """With DDP around its backbone, which has another name."""

    def __init__(self, backbone):
        super().__init__()
        self.image_encoder = DistributedDataParallel(
            MODELS.build(backbone), broadcast_buffers=False)

    def forward(self, inputs, data_samples=None, mode='loss'):
        return self.image_encoder(inputs)


def count_padded(rank: int, work_dir: str, backbone: dict) -> int:
    """Tokens at the first MoE layer, of an image whose height the rank
    decides, in a batch of one shape."""
    model = Segmentor(backbone).train()
    install_padding(model)
    sample = DetDataSample(metainfo=dict(img_shape=((32, 32), (12, 32))[rank]))
    DistributedDataParallel(model, broadcast_buffers=False)(
        torch.randn(1, 3, 64, 32), [sample])
    return int(next(iter(moe_layers(model).values())).token_counts[0])
