"""Freed memory stays in the process, unless the user set the allocator up."""

import os
import platform
import subprocess
import sys

import pytest

from trl_dpg.metagradients import host_memory


FAULTS = """
import resource, torch
from trl_dpg import InnerLoopConfig, Student
from trl_dpg.metagradients.fine_tuning import FineTuning
from tests.tiny import make_model
FineTuning(Student(make_model()), [{"input_ids": [1, 2, 3]}], InnerLoopConfig())
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(16 << 20)
before = faults()
for _ in range(10):
    torch.ones(16 << 20)  # 64 MB
print(faults() - before)
"""
KEPT = f"import runpy; print(runpy.run_path({host_memory.__file__!r})['keep_freed_memory']())"


def output(program: str, **environment) -> str:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=own | environment, check=True, capture_output=True, text=True).stdout


GLIBC = tuple(map(int, platform.libc_ver()[1].split("."))) if platform.libc_ver()[0] == "glibc" else (0,)


@pytest.mark.skipif(GLIBC < (2, 36), reason="older releases keep tensors of less than 32 MB only")
def test_memory_that_was_freed_is_not_cleared_again():
    # Without this, 16,384 for each of ten tensors of pages of 4 kB. The first may get another place
    assert int(output(FAULTS).split()[-1]) < 20_000
    assert output(KEPT).strip() == "True"


def test_an_allocator_that_the_user_set_up_is_left_alone():
    assert output(KEPT, MALLOC_TRIM_THRESHOLD_="131072").strip() == "False"
    assert output(KEPT, GLIBC_TUNABLES="glibc.malloc.trim_threshold=131072").strip() == "False"
