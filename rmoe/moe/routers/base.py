"""What routers share. Axis letters as in routing.py."""
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from rmoe import compat
from rmoe.moe.assignment import Capacity
from rmoe.moe.buffers import ExactBuffers
from rmoe.moe.host import host_may_read
from rmoe.moe.registry import MODELS
from rmoe.moe.routing import Routing, SoftRouting, check_group, count_groups

# Of a token's logits; anything near it is no logit.
MAX_SUM = 1e30


class NotFiniteError(ValueError):
    """A router met nan or inf."""


def not_finite(count: int, of: int | None = None, where: str = '',
               ranks: str = '') -> NotFiniteError:
    """What to say of tokens with nan or inf.

    Args:
        count: how many they are.
        of: how many tokens there are; None if that is unknown.
        where: the layer.
        ranks: those that met them, if there are several.
    """
    return NotFiniteError(
        f'{where and where + ": "}router logits are nan or inf for {count} '
        f'{"" if of is None else f"of {of} "}tokens'
        f'{ranks and " on rank " + ranks}: the features or the '
        'router diverged. Try a lower learning rate, clip_grad in '
        'optim_wrapper, or bfloat16 instead of float16')


class Router(ExactBuffers, ABC):
    """Maps tokens to a routing, in float32 whatever autocast says.

    Args:
        num_experts: E.
        noise_std: logits get Gaussian noise of deviation noise_std / E in
            training.
        group: the tokens that compete with each other in training: those of
            an 'image', of the whole 'batch' of one GPU, or of a number of
            images.
        eval_group: the same in evaluation.

    Attributes:
        soft: whether slots are mixtures of tokens, instead of tokens.
        experts_per_token: expert FFNs a token goes through, on average.
        keeps_every_token: whether no token is ever left without an expert,
            in the present mode.
        balance_advice: what to try when an expert is dead.
        raises_at_once: whether nan or inf raise where they are met, as can
            be on the CPU. To be switched off where other ranks would wait
            for the one that raises; they are then counted.
        not_finite: () int64, tokens with nan or inf since they were last
            looked at, on an accelerator or if that is switched off.
    """
    not_finite: Tensor
    exact_buffers: ClassVar[tuple[str, ...]] = ('not_finite', )
    soft = False
    keeps_every_token = True
    raises_at_once = True
    balance_advice = 'a lower learning rate of the router, or fewer experts'

    def __init__(self, num_experts: int, noise_std: float,
                 group: str | int, eval_group: str | int) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f'num_experts={num_experts} must be at least 1')
        if not noise_std >= 0:
            raise ValueError(f'noise_std={noise_std} must not be negative')
        check_group('group', group)
        check_group('eval_group', eval_group)
        self.num_experts = num_experts
        self.noise_std = noise_std
        self.group = group
        self.eval_group = eval_group
        self.register_buffer('not_finite', torch.zeros((), dtype=torch.int64),
                             persistent=False)

    @property
    @abstractmethod
    def experts_per_token(self) -> float:
        ...

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None,
                num_images: int = 1) -> Routing | SoftRouting:
        """Decide who goes where.

        Args:
            x_TD: (T, D) tokens, image after image.
            valid_T: (T,) bool, False for padding, which then steers nothing:
                it is routed to nobody and counts in no loss, load or
                capacity.
            num_images: B; T / B tokens belong to each.

        Raises:
            NotFiniteError: for nan or inf in a valid token.
            ValueError: for groups that do not divide the batch.
        """
        option = 'group' if self.training else 'eval_group'
        num_groups = count_groups(num_images, getattr(self, option), option)
        if valid_T is not None:
            # Whatever padding is, nan included, it must not reach a gradient.
            x_TD = x_TD.masked_fill(~valid_T[:, None], 0.)
        # Rounding to bfloat16 flips choices between near-equal experts, so
        # autocast stays outside.
        with torch.autocast(x_TD.device.type, enabled=False):
            return self._route(x_TD.float(), valid_T, num_groups)

    @abstractmethod
    def _route(self, x_TD: Tensor, valid_T: Tensor | None,
               num_groups: int) -> Routing | SoftRouting:
        ...

    def _finite(self, values_TN: Tensor) -> Tensor:
        """The values, if they are finite.

        On an accelerator they are counted, not looked at; MoELossHook reads
        the counts now and then. The CPU counts them if it must not raise.

        Raises:
            NotFiniteError: for nan or inf, or values as large as that.
        """
        if host_may_read(values_TN):
            # One number tells: a sum of finite values overflows only for
            # values that are as good as infinite.
            if not bool(values_TN.detach().sum().isfinite()):
                bad_T = ~(values_TN.abs().sum(1) < MAX_SUM)
                if self.raises_at_once:
                    raise not_finite(int(bad_T.sum()), len(bad_T))
                self.not_finite += bad_T.sum()
                # The CPU reads decisions, and some it must find.
                return values_TN.masked_fill(bad_T[:, None], 0.)
        elif self.training or not compat.is_compiling():
            # Zero times a number is zero, zero times nan or inf is nan.
            self.not_finite += torch.count_nonzero(
                values_TN.detach().sum(1).mul_(0))
        return values_TN

    def _add_noise(self, logits: Tensor) -> Tensor:
        if not (self.training and self.noise_std):
            return logits
        return torch.add(logits, torch.randn_like(logits), alpha=self.noise_sd)

    @property
    def noise_sd(self) -> float:
        return self.noise_std / self.num_experts


class ScoredRouter(Router):
    """A router whose scorer gives each token a logit for each expert.

    Args:
        dim: D.
        scorer: config of a scorer; None means ``dict(type='LinearScorer')``.
    """

    def __init__(self, dim: int, num_experts: int, scorer: Mapping | None,
                 noise_std: float, group: str | int,
                 eval_group: str | int) -> None:
        super().__init__(num_experts, noise_std, group, eval_group)
        self.scorer = MODELS.build(
            dict(scorer or dict(type='LinearScorer')),
            # The scope, or a host library's default scope would hide ours.
            default_args=dict(
                _scope_='rmoe', dim=dim, num_experts=num_experts))

    def _logits(self, x_TD: Tensor) -> Tensor:
        return self._finite(self.scorer(x_TD))


def check_top_k(top_k: int, num_experts: int) -> None:
    """Raises:
        ValueError: if a token cannot have so many experts.
    """
    if not 1 <= top_k <= num_experts:
        raise ValueError(f'top_k={top_k} must lie between 1 and '
                         f'num_experts={num_experts}')


def group_capacity(rule: Callable[[Any], Any], num_tokens: int,
                   valid_T: Tensor | None, num_groups: int
                   ) -> tuple[Capacity, int]:
    """Slots per expert in each group.

    Args:
        rule: from the valid tokens of a group, a number or a float64 tensor
            of numbers, to the slots.
        num_tokens: T.
        valid_T: (T,) bool.
        num_groups: G.

    Returns:
        The number of all groups, or (G,) int64 where their valid tokens
        differ; and a bound of it that is known without looking.
    """
    most = rule(num_tokens // num_groups)
    if valid_T is None:
        return most, most
    if host_may_read(valid_T):
        slots = [rule(tokens) for tokens in
                 valid_T.view(num_groups, -1).sum(1).tolist()]
        return torch.tensor(slots, device=valid_T.device), most
    return rule(valid_T.view(num_groups, -1).sum(1).double()).long(), most
