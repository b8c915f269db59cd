"""`trl-dpg dpg --num_processes 2`: a process is killed, and signals to the launcher and to the processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import MagicMock

import psutil
import pytest

from tests.faults.kills import num_logged, outcome
from tests.faults.test_command import AUTO, SAVING, SEVERAL_UPDATES
from tests.faults.test_restart import log_of
from tests.test_dpg_script import SMALL, UUID
from trl_dpg.checkpoints import checkpoints, newest_whole
from trl_dpg.scripts.processes import first_failure
from trl_dpg.stopping import STOPPED


CALLS = {"generation": 2, "reward": 2, "update": 5, "saving": 2}
"""Which call of each phase is after the first save."""


def launch(folder, *arguments, number=2, fault=""):
    argv = ["dpg", "--config", str(UUID), "--output_dir", str(folder), *SMALL, *SEVERAL_UPDATES, *SAVING, *arguments]
    argv += ["--reward_funcs", "tests.faults.faulty.nothing", "--reward_kwargs", "{}"]
    argv += ["--num_processes", str(number), "--main_process_port", "0"]
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "TRL_DPG_TEST_FOLDER": str(folder.parent)}
    if fault:
        environment["TRL_DPG_TEST_FAULT"] = fault
    command = [sys.executable, "-m", "trl_dpg.cli", *argv]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)


def left(folder):
    """Processes of a run that are still there."""
    return [process for process in psutil.process_iter(["cmdline"]) if str(folder) in (process.info["cmdline"] or [])]


def end(process, folder):
    """The exit status of a run, and what was said. No process may be left."""
    try:
        said = process.communicate(timeout=200)[1]
    finally:
        remaining = left(folder)
        for one in remaining:
            one.kill()
    assert not remaining, said
    return process.returncode, said


def seconds_since(folder, phase):
    return time.time() - float((folder.parent / f"{phase}.txt").read_text())


def wait_for_step(process, folder, step=1):
    while num_logged(folder) < step and process.poll() is None:
        time.sleep(0.05)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two processes that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    status, said = end(launch(folder), folder)
    assert status == 0, said
    return folder


def assert_goes_on(folder, whole=None, number=2):
    status, said = end(launch(folder, *AUTO, number=number), folder)
    assert status == 0, said
    assert json.loads((folder / "summary.json").read_text())["steps"] == 6
    assert whole is None or outcome(folder) == outcome(whole)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("phase", "rank", "number"), [("generation", 1, 2), ("reward", 0, 2), ("update", 1, 2), ("saving", 2, 3)]
)
def test_a_process_that_is_killed_ends_the_run_and_it_goes_on(phase, rank, number, tmp_path, whole):
    folder = tmp_path / "run"
    status, said = end(launch(folder, fault=f"{rank} {phase} {CALLS[phase]} 9", number=number), folder)
    assert status == 137 and seconds_since(folder, phase) < 60
    assert f"The process of rank {rank} was ended by SIGKILL, as the system does when memory is short" in said
    assert "Go on with the same command and --resume_from_checkpoint auto." in said
    assert "Traceback" not in said
    assert newest_whole(folder) == folder / "checkpoint-3"
    assert_goes_on(folder, whole if number == 2 else None, number)


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_to_the_launcher_of_two_processes_saves_once(number, tmp_path, whole):
    folder = tmp_path / "run"
    process = launch(folder)
    wait_for_step(process, folder)
    process.send_signal(number)
    sent = time.time()
    status, said = end(process, folder)
    assert_stopped(folder, number, status, said, time.time() - sent)
    assert_goes_on(folder, whole)


@pytest.mark.faults
def test_a_signal_to_every_process_saves_once(tmp_path):
    """As SLURM sends it."""
    folder = tmp_path / "run"
    process = launch(folder)
    wait_for_step(process, folder)
    for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children()]:
        one.send_signal(signal.SIGUSR1)
    sent = time.time()
    status, said = end(process, folder)
    assert_stopped(folder, signal.SIGUSR1, status, said, time.time() - sent)


def assert_stopped(folder, number, status, said, seconds):
    assert status == STOPPED and seconds < 30, (status, seconds, said)
    step = max(checkpoints(folder))
    assert said.count(f"Stopped by {number.name} after step {step}; checkpoint-{step} is saved.") == 1
    assert said.count("saving and stopping after this step") == 1 and "Traceback" not in said
    assert newest_whole(folder) == folder / f"checkpoint-{step}"
    assert [line["step"] for line in log_of(folder)] == [*range(1, step + 1)]
    assert set(checkpoints(folder)) <= {3, step}
    states = [json.loads(path.read_text()) for path in (folder / f"checkpoint-{step}").glob("dpg_state_*.json")]
    assert [state["position"] for state in states] == [step] * 2


@pytest.mark.faults
def test_a_second_signal_to_the_launcher_stops_at_once(tmp_path):
    """Also a process that does not answer any more."""
    folder = tmp_path / "run"
    process = launch(folder, fault=f"1 reward 2 {int(signal.SIGSTOP)}")
    while not (tmp_path / "reward.txt").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    sent = time.time()
    status, _ = end(process, folder)
    assert status == 130 and time.time() - sent < 5 and newest_whole(folder) == folder / "checkpoint-3"


@pytest.mark.parametrize(
    ("statuses", "first"),
    [
        ({0: (1, 5), 1: (-9, 5)}, 1),
        ({0: (1, 5), 1: (-9, 6)}, 0),
        ({0: (143, 5), 1: (75, 5)}, 1),
        ({0: (-15, 5), 1: (2, 5)}, 1),
        ({0: (1, 5), 1: (2, 5)}, 1),
    ],
)
def test_the_process_that_failed_first_is_found(statuses, first):
    failures = {rank: MagicMock(exitcode=code, timestamp=at) for rank, (code, at) in statuses.items()}
    assert first_failure(failures) == (first, statuses[first][0])
