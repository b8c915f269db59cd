"""What a training and a `generate` keep when they are stopped, and what a training warns of."""

import json
import logging
from dataclasses import replace

import pytest
from datasets import Dataset, load_dataset
from trl import SFTConfig, SFTTrainer

from tests.small_runs import CONFIG, METRIC, PROMPTS, TEXTS, TOKENIZER, dpg_config, make_student, make_trainer
from tests.tiny import make_model
from trl_dpg import DPGReward, cli, toy
from trl_dpg.guards import find_faults
from trl_dpg.rollouts import RolloutWriter
from trl_dpg.scripts import generate as script


def rollouts(folder):
    return load_dataset(str(folder / "rollouts"), split="train")


def test_every_rollout_is_kept_and_read_by_datasets_and_sft(tmp_path):
    trainer = make_trainer(dpg_config(tmp_path, max_steps=2, save_rollouts=True, num_iterations=1))
    trainer.train()
    kept = rollouts(tmp_path)
    assert kept.column_names == ["prompt", "completion", "step", "dpg_score", "reward_dpg"]
    assert len(kept) == 32 and sorted(set(kept["step"])) == [1, 2]
    log = [json.loads(line) for line in (tmp_path / "dpg_log.jsonl").read_text().splitlines()]
    best = {line["step"]: line["samples"][0] for line in log if "samples" in line}
    for step in (1, 2):
        row = max((row for row in kept if row["step"] == step), key=lambda row: row["dpg_score"])
        assert row["dpg_score"] == pytest.approx(best[step]["score"]) and row["prompt"] == best[step]["prompt"]
    sft = SFTConfig(str(tmp_path / "sft"), max_steps=1, report_to="none", use_cpu=True, bf16=False, save_strategy="no")
    SFTTrainer(make_model(), sft, train_dataset=kept, processing_class=TOKENIZER).train()


def test_conversations_are_kept_as_they_are(tmp_path):
    prompt, answer = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "\u05d0"}]
    writer = RolloutWriter(tmp_path)
    for _ in range(2):  # two reward steps in one step of the generator
        writer.write(3, [prompt], [answer], [0.5], {"dpg": [1.0]})
    row, again = rollouts(tmp_path)
    assert row["prompt"] == prompt and row["completion"] == answer and again == row


def test_a_resumed_run_has_every_step_once_and_a_new_one_begins_anew(tmp_path):
    saving = dict(save_rollouts=True, save_strategy="steps", save_steps=2)
    make_trainer(dpg_config(tmp_path, max_steps=3, **saving)).train()
    assert sorted(set(rollouts(tmp_path)["step"])) == [1, 2, 3]
    (tmp_path / "rollouts" / "step_000009_rank_0.parquet.tmp").write_bytes(b"half")
    make_trainer(dpg_config(tmp_path, max_steps=4, **saving)).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    steps = rollouts(tmp_path)["step"]
    assert sorted(steps) == [step for step in (1, 2, 3, 4) for _ in range(16)]
    make_trainer(dpg_config(tmp_path, max_steps=1, save_rollouts=True)).train()
    assert set(rollouts(tmp_path)["step"]) == {1}


def test_evaluations_are_not_kept(tmp_path):
    prompts = Dataset.from_dict({"prompt": ["w1", "w2"] * 8})
    args = dpg_config(tmp_path, save_rollouts=True, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=16)
    make_trainer(args, eval_dataset=prompts).train()
    assert len(rollouts(tmp_path)) == 16


# -- generate --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tokenizer = toy.word_tokenizer([*toy.LANGUAGE_A, *toy.LANGUAGE_B])
    models = [toy.tiny_llama(tokenizer, 16, 1, seed) for seed in (0, 1)]
    toy.save_world(folder, tokenizer, *models, ["ba be", "bi", "bo ba", "be", "bu"], ["lan"])
    return folder


def generate(world, folder, *further):
    argv = ["generate", "--model_name_or_path", str(world / "generator"), "--batch_size", "2"]
    argv += [
        "--dataset_name",
        str(world / "prompts.jsonl"),
        "--output_dir",
        str(folder),
        "--max_completion_length",
        "4",
    ]
    cli.main([*argv, *further])
    return load_dataset(str(folder), split="train")["text"]


def stopped(world, folder, monkeypatch, after=2):
    """A `generate` that ends while it samples its third batch, and half a line after what it has kept."""
    made, calls = script.make_completer, []

    def completer(arguments):
        complete = made(arguments)

        def stops(prompts, seed):
            calls.append(seed)
            if len(calls) > after:
                raise KeyboardInterrupt
            return complete(prompts, seed)

        return stops

    with monkeypatch.context() as patched:
        patched.setattr(script, "make_completer", completer)
        with pytest.raises(BaseException):  # noqa: B017  # as Ctrl-C ends it
            generate(world, folder)
    with (folder / "generate.jsonl").open("ab") as file:
        file.write('{"batch": 2, "texts": ["\u05d0'.encode()[:-1])


def test_a_generate_that_was_stopped_goes_on_and_ends_with_the_same_texts(world, tmp_path, monkeypatch, capsys):
    whole = generate(world, tmp_path / "whole")
    stopped(world, tmp_path / "out", monkeypatch)
    assert not (tmp_path / "out" / "train.parquet").exists()
    capsys.readouterr()
    assert generate(world, tmp_path / "out") == whole
    assert "2 of 3 batches are there already." in capsys.readouterr().err
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"README.md", "train.parquet", "manifest.json", "manifest_rows.npz"}


def test_every_batch_of_every_seed_has_random_numbers_of_its_own(world, tmp_path):
    def batches(seed):
        argv = ["--seed", str(seed), "--dataset_name", str(prompts), "--num_samples", "6"]
        texts = generate(world, tmp_path / str(seed), *argv)
        return [tuple(texts[start : start + 2]) for start in range(0, len(texts), 2)]

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "w1 w2"}) + "\n")
    assert len({*batches(0), *batches(1), *batches(2)}) == 9


def test_texts_of_other_settings_are_not_mixed(world, tmp_path, monkeypatch, capsys):
    stopped(world, tmp_path, monkeypatch)
    with pytest.raises(SystemExit) as raised:
        generate(world, tmp_path, "--seed", "7")
    assert raised.value.code == 2 and "with other settings (seed)" in capsys.readouterr().err
    assert generate(world, tmp_path, "--seed", "7", "--overwrite") != generate(world, tmp_path, "--overwrite")


# -- warnings --------------------------------------------------------------------------------------------------------


def logs(number=6, **changes):
    entries = []
    for step in range(number):
        entry = {
            "dpg/metric_after": -1.0 + 0.1 * step,
            "dpg/metric_change": 0.1,
            "dpg/score/std": 0.1,
            "dpg/score/min": -1.0,
            "dpg/score/max": 1.0,
            "entropy": 2.0,
            "frac_reward_zero_std": 0.0,
        }
        entries.append(entry | {name: values[step] for name, values in changes.items()})
    return entries


@pytest.mark.parametrize(
    ("changes", "fault", "advice"),
    [
        ({}, None, ""),
        ({"dpg/metric_after": [-1.0, *[-0.5] * 5]}, "metric", "raise the student's learning rate"),
        ({"dpg/metric_after": [-0.5, -0.4, *[-0.5] * 4]}, None, ""),
        ({"dpg/score/std": [0.1, *[1e-9] * 5]}, "spread", "all scores were equal"),
        ({"frac_reward_zero_std": [0.0, *[1.0] * 5]}, "spread", "all rewards of each prompt were equal"),
        ({"entropy": [2.0, *[0.001] * 5]}, "entropy", "has fallen from 2 to 0.001"),
        ({"entropy": [0.001] * 6}, None, ""),
        ({"dpg/verify/pearson": [0.9, 0.9, 0.9, 0.2, 0.1, float("nan")]}, "verify", "0.20, 0.10, nan"),
        ({"dpg/verify/pearson": [0.1, 0.2, 0.3, 0.9, 0.9, 0.9]}, None, ""),
    ],
)
def test_a_training_that_does_not_learn_is_found_out(changes, fault, advice):
    found = find_faults(logs(**changes))
    assert list(found) == ([] if fault is None else [fault]) and advice in "".join(found.values())
    assert not {"metric", "spread", "entropy"} & set(find_faults(logs(**changes)[:4]))


def test_a_training_warns_once_and_says_what_to_do(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    make_trainer(dpg_config(tmp_path, max_steps=8, student_learning_rate=0.0)).train()
    said = [record.getMessage() for record in caplog.records if record.name == "trl_dpg.guards"]
    assert len(said) == len({message.partition(":")[2][:30] for message in said}) > 0
    assert all(message.startswith("Step 5: ") for message in said)
    assert any("it no longer moves" in message for message in said)


class State:
    global_step = 11


def test_numbers_that_are_not_finite_name_step_rank_sample_and_cause():
    reward = DPGReward(make_student(), METRIC, replace(CONFIG, learning_rate=1e30, optimizer="sgd"))
    with pytest.raises(FloatingPointError) as raised:
        reward(PROMPTS, TEXTS, trainer_state=State())
    message = str(raised.value)
    assert message.startswith("Reward of step 12 of the generator, rank 0: The student's training loss is")
    assert "learning rate (1e+30) is too high" in message and "the first is completion 4: 'w9 w1 w3'" in message
