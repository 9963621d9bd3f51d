"""Routers that start as centres of clusters."""
import copy

import pytest
import torch
from torch.nn import functional as F

from rmoe.backbones import ViTMoE
from rmoe.moe import moe_layers
from rmoe.moe.recording import record_routing
from rmoe.upcycling import cluster_routers
from rmoe.upcycling.clusters import spherical_kmeans

D = 6


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def bundles(counts, spread=.05):
    """Tokens around unit vectors of length 1 to 3, and their bundle."""
    parts = [(F.one_hot(torch.tensor(i), D) + spread * torch.randn(
        count, D, generator=generator(i))) * (1 + 2 * torch.rand(
            count, 1, generator=generator(i)))
        for i, count in enumerate(counts)]
    return torch.cat(parts), torch.arange(len(counts)).repeat_interleave(
        torch.tensor(counts))


@pytest.mark.parametrize('seed', range(5))
def test_kmeans_finds_bundles_of_any_size(seed):
    x_ND, bundle_N = bundles([50, 5, 200, 30])
    centres_KD = spherical_kmeans(x_ND, 4, generator(seed))
    torch.testing.assert_close(centres_KD.norm(dim=1), torch.ones(4))
    cluster_N = (F.normalize(x_ND, dim=1) @ centres_KD.T).argmax(1)
    pairs = set(zip(bundle_N.tolist(), cluster_N.tolist()))
    assert len(pairs) == 4  # each bundle is a cluster
    for i in range(4):
        mean = F.normalize(F.normalize(x_ND[bundle_N == i], dim=1).sum(0),
                           dim=0)
        assert (centres_KD @ mean).max() > 1 - 1e-5


def test_kmeans_of_equal_tokens_has_no_empty_cluster():
    centres_KD = spherical_kmeans(torch.ones(5, D), 3, generator())
    torch.testing.assert_close(centres_KD.norm(dim=1), torch.ones(3))
    x_ND, _ = bundles([1, 1, 1], spread=0)
    centres_KD = spherical_kmeans(x_ND, 3, generator())
    assert (F.normalize(x_ND, dim=1) @ centres_KD.T).amax(1).min() > 1 - 1e-6


def model_of(**moe):
    torch.manual_seed(3)
    model = ViTMoE(embed_dims=16, num_layers=4, num_heads=2, mlp_dims=32,
                   img_size=32, patch_size=8, moe=dict(
                       layers=(1, 3), num_experts=3, **moe)).eval()
    model.init_weights()
    return model


IMAGES = [torch.randn(1, 3, 32, 32, generator=generator(i)) for i in range(6)]


@pytest.mark.parametrize('core', [True, False])
def test_tokens_go_to_the_expert_of_their_cluster(core):
    model = model_of(core=core)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    shares = cluster_routers(model, IMAGES, seed=0)
    assert list(shares) == ['layers.1.ffn', 'layers.3.ffn']
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == ('scorer' not in key), key
    assert not any(layer.core_only for layer in moe_layers(model).values())
    with record_routing(model) as records, torch.no_grad():
        for image in IMAGES:
            model(image)
    for name, routings in records.items():
        load_E = sum(routing.load_E for routing in routings)
        # Residuals are zero: the tokens are those of the dense model.
        torch.testing.assert_close(load_E.double() / load_E.sum(),
                                   shares[name])
        logits_NE = torch.cat([routing.logits_TE for routing in routings])
        spread = (logits_NE - logits_NE.mean(1, keepdim=True)).std()
        assert .99 < spread < 1.01


def test_the_same_seed_gives_the_same_routers():
    one, same, other = (model_of() for _ in range(3))
    for model, seed in ((one, 0), (same, 0), (other, 1)):
        cluster_routers(model, IMAGES, seed)
    key = 'layers.1.ffn.router.scorer.weight'
    weights = [copy.deepcopy(model.state_dict()[key])
               for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize('router, images, message', [
    (dict(type='TokenChoiceRouter', scorer=dict(type='CosineScorer')), IMAGES,
     'layers.1.ffn: the scorer of its router is a CosineScorer'),
    (dict(type='SoftRouter'), IMAGES, 'only the weights of a LinearScorer'),
    (None, [torch.randn(1, 3, 8, 8)], r'2 tokens are too few for 3 clusters'),
])
def test_what_has_no_centres_is_refused(router, images, message):
    with pytest.raises(ValueError, match=message):
        cluster_routers(model_of(router=router), images, seed=0)
