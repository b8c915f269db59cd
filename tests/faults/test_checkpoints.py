"""Which checkpoint a run goes on from, what is refused, and what becomes of an earlier run's files."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from huggingface_hub.utils import filter_repo_objects
from transformers import TrainerState

from tests.faults.test_restart import assert_same_run
from tests.small_runs import TRAIN_METRIC, TRAIN_PROMPTS, dpg_config, make_trainer
from tests.tiny import make_model
from trl_dpg.callbacks import cut_log
from trl_dpg.checkpoints import newest_whole, put_aside, why_not_whole
from trl_dpg.metrics import CombinedMetric, LanguageModelingMetric, WeightNormMetric
from trl_dpg.report.runs import read_run
from trl_dpg.run_setup import changes, metric_setup, run_setup
from trl_dpg.scripts.errors import explain
from trl_dpg.scripts.resuming import one_run


KEY = f"hf_{'0123456789abcdefgh' * 2}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three steps with checkpoints of all."""
    folder = tmp_path_factory.mktemp("run")
    make_trainer(config(folder)).train()
    return folder


def config(folder, **kwargs):
    return dpg_config(folder, **dict(max_steps=3, save_strategy="steps", save_steps=1) | kwargs)


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


OF_A_CHECKPOINT = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "trainer_state.json")


@pytest.mark.parametrize("name", [*OF_A_CHECKPOINT, "dpg_batch_0.safetensors", "dpg_state_0.json"])
def test_a_checkpoint_with_a_missing_or_short_file_is_named_and_the_one_before_is_taken(name, run, caplog):
    newest, before = run / "checkpoint-3", run / "checkpoint-2"
    assert newest_whole(run) == newest
    (newest / name).write_bytes((newest / name).read_bytes()[:-1])
    (before / name).unlink()
    assert newest_whole(run) == run / "checkpoint-1"
    assert f"files have another size than when they were written: {name}" in caplog.text
    assert f"files are missing: {name}" in caplog.text


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_missing_file_that_transformers_does_not_miss_is_refused(name, run, caplog):
    (run / "checkpoint-3" / name).unlink()
    with pytest.raises(ValueError, match=f"not a whole checkpoint: files are missing: {name}"):
        make_trainer(config(run, max_steps=4)).train(resume_from_checkpoint=str(run / "checkpoint-3"))
    accepting = make_trainer(config(run, max_steps=4, accept_changed_setup=True))
    accepting.train(resume_from_checkpoint=str(run / "checkpoint-3"))
    assert accepting.state.global_step == 4 and f"files are missing: {name}" in caplog.text


def test_a_checkpoint_is_whole_only_when_all_of_it_is_written(run):
    (run / "checkpoint-3" / "dpg_checkpoint.json").unlink()
    assert "its writing was interrupted" in why_not_whole(run / "checkpoint-3")
    assert newest_whole(run) == run / "checkpoint-2"
    assert newest_whole(run / "checkpoint-2") is None


def test_a_checkpoint_of_the_model_only_is_refused(tmp_path):
    make_trainer(config(tmp_path, max_steps=1, save_only_model=True)).train()
    with pytest.raises(ValueError, match="it has only the model"):
        make_trainer(config(tmp_path)).train(resume_from_checkpoint=True)


def test_an_older_checkpoint_goes_only_when_the_next_is_whole(tmp_path, monkeypatch):
    from trl_dpg import restart

    left = []

    def mark_whole(*arguments):
        left.append(sorted(path.name for path in tmp_path.glob("checkpoint-*")))
        mark(*arguments)

    mark = restart.mark_whole
    monkeypatch.setattr(restart, "mark_whole", mark_whole)
    args = config(tmp_path, save_total_limit=1)
    make_trainer(args).train()
    assert left == [["checkpoint-1"], ["checkpoint-1", "checkpoint-2"], ["checkpoint-2", "checkpoint-3"]]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert args.save_total_limit == 1
    assert json.loads((tmp_path / "dpg_config.json").read_text())["settings"]["save_total_limit"] == 1
    assert torch.load(tmp_path / "checkpoint-3" / "training_args.bin", weights_only=False).save_total_limit == 1


def test_the_limit_of_checkpoints_is_that_of_each_training(tmp_path):
    args = config(tmp_path, save_total_limit=1)
    trainer = make_trainer(args)
    trainer.train()
    trainer.args.save_total_limit = None
    trainer.train()
    assert len(list(tmp_path.glob("checkpoint-*"))) == 3 and trainer.args.save_total_limit is None


@pytest.mark.parametrize("broken", ["trl_dpg.trainer.GRPOTrainer._calculate_rewards", "trl_dpg.restart.save_file"])
def test_the_limit_of_checkpoints_is_given_back_after_an_error(broken, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("broken")

    trainer = make_trainer(config(tmp_path, save_total_limit=1))
    monkeypatch.setattr(broken, fail)
    with pytest.raises(OSError, match="broken"):
        trainer.train()
    assert trainer.args.save_total_limit == 1


def test_the_limit_of_checkpoints_holds_in_a_training_after_an_error_of_transformers(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("No space left on device")

    trainer = make_trainer(config(tmp_path, save_total_limit=1))
    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(trainer, "_save_rng_state", fail)
        trainer.train()
    trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert trainer.args.save_total_limit == 1


def test_an_error_while_saving_leaves_the_last_whole_checkpoint(run, monkeypatch):
    def full(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr("trl_dpg.restart.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        make_trainer(config(run, max_steps=4, save_total_limit=1)).train(resume_from_checkpoint=True)
    assert newest_whole(run) == run / "checkpoint-3" and (run / "checkpoint-4").is_dir()


@pytest.mark.parametrize("kind", [RuntimeError, KeyError, ValueError])
def test_a_metric_that_fails_once_is_named_with_its_step_and_the_run_goes_on_to_the_bit(kind, tmp_path):
    failing = []

    def moody(student):
        if failing and failing[0].state.global_step == 2:
            raise kind("the judge did not answer")
        return TRAIN_METRIC(student)

    def trainer(folder):
        return make_trainer(config(folder, max_steps=4), target_metric=moody)

    whole = trainer(tmp_path / "whole")
    whole.train()
    failing.append(trainer(tmp_path / "run"))
    with pytest.raises(kind, match="the judge did not answer") as raised:
        failing[0].train()
    status, text = explain(raised.value)
    assert status == 1 and "the judge did not answer" in text
    assert "This was in the reward of step 3 of the generator, rank 0, with the metric moody." in text
    failing.clear()
    assert newest_whole(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"
    resumed = trainer(tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(resumed, whole)


CHANGES = {
    "student's weights": dict(student=make_model(seed=5)),
    "student": dict(student=make_model(seed=2, hidden_size=16)),
    "metric": dict(target_metric=LanguageModelingMetric(["w5 w6 w8"])),
    "data": dict(train_dataset=Dataset.from_dict({"prompt": ["w7 w8", *TRAIN_PROMPTS["prompt"][1:]]})),
    "learning_rate": dict(learning_rate=0.5),
    "eps_root": dict(student_eps_root=1e-3),
    "betas": dict(student_adam_beta2=0.5),
    "steps_per_generation": dict(steps_per_generation=2),
    "temperature": dict(temperature=0.5),
    "train_on": dict(train_on="prompt_completion"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_set_up_is_named_and_refused(name, run):
    change = CHANGES[name]
    own = {key: value for key, value in change.items() if key in ("student", "target_metric", "train_dataset")}
    settings = {key: value for key, value in change.items() if key not in own}
    with pytest.raises(ValueError, match=rf"The set-up is not that of .*\W{name} \(was .*, is .*\)"):
        make_trainer(config(run, **settings), **own).train(resume_from_checkpoint=str(run / "checkpoint-2"))
    log = (run / "dpg_log.jsonl").read_bytes()
    assert (run / "checkpoint-3").is_dir() and len(log.splitlines()) == 4  # nothing was changed


def test_a_changed_set_up_is_accepted_with_a_warning(run, caplog):
    args = config(run, accept_changed_setup=True, student_eps_root=1e-3)
    trainer = make_trainer(args, **CHANGES["student's weights"])
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert trainer.state.global_step == 3
    assert "eps_root (was" in caplog.text and "student's weights (was" in caplog.text


def test_a_setting_that_an_earlier_version_did_not_have_had_its_default():
    then, now = {"settings": {"a": 1}}, {"settings": {"a": 1, "replay_ratio": 0.25, "student_aggregation": "mean"}}
    assert changes(then, now) == []
    now["settings"] |= {"replay_ratio": 0.5}
    assert changes(then, now) == ["replay_ratio (was 0.25, is 0.5)"]


def test_a_combined_metric_without_constraints_is_the_one_that_had_none():
    metric = CombinedMetric([WeightNormMetric("lm_head.weight")], [1.0])
    found = metric_setup(metric)
    del metric.constraints  # as in earlier versions
    assert metric_setup(metric) == found


def test_what_does_not_change_the_run_may_change(run):
    free = dict(max_steps=4, logging_steps=2, save_steps=2, save_total_limit=1, num_logged_samples=2, verify_steps=1)
    make_trainer(config(run, **free, student_micro_batch_size=2)).train(resume_from_checkpoint=True)


def test_a_new_run_in_the_folder_of_an_earlier_one_moves_its_files_aside(run, caplog):
    log = (run / "dpg_log.jsonl").read_bytes()
    make_trainer(config(run, max_steps=1)).train()
    aside = run / "_earlier-1"
    assert (aside / "dpg_log.jsonl").read_bytes() == log and len(list(aside.glob("checkpoint-*"))) == 3
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-1"]
    assert "has files of an earlier training. They were moved to" in caplog.text
    make_trainer(config(run, max_steps=1)).train()
    assert (run / "_earlier-2" / "checkpoint-1").is_dir()


def test_an_evaluation_before_the_training_stays_in_the_log(tmp_path):
    trainer = make_trainer(config(tmp_path, max_steps=1), eval_dataset=TRAIN_PROMPTS.select(range(4)))
    trainer.evaluate()
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "dpg_log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["mode"]) for line in lines[:2]] == [(0, "eval"), (1, "train")]


def test_a_run_that_goes_on_from_an_older_checkpoint_keeps_the_later_ones_apart(run, caplog):
    shutil.copytree(run / "checkpoint-3", run / "checkpoint-4")
    (run / "checkpoint-3" / "dpg_checkpoint.json").unlink()  # as of TRL
    (run / "checkpoint-4" / "trainer_state.json").unlink()
    assert put_aside(run, 1) == run / "_earlier-1"
    assert {path.name for path in run.glob("*/checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
    assert not (run / "checkpoint-4").exists()
    assert "checkpoint-4' is removed: it has no trainer_state.json" in caplog.text
    assert put_aside(run, 1) is None


def test_rollouts_alone_are_moved_aside_with_their_settings(tmp_path):
    """A run that was killed before its first log leaves its settings and rollouts."""
    (tmp_path / "dpg_config.json").write_text("{}")
    assert put_aside(tmp_path, 0) is None  # nothing was made with these settings
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "step_000001_rank_0.parquet").write_bytes(b"")
    make_trainer(config(tmp_path, max_steps=1, save_rollouts=True)).train()
    aside = tmp_path / "_earlier-1"
    assert (aside / "rollouts" / "step_000001_rank_0.parquet").read_bytes() == b""
    assert (aside / "dpg_config.json").read_text() == "{}"
    assert (tmp_path / "rollouts" / "step_000001_rank_0.parquet").stat().st_size


def test_what_is_moved_aside_and_the_lock_are_not_uploaded(run):
    make_trainer(config(run, max_steps=1)).train()
    with one_run(run):
        paths = [path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()]
    uploaded = list(filter_repo_objects(paths, ignore_patterns=["_*", "checkpoint-*"]))  # transformers' patterns
    assert "dpg_log.jsonl" in uploaded
    assert not [path for path in uploaded if path.endswith(("optimizer.pt", "dpg.lock"))]


def test_the_folder_of_a_checkpoint_of_elsewhere_must_be_told(run, tmp_path):
    args = config(tmp_path / "other")
    with pytest.raises(ValueError, match="The folder of the checkpoint of step 2 is not known"):
        make_trainer(args).train(resume_from_checkpoint=str(run / "checkpoint-2"))
    args.resume_from_checkpoint = str(run / "checkpoint-2")
    make_trainer(args).train(resume_from_checkpoint=args.resume_from_checkpoint)
    assert (
        TrainerState.load_from_json(str(tmp_path / "other" / "checkpoint-3" / "trainer_state.json")).global_step == 3
    )


def test_a_log_that_was_cut_inside_a_character_is_continued(run):
    log = run / "dpg_log.jsonl"
    first = log.read_bytes().splitlines(keepends=True)[0]
    log.write_bytes(first + '{"step": 2, "mode": "train", "text": "ü'.encode()[:-1])
    make_trainer(config(run)).train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert [line["step"] for line in read_run(run).lines] == [1, 2, 3, 3] and log.read_bytes().startswith(first)


def test_a_log_is_cut_where_its_steps_are_made_again(tmp_path):
    path = tmp_path / "dpg_log.jsonl"
    lines = [{"step": step, "scalars": {"loss": 0.0}} for step in (1, 2, 2, 3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    inode = path.stat().st_ino
    cut_log(path, 2)
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines[:3] and path.stat().st_ino == inode
    with path.open("a") as file:
        file.write(json.dumps({"step": 2, "scalars": {"train_runtime": 1.0}}) + "\n")
    cut_log(path, 2)
    assert len(path.read_text().splitlines()) == 3


def test_a_report_copes_with_half_written_files(run, caplog):
    for name in ("summary.json", "dpg_config.json"):
        (run / name).write_bytes('{"metric": "ü'.encode()[:-1])
    found = read_run(run)
    assert found.summary == found.config == {} and found.scored
    assert "summary.json' is left out: it is not JSON" in caplog.text


def test_the_seconds_of_all_pieces_are_added(run):
    trainer = make_trainer(config(run, max_steps=4))
    before = json.loads((run / "checkpoint-3" / "dpg_state_0.json").read_text())["seconds"]
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-3"))
    after = json.loads((run / "checkpoint-4" / "dpg_state_0.json").read_text())["seconds"]
    assert 0 < before < after <= trainer.restart.seconds < before + 60


@pytest.mark.parametrize("kind", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_weights_that_are_spread_over_processes_are_not_compared(kind, tmp_path, monkeypatch):
    trainer = make_trainer(config(tmp_path))
    monkeypatch.setattr(trainer, kind, True)
    monkeypatch.setattr(trainer.model, "named_parameters", None)  # a DTensor has no plain elements
    assert run_setup(trainer, trainer.dpg_reward, {})["run"]["generator's frozen weights"] is None


def test_credentials_are_in_no_checkpoint_and_are_no_change_of_the_setup(tmp_path):
    def trainer(**kwargs):
        made = make_trainer(config(tmp_path, max_steps=1, **kwargs))
        made.restart.further = {"metric_kwargs": {"token": "sesame", "name": KEY}}
        return made

    trainer().train()
    stored = (tmp_path / "checkpoint-1" / "dpg_checkpoint.json").read_text()
    assert "metric_kwargs" in stored and "sesame" not in stored and KEY not in stored
    trainer().restart.check(tmp_path / "checkpoint-1")


def test_another_name_that_looks_like_a_key_is_a_change_of_the_setup(tmp_path):
    def trainer(name):
        made = make_trainer(config(tmp_path, max_steps=1))
        made.restart.further = {"metric_kwargs": {"name": name}}
        return made

    trainer(KEY).train()
    with pytest.raises(ValueError, match="The set-up is not that of"):
        trainer(f"{KEY}1").restart.check(tmp_path / "checkpoint-1")
