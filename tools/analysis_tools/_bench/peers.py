"""Measures MoE layers of other projects on the same work, if they are
installed.

Experts with a gated activation have three matrices in place of two. They get
two thirds of the hidden width, so that operations and parameters are the same.
"""
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from _bench.layers import KINDS, Size, dense_ffn, moe_layer
from _bench.passes import TRAIN, step
from _bench.timing import DEVICE, Row, interleave

SIZES: tuple[Size, ...] = ((2048, 384, 8), (8192, 384, 8), (512, 768, 8))
DENSE = 'dense FFN'


class FirstOutput(nn.Module):
    """Returns only the first output of a layer, without losses and logits."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        return out[0] if isinstance(out, tuple) else out


@dataclass(frozen=True)
class Peer:
    """A project whose layers are measured.

    Attributes:
        name: the name of the project.
        command: the command that installs it.
        layers: a function from (dim, experts, tokens) to pairs of a label and
            a layer. It raises ImportError if the project is not installed.
    """
    name: str
    command: str
    layers: Callable[[int, int, int], Iterator[tuple[str, nn.Module]]]


def tutel(dim: int, experts: int, tokens: int
          ) -> Iterator[tuple[str, nn.Module]]:
    from tutel import moe
    yield 'Tutel, top-1, capacity 1', moe.moe_layer(
        gate_type=dict(type='top', k=1), model_dim=dim, experts=dict(
            type='ffn', num_experts_per_device=experts,
            hidden_size_per_expert=4 * dim, activation_fn=F.gelu))


def st_moe(dim: int, experts: int, tokens: int
           ) -> Iterator[tuple[str, nn.Module]]:
    from st_moe_pytorch import MoE
    yield 'st-moe-pytorch, top-2, capacity 1.25', MoE(
        dim, num_experts=experts, gating_top_n=2)


def switch(dim: int, experts: int, tokens: int
           ) -> Iterator[tuple[str, nn.Module]]:
    import transformers
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers import (
        modeling_switch_transformers as switch,
    )
    config = SwitchTransformersConfig(
        d_model=dim, d_ff=4 * dim, num_experts=experts,
        expert_capacity=tokens, dropout_rate=0., router_jitter_noise=0.,
        dense_act_fn='gelu')
    yield (f'transformers {transformers.__version__} Switch, top-1',
           initialized(switch.SwitchTransformersSparseMLP(config)))


def mixtral(dim: int, experts: int, tokens: int
            ) -> Iterator[tuple[str, nn.Module]]:
    import transformers
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import (
        MixtralSparseMoeBlock,
    )
    implementations: tuple[str, ...] = ('eager', )
    # transformers 5 has other implementations. Of these, batched_mm is left
    # out, because it copies the weights for each token.
    try:
        from transformers.integrations import moe  # noqa: F401
        implementations += ('grouped_mm', )
    except ImportError:
        pass
    for top_k in (1, 2):
        for implementation in implementations:
            config = MixtralConfig(
                hidden_size=dim, intermediate_size=8 * dim // 3,
                num_local_experts=experts, num_experts_per_tok=top_k)
            config._experts_implementation = implementation
            yield (f'transformers {transformers.__version__} Mixtral, '
                   f'top-{top_k}, {implementation}',
                   initialized(MixtralSparseMoeBlock(config)))


def initialized(layer: nn.Module) -> nn.Module:
    """Initialise the weights of a layer of transformers, which leaves this to
    its models."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    return layer


PEERS = (
    Peer('Tutel', 'pip install git+https://github.com/microsoft/tutel', tutel),
    Peer('st-moe-pytorch', 'pip install st-moe-pytorch', st_moe),
    Peer('Switch Transformers', 'pip install transformers', switch),
    Peer('Mixtral', 'pip install transformers', mixtral))


def available(dim: int, experts: int, tokens: int) -> dict[str, nn.Module]:
    """Layers of all peers that can be imported."""
    found: dict[str, nn.Module] = {}
    for peer in PEERS:
        try:
            found.update(peer.layers(dim, experts, tokens))
        except ImportError as error:
            print(f'skipped {peer.name} ({error}): {peer.command}')
    return found


def mmseg_is_there() -> bool:
    try:
        importlib.import_module('mmseg.models')
    # With transformers 5 the import raises a TypeError.
    except Exception as error:
        print(f"skipped mmseg's Swin ({error}): pip install mmsegmentation "
              "'transformers<5'")
        return False
    return True


def benchmark_peers(repeats: int, sizes: Sequence[Size] = SIZES,
                    images: int = 1) -> list[Row]:
    """Time of the forward and backward pass over that of the dense FFN.

    Args:
        repeats: how often each layer is timed.
        sizes: T, D and E of each measurement.
        images: number of images to which the tokens belong. It matters for
            st-moe-pytorch, whose time grows with the square of the tokens of
            an image, and for Switch, which has a capacity for each image.
    """
    rows = []
    for tokens, dim, experts in sizes:
        models: dict[str, Any] = {DENSE: dense_ffn(dim)}
        for kind in ('no core', 'core + residual'):
            for top_k in (1, 2):
                models[f'rmoe, {kind}, top-{top_k}'] = moe_layer(
                    dim, experts, **KINDS[kind],
                    router=dict(type='TokenChoiceRouter', top_k=top_k))
        models.update(available(dim, experts, tokens))
        x = torch.randn(images, tokens // images, dim, device=DEVICE,
                        requires_grad=True)
        seconds = interleave(
            {name: step(FirstOutput(model).to(DEVICE), x, TRAIN)
             for name, model in models.items()}, repeats)
        rows += [{'T': tokens, 'images': images, 'D': dim, 'E': experts,
                  'layer': name, 'measured': TRAIN,
                  'ms': round(1e3 * value, 2),
                  'over dense': round(value / seconds[DENSE], 2)}
                 for name, value in seconds.items()]
    return rows
