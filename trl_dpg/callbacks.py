"""Callbacks: what a DPG run logs beside its scalars, and a live table for the terminal."""

import json
import math
import platform
import time
from dataclasses import MISSING, asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from .reward import DPGReward, ScoredBatch


if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


LOG_NAME = "dpg_log.jsonl"
CONFIG_NAME = "dpg_config.json"
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
NUM_BINS = 32


class DPGLoggingCallback(TrainerCallback):
    """
    Logs what scalars cannot say of a DPG reward: the score histogram, the samples with the highest and lowest scores,
    and the metric's pictures. [`DPGTrainer`] adds it; in another trainer, pass it as a callback.

    Whenever scalars are logged, on the main process, it appends a line to `<output_dir>/dpg_log.jsonl`, from which
    `trl-dpg report` is made, and sends histogram, table and images to wandb, trackio and TensorBoard, as far as
    `report_to` names them. All keys are listed in docs/logging.md. When training begins, the settings and the
    versions of the libraries are written to `<output_dir>/dpg_config.json`.

    Args:
        reward ([`DPGReward`]):
            The trainer's reward.
        num_samples (`int`, *optional*, defaults to `8`):
            Samples to log: half of them with the highest scores, half with the lowest.
        tensorboard ([`~transformers.integrations.TensorBoardCallback`], *optional*):
            The trainer's, whose writer is used.
    """

    def __init__(self, reward: DPGReward, num_samples: int = 8, tensorboard: TensorBoardCallback | None = None):
        self.reward = reward
        self.num_samples = num_samples
        self.tensorboard = tensorboard
        self.train_batch: ScoredBatch | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        config = run_config(args, self.reward)
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
        log = folder / LOG_NAME
        if log.exists():  # a resumed run goes on from its checkpoint, a new one from nothing
            lines = log.read_text(encoding="utf-8").split("\n")[:-1]
            kept = [line + "\n" for line in lines if json.loads(line)["step"] <= state.global_step]
            log.write_text("".join(kept), encoding="utf-8")

    def on_step_end(self, args, state, control, **kwargs):
        self.train_batch = self.reward.last_batch or self.train_batch

    def on_evaluate(self, args, state, control, **kwargs):
        self.reward.last_batch = None  # what training reuses after an evaluation is its own batch

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
        with (Path(args.output_dir) / LOG_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def _send(self, args, mode: str, step: int, batch: ScoredBatch, record: dict[str, Any]) -> None:
        """Histogram, samples and pictures, to the trackers. Scalars go through transformers' own callbacks."""
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


def describe_batch(batch: ScoredBatch, num_samples: int) -> dict[str, Any]:
    """
    A batch as JSON can hold it.

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
    A picture as a grey image: ink (1) is black, paper (-1) white. Pixels become squares, so that the longer side has
    about `size` pixels.

    Returns:
        `np.ndarray` of shape `[H·k, W·k]`, uint8.
    """
    picture = np.array(rows)
    factor = max(1, size // max(picture.shape))
    return np.kron(((1 - picture) * 127.5).astype(np.uint8), np.ones((factor, factor), np.uint8))


def markdown_table(columns: list[str], rows: list[list[Any]]) -> str:
    def line(cells):
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(columns), line("---" for _ in columns), *map(line, rows)])


def run_config(args, reward: DPGReward) -> dict[str, Any]:
    """
    Settings and environment of a run, as JSON can hold them.

    Returns:
        `dict[str, Any]`:
            `settings` (the trainer's arguments), `changed` (names of those that are not at their defaults),
            `metric`, `student`, `inner_loop` and `environment` (versions, processes and device).
    """
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(args)}
    metric = reward.metric
    return {
        "settings": json.loads(args.to_json_string()),
        "changed": [name for name, default in defaults.items() if vars(args)[name] != default],
        "metric": metric.__name__ if hasattr(metric, "__name__") else type(metric).__name__,
        "student": reward.student.describe(),
        "inner_loop": asdict(reward.inner_loop_config),
        "environment": environment() | {"processes": str(args.world_size), "device": device_name(args.device)},
    }


def environment() -> dict[str, str]:
    """Versions that a run's numbers may depend on."""
    versions = {"platform": platform.platform(), "python": platform.python_version()}
    packages = (
        "trl-dpg",
        "trl",
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "datasets",
        "bitsandbytes",
        "tokenizers",
    )
    for package in (*packages, "numpy", "wandb", "vllm", "lm-eval", "sentence-transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class LiveTable(TrainerCallback):
    """
    A table of a run's figures that grows in the terminal while the generator trains. Needs rich.

    Where the console is no terminal, it prints a line now and then instead.

    Args:
        title (`str`):
            What is trained.
        columns (`dict[str, str]`, *optional*):
            Names in the logs, and what the columns are called. By default Φ, the metric's proxies and the further
            rewards, as they are found in the first logs.
        share (`str`, *optional*):
            Which of `columns` is a share between 0 and 1, to be drawn as a bar.
        every (`int`, *optional*):
            Logs between two rows; the last one always has a row. By default there are about 20 rows.
        console ([`~rich.console.Console`], *optional*):
            Where it is drawn.

    Attributes:
        history (`dict[str, list[float]]`): The columns so far, by their names in the logs.
    """

    def __init__(
        self,
        title: str,
        columns: dict[str, str] | None = None,
        share: str | None = None,
        every: int | None = None,
        console: "Console | None" = None,
    ):
        from rich.console import Console
        from rich.live import Live

        self.title, self.columns, self.share, self.every = title, columns, share, every or 0
        self.console = console or Console()
        self.history: dict[str, list[float]] = {}
        self.steps: list[int] = []
        self.live = Live(console=self.console, refresh_per_second=4)

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()
        self.history, self.steps = {}, []
        self.every = self.every or max(1, math.ceil(state.max_steps / max(state.logging_steps, 1) / 20))
        if self.console.is_terminal and state.is_world_process_zero:
            self.live.start()

    def on_log(self, args, state, control, logs, **kwargs):
        if "dpg/metric_after" not in logs or not state.is_world_process_zero:
            return
        if self.columns is None:
            self.columns = table_columns(logs)
        self.steps.append(state.global_step)
        for name in self.columns:
            self.history.setdefault(name, []).append(logs[name])
        if self.console.is_terminal:
            self.live.update(self.table(state))
        elif len(self.steps) % self.every == 1 % self.every or state.global_step == state.max_steps:
            figures = "  ".join(f"{title} {self.history[name][-1]:8.4f}" for name, title in self.columns.items())
            self.console.print(f"{self.title}: step {state.global_step:3}/{state.max_steps}  {figures}")

    def on_train_end(self, args, state, control, **kwargs):
        if self.live.is_started:
            if self.steps:
                self.live.update(self.table(state), refresh=True)
            self.live.stop()

    def table(self, state) -> "Table":
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        table = Table(title=self.title, title_justify="left")
        columns: dict[str, str] = self.columns  # type: ignore[assignment]
        for title in ("step", *columns.values()):
            table.add_column(title, justify="right")
        if self.share is not None:
            table.add_column("")
        rows = len(self.steps)
        for row in sorted({*range(0, rows, self.every), rows - 1}):
            cells: list[Any] = [f"{self.steps[row]}", *(f"{self.history[name][row]:.4g}" for name in columns)]
            if self.share is not None:
                cells.append(ProgressBar(total=1.0, completed=max(self.history[self.share][row], 0.0), width=30))
            table.add_row(*cells)
        seconds, done = time.perf_counter() - self.started, state.global_step
        table.caption = f"{done}/{state.max_steps} steps, {seconds:.0f} s, {seconds / done:.2f} s a step"
        return table


# Logged under `dpg/` whatever the metric is, and not worth a column
_NO_COLUMNS = {"metric_before", "metric_after", "metric_change", "predicted_change", "seconds"}
_NO_COLUMNS |= {"num_empty", "num_truncated"}


def table_columns(logs: dict[str, float]) -> dict[str, str]:
    """Names in the logs, and what a [`LiveTable`] calls them: Φ, the metric's proxies and the further rewards."""
    columns = {"dpg/metric_before": "Φ before", "dpg/metric_after": "Φ after"}
    for name in logs:
        group, _, rest = name.partition("/")
        if group == "dpg" and "/" not in rest and rest not in _NO_COLUMNS:
            columns[name] = rest.replace("_", " ")
        elif group == "rewards" and rest.endswith("/mean") and rest != "dpg/mean":
            columns[name] = rest.removesuffix("/mean").replace("_", " ")
    return columns
