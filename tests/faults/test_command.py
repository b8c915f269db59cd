"""`trl-dpg dpg`: signals, two runs in one folder, half-written checkpoints, and another set-up on the command line."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from unittest.mock import MagicMock

import pytest
from transformers import TrainerState

from tests.faults.test_restart import log_of, without_times
from tests.small_runs import dpg_config, make_trainer
from tests.test_dpg_script import UUID, run
from trl_dpg import stopping
from trl_dpg.checkpoints import newest_whole
from trl_dpg.files import locked
from trl_dpg.restart import RestartCallback
from trl_dpg.reward import DPGReward
from trl_dpg.scripts.arguments import UsageError
from trl_dpg.scripts.resuming import load_finished, one_run
from trl_dpg.stopping import STOPPED, StopOnSignal


SEVERAL_UPDATES = ["--per_device_train_batch_size", "16", "--steps_per_generation", "2", "--num_iterations", "2"]
SAVING = ["--save_strategy", "steps", "--save_steps", "3", "--evaluate", "false", "--max_steps", "6"]
AUTO = ["--resume_from_checkpoint", "auto"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(UUID, folder, *SEVERAL_UPDATES, *SAVING)
    return folder


@pytest.fixture
def another(whole, tmp_path):
    """A copy of it, in its place: the paths of its world are among the settings."""
    shutil.copytree(whole, tmp_path / "kept")
    yield whole
    shutil.rmtree(whole)
    shutil.copytree(tmp_path / "kept", whole)


def assert_same_figures(folder, summary, whole):
    """The figures of two runs, without those of a clock."""
    other = json.loads((whole / "summary.json").read_text())
    assert without_times(summary["curves"]) == without_times(other["curves"])
    assert json.dumps(log_of(folder)) == json.dumps(log_of(whole))
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def send(monkeypatch, number):
    """Send a signal to this process in the second reward step. Returns a list with its time."""
    call, calls = DPGReward.__call__, []

    def signalled(*arguments, **kwargs):
        calls.append(time.perf_counter())
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return call(*arguments, **kwargs)

    monkeypatch.setattr(DPGReward, "__call__", signalled)
    return calls


def test_a_signal_saves_and_stops_and_the_run_can_go_on(whole, tmp_path, monkeypatch, capsys):
    """The generation batch of the second reward step serves four updates."""
    calls, handler = send(monkeypatch, signal.SIGTERM), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        run(UUID, tmp_path, *SEVERAL_UPDATES, *SAVING)
    assert stopped.value.code == STOPPED == 75 and time.perf_counter() - calls[1] < 30
    printed = capsys.readouterr().err
    assert "SIGTERM: saving and stopping after this step" in printed
    assert "Stopped by SIGTERM after step 5; checkpoint-5 is saved. Go on with the same command and" in printed
    assert not (tmp_path / "summary.json").exists() and signal.getsignal(signal.SIGTERM) == handler
    monkeypatch.undo()
    summary = run(UUID, tmp_path, *SEVERAL_UPDATES, *SAVING, *AUTO)
    assert_same_figures(tmp_path, summary, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_stops_a_trainer_in_a_script(number, tmp_path, monkeypatch):
    send(monkeypatch, number)
    trainer = make_trainer(dpg_config(tmp_path, max_steps=4))
    with StopOnSignal() as stop:
        trainer.add_callback(stop)
        trainer.train()
    assert stop.received is number and trainer.state.global_step == 2
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-2"


def test_a_signal_after_the_last_step_saves_what_was_not_saved(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RestartCallback, "on_train_end", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run(UUID, tmp_path, "--max_steps", "2", "--save_strategy", "no", "--evaluate", "false")
    assert stopped.value.code == STOPPED and newest_whole(tmp_path) == tmp_path / "checkpoint-2"
    assert "checkpoint-2 is saved" in capsys.readouterr().err
    monkeypatch.undo()
    assert run(UUID, tmp_path, "--max_steps", "2", "--evaluate", "false", *AUTO)["steps"] == 2


@pytest.mark.faults
def test_a_signal_to_the_launcher_reaches_the_run(tmp_path):
    command = [sys.executable, "-m", "trl_dpg.cli", "dpg", "--num_processes", "1", "--config", str(UUID)]
    command += ["--output_dir", str(tmp_path), "--max_steps", "500", "--evaluate", "false"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not (tmp_path / "dpg_log.jsonl").exists() and process.poll() is None:
        time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == STOPPED and "is saved. Go on with the same command" in error
    assert newest_whole(tmp_path) is not None


def test_a_full_disk_while_saving_is_named_and_the_run_goes_on_to_the_bit(whole, tmp_path, monkeypatch, capsys):
    """The optimizer's state does not fit any more from the second reward step on."""
    folder, call = tmp_path / "run", DPGReward.__call__
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(*arguments, **kwargs):
        optimizer = folder / "checkpoint-3" / "optimizer.pt"
        if optimizer.exists():
            resource.setrlimit(resource.RLIMIT_FSIZE, (optimizer.stat().st_size - 1, before[1]))
        return call(*arguments, **kwargs)

    monkeypatch.setattr(DPGReward, "__call__", filling)
    try:
        with pytest.raises(SystemExit) as full:
            run(UUID, folder, *SEVERAL_UPDATES, *SAVING)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert full.value.code == 1 and "The disk is full, or a limit on the size of files" in capsys.readouterr().err
    assert (folder / "checkpoint-6").is_dir() and newest_whole(folder) == folder / "checkpoint-3"
    monkeypatch.undo()
    assert_same_figures(folder, run(UUID, folder, *SEVERAL_UPDATES, *SAVING, *AUTO), whole)


def test_a_second_signal_stops_at_once(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with StopOnSignal() as stop:
        stop.on_train_begin(None, None, None)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # from the launcher
        assert stop.received is signal.SIGTERM and not ended
        monkeypatch.setattr(stopping, "SAME_SIGNAL", 0.0)
        os.kill(os.getpid(), signal.SIGINT)
    assert ended == [130]


def test_a_signal_outside_of_a_training_ends_with_the_same_status(capsys):
    with pytest.raises(SystemExit) as stopped, StopOnSignal("Nothing is lost."):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.code == STOPPED and "Stopped by SIGTERM. Nothing is lost." in capsys.readouterr().err


def test_two_runs_in_one_folder_are_refused(tmp_path, capsys):
    with locked(tmp_path / "_dpg.lock", UsageError("")), pytest.raises(SystemExit) as refused:
        run(UUID, tmp_path)
    assert refused.value.code == 2 and "another run is at work in this folder" in capsys.readouterr().err
    with one_run(tmp_path):
        pass


def test_the_newest_whole_checkpoint_is_found(another, tmp_path):
    (another / "checkpoint-6" / "dpg_checkpoint.json").unlink()
    summary = run(UUID, another, *SEVERAL_UPDATES, *SAVING, "--resume_from_checkpoint", "true")
    assert_same_figures(another, summary, tmp_path / "kept")
    assert [path.name for path in another.glob("_earlier-*/*")] == ["checkpoint-6"]


def test_a_checkpoint_that_is_not_whole_is_refused_by_its_name(another, capsys):
    (another / "checkpoint-3" / "scheduler.pt").unlink()
    with pytest.raises(SystemExit) as refused:
        run(UUID, another, *SEVERAL_UPDATES, *SAVING, "--resume_from_checkpoint", str(another / "checkpoint-3"))
    assert refused.value.code == 2
    assert "is not a whole checkpoint: files are missing: scheduler.pt" in capsys.readouterr().err


@pytest.mark.parametrize("max_steps", ["6", "7"])
def test_another_set_up_is_named_setting_by_setting(max_steps, whole, capsys):
    """Also if no step is left."""
    changed = ["--metric_kwargs", '{"texts": ["12-34"]}', "--num_iterations", "3", "--max_steps", max_steps]
    with pytest.raises(SystemExit) as refused:
        run(UUID, whole, *SEVERAL_UPDATES, *SAVING, *AUTO, *changed)
    message = " ".join(capsys.readouterr().err.split())
    assert refused.value.code == 2 and "metric_kwargs (was {'dataset': " in message
    assert "num_iterations (was 2, is 3)" in message and "or give --accept_changed_setup true." in message


@pytest.mark.parametrize("best", [True, False])
def test_a_finished_run_that_is_started_again_has_the_model_that_it_ended_with(best, tmp_path):
    TrainerState(global_step=2, best_model_checkpoint="checkpoint-1").save_to_json(
        str(tmp_path / "trainer_state.json")
    )
    trainer = MagicMock(is_deepspeed_enabled=False, is_fsdp_enabled=False)
    trainer.args.max_steps, trainer.args.load_best_model_at_end = 2, best
    assert load_finished(trainer, str(tmp_path))
    assert trainer._load_best_model.called == best and trainer.state.global_step == 2
