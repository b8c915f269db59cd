"""What a run logs beside its scalars: to wandb, TensorBoard and trackio, to `dpg_log.jsonl`, and to the terminal."""

import io
import json
import re
import struct
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import wandb
from rich.console import Console
from transformers import TrainerControl, TrainerState
from trl import GRPOConfig, GRPOTrainer

from tests.small_runs import CONFIG, METRIC, TOKENIZER, TRAIN_PROMPTS, dpg_config, make_trainer
from tests.tiny import QUIET, make_model
from trl_dpg import DPGReward, InnerLoopConfig, Student, metagradient
from trl_dpg.callbacks import DPGLoggingCallback, LiveTable, describe_batch, picture_image
from trl_dpg.live_table import duration, estimate, work_of_a_step
from trl_dpg.metrics import CombinedMetric, LanguageModelingMetric, WeightPatternMetric
from trl_dpg.reward import ScoredBatch


DOCS = (Path(__file__).parents[1] / "docs" / "logging.md").read_text()
PATTERN = WeightPatternMetric([[1, -1, 1], [-1, 1, 1]], offset=(4, 0))
BATCH = ScoredBatch(
    ["p"] * 3, ["a", "b", "c"], torch.tensor([0.0, 2.0, 1.0], dtype=torch.float64), {"picture": [[1, -1]]}
)


def documented_keys():
    section = DOCS.split("## Keys")[1].split("\n## ")[0]
    keys = re.findall(r"^\| `(dpg/[^`]+)`", section, re.MULTILINE)
    other_metrics = {"dpg/perplexity", "dpg/scanned", "dpg/weight_norm", "dpg/metric_noise"}
    other_metrics.add("dpg/student_micro_batch_size")  # after a step that was out of memory
    return {key for key in keys if "<" not in key} - other_metrics  # neither of parts nor of several students


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with evaluation, logged by all trackers that are installed."""
    folder = tmp_path_factory.mktemp("run")
    args = dpg_config(
        folder / "out",
        max_steps=2,
        per_token=True,
        num_logged_samples=5,
        report_to=["wandb", "tensorboard"],
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=8,
        num_generations_eval=4,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_DIR", str(folder))
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "tensorboard"))
        trainer = make_trainer(args, target_metric=PATTERN, eval_dataset=TRAIN_PROMPTS.select(range(2)))
        trainer.train()
        wandb.teardown()  # finishes the run, and waits until its file is written
    return folder, trainer


def read_log(folder):
    return [json.loads(line) for line in (folder / "dpg_log.jsonl").read_text().splitlines()]


def read_wandb(path):
    """The history of an offline run: records of wandb's protobuf in a log of LevelDB's format, in blocks of 32 KB."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts, rows = path.read_bytes(), 7, b"", []
    while at < len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            record = wandb_internal_pb2.Record.FromString(parts)
            parts = b""
            if record.WhichOneof("record_type") == "history":
                rows.append({})
                for item in record.history.item:
                    key, *inner = item.nested_key or [item.key]
                    value = json.loads(item.value_json)
                    if inner:
                        rows[-1].setdefault(key, {})[inner[0]] = value
                    else:
                        rows[-1][key] = value
    return rows


def test_an_offline_wandb_run_has_the_keys_of_the_docs(run):
    rows = read_wandb(next(run[0].glob("wandb/offline-run-*/*.wandb")))
    steps = {}
    for row in rows:
        for key in row:
            steps.setdefault(key, []).append(row.get("train/global_step"))
    assert len(documented_keys()) == 20
    for key in documented_keys():
        assert steps.get(f"train/{key}") == [1, 2] and steps.get(f"eval/{key}") == [2], key
    media = {key: value for row in rows for key, value in row.items() if isinstance(value, dict)}
    kinds = {key: media[f"train/dpg/{key}"]["_type"] for key in ("picture", "score_histogram", "samples")}
    assert kinds == {"picture": "image-file", "score_histogram": "histogram", "samples": "table-file"}
    files = next(run[0].glob("wandb/offline-run-*")) / "files"
    table = json.loads((files / media["train/dpg/samples"]["path"]).read_text())
    assert table["columns"] == ["step", "kind", "score", "prompt", "completion"] and len(table["data"]) == 5
    assert (files / media["eval/dpg/picture"]["path"]).read_bytes()[:4] == b"\x89PNG"


def test_tensorboard_has_the_keys_of_the_docs(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run[0] / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    found = {*tags["scalars"], *tags["images"], *tags["histograms"]}
    found |= {tag.removesuffix("/text_summary") for tag in tags["tensors"]}
    assert {f"{mode}/{key}" for mode in ("train", "eval") for key in documented_keys()} <= found
    assert [event.step for event in events.Images("train/dpg/picture")] == [1, 2]


def test_trackio_gets_the_media_keys_of_the_docs(tmp_path, monkeypatch):
    """A stand-in: trackio's media have wandb's names and arguments."""
    sent = []
    media = {name: lambda *args, _name=name, **kwargs: _name for name in ("Image", "Table", "Histogram")}
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(log=sent.append, **media))
    reward = SimpleNamespace(last_batch=BATCH)
    callback = DPGLoggingCallback(reward)
    state = TrainerState(global_step=3, epoch=0.5, is_world_process_zero=True)
    args = SimpleNamespace(output_dir=str(tmp_path), report_to=["trackio"])
    callback.on_step_end(args, state, None)
    callback.on_log(args, state, None, {"dpg/metric_after": 1.0})
    callback.on_log(args, state, None, {"eval_dpg/metric_after": 1.0})
    callback.on_log(args, state, None, {"train_runtime": 1.0})
    expected = {"dpg/picture": "Image", "dpg/score_histogram": "Histogram", "dpg/samples": "Table"}
    assert set(expected) <= documented_keys()
    assert sent == [
        {f"{mode}/{key}": value for key, value in expected.items()} | {"train/global_step": 3}
        for mode in ("train", "eval")
    ]


def test_every_logged_step_is_a_line_of_the_log(run):
    folder, trainer = run
    lines = read_log(folder / "out")
    assert [(line["step"], line["mode"]) for line in lines] == [(1, "train"), (2, "train"), (2, "eval"), (2, "train")]
    for line, log in zip(lines, trainer.state.log_history, strict=True):
        log.pop("total_flos", None)  # transformers' PrinterCallback takes it away
        assert {**line["scalars"], "step": line["step"], "epoch": line["epoch"]} == log
    assert "samples" not in lines[-1] and "train_runtime" in lines[-1]["scalars"]
    for line, size in zip(lines[:3], (16, 16, 8), strict=True):
        prefix = "eval_" if line["mode"] == "eval" else ""
        assert sum(line["histogram"]["counts"]) == size and len(line["histogram"]["edges"]) == 33
        extremes = [line["scalars"][f"{prefix}dpg/score/{name}"] for name in ("min", "max")]
        assert [line["quantiles"][0], line["quantiles"][-1]] == pytest.approx(extremes, rel=1e-5, abs=1e-12)
        picture = torch.tensor(line["readout"]["picture"])
        accuracy = (picture == PATTERN.pattern).float().mean().item()
        assert accuracy == pytest.approx(line["scalars"][f"{prefix}dpg/pixel_accuracy"])


def test_logged_samples_are_the_extremes_and_their_tokens_scores_sum_to_theirs(run):
    for line in read_log(run[0] / "out")[:3]:
        samples = line["samples"]
        assert [sample["kind"] for sample in samples] == ["best"] * 3 + ["worst"] * 2
        scores = [sample["score"] for sample in samples]
        assert scores == sorted(scores, reverse=True)
        assert (scores[0], scores[-1]) == (line["quantiles"][-1], line["quantiles"][0])
        for sample in samples:
            assert sum(sample["token_scores"]) == pytest.approx(sample["score"], rel=1e-4, abs=1e-9)
            assert len(sample["tokens"]) == len(sample["token_scores"])
            words = [token.strip() for token in sample["tokens"] if token.strip() not in TOKENIZER.all_special_tokens]
            assert words == sample["completion"].split() and sample["prompt"] in TRAIN_PROMPTS["prompt"]


def test_settings_and_versions_stand_beside_the_log(run):
    written = json.loads((run[0] / "out" / "dpg_config.json").read_text())
    assert written["metric"] == "WeightPatternMetric" and "LlamaForCausalLM" in written["student"]
    assert written["settings"]["per_token"] is True and written["inner_loop"]["batch_size"] == 4
    assert {"per_token", "student_batch_size"} <= set(written["changed"]) and "student_hvp" not in written["changed"]
    assert written["environment"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert (written["environment"]["device"], written["environment"]["processes"]) == ("cpu", "1")


def test_a_resumed_run_goes_on_and_a_new_one_begins_anew(tmp_path):
    lines = [{"step": 1, "mode": "train"}, {"step": 2, "mode": "train"}]
    reward = DPGReward(Student(make_model(), TOKENIZER), PATTERN)
    for step, kept in ((1, [1]), (0, [])):
        (tmp_path / "dpg_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        state = TrainerState(global_step=step, is_world_process_zero=True)
        DPGLoggingCallback(reward).on_train_begin(dpg_config(tmp_path), state, TrainerControl())
        assert [line["step"] for line in read_log(tmp_path)] == kept


def test_no_samples_are_logged_if_none_are_asked_for(tmp_path):
    make_trainer(dpg_config(tmp_path, num_logged_samples=0)).train()
    line = read_log(tmp_path)[0]
    assert line["samples"] == [] and line["readout"] == {} and sum(line["histogram"]["counts"]) == 16


def test_it_works_in_trls_own_trainer(tmp_path):
    """Training logs its own batch, though an evaluation came between its generation and the log."""
    reward = DPGReward(
        Student(make_model(seed=2), TOKENIZER), LanguageModelingMetric(["w5 w6"]), InnerLoopConfig(batch_size=8)
    )
    args = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        steps_per_generation=4,
        per_device_eval_batch_size=8,
        num_generations=4,
        max_completion_length=4,
        max_steps=4,
        logging_steps=4,
        eval_strategy="steps",
        eval_steps=3,
        **QUIET,
    )
    trainer = GRPOTrainer(
        model=make_model(seed=1, scale=1.0),
        reward_funcs=reward,
        args=args,
        train_dataset=TRAIN_PROMPTS,
        eval_dataset=TRAIN_PROMPTS.select(range(2)),
        processing_class=TOKENIZER,
        callbacks=[DPGLoggingCallback(reward, 2)],
    )
    trainer.train()
    sizes = {line["mode"]: sum(line["histogram"]["counts"]) for line in read_log(tmp_path) if "histogram" in line}
    assert sizes == {"train": 16, "eval": 8}


def test_a_batch_smaller_than_asked_for_is_described_once():
    samples = describe_batch(BATCH, 8)["samples"]
    assert [(s["completion"], s["kind"]) for s in samples] == [("b", "best"), ("c", "best"), ("a", "worst")]


def test_a_picture_is_scaled_up_pixel_by_pixel():
    image = picture_image([[1, -1], [0, 1]], size=4)
    assert image.tolist() == np.kron([[0, 255], [127, 0]], np.ones((2, 2))).tolist() and image.dtype == np.uint8


def test_a_combined_metric_reads_out_all_its_parts():
    student = Student(make_model(), TOKENIZER)
    metric = CombinedMetric([PATTERN, LanguageModelingMetric(["w1 w2"]), PATTERN])
    output = metagradient(student, ["w1 w2 w3", "w4 w5"], metric, InnerLoopConfig(batch_size=2))
    assert list(output.readout) == ["picture", "picture_2"]
    assert output.readout["picture"] == output.readout["picture_2"] and len(output.readout["picture"]) == 2


def test_the_seconds_of_the_phases_sum_to_the_step(tmp_path, monkeypatch):
    """Two generations in a step, and one generation for two steps."""

    def slow(completions, **kwargs):
        time.sleep(0.3)
        return [0.0] * len(completions)

    def generate(self, prompts, *args):
        time.sleep(0.2)
        return original(self, prompts, *args)

    original = GRPOTrainer._generate
    monkeypatch.setattr(GRPOTrainer, "_generate", generate)
    for settings, calls in (
        (dict(gradient_accumulation_steps=2, steps_per_generation=1), [2, 2]),
        (dict(gradient_accumulation_steps=1, steps_per_generation=2), [1, 0]),
    ):
        args = dpg_config(tmp_path, max_steps=2, per_device_train_batch_size=8, **settings)
        trainer = make_trainer(args, reward_funcs=slow)
        trainer.train()
        for logs, number in zip(trainer.state.log_history, calls, strict=False):
            seconds = {name: logs[f"dpg/seconds/{name}"] for name in ("generation", "reward", "update")}
            assert seconds["generation"] >= 0.2 * number and seconds["reward"] >= 0.3 * number
            assert (seconds["generation"] + seconds["reward"] == 0) == (number == 0)
            assert 0 < seconds["update"] and logs["step_time"] <= sum(seconds.values()) < logs["step_time"] + 0.3
            if number:
                parts = sum(logs[f"dpg/seconds/{name}"] for name in ("fine_tuning", "metric", "attribution"))
                assert 0 < parts < logs["dpg/seconds"] < seconds["reward"]


def test_the_estimate_leaves_out_what_comes_only_once(tmp_path):
    seconds = {
        "generation": 10.0,
        "reward": 60.0,
        "update": 5.0,
        "fine_tuning": 6.0,
        "metric": 8.0,
        "attribution": 6.0,
    }
    logs = {f"dpg/seconds/{name}": value for name, value in seconds.items()} | {"dpg/seconds": 50.0}
    state = TrainerState(max_steps=41, global_step=1)
    # Of 50 s of the reward, 30 are no phase, and 4 of the metric's 8 are for the student before its fine-tuning
    assert estimate(logs, 1, state, dpg_config(tmp_path)) == (
        "about 41 s a step: generation 10, reward 26 (its metric 15%), update 5. "
        "The rest, 40 steps, takes about 27 min."
    )
    assert [duration(seconds) for seconds in (99, 120, 7200)] == ["99 s", "2 min", "2.0 h"]


@pytest.mark.parametrize("metric_texts, says, advises", [(8, False, False), (60, True, False), (72, True, True)])
def test_a_metric_with_more_tokens_than_the_completions_is_said(tmp_path, metric_texts, says, advises):
    reward = DPGReward(Student(make_model(), TOKENIZER), LanguageModelingMetric(["w1 w2"] * metric_texts), CONFIG)
    text = work_of_a_step(dpg_config(tmp_path), reward)
    assert text.startswith("16 completions of up to 6 tokens, 4 student steps, a metric of ")
    assert f"a metric of {2 * metric_texts} tokens" in text
    assert ("96 at most" in text) == says
    assert ("more tokens than all completions" in text and "Fewer or shorter texts" in text) == advises
    reward.metric = CombinedMetric([PATTERN, reward.metric, reward.metric])
    assert f"a metric of {4 * metric_texts} tokens" in work_of_a_step(dpg_config(tmp_path), reward)


def test_a_training_names_the_command_that_says_what_4_bits_do(tmp_path, monkeypatch):
    reward = DPGReward(Student(make_model(), TOKENIZER), PATTERN, CONFIG)
    assert "4 bits" not in work_of_a_step(dpg_config(tmp_path), reward)
    monkeypatch.setattr(Student, "has_4bit_base", True)
    assert "4 bits: `trl-dpg verify` says what they do" in work_of_a_step(dpg_config(tmp_path), reward)


def state_and_logs(step):
    logs = {"dpg/metric_before": -3.0, "dpg/metric_after": -step, "rewards/word_share/mean": step / 10}
    logs |= {f"dpg/seconds/{name}": 1.0 for name in ("generation", "reward", "update")}
    return TrainerState(max_steps=9, global_step=step, logging_steps=1, is_world_process_zero=True), logs


@pytest.mark.parametrize("terminal", [True, False])
def test_the_live_table_shows_two_completions_growing(terminal, tmp_path):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, height=50)
    reward = DPGReward(Student(make_model(), TOKENIZER), METRIC, CONFIG)
    table = LiveTable("a run", console=console, reward=reward)
    args = dpg_config(tmp_path)
    table.on_train_begin(args, state_and_logs(0)[0], None)
    for step in range(1, 10):
        texts = [f"first [red]{step}", f"second {step}", f"third\n{step}", f"fourth {step}"]
        reward.last_batch = ScoredBatch(["p", "p", "q", "q"], texts, torch.zeros(4), {})
        state, logs = state_and_logs(step)
        table.on_log(args, state, None, logs)
    table.on_train_end(None, state, None)
    printed = console.file.getvalue()
    assert table.share == "rewards/word_share/mean"
    assert "16 completions of up to 6 tokens" in printed and "3 s a step (generation 1, reward 1, update 1)" in printed
    assert "The rest, 8 steps, takes about 24 s." in " ".join(printed.split())
    shown = printed[printed.rindex("┏") :] if terminal else printed
    for step in (1, 9):
        assert f"first [red]{step}" in shown and f"third {step}" in shown
    assert "second" not in printed and "fourth" not in printed
    if not terminal:
        lines = printed.splitlines()
        assert sum("a run: step" in line for line in lines) == 9
        assert sum("first" in line for line in lines) == 3  # steps 1, 6 and 9


def test_the_live_table_of_a_resumed_run_begins_where_the_run_began(tmp_path):
    table = LiveTable("a run", console=Console(file=io.StringIO(), force_terminal=True, width=100, height=50))
    state, _ = state_and_logs(2)
    state.log_history = [{**state_and_logs(step)[1], "step": step} for step in (1, 2)] + [{"step": 2, "eval_loss": 1}]
    table.on_train_begin(None, state, None)
    state.global_step = 3
    table.on_log(dpg_config(tmp_path), state, None, state_and_logs(3)[1])
    assert table.steps == [1, 2, 3] and table.history["dpg/metric_after"] == [-1, -2, -3]
    assert "The rest, 6 steps" in table.console.file.getvalue()


def test_the_live_table_fits_on_the_screen(tmp_path):
    args = dpg_config(tmp_path)
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=24)
    table = LiveTable("a run", console=console, every=1)
    table.on_train_begin(None, TrainerState(max_steps=60, logging_steps=1, is_world_process_zero=True), None)
    for step in range(1, 61):
        state, logs = state_and_logs(step)
        state.max_steps = 60
        table.on_log(args, state, None, logs)
        table.texts = [(1, ["a", "b"]), (step, ["c", "d"])]
        assert len(console.render_lines(table.render(state))) <= 24
    assert len(console.render_lines(table.render(state, all_rows=True))) > 60
    table.live.stop()


@pytest.mark.parametrize("terminal", [True, False])
def test_the_live_table_finds_its_columns(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    table = LiveTable("a run", console=console)
    state = TrainerState(max_steps=3, logging_steps=1, is_world_process_zero=True)
    table.on_train_begin(None, state, None)
    for step in (1, 2, 3):
        state.global_step = step
        logs = {"loss": 0.1, "dpg/metric_before": -3.0, "dpg/metric_after": -step, "dpg/score/mean": 0.0}
        logs |= {"dpg/perplexity": 20.0, "dpg/seconds": 1.0, "rewards/dpg/mean": 0.0, "rewards/uuid/mean": 0.5}
        table.on_log(None, state, None, logs)
    table.on_train_end(None, state, None)
    assert list(table.columns.values()) == ["Φ before", "Φ after", "perplexity", "uuid"]
    assert table.history["dpg/metric_after"] == [-1, -2, -3]
    printed = console.file.getvalue()
    for part in ("a run", "Φ after", "perplexity", "3/3"):
        assert part in printed
