"""A slow, obvious MoE: one token at a time. The oracle of the fast one."""
import torch
from torch import Tensor
from torch.nn import functional as F

from rmoe.moe import MoELayer, Routing, SoftRouting


def expert_weights(layer: MoELayer, expert: int) -> list[Tensor | None]:
    """fc1 weight, fc1 bias, fc2 weight, fc2 bias of core + residual."""
    experts = layer.experts
    weights = []
    for name in ('fc1', 'fc2'):
        weight = experts.residual_weight(name)[expert]
        bias = getattr(experts, f'residual_{name}_bias')
        bias = None if bias is None else bias[expert]
        if layer.core is not None:
            core = getattr(layer.core, name)
            weight = weight + torch.cat([x.weight.flatten(1) for x in core])
            if bias is not None:
                bias = bias + torch.cat([linear.bias for linear in core])
        weights += [weight, bias]
    return weights


def ffn(x: Tensor, weights: list[Tensor | None]) -> Tensor:
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights
    hidden = F.linear(x, fc1_weight, fc1_bias)
    if len(hidden) == 2 * fc2_weight.shape[1]:
        gate, hidden = hidden.view(2, -1)
        hidden = F.silu(gate) * hidden
    else:
        hidden = F.gelu(hidden)
    return F.linear(hidden, fc2_weight, fc2_bias)


def mixture(layer: MoELayer, x_TD: Tensor, routing: Routing) -> Tensor:
    """What the layer should add to its input, given who goes where."""
    routing = routing.served()
    kept: list[list[tuple[int, Tensor]]] = [[] for _ in range(len(x_TD))]
    for row, (token, expert) in enumerate(zip(routing.token_ids_N.tolist(),
                                              routing.expert_ids_N.tolist())):
        kept[token].append((expert, routing.weights_N[row]))
    outputs = []
    for token, choices in enumerate(kept):
        x = x_TD[token]
        if not choices:
            lonely = layer.core(x) if layer.unrouted == 'core' else 0 * x
            outputs.append(lonely)
            continue
        total = sum(gate for _, gate in choices)
        y = torch.zeros_like(x)
        for expert, gate in choices:
            out = ffn(x, expert_weights(layer, expert))
            if layer.align == 'stopgrad':
                y = y + ((1 / len(choices) - gate) * out).detach() + gate * out
            elif layer.align == 'straight_through':
                y = y + out / len(choices) + (gate - gate.detach()
                                              ) * out.detach()
            elif layer.align == 'renormalize':
                y = y + gate / total * out
            else:
                y = y + gate * out
        outputs.append(y)
    return torch.stack(outputs)


def soft_mixture(layer: MoELayer, x_TD: Tensor, routing: SoftRouting) -> Tensor:
    """The same for a soft routing: one slot at a time."""
    core = layer.core and [
        getattr(linear, part) for (linear, ) in (layer.core.fc1,
                                                 layer.core.fc2)
        for part in ('weight', 'bias')]
    groups, tokens, slots = routing.dispatch_GSN.shape
    outputs = []
    for group, x_SD in enumerate(x_TD.view(groups, tokens, -1)):
        y = [layer.core(x) if layer.align == 'difference' else 0 * x
             for x in x_SD]
        for slot in range(slots):
            mixture = sum(routing.dispatch_GSN[group, token, slot] * x
                          for token, x in enumerate(x_SD))
            expert = slot // (slots // layer.num_experts)
            out = ffn(mixture, expert_weights(layer, expert))
            if layer.align == 'difference':
                out = out - ffn(mixture, core)
            y = [each + routing.combine_GSN[group, token, slot] * out
                 for token, each in enumerate(y)]
        outputs += y
    return torch.stack(outputs)
