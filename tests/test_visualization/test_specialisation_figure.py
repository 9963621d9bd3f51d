from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rmoe.visualization.specialisation import Tally
from rmoe.visualization.specialisation_figure import draw_specialisation


def tallies(num_layers: int, num_experts: int, num_classes: int
            ) -> dict[str, Tally]:
    made = {}
    for layer in range(num_layers):
        made[f'stage {layer} block 1'] = tally = Tally(num_classes,
                                                       num_experts)
        experts = torch.randint(num_experts, (6, 8))
        tally.add(torch.nn.functional.one_hot(experts, num_experts).double(),
                  torch.randint(num_classes, (6, 8)))
    return made


def draw(made: dict[str, Tally], path: Path, num_classes: int,
         title: str = '', name: str = 'class {}') -> np.ndarray:
    draw_specialisation(
        made, {layer: tally.measure() for layer, tally in made.items()},
        [name.format(i) for i in range(num_classes)], path, title)
    return np.asarray(Image.open(path).convert('RGB')).astype(int)


@pytest.mark.parametrize(('num_layers', 'num_experts', 'num_classes'), [
    (1, 1, 1), (6, 8, 11), (2, 64, 150)])
def test_nothing_is_cut(tmp_path, num_layers, num_experts, num_classes):
    picture = draw(tallies(num_layers, num_experts, num_classes),
                   tmp_path / 'new/figure.png', num_classes,
                   title='a long title ' * 20,
                   name='{} is a class with a long name')
    edges = [picture[:2], picture[-2:], picture[:, :2], picture[:, -2:]]
    assert all((edge == 255).all() for edge in edges)


def test_colours_are_the_shares(tmp_path):
    # expert 0 takes class 0, on the left; of class 1 both take one half
    shares = torch.zeros(12, 16, 2, dtype=torch.float64)
    shares[:, :8, 0] = 1
    shares[:6, 8:, 0] = shares[6:, 8:, 1] = 1
    tally = Tally(4, 2)
    tally.add(shares, torch.arange(16).ge(8).long().expand(12, 16))
    picture = draw({'layer': tally}, tmp_path / 'figure.png', 4)

    def area(colour):
        return int((abs(picture - colour).max(-1) <= 1).sum())

    # magma's last, middle and first colour, and what is not counted
    all_, half, none = (252, 253, 191), (183, 55, 121), (0, 0, 4)
    grey = (204, 204, 204)
    # heat map: 1 0 / .5 .5; maps: 3/4 and 1/4 of the image are ones, and the
    # other way round zeros
    assert area(half) > 5000
    assert area(all_) == pytest.approx(area(none), rel=.05)
    assert area(all_) > area(half)
    assert area(grey) < 500
    # without the right half there is no class 1 in this layer, but its row
    other = Tally(4, 2)
    other.add(shares[:, :8], torch.zeros(12, 8, dtype=torch.long))
    picture = draw({'layer': tally, 'other': other}, tmp_path / 'figure.png',
                   4)
    assert area(grey) > 5000


def test_nothing_counted(tmp_path):
    tally = Tally(2, 2)
    tally.add(torch.ones(2, 2, 2).double() / 2, torch.full((2, 2), -1))
    with pytest.raises(ValueError, match='empty, or all ignored'):
        draw({'layer': tally}, tmp_path / 'figure.png', 2)
