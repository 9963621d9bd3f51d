"""Names of hubs, without a hub: the libraries' own functions are replaced."""
import sys

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub.utils import EntryNotFoundError
from safetensors.torch import save_file

from rmoe.upcycling import read_checkpoint, state_dict_of


def test_timm(monkeypatch):
    model = timm.create_model('vit_tiny_patch16_224', depth=1)
    asked = []

    def create_model(name, pretrained):
        asked.append((name, pretrained))
        return model

    monkeypatch.setattr(timm, 'create_model', create_model)
    state = state_dict_of(read_checkpoint('timm:some_model.tag'))
    assert asked == [('some_model.tag', True)]
    assert torch.equal(state['cls_token'], model.cls_token)


@pytest.mark.parametrize('file', ['model.safetensors', 'pytorch_model.bin'])
def test_hugging_face(monkeypatch, tmp_path, file):
    weights = {'encoder.weight': torch.randn(2)}
    if file.endswith('.bin'):
        torch.save(weights, tmp_path / file)
    else:
        save_file(weights, tmp_path / file)

    def hf_hub_download(repo, name):
        assert repo == 'owner/model'
        if name != file:
            raise EntryNotFoundError('404')
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', hf_hub_download)
    state = state_dict_of(read_checkpoint('hf:owner/model'))
    assert torch.equal(state['encoder.weight'], weights['encoder.weight'])


@pytest.mark.parametrize('name', ['timm:vit_tiny_patch16_224', 'hf:a/b'])
def test_no_hub_in_reach(monkeypatch, name):
    def refuse(*args, **kwargs):
        raise OSError('name resolution failed\nand much more')

    monkeypatch.setattr(timm, 'create_model', refuse)
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', refuse)
    with pytest.raises(ValueError, match=f'{name} could not .* resolution '
                       r'failed\. Where no hub .* give the file$'):
        read_checkpoint(name)


def test_unknown_model_is_named():
    with pytest.raises(ValueError, match='timm:no_such_model could not'):
        read_checkpoint('timm:no_such_model')


@pytest.mark.parametrize('name, package', [
    ('timm:a', 'timm'), ('hf:a', 'huggingface_hub')])
def test_missing_library_is_named(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f'pip install {package}'):
        read_checkpoint(name)
