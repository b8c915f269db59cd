"""A real server that is killed in the middle of a training, and started again."""

import json
import signal
import subprocess
import sys
import threading
import time
from urllib.request import urlopen

import pytest

from tests.small_runs import CONFIG, METRIC, make_student
from tests.test_serve_clients import curve, grpo
from tests.test_serve_command import command  # noqa: F401  # a fixture
from trl_dpg import DPGReward


pytestmark = pytest.mark.faults
INNER_LOOP = ["--student_learning_rate", "1e-3", "--student_eps_root", "1e-6", "--student_batch_size", "4"]


def start(command, port):  # noqa: F811
    """A server, when it serves, and its address."""
    arguments = [*command, *INNER_LOOP, "--port", port]
    process = subprocess.Popen([sys.executable, "-m", "trl_dpg.cli", *arguments], stdout=subprocess.PIPE, text=True)
    lines = iter(process.stdout.readline, "")
    return process, next(line for line in lines if line.startswith("Serving on ")).split()[2]


@pytest.mark.parametrize("moment", [0.0, 0.02, 0.05])
def test_a_server_is_killed_and_started_again_and_the_run_is_the_same(command, moment, tmp_path, caplog):  # noqa: F811
    alone = grpo(DPGReward(make_student(), METRIC, CONFIG), tmp_path / "here")
    alone.train()
    first, url = start(command, "0")
    reward, calls, servers = DPGReward(server=url), [], [first]
    score = reward.client.score

    def kill():
        time.sleep(moment)
        first.kill()
        first.wait()
        servers.append(start(command, url.rpartition(":")[2])[0])

    def killed(examples):
        calls.append(examples)
        if len(calls) == 2:
            threading.Thread(target=kill).start()
        return score(examples)

    reward.client.score = killed
    trainer = grpo(reward, tmp_path / "there")
    trainer.train()
    for process in servers:
        process.kill()
        process.wait()
    assert curve(trainer) == curve(alone) and len(calls) == 3 and first.returncode == -9
    assert f"{url} answers again, after " in caplog.text


def test_a_server_is_stopped_by_a_signal(command):  # noqa: F811
    process, url = start(command, "0")
    with urlopen(f"{url}/health", timeout=60) as response:
        assert json.load(response)["status"] == "ok"
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == -signal.SIGTERM and time.monotonic() - started < 20
