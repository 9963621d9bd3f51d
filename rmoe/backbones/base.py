"""What the MoE backbones have in common."""
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from rmoe import compat, safe_loading
from rmoe.backbones.padding import KnownBatch
from rmoe.moe import MoELayer
from rmoe.upcycling import check_loading, pretrained_weights
from rmoe.upcycling.keymaps import Architecture


def load_pretrained(backbone: Any, init_weights: Callable[[], None]) -> None:
    """mmengine's initialisation, with files that are read and not executed.

    Args:
        backbone: its ``architecture`` finds its weights in the file that
            ``init_cfg`` names.
        init_weights: mmengine's, of this backbone.

    Raises:
        ValueError: if a file does not fit; nothing of it is loaded.
    """
    written = backbone.init_cfg
    items = [written] if isinstance(written, Mapping) else written or []
    pretrained = next((item for item in items if 'checkpoint' in item), {})

    def load(filename: str, map_location: Any) -> dict[str, Any]:
        return pretrained_weights(
            safe_loading.load_from_local(filename, map_location), backbone,
            pretrained)

    # mmengine knows no such option.
    plain = [{key: value for key, value in item.items() if key != 'weights'}
             for item in items]
    backbone.init_cfg = plain if plain else written
    try:
        with safe_loading.installed(load):
            init_weights()
    except ValueError as error:
        file = str(pretrained.get('checkpoint'))
        if file in str(error):
            raise
        raise ValueError(f'{file}: {error}') from error
    finally:
        backbone.init_cfg = written


class MoEBackbone(BaseModule):
    """Freezing, and checkpoints that load wholly or not at all.

    Attributes:
        architecture: what checkpoints it can load.
        known_batches: those of which a model around it knows the padding,
            while it is called; see :mod:`rmoe.backbones.padding`.
    """
    # Of the class: an instance must pickle, and key maps hold functions.
    architecture: ClassVar[Architecture]
    known_batches: tuple[KnownBatch, ...] = ()

    def finish(self, moe: Mapping | None) -> None:
        """To be called when all modules are built."""
        # Of the instance: that marks it as one that wants to be told.
        self.known_batches = ()
        check_loading(self, (moe or {}).get('expert_mismatch', 'raise'))
        # At construction, so that DDP and the optimizer see it.
        for module in self.frozen_modules():
            module.eval()
            module.requires_grad_(False)

    def init_weights(self) -> None:
        """Load what ``init_cfg`` names; files are read, not executed.

        ``dict(type='Pretrained', checkpoint=..., weights='student')`` takes
        other weights of the file than those that evaluate best.

        Raises:
            ValueError: if a file does not fit; nothing of it is loaded.
        """
        load_pretrained(self, super().init_weights)

    def frozen_modules(self) -> list[nn.Module]:
        """What ``frozen_stages`` freezes."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Any:
        """Set the mode; what is frozen stays in evaluation."""
        super().train(mode)
        for module in self.frozen_modules():
            module.eval()
        return self


class PreNormBlock(nn.Module):
    """norm - attention - add, norm - FFN (dense or MoE) - add.

    Args:
        embed_dims: width.
        norm_cfg: of both norms.
        attn: called with the normed tokens and what ``forward`` is given.
        ffn: mmcv's FFN or a MoEFFN.
        with_cp: activation checkpointing.
        norms: names of the two norms.
    """

    def __init__(self, embed_dims: int, norm_cfg: Mapping, attn: nn.Module,
                 ffn: nn.Module, with_cp: bool,
                 norms: tuple[str, str] = ('norm1', 'norm2')) -> None:
        super().__init__()
        first, second = (build_norm_layer(dict(norm_cfg), embed_dims)[1]
                         for _ in norms)
        self.norms = norms
        self.add_module(norms[0], first)
        self.attn = attn
        self.add_module(norms[1], second)
        self.ffn = ffn
        self.with_cp = with_cp
        # A MoE FFN checkpoints its experts itself and routes outside: routing
        # twice would count twice and could choose twice.
        self.ffn_with_cp = with_cp and not isinstance(ffn, MoELayer)

    def forward(self, x: Tensor, *context: Any,
                valid: Tensor | None = None) -> Tensor:
        """(B, T, D) tokens to (B, T, D); (B, T) ``valid`` is False for
        padding."""
        x = run(self._attend, self.with_cp, x, *context)
        return run(self._transform, self.ffn_with_cp, x, valid)

    def _attend(self, x: Tensor, *context: Any) -> Tensor:
        return x + self.attn(getattr(self, self.norms[0])(x), *context)

    def _transform(self, x: Tensor, valid: Tensor | None) -> Tensor:
        y = getattr(self, self.norms[1])(x)
        if valid is not None and isinstance(self.ffn, MoELayer):
            return self.ffn(y, identity=x, valid=valid)
        return self.ffn(y, identity=x)


def run(function: Callable[..., Tensor], with_cp: bool, x: Tensor,
        *args: Any) -> Tensor:
    """``function(x, *args)``, a method of a module, recomputed in backward
    if ``with_cp``; in a traced model it is torch.compile that decides."""
    if with_cp and x.requires_grad and not compat.is_compiling():
        module = function.__self__  # type: ignore[attr-defined]
        return recompute(module, function, x, *args)
    return function(x, *args)


def recompute(module: nn.Module, function: Callable[..., Any], *args: Any,
              **options: Any) -> Any:
    """``function(*args, **options)``, computed again in backward.

    Args:
        module: whose batch norms must not count a batch twice.
        function: what is computed.
        args: what it is called with.
        options: what it is called with by name.
    """
    # Reentrant checkpointing would drop the gradient of auxiliary losses
    # without a word.
    return checkpoint(
        function, *args, use_reentrant=False,
        context_fn=lambda: (nullcontext(), _same_statistics(module)),
        **options)


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
