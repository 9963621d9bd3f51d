"""What the MoE backbones have in common."""
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from rmoe.upcycling import check_loading
from rmoe.upcycling.keymaps import Architecture


class MoEBackbone(BaseModule):
    """Freezing, and checkpoints that load wholly or not at all.

    Attributes:
        architecture: what checkpoints it can load.
    """
    architecture: Architecture

    def finish(self, architecture: Architecture,
               moe: Mapping | None) -> None:
        """To be called when all modules are built."""
        check_loading(self, architecture,
                      (moe or {}).get('expert_mismatch', 'raise'))
        # At construction, so that DDP and the optimizer see it.
        for module in self.frozen_modules():
            module.eval()
            module.requires_grad_(False)

    def frozen_modules(self) -> list[nn.Module]:
        """What ``frozen_stages`` freezes."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Any:
        """Set the mode; what is frozen stays in evaluation."""
        super().train(mode)
        for module in self.frozen_modules():
            module.eval()
        return self


def run(function: Callable[..., Tensor], with_cp: bool, x: Tensor,
        *args: Any) -> Tensor:
    """``function(x, *args)``, a method of a module, recomputed in backward
    if ``with_cp``."""
    if with_cp and x.requires_grad:
        module = function.__self__  # type: ignore[attr-defined]
        # Reentrant checkpointing would drop the gradient of auxiliary
        # losses without a word.
        return checkpoint(
            function, x, *args, use_reentrant=False,
            context_fn=lambda: (nullcontext(), _same_statistics(module)))
    return function(x, *args)


@contextmanager
def _same_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norms do not count a batch that they meet again."""
    norms = [(norm, norm.momentum, norm.num_batches_tracked)
             for norm in module.modules() if isinstance(norm, _BatchNorm)]
    for norm, _, count in norms:
        norm.momentum = 0.
        norm.num_batches_tracked = None if count is None else count.clone()
    try:
        yield
    finally:
        for norm, momentum, count in norms:
            norm.momentum, norm.num_batches_tracked = momentum, count
