"""A router that balances the load by a bias instead of an auxiliary loss.

Axis letters as in routing.py.
"""
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from rmoe import compat
from rmoe.moe import assignment
from rmoe.moe.registry import MODELS
from rmoe.moe.routers.base import ScoredRouter, check_top_k
from rmoe.moe.routing import Routing

# Forward passes without an update of the bias, after which a warning follows.
# It is more than any gradient accumulation has between two updates.
PATIENCE = 1000


@MODELS.register_module()
class BiasBalancedRouter(ScoredRouter):
    """Each token chooses its k best experts by sigmoid score plus a bias that
    balances the load (2408.15664, DeepSeek-V3).

    The bias takes part in the choice of experts but not in the gate, which is
    the score alone. After each optimizer step, the bias of an expert with
    more than the mean number of tokens falls by ``update_rate``, and that of
    an expert with fewer rises by it. The bias is not a parameter and gets no
    gradient: ``rmoe.BalanceBiasHook`` updates it from the loads of all ranks.

    Args:
        dim: D, width of the tokens.
        num_experts: E.
        top_k: K.
        update_rate: step of the bias, gamma in the paper.
        scorer: config of the scorer, which computes the logits; None means
            ``dict(type='LinearScorer')``.

    Attributes:
        balance_bias: (E,) float32, saved with the checkpoint.
        recent_load_E: (E,) int64, tokens that chose each expert in training
            since the last update.

    Raises:
        ValueError: for options that make no sense.
    """
    balance_advice = ('a larger router.update_rate, a lower learning rate of '
                      'the router, or fewer experts')
    balance_bias: Tensor
    recent_load_E: Tensor
    exact_buffers = ('balance_bias', 'recent_load_E', 'not_finite')

    def __init__(self,
                 dim: int,
                 num_experts: int,
                 top_k: int = 1,
                 update_rate: float = 0.001,
                 scorer: Mapping | None = None) -> None:
        super().__init__(dim, num_experts, scorer, 0., 'image', 'image')
        check_top_k(top_k, num_experts)
        if not update_rate > 0:
            raise ValueError(f'update_rate={update_rate} must be positive')
        self.top_k = top_k
        self.update_rate = update_rate
        self.register_buffer('balance_bias', torch.zeros(num_experts))
        self.register_buffer(
            'recent_load_E', torch.zeros(num_experts, dtype=torch.int64),
            persistent=False)
        self._waiting = 0

    @property
    def experts_per_token(self) -> float:
        return self.top_k

    def _route(self, x_TD: Tensor, valid_T: Tensor | None,
               num_groups: int) -> Routing:
        check_top_k(self.top_k, self.num_experts)
        logits_TE = self._logits(x_TD)
        gates_TE = logits_TE.sigmoid()
        scores_TE = gates_TE.detach() + self.balance_bias
        ids_TK, gates_TK = assignment.choose(scores_TE, gates_TE, self.top_k)
        rows, pairs_N = assignment.choose_experts(scores_TE, ids_TK, valid_T)
        # Activation checkpointing around the layer repeats its forward during
        # backward, which must not count the loads a second time.
        if self.training and not compat.in_backward():
            self._count(rows.demand_E)
        return Routing(rows, gates_TK.flatten().index_select(0, pairs_N),
                       logits_TE, scores_TE)

    @torch.no_grad()
    def update_bias(self, load_E: Tensor) -> None:
        """Move the bias one step towards balanced loads, in place.

        Args:
            load_E: (E,) tokens that chose each expert, summed over all ranks.
        """
        load_E = load_E.float()
        self.balance_bias += self.update_rate * torch.sign(
            load_E.mean() - load_E)

    def count_anew(self) -> None:
        """Set the loads counted so far to zero."""
        self.recent_load_E.zero_()
        self._waiting = 0

    def _count(self, load_E: Tensor) -> None:
        self.recent_load_E += load_E
        if compat.is_compiling():
            # torch.compile would recompile for every value of the counter.
            return
        self._waiting += 1
        if self._waiting == PATIENCE:
            warnings.warn(
                f'a BiasBalancedRouter has routed {PATIENCE} times without an '
                'update of its bias, so that loads stay unbalanced: add '
                "dict(type='rmoe.BalanceBiasHook') to custom_hooks",
                stacklevel=2)

    def extra_repr(self) -> str:
        return (f'num_experts={self.num_experts}, top_k={self.top_k}, '
                f'update_rate={self.update_rate}')
