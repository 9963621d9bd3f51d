"""A figure that shows which expert took each patch of an image."""
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

UNROUTED = -1
IGNORED = 255
MAX_COLUMNS = 4
OPACITY = 0.6

# Sizes in inches. The page is laid out by hand, so that nothing ever overlaps
# and the loads stay next to their layer, whatever the shape of the image.
PANEL_WIDTH = 2.7
COLUMN_GAP = 0.5
BARS_HEIGHT = 0.9
BARS_GAP = 0.1
TITLE_GAP = 0.7
LINE_HEIGHT = 0.22
LEGEND_LINE = 0.19
MARGIN = 0.45
DPI = 110


def draw_routing(image: np.ndarray, expert_maps: Mapping[str, np.ndarray],
                 loads: Mapping[str, np.ndarray], path: Path,
                 segmentation: np.ndarray | None = None,
                 truth: np.ndarray | None = None,
                 palette: Sequence[Sequence[int]] | None = None,
                 classes: Sequence[str] | None = None,
                 title: str = '') -> None:
    """Save a PNG of the expert that each patch goes to, and of the loads.

    The first row shows the image, the true labels and the prediction. The
    MoE layers follow, each as the image in grey with the colours of the
    experts on it, above a bar for each expert, in its colour, that shows its
    share of the tokens.

    Args:
        image: RGB image (H, W, 3), uint8.
        expert_maps: For each layer the expert of each patch (h, w), integers;
            -1, drawn black, where no expert kept the patch.
        loads: For each layer the shares of its experts (E,), summing to 1.
        path: File to write, a PNG whatever its name; missing folders are
            made.
        segmentation: Predicted class ids (H, W).
        truth: True class ids (H, W); 255 is ignored and drawn white.
        palette: RGB colour of each class, 0 to 255; by default colours are
            chosen here.
        classes: Name of each class; by default the ids are shown.
        title: Title of the figure.

    Raises:
        ValueError: Shapes, layer names, expert ids or class ids do not fit
            together.
    """
    _check_image(image)
    _check_layers(expert_maps, loads)
    labels = {name: label for name, label in
              (('truth', truth), ('prediction', segmentation))
              if label is not None}
    if palette is None:
        palette = _some_palette(labels, classes)
    _check_labels(labels, image.shape[:2], palette, classes)

    first_row = 1 + len(labels) + bool(labels)
    rows = math.ceil(len(loads) / MAX_COLUMNS)
    # 6 layers look better as 3 and 3 than as 4 and 2.
    columns = max(first_row, math.ceil(len(loads) / rows))
    figure, grid = _empty_figure(image, rows, columns, title)
    _draw_labels(grid[0], image, labels, palette, classes)
    for index, (name, expert_map) in enumerate(expert_maps.items()):
        row, column = divmod(index, columns)
        colours = expert_colours(len(loads[name]))
        _show(grid[1 + 2 * row][column],
              overlay(image, expert_map, colours), name)
        _draw_load(grid[2 + 2 * row][column], loads[name], colours)
    _draw_key(figure, expert_maps)
    _save(figure, path)


def expert_colours(num_experts: int) -> np.ndarray:
    """Colours of the experts, which are easy to tell apart if there are few.

    Args:
        num_experts: Number of experts, E below.

    Returns:
        RGB colours (E, 3), uint8.
    """
    tab20 = matplotlib.colormaps['tab20'](range(20))
    # Grey (7) is left out, because the image underneath is grey. Brown (5)
    # comes last, because it looks like a dark orange.
    order = [0, 1, 2, 3, 4, 6, 8, 9, 5]
    strong, pale = tab20[::2][order], tab20[1::2][order]
    colours = np.concatenate([strong, pale])[:num_experts]
    if num_experts > len(colours):
        # The ends of this colour map are nearly black and are left out.
        colours = matplotlib.colormaps['turbo'](
            np.linspace(0.05, 0.95, num_experts))
    return _to_uint8(255 * colours[:, :3])


def overlay(image: np.ndarray, expert_map: np.ndarray,
            colours: np.ndarray) -> np.ndarray:
    """Lay the colours of the experts over the image, which turns light grey.

    Args:
        image: RGB image (H, W, 3), uint8.
        expert_map: The expert of each patch (h, w); -1, for none, gives black.
        colours: RGB colours of the experts (E, 3), uint8.

    Returns:
        RGB image (H, W, 3), uint8.
    """
    height, width = image.shape[:2]
    rows = np.arange(height) * expert_map.shape[0] // height
    columns = np.arange(width) * expert_map.shape[1] // width
    # Black is the last colour, so that the index -1 selects it.
    colours = np.concatenate([colours, np.zeros((1, 3), np.uint8)])
    tint = colours[expert_map[rows[:, None], columns]]
    grey = image.mean(-1, keepdims=True)
    # The contrast is stretched, but not down to dark greys, which would turn
    # orange into brown.
    grey = np.interp(grey, np.percentile(grey, (1, 99)), (70, 255))
    return _to_uint8(OPACITY * tint + (1 - OPACITY) * grey)


def colour_labels(label: np.ndarray,
                  palette: Sequence[Sequence[int]]) -> np.ndarray:
    """Colour class ids.

    Args:
        label: Class ids (H, W); 255 (ignored) becomes white.
        palette: RGB colour of each class, 0 to 255.

    Returns:
        RGB image (H, W, 3), uint8.
    """
    table = np.full((max(256, len(palette)), 3), 255, np.uint8)
    table[:len(palette)] = palette
    table[IGNORED] = 255
    return table[label]


def _check_image(image: np.ndarray) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError('image must be (H, W, 3) uint8, got '
                         f'{image.shape} {image.dtype}')


def _check_layers(expert_maps: Mapping[str, np.ndarray],
                  loads: Mapping[str, np.ndarray]) -> None:
    if not expert_maps or expert_maps.keys() != loads.keys():
        raise ValueError('expert_maps and loads must have the same layers, '
                         f'got {list(expert_maps)} and {list(loads)}')
    for name, load in loads.items():
        if load.ndim != 1:
            raise ValueError(f'loads[{name!r}] must be (E,), got {load.shape}')
        # The condition is negated, so that nan fails too.
        if not (load.min(initial=0) >= 0 and abs(load.sum() - 1) < 1e-3):
            raise ValueError(f'loads[{name!r}] must be shares that sum to 1, '
                             f'got {load}')
        _check_ids(f'expert_maps[{name!r}]', expert_maps[name],
                   range(UNROUTED, len(load)))


def _some_palette(labels: Mapping[str, np.ndarray],
                  classes: Sequence[str] | None) -> Sequence[Sequence[int]]:
    if classes is not None:
        return expert_colours(len(classes)).tolist()
    largest = max((int(label[label != IGNORED].max(initial=0))
                   for label in labels.values()), default=0)
    return expert_colours(largest + 1).tolist()


def _check_labels(labels: Mapping[str, np.ndarray], shape: tuple[int, ...],
                  palette: Sequence[Sequence[int]],
                  classes: Sequence[str] | None) -> None:
    if classes is not None and len(classes) != len(palette):
        raise ValueError(f'{len(classes)} classes do not fit the '
                         f'{len(palette)} colours of the palette: give a '
                         'colour for each class')
    for name, label in labels.items():
        if label.shape != shape:
            raise ValueError(f'{name} must have the shape of the image '
                             f'{shape}, got {label.shape}')
        _check_ids(name, label, range(len(palette)), IGNORED)


def _check_ids(name: str, ids: np.ndarray, allowed: range,
               also: int | None = None) -> None:
    if ids.ndim != 2 or not ids.size or ids.dtype.kind not in 'iu':
        raise ValueError(f'{name} must be a 2-D array of integers, got '
                         f'{ids.shape} {ids.dtype}')
    strange = [value for value in np.unique(ids).tolist()
               if value not in allowed and value != also]
    if strange:
        raise ValueError(f'{name} has ids {strange} outside of '
                         f'{allowed.start}..{allowed.stop - 1}')


def _empty_figure(image: np.ndarray, rows: int, columns: int, title: str
                  ) -> tuple[Figure, list[list[Axes]]]:
    """A figure with 1 + 2 * rows rows of empty axes."""
    panel = PANEL_WIDTH * min(max(image.shape[0] / image.shape[1], 0.4), 1.6)
    heights = [panel, *[panel, BARS_HEIGHT] * rows]
    gaps = [TITLE_GAP / 2, *[TITLE_GAP, BARS_GAP] * rows]
    width = columns * (PANEL_WIDTH + COLUMN_GAP) + MARGIN / 2
    lines = textwrap.wrap(title, int(9 * width))
    header = LINE_HEIGHT * len(lines) + MARGIN / 3
    bottoms = header + np.cumsum(np.add(heights, gaps))
    height = bottoms[-1] + 1.6 * MARGIN

    figure = Figure((width, height), dpi=DPI)
    figure.suptitle('\n'.join(lines), y=1 - MARGIN / 4 / height)
    lefts = MARGIN + np.arange(columns) * (PANEL_WIDTH + COLUMN_GAP)
    grid = [[figure.add_axes((left / width, 1 - bottom / height,
                              PANEL_WIDTH / width, tall / height))
             for left in lefts]
            for bottom, tall in zip(bottoms, heights, strict=True)]
    for axes in figure.axes:
        axes.set_axis_off()
    return figure, grid


def _show(axes: Axes, picture: np.ndarray, name: str) -> None:
    axes.set_axis_on()
    axes.imshow(picture, interpolation='nearest')
    axes.set(xticks=[], yticks=[], anchor='S')
    axes.set_title(textwrap.fill(name, 36), fontsize=9)


def _draw_labels(row: Sequence[Axes], image: np.ndarray,
                 labels: Mapping[str, np.ndarray],
                 palette: Sequence[Sequence[int]],
                 classes: Sequence[str] | None) -> None:
    """Fill the first row: image, labels and the legend of their classes."""
    _show(row[0], image, 'image')
    for axes, (name, label) in zip(row[1:], labels.items(), strict=False):
        _show(axes, colour_labels(label, palette), name)
    if labels:
        _draw_legend(row[1 + len(labels)], list(labels.values()), palette,
                     classes)


def _draw_legend(axes: Axes, labels: Sequence[np.ndarray],
                 palette: Sequence[Sequence[int]],
                 classes: Sequence[str] | None) -> None:
    """List the classes that occur, or the largest of them if there is not room
    for all."""
    ids, areas = np.unique(np.stack(labels), return_counts=True)
    room = int(axes.bbox.height / DPI / LEGEND_LINE)
    listed = ids
    if len(ids) > room:
        listed = np.sort(ids[np.argsort(-areas)[:room - 1]])
    handles = [_class_patch(i, palette, classes) for i in listed.tolist()]
    if len(listed) < len(ids):
        handles.append(Patch(alpha=0,
                             label=f'and {len(ids) - len(listed)} more'))
    axes.legend(handles=handles, loc='center left', frameon=False, fontsize=8,
                borderaxespad=0)


def _class_patch(class_id: int, palette: Sequence[Sequence[int]],
                 classes: Sequence[str] | None) -> Patch:
    if class_id == IGNORED:
        return Patch(facecolor='white', edgecolor='grey', label='ignored')
    name = str(class_id) if classes is None else classes[class_id]
    return Patch(facecolor='#{:02x}{:02x}{:02x}'.format(*palette[class_id]),
                 label=textwrap.shorten(name, 36, placeholder='...'))


def _draw_load(axes: Axes, load: np.ndarray, colours: np.ndarray) -> None:
    fair = 1 / len(load)
    axes.set_axis_on()
    axes.bar(range(len(load)), load, width=0.85, color=colours / 255)
    axes.axhline(fair, color='black', linestyle='--', linewidth=1)
    axes.set_xlim(-0.6, len(load) - 0.4)
    axes.set_ylim(0, 1.15 * max(load.max(), fair))
    axes.xaxis.set_major_locator(
        MaxNLocator(16, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.yaxis.set_major_formatter(lambda share, _: f'{100 * share:g}%')
    axes.tick_params(labelsize=8)
    axes.spines[['top', 'right']].set_visible(False)


def _draw_key(figure: Figure, expert_maps: Mapping[str, np.ndarray]) -> None:
    """Add a legend at the bottom for the dashed lines and, if there is any, for
    black."""
    handles: list[Artist] = [Line2D(
        [], [], color='black', linestyle='--', linewidth=1,
        label='fair share')]
    if any((each == UNROUTED).any() for each in expert_maps.values()):
        handles.append(Patch(color='black', label='kept by no expert'))
    figure.legend(handles=handles, loc='lower center', fontsize=9,
                  ncols=len(handles), frameon=False)


def _save(figure: Figure, path: Path) -> None:
    """Write the PNG under a temporary name and rename it, so that the file is
    never half a figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + '.unfinished')
    figure.savefig(unfinished, format='png')
    unfinished.replace(path)


def _to_uint8(values: np.ndarray) -> np.ndarray:
    return np.rint(values).astype(np.uint8)
