"""The figures of a report."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..callbacks import QUANTILES, pictures
from .runs import Run, spread


MAX_PICTURES = 8  # steps whose pictures are shown
MAX_HISTOGRAMS = 6  # steps whose histograms are shown
MAX_RUNS_SHOWN = 4  # runs whose pictures are shown; curves show all runs
TRAIN, EVAL = "tab:blue", "tab:orange"
NO_CURVES = ("train_", "total_flos", "epoch")  # logged once at the end, or the same as the step


def plot_mean_and_range(axis: Axes, series: list[dict[int, float]], label: str, color, marker: str = "") -> None:
    """Draw the mean of several runs, and a band from the lowest to the highest, at the steps that all of them have."""
    steps = sorted(set.intersection(*(set(run) for run in series)))
    if not steps:
        return
    values = np.array([[run[step] for step in steps] for run in series])  # [runs, steps]
    axis.plot(steps, values.mean(0), color=color, label=label, marker=marker or ("." if len(steps) == 1 else ""))
    if len(series) > 1:
        axis.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)


def panels_of(runs: list[Run]) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]]]:
    """
    The panels by title, with the names and labels of the scalars in each panel.

    Returns:
        `tuple[dict[str, dict[str, str]], dict[str, dict[str, str]]]`: The panels of DPG, and those of everything else.
    """
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
    """A figure of panels, and its unused axes. There is at least one."""
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
    """The panels of DPG, and the quantiles of the scores."""
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
    """The panels of everything else, smaller."""
    figure, unused = draw_panels(runs, panels, 4, (2.7, 1.9))
    for empty in unused:
        empty.set_axis_off()
    return figure


def draw_pictures(runs: list[Run], name: str) -> Figure:
    """The metric's picture at some steps, and in a fresh student at the end. Each run has a row."""
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
    """Histograms of the scores at some steps."""
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
    """All figures of a report by their names, each with its caption."""
    main, rest = panels_of(runs)
    band = "Lines are means of the runs. Bands reach from the lowest to the highest run. " if len(runs) > 1 else ""
    figures = {
        "curves": (
            f"{band}The horizontal axis has the generator's steps. The last panel has the scores' quantiles.",
            draw_curves(runs, main),
        )
    }
    for name in sorted(pictures(runs[0].scored[-1]["readout"])):
        figures[name] = (
            "The picture in the fine-tuned student's weights. Black is positive, white is negative.",
            draw_pictures(runs, name),
        )
    figures["score_histograms"] = ("Raw scores of the samples of one reward step.", draw_histograms(runs))
    if rest:
        figures["more_curves"] = ("All other figures that were logged.", draw_more_curves(runs, rest))
    return figures
