"""Initial router weights from data, so that each expert gets similar tokens.

A fresh router sends tokens to experts at random, so that all experts learn the
same. Here the weights of the router are the centres of clusters of the tokens
that reach it in the dense model. Each expert then gets the tokens of one
cluster from the first iteration (Cluster-aware Upcycling, 2604.13508).

Axis letters: N tokens, K clusters, D channels.
"""
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rmoe.moe import LinearScorer, MoELayer, moe_layers

MAX_TOKENS = 32768
ITERATIONS = 50
DRAWS = 8


@torch.no_grad()
def cluster_routers(model: nn.Module, images: Iterable[Tensor], seed: int
                    ) -> dict[str, Tensor]:
    """Set each router's weights to the centres of clusters of its tokens,
    scaled so that the logits have a standard deviation of one.

    Args:
        model: a backbone with MoE layers, whose dense features are used.
        images: batches (B, C, height, width) of normalised images.
        seed: seed of the choice of tokens and of the first centres.

    Returns:
        For each layer the share (E,) of the tokens that each cluster has.

    Raises:
        ValueError: for a router that is not linear, or fewer tokens than
            experts.
    """
    layers = moe_layers(model)
    for name, layer in layers.items():
        scorer = getattr(layer.router, 'scorer', None)
        if not isinstance(scorer, LinearScorer):
            raise ValueError(
                f'{name}: the scorer of its router is a '
                f'{type(scorer).__name__}; only the weights of a LinearScorer '
                'can be centres of clusters')
    generator = torch.Generator().manual_seed(seed)
    shares = {}
    for name, x_ND in _tokens(model, layers, list(images)).items():
        x_ND = x_ND[torch.randperm(len(x_ND), generator=generator)[
            :MAX_TOKENS]]
        experts = layers[name].num_experts
        if len(x_ND) < experts:
            raise ValueError(f'{name}: {len(x_ND)} tokens are too few for '
                             f'{experts} clusters; give more images')
        centres_KD = spherical_kmeans(x_ND, experts, generator)
        logits_NK = x_ND @ centres_KD.T
        # A part of the logits that all experts share has no effect on the
        # choice of experts, so it does not count as spread.
        spread = (logits_NK - logits_NK.mean(1, keepdim=True)).std()
        scorer = layers[name].router.scorer
        scorer.weight.copy_(centres_KD / spread.clamp_min(1e-6))
        shares[name] = F.one_hot(logits_NK.argmax(1), experts).double().mean(0)
    return shares


def spherical_kmeans(x_ND: Tensor, clusters: int, generator: torch.Generator
                     ) -> Tensor:
    """Cluster tokens by k-means with the cosine as similarity.

    The first centres are drawn as in k-means++, far from each other. This is
    repeated, and the best result is taken. A cluster that loses all its tokens
    gets the token that is farthest from its centre.

    Args:
        x_ND: (N, D) float32, N at least ``clusters``.
        clusters: K.
        generator: source of random numbers for the first centres.

    Returns:
        (K, D) centres of length one.
    """
    x_ND = F.normalize(x_ND.float(), dim=1)
    results = [_improve(x_ND, _first_centres(x_ND, clusters, generator))
               for _ in range(DRAWS)]
    return max(results, key=lambda centres_KD: float(
        (x_ND @ centres_KD.T).amax(1).double().sum()))


def _improve(x_ND: Tensor, centres_KD: Tensor) -> Tensor:
    clusters = len(centres_KD)
    nearest_N = torch.full((len(x_ND), ), -1)
    for _ in range(ITERATIONS):
        cosine_N, now_N = (x_ND @ centres_KD.T).max(1)
        counts_K = torch.bincount(now_N, minlength=clusters)
        for empty in (counts_K == 0).nonzero().flatten().tolist():
            farthest = int(cosine_N.argmin())
            now_N[farthest], cosine_N[farthest] = empty, torch.inf
        if torch.equal(now_N, nearest_N):
            break
        nearest_N = now_N
        centres_KD = F.normalize(torch.zeros_like(centres_KD).index_add(
            0, nearest_N, x_ND), dim=1)
    return centres_KD


def _first_centres(x_ND: Tensor, clusters: int, generator: torch.Generator
                   ) -> Tensor:
    chosen = [int(torch.randint(len(x_ND), (), generator=generator))]
    distance_N = 1 - x_ND @ x_ND[chosen[0]]
    for _ in range(clusters - 1):
        # If all tokens are equal, all distances are zero. The lower limit
        # keeps them valid weights for a draw.
        weights_N = distance_N.clamp_min(1e-12)
        chosen.append(int(torch.multinomial(weights_N, 1,
                                            generator=generator)))
        distance_N = torch.minimum(distance_N, 1 - x_ND @ x_ND[chosen[-1]])
    return x_ND[chosen]


def _tokens(model: nn.Module, layers: dict[str, MoELayer],
            images: list[Tensor]) -> dict[str, Tensor]:
    """The tokens (N, D) that reach each MoE layer in the dense model."""
    found: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str) -> Any:
        return lambda layer, args: found[name].append(
            args[0].detach().flatten(0, -2).float())

    handles = [layer.register_forward_pre_hook(keep(name))
               for name, layer in layers.items()]
    before = {layer: layer.core_only for layer in layers.values()}
    try:
        for layer in layers.values():
            # A layer without a core runs its experts, which are still equal.
            layer.core_only = layer.core is not None
        for image in images:
            model(image)
    finally:
        for layer, only in before.items():
            layer.core_only = only
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}
