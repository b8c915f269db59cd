"""The page of `trl-dpg audit`: the verdict, the effects, the rows behind them, and what the verdict does not say."""

from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..auditing import Audit, Effect
from ..auditing.result import LIMITS, NO_RANKING
from ..files import write_text
from ..rows import row_text
from .page import document, image_html, show, table, write_figures


MAX_ROWS = 10  # rows that are shown behind an effect
DATA, CONTROL = "tab:orange", "tab:blue"


def write_audit_report(audit: Audit, output_dir: str | Path, title: str, about: dict[str, Any]) -> Path:
    """
    Write `audit.html` and, beside it, its figure as a PNG.

    Args:
        audit ([`~trl_dpg.auditing.Audit`]): The result.
        output_dir (`str` or `Path`): The folder, which exists.
        title (`str`): Title of the page.
        about (`dict[str, Any]`): What was audited and how, for the table of settings.

    Returns:
        `Path`: The page.
    """
    output_dir = Path(output_dir)
    caption = "Φ after each part of the data and of the control, minus the mean of the control, in its spreads."
    images = write_figures({"effects": (caption, draw_effects(audit))}, output_dir)
    first, *more = audit.verdict()
    body = [f"<h1>{escape(title)}</h1>", f"<p><strong>{escape(first)}</strong></p>"]
    body += [f"<p>{escape(line)}</p>" for line in more]
    body += ["<h2>What this does not say</h2>", "<ul>", *(f"<li>{escape(line)}</li>" for line in LIMITS), "</ul>"]
    body += ["<h2>Effects</h2>", note(audit), effects_table(audit)]
    body += [image_html(name, caption, png) for name, (caption, png) in images.items()]
    body += [rows_section(audit), other_start_section(audit)]
    body += ["<h2>Settings</h2>", table([[escape(name), show(value)] for name, value in about.items()], None, "text")]
    path = output_dir / "audit.html"
    write_text(path, document(title, body))
    return path


def note(audit: Audit) -> str:
    """What was done, in a few sentences."""
    text = (
        f"{audit.num_parts} fresh students were fine-tuned on {audit.num_parts} disjoint parts of the dataset, with "
        f"{len(audit.samples) // audit.num_parts} samples each, and as many on parts of the control. The effect is "
        "the mean difference of Φ, with its 95 % interval. p-values are adjusted for the number of metrics (Holm). An "
        f"effect is found if its adjusted p-value is at most {audit.alpha:g}."
    )
    return f'<p class="note">{text}</p>'


def effects_table(audit: Audit) -> str:
    """All effects, unwanted ones first."""
    header = [
        "metric",
        "before",
        "control",
        "data",
        "effect",
        "in spreads of the control",
        "adjusted p",
        "",
        "proxies",
    ]
    rows = []
    for name, effect in sorted(audit.effects.items(), key=lambda item: (item[1].wanted, item[1].adjusted_p)):
        control, data = (sum(values) / len(values) for values in (effect.control, effect.data))
        spreads = "" if effect.in_spreads is None else f"{effect.in_spreads:.1f}"
        size = f"{effect.mean:.3g} ± {effect.half_width:.2g}"
        cells = [escape(name), show(effect.before), show(control), show(data), size, spreads]
        proxies = ", ".join(f"{key} {theirs:.3g} → {ours:.3g}" for key, (ours, theirs) in effect.proxies.items())
        rows.append([*cells, f"{effect.adjusted_p:.2g}", state(effect), escape(proxies)])
    return table(rows, header)


def state(effect: Effect) -> str:
    """What was found, as HTML."""
    if effect.wanted:
        return "wanted, found" if effect.found else "wanted, not found"
    return "<strong>found</strong>" if effect.found else "not found"


def rows_section(audit: Audit) -> str:
    """The best rows behind each unwanted effect, and what is left without them."""
    parts = []
    for name, behind in audit.rows.items():
        if behind.all_equal:
            parts.append(f"<h3>{escape(name)}</h3><p>{NO_RANKING}</p>")
            continue
        known = "" if behind.rank_correlation is None else f"{behind.rank_correlation:.2f}"
        about = (
            f"Rank correlation of the scores in two random orders: {known or 'unknown'}. A row of the dataset scores "
        )
        about += f"higher than a row of the control in {behind.above_control:.0%} of the pairs."
        if behind.removal is not None:
            removal = behind.removal
            kinds = {"whole dataset": removal.whole, "control": removal.control}
            kinds |= {f"without its {removal.num_removed} best rows": removal.without_top}
            kinds |= {f"without {removal.num_removed} random rows": removal.without_random}
            lines = [[escape(kind), _plus_minus(values), _gone(removal, values)] for kind, values in kinds.items()]
            about += " " + table(lines, ["fresh students on the", "Φ", "of the effect is gone"])
        samples = [
            [str(row), f"{score:.3g}", show(row_text(audit.samples[row]))]
            for row, score in list(zip(behind.rows, behind.scores, strict=True))[:MAX_ROWS]
        ]
        parts += [f"<h3>{escape(name)}</h3>", about, table(samples, ["row", "score", "sample"], "text")]
    found_only = [name for name in audit.unwanted if name not in audit.rows]
    if found_only:
        parts.append(f"<p>Without a gradient, so rows are not scored: {escape(', '.join(found_only))}.</p>")
    return "\n".join(["<h2>Rows behind the unwanted effects</h2>", *parts]) if parts else ""


def other_start_section(audit: Audit) -> str:
    """The unwanted effects on another start."""
    parts, rows = [], []
    if not audit.other_start and not audit.not_on_other_start:
        return ""
    for name, effect in audit.other_start.items():
        spreads = "" if effect.in_spreads is None else f"{effect.in_spreads:.1f}"
        size = f"{effect.mean:.3g} ± {effect.half_width:.2g}"
        there = "yes" if audit.is_also_there(name) else "not found"
        rows.append([escape(name), size, spreads, f"{effect.adjusted_p:.2g}", there])
    header = ["metric", "effect", "in spreads of the control", "adjusted p", "also there"]
    if rows:
        parts.append(table(rows, header))
    if audit.not_on_other_start:
        failed = [[escape(name), escape(error)] for name, error in audit.not_on_other_start.items()]
        parts.append(table(failed, ["cannot be computed there", "error"], "text"))
    return "\n".join(["<h2>The same on another start</h2>", *parts])


def draw_effects(audit: Audit) -> Figure:
    """A row of points for each metric: the parts of the control and of the data."""
    figure = Figure(figsize=(8, 0.9 + 0.45 * len(audit.effects)), layout="constrained")
    axis = figure.subplots()
    for place, effect in enumerate(audit.effects.values()):
        middle = sum(effect.control) / len(effect.control)
        scale = effect.spread or abs(effect.mean) or 1.0
        for values, color, shift in ((effect.control, CONTROL, 0.15), (effect.data, DATA, -0.15)):
            points = [(value - middle) / scale for value in values]
            axis.plot(points, [place + shift] * len(points), "o", color=color, alpha=0.6, markersize=4)
    axis.set_yticks(range(len(audit.effects)), list(audit.effects), parse_math=False)
    axis.set_xscale("symlog", linthresh=3.0)
    axis.set_xlabel("Φ, in spreads of the control", fontsize="small")
    axis.axvline(0, color="0.6", linewidth=0.8)
    axis.grid(alpha=0.3)
    for color, label in ((CONTROL, "control"), (DATA, "data")):
        axis.plot([], [], "o", color=color, label=label)
    axis.legend(fontsize="x-small")
    axis.invert_yaxis()
    return figure


def _plus_minus(values: tuple[float, float | None]) -> str:
    mean, half_width = values
    return f"{mean:.5g}" + ("" if half_width is None else f" ± {half_width:.2g}")


def _gone(removal: Any, values: tuple[float, float | None]) -> str:
    share = removal.share_gone(values)
    return "" if share is None else f"{share:.0%}"
