"""Real weights and real images, where the data root has them.

``data/vit_tiny`` is a ViT-Tiny/16 fine-tuned on Tiny-ImageNet (timm names,
200 classes), ``data/tiny_imagenet_100`` holds images of 100 of those classes.
The data root is ``data/`` in the repository or what RMOE_DATA names.
"""
import io
import json
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

ROOT = Path(os.environ.get(
    'RMOE_DATA', Path(__file__).resolve().parent.parent / 'data'))
WEIGHTS = (ROOT / 'vit_tiny' /
           'vit_tiny_patch16_224_augreg_tinyimagenet200.safetensors')
CLASSES = ROOT / 'vit_tiny' / 'vit_tiny_head_index_to_wnid.json'
IMAGES = ROOT / 'tiny_imagenet_100' / 'val.npz'


def labelled_images(count: int) -> tuple[Tensor, Tensor]:
    """(count, 3, 224, 224) evenly spaced validation images, normalised as
    the weights need, and their classes as indices of the weights' head."""
    data = np.load(IMAGES)
    head = {wnid: int(index) for index, wnid in json.loads(
        CLASSES.read_text()).items()}
    images, labels = [], []
    for i in np.linspace(0, len(data['labels']) - 1, count).astype(int):
        jpeg = data['bytes'][data['offsets'][i]:data['offsets'][i + 1]]
        image = Image.open(io.BytesIO(jpeg.tobytes())).convert('RGB').resize(
            (224, 224), Image.BILINEAR)
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        labels.append(head[str(data['wnids'][data['labels'][i]])])
    return torch.stack(images).float() / 127.5 - 1, torch.tensor(labels)
