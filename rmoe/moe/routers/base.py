"""Base classes and checks that all routers share.

Axis letters as in routing.py.
"""
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

# A token whose logits have a sum of absolute values from here on counts as
# not finite; no sensible logit is near it.
MAX_SUM = 1e30


class NotFiniteError(ValueError):
    """Raised when a router gets nan or inf."""


def not_finite(count: int, of: int | None = None, where: str = '',
               ranks: str = '') -> NotFiniteError:
    """Build the error for tokens with nan or inf.

    Args:
        count: number of such tokens.
        of: number of all tokens; None if that is unknown.
        where: name of the layer; '' leaves it out.
        ranks: the ranks that had such tokens; '' leaves them out.
    """
    return NotFiniteError(
        f'{where and where + ": "}router logits are nan or inf for {count} '
        f'{"" if of is None else f"of {of} "}tokens'
        f'{ranks and " on rank " + ranks}: the features or the '
        'router diverged. Try a lower learning rate, clip_grad in '
        'optim_wrapper, or bfloat16 instead of float16')


class Router(ExactBuffers, ABC):
    """Maps tokens to a routing, in float32 even under autocast.

    Args:
        num_experts: E.
        noise_std: in training, logits get Gaussian noise with the standard
            deviation noise_std / E.
        group: the tokens that compete with each other in training: those of
            an 'image', of the whole 'batch' of one GPU, or of a number of
            images.
        eval_group: the same in evaluation.

    Attributes:
        soft: True if slots hold mixtures of tokens instead of tokens.
        experts_per_token: number of expert FFNs that a token goes through, on
            average.
        keeps_every_token: True if every token always gets an expert. This may
            differ between training and evaluation.
        balance_advice: what a user can try when an expert is dead (gets no
            tokens), for messages.
        raises_at_once: whether the CPU raises as soon as it finds nan or inf.
            To be set to False where other ranks would wait for the one that
            raises. The tokens are then counted in ``not_finite``, as on an
            accelerator.
        not_finite: () int64, the number of tokens with nan or inf since it
            was last zeroed (:mod:`rmoe.moe.finite`).
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
        """Decide which token goes to which expert.

        Args:
            x_TD: (T, D) tokens, image after image.
            valid_T: (T,) bool, False for padding. Padded tokens go to no
                expert and count in no loss, load or capacity. None means all
                are valid.
            num_images: B; each image has T / B tokens.

        Raises:
            NotFiniteError: for nan or inf in a valid token.
            ValueError: for groups that do not divide the batch.
        """
        option = 'group' if self.training else 'eval_group'
        num_groups = count_groups(num_images, getattr(self, option), option)
        if valid_T is not None:
            # Padding may hold nan, which would reach gradients even through
            # a factor of zero.
            x_TD = x_TD.masked_fill(~valid_T[:, None], 0.)
        # Autocast is switched off, because rounding to bfloat16 would flip
        # choices between nearly equal experts.
        with torch.autocast(x_TD.device.type, enabled=False):
            return self._route(x_TD.float(), valid_T, num_groups)

    @abstractmethod
    def _route(self, x_TD: Tensor, valid_T: Tensor | None,
               num_groups: int) -> Routing | SoftRouting:
        ...

    def _finite(self, values_TN: Tensor) -> Tensor:
        """Return the values after a check that they are finite.

        The CPU raises, unless ``raises_at_once`` is off. It then counts the
        tokens with nan or inf in ``not_finite`` and sets their values to
        zero. An accelerator counts them (except in a graph that is compiled
        for evaluation) without waiting for the device; MoELossHook reads the
        count from time to time.

        Raises:
            NotFiniteError: for nan or inf, or for values so large that they
                count as infinite (``MAX_SUM``).
        """
        if host_may_read(values_TN):
            # The sum alone has to be checked: for finite values it overflows
            # only if some are so large that they count as infinite.
            if not bool(values_TN.detach().sum().isfinite()):
                bad_T = ~(values_TN.abs().sum(1) < MAX_SUM)
                if self.raises_at_once:
                    raise not_finite(int(bad_T.sum()), len(bad_T))
                self.not_finite += bad_T.sum()
                # The CPU reads the router's decisions, and with nan there
                # would be none. Zeros let this step run to its end.
                return values_TN.masked_fill(bad_T[:, None], 0.)
        elif self.training or not compat.is_compiling():
            # A sum times zero is zero if it is finite and nan otherwise, so
            # the nonzero products are the tokens to count.
            self.not_finite += torch.count_nonzero(
                values_TN.detach().sum(1).mul_(0))
        return values_TN

    def _add_noise(self, logits: Tensor) -> Tensor:
        if not (self.training and self.noise_std):
            return logits
        return torch.add(logits, torch.randn_like(logits), alpha=self.noise_sd)

    @property
    def noise_sd(self) -> float:
        """Standard deviation of the noise on the logits."""
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
            # Without the scope, a registry would look the name up in the
            # default scope, which is the host library's, and not find it.
            default_args=dict(
                _scope_='rmoe', dim=dim, num_experts=num_experts))

    def _logits(self, x_TD: Tensor) -> Tensor:
        return self._finite(self.scorer(x_TD))


def check_top_k(top_k: int, num_experts: int) -> None:
    """Refuse a number of experts per token that is out of range.

    Raises:
        ValueError: if ``top_k`` is below 1 or above ``num_experts``.
    """
    if not 1 <= top_k <= num_experts:
        raise ValueError(f'top_k={top_k} must lie between 1 and '
                         f'num_experts={num_experts}')


def group_capacity(rule: Callable[[Any], Any], num_tokens: int,
                   valid_T: Tensor | None, num_groups: int
                   ) -> tuple[Capacity, int]:
    """Compute the slots per expert in each group.

    Args:
        rule: computes the slots from the number of valid tokens in a group;
            takes a number, or a float64 tensor of numbers.
        num_tokens: T.
        valid_T: (T,) bool, False for padding; None means all are valid.
        num_groups: G.

    Returns:
        The slots: without ``valid_T`` one number for all groups, otherwise
        (G,) int64. And an upper bound of them that is known without reading a
        tensor: the slots of a group without padding.
    """
    most = rule(num_tokens // num_groups)
    if valid_T is None:
        return most, most
    if host_may_read(valid_T):
        slots = [rule(tokens) for tokens in
                 valid_T.view(num_groups, -1).sum(1).tolist()]
        return torch.tensor(slots, device=valid_T.device), most
    return rule(valid_T.view(num_groups, -1).sum(1).double()).long(), most
