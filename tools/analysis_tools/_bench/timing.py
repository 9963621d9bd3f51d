"""Measures the time of several functions, which are run in turns."""
import random
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
WARM_UP = 2
Row = dict[str, Any]


def interleave(steps: dict[Any, Callable[[], None]], repeats: int
               ) -> dict[Any, float]:
    """Measure the median seconds of each step.

    All steps are run in turns, after two warm-ups, so that other work on the
    machine disturbs all of them alike. Each turn has another order, because
    the step before has an effect on caches and memory. The orders are the
    same in every call.
    """
    times: dict[Any, list[float]] = {name: [] for name in steps}
    shuffle = random.Random(0).sample
    for turn in range(repeats + WARM_UP):
        for name in shuffle(list(steps), len(steps)):
            seconds = seconds_of(steps[name])
            if turn >= WARM_UP:
                times[name].append(seconds)
    return {name: median(values) for name, values in times.items()}


def seconds_of(run: Callable[[], None]) -> float:
    if DEVICE == 'cpu':
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3
