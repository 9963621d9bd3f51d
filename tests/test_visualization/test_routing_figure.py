from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rmoe.visualization.routing_figure import (
    colour_labels,
    draw_routing,
    expert_colours,
    overlay,
)

IMAGE = np.random.default_rng(0).integers(0, 256, (24, 36, 3), np.uint8)
LABEL = np.repeat(np.arange(4), 6)[:, None].repeat(36, 1)


def routing(num_layers: int, num_experts: int,
            name: str = 'layers.{}') -> dict[str, Any]:
    """Expert maps and loads in which every id occurs, -1 included."""
    rng = np.random.default_rng(1)
    names = [name.format(i) for i in range(num_layers)]
    return {
        'expert_maps': {name: rng.integers(-1, num_experts, (8, 12))
                        for name in names},
        'loads': {name: rng.dirichlet(np.ones(num_experts))
                  for name in names}}


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert('RGB'))


def test_overlay_is_exact() -> None:
    # Black on the left and white on the right: greys 70 and 255.
    image = np.zeros((2, 4, 3), np.uint8)
    image[:, 2:] = 255
    colours = np.array([[255, 0, 0], [0, 100, 200]], np.uint8)
    # 0.6 * colour + 0.4 * grey, where 0.4 * 70 = 28 and 0.4 * 255 = 102
    red_left, red_right = [181, 28, 28], [255, 102, 102]
    blue_left, none_right = [28, 88, 148], [102, 102, 102]
    result = overlay(image, np.array([[0, 0], [1, -1]]), colours)
    assert result.dtype == np.uint8
    assert result.tolist() == [[red_left, red_left, red_right, red_right],
                               [blue_left, blue_left, none_right, none_right]]


def test_overlay_where_patches_do_not_divide_the_image() -> None:
    colours = np.array([[250, 0, 0], [0, 250, 0]], np.uint8)
    image = np.full((3, 5, 3), 9, np.uint8)
    result = overlay(image, np.array([[0, 1]]), colours)
    is_red = result[..., 0] > result[..., 1]
    assert is_red.tolist() == [[True, True, True, False, False]] * 3


def test_colour_labels_is_exact() -> None:
    palette = [[1, 2, 3], [4, 5, 6]]
    assert colour_labels(np.array([[0, 1, 255]]), palette).tolist() == [
        [[1, 2, 3], [4, 5, 6], [255, 255, 255]]]


@pytest.mark.parametrize('num_experts', [1, 8, 18, 19, 64])
def test_expert_colours_differ(num_experts: int) -> None:
    colours = expert_colours(num_experts)
    assert colours.shape == (num_experts, 3)
    assert colours.dtype == np.uint8
    assert len(np.unique(colours, axis=0)) == num_experts
    # none of them grey or nearly black
    assert np.ptp(colours.astype(int), axis=1).min() > 25
    assert colours.max(axis=1).min() > 100


def test_an_expert_keeps_its_colour_when_others_are_added() -> None:
    np.testing.assert_array_equal(expert_colours(18)[:4], expert_colours(4))


def test_panels_and_bars_have_the_right_colours(tmp_path: Path) -> None:
    image = np.zeros((4, 8, 3), np.uint8)
    image[:, :4] = 255
    maps = {'layer': np.array([[1, 1, 2, -1]])}
    draw_routing(image, maps, {'layer': np.array([0, 0.5, 0.5])},
                 tmp_path / 'figure.png')
    picture = read(tmp_path / 'figure.png').reshape(-1, 3)
    drawn = {tuple(colour) for colour in np.unique(picture, axis=0).tolist()}
    never, one, two = expert_colours(3)
    panel = overlay(image, maps['layer'], expert_colours(3))
    for colour in (one, two, panel[0, 0], panel[0, 4], panel[0, 7]):
        assert tuple(colour.tolist()) in drawn
    assert tuple(never.tolist()) not in drawn


def test_labels_have_the_colours_of_the_palette(tmp_path: Path) -> None:
    palette = [[10, 20, 30], [40, 50, 60], [70, 80, 90], [99, 98, 97]]
    draw_routing(IMAGE, **routing(1, 2), path=tmp_path / 'figure.png',
                 segmentation=np.minimum(LABEL, 2), palette=palette)
    picture = read(tmp_path / 'figure.png')
    pixels = [int((picture == colour).all(-1).sum()) for colour in palette]
    assert min(pixels[:3]) > 1000
    assert pixels[3] == 0


@pytest.mark.parametrize(('num_layers', 'num_experts', 'height'), [
    (1, 64, 90), (2, 1, 10), (12, 4, 36)])
def test_nothing_is_cut(tmp_path: Path, num_layers: int, num_experts: int,
                        height: int) -> None:
    image = np.zeros((height, 36, 3), np.uint8)
    name = 'module.backbone.stages.{}.blocks.0.mlp.with_a_long_name'
    draw_routing(image, **routing(num_layers, num_experts, name),
                 path=tmp_path / 'figure.png', title='a long title ' * 10)
    picture = read(tmp_path / 'figure.png')
    edges = [picture[:3], picture[-3:], picture[:, :3], picture[:, -3:]]
    assert all((edge == 255).all() for edge in edges)


def test_truth_prediction_and_legend_of_many_classes(tmp_path: Path) -> None:
    many = np.arange(24 * 36).reshape(24, 36) % 150
    draw_routing(IMAGE, **routing(3, 4), path=tmp_path / 'figure.png',
                 segmentation=many, truth=np.where(many < 9, 255, many),
                 classes=['a class with quite a long name'] * 150)
    picture = read(tmp_path / 'figure.png')
    assert (picture[-3:] == 255).all()


def test_makes_the_folder_and_leaves_one_file(tmp_path: Path) -> None:
    path = tmp_path / 'new' / 'figure.png'
    draw_routing(IMAGE, **routing(1, 4), path=path)
    draw_routing(IMAGE, **routing(2, 4), path=path)
    assert list(path.parent.iterdir()) == [path]
    Image.open(path).verify()


def test_a_failed_save_keeps_the_old_figure(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_full(self: object, path: Path, format: str) -> None:
        path.write_bytes(b'half a fig')
        raise OSError('disk full')

    path = tmp_path / 'figure.png'
    draw_routing(IMAGE, **routing(1, 4), path=path)
    before = path.read_bytes()
    monkeypatch.setattr('matplotlib.figure.Figure.savefig', disk_full)
    with pytest.raises(OSError, match='disk full'):
        draw_routing(IMAGE, **routing(2, 4), path=path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(('wrong', 'message'), [
    ({'image': IMAGE[..., 0]}, r'image .* got \(24, 36\) uint8'),
    ({'image': IMAGE / 255}, r'image .* got \(24, 36, 3\) float64'),
    ({'expert_maps': {}, 'loads': {}}, r'same layers, got \[\] and \[\]'),
    ({'loads': {'other': np.ones(1)}}, r"got \['layer'\] and \['other'\]"),
    ({'loads': {'layer': np.ones((2, 2)) / 4}}, r"'layer'.* got \(2, 2\)"),
    ({'loads': {'layer': np.ones(0)}}, r'sum to 1, got \[\]'),
    ({'loads': {'layer': np.array([0.5, 0.6])}}, r'sum to 1, got \[0.5 0.6'),
    ({'loads': {'layer': np.array([-1., 2.])}}, r'sum to 1, got \[-1.  2.'),
    ({'loads': {'layer': np.array([np.nan, 1.])}}, r'sum to 1, got \[nan'),
    ({'expert_maps': {'layer': np.zeros(4, int)}}, r"'layer'.* got \(4,\)"),
    ({'expert_maps': {'layer': np.zeros((2, 0), int)}}, r'got \(2, 0\)'),
    ({'expert_maps': {'layer': np.zeros((2, 2))}}, r"'layer'.* float64"),
    ({'expert_maps': {'layer': np.array([[0, 2]])}}, r'ids \[2\] .* -1..1'),
    ({'expert_maps': {'layer': np.array([[-2, 0]])}}, r'ids \[-2\]'),
    ({'truth': LABEL[:-1]}, r'truth .* \(24, 36\), got \(23, 36\)'),
    ({'segmentation': LABEL.T}, r'prediction .* got \(36, 24\)'),
    ({'segmentation': LABEL / 2}, r'prediction .* float64'),
    ({'segmentation': LABEL, 'palette': [[0, 0, 0]] * 3},
     r'prediction has ids \[3\] outside of 0..2'),
    ({'truth': LABEL - 1, 'classes': ['a', 'b', 'c']}, r'truth has ids \[-1'),
    ({'palette': [[0, 0, 0]], 'classes': ['a', 'b']},
     '2 classes do not fit the 1 colours')])
def test_errors_name_the_value(tmp_path: Path, wrong: dict[str, Any],
                               message: str) -> None:
    good: dict[str, Any] = {
        'image': IMAGE, 'expert_maps': {'layer': np.array([[0, -1]])},
        'loads': {'layer': np.array([0.5, 0.5])}}
    with pytest.raises(ValueError, match=message):
        draw_routing(**(good | wrong), path=tmp_path / 'figure.png')
    assert not list(tmp_path.iterdir())
