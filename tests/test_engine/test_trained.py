"""A trained model is built and loaded in one way."""
import pytest
import torch
from toy import toy_config, toy_model

from rmoe.engine.trained import build_test_data, trained_model


def test_a_trained_model_computes_what_was_saved(tmp_path):
    cfg = toy_config(tmp_path)
    model = toy_model().eval()
    torch.save(dict(meta={}, state_dict=model.state_dict()),
               tmp_path / 'model.pth')
    loaded = trained_model(cfg, str(tmp_path / 'model.pth'), 'cpu')
    assert not loaded.training
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded(image), model(image))
    cfg.test_dataloader = cfg.train_dataloader
    assert len(build_test_data(cfg)) == 32


def test_what_a_head_lacks_is_an_error_where_it_matters(tmp_path):
    state = toy_model().state_dict()
    del state['head.weight']
    torch.save(dict(meta={}, state_dict=state), tmp_path / 'model.pth')
    cfg = toy_config(tmp_path)
    trained_model(cfg, str(tmp_path / 'model.pth'), 'cpu')
    with pytest.raises(RuntimeError, match=r'missing keys.*head\.weight'):
        trained_model(cfg, str(tmp_path / 'model.pth'), 'cpu', strict=True)
