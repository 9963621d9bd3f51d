"""What the experts receive: to the log, to every visualizer backend, and a
warning before a dead expert goes unnoticed."""
import math

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from rmoe.engine.wrappers import check_buffers, unwrapped
from rmoe.moe import MoELayer, moe_layers
from rmoe.registry import HOOKS


@HOOKS.register_module()
class RoutingStatsHook(Hook):
    """Every ``interval`` iterations, over all ranks, per MoE layer: share of
    load per expert, normalised entropy of the load (1: balanced, 0: one
    expert has all), share of assignments dropped for lack of capacity, share
    of tokens that no expert kept, dead experts. Of a soft router the load is
    what its combine weights sum to.

    Args:
        interval: iterations of one window.
        dead_below: an expert is dead if it got less than this part of its
            fair share over a window.

    Raises:
        ValueError: for an interval below 1, a part outside [0, 1), or a DDP
            wrapper that broadcasts buffers.
    """

    def __init__(self, interval: int = 200, dead_below: float = 0.01) -> None:
        if interval < 1:
            raise ValueError(f'interval={interval} must be at least 1')
        if not 0 <= dead_below < 1:
            raise ValueError(f'dead_below={dead_below} must lie in [0, 1)')
        self.interval = interval
        self.dead_below = dead_below
        self._warned: set[tuple[str, int]] = set()

    def before_train(self, runner: Runner) -> None:
        check_buffers(runner.model)
        _take_counts(self._layers(runner))

    def after_train_iter(self, runner: Runner, batch_idx: int,
                         data_batch: object = None,
                         outputs: dict | None = None) -> None:
        if not self.every_n_train_iters(runner, self.interval):
            return
        layers = self._layers(runner)
        counts = _take_counts(layers)
        if not any(demand_E.sum() for demand_E, *_ in counts.values()):
            return  # core stage: nothing was routed
        lines, scalars, entropies, dead_total = [], {}, [], 0
        demanded = kept = 0.
        for name, (demand_E, kept_E, tokens) in counts.items():
            share_E = demand_E / demand_E.sum().clamp_min(1)
            entropy = normalised_entropy(share_E)
            dropped = 1 - float(kept_E.sum() / demand_E.sum().clamp_min(1))
            dead = self._dead_experts(share_E)
            self._warn(runner, name, layers[name], dead)
            entropies.append(entropy)
            dead_total += len(dead)
            demanded += float(demand_E.sum())
            kept += float(kept_E.sum())
            scalars.update({f'moe/{name}/load_{e}': float(share)
                            for e, share in enumerate(share_E)})
            scalars[f'moe/{name}/entropy'] = entropy
            scalars[f'moe/{name}/dropped'] = dropped
            unrouted = float(tokens[1] / tokens[0].clamp_min(1))
            scalars[f'moe/{name}/unrouted'] = unrouted
            loads = ' '.join(f'{100 * share:.0f}' for share in share_E)
            lines.append(f'{name}: load % [{loads}]  entropy {entropy:.3f}  '
                         f'dropped {100 * dropped:.1f} %  '
                         f'unrouted {100 * unrouted:.1f} %  dead {dead}')
        runner.logger.info('expert load over the last '
                           f'{self.interval} iterations\n' + '\n'.join(lines))
        hub = runner.message_hub
        hub.update_scalar('train/moe_entropy', sum(entropies) / len(counts))
        hub.update_scalar('train/moe_dropped', 1 - kept / demanded)
        hub.update_scalar('train/moe_dead', dead_total)
        runner.visualizer.add_scalars(scalars, step=runner.iter + 1)

    @staticmethod
    def _layers(runner: Runner) -> dict[str, MoELayer]:
        layers = moe_layers(unwrapped(runner.model))
        if not layers:
            raise ValueError('RoutingStatsHook found no MoE layer in the '
                             'model: give the backbone a moe=dict(layers=...)'
                             ', or remove the hook')
        return layers

    def _dead_experts(self, share_E: Tensor) -> list[int]:
        limit = self.dead_below / len(share_E)
        return torch.nonzero(share_E <= limit).flatten().tolist()

    def _warn(self, runner: Runner, name: str, layer: MoELayer,
              dead: list[int]) -> None:
        """Once per expert, until it comes back."""
        # mmengine drops a repeated warning for good; naming the iteration
        # lets an expert that came back be warned of again.
        end = runner.iter + 1
        for expert in range(layer.num_experts):
            key = (name, expert)
            if expert not in dead:
                self._warned.discard(key)
            elif key not in self._warned:
                self._warned.add(key)
                runner.logger.warning(
                    f'expert {expert} of {name} is dead: in iterations '
                    f'{end - self.interval + 1} to {end} it got less than '
                    f'{100 * self.dead_below:g} % of its fair share. Try '
                    f'{layer.router.balance_advice}')


def normalised_entropy(share_E: Tensor) -> float:
    """Entropy of a distribution over its maximum, in [0, 1]."""
    if len(share_E) == 1:
        return 1.0
    return float(torch.special.entr(share_E).sum()) / math.log(len(share_E))


def _take_counts(layers: dict[str, MoELayer]) -> dict[str, list[Tensor]]:
    """Demand, kept and token counts of all ranks since the last call, on the
    CPU; zeroes them.

    One reduction of one flat tensor serves all layers.
    """
    buffers = {name: [layer.demand_E, layer.kept_E, layer.token_counts]
               for name, layer in layers.items()}
    flat = torch.cat([part for parts in buffers.values() for part in parts])
    all_reduce(flat)
    pieces = iter(flat.cpu().double().split(
        [len(part) for parts in buffers.values() for part in parts]))
    counts = {name: [next(pieces) for _ in parts]
              for name, parts in buffers.items()}
    for parts in buffers.values():
        for part in parts:
            part.zero_()
    return counts
