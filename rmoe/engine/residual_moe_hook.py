"""Staged training of core and residual (2204.09636)."""
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
    """Roles that train until iteration ``end``."""
    name: str
    roles: tuple[str, ...]
    end: int


@HOOKS.register_module()
class ResidualMoEHook(Hook):
    """Trains core, residual, router and head in stages.

    While neither residual nor router trains, MoE layers run their core alone,
    at dense cost, and nothing routes. At a switch the hook changes what
    requires a gradient and wraps the model for DDP afresh: unfreezing behind
    a wrapped model lets ranks drift apart without a word. A model sharded by
    ``fully_shard`` stays as it is wrapped. What is frozen stays
    bit-identical, norm statistics included.

    The stage follows from the iteration, so a resumed run is in the stage it
    was in.

    Args:
        stages: in order, dicts with ``roles`` (a sequence of 'core',
            'residual', 'router', 'head', or 'all'), ``end`` (a fraction of
            the run as float, or a count of iterations or epochs as int; the
            last stage may leave it out), and optionally ``name``.
        by_epoch: whether an int ``end`` counts epochs.

    Raises:
        ValueError: for an unknown role, ends that do not rise, a model
            without MoE layers, a wrapped core that experts would bypass, or
            a model wrapper under which what trains cannot change.
    """
    # Before hooks that look at the model in the same iteration.
    priority = 'ABOVE_NORMAL'

    def __init__(self, stages: Sequence[Mapping],
                 by_epoch: bool = False) -> None:
        if not stages:
            raise ValueError('stages is empty: name at least one')
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
        # The loop calls model.train() before every iteration.
        for norm in self._frozen_norms:
            norm.eval()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        # The checkpoint is written at the end of an iteration; what follows
        # it is the stage of the next.
        stage = self._stage_at(checkpoint['meta'].get('iter', runner.iter))
        checkpoint['meta']['rmoe'] = dict(
            stage=stage.name, plan=[asdict(stage) for stage in self.plan])

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self._saved_plan = checkpoint.get('meta', {}).get(
            'rmoe', {}).get('plan')

    def _resolve(self, runner: Runner) -> list[Stage]:
        """Ends as iterations."""
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
                    f'stage {name!r} ends at iteration {end}, not after '
                    f'{plan[-1].end if plan else 0} where it starts')
            plan.append(Stage(name, roles, end))
        if plan[-1].end < max_iters:
            raise ValueError(
                f'the last stage {plan[-1].name!r} ends at iteration '
                f'{plan[-1].end} of {max_iters}; leave its end out')
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
        # Wrapping with sync_bn makes new norms.
        self._frozen_norms = norms_with_statistics(
            unwrapped(runner.model), set(ROLES) - set(stage.roles))
        runner.logger.info(
            f'stage {stage.name!r} trains {", ".join(stage.roles)} until '
            f'iteration {stage.end}\n' + trainable_table(runner.model))

    def _frozen_by_config(self, model: nn.Module) -> set[str]:
        """What frozen_stages and the like froze before the first stage."""
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
