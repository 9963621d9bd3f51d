"""A process that keeps freed memory has no page faults when it uses the memory
again, and its measured growth is that of its tensors."""
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
COUNT_FAULTS = '''
import resource, torch
from rmoe.engine.memory import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(12):  # until the heap has grown
    torch.ones(10_000_000)
before = faults()
for _ in range(10):
    torch.ones(10_000_000)
print(faults() - before)
'''


def run(code: str) -> bytes:
    return subprocess.check_output([sys.executable, '-c', code], cwd=ROOT)


def count_faults(keep: bool) -> int:
    return int(run(COUNT_FAULTS.format(keep=keep)))


def test_tensors_are_served_from_freed_memory():
    # 40 MB have 9,766 pages of 4 KiB, or 20 of 2 MiB
    assert 10 * count_faults(keep=True) < count_faults(keep=False)


PEAK = '''
import torch
from rmoe.engine.memory import PeakMemory, keep_freed_memory
torch.ones(1000) @ torch.ones(1000)
keep_freed_memory()
torch.ones(100_000_000)  # 400 MB that are free and the process's
with PeakMemory() as watch:
    a = torch.ones(25_000_000)  # 100 MB
    a = a + 1                   # 200 MB
    a = None
    b = torch.ones(12_500_000)  # 50 MB
print(watch.peak())
'''


def test_peak_memory_is_that_of_tensors():
    peak = int(run(PEAK))
    assert 195e6 < peak < 225e6
