"""Freed memory is kept for what comes next within a run, and given back between two."""

import subprocess
import sys

import pytest

ALLOCATE = """
import resource, torch
from twinbench.system.memory import keep_freed
if {keep}:
    keep_freed()
def step():
    rows = torch.ones(64, 64, 384)
    return (rows * 2).sum() + (rows + 1).sum()
for _ in range(20):  # a page faults the first time that it is touched, whoever keeps it
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(100):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

GAPS = """
import torch
from twinbench.system.memory import _in_use, give_back, keep_freed
keep_freed()
rows = [torch.ones(1 << 18) for _ in range(400)]  # 1 MB each
del rows[::2]
before = _in_use()
give_back()
print(before - _in_use())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is what is told")
def test_freed_memory_is_not_asked_for_again():
    faults = {}
    for keep in (False, True):
        done = subprocess.run(
            [sys.executable, "-c", ALLOCATE.format(keep=keep)], capture_output=True, text=True, check=True
        )
        faults[keep] = int(done.stdout)
    if faults[False] < 1000:
        pytest.skip(f"this C library keeps freed memory by itself ({faults[False]} page faults)")
    assert faults[True] < faults[False] / 10


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is what is told")
def test_gaps_between_what_stays_are_given_back():
    done = subprocess.run([sys.executable, "-c", GAPS], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 150 << 20
