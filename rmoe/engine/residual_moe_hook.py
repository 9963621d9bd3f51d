"""Trains the core and the residuals of a MoE model in stages (RMoE,
2204.09636)."""
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from rmoe.anywhere.stages import train_roles
from rmoe.engine.roles import (
    ROLES,
    norms_with_statistics,
    role_of,
    trainable_table,
)
from rmoe.engine.wrappers import (
    check_saving,
    check_wrapper,
    unwrapped,
    wrap_again,
)
from rmoe.registry import HOOKS


@dataclass(frozen=True)
class Stage:
    """A stage of training, in which parameters with these roles train until
    iteration ``end``."""
    name: str
    roles: tuple[str, ...]
    end: int


@HOOKS.register_module()
class ResidualMoEHook(Hook):
    """Trains core, residual, router and head in stages.

    While neither residuals nor routers train, MoE layers compute only their
    core, at the cost of a dense layer, and no token is routed. At the switch
    to another stage the hook changes ``requires_grad`` of parameters and
    wraps the model in a new DDP. If parameters were unfrozen inside of the
    old one, it would not average their gradients, and the ranks would
    silently get different weights. A model sharded by ``fully_shard`` needs
    no new wrapper. Frozen parameters stay bit-identical, and so do the
    running statistics of frozen norms.

    The stage follows from the number of the iteration, so a resumed run
    continues in the stage in which it stopped.

    Args:
        stages: the stages in order, as dicts. ``roles`` is a sequence of
            'core', 'residual', 'router' and 'head', or 'all'. ``end`` is a
            fraction of the run as float, or a number of iterations or epochs
            as int; the last stage may leave it out. ``name`` is optional.
        by_epoch: whether an int ``end`` counts epochs.

    Raises:
        ValueError: for an unknown role, for an end that is not after the end
            of the stage before, for a model without MoE layers, if the core
            of a layer was wrapped by something that experts would bypass, or
            for a model wrapper that does not allow parameters to be frozen or
            unfrozen.
    """
    # The hook must run before hooks that look at the model in the same
    # iteration.
    priority = 'ABOVE_NORMAL'

    def __init__(self, stages: Sequence[Mapping],
                 by_epoch: bool = False) -> None:
        if not stages:
            raise ValueError('stages is empty: give at least one stage')
        self.by_epoch = by_epoch
        self.stages = [_check_stage(i, stage, i == len(stages) - 1)
                       for i, stage in enumerate(stages)]
        self.plan: list[Stage] = []
        self.current: Stage | None = None
        self._saved_plan: list[dict] | None = None
        self._frozen_norms: list[nn.Module] = []

    def before_train(self, runner: Runner) -> None:
        check_wrapper(runner)
        check_saving(runner)
        self.plan = self._resolve(runner)
        self._check_resumed(runner)
        self._enter(runner, self._stage_at(runner.iter))

    def before_train_iter(self, runner: Runner, batch_idx: int,
                          data_batch: object = None) -> None:
        stage = self._stage_at(runner.iter)
        if stage != self.current:
            self._enter(runner, stage)
        # The training loop calls model.train() before every iteration, which
        # would let frozen norms update their statistics.
        for norm in self._frozen_norms:
            norm.eval()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        # The checkpoint is written at the end of an iteration. A resumed run
        # begins with the next iteration, so the stage of that one is saved.
        stage = self._stage_at(checkpoint['meta'].get('iter', runner.iter))
        checkpoint['meta']['rmoe'] = dict(
            stage=stage.name, plan=[asdict(stage) for stage in self.plan])

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self._saved_plan = checkpoint.get('meta', {}).get(
            'rmoe', {}).get('plan')

    def _resolve(self, runner: Runner) -> list[Stage]:
        """The stages with their ends as numbers of iterations."""
        max_iters = runner.max_iters
        plan: list[Stage] = []
        for name, roles, end in self.stages:
            if end is None:
                end = max_iters
            elif isinstance(end, float):
                end = round(end * max_iters)
            elif self.by_epoch:
                end = end * len(runner.train_dataloader)
            if end <= (plan[-1].end if plan else 0):
                raise ValueError(
                    f'stage {name!r} ends at iteration {end}, which is not '
                    f'after {plan[-1].end if plan else 0}, where it starts. '
                    'Give it a larger end')
            plan.append(Stage(name, roles, end))
        if plan[-1].end < max_iters:
            raise ValueError(
                f'the last stage {plan[-1].name!r} ends at iteration '
                f'{plan[-1].end}, but the run has {max_iters}: leave its end '
                'out')
        return plan

    def _stage_at(self, iteration: int) -> Stage:
        return next((stage for stage in self.plan if iteration < stage.end),
                    self.plan[-1])

    def _check_resumed(self, runner: Runner) -> None:
        if not runner._resume or self._saved_plan is None:
            return
        saved = [(tuple(stage['roles']), stage['end'])
                 for stage in self._saved_plan]
        planned = [(stage.roles, stage.end) for stage in self.plan]
        if saved != planned:
            raise ValueError(
                f'the checkpoint was trained with the stages {saved} and the '
                f'config has {planned}: optimizer state and schedule do not '
                'fit. Start a new run from its weights: load_from=CHECKPOINT '
                'without --resume')

    def _enter(self, runner: Runner, stage: Stage) -> None:
        model = unwrapped(runner.model)
        try:
            train_roles(model, stage.roles, role_of,
                        self._frozen_by_config(model))
        except ValueError as error:
            raise ValueError(f'stage {stage.name!r}: {error}') from None
        self.current = stage
        wrap_again(runner)
        # Wrapping with sync_bn replaces the norms, so they are looked up
        # afterwards.
        self._frozen_norms = norms_with_statistics(
            unwrapped(runner.model), set(ROLES) - set(stage.roles))
        runner.logger.info(
            f'stage {stage.name!r} trains {", ".join(stage.roles)} until '
            f'iteration {stage.end}\n' + trainable_table(runner.model))

    def _frozen_by_config(self, model: nn.Module) -> set[str]:
        """The names of the parameters that options such as frozen_stages froze
        before the first stage. They stay frozen in all stages."""
        if self.current is None:
            self._config_frozen = {
                name for name, parameter in model.named_parameters()
                if not parameter.requires_grad}
        return self._config_frozen


def _check_stage(index: int, stage: Mapping, last: bool
                 ) -> tuple[str, tuple[str, ...], int | float | None]:
    unknown = set(stage) - {'name', 'roles', 'end'}
    if unknown or 'roles' not in stage:
        raise ValueError(f'stages[{index}]={dict(stage)} needs roles, and may '
                         'have name and end')
    roles = stage['roles']
    roles = ROLES if roles == 'all' else (
        (roles, ) if isinstance(roles, str) else tuple(roles))
    for role in roles:
        if role not in ROLES:
            raise ValueError(f'stages[{index}] names the role {role!r}; roles '
                             f"are {ROLES}, or 'all'")
    roles = tuple(role for role in ROLES if role in roles)
    end = stage.get('end')
    if end is None and not last:
        raise ValueError(f'stages[{index}] needs an end: only the last stage '
                         'runs to the end by itself')
    if isinstance(end, float) and not 0 < end <= 1:
        raise ValueError(f'stages[{index}].end={end}: a float is a fraction '
                         'of the run, between 0 and 1')
    return stage.get('name', '+'.join(roles)), roles, end
