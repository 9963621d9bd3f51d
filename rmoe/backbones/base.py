"""What the MoE backbones have in common."""
from collections.abc import Callable, Mapping
from typing import Any

from mmengine.model import BaseModule
from torch import Tensor, nn
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
    """``function(x, *args)``, recomputed in backward if ``with_cp``."""
    if with_cp and x.requires_grad:
        # Reentrant checkpointing would drop the gradient of auxiliary
        # losses without a word.
        return checkpoint(function, x, *args, use_reentrant=False)
    return function(x, *args)
