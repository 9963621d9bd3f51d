"""The measured cost of a training: its batches, and the report about
stages."""
import re
from datetime import datetime, timedelta

import torch
from mmengine.dataset import InfiniteSampler
from torch.utils.data import DataLoader

from rmoe.checks.examination import Report, show_costs
from rmoe.checks.step_cost import StageCost, endless_batches


def test_batches_go_on():
    """Deleting an iterator over an InfiniteSampler would end the sampler."""
    data = list(range(3))
    loader = DataLoader(data, sampler=InfiniteSampler(data, shuffle=False))
    batches = endless_batches(loader)
    assert [int(next(batches)) for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    batches = endless_batches(DataLoader(data))
    assert [int(next(batches)) for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_time_and_memory_add_up(capsys):
    model = torch.nn.Linear(1000, 1000, bias=False)  # 4 MB
    runner = type('Runner', (), dict(model=model))
    costs = [StageCost('a', 0, 100, '', 1_000_000, 2_000_000, 3_000_000,
                       seconds=30.),
             StageCost('b', 100, 1000, '', 4_000_000, 8_000_000, 5_000_000,
                       seconds=60.)]
    show_costs(runner, costs, Report())
    out = capsys.readouterr().out
    assert '10.0 MB in all' in out and '21.0 MB in all' in out
    assert '15:50:00 (h:mm:ss) in all' in out  # 3000 s + 54000 s
    end = datetime.strptime(re.search(r'ends on (.* at .*)', out)[1],
                            '%Y-%m-%d at %H:%M')
    assert abs(end - datetime.now() - timedelta(seconds=57000)
               ) < timedelta(minutes=2)
