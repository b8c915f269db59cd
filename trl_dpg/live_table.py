"""A table of a run's figures in the terminal, which grows during training."""

import atexit
import math
import time
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from .metrics.base import Metric
from .metrics.draw import drawn


if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table

    from .reward import DPGReward


PHASES = ("generation", "reward", "update")
"""The parts of a training step whose seconds are logged, under `dpg/seconds/`. They sum to the whole step."""


class LiveTable(TrainerCallback):
    """
    Shows a run's figures in a table in the terminal, which grows during training. Needs rich.

    Below the table are the seconds of a step, the time left, and two completions: how they were at first, and how they
    are now. If the console is not a terminal, a line of text is printed for each log, and completions for some. Each
    evaluation is a line of text. A resumed run shows the figures from its beginning.

    Args:
        title (`str`):
            Title of the table.
        columns (`dict[str, str]`, *optional*):
            The names of the figures in the logs, and the titles of their columns. By default the table shows Φ, the
            metric's proxies and the other rewards that are in the first logs.
        share (`str`, *optional*):
            The name of a figure in `columns` with values between 0 and 1. It is also drawn as a line of that length.
            By default the first column whose name tells that it is a share.
        every (`int`, *optional*):
            Logs between two rows. The last log always has a row. By default there are about 20 rows, and a line of
            text for each log.
        console ([`~rich.console.Console`], *optional*):
            The console to draw on.
        reward ([`DPGReward`], *optional*):
            The trainer's reward, whose completions are shown. Without it, none are shown.

    Attributes:
        history (`dict[str, list[float]]`): The values of each column so far, by the name in the logs.
    """

    def __init__(
        self,
        title: str,
        columns: dict[str, str] | None = None,
        share: str | None = None,
        every: int | None = None,
        console: "Console | None" = None,
        reward: "DPGReward | None" = None,
    ):
        from rich.console import Console
        from rich.live import Live

        self.title, self.columns, self.share, self.reward = title, columns, share, reward
        self.lines_every, self.every = every or 1, every or 0
        self.console = console or Console()
        self.history: dict[str, list[float]] = {}
        self.steps: list[int] = []
        self.texts: list[tuple[int, list[str]]] = []  # a step and completions: the first ones and the newest
        self.live = Live(console=self.console, refresh_per_second=4)

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_step, self.started = state.global_step, time.perf_counter()
        self.last_step = state.global_step  # the last step in the logs
        self.history, self.steps, self.texts, self.logs = {}, [], [], {}
        self.every = self.every or max(1, math.ceil(state.max_steps / max(state.logging_steps, 1) / 20))
        for logs in state.log_history:  # of a resumed run
            if "dpg/metric_after" in logs:
                self._record(logs["step"], logs)
        if not state.is_world_process_zero:
            return
        if self.reward is not None:
            self._print(f"{self.title}: {work_of_a_step(args, self.reward)}")
        if self.console.is_terminal:
            atexit.register(self.live.stop)  # shows the cursor again, also after an error
            self.live.start()
            self.live.update("The first step ...")

    def on_log(self, args, state, control, logs, **kwargs):
        if not state.is_world_process_zero:
            return
        if any(name.startswith("eval_") for name in logs):
            self._print_evaluation(state, logs)
            return
        steps_before, steps = self.last_step - self.first_step, state.global_step - self.first_step
        self.last_step = state.global_step
        if "dpg/metric_after" not in logs:
            return
        is_first = not self.logs
        self.seconds = phases(logs, args, steps_before, steps)
        self._record(state.global_step, logs)
        self.logs = logs
        batch = None if self.reward is None else self.reward.last_batch
        if batch is not None:
            second = next((row for row, prompt in enumerate(batch.prompts) if prompt != batch.prompts[0]), -1)
            texts = [" ".join(batch.completions[row].split()) for row in (0, second)]
            self.texts = [*self.texts[:1], (state.global_step, texts)]
        if is_first:
            self.first_log = state.global_step, time.perf_counter()
            self.expected = sum(expected_phases(logs, steps, args).values())
            self._print(f"{self.title}: {estimate(logs, steps, state, args)}")
        if self.console.is_terminal:
            self.live.update(self.render(state))
            return
        self._print_lines(state)

    def _print_lines(self, state) -> None:
        row, is_last = len(self.steps) - 1, state.global_step == state.max_steps
        columns: dict[str, str] = self.columns  # type: ignore[assignment]
        if row % self.lines_every == 0 or is_last:
            figures = "  ".join(f"{title} {self.history[name][-1]:8.4f}" for name, title in columns.items())
            self._print(f"{self.title}: step {state.global_step:3}/{state.max_steps}  {figures}  {self.times(state)}")
        if self.texts and (row % max(self.every, 5) == 0 or is_last):
            for text in self.texts[-1][1]:
                self._print(f"    {text[:150]}")

    def _print_evaluation(self, state, logs: dict[str, float]) -> None:
        figures = {name.removeprefix("eval_"): value for name, value in logs.items()}
        columns = {"loss": "loss", "reward": "reward", **(self.columns or table_columns(figures))}
        text = "  ".join(f"{title} {figures[name]:.4f}" for name, title in columns.items() if name in figures)
        self._print(f"{self.title}: step {state.global_step:3}/{state.max_steps}  evaluation: {text}")

    def on_train_end(self, args, state, control, **kwargs):
        if self.live.is_started:
            if self.steps:
                self.live.update(self.render(state, all_rows=True), refresh=True)
            self.live.stop()

    def times(self, state) -> str:
        """The seconds of the newest steps, and the time that is left. Empty if nothing was logged in this run."""
        if not self.logs:
            return ""
        now = time.perf_counter()
        mean = (now - self.started) / (state.global_step - self.first_step)
        text = described(self.seconds) or f"{short(mean)} s a step"
        since, moment = self.first_log
        if state.global_step > since:  # the first steps have costs that do not come again
            mean = (now - moment) / (state.global_step - since)
        else:
            mean = self.expected or mean
        left = max(state.max_steps - state.global_step, 0)  # a run resumed at its end may take one step more
        return f"{text}, {duration(left * mean)} left" if left else text

    def render(self, state, all_rows: bool = False) -> "Group":
        """The table, and two completions below it."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        samples = Table.grid(padding=(0, 2, 0, 0))
        samples.add_column(no_wrap=True, justify="right")
        samples.add_column(no_wrap=True, overflow="ellipsis")
        for place in range(2 if self.texts else 0):
            for step, texts in self.texts:
                samples.add_row(f"step {step}", Text(texts[place], style="dim" if step != self.texts[-1][0] else ""))
        seconds = time.perf_counter() - self.started
        caption = f"{state.global_step}/{state.max_steps} steps in {duration(seconds)}"
        if times := self.times(state):
            caption += f"; {times}"
        return Group(self.table(state, all_rows), Text(caption, style="dim"), "", samples)

    def table(self, state, all_rows: bool = False) -> "Table":
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        table = Table(title=self.title, title_justify="left")
        columns: dict[str, str] = self.columns  # type: ignore[assignment]
        for title in ("step", *columns.values()):
            table.add_column(title, justify="right")
        if self.share is not None:
            table.add_column("", min_width=10)
        last = len(self.steps) - 1
        room = len(self.steps) if all_rows else max(self.console.height - 15, 4)  # the rest of the screen's height
        every = self.every * math.ceil(math.ceil(len(self.steps) / self.every) / room)
        for row in sorted({*range(0, last, every), last}):
            cells: list[Any] = [f"{self.steps[row]}", *(f"{self.history[name][row]:.4g}" for name in columns)]
            if self.share is not None:
                cells.append(ProgressBar(total=1.0, completed=max(self.history[self.share][row], 0.0), width=24))
            table.add_row(*cells)
        return table

    def _record(self, step: int, logs: dict[str, float]) -> None:
        if self.columns is None:
            self.columns = table_columns(logs)
            named = [name for name in self.columns if any(word in name for word in _SHARES)]
            self.share = self.share or next(iter(named), None)
        self.steps.append(step)
        for name in self.columns:
            value = logs.get(name)
            self.history.setdefault(name, []).append(math.nan if value is None else value)

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=not self.console.is_terminal)


def work_of_a_step(args, reward: "DPGReward") -> str:
    """The size of a generation batch and of the metric, and what to look at: a large metric, a base in 4 bits."""
    config, samples = reward.inner_loop_config, args.generation_batch_size
    if reward.client is not None:
        return f"{samples} completions, scored by {reward.client.url}."
    completion = args.max_completion_length or config.max_length
    length = min(completion, config.max_length) if reward.train_on == "completion" else config.max_length
    steps = config.num_epochs * math.ceil(samples / reward.batch_size)
    work = f"{samples} completions of up to {completion} tokens, {steps} student step{'s' * (steps > 1)}"
    with drawn(reward.metric, reward.metric_state.num_samples, [args.seed]):
        num_tokens = reward.metric.num_tokens(reward.student) if isinstance(reward.metric, Metric) else 0
    if num_tokens:
        work += f", a metric of {num_tokens:,} tokens"
    if num_tokens >= _LARGE * samples * length:
        work += (
            f". The metric has more tokens than all completions ({samples * length:,} at most), so it may cost as "
            "much as the rest of the reward. Fewer or shorter texts make it faster, e.g. its argument `max_length`"
        )
    elif num_tokens > samples * length:
        work += f" (all completions: {samples * length:,} at most)"
    if reward.student.has_4bit_base:
        work += ". The student's base has 4 bits: `trl-dpg verify` says what they do to the metric"
    return work + "."


def generation_batches(args, steps: int) -> int:
    """The generation batches that a number of steps begins. Each is scored by one call of the reward."""
    return -(-steps * args.gradient_accumulation_steps // (args.steps_per_generation * args.num_iterations))


def phases(logs: dict[str, float], args, steps_before: int, steps: int) -> dict[str, float]:
    """
    Mean seconds of generation, reward and update in a step, from logs; none if they were not measured.

    A generation batch may serve several steps, see `num_iterations`. If the logs are of the first of them only, their
    generation and reward are divided among all of them.

    Args:
        logs (`dict[str, float]`): The logs of all steps since the last logs.
        args ([`~trl.GRPOConfig`]): The trainer's arguments.
        steps_before (`int`), steps (`int`): Steps of this run until the last logs, and until these logs.
    """
    seconds = {name: logs[f"dpg/seconds/{name}"] for name in PHASES if f"dpg/seconds/{name}" in logs}
    calls = generation_batches(args, steps) - generation_batches(args, steps_before) if seconds else 0
    if calls:
        typical = (steps - steps_before) * _calls_in_a_step(args)
        seconds["generation"] *= typical / calls
        seconds["reward"] *= typical / calls
    return seconds


def _calls_in_a_step(args) -> float:
    return args.gradient_accumulation_steps / (args.steps_per_generation * args.num_iterations)


def described(seconds: dict[str, float]) -> str:
    """Seconds of a step's phases as text."""
    parts = ", ".join(f"{name} {short(value)}" for name, value in seconds.items())
    return f"{short(sum(seconds.values()))} s a step ({parts})" if seconds else ""


def expected_phases(logs: dict[str, float], steps: int, args) -> dict[str, float]:
    """
    Expected seconds of a later step's phases, from the logs of the first steps; none if they were not measured.

    The first call of a reward has costs that do not come again: the metric of the student before its fine-tuning, and
    everything that is none of the reward's phases, such as a verification.
    """
    seconds, metric = phases(logs, args, 0, steps), logs.get("dpg/seconds/metric", 0.0)
    if seconds:
        known = sum(logs.get(f"dpg/seconds/{name}", 0.0) for name in ("fine_tuning", "metric", "attribution"))
        once = max(logs.get("dpg/seconds", 0.0) - known, 0.0) + metric / (generation_batches(args, steps) + 1)
        seconds["reward"] -= once * _calls_in_a_step(args)  # the reward's own parts are means over its calls
    return seconds


def estimate(logs: dict[str, float], steps: int, state, args) -> str:
    """What the first steps took, the metric's part of it, and how long the run takes."""
    seconds = expected_phases(logs, steps, args)
    if not seconds:
        return "the seconds of the phases were not measured."
    calls = generation_batches(args, steps)
    metric = logs.get("dpg/seconds/metric", 0.0) * calls / (calls + 1) * _calls_in_a_step(args)
    expected, left = sum(seconds.values()), max(state.max_steps - state.global_step, 0)
    return (
        f"about {short(expected)} s a step: generation {short(seconds['generation'])}, reward "
        f"{short(seconds['reward'])} (its metric {metric / max(seconds['reward'], 1e-9):.0%}), update "
        f"{short(seconds['update'])}. The rest, {left} step{'s' * (left != 1)}, takes about "
        f"{duration(left * expected)}."
    )


def short(seconds: float) -> str:
    """Seconds with two digits."""
    return f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2g}"


def duration(seconds: float) -> str:
    """A duration in seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


# A metric with this many times the tokens of all completions is called large
_LARGE = 1.5
# Parts of the names of figures between 0 and 1
_SHARES = ("share", "accuracy", "target_language")
# Logged under `dpg/` for every metric, but not shown in a column
_NO_COLUMNS = {"metric_before", "metric_after", "metric_change", "predicted_change", "seconds"}
_NO_COLUMNS |= {"num_empty", "num_truncated"}


def table_columns(logs: dict[str, float]) -> dict[str, str]:
    """The default columns of a [`LiveTable`] by name in the logs: Φ, the metric's proxies and the other rewards."""
    columns = {"dpg/metric_before": "Φ before", "dpg/metric_after": "Φ after"}
    for name in logs:
        group, _, rest = name.partition("/")
        if group == "dpg" and "/" not in rest and rest not in _NO_COLUMNS:
            columns[name] = rest.replace("_", " ")
        elif group == "rewards" and rest.endswith("/mean") and rest != "dpg/mean":
            columns[name] = rest.removesuffix("/mean").replace("_", " ")
    return columns
