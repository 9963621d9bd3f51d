"""Models without weights take them from a file, and start what is new."""
import pytest
import torch
from routers import ROUTERS
from torch import nn

from rmoe.backbones import SwinMoE
from rmoe.upcycling import add_noise, fit, give_weights, weightless

SMALL = dict(embed_dims=16, depths=(1, 2), num_heads=(1, 2), strides=(4, 2),
             out_indices=(0, 1), window_size=2, drop_path_rate=0.)


def moe(router, **options):
    return SwinMoE(**SMALL, moe=dict(layers=((), (1, )), num_experts=4,
                                     router=router, **options)).eval()


def test_only_parameters_are_without_weight():
    with weightless():
        model = moe(ROUTERS['bias balanced'])
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    assert not nn.Linear(2, 2).weight.is_meta  # it ends with the block
    with pytest.raises(KeyError), weightless():
        raise KeyError
    assert not nn.Linear(2, 2).weight.is_meta


@pytest.mark.parametrize('router', ROUTERS.values(), ids=ROUTERS)
@pytest.mark.parametrize('options', [{}, dict(core=False), dict(rank=2)],
                         ids=str)
def test_upcycled_like_a_model_with_weights(router, options):
    dense = SwinMoE(**SMALL).eval()
    dense.init_weights()
    state = dense.state_dict()
    with weightless():
        model = moe(router, **options)
    fitted, report = fit(model, state)
    give_weights(model, fitted)
    plain = moe(router, **options)
    plain.load_state_dict(state)
    assert set(model.state_dict()) == set(plain.state_dict())
    for key, value in plain.state_dict().items():
        ours = model.state_dict()[key]
        assert not ours.is_meta and torch.isfinite(ours).all(), key
        if report.status[key] != 'new' or ('residual' in key and (
                not key.endswith('_down'))):
            assert torch.equal(ours, value), key
        elif value.numel() > 16:  # random, of the same spread
            assert 0.5 < float(ours.std() / value.std()) < 2, key
    x = torch.randn(1, 3, 32, 32)
    for a, b in zip(model(x), dense(x)):
        if options.get('core', True):
            assert (a - b).abs().max() < 1e-5
    # weights are those of the file, not copies
    key = 'patch_embed.projection.weight'
    assert model.state_dict()[key].data_ptr() == state[key].data_ptr()


def test_noise_fits_into_shared_zeros():
    dense = SwinMoE(**SMALL)
    with weightless():
        model = moe(ROUTERS['token choice'])
    give_weights(model, fit(model, dense.state_dict())[0])
    add_noise(model, 0.1, seed=0)
    experts = model.stages[1].blocks[1].ffn.experts
    assert experts.residual_fc1_weight.std() > 0
    assert experts.residual_fc1_weight.mean(0).abs().max() < 1e-6
