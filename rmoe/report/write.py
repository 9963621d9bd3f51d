"""From work dirs to a report."""
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from mmengine.config import Config

from rmoe.report.work_dir import Run, read_runs
from rmoe.upcycling import write_atomically

DEFAULT_NAME = 'report.html'
PACKAGES = ('plotly', 'jinja2')
# RoutingStatsHook's own, for a run whose config says nothing else.
DEAD_BELOW = 0.01


def missing_packages() -> str:
    """What a report needs and this environment lacks.

    Returns:
        A sentence with the command that installs it; '' if all is there.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if not missing:
        return ''
    return (f'a report needs {" and ".join(missing)}: python -m pip install '
            f'{" ".join(missing)}')


def write_report(work_dirs: Sequence[Path], out: Path | None = None,
                 images: int = 4, count_images: int = 32) -> Path:
    """Write one HTML file about one run, or several side by side.

    Args:
        work_dirs: of the runs. The first dense one, if there is one, is what
            costs are compared with.
        out: the file; None means report.html in the first work dir.
        images: of the validation set, to be drawn with the expert of each
            patch; 0 leaves out all that needs the model and data.
        count_images: of the validation set, over which it is counted which
            classes each expert takes.

    Returns:
        The file.

    Raises:
        ImportError: if plotly or jinja2 is missing.
        ValueError: for a folder that is no work dir, or a negative number.
    """
    if missing := missing_packages():
        raise ImportError(missing)
    for name, number in (('images', images), ('count_images', count_images)):
        if number < 0:
            raise ValueError(f'{name}={number} must not be negative')
    runs = read_runs(work_dirs)
    # The one needs plotly, the other mmengine's models.
    from rmoe.report.experts import Experts, observe
    from rmoe.report.page import render
    found: list[Experts] = []
    limits: list[float] = []
    for run in runs:
        experts, limit = Experts(), DEAD_BELOW
        try:
            cfg = _config(run)
            limit = _dead_below(cfg)
            if images:
                experts = observe(cfg, run.checkpoint, images,
                                  max(images, count_images))
            elif run.num_moe_layers:
                experts.notes.append('no images were asked for')
        # A config is Python: it may need what is no longer there.
        except Exception as error:
            experts.notes.append(f'the config cannot be read: {error}')
        found.append(experts)
        limits.append(limit)
    out = out or runs[0].folder / DEFAULT_NAME
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, render(runs, found, limits).encode())
    return out


def _config(run: Run) -> Config:
    if run.config is None:
        raise ValueError('the work dir has none')
    return Config.fromfile(run.config)


def _dead_below(cfg: Mapping) -> float:
    """Below which part of its fair share the run called an expert dead."""
    for hook in cfg.get('custom_hooks') or ():
        if str(hook.get('type')).endswith('RoutingStatsHook'):
            return hook.get('dead_below', DEAD_BELOW)
    return DEAD_BELOW
