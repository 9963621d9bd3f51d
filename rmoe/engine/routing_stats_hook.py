"""Logs how many tokens each expert receives, and warns of dead experts. The
numbers go to the log and to every backend of the visualizer."""
from mmengine.hooks import Hook
from mmengine.runner import Runner

from rmoe.anywhere.statistics import routing_stats
from rmoe.engine.wrappers import check_buffers, unwrapped
from rmoe.moe import MoELayer, moe_layers
from rmoe.registry import HOOKS


@HOOKS.register_module()
class RoutingStatsHook(Hook):
    """Logs the load of the experts of each MoE layer.

    Every ``interval`` iterations it reports, summed over all ranks and for
    each layer: the share of the load that each expert got, the normalised
    entropy of the load (1 if it is balanced, 0 if one expert has all), the
    share of assignments that were dropped for lack of capacity, the share of
    tokens that no expert kept, and the dead experts. The load of an expert of
    a soft router is the sum of its combine weights.

    Args:
        interval: number of iterations between reports, over which the load is
            counted.
        dead_below: an expert is dead if in this time it got at most this
            fraction of its fair share, which is 1 / number of experts.

    Raises:
        ValueError: for an interval below 1, a fraction outside [0, 1), or a
            DDP wrapper that broadcasts buffers.
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
        self._layers(runner)
        # Reading the counters resets them, so they count from here on.
        routing_stats(unwrapped(runner.model))

    def after_train_iter(self, runner: Runner, batch_idx: int,
                         data_batch: object = None,
                         outputs: dict | None = None) -> None:
        if not self.every_n_train_iters(runner, self.interval):
            return
        layers = self._layers(runner)
        stats = routing_stats(unwrapped(runner.model))
        demand = sum(one.demand for one in stats.values())
        if not demand:
            return  # The stage trains only the core, and no token was routed.
        lines, scalars, dead_total = [], {}, 0
        for name, one in stats.items():
            dead = one.dead(self.dead_below)
            self._warn(runner, name, layers[name], dead)
            dead_total += len(dead)
            scalars.update({f'moe/{name}/load_{e}': share
                            for e, share in enumerate(one.load)})
            scalars[f'moe/{name}/entropy'] = one.entropy
            scalars[f'moe/{name}/dropped'] = one.dropped
            scalars[f'moe/{name}/unrouted'] = one.unrouted
            loads = ' '.join(f'{100 * share:.0f}' for share in one.load)
            lines.append(f'{name}: load % [{loads}]  entropy '
                         f'{one.entropy:.3f}  dropped {100 * one.dropped:.1f} '
                         f'%  unrouted {100 * one.unrouted:.1f} %  dead '
                         f'{dead}')
        runner.logger.info('expert load over the last '
                           f'{self.interval} iterations\n' + '\n'.join(lines))
        hub = runner.message_hub
        hub.update_scalar(
            'train/moe_entropy',
            sum(one.entropy for one in stats.values()) / len(stats))
        kept = sum(one.kept for one in stats.values())
        hub.update_scalar('train/moe_dropped', 1 - kept / demand)
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

    def _warn(self, runner: Runner, name: str, layer: MoELayer,
              dead: list[int]) -> None:
        """Warn of each dead expert once, and again only if it got its share
        of tokens in between."""
        # mmengine logs a warning with the same text only once. With the
        # iteration in it, there can be a second warning of the same expert.
        end = runner.iter + 1
        for expert in range(layer.num_experts):
            key = (name, expert)
            if expert not in dead:
                self._warned.discard(key)
            elif key not in self._warned:
                self._warned.add(key)
                runner.logger.warning(
                    f'expert {expert} of {name} is dead: in iterations '
                    f'{end - self.interval + 1} to {end} it got at most '
                    f'{100 * self.dead_below:g} % of its fair share. Try '
                    f'{layer.router.balance_advice}')

