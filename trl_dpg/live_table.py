"""A table of a run's figures in the terminal, which grows during training."""

import math
import time
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback


if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


class LiveTable(TrainerCallback):
    """
    Shows a run's figures in a table in the terminal, which grows during training. Needs rich.

    If the console is not a terminal, lines of text are printed instead.

    Args:
        title (`str`):
            Title of the table.
        columns (`dict[str, str]`, *optional*):
            The names of the figures in the logs, and the titles of their columns. By default the table shows Φ, the
            metric's proxies and the other rewards that are in the first logs.
        share (`str`, *optional*):
            The name of a figure in `columns` with values between 0 and 1. It is also drawn as a bar.
        every (`int`, *optional*):
            Logs between two rows. The last log always has a row. By default there are about 20 rows.
        console ([`~rich.console.Console`], *optional*):
            The console to draw on.

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
