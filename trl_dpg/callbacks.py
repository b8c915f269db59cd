"""Logs a DPG run's histograms, samples, pictures, seconds and settings, in addition to its scalars."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from .environment import device_name, environment
from .files import append_line, remove_half_line, write_json
from .live_table import PHASES, LiveTable, table_columns
from .metagradients import InnerLoopConfig
from .reward import DPGReward, ScoredBatch


__all__ = [
    "DPGLoggingCallback",
    "LiveTable",
    "PhaseTimer",
    "describe_batch",
    "device_name",
    "environment",
    "markdown_table",
    "picture_image",
    "pictures",
    "run_config",
    "table_columns",
]

LOG_NAME = "dpg_log.jsonl"
CONFIG_NAME = "dpg_config.json"
TUNING_NAME = "tune.json"
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
NUM_BINS = 32


class DPGLoggingCallback(TrainerCallback):
    """
    Logs the histogram of a DPG reward's scores, the samples with the highest and lowest scores, and the metric's
    pictures. [`DPGTrainer`] adds this callback. With another trainer, pass it in `callbacks`.

    Whenever scalars are logged, the main process appends a line to `<output_dir>/dpg_log.jsonl`. `trl-dpg report`
    reads this file. Histogram, samples and pictures are also sent to those of wandb, trackio and TensorBoard that
    `report_to` names. All keys are listed in docs/logging.md. When training begins, the settings and the versions of
    the libraries are written to `<output_dir>/dpg_config.json`.

    Args:
        reward ([`DPGReward`]):
            The trainer's reward.
        num_samples (`int`, *optional*, defaults to `8`):
            Samples to log: half of them with the highest scores, half with the lowest.
        tensorboard ([`~transformers.integrations.TensorBoardCallback`], *optional*):
            The trainer's own callback. Its writer is used.
    """

    def __init__(self, reward: DPGReward, num_samples: int = 8, tensorboard: TensorBoardCallback | None = None):
        self.reward = reward
        self.num_samples = num_samples
        self.tensorboard = tensorboard
        self.train_batch: ScoredBatch | None = None
        self._written: InnerLoopConfig | None = None  # the inner loop in the file of settings
        self._config: dict[str, Any] = {}  # what else is in it

    def on_train_begin(self, args, state, control, **kwargs):
        resumed = state.global_step > 0
        self.reward.begin_training(resumed)
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._written = self.reward.inner_loop_config
        self._config = run_config(args, self.reward)
        if not (resumed and self._written.auto):  # the numbers in the file are better than "auto"
            self._write_config(args)
        cut_log(folder / LOG_NAME, state.global_step)

    def _write_config(self, args) -> None:
        self._written = self.reward.inner_loop_config
        write_json(Path(args.output_dir) / CONFIG_NAME, self._config | {"inner_loop": asdict(self._written)})

    def on_step_end(self, args, state, control, **kwargs):
        self.train_batch = self.reward.last_batch or self.train_batch
        if self._written is not None and self._written != self.reward.inner_loop_config:  # "auto" became numbers
            self._write_config(args)

    def on_evaluate(self, args, state, control, **kwargs):
        self.reward.last_batch = None  # after an evaluation, training must not log the evaluation's batch

    def on_log(self, args, state, control, logs, **kwargs):
        if not state.is_world_process_zero:
            return
        mode = "eval" if any(name.startswith("eval_") for name in logs) else "train"
        record: dict[str, Any] = {"step": state.global_step, "epoch": state.epoch, "mode": mode}
        record["scalars"] = {name: value for name, value in logs.items() if isinstance(value, int | float)}
        batch = self.train_batch if mode == "train" else self.reward.last_batch
        if batch is not None and ("dpg/metric_after" in logs or "eval_dpg/metric_after" in logs):
            record |= describe_batch(batch, self.num_samples)
            self._send(args, mode, state.global_step, batch, record)
        append_line(Path(args.output_dir) / LOG_NAME, record)

    def _send(self, args, mode: str, step: int, batch: ScoredBatch, record: dict[str, Any]) -> None:
        """Send histogram, samples and pictures to the trackers. Transformers' own callbacks send the scalars."""
        histogram = (record["histogram"]["counts"], record["histogram"]["edges"])
        columns = ["step", "kind", "score", "prompt", "completion"]
        rows = [[step, *(sample[name] for name in columns[1:])] for sample in record["samples"]]
        images = {name: picture_image(rows) for name, rows in pictures(record["readout"]).items()}
        trackers: list[Any] = []
        if "wandb" in args.report_to:
            import wandb

            trackers += [wandb] * (wandb.run is not None)
        if "trackio" in args.report_to:
            import trackio

            trackers.append(trackio)
        for tracker in trackers:
            media = {f"{mode}/dpg/{name}": tracker.Image(image) for name, image in images.items()}
            media[f"{mode}/dpg/score_histogram"] = tracker.Histogram(np_histogram=histogram)
            if rows:
                media[f"{mode}/dpg/samples"] = tracker.Table(columns=columns, data=rows)
            tracker.log({**media, "train/global_step": step})
        if self.tensorboard is not None:
            writer = self.tensorboard.tb_writer
            for name, image in images.items():
                writer.add_image(f"{mode}/dpg/{name}", image, step, dataformats="HW")
            writer.add_histogram(f"{mode}/dpg/score_histogram", batch.scores, step)
            if rows:
                writer.add_text(f"{mode}/dpg/samples", markdown_table(columns, rows), step)


class PhaseTimer(TrainerCallback):
    """
    Measures the seconds of each optimizer step: of generation, rewards and update, which sum to the whole step.

    Generation is the time from the start of a micro-batch to its rewards: sampling, and the log probabilities that
    TRL computes of the completions. The update is the rest of the step: advantages, losses, backward passes and the
    optimizer. A step that uses the completions of an earlier one has 0 seconds of generation and rewards.

    Args:
        metrics (`dict[str, list[float]]`):
            The trainer's figures of training, `trainer._metrics["train"]`. The seconds are appended to
            `dpg/seconds/generation`, `dpg/seconds/reward` and `dpg/seconds/update`.
    """

    def __init__(self, metrics: dict[str, list[float]]):
        self.metrics = metrics
        self.generation = self.reward = 0.0
        self.step_began = self.batch_began = time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        self.step_began = self.batch_began = time.perf_counter()
        self.generation = self.reward = 0.0

    def on_substep_end(self, args, state, control, **kwargs):
        self.batch_began = time.perf_counter()

    @contextmanager
    def rewarding(self) -> Iterator[None]:
        """Measure the rewards, and the generation before them."""
        began = time.perf_counter()
        yield
        self.generation += began - self.batch_began
        self.reward += time.perf_counter() - began

    def on_step_end(self, args, state, control, **kwargs):
        update = time.perf_counter() - self.step_began - self.generation - self.reward
        for name, value in zip(PHASES, (self.generation, self.reward, update), strict=True):
            self.metrics[f"dpg/seconds/{name}"].append(value)


def cut_log(path: Path, step: int) -> None:
    """
    Cut a log off after a step: a resumed run makes the later lines again. A half line at the end goes, too, and the
    line that the trainer logs when it ends, whose step is that of a checkpoint.
    """
    if not path.exists():
        return
    remove_half_line(path)
    with path.open("rb+") as file:
        kept = 0
        for line in file:
            record = json.loads(line)
            if record["step"] > step or "train_runtime" in record.get("scalars", {}):
                break
            kept += len(line)
        file.truncate(kept)


def describe_batch(batch: ScoredBatch, num_samples: int) -> dict[str, Any]:
    """
    Describe a scored batch by values that JSON can hold.

    Args:
        batch ([`ScoredBatch`]): N samples.
        num_samples (`int`): Samples to describe; all of them if there are fewer.

    Returns:
        `dict[str, Any]`:
            `quantiles` (of the scores, at `QUANTILES`), `histogram` (`counts` in 32 bins and their `edges`),
            `readout`, and `samples`: the best (highest first), then the worst (lowest last).
    """
    scores = batch.scores.numpy()
    counts, edges = np.histogram(scores, bins=NUM_BINS)
    order = np.argsort(-scores, kind="stable").tolist()
    num_samples = min(num_samples, len(order))
    num_worst = num_samples // 2
    chosen = [("best", row) for row in order[: num_samples - num_worst]]
    chosen += [("worst", row) for row in order[len(order) - num_worst :]]
    samples = []
    for kind, row in chosen:
        sample = {
            "kind": kind,
            "score": scores[row].item(),
            "prompt": batch.prompts[row],
            "completion": batch.completions[row],
        }
        if batch.tokens is not None and batch.token_scores is not None:
            sample |= {"tokens": batch.tokens[row], "token_scores": batch.token_scores[row].tolist()}
        samples.append(sample)
    return {
        "quantiles": np.quantile(scores, QUANTILES).tolist(),
        "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
        "readout": batch.readout,
        "samples": samples,
    }


def pictures(readout: dict[str, Any]) -> dict[str, list[list[int]]]:
    """The entries of a metric's readout that are pictures."""
    return {name: rows for name, rows in readout.items() if name.startswith("picture")}


def picture_image(rows: list[list[int]], size: int = 256) -> np.ndarray:
    """
    A picture as a grey image: 1 is black and -1 is white. Every pixel is enlarged to a square, so that the longer side
    of the image has about `size` pixels.

    Returns:
        `np.ndarray` of shape `[H·k, W·k]`, uint8.
    """
    picture = np.array(rows)
    factor = max(1, size // max(picture.shape))
    return np.kron(((1 - picture) * 127.5).astype(np.uint8), np.ones((factor, factor), np.uint8))


def markdown_table(columns: list[str], rows: list[list[Any]]) -> str:
    """A table in Markdown."""

    def line(cells):
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(columns), line("---" for _ in columns), *map(line, rows)])


def run_config(args, reward: DPGReward) -> dict[str, Any]:
    """
    The settings and the environment of a run, as values that JSON can hold.

    Returns:
        `dict[str, Any]`:
            `settings` (the trainer's arguments), `changed` (names of those that are not at their defaults),
            `metric`, `student`, `inner_loop` and `environment` (versions, processes and device).
    """
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(args)}
    return {
        "settings": json.loads(args.to_json_string()),
        "changed": [name for name, default in defaults.items() if vars(args)[name] != default],
        **reward.described(),
        "inner_loop": asdict(reward.inner_loop_config),
        "environment": environment() | {"processes": str(args.world_size), "device": device_name(args.device)},
    }
