"""Makes the charts of a report, as plotly's JSON.

The script of the page sets the colours of text, grid and paper, because it
knows whether the page is light or dark. All text that comes from a file is
escaped, because plotly interprets some HTML tags in it.
"""
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rmoe.report.experts import Experts
from rmoe.report.scalars import Curve
from rmoe.report.work_dir import Run
from rmoe.visualization.routing_figure import expert_colours

# The colours of the runs, readable on white and on black.
COLOURS = ('#2f7ed8', '#e8762d', '#2ca25f', '#c94fb0', '#8c6bd1', '#b58900',
           '#d43d51', '#17a2b8')
# The curves of dropped and unrouted are often equal; as one of them is dotted,
# both can be seen.
SHARES = (('entropy', '#2f7ed8', 'solid'), ('dropped', '#e8762d', 'solid'),
          ('unrouted', '#2ca25f', 'dot'))
GREY = '#888888'
ALWAYS_SHOWN = 60  # A curve with more points is drawn without markers.
NAME_HEIGHT = 14  # The height of the name of a stage, in pixels.
MAX_LISTED = 16  # With more experts there is no legend.
ITERATION = dict(text='iteration', standoff=8)
HEIGHT, LAYER_HEIGHT, ROW_HEIGHT = 340, 560, 20


def score_figure(runs: Sequence[Run], name: str) -> dict[str, Any]:
    """The chart of a score of all runs over iterations."""
    figure = _figure(name)
    for number, run in enumerate(runs):
        _add_curve(figure, run.scalars.scores.get(name, {}), run.name, number)
    _mark_stages(figure, runs)
    return _json(figure)


def loss_figure(runs: Sequence[Run]) -> dict[str, Any]:
    """The chart of the loss of the task, without auxiliary losses, of all
    runs."""
    figure = _figure('loss')
    for number, run in enumerate(runs):
        _add_curve(figure, run.scalars.task_loss(), run.name, number)
    _mark_stages(figure, runs)
    return _json(figure)


def parts_figure(run: Run) -> dict[str, Any]:
    """The chart of every loss of one run, with the auxiliary losses."""
    figure = _figure('loss')
    for number, (name, curve) in enumerate(run.scalars.losses().items()):
        _add_curve(figure, curve, name, number)
    figure.update_yaxes(type='log', exponentformat='power', dtick=1)
    _mark_stages(figure, [run])
    return _json(figure)


def train_figure(runs: Sequence[Run], key: str, label: str,
                 scale: float = 1) -> dict[str, Any]:
    """The chart of a number that training logged, of all runs.

    Args:
        runs: the runs to compare.
        key: the key in the log, such as 'time'.
        label: the label of the axis, with the unit.
        scale: the factor that converts the logged number to that unit.
    """
    figure = _figure(label)
    for number, run in enumerate(runs):
        curve = run.scalars.train.get(key, {})
        _add_curve(figure, {step: scale * value for step, value in
                            curve.items()}, run.name, number)
    figure.update_yaxes(rangemode='tozero')
    _mark_stages(figure, runs)
    return _json(figure)


def layer_figure(run: Run, layer: str, dead_below: float) -> dict[str, Any]:
    """The chart of the load of every expert of a MoE layer over iterations,
    and below it the entropy, the dropped and unrouted shares, and the number
    of dead experts.

    Args:
        run: the run with the layer.
        layer: the name of the layer.
        dead_below: an expert is dead if it got at most this fraction of its
            fair share.
    """
    curves = run.scalars.layers[layer]
    loads = _loads(curves)
    figure = make_subplots(
        rows=3, cols=1, shared_xaxes=True, vertical_spacing=.05,
        row_heights=[.6, .25, .15])
    figure.update_layout(template=None, height=LAYER_HEIGHT,
                         hovermode='x unified')
    for expert, (load, rgb) in enumerate(
            zip(loads, expert_colours(len(loads)).tolist())):
        colour = 'rgba({},{},{},0.75)'.format(*rgb)
        figure.add_scatter(
            x=list(load), y=list(load.values()), name=f'expert {expert}',
            stackgroup='load', mode='lines', row=1, col=1,
            showlegend=len(loads) <= MAX_LISTED,
            line=dict(width=.5, color=colour), fillcolor=colour,
            hovertemplate='%{y:.1%}')
    for what, colour, dash in SHARES:
        curve = curves.get(what, {})
        figure.add_scatter(
            x=list(curve), y=list(curve.values()), name=what, row=2, col=1,
            line=dict(color=colour, dash=dash), **_marks(curve),
            hovertemplate='%{y:.4f}')
    dead = dead_experts(loads, dead_below)
    figure.add_bar(x=list(dead), y=list(dead.values()), name='dead experts',
                   row=3, col=1, marker=dict(color='#d43d51'))
    figure.update_yaxes(title='load', range=[0, 1], tickformat='.0%', row=1)
    figure.update_yaxes(title='share', range=[-.03, 1.05], row=2)
    figure.update_yaxes(title='dead', row=3, dtick=max(1, len(loads) // 2),
                        range=[0, max(len(loads), 1)])
    # The axis ends where training ended, also if no token was routed in the
    # last stage.
    figure.update_xaxes(range=[0, 1.02 * run.scalars.last_iteration()])
    figure.update_xaxes(title=ITERATION, row=3)
    _mark_stages(figure, [run])
    return _json(figure)


def dead_experts(loads: Sequence[Curve], dead_below: float) -> Curve:
    """The number of dead experts of a layer by iteration."""
    limit = dead_below / max(len(loads), 1)
    steps = sorted({step for load in loads for step in load})
    return {step: float(sum(load.get(step, 0.) <= limit for load in loads))
            for step in steps}


def class_figure(experts: Experts) -> dict[str, Any] | None:
    """The chart of P(expert | class), with a heat map for each layer, of which
    the page shows one at a time; None if no class was counted."""
    counted = [tokens_LE.sum(1) for tokens_LE in experts.tokens_LE.values()]
    if not counted or not np.sum(counted):
        return None
    figure = go.Figure()
    shown = np.flatnonzero(np.sum(counted, axis=0) > 0)
    names = [escape(experts.classes[i]) for i in shown]
    for number, tokens_LE in enumerate(experts.tokens_LE.values()):
        tokens_LE = tokens_LE[shown]
        shares_LE = tokens_LE / np.maximum(tokens_LE.sum(1, keepdims=True), 1)
        figure.add_heatmap(
            z=shares_LE, customdata=tokens_LE, y=names,
            x=list(range(tokens_LE.shape[1])), visible=not number,
            zmin=0, colorscale='Viridis', xgap=1, ygap=1,
            colorbar=dict(tickformat='.0%', thickness=12, title=''),
            hovertemplate='%{y}, expert %{x}: %{z:.1%} of its tokens '
            '(%{customdata:.0f})<extra></extra>')
    figure.update_layout(template=None,
                         height=120 + ROW_HEIGHT * max(len(shown), 4))
    figure.update_xaxes(title=dict(text='expert', standoff=8), dtick=1 if max(
        tokens.shape[1] for tokens in experts.tokens_LE.values()) <= 16
        else 4)
    figure.update_yaxes(autorange='reversed', automargin=True)
    return _json(figure)


def _loads(curves: Mapping[str, Curve]) -> list[Curve]:
    """The load of each expert over iterations, in order of the experts."""
    numbers = sorted(int(what.removeprefix('load_')) for what in curves
                     if what.startswith('load_'))
    return [curves[f'load_{expert}'] for expert in numbers]


def _figure(label: str) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(template=None, height=HEIGHT, hovermode='x unified')
    figure.update_xaxes(title=ITERATION, rangemode='tozero')
    figure.update_yaxes(title=dict(text=escape(label), standoff=8),
                        automargin=True)
    return figure


def _add_curve(figure: go.Figure, curve: Curve, name: str, number: int
               ) -> None:
    if curve:
        figure.add_scatter(
            x=list(curve), y=list(curve.values()), name=escape(name),
            showlegend=True, line=dict(color=COLOURS[number % len(COLOURS)]),
            **_marks(curve))


def _marks(curve: Curve) -> dict[str, str]:
    return dict(mode='lines+markers' if len(curve) <= ALWAYS_SHOWN
                else 'lines')


def _mark_stages(figure: go.Figure, runs: Sequence[Run]) -> None:
    """Draw a line where each stage begins, with its name. The colour is that
    of the run, or grey if all runs have the same stages."""
    same = all(run.log.stages == runs[0].log.stages for run in runs)
    for number, run in enumerate(runs[:1] if same else runs):
        colour = GREY if same else COLOURS[number % len(COLOURS)]
        for stage in run.log.stages:
            figure.add_shape(
                type='line', x0=stage.begin, x1=stage.begin, y0=0, y1=1,
                xref='x', yref='paper', layer='below',
                line=dict(color=colour, dash='dash', width=1))
            figure.add_annotation(
                x=stage.begin, y=1, xref='x', yref='paper', xanchor='left',
                yanchor='bottom', yshift=NAME_HEIGHT * number,
                showarrow=False, text=escape(stage.name),
                font=dict(color=colour, size=11))


def _json(figure: go.Figure) -> dict[str, Any]:
    return json.loads(figure.to_json())
