"""
An HTML report of a run, or of several that differ in their seeds.

    trl-dpg report --run_dir trl-dpg-output
    trl-dpg report --run_dir runs/seed_0 runs/seed_1 runs/seed_2 --output_dir runs/report

One file that needs nothing else: curves, the decoded picture over time, score histograms, the best and worst samples,
settings and environment. The pictures lie beside it as PNGs. It is made of `dpg_log.jsonl` (see docs/logging.md), and
of `dpg_config.json`, `summary.json` and `trainer_state.json` where a run has them. A run may still be going on.
"""

import base64
import io
import json
import sys
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from trl import TrlParser

from ..callbacks import CONFIG_NAME, LOG_NAME, QUANTILES, pictures
from .utils import UsageError


MAX_PICTURES = 8  # steps whose pictures are shown
MAX_HISTOGRAMS = 6  # steps
MAX_SAMPLE_STEPS = 3
MAX_RUNS_SHOWN = 4  # whose pictures are shown; curves have all
MAX_CHARACTERS = 2000  # of a text
TRAIN, EVAL = "tab:blue", "tab:orange"
NO_CURVES = ("train_", "total_flos", "epoch")  # logged once, at the end, or the step itself
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
h2 { margin-top: 2em; border-bottom: 1px solid #d0d7de; }
img { max-width: 100%; }
table { border-collapse: collapse; margin: .6em 0; }
th, td { text-align: left; vertical-align: top; padding: .15em .9em .15em 0; border-bottom: 1px solid #eaeef2; }
td.text, pre { font: 13px/1.6 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.note { color: #59636e; }
"""


@dataclass
class ReportArguments:
    """
    Arguments of `trl-dpg report`.

    Args:
        run_dir (`list[str]`):
            Output folders of `DPGTrainer` or `trl-dpg dpg`. Several are one experiment with several seeds: curves are
            means, bands reach from the lowest to the highest run.
        output_dir (`str`, *optional*):
            Where `report.html` and the PNGs are written; `report` in the first run's folder when `None`.
        title (`str`, *optional*):
            The report's title; the runs' folders when `None`.
    """

    run_dir: list[str] | None = field(
        default=None, metadata={"help": "Output folders of runs; several are seeds of one experiment."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Where the report is written; <first run_dir>/report by default."}
    )
    title: str | None = field(default=None, metadata={"help": "The report's title."})

    def __post_init__(self):
        if not self.run_dir:
            raise UsageError("--run_dir is required: the output folder of a run (or of several, one for each seed).")


@dataclass
class Run:
    """
    What a run left in its folder.

    Attributes:
        name (`str`): The folder's name.
        lines (`list[dict]`): Of `dpg_log.jsonl`.
        scored (`list[dict]`): Those of training with scores.
        config (`dict`): `dpg_config.json`; empty without one, as are the next two.
        summary (`dict`): `summary.json`.
        state (`dict`): `trainer_state.json`, of the folder or its last checkpoint.
    """

    name: str
    lines: list[dict[str, Any]]
    scored: list[dict[str, Any]]
    config: dict[str, Any]
    summary: dict[str, Any]
    state: dict[str, Any]

    def series(self, name: str, mode: str) -> dict[int, float]:
        """Values by step."""
        key = f"eval_{name}" if mode == "eval" else name
        return {line["step"]: line["scalars"][key] for line in self.lines if key in line["scalars"]}


def read_run(folder: Path) -> Run:
    if not folder.is_dir():
        raise UsageError(f"--run_dir: there is no folder {str(folder)!r}.")
    log = folder / LOG_NAME
    if not log.exists():
        near = sorted(str(path.parent) for path in folder.glob(f"*/{LOG_NAME}"))
        hint = f"Did you mean {', '.join(near)}?" if near else "Give the output_dir of a DPGTrainer or `trl-dpg dpg`."
        raise UsageError(f"--run_dir: {str(folder)!r} has no {LOG_NAME}. {hint}")
    lines = []
    for number, line in enumerate(log.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UsageError(f"--run_dir: line {number} of {str(log)!r} is not JSON ({error}). Remove it.") from error
    scored = [line for line in lines if line["mode"] == "train" and "histogram" in line]
    if not scored:
        raise UsageError(f"--run_dir: no step has been logged in {str(log)!r} yet. Wait, or lower --logging_steps.")
    checkpoints = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    states = [path for path in (folder / "trainer_state.json", *reversed(checkpoints)) if path.exists()]

    def read(path: Path) -> dict[str, Any]:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    return Run(
        name=folder.resolve().name,
        lines=lines,
        scored=scored,
        config=read(folder / CONFIG_NAME),
        summary=read(folder / "summary.json"),
        state=read(states[0]) if states else {},
    )


def spread(items: list, number: int) -> list:
    """At most `number` of the items, the first and the last among them, evenly spaced."""
    chosen = np.linspace(0, len(items) - 1, min(number, len(items))).round().astype(int)
    return [items[index] for index in chosen]


# -- figures ---------------------------------------------------------------------------------------------------------


def plot_mean_and_range(axis: Axes, series: list[dict[int, float]], label: str, color, marker: str = "") -> None:
    """The mean of several runs' series at the steps that all of them have, and a band between lowest and highest."""
    steps = sorted(set.intersection(*(set(run) for run in series)))
    if not steps:
        return
    values = np.array([[run[step] for step in steps] for run in series])  # [runs, steps]
    axis.plot(steps, values.mean(0), color=color, label=label, marker=marker or ("." if len(steps) == 1 else ""))
    if len(series) > 1:
        axis.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)


def panels_of(runs: list[Run]) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]]]:
    """Titles of the panels, with the names (and labels) of what is drawn in each: those of DPG, and TRL's."""
    names = list(dict.fromkeys(name for line in runs[0].lines for name in line["scalars"] if name[:5] != "eval_"))
    main = {
        "Φ, the target metric": {"dpg/metric_before": "at the start", "dpg/metric_after": "fine-tuned"},
        "the student's training loss": {"dpg/student_loss/first": "first step", "dpg/student_loss/last": "last step"},
    }
    drawn = {*main["Φ, the target metric"], *main["the student's training loss"]}
    drawn |= {"dpg/metric_change", "rewards/dpg/mean", "rewards/dpg/std"}
    drawn |= {f"dpg/score/{name}" for name in ("mean", "std", "min", "max")}
    rest = {}
    for name in names:
        group, _, last = name.partition("/")
        own = group == "dpg" and last not in ("seconds", "num_empty", "num_truncated", "predicted_change")
        if name in drawn or name.startswith(NO_CURVES):
            continue
        if own or (group == "rewards" and last.endswith("/mean")):
            main[last.removesuffix("/mean").replace("_", " ")] = {name: ""}
        else:
            rest[name] = {name: ""}
    return main, rest


def draw_panels(runs: list[Run], panels: dict[str, dict[str, str]], columns: int, size: tuple[float, float]):
    """A figure of panels, and the axes that are left over in it (one more than the panels need)."""
    rows = len(panels) // columns + 1
    figure = Figure(figsize=(columns * size[0], rows * size[1]), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (title, names) in zip(axes, panels.items(), strict=False):
        for index, (name, label) in enumerate(names.items()):
            faint = len(names) > 1 and index == 0
            train, evaluated = ([run.series(name, mode) for run in runs] for mode in ("train", "eval"))
            plot_mean_and_range(axis, train, f"train {label}", "0.6" if faint else TRAIN)
            plot_mean_and_range(axis, evaluated, f"eval {label}", "burlywood" if faint else EVAL, marker="o")
        axis.set_title(title, fontsize="medium", parse_math=False)
        axis.grid(alpha=0.3)
        if len(axis.lines) > 1:
            axis.legend(fontsize="x-small")
    return figure, axes[len(panels) :]


def draw_curves(runs: list[Run], panels: dict[str, dict[str, str]]) -> Figure:
    figure, (axis, *unused) = draw_panels(runs, panels, 3, (3.6, 2.6))
    steps = sorted(set.intersection(*({line["step"] for line in run.scored} for run in runs)))
    quantiles = np.mean(
        [[line["quantiles"] for line in run.scored if line["step"] in steps] for run in runs], axis=0
    )  # [steps, quantiles]
    for low, alpha in ((1, 0.15), (2, 0.3)):
        high = len(QUANTILES) - 1 - low
        label = f"{QUANTILES[low]:.0%} to {QUANTILES[high]:.0%}"
        axis.fill_between(steps, quantiles[:, low], quantiles[:, high], color=TRAIN, alpha=alpha, lw=0, label=label)
    axis.plot(steps, quantiles[:, 3], color=TRAIN, label="median")
    axis.axhline(0, color="0.5", linewidth=0.8)
    axis.set_title("raw scores τ", fontsize="medium")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="x-small")
    for empty in unused:
        empty.set_axis_off()
    return figure


def draw_more_curves(runs: list[Run], panels: dict[str, dict[str, str]]) -> Figure:
    figure, unused = draw_panels(runs, panels, 4, (2.7, 1.9))
    for empty in unused:
        empty.set_axis_off()
    return figure


def draw_pictures(runs: list[Run], name: str) -> Figure:
    """A row for each run: a metric's picture over time, and the one in a fresh student at the end."""
    shown = [(run, spread(run.scored, MAX_PICTURES)) for run in runs[:MAX_RUNS_SHOWN]]
    columns = max(len(lines) for _, lines in shown) + any(name in run.summary.get("trained", {}) for run, _ in shown)
    figure = Figure(figsize=(1.45 * columns, 1.75 * len(shown)))
    figure.set_layout_engine("constrained", wspace=0.1)
    for axes, (run, lines) in zip(figure.subplots(len(shown), columns, squeeze=False), shown, strict=True):
        found = [(f"step {line['step']}", line["readout"]) for line in lines]
        if name in run.summary.get("trained", {}):
            found.append(("fresh student", run.summary["trained"]))
        for axis in axes[len(found) :]:
            axis.set_axis_off()
        for axis, (title, readout) in zip(axes, found, strict=False):
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_color("0.75")
            axis.imshow(np.array(readout[name]), cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
            if readout.get("scanned_text") is not None:
                title += f"\n“{readout['scanned_text'][:18]}”"
            axis.set_title(title, fontsize="small", parse_math=False)
    return figure


def draw_histograms(runs: list[Run]) -> Figure:
    steps = sorted(set.intersection(*({line["step"] for line in run.scored} for run in runs)))
    steps = spread(steps, MAX_HISTOGRAMS)
    columns = min(3, len(steps))
    rows = -(-len(steps) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis in axes:
        axis.set_axis_off()
    for axis, step in zip(figure.axes, steps, strict=False):
        axis.set_axis_on()
        for run in runs:
            histogram = next(line for line in run.scored if line["step"] == step)["histogram"]
            axis.stairs(histogram["counts"], histogram["edges"], fill=True, color=TRAIN, alpha=0.6 / len(runs) ** 0.5)
        axis.axvline(0, color="0.5", linewidth=0.8)
        axis.set_title(f"step {step}", fontsize="medium")
        axis.ticklabel_format(axis="x", scilimits=(-2, 3))
    figure.supxlabel("raw score τ", fontsize="small")
    figure.supylabel("samples", fontsize="small")
    return figure


def draw(runs: list[Run]) -> dict[str, tuple[str, Figure]]:
    """All figures: by the names of their files, with what they show."""
    main, rest = panels_of(runs)
    band = "The mean of the runs, and the range from the lowest to the highest. " if len(runs) > 1 else ""
    figures = {
        "curves": (
            f"{band}Against the generator's steps; the last panel has the scores' quantiles.",
            draw_curves(runs, main),
        )
    }
    names = [set(pictures(run.scored[-1]["readout"])) for run in runs]
    if any(found != names[0] for found in names):
        raise UsageError("--run_dir: these are runs of different metrics. Make a report of each.")
    for name in sorted(names[0]):
        figures[name] = (
            "What stands in the fine-tuned student's weights: ink is +, paper is −.",
            draw_pictures(runs, name),
        )
    figures["score_histograms"] = ("Raw scores of the samples of one reward step.", draw_histograms(runs))
    if rest:
        figures["more_curves"] = ("Everything else that was logged.", draw_more_curves(runs, rest))
    return figures


# -- text ------------------------------------------------------------------------------------------------------------


def shorten(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + " …"


def show(value: Any) -> str:
    """A value of a table, escaped."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return escape(shorten(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))


def across(values: list[Any]) -> str:
    """One value for all runs, or each one's; of numbers the mean and the range."""
    if all(value == values[0] for value in values):
        return show(values[0])
    if all(isinstance(value, float) for value in values):
        return f"{show(sum(values) / len(values))} ({show(min(values))} to {show(max(values))})"
    return " / ".join(show(value) for value in values)


def table(rows: list[list[str]], header: list[str] | None = None, css_class: str = "number") -> str:
    """A table of cells that are HTML."""
    lines = ["<table>"]
    if header is not None:
        lines.append("<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in header) + "</tr>")
    for first, *cells in rows:
        lines.append(f"<tr><td>{first}</td>" + "".join(f'<td class="{css_class}">{c}</td>' for c in cells) + "</tr>")
    return "\n".join([*lines, "</table>"])


def heat_map(sample: dict[str, Any], scale: float) -> str:
    """A completion as HTML; with scores of its tokens, each token on its colour, the strongest at `scale`."""
    if "tokens" not in sample:
        return escape(shorten(sample["completion"]))
    spans, characters = [], 0
    for token, score in zip(sample["tokens"], sample["token_scores"], strict=True):
        rgb = "31,119,180" if score > 0 else "255,127,14"
        style = f"background:rgba({rgb},{0.75 * min(abs(score) / scale, 1):.2f})"
        spans.append(f'<span style="{style}" title="{score:.3g}">{escape(token)}</span>')
        characters += len(token)
        if characters > MAX_CHARACTERS:
            spans.append(" …")
            break
    return "".join(spans)


def samples_section(run: Run) -> str:
    parts = []
    for line in spread([line for line in run.scored if line["samples"]], MAX_SAMPLE_STEPS):
        token_scores = [abs(score) for sample in line["samples"] for score in sample.get("token_scores", [])]
        scale = max(token_scores, default=0.0) or 1.0
        rows = [
            [escape(sample["kind"]), show(sample["score"]), escape(shorten(sample["prompt"])), heat_map(sample, scale)]
            for sample in line["samples"]
        ]
        parts.append(f"<h3>Step {line['step']}</h3>" + table(rows, ["", "score", "prompt", "completion"], "text"))
    if not parts:
        return ""
    note = f"Raw scores τ of run {escape(run.name)}: how much Φ would rise, had the student weighed the sample more."
    if any("tokens" in sample for line in run.scored for sample in line["samples"]):
        note += " Tokens on blue raise the metric, tokens on orange lower it; hold the pointer on one for its score."
    return f'<h2>Best and worst samples</h2>\n<p class="note">{note}</p>\n' + "\n".join(parts)


def summary_section(runs: list[Run]) -> str:
    """The figures of fresh students (of `trl-dpg dpg`), and what the generators wrote."""
    with_figures = [run.summary for run in runs if "trained" in run.summary and "untrained" in run.summary]
    if not with_figures:
        return ""
    names = [name for name, value in with_figures[0]["trained"].items() if isinstance(value, float | str)]
    rows = [
        [
            escape(name),
            *(across([summary[texts].get(name) for summary in with_figures]) for texts in ("untrained", "trained")),
        ]
        for name in names
    ]
    first = with_figures[0]
    written = [
        [str(k + 1), *(escape(shorten(text)) for text in pair)]
        for k, pair in enumerate(zip(first["untrained"]["samples"], first["trained"]["samples"], strict=False))
    ]
    header = ["", "the untrained generator", "the trained generator"]
    return (
        '<h2>Fresh students</h2>\n<p class="note">Fine-tuned by stock SFTTrainer on newly sampled texts.</p>\n'
        + table(rows, header)
        + "<h3>What the generators write</h3>"
        + table(written, header, "text")
    )


def overview(runs: list[Run]) -> str:
    rows = []
    for run in runs:
        after = list(run.series("dpg/metric_after", "train").values())
        steps = str(max(line["step"] for line in run.lines))
        if run.state:
            steps += f" of {run.state['max_steps']}"
        seed = run.config["settings"]["seed"] if run.config else "?"
        seconds = next(
            (line["scalars"]["train_runtime"] for line in run.lines if "train_runtime" in line["scalars"]), None
        )
        rows.append([escape(run.name), str(seed), steps, show(after[0]), show(after[-1])])
        rows[-1].append("still running" if seconds is None else f"{seconds:.0f} s")
    return table(rows, ["run", "seed", "steps", "Φ at first", "Φ at last", "time"])


def settings_section(runs: list[Run]) -> str:
    configs = [run.config for run in runs if run.config]
    if not configs:
        return f'<h2>Settings</h2><p class="note">The run has no {CONFIG_NAME}.</p>'
    changed = list(dict.fromkeys(name for config in configs for name in config["changed"]))

    def rows(part: str, names: list[str] | None = None):
        names = list(configs[0][part]) if names is None else names
        return [[escape(name), across([config[part].get(name) for config in configs])] for name in names]

    head = [[name, across([config[name] for config in configs])] for name in ("metric", "student")]
    return "\n".join(
        [
            "<h2>Settings</h2>" + table(head, css_class="text"),
            "<h3>Not at their defaults</h3>" + table(rows("settings", changed), css_class="text"),
            "<h3>Inner loop</h3>" + table(rows("inner_loop"), css_class="text"),
            "<details><summary>All settings</summary>" + table(rows("settings"), css_class="text") + "</details>",
            "<h2>Environment</h2>" + table(rows("environment"), css_class="text"),
        ]
    )


def render(runs: list[Run], title: str, images: dict[str, tuple[str, bytes]]) -> str:
    """
    The page. It may load nothing: its policy forbids it, and its images are data.

    Args:
        runs (`list[Run]`): One, or one for each seed.
        title (`str`): Of the page.
        images (`dict[str, tuple[str, bytes]]`): What each shows, and its PNG, by name.
    """
    parts = {name: image_html(name, caption, png) for name, (caption, png) in images.items()}
    more = parts.pop("more_curves", "")
    curves, histograms = parts.pop("curves"), parts.pop("score_histograms")
    body = [f"<h1>{escape(title)}</h1>", overview(runs), "<h2>Curves</h2>", curves]
    if parts:
        body += ["<h2>The picture over time</h2>", *parts.values()]
    body += [summary_section(runs), "<h2>Score histograms</h2>", histograms, samples_section(runs[0])]
    body += [f"<details><summary>More curves</summary>{more}</details>" if more else "", settings_section(runs)]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = f'<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
    head += f"<title>{escape(title)}</title>\n<style>{STYLE}</style>"
    page = "\n".join(part for part in body if part)
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{page}\n</body>\n</html>\n'


def image_html(name: str, caption: str, png: bytes) -> str:
    data = base64.b64encode(png).decode()
    image = f'<img alt="{escape(name.replace("_", " "))}" src="data:image/png;base64,{data}">'
    return f'<p class="note">{escape(caption)}</p>\n{image}'


def main(script_args: ReportArguments) -> Path:
    folders = [Path(folder) for folder in script_args.run_dir]  # type: ignore[union-attr]
    runs = [read_run(folder) for folder in folders]
    output_dir = folders[0] / "report" if script_args.output_dir is None else Path(script_args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    images = {}
    for name, (caption, figure) in draw(runs).items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
        images[name] = (caption, buffer.getvalue())
        (output_dir / f"{name.replace('/', '_')}.png").write_bytes(images[name][1])
    path = output_dir / "report.html"
    path.write_text(render(runs, script_args.title or ", ".join(run.name for run in runs), images), encoding="utf-8")
    print(f"Report of {len(runs)} run{'s' * (len(runs) > 1)}: {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return path


def make_parser(prog: str | None = None) -> TrlParser:
    return TrlParser(ReportArguments, prog=prog)


if __name__ == "__main__":
    from trl_dpg import cli

    cli.run("report", sys.argv[1:])
