"""Charts: what they show, and that nothing of a file is read as HTML."""
import json

import pytest
from run_folder import (
    DENSE,
    LAYER,
    LOG,
    cost,
    dense_and_moe,
    load_line,
    write_run,
)

from rmoe.report.work_dir import read_runs

pytest.importorskip('plotly')
from rmoe.report import figures


def traces(figure):
    return {trace['name']: trace for trace in figure['data']}


def test_scores_of_runs_lie_over_each_other(tmp_path):
    figure = figures.score_figure(
        read_runs(dense_and_moe(tmp_path)), 'mIoU')
    found = traces(figure)
    assert found['moe']['x'] == [20, 60] and found['moe']['y'] == [50, 49]
    assert found['dense']['x'] == [60] and found['dense']['y'] == [40]
    # Only the MoE run has stages: in its colour.
    assert [(mark['text'], mark['x']) for mark in
            figure['layout']['annotations']] == [('core', 0), ('joint', 20)]
    assert {mark['font']['color'] for mark in
            figure['layout']['annotations']} == {found['moe']['line']['color']}


def test_stages_that_all_runs_have_are_marked_once(tmp_path):
    runs = read_runs([write_run(tmp_path / 'a'), write_run(tmp_path / 'b')])
    marks = figures.loss_figure(runs)['layout']['annotations']
    assert [mark['text'] for mark in marks] == ['core', 'joint']
    assert marks[0]['font']['color'] == figures.GREY


def test_loads_entropy_and_dead_experts_of_a_layer(tmp_path):
    run, = read_runs([write_run(tmp_path)])
    figure = figures.layer_figure(run, LAYER, .01)
    found = traces(figure)
    assert found['expert 0']['y'] == [.5, .25]
    assert found['expert 3']['y'] == [0, .25]
    assert found['entropy']['y'] == [.75, .75]
    assert found['dropped']['y'] == [.125, .125]
    assert found['dead experts']['x'] == [40, 60]
    assert found['dead experts']['y'] == [1, 0]
    # As far as training went.
    assert figure['layout']['xaxis']['range'] == [0, pytest.approx(61.2)]


def test_an_expert_is_dead_as_the_run_says():
    loads = [{10: .002}, {10: .003}, {10: .995}, {10: 0.}]
    assert figures.dead_experts(loads, .01) == {10: 2}  # up to .0025
    assert figures.dead_experts(loads, .02) == {10: 3}
    assert figures.dead_experts(loads, 0.) == {10: 1}


def test_experts_have_an_order_of_numbers(tmp_path):
    run, = read_runs([write_run(tmp_path, [load_line(
        5, *([0.] * 10), .25, .75)])])
    found = traces(figures.layer_figure(run, LAYER, .01))
    assert [name for name in found if name.startswith('expert')] == [
        f'expert {i}' for i in range(12)]
    assert found['expert 10']['y'] == [.25]


def test_text_of_files_is_no_html(tmp_path):
    evil = '<img src=x>'
    folder = write_run(
        tmp_path / evil, [dict(line, **{evil: 1.}) for line in DENSE],
        LOG.replace('joint', evil), cost())
    run, = read_runs([folder])
    for figure in (figures.score_figure([run], evil),
                   figures.loss_figure([run]), figures.parts_figure(run)):
        assert '<img' not in json.dumps(figure)
        assert '&lt;img' in json.dumps(figure)
