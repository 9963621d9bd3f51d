"""Contenders take turns, and the median counts."""
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
# Of activations under autocast().
DTYPE = torch.bfloat16 if DEVICE == 'cuda' else torch.float32
FORWARD, TRAIN = 'forward', 'forward+backward'
WARM_UP = 2
Row = dict[str, Any]
Run = Callable[[], None]


def autocast() -> AbstractContextManager:
    """bfloat16 on a GPU, nothing on the CPU."""
    if DEVICE == 'cpu':
        return nullcontext()
    return torch.autocast(DEVICE, DTYPE)


def step(model: nn.Module, x: Tensor, mode: str) -> Run:
    """One pass of a model.

    Args:
        model: returns a tensor, or several.
        x: its input. If it requires a gradient it gets one.
        mode: FORWARD in evaluation, or TRAIN: forward and backward in
            training, from a gradient of ones to whatever needs one.
    """

    def forward() -> None:
        model.eval()
        with torch.no_grad(), autocast():
            model(x)

    def forward_backward() -> None:
        model.train()
        model.zero_grad(set_to_none=True)
        x.grad = None
        with autocast():
            outs = model(x)
        outs = outs if isinstance(outs, (tuple, list)) else [outs]
        outs = [out for out in outs if out.requires_grad]
        torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])

    return forward if mode == FORWARD else forward_backward


def interleave(steps: dict[Any, Run], repeats: int) -> dict[Any, float]:
    """Median seconds of each step; all take turns, after two warm-ups, so
    that a noisy machine disturbs all of them alike. Each turn has another
    order, always the same ones: who ran before leaves traces in caches and
    memory."""
    times: dict[Any, list[float]] = {name: [] for name in steps}
    shuffle = random.Random(0).sample
    for turn in range(repeats + WARM_UP):
        for name in shuffle(list(steps), len(steps)):
            seconds = seconds_of(steps[name])
            if turn >= WARM_UP:
                times[name].append(seconds)
    return {name: median(values) for name, values in times.items()}


def seconds_of(run: Run) -> float:
    if DEVICE == 'cpu':
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def print_table(rows: list[Row]) -> None:
    columns = list(rows[0])
    widths = [max(len(str(row[column])) for row in [*rows, {column: column}])
              for column in columns]
    for row in [{column: column for column in columns}, *rows]:
        print('  '.join(str(row[column]).ljust(width)
                        for column, width in zip(columns, widths)))
    print(flush=True)
