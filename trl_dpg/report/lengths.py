"""The page of `trl-dpg lengths`: histograms, quantiles and the share of correct samples by length."""

from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..length_target import LengthTarget, LengthTargets
from .page import document, image_html, show, table, write_figures


COLUMNS = 3
SHOWN = ("0.05", "0.25", "0.5", "0.75", "0.95")
"""Levels in the table."""
RIGHT, WRONG, REFERENCE, TARGET = "tab:blue", "tab:orange", "0.35", "tab:red"


def write_lengths_report(
    figures: dict[str, Any],
    targets: dict[str, LengthTargets],
    output_dir: Path,
    title: str,
    about: dict[str, Any],
) -> Path:
    """
    Write `lengths.html` and, beside it, its figures as PNGs.

    Args:
        figures (`dict`): Those of [`~trl_dpg.practice.lengths.summarize`].
        targets (`dict[str, LengthTargets]`): The fitted targets by form; the log-normal ones are drawn.
        output_dir (`Path`): The folder.
        title (`str`): Title of the page.
        about (`dict[str, Any]`): What was read, for the table of settings.
    """
    shown = {
        "histograms": (
            "Lengths by difficulty. The fit is to the correct samples, if these are known, and to all otherwise.",
            draw_histograms(figures, targets),
        ),
        "quantiles": ("Length at each level, by difficulty.", draw_quantiles(figures)),
    }
    if "share_correct_by_length" in figures["overall"]:
        caption = "Share of correct samples in bins of length with equally many samples, with 95 % intervals (Wilson)."
        shown["correct_by_length"] = (caption, draw_share_correct(figures))
    images = write_figures(shown, output_dir)
    body = [f"<h1>{escape(title)}</h1>", lengths_table(figures)]
    body += [image_html(name, caption, png) for name, (caption, png) in images.items()]
    if "reference" in figures:
        body += ["<h2>Against the reference</h2>", reference_table(figures["reference"])]
    body += ["<h2>Targets that were fitted</h2>", targets_table(figures["targets"])]
    body += ["<h2>Settings</h2>", table([[escape(name), show(value)] for name, value in about.items()], None, "text")]
    path = output_dir / "lengths.html"
    path.write_text(document(title, body), encoding="utf-8")
    return path


def groups(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The figures of all samples, and of each difficulty if there are several."""
    parts = figures["by_difficulty"]
    return {"all": figures["overall"]} | (parts if len(parts) > 1 else {})


def lengths_table(figures: dict[str, Any]) -> str:
    """Counts and quantiles by difficulty; right and wrong samples have rows of their own."""
    header = ["", "samples", *(f"{float(level):.0%}" for level in SHOWN), "mean", "truncated", "correct", "empty"]
    rows = []
    for name, part in groups(figures).items():
        rows.append([escape(name), *_cells(part)])
        rows[-1] += [percent(part["share_truncated"]), percent(part["share_correct"]), show(part["num_empty"])]
        for kind in ("correct", "wrong"):
            if kind in part:
                rows.append([f"&nbsp;&nbsp;{kind}", *_cells(part[kind]), "", "", ""])
    return table(rows, header)


def _cells(part: dict[str, Any]) -> list[str]:
    quantiles = [f"{part['quantiles'][level]:.0f}" if part["quantiles"] else "" for level in SHOWN]
    return [str(part["num_samples"]), *quantiles, number(part["mean"])]


def number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.0f}"


def percent(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.1%}"


def reference_table(reference: dict[str, Any]) -> str:
    """Distances to the reference, and its quantiles."""
    header = ["", "samples", *(f"{float(level):.0%}" for level in SHOWN), "mean", "Wasserstein-1 in log-length", "KS"]
    return table(
        [
            [escape(n), *_cells(part), f"{part['wasserstein']:.3f}", f"{part['ks']:.3f}"]
            for n, part in reference.items()
        ],
        header,
    )


def targets_table(targets: dict[str, dict[str, Any]]) -> str:
    """The log-normals, and the distances of all fits to the samples."""
    rows = []
    for form, parts in targets.items():
        for name, part in parts.items():
            text = f"median {part['median']:.0f}, sigma {part['sigma']:.2f}" if form == "lognormal" else ""
            rows.append([escape(name), form, text, f"{part['wasserstein']:.3f}", f"{part['ks']:.3f}"])
    return table(rows, ["", "form", "", "Wasserstein-1 in log-length", "KS"])


def panels(number: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure with `number` axes."""
    columns = 2 if number == 4 else min(number, COLUMNS)
    rows = -(-number // columns)
    figure = Figure(figsize=(columns * size[0], rows * size[1]), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[number:]:
        axis.set_axis_off()
    return figure, axes[:number]


def draw_histograms(figures: dict[str, Any], targets: dict[str, LengthTargets]) -> Figure:
    """Histograms by difficulty: right and wrong samples, the reference and the log-normal fit, as shares."""
    edges = np.array(figures["histogram_edges"])
    parts = groups(figures)
    figure, axes = panels(len(parts), (4.2, 2.9))
    for axis, (name, part) in zip(axes, parts.items(), strict=True):
        total = max(sum(part["histogram"]), 1)
        if "correct" in part:
            right, wrong = (np.array(part[kind]["histogram"]) / total for kind in ("correct", "wrong"))
            axis.stairs(right, edges, fill=True, color=RIGHT, alpha=0.7, label="correct")
            axis.stairs(right + wrong, edges, baseline=right, fill=True, color=WRONG, alpha=0.7, label="wrong")
        else:
            axis.stairs(np.array(part["histogram"]) / total, edges, fill=True, color=RIGHT, alpha=0.7, label="samples")
        other = figures.get("reference", {}).get("overall" if name == "all" else name)
        if other is not None and sum(other["histogram"]):
            shares = np.array(other["histogram"]) / sum(other["histogram"])
            axis.stairs(shares, edges, color=REFERENCE, label="reference")
        fitted = targets["lognormal"].get(name)
        if fitted is not None:
            draw_target(axis, fitted, edges)
        median = part["quantiles"].get("0.5")
        axis.set_title(f"{name}: {part['num_samples']} samples" + (f", median {median:.0f}" if median else ""))
        axis.set_xscale("log")
        plain_ticks(axis, edges)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="x-small")
    figure.supxlabel(axis_label(figures), fontsize="small")
    figure.supylabel("share of samples", fontsize="small")
    return figure


def draw_target(axis: Axes, target: LengthTarget, edges: np.ndarray) -> None:
    """The shares that a target has in the bins of a histogram."""
    counts = np.histogram(target.spread(100_000), edges)[0] / 100_000
    axis.plot(np.sqrt(edges[1:] * edges[:-1]), counts, color=TARGET, linewidth=1.2, label="log-normal fit")


def draw_quantiles(figures: dict[str, Any]) -> Figure:
    """Length at each level."""
    figure, (axis,) = panels(1, (6.0, 3.4))
    for name, part in groups(figures).items():
        if part["quantiles"]:
            style: dict[str, Any] = dict(color="0.2", linestyle="--") if name == "all" else {}
            levels = [float(level) for level in part["quantiles"]]
            axis.plot(levels, list(part["quantiles"].values()), marker=".", label=name, **style)
    if "reference" in figures and figures["reference"]["overall"]["quantiles"]:
        other = figures["reference"]["overall"]["quantiles"]
        axis.plot([float(level) for level in other], list(other.values()), color="0.6", label="reference, all")
    axis.set(xlabel="level", ylabel=axis_label(figures), yscale="log")
    plain_ticks(axis, np.array(figures["histogram_edges"]), "y")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="x-small")
    return figure


def draw_share_correct(figures: dict[str, Any]) -> Figure:
    """The share of correct samples by length."""
    figure, (axis,) = panels(1, (6.0, 3.4))
    for name, part in groups(figures).items():
        bins = part.get("share_correct_by_length", [])
        if bins:
            x, y, low, high = (
                np.array([b[key] for b in bins]) for key in ("median_length", "share_correct", "low", "high")
            )
            style: dict[str, Any] = dict(color="0.2", linestyle="--") if name == "all" else {}
            axis.errorbar(x, y, yerr=[y - low, high - y], marker=".", capsize=2, label=name, **style)
    axis.set(xlabel=axis_label(figures), ylabel="share correct", xscale="log", ylim=(-0.03, 1.03))
    plain_ticks(axis, np.array(figures["histogram_edges"]))
    axis.grid(alpha=0.3)
    axis.legend(fontsize="x-small")
    return figure


def axis_label(figures: dict[str, Any]) -> str:
    what = {"reasoning": "reasoning, ", "answer": "answer, "}.get(figures["measure"], "")
    return f"length ({what}{'words' if figures['unit'] == 'words' else 'tokens'})"


def plain_ticks(axis: Axes, edges: np.ndarray, which: str = "x") -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5 times powers of ten, as plain numbers."""
    steps = [base * 10.0**power for power in range(-1, 8) for base in (1, 2, 5)]
    ticks = [step for step in steps if edges[0] <= step <= edges[-1]]
    side = axis.xaxis if which == "x" else axis.yaxis
    side.set_ticks(ticks, labels=[f"{tick:g}" if tick < 1e6 else f"{tick:.0e}" for tick in ticks], fontsize="small")
    side.set_ticks([], minor=True)
