"""A figure of the classes and the places that experts take."""
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from torch import Tensor

from rmoe.visualization.specialisation import Information, Tally

MAX_CLASSES = 20
MAX_COLUMNS = 8
MAX_TICKS = 16
DPI = 110
# Sizes in inches.
HEAT_WIDTH, CELL_WIDTH = 3.0, 0.32
MAP_WIDTH, MAP_HEIGHT = 1.35, 1.25
ROW_HEIGHT, LINE_HEIGHT = 1.1, 0.17
EMPTY = '0.8'


def draw_specialisation(tallies: Mapping[str, Tally],
                        measures: Mapping[str, Mapping[str, Information]],
                        classes: Sequence[str], path: Path, title: str = ''
                        ) -> None:
    """Save a PNG with a row for each MoE layer.

    The left part shows the share of each class that each expert takes,
    P(expert | class), with the number of tokens of the class in brackets. The
    right part shows, for each expert, the share of each place of the image
    that it takes, P(expert | place). Places where nothing was counted are
    grey. Classes without a token in any layer are left out, and of many
    classes the rarest. The titles have the information, its share of what
    there is to know about class or place in brackets, and its chance level.

    Args:
        tallies: the tally of each layer, by name.
        measures: the result of :meth:`Tally.measure` for each tally, by the
            same names.
        classes: names of the L classes.
        path: file to write, a PNG whatever its name; missing folders are
            made.
        title: title of the figure.

    Raises:
        ValueError: if no token was counted.
    """
    frequency_L = np.sum([tally.counts_LE.sum(1).numpy()
                          for tally in tallies.values()], axis=0)
    shown = np.argsort(-frequency_L, kind='stable')[:MAX_CLASSES]
    shown = np.sort(shown[frequency_L[shown] > 0])
    if not len(shown):
        raise ValueError('no token with a class went to an expert: the '
                         'segmentation maps are empty, or all ignored')
    most = max(tally.counts_LE.shape[1] for tally in tallies.values())
    columns = min(most, max(4, math.ceil(most / 2)), MAX_COLUMNS)
    rows = math.ceil(most / columns)
    heat_width = HEAT_WIDTH + CELL_WIDTH * min(most, MAX_TICKS)
    maps_width = MAP_WIDTH * (max(columns, 2) + 0.6)
    height = ROW_HEIGHT + max(MAP_HEIGHT * rows, LINE_HEIGHT * len(shown))

    width = heat_width + maps_width
    figure = Figure((width, height * len(tallies) + 0.4), dpi=DPI,
                    layout='constrained')
    figure.suptitle(textwrap.fill(title, int(10 * width)), fontsize=10)
    parts = figure.subfigures(len(tallies), 2, squeeze=False,
                              width_ratios=(heat_width, maps_width))
    for (left, right), (name, tally) in zip(parts, tallies.items()):
        about = measures[name]
        _draw_classes(left, tally, shown, classes,
                      f'{name}\nclass: {_words(about["class"])}\n'
                      f'class | place: {_words(about["class | place"])}')
        _draw_places(right, tally, rows, columns,
                     f'place: {_words(about["place"])}\n'
                     'below: each expert, its share of the tokens')
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format='png')


def _draw_classes(figure: SubFigure, tally: Tally, shown: np.ndarray,
                  classes: Sequence[str], title: str) -> None:
    shares_LE = _shares(tally.counts_LE, 1)[shown]
    axes = figure.subplots()
    image = _show(axes, shares_LE, np.nanmax(shares_LE, initial=0))
    axes.set_aspect('auto')
    experts = range(shares_LE.shape[1])
    axes.set_xticks(experts[::math.ceil(len(experts) / MAX_TICKS)])
    tokens_L = tally.counts_LE.sum(1)
    axes.set_yticks(range(len(shown)), [
        f'{textwrap.shorten(classes[i], 24, placeholder="...")} '
        f'({tokens_L[i]:.0f})' for i in shown])
    axes.set_xlabel('expert', fontsize=8)
    axes.tick_params(labelsize=8)
    axes.set_title(title, fontsize=8)
    _draw_scale(figure, image, [axes], 'P(expert | class)')


def _draw_places(figure: SubFigure, tally: Tally, rows: int, columns: int,
                 title: str) -> None:
    shares_EHW = _shares(tally.drawn_EHW, 0)
    load_E = _shares(tally.counts_LE.sum(0), 0)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    largest = np.nanmax(shares_EHW, initial=0)
    for axes in grid:
        axes.set_axis_off()
    for expert, (axes, shares_HW) in enumerate(zip(grid, shares_EHW)):
        axes.set_axis_on()
        image = _show(axes, shares_HW, largest)
        axes.set(xticks=[], yticks=[])
        axes.set_title(f'{expert}: {load_E[expert]:.1%}', fontsize=8)
    figure.suptitle(title, fontsize=8)
    _draw_scale(figure, image, list(grid), 'P(expert | place)')


def _shares(counts: Tensor, axis: int) -> np.ndarray:
    """Divide counts by their sum along an axis; nan where the sum is zero."""
    total = counts.sum(axis, keepdim=True)
    return (counts / total).masked_fill(total == 0, torch.nan).numpy()


def _show(axes: Axes, shares: np.ndarray, largest: float) -> AxesImage:
    axes.set_facecolor(EMPTY)  # nan is drawn transparent
    return axes.imshow(shares, cmap='magma', vmin=0, vmax=largest or 1,
                       interpolation='nearest')


def _draw_scale(figure: SubFigure, image: AxesImage, axes: list[Axes],
                label: str) -> None:
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _words(information: Information) -> str:
    return (f'{information.bits:.2f} bit ({information.share_of_target:.0%}), '
            f'chance {information.chance:.2f}')
