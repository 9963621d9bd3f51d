"""A process that keeps what it frees does not fault it in again."""
import subprocess
import sys
from pathlib import Path

TOOLS = Path(__file__).parents[2] / 'tools'
COUNT_FAULTS = '''
import resource, sys, torch
sys.path.insert(0, {tools!r})
import _memory
if {keep}:
    assert _memory.keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(12):  # until the heap has grown
    torch.ones(10_000_000)
before = faults()
for _ in range(10):
    torch.ones(10_000_000)
print(faults() - before)
'''


def count_faults(keep: bool) -> int:
    code = COUNT_FAULTS.format(tools=str(TOOLS), keep=keep)
    return int(subprocess.check_output([sys.executable, '-c', code]))


def test_tensors_are_served_from_freed_memory():
    # 40 MB have 9,766 pages of 4 KiB, or 20 of 2 MiB
    assert 10 * count_faults(keep=True) < count_faults(keep=False)
