"""Measures routers alone, and Soft MoE against its own matrix products."""
from functools import partial

import torch
from torch import Tensor

from _bench.counting import counts
from _bench.layers import Size, dense_ffn, spread_load
from _bench.passes import FORWARD, TRAIN, Run, step
from _bench.precision import autocast, now
from _bench.timing import DEVICE, Row, interleave
from rmoe.moe import MoEFFN

SIZE: Size = (8192, 384, 8)


def benchmark_routers(repeats: int, images: int, size: Size = SIZE
                      ) -> list[Row]:
    """Time of routing alone over the forward pass of the dense FFN, and of the
    layer's forward and backward pass over those of the FFN."""
    tokens, dim, experts = size
    dense = dense_ffn(dim).to(DEVICE)
    layers = {name: MoEFFN(dim, 4 * dim, experts, router=router).to(DEVICE)
              for name, router in routers(tokens // images, experts).items()}
    spread_load(layers.values())
    # Without a list the layers would warn that their auxiliary losses are not
    # collected.
    for layer in layers.values():
        layer.losses = []
    x = torch.randn(images, tokens // images, dim, device=DEVICE,
                    requires_grad=True)
    x_TD = x.detach().view(tokens, dim)

    def route(layer: MoEFFN, training: bool) -> Run:
        def run() -> None:
            layer.router.train(training)
            with torch.set_grad_enabled(training), autocast():
                layer.router(x_TD, None, images)
        return run

    seconds = {}
    for what, steps in (
            ('evaluation', {n: route(m, False) for n, m in layers.items()}),
            ('training', {n: route(m, True) for n, m in layers.items()})):
        steps['dense'] = step(dense, x, FORWARD)
        times = interleave(steps, repeats)
        seconds[what] = {n: t / times['dense'] for n, t in times.items()}
    steps = {n: step(m, x, TRAIN) for n, m in layers.items()}
    steps['dense'] = step(dense, x, TRAIN)
    times = interleave(steps, repeats)
    return [{'router': name, 'routing, evaluation':
             round(seconds['evaluation'][name], 3),
             'routing, training': round(seconds['training'][name], 3),
             'layer forward+backward': round(times[name] / times['dense'], 2),
             **counts(steps[name])}
            for name in layers]


def routers(tokens_per_image: int, experts: int) -> dict[str, dict]:
    return {
        'softmax token choice': dict(type='TokenChoiceRouter'),
        'the same, capacity 1, batch prioritised': dict(
            type='TokenChoiceRouter', capacity_factor=1.,
            eval_capacity_factor=1., priority='bpr'),
        'Sinkhorn token choice': dict(type='SinkhornTokenChoiceRouter'),
        'softmax expert choice': dict(type='ExpertChoiceRouter'),
        'Sinkhorn expert choice': dict(type='SinkhornExpertChoiceRouter'),
        'sparse expert choice': dict(type='SparseExpertChoiceRouter'),
        'cosine token choice': dict(
            type='TokenChoiceRouter', scorer=dict(type='CosineScorer')),
        'bias-balanced token choice': dict(type='BiasBalancedRouter'),
        'Soft MoE, a slot per token': dict(
            type='SoftRouter', slots_per_expert=tokens_per_image // experts),
        'Soft MoE, a slot per four tokens': dict(
            type='SoftRouter',
            slots_per_expert=tokens_per_image // experts // 4),
    }


def benchmark_soft(repeats: int, images: int, size: Size = SIZE
                   ) -> list[Row]:
    """Time of the forward and backward pass of Soft MoE over that of its own
    matrix products alone, measured in turns. The dense FFN is measured in the
    same way for comparison."""
    tokens, dim, experts = size
    hidden, group = 4 * dim, tokens // images
    x = torch.randn(images, group, dim, device=DEVICE, requires_grad=True)

    def ffn(rows: int, count: int = 1) -> list[Run]:
        return count * (products(1, rows, dim, hidden) +
                        products(1, rows, hidden, dim))

    contenders = [('dense FFN', '', dense_ffn(dim).to(DEVICE), ffn(tokens),
                   [])]
    for slots in (group, group // 4):
        logits = products(1, tokens, dim, slots)
        # The first product is dispatch, which makes slots from tokens. The
        # second is combine, which makes tokens from slots.
        mixing = (products(images, slots, group, dim) +
                  products(images, group, slots, dim))
        on_slots = ffn(images * slots // experts, experts)
        for align, more in (('none', []), (
                'difference', ffn(images * slots) + ffn(tokens))):
            layer = MoEFFN(
                dim, hidden, experts, align=align, core=align != 'none',
                router=dict(type='SoftRouter',
                            slots_per_expert=slots // experts)).to(DEVICE)
            contenders.append((f"Soft MoE, align='{align}'", slots / group,
                               layer, mixing + on_slots + more, logits))
    rows = []
    for name, slots_per_token, layer, own, logits in contenders:
        times = interleave({'layer': step(layer, x, TRAIN),
                            'own': partial(run_all, own),
                            'logits': partial(run_all, logits)}, repeats)
        rows.append({
            'forward+backward': name, 'slots per token': slots_per_token,
            'ms': round(1e3 * times['layer'], 1),
            'over its products': round(
                times['layer'] / (times['own'] + times['logits']), 2),
            'the logits product not counted': round(
                times['layer'] / times['own'], 2)})
    return rows


def products(batch: int, rows: int, inner: int, columns: int) -> list[Run]:
    """The three products of a linear map, forward and backward."""
    def matrix(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, device=DEVICE, dtype=now().dtype)

    left, right, out = (matrix(rows, inner), matrix(inner, columns),
                        matrix(rows, columns))
    left_grad, right_grad = torch.empty_like(left), torch.empty_like(right)
    return [lambda: torch.bmm(left, right, out=out),
            lambda: torch.bmm(out, right.mT, out=left_grad),
            lambda: torch.bmm(left.mT, out, out=right_grad)]


def run_all(steps: list[Run]) -> None:
    for each in steps:
        each()
