"""The base class and the block that our backbones share, and recomputation.

:func:`load_pretrained` and :func:`recompute` are for other backbones too.
"""
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
    """Run mmengine's initialisation, but read checkpoint files safely: no
    code in a file is executed.

    Args:
        backbone: the backbone; its ``architecture`` finds its weights in the
            file that ``init_cfg`` names.
        init_weights: mmengine's ``init_weights``, bound to this backbone.

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

    # mmengine does not know the option ``weights``, so it is left out.
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
    """Base class of our backbones: it freezes stages, and loads a checkpoint
    completely or not at all.

    Attributes:
        architecture: the checkpoints that the backbone can load, and how
            their weights are named.
        known_batches: the batches whose padding is known, while the model
            around the backbone is called; see :mod:`rmoe.backbones.padding`.
    """
    # This is an attribute of the class, because an instance must pickle and
    # the key maps inside hold functions.
    architecture: ClassVar[Architecture]
    known_batches: tuple[KnownBatch, ...] = ()

    def finish(self, moe: Mapping | None) -> None:
        """Finish the construction. A subclass calls this when all of its
        modules are built.

        Args:
            moe: the backbone's option ``moe``; its ``expert_mismatch`` is
                read.
        """
        # An attribute of the instance marks modules to which
        # rmoe.backbones.padding is to tell the padding of a batch.
        self.known_batches = ()
        check_loading(self, (moe or {}).get('expert_mismatch', 'raise'))
        # Parameters are frozen at construction, so that DDP and the optimizer
        # see it.
        for module in self.frozen_modules():
            module.eval()
            module.requires_grad_(False)

    def init_weights(self) -> None:
        """Initialise as ``init_cfg`` says. No code in a checkpoint file is
        executed.

        If a file holds several sets of weights (an EMA or a teacher beside
        the trained ones), the one that evaluates best is loaded.
        ``dict(type='Pretrained', checkpoint=..., weights='student')`` names
        another.

        Raises:
            ValueError: if a file does not fit; nothing of it is loaded.
        """
        load_pretrained(self, super().init_weights)

    def frozen_modules(self) -> list[nn.Module]:
        """The modules that ``frozen_stages`` freezes."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Any:
        """Set training or evaluation mode; frozen modules stay in evaluation
        mode."""
        super().train(mode)
        for module in self.frozen_modules():
            module.eval()
        return self


class PreNormBlock(nn.Module):
    """A transformer block: norm - attention - add, norm - FFN - add.

    Args:
        embed_dims: D.
        norm_cfg: config of both norms.
        attn: called with the normalised tokens and the further arguments of
            ``forward``.
        ffn: the FFN, dense (mmcv's) or MoE (:class:`rmoe.moe.MoEFFN`).
        with_cp: activation checkpointing.
        norms: names of the two norms, as attributes of the block.
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
        # A MoE FFN recomputes its experts itself and does not recompute its
        # router. A router that ran twice would count loads twice, and could
        # choose other experts the second time.
        self.ffn_with_cp = with_cp and not isinstance(ffn, MoELayer)

    def forward(self, x: Tensor, *context: Any,
                valid: Tensor | None = None) -> Tensor:
        """Compute the block.

        Args:
            x: (B, T, D) tokens.
            context: further arguments of the attention.
            valid: (B, T) bool, False for padding; None means all are valid.

        Returns:
            (B, T, D).
        """
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
    """Return ``function(x, *args)``, recomputed in backward if ``with_cp``.

    In a compiled model, torch.compile decides what is recomputed.

    Args:
        function: a bound method of a module.
        with_cp: whether to recompute.
        x: its first argument.
        args: its other arguments.
    """
    if with_cp and x.requires_grad and not compat.is_compiling():
        module = function.__self__  # type: ignore[attr-defined]
        return recompute(module, function, x, *args)
    return function(x, *args)


def recompute(module: nn.Module, function: Callable[..., Any], *args: Any,
              **options: Any) -> Any:
    """Return ``function(*args, **options)``, computed again in backward
    instead of keeping its activations (activation checkpointing).

    Args:
        module: the module that computes. Its batch norms do not update their
            statistics a second time.
        function: the function to call.
        args: its positional arguments.
        options: its keyword arguments.
    """
    # Reentrant checkpointing would silently drop the gradient of auxiliary
    # losses.
    return checkpoint(
        function, *args, use_reentrant=False,
        context_fn=lambda: (nullcontext(), _same_statistics(module)),
        **options)


@contextmanager
def _same_statistics(module: nn.Module) -> Iterator[None]:
    """Keep batch norms from updating their running statistics, for a batch
    that they have seen before."""
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
