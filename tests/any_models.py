"""Small models of several libraries with random weights."""
import pytest
import timm
import torch
import torchvision
from torch import nn

transformers = pytest.importorskip('transformers')
SMALL = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
             intermediate_size=64, image_size=32, patch_size=8)


class Own(nn.Module):
    """Names, order and dropouts as nobody else has them."""

    def __init__(self, hidden=16):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.ffn = nn.Sequential(nn.Linear(8, hidden), nn.Dropout(.5),
                                 nn.SiLU(), nn.Linear(hidden, 8, bias=False),
                                 nn.Dropout(.1))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.norm(x.flatten(1).view(len(x), 3, -1)[..., :8])
        return self.head(x + self.ffn(x))


MODELS = {
    'own': Own,
    'timm ViT': lambda: timm.create_model(
        'vit_tiny_patch16_224', depth=3, img_size=32, num_classes=2),
    'HF ViT': lambda: transformers.ViTModel(transformers.ViTConfig(**SMALL)),
    'HF Swin': lambda: transformers.SwinModel(transformers.SwinConfig(
        embed_dim=16, depths=[1, 2], num_heads=[1, 2], window_size=4,
        image_size=32)),
    'HF DINOv2': lambda: transformers.Dinov2Model(
        transformers.Dinov2Config(**SMALL)),
    'HF SegFormer': lambda: transformers.SegformerModel(
        transformers.SegformerConfig(
            hidden_sizes=[16] * 4, depths=[1] * 4,
            num_attention_heads=[1] * 4)),
    'HF Mask2Former': lambda: transformers.Mask2FormerModel(
        transformers.Mask2FormerConfig(
            feature_size=32, mask_feature_size=32, hidden_dim=32,
            encoder_layers=1, decoder_layers=1, num_attention_heads=2,
            dim_feedforward=64, encoder_feedforward_dim=64, num_queries=5,
            backbone_config=transformers.SwinConfig(
                embed_dim=16, depths=[1] * 4, num_heads=[1] * 4,
                window_size=4, out_features=[
                    'stage1', 'stage2', 'stage3', 'stage4']))),
    'torchvision Swin': lambda: torchvision.models.SwinTransformer(
        [4, 4], 16, [1, 1], [1, 2], [4, 4], num_classes=2),
}
INPUT = torch.randn(2, 3, 64, 64)
