"""mmengine's loaders read files and never execute them."""
import os
import pickle
import shutil

import pytest
import torch
from mmengine.runner import load_checkpoint
from torch import nn

from rmoe import safe_loading
from rmoe.backbones import ViTMoE

URL = 'https://example.org/models/weights.pth'
VIT = dict(embed_dims=16, num_layers=2, num_heads=2, mlp_dims=32, img_size=16,
           patch_size=8)


class Malicious:

    def __reduce__(self):
        return os.mkdir, ('executed', )


@pytest.fixture
def served(tmp_path, monkeypatch):
    """What the URL serves, and the downloads there were."""
    safe_loading.install()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    downloads = []

    def download(url, path):
        downloads.append(url)
        shutil.copy(tmp_path / 'served', path)

    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    return tmp_path / 'served', downloads


def test_a_url_is_downloaded_once_and_loaded(served):
    path, downloads = served
    weights = nn.Linear(2, 3)
    torch.save(dict(state_dict=weights.state_dict()), path)
    for _ in range(2):
        loaded = nn.Linear(2, 3)
        load_checkpoint(loaded, URL)
        assert torch.equal(loaded.weight, weights.weight)
    assert downloads == [URL]


def test_what_a_url_serves_is_not_executed(served, tmp_path):
    path, _ = served
    path.write_bytes(pickle.dumps(dict(state_dict=Malicious())))
    with pytest.raises(ValueError):
        load_checkpoint(nn.Linear(2, 3), URL)
    assert not (tmp_path / 'executed').exists()


def test_init_cfg_takes_weights_that_lie_under_model(served):
    """DeiT and the original Swin save dict(model=weights)."""
    from timm.models.vision_transformer import VisionTransformer
    path, _ = served
    theirs = VisionTransformer(img_size=16, patch_size=8, embed_dim=16,
                               depth=2, num_heads=2, mlp_ratio=2).eval()
    torch.save(dict(model=theirs.state_dict()), path)
    ours = ViTMoE(**VIT, final_norm=True, moe=dict(
        layers=(1, ), num_experts=2), init_cfg=dict(
            type='Pretrained', checkpoint=URL)).eval()
    ours.init_weights()
    image = torch.randn(1, 3, 16, 16)
    expected = theirs.forward_features(image)[:, 1:].mT.unflatten(2, (2, 2))
    torch.testing.assert_close(ours(image)[-1], expected)


def test_loaders_by_name_go_the_same_way(served, monkeypatch):
    from mmengine.runner import checkpoint
    monkeypatch.setattr(checkpoint, 'get_external_models',
                        lambda: dict(name=URL))
    path, downloads = served
    torch.save(dict(state_dict=nn.Linear(2, 3).state_dict()), path)
    load_checkpoint(nn.Linear(2, 3), 'open-mmlab://name')
    assert downloads == [URL]
