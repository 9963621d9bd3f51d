"""Makes the report of one or several work dirs and writes it to a file."""
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from mmengine.config import Config

from rmoe.registry import type_name
from rmoe.report.work_dir import Run, read_runs
from rmoe.upcycling import write_atomically

DEFAULT_NAME = 'report.html'
PACKAGES = ('plotly', 'jinja2')
# The default of RoutingStatsHook, for a run whose config does not set it.
DEAD_BELOW = 0.01


def missing_packages() -> str:
    """Find packages that a report needs and that are not installed.

    Returns:
        A sentence with the command that installs them; '' if all are
        installed.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if not missing:
        return ''
    return (f'a report needs {" and ".join(missing)}: python -m pip install '
            f'{" ".join(missing)}')


def check_counts(images: int, count_images: int) -> None:
    """Check the numbers of images of a report.

    Raises:
        ValueError: if one is negative.
    """
    for name, number in (('images', images), ('count_images', count_images)):
        if number < 0:
            raise ValueError(f'{name}={number} must not be negative')


def write_report(work_dirs: Sequence[Path], out: Path | None = None,
                 images: int = 4, count_images: int = 32) -> Path:
    """Write one HTML file about one run, or several side by side.

    Args:
        work_dirs: the work dirs of the runs. Costs are compared with those of
            the first dense run, if there is one.
        out: the file; None means report.html in the first work dir.
        images: number of images of the validation set that are drawn with the
            expert of each patch. With 0 the report leaves out everything that
            needs the model and the data.
        count_images: number of images of the validation set from which is
            counted which classes each expert takes.

    Returns:
        The path of the file.

    Raises:
        ImportError: if plotly or jinja2 is missing.
        ValueError: for a folder that is no work dir, or a negative number.
    """
    if missing := missing_packages():
        raise ImportError(missing)
    check_counts(images, count_images)
    runs = read_runs(work_dirs)
    # These are imported only here: page needs plotly, and experts takes long
    # to import.
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
        # A config is Python code, and may import or read something that no
        # longer exists.
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
    """The fraction of its fair share below which RoutingStatsHook called an
    expert dead in a run with this config."""
    for hook in cfg.get('custom_hooks') or ():
        if type_name(hook) == 'RoutingStatsHook':
            return hook.get('dead_below', DEAD_BELOW)
    return DEAD_BELOW
