"""Draws the pictures of experiments from their records."""
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from _results import (
    Runs,
    mean_rows,
    specialised,
    sweeps,
    swept_seeds,
    timed,
)
from matplotlib.figure import Figure

# Matplotlib's first colours can be told apart by colour-blind people too.
COLOURS = [f'C{i}' for i in range(10)]


def curves(runs: Mapping[str, Runs], path: Path) -> None:
    """Draw the downstream training loss over iterations, and beside it the
    gains of every seed over the first pipeline.

    The losses are means over the seeds that all pipelines have, because batches
    of other seeds are other images.
    """
    seeds = sorted(set.intersection(*(
        set(each.records) for each in runs.values())))
    figure = Figure((9, 3.6), dpi=110, layout='constrained')
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for (name, each), colour in zip(runs.items(), COLOURS):
        iterations, losses = mean_loss(each, seeds)
        left.plot(iterations, losses, color=colour, label=name)
    left.set(xlabel='iteration', yscale='log',
             ylabel=f'training loss, mean of {len(seeds)} seeds')
    for kind in (left.yaxis.set_major_formatter,
                 left.yaxis.set_minor_formatter):
        kind('{x:g}')
    left.grid(alpha=0.3, which='both')
    left.legend(fontsize=8)
    _dots(right, runs)
    figure.savefig(path)


def dots(runs: Mapping[str, Runs], path: Path) -> None:
    """Draw the gains of every seed over the first pipeline, and the means."""
    figure = Figure((7, 1.2 + 0.26 * len(runs)), dpi=110,
                    layout='constrained')
    _dots(figure.add_subplot(), runs)
    figure.savefig(path)


def differences(runs: Mapping[str, Runs], path: Path) -> None:
    """Draw the same as :func:`dots`, with 95 % intervals of the means. There is
    an interval only for three seeds or more, because that of two seeds would
    be wider than the picture."""
    figure = Figure((7, 1.2 + 0.26 * len(runs)), dpi=110,
                    layout='constrained')
    axes = figure.add_subplot()
    base = next(iter(runs.values()))
    for row, each in enumerate(runs.values()):
        if each is not base and len(each.gains(base)) > 2:
            axes.errorbar(each.gain(base), row, xerr=each.interval(base),
                          color='black', linewidth=1, capsize=3)
    _dots(axes, runs)
    figure.savefig(path)


def _dots(axes, runs: Mapping[str, Runs]) -> None:
    base = next(iter(runs.values()))
    gains = [each.gains(base) for each in runs.values()]
    for seed in base.records:
        shown = [(one[seed], row) for row, one in enumerate(gains)
                 if seed in one]
        axes.scatter(*zip(*shown), color=COLOURS[seed % 10], alpha=0.6, s=25,
                     label=f'seed {seed}')
    axes.plot([mean(one.values()) for one in gains], range(len(gains)), '|',
              color='black', markersize=14, markeredgewidth=2, label='mean')
    axes.axvline(0, color='grey', linestyle=':')
    record = base.records[next(iter(base.records))]
    axes.set(yticks=range(len(runs)), yticklabels=list(runs),
             ylim=(len(runs) - 0.4, -0.6),
             xlabel=f'{next(iter(record["scores"]))} over {base.name}')
    axes.grid(alpha=0.3, axis='x')
    axes.figure.legend(*axes.get_legend_handles_labels(), ncols=4, fontsize=8,
                       loc='outside lower right')


def mean_loss(runs: Runs, seeds: Sequence[int]
              ) -> tuple[list[int], list[float]]:
    """The mean loss of the last step over these seeds, at the iterations that
    all of them have."""
    each = [dict(runs.last_step(seed)['curve']['loss']) for seed in seeds]
    steps = sorted(set.intersection(*map(set, each)))
    return steps, [mean(loss[step] for loss in each) for step in steps]


def capacities(runs: Mapping[str, Runs], path: Path) -> None:
    """Draw the score against the operations of the backbone at every
    capacity."""
    swept = {name: each for name, each in runs.items() if sweeps(each)}
    figure = Figure((4.2 * len(swept), 4), dpi=110, layout='constrained')
    for axes, (name, each) in zip(
            figure.subplots(1, len(swept), sharey=True, squeeze=False)[0],
            swept.items()):
        rows = mean_rows(sweeps(each))
        for order, colour in (('first come', 'C0'),
                              ('batch prioritised', 'C1')):
            chosen = [row for row in rows if row['order'] == order]
            axes.plot([row['gflops'] for row in chosen],
                      [row['score'] for row in chosen], 'o-', color=colour,
                      markersize=4, label=order)
        labelled = 0.0
        for row in rows:
            # From the capacity on at which nothing is dropped, all points are
            # at the same place, so only the first has a label.
            if row['order'] == 'first come' and (
                    row['gflops'] > 1.01 * labelled):
                labelled = row['gflops']
                axes.annotate(f'{row["capacity"]:g}', (labelled, row['score']),
                              fontsize=7, xytext=(4, -9),
                              textcoords='offset points')
        axes.axhline(rows[0]['score'], color='grey', linestyle=':',
                     label='nothing dropped')
        axes.axvline(rows[0]['dense_gflops'], color='black', linestyle='--',
                     linewidth=1, label='dense backbone, operations')
        if 'non-moe' in runs:
            dense = runs['non-moe'].mean(swept_seeds(each))
            axes.plot([rows[0]['dense_gflops']], [dense], '*', color='black',
                      markersize=12, label='dense model')
        axes.set(title=name, xlabel='GFLOPs of the backbone, one image')
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel('mIoU, mean over seeds')
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path)


def times(runs: Mapping[str, Runs], path: Path) -> None:
    """Draw the score against operations and against time, both over those of
    the dense model, at every capacity."""
    figure = Figure((8.4, 4), dpi=110, layout='constrained')
    both = figure.subplots(1, 2, sharey=True)
    for axes, cost in zip(both, ('operations', 'time')):
        for (name, each), colour in zip(runs.items(), COLOURS):
            if not sweeps(each):
                continue
            rows = timed(each)
            axes.plot([row[cost] for row in rows],
                      [row['score'] for row in rows], 'o', color=colour,
                      label=f'{name}, batch prioritised')
            for row in rows[1:]:
                axes.annotate(f'{row["capacity"]:g}',
                              (row[cost], row['score']), fontsize=7,
                              xytext=(4, -9), textcoords='offset points')
            axes.plot([1.], [runs['dense'].mean(swept_seeds(each))], '*',
                      color='black', markersize=12, label='dense model')
        axes.set_xlabel(f'{cost} of the backbone over dense')
        axes.grid(alpha=0.3)
    both[0].set_ylabel('mIoU')
    both[0].legend(fontsize=7)
    figure.savefig(path)


def specialisation(runs: Mapping[str, Runs], path: Path) -> None:
    """Draw P(expert | class) in every MoE layer of a model, for its first
    seed."""
    each = next(each for each in runs.values() if specialised(each))
    found = specialised(each)[0]
    layers, classes = found['layers'], found['classes']
    figure = Figure((2.6 * len(layers) + 1, 3.4), dpi=110,
                    layout='constrained')
    for axes, (name, layer) in zip(
            figure.subplots(1, len(layers), sharey=True, squeeze=False)[0],
            layers.items()):
        shares = [[count / max(sum(row), 1e-12) for count in row]
                  for row in layer['counts_LE']]
        image = axes.imshow(shares, vmin=0, vmax=1, cmap='viridis',
                            aspect='auto')
        axes.set(title=f'{name}, {layer["class"]["bits"]:.2f} bit',
                 xlabel='expert', yticks=range(len(classes)),
                 yticklabels=classes)
        axes.title.set_fontsize(9)
    figure.colorbar(image, ax=figure.axes, label='share of the class')
    figure.savefig(path)
