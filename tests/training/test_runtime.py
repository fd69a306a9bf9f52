"""A daemon sets its threads and its allocator for itself; in processes of their own, for both stay set."""

import subprocess
import sys
from pathlib import Path

import pytest

THREADS = """
import torch
from splitfed.training.runtime import prepare_process

chosen = torch.get_num_threads()
prepare_process(None)
print(torch.get_num_threads() - chosen)
for threads in (3, 1):
    prepare_process(threads)
    print(torch.get_num_threads())
"""

KEPT_MIB = """
import os
import torch
from splitfed.training.runtime import prepare_process

def resident_mib():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

def print_kept_mib():
    before = resident_mib()
    large = torch.ones(2**24)
    assert resident_mib() - before > 60
    del large
    print(resident_mib() - before)

print_kept_mib()
prepare_process(1)
print_kept_mib()
"""


def run(code: str, root: Path) -> list[float]:
    process = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    return [float(line) for line in process.stdout.split()]


def test_threads_are_those_that_were_asked_for_or_torchs_choice(root: Path) -> None:
    assert run(THREADS, root) == [0, 3, 1]


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is glibc's")
def test_the_memory_of_a_large_tensor_stays_for_the_next_one(root: Path) -> None:
    """64 MiB are freed: by default they go back to the kernel."""
    kept_before, kept_after = run(KEPT_MIB, root)
    assert kept_before < 4
    assert kept_after > 60
