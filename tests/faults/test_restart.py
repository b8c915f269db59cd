"""A run that goes on from a checkpoint is the run that it would have been: weights, scores and logs to the bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from tests.small_runs import CONFIG, METRIC, TOKENIZER, TRAIN_PROMPTS, dpg_config, make_trainer
from tests.tiny import QUIET, make_model, on_two_processes
from trl_dpg import DPGReward, RestartCallback, Student
from trl_dpg.callbacks import DPGLoggingCallback
from trl_dpg.metrics import CombinedMetric, Constraint, LanguageModelingMetric


TWELVE = Dataset.from_dict({"prompt": [f"w{k} w{k + 1}" for k in range(12)]})
WAYS = {
    "several updates a reward step": dict(steps_per_generation=2, num_iterations=2, per_device_train_batch_size=8),
    "one update a reward step": dict(),
    "micro-batches": dict(per_device_train_batch_size=8, gradient_accumulation_steps=2),
    "micro-batches and iterations": dict(
        per_device_train_batch_size=4, gradient_accumulation_steps=2, steps_per_generation=4, num_iterations=2
    ),
    "logs of five steps": dict(
        steps_per_generation=2, num_iterations=2, per_device_train_batch_size=8, logging_steps=5, per_token=True
    ),
    "entropy, KL and a table": dict(
        steps_per_generation=2,
        per_device_train_batch_size=8,
        beta=0.1,
        use_adaptive_entropy=True,
        verify_steps=2,
        log_completions=True,
    ),
}


def state_of(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def without_times(record):
    """A record without what a clock measured."""
    times = ("seconds", "step_time", "runtime", "per_second")
    return {name: value for name, value in record.items() if not any(time in name for time in times)}


def log_of(folder):
    records = [json.loads(line) for line in (Path(folder) / "dpg_log.jsonl").read_text().splitlines()]
    ends = [record for record in records if "train_runtime" in record["scalars"]]
    return [record | {"scalars": without_times(record["scalars"])} for record in records if record not in ends]


def assert_same_run(resumed, whole):
    for (name, one), other in zip(state_of(resumed).items(), state_of(whole).values(), strict=True):
        assert torch.equal(one, other), name
    histories = [
        [without_times(logs) for logs in trainer.state.log_history if "train_runtime" not in logs]
        for trainer in (resumed, whole)
    ]
    texts = [json.dumps(history, sort_keys=True) for history in histories]  # as text, in which nan is nan
    assert texts[0] == texts[1]
    assert json.dumps(log_of(resumed.args.output_dir)) == json.dumps(log_of(whole.args.output_dir))


def assert_resumes(folder, make, step):
    """A run and its copy that goes on from a step end alike. `make` makes the trainer for a folder."""
    whole = make(folder / "whole")
    whole.train()
    shutil.copytree(folder / "whole", folder / "resumed")
    resumed = make(folder / "resumed")
    resumed.train(resume_from_checkpoint=str(folder / "resumed" / f"checkpoint-{step}"))
    assert_same_run(resumed, whole)


@pytest.mark.parametrize("way", WAYS)
def test_a_run_goes_on_to_the_bit_from_any_save(way, tmp_path):
    """Four prompts of an epoch in each reward step: the run is in its third epoch when it goes on."""

    def make(folder):
        args = dpg_config(
            folder, **dict(max_steps=9, save_strategy="steps", save_steps=1, save_total_limit=9) | WAYS[way]
        )
        adapters = LoraConfig(r=4, target_modules="all-linear") if args.beta else None
        return make_trainer(args, train_dataset=TWELVE.select(range(8)), peft_config=adapters)

    assert_resumes(tmp_path, make, step=7)


def test_a_log_after_an_evaluation_has_the_samples_of_before(tmp_path):
    """One generation batch for eight updates, and an evaluation and a save between its rewards and its log."""

    def make(folder):
        args = dpg_config(
            folder,
            **dict(per_device_train_batch_size=8, steps_per_generation=2, num_iterations=4, logging_steps=4),
            **dict(eval_strategy="steps", eval_steps=2, save_steps=2, max_steps=4, per_device_eval_batch_size=8),
        )
        args.save_strategy = "steps"
        return make_trainer(args, eval_dataset=TRAIN_PROMPTS.select(range(2)))

    assert_resumes(tmp_path, make, step=2)
    lines = log_of(tmp_path / "resumed")
    assert [line["step"] for line in lines if line["mode"] == "train" and line["samples"]] == [4]


def make_several(folder):
    settings = dict(WAYS["several updates a reward step"], max_steps=6, save_strategy="steps", save_steps=1)
    return make_trainer(dpg_config(folder, **settings))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    trainer = make_several(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_it_goes_on_from_each_place_of_a_generation_batch(step, whole, tmp_path):
    shutil.copytree(whole.args.output_dir, tmp_path / "resumed")
    resumed = make_several(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "resumed" / f"checkpoint-{step}"))
    assert_same_run(resumed, whole)


def test_draws_and_multipliers_go_on_to_the_bit(tmp_path):
    def make(folder):
        texts = [[f"w{k} w{k + 1} w{k + 2}" for k in range(start, start + 5)] for start in (5, 25)]
        parts = [LanguageModelingMetric(own) for own in texts]
        metric = CombinedMetric(parts, names=["target", "known"], constraints={"known": Constraint(1e-3)})
        settings = dict(max_steps=5, save_strategy="steps", save_steps=1, metric_samples=3, student_learning_rate=1e-2)
        return make_trainer(dpg_config(folder, **settings), target_metric=metric)

    assert_resumes(tmp_path, make, step=3)
    logs = [line["scalars"] for line in log_of(tmp_path / "resumed")]
    assert (
        len({own["dpg/multiplier/known"] for own in logs}) > 2 and len({own["dpg/metric_noise"] for own in logs}) == 5
    )


def test_a_generator_of_adapters_goes_on_to_the_bit_in_a_later_epoch(tmp_path):
    def make(folder):
        args = dpg_config(
            folder, max_steps=5, save_strategy="steps", save_steps=4, learning_rate=1e-2, student_learning_rate=1e-3
        )
        adapters = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
        return make_trainer(args, train_dataset=TWELVE.select(range(8)), peft_config=adapters)

    assert_resumes(tmp_path, make, step=4)


def test_trls_own_trainer_goes_on_to_the_bit_with_the_callback(tmp_path):
    def make(folder, **kwargs):
        args = GRPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=8,
            num_generations=4,
            steps_per_generation=2,
            num_iterations=2,
            max_completion_length=6,
            max_steps=6,
            logging_steps=1,
            **QUIET | dict(save_strategy="steps", save_steps=3) | kwargs,
        )
        reward = DPGReward(Student(make_model(seed=2), processing_class=TOKENIZER), METRIC, CONFIG)
        trainer = GRPOTrainer(
            model=make_model(seed=1, scale=1.0),
            reward_funcs=reward,
            args=args,
            train_dataset=TRAIN_PROMPTS,
            processing_class=TOKENIZER,
            callbacks=[DPGLoggingCallback(reward)],
        )
        RestartCallback.add_to(trainer)
        return trainer

    assert_resumes(tmp_path, make, step=3)
    log, settings = (tmp_path / "whole" / "dpg_log.jsonl"), (tmp_path / "whole" / "dpg_config.json")
    before = log.read_bytes(), settings.read_bytes()
    other = make(tmp_path / "whole", temperature=0.5)
    with pytest.raises(ValueError, match="temperature"):  # and nothing was changed
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert (log.read_bytes(), settings.read_bytes()) == before
    make(tmp_path / "whole").train()
    assert (tmp_path / "whole" / "_earlier-1" / "dpg_log.jsonl").read_bytes() == before[0]


@pytest.mark.faults
def test_two_ranks_go_on_to_the_bit(tmp_path):
    process = on_two_processes("tests.faults.two_ranks", str(tmp_path))
    assert process.returncode == 0 and "same" in process.stdout, process.stderr[-3000:]
    assert {path.name for path in (tmp_path / "checkpoint-6").glob("dpg_*")} == {
        *(f"dpg_batch_{rank}.safetensors" for rank in (0, 1)),
        *(f"dpg_state_{rank}.json" for rank in (0, 1)),
        "dpg_checkpoint.json",
    }
