"""The dataset of `trl-dpg attribute`: what the student reads of its rows, and the best and worst ones."""

from typing import Any

import numpy as np

from trl_dpg.attribution.result import ranking, score_columns
from trl_dpg.rows import row_text, sample_columns

from .arguments import UsageError
from .data import as_the_student_reads, held_by, load_data


def load_samples(script_args):
    """The dataset as it is, and the view of it that the student reads."""
    name = str(script_args.dataset_name)
    dataset = load_data(name, script_args.dataset_config, script_args.dataset_split)
    new = [column for name in script_args.names for column in score_columns(name)]
    taken = [column for column in new if column in dataset.column_names]
    if taken:
        raise UsageError(f"--dataset_name {name!r} has scores already, in {taken}. Rename or remove these columns.")

    text = script_args.dataset_text_field
    columns = sample_columns(dataset.column_names)
    if text is not None:
        columns = (text,) if text in dataset.column_names else None
    if columns is None:
        raise UsageError(
            f"--dataset_name {name!r} has the columns {dataset.column_names}; expected "
            + (f"{text!r}." if text else "`text`, `prompt` and `completion`, `messages`, or `input_ids`.")
            + " Name the column with the text by --dataset_text_field."
        )
    if text is not None or columns == ("text",):
        held = held_by(dataset.features[columns[0]])
        if held not in ("texts", "null"):
            raise UsageError(
                f"The column {columns[0]!r} holds no text but {held}. Name the one that does by --dataset_text_field."
            )
    samples = dataset.select_columns([*columns, *({"reasoning"} & set(dataset.column_names))])
    samples = samples if text in (None, "text") else samples.rename_column(text, "text")
    samples = as_the_student_reads(samples, script_args, "dataset_name", name)
    return dataset, samples.select_columns(["text"] if text else list(columns))


def preview(row: dict[str, Any], student, width: int = 90) -> str:
    """A sample on one line."""
    known = "input_ids" in row and student.processing_class is not None
    text = student.processing_class.decode(row["input_ids"]) if known else row_text(row)
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def best_and_worst(scores: np.ndarray, samples, student, number: int) -> dict[str, list[dict[str, Any]]]:
    """The rows with the highest scores and those with the lowest, as values that JSON can hold."""
    order, number = ranking(scores), min(number, len(scores))
    return {
        name: [
            {"row": row, "dpg_score": float(scores[row]), "sample": preview(samples[row], student)}
            for row in rows.tolist()
        ]
        for name, rows in (("best", order[:number]), ("worst", order[::-1][:number]))
    }


def ranking_lines(figures: dict[str, Any]) -> list[str]:
    """The best and the worst rows, for the terminal."""
    lines = []
    for name in ("best", "worst"):
        lines += ["", f"{name:5}  {'row':>8}  {'dpg_score':>11}  sample"] if figures[name] else []
        lines += [f"{'':5}  {row['row']:>8}  {row['dpg_score']:>11.4g}  {row['sample']}" for row in figures[name]]
    return lines
