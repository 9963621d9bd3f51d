"""Fills the template of the report, and collects the data that the script of
the page draws."""
from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from importlib.resources import files
from io import BytesIO
from typing import Any

import numpy as np
from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image
from plotly.offline import get_plotlyjs

from rmoe.report import figures, tables
from rmoe.report.experts import Experts, Overlay
from rmoe.report.work_dir import Run
from rmoe.version import __version__
from rmoe.visualization.routing_figure import expert_colours
from rmoe.visualization.segmentor import short_name

MAX_SIDE, QUALITY = 640, 82


def render(runs: Sequence[Run], experts: Sequence[Experts],
           dead_below: Sequence[float]) -> str:
    """Make the text of the HTML file.

    Args:
        runs: the runs in the order of the page.
        experts: for each run, the results of its checkpoint on images.
        dead_below: for each run, the fraction of its fair share below which
            an expert counts as dead.
    """
    page = _Page()
    context = dict(
        version=__version__, runs=runs,
        scores=tables.score_table(runs), costs=tables.cost_table(runs),
        twin=tables.dense_twin_of(runs), about=list(map(_about, runs)),
        score_charts=[page.chart(figures.score_figure(runs, name))
                      for name in tables.main_scores(runs)],
        loss_chart=page.chart(figures.loss_figure(runs)),
        part_charts=[page.chart(figures.parts_figure(run)) for run in runs],
        time_charts=_time_charts(page, runs),
        layers=_layers(page, runs, dead_below),
        experts=[page.experts(each) for each in experts],
        stages=list(map(tables.stage_table, runs)),
        backbones=list(map(tables.backbone_table, experts)))
    source = files('rmoe.report') / 'assets'
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=StrictUndefined, loader=DictLoader({
            'page': (source / 'page.html').read_text()}))
    return environment.get_template('page').render(
        context, data=page.data,
        # Markup is not escaped. That is safe, because these files are part of
        # rmoe and of plotly and nothing in them comes from a run.
        style=Markup((source / 'page.css').read_text()),
        script=Markup((source / 'page.js').read_text()),
        plotly=Markup(get_plotlyjs()))


class _Page:
    """Collects the data of charts and images that the script draws. The
    template refers to them by the numbers that the methods return."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = dict(charts=[], images={}, experts=[])

    def chart(self, figure: dict[str, Any] | None) -> int | None:
        if figure is None or not figure['data']:
            return None
        self.data['charts'].append(figure)
        return len(self.data['charts']) - 1

    def experts(self, found: Experts) -> dict[str, Any]:
        """Add the data about the experts of a run.

        Returns:
            The values that the template needs of them.
        """
        self.data['experts'].append(dict(
            layers=list(found.num_experts),
            colours=expert_colours(_most(found)).tolist(),
            overlays=[self._overlay(overlay) for overlay in found.overlays]))
        return dict(
            number=len(self.data['experts']) - 1,
            layers=list(found.num_experts), most=_most(found),
            overlays=found.overlays, notes=found.notes, images=found.images,
            size=found.size, unserved=any(
                (each.experts < 0).any() for overlay in found.overlays
                for each in overlay.maps),
            classes=self.chart(figures.class_figure(found)))

    def _overlay(self, overlay: Overlay) -> dict[str, Any]:
        url = _data_url(overlay.image)
        height, width = overlay.image.shape[:2]
        key = sha256(url.encode()).hexdigest()[:16]
        # Runs on the same data show the same images. Under a hash of its
        # content each image is stored only once.
        self.data['images'][key] = url
        return dict(image=key, maps=[
            dict(height=rows, width=columns,
                 # How far the rows and columns reach, as a fraction of the
                 # image. It may be above 1, because the last ones may reach
                 # beyond the edge.
                 down=rows * each.stride / height,
                 right=columns * each.stride / width,
                 # The script reads unsigned numbers, with 0 where no expert
                 # kept the patch.
                 experts=b64encode((each.experts + 1).astype('<u2').tobytes()
                                   ).decode())
            for each in overlay.maps
            for rows, columns in [each.experts.shape]])


def _most(found: Experts) -> int:
    return max(found.num_experts.values(), default=0)


def _data_url(image: np.ndarray) -> str:
    """The image as a data URL, compressed and with sides of at most 640
    pixels."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    file = BytesIO()
    picture.save(file, 'JPEG', quality=QUALITY)
    return 'data:image/jpeg;base64,' + b64encode(file.getvalue()).decode()


def _time_charts(page: _Page, runs: Sequence[Run]) -> list[int]:
    charts = [page.chart(figures.train_figure(runs, *what)) for what in (
        ('time', 'seconds of an iteration'),
        ('memory', 'memory of the GPU, GB', 1e-3))]
    return [chart for chart in charts if chart is not None]


def _layers(page: _Page, runs: Sequence[Run], dead_below: Sequence[float]
            ) -> list[dict[str, Any]]:
    """For each MoE layer, its name and a chart for every run that has it."""
    names = dict.fromkeys(name for run in runs for name in run.scalars.layers)
    return [dict(name=short_name(name), key=name, charts=[
        (run.name, page.chart(figures.layer_figure(run, name, limit)))
        for run, limit in zip(runs, dead_below)
        if name in run.scalars.layers]) for name in names]


def _about(run: Run) -> dict[str, Any]:
    """The config, checkpoint and versions of a run for the template."""
    checkpoint = run.checkpoint
    return dict(
        environment=run.log.environment, upcycling=run.log.upcycling,
        config=run.config.read_text() if run.config else '',
        checkpoint=checkpoint.name if checkpoint else '',
        size=tables.size(checkpoint.stat().st_size)
        if checkpoint and checkpoint.is_file() else '')
