"""The page of a report: an HTML file that loads no other file."""

import base64
import io
import json
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..callbacks import CONFIG_NAME
from ..files import write_bytes, write_text
from .figures import draw
from .runs import Run, spread


MAX_SAMPLE_STEPS = 3  # steps whose samples are shown
MAX_CHARACTERS = 2000  # of a text that are shown
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


def shorten(text: str) -> str:
    """The text, cut off if it is very long."""
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + " …"


def show(value: Any) -> str:
    """A value in a table, escaped."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return escape(shorten(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))


def across(values: list[Any]) -> str:
    """The values of all runs in one cell. If numbers differ, the cell has their mean and range."""
    if all(value == values[0] for value in values):
        return show(values[0])
    if all(isinstance(value, float) for value in values):
        return f"{show(sum(values) / len(values))} ({show(min(values))} to {show(max(values))})"
    return " / ".join(show(value) for value in values)


def table(rows: list[list[str]], header: list[str] | None = None, css_class: str = "number") -> str:
    """A table. The cells are HTML already."""
    lines = ["<table>"]
    if header is not None:
        lines.append("<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in header) + "</tr>")
    for first, *cells in rows:
        lines.append(f"<tr><td>{first}</td>" + "".join(f'<td class="{css_class}">{c}</td>' for c in cells) + "</tr>")
    return "\n".join([*lines, "</table>"])


def heat_map(sample: dict[str, Any], scale: float) -> str:
    """A completion as HTML. Tokens with scores are coloured; the colour is strongest where a score reaches `scale`."""
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
    """The best and worst samples of some steps."""
    parts = []
    for line in spread([line for line in run.scored if line["samples"]], MAX_SAMPLE_STEPS):
        token_scores = [abs(score) for sample in line["samples"] for score in sample.get("token_scores", [])]
        scale = max(token_scores, default=0.0) or 1.0
        rows = [
            [escape(sample["kind"]), show(sample["score"]), escape(shorten(sample["prompt"])), heat_map(sample, scale)]
            for sample in line["samples"]
        ]
        parts.append(
            f"<h3>Step {show(line['step'])}</h3>" + table(rows, ["", "score", "prompt", "completion"], "text")
        )
    if not parts:
        return ""
    note = f"Raw scores τ of run {escape(run.name)}: how fast Φ rises with the weight of the sample in training."
    if any("tokens" in sample for line in run.scored for sample in line["samples"]):
        note += " Blue tokens raise the metric, orange tokens lower it. Move the pointer to a token to see its score."
    return f'<h2>Best and worst samples</h2>\n<p class="note">{note}</p>\n' + "\n".join(parts)


def summary_section(runs: list[Run]) -> str:
    """The figures of fresh students, and texts of the generators. Empty if `trl-dpg dpg` did not test students."""
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
    """A table of the runs."""
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
        rows.append([escape(run.name), escape(str(seed)), escape(steps), show(after[0]), show(after[-1])])
        unfinished = f"not finished; last log line {run.last_logged:%Y-%m-%d %H:%M}"
        rows[-1].append(unfinished if seconds is None else f"{seconds:.0f} s")
    return table(rows, ["run", "seed", "steps", "Φ at first", "Φ at last", "time"])


def settings_section(runs: list[Run]) -> str:
    """The settings and the environment of the runs."""
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
    The page. Its images are part of the file, and its content security policy forbids it to load anything.

    Args:
        runs (`list[Run]`): A run, or one for each seed.
        title (`str`): Title of the page.
        images (`dict[str, tuple[str, bytes]]`): Caption and PNG of each figure, by name.
    """
    parts = {name: image_html(name, caption, png) for name, (caption, png) in images.items()}
    more = parts.pop("more_curves", "")
    curves, histograms = parts.pop("curves"), parts.pop("score_histograms")
    body = [f"<h1>{escape(title)}</h1>", overview(runs), "<h2>Curves</h2>", curves]
    if parts:
        body += ["<h2>The picture over time</h2>", *parts.values()]
    body += [summary_section(runs), "<h2>Score histograms</h2>", histograms, samples_section(runs[0])]
    body += [f"<details><summary>More curves</summary>{more}</details>" if more else "", settings_section(runs)]
    return document(title, body)


def document(title: str, body: list[str]) -> str:
    """A page of HTML parts. Its content security policy forbids it to load anything."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = f'<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
    head += f"<title>{escape(title)}</title>\n<style>{STYLE}</style>"
    page = "\n".join(part for part in body if part)
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{page}\n</body>\n</html>\n'


def image_html(name: str, caption: str, png: bytes) -> str:
    """An image and its caption."""
    data = base64.b64encode(png).decode()
    image = f'<img alt="{escape(name.replace("_", " "))}" src="data:image/png;base64,{data}">'
    return f'<p class="note">{escape(caption)}</p>\n{image}'


def write_figures(figures: dict[str, tuple[str, Figure]], output_dir: Path) -> dict[str, tuple[str, bytes]]:
    """Write figures as PNGs. Returns the caption and the PNG of each by its name."""
    images = {}
    for name, (caption, figure) in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
        images[name] = (caption, buffer.getvalue())
        write_bytes(output_dir / f"{name.replace('/', '_')}.png", images[name][1])
    return images


def write_report(runs: list[Run], output_dir: str | Path, title: str | None = None) -> Path:
    """
    Write `report.html` and, beside it, its figures as PNGs.

    Args:
        runs (`list[Run]`): A run, or one for each seed.
        output_dir (`str` or `Path`): The folder to write to.
        title (`str`, *optional*): Title of the page; the names of the runs by default.

    Returns:
        `Path`: The page.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    images = write_figures(draw(runs), output_dir)
    path = output_dir / "report.html"
    write_text(path, render(runs, title or ", ".join(run.name for run in runs), images))
    return path
