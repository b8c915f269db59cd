"""
Look for effects of a dataset on a student that its texts do not say, and for the rows behind them.

    trl-dpg audit --dataset_name samples.jsonl --control control.jsonl --student_model_name_or_path gpt2
    trl-dpg audit --config recipes/audit/mini.yaml

Fresh students are fine-tuned on parts of the dataset, and on parts of a control. A panel of metrics tells what the
dataset does that the control does not. The library side is [`trl_dpg.auditing.audit`]. `docs/audit.md` explains it.

Files in `output_dir`: `audit.html`, a page that loads no other file, with its figure `effects.png`; `summary.json`;
and, if an unwanted effect was found, `scored.parquet`: the samples that are not empty, with a column
`dpg_score_<name>` for each metric of the panel that has a gradient. `manifest.json` says what made the files.
`audit.jsonl` and `audit_scores.jsonl` are the journals, from which the same command goes on if it was interrupted.

The exit status is 0 if no unwanted effect was found, 3 if one was found, 2 for wrong usage, and 1 for a failure.
"""

import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..files import write_json
from ..redaction import redacted
from ..rows import sample_columns
from .arguments import MetricArguments, ReadingArguments, ToyWorldArguments, UsageError, at_least
from .data import (
    as_the_student_reads,
    check_model,
    check_no_training,
    check_student,
    load_data,
    make_folder,
    one_process,
    the_student,
)
from .flags import in_flags
from .manifest import leave_manifest
from .output import say
from .registry import make_metrics
from .samples import choose_numbers, tuning_file
from .toy_world import toy_world
from .usage import from_json, metric_entries


FOUND = 3
"""The exit status if an unwanted effect was found."""
FLAGS = {name: name for name in ("wanted", "num_parts", "alpha", "share_removed", "control", "overwrite")} | {
    "dataset": "dataset_name"
}
"""What the library's arguments are called here, beside those of the student."""


@dataclass
class AuditArguments(MetricArguments, ReadingArguments, ToyWorldArguments):
    """
    Arguments of `trl-dpg audit`.

    Args:
        dataset_name (`str`):
            The samples: a Hub id, or a file (json, jsonl, parquet, csv, txt), in any format of SFTTrainer.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            Split, e.g. `"train[:1000]"`.
        control (`str`, *optional*):
            Samples of the same kind and source without the suspected cause, at least as many: a Hub id or a file. By
            default, the student itself writes them before it is fine-tuned.
        control_split (`str`, *optional*, defaults to `"train"`):
            Its split.
        metrics (`dict[str, dict[str, Any]]` or `str`, *optional*):
            The panel, by names that you choose. Each entry has `metric` and perhaps `metric_kwargs`. JSON on the
            command line. A `metric` of a recipe is taken if there are no `metrics`.
        default_panel (`bool`, *optional*, defaults to `True`):
            Whether built-in metrics are in the panel as well, see [`~trl_dpg.auditing.default_panel`].
        wanted (`list[str]`, *optional*):
            Names of metrics that the dataset is meant to move. They are reported apart.
        num_parts (`int`, *optional*, defaults to `8`):
            Number of parts of dataset and control, and of fresh students on each side.
        alpha (`float`, *optional*, defaults to `0.01`):
            The chance of a false finding, for all metrics that are not wanted together.
        score_rows (`bool`, *optional*, defaults to `True`):
            Whether to look for the rows behind unwanted effects.
        share_removed (`float`, *optional*, defaults to `0.1`):
            Share of the rows with the highest scores that are removed, to check the scores by fresh students.
        other_student_model_name_or_path (`str`, *optional*):
            Path or Hub id of another start, on which effects that were found are tested again.
        output_dir (`str`, *optional*, defaults to `"audit"`):
            Folder for the results. With a recipe for `trl-dpg dpg`, give a folder other than the recipe's.
        title (`str`, *optional*):
            Title of the page; the dataset's name by default.
        overwrite (`bool`, *optional*, defaults to `False`):
            Delete the results of an earlier audit with other settings in `output_dir`.
    """

    dataset_name: str | None = field(
        default=None, metadata={"help": "The samples: a Hub id, or a file (json, jsonl, parquet, csv, txt)."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset, e.g. 'train[:1000]'."})
    control: str | None = field(
        default=None,
        metadata={"help": "Samples of the same kind without the suspected cause; by default the student writes them."},
    )
    control_split: str = field(default="train", metadata={"help": "Split of the control."})
    metrics: dict | str | None = field(
        default=None, metadata={"help": "The panel: metrics by your names for them, as JSON."}
    )
    default_panel: bool = field(default=True, metadata={"help": "Have built-in metrics in the panel as well."})
    wanted: list[str] = field(
        default_factory=list, metadata={"help": "Names of metrics that the dataset is meant to move."}
    )
    num_parts: int = field(default=8, metadata={"help": "Parts of the dataset, each with a fresh student."})
    alpha: float = field(default=0.01, metadata={"help": "Chance of a false finding among all unwanted metrics."})
    score_rows: bool = field(default=True, metadata={"help": "Look for the rows behind unwanted effects."})
    share_removed: float = field(
        default=0.1, metadata={"help": "Share of the best rows that are removed to check the scores."}
    )
    other_student_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Another start, on which effects that were found are tested again."}
    )
    output_dir: str = field(default="audit", metadata={"help": "Folder for the results."})
    title: str | None = field(default=None, metadata={"help": "Title of the page."})
    overwrite: bool = field(default=False, metadata={"help": "Delete the results of other settings in `output_dir`."})

    def __post_init__(self):
        self.metrics = metric_entries("metrics", self.metrics)
        self.metric_kwargs = from_json("metric_kwargs", self.metric_kwargs)
        if self.metrics is None and self.metric is not None:
            self.metrics = {str(self.metric): {"metric": self.metric, "metric_kwargs": self.metric_kwargs}}
        if self.metrics:
            first = next(iter(self.metrics.values()))
            self.metric, self.metric_kwargs = first["metric"], first.get("metric_kwargs")
        elif self.default_panel:
            self.metric = "default_panel"  # for a choice of numbers in the place of auto
        else:
            raise UsageError("--metrics is required without --default_panel: at least one metric, by a name.")
        super().__post_init__()
        if self.dataset_name is None and self.toy_world is None:
            raise UsageError("--dataset_name is required: samples by Hub id or file (json, jsonl, parquet, csv, txt).")
        at_least(3, num_parts=self.num_parts)
        for name in ("alpha", "share_removed"):
            if not 0 < vars(self)[name] < 1:
                raise UsageError(f"--{name} must be above 0 and below 1, got {vars(self)[name]}.")

    def settings(self, seed: int):
        """The [`~trl_dpg.auditing.AuditConfig`]."""
        from trl_dpg.auditing import AuditConfig

        names = ("wanted", "num_parts", "alpha", "score_rows", "share_removed")
        return AuditConfig(seed=seed, **{name: vars(self)[name] for name in names})


def load_samples(script_args: AuditArguments, flag: str, name: str, split: str):
    """The samples of a dataset as the student reads them, with the columns that it reads."""
    data = load_data(name, split=split, flag=flag)
    columns = sample_columns(data.column_names)
    if columns is None:
        raise UsageError(
            f"--{flag} {name!r} has the columns {data.column_names}; expected `text`, `prompt` and `completion`, "
            "`messages`, or `input_ids`."
        )
    data = data.select_columns([column for column in data.column_names if column in (*columns, "reasoning")])
    read = as_the_student_reads(data, script_args, flag, name)
    return read.select_columns([column for column in read.column_names if column != "reasoning"])


def make_panel(script_args: AuditArguments, student) -> dict[str, Any]:
    """The metrics by name, of the arguments and the built-in ones."""
    from trl_dpg.auditing import default_panel

    own = make_metrics("metrics", script_args.metrics or {})
    if not script_args.default_panel:
        return own
    if student.processing_class is None:
        raise UsageError("--default_panel needs a tokenizer of the student. Use --no_default_panel.")
    return own | {name: metric for name, metric in default_panel(student).items() if name not in own}


def main(script_args: AuditArguments, student_args) -> None:
    from trl_dpg.attribution.journal import JournalError
    from trl_dpg.auditing import audit
    from trl_dpg.metagradients.config import SettingsError

    from .evaluate import one_bar_and_each_notice_once

    one_process("audit", "Start it without a launcher.")
    the_student("audit", student_args)
    if student_args.replay_dataset is not None:
        raise UsageError("audit has no --replay_dataset: its students read the dataset or the control, and no others.")
    script_args.set_threads()
    output_dir = make_folder("output_dir", script_args.output_dir)
    check_folder(output_dir)
    with toy_world(script_args, student_args.seed, student_args, output_dir=script_args.output_dir):
        check_student(student_args)
        if script_args.other_student_model_name_or_path is not None:
            check_model("other_student_model_name_or_path", script_args.other_student_model_name_or_path)
        name = str(script_args.dataset_name)
        dataset = load_samples(script_args, "dataset_name", name, script_args.dataset_split)
        control = None
        if script_args.control is not None:
            control = load_samples(script_args, "control", script_args.control, script_args.control_split)
        student = student_args.load_student()
        script_args.set_threads(student.model)
        panel = make_panel(script_args, student)
        first = dataset.select(range(min(256, len(dataset))))
        leader = next(iter(panel.values()))
        choose_numbers(script_args, student_args, student, first, leader, tuning_file(output_dir, "audit"))
        del student
        other = script_args.other_student_model_name_or_path
        try:
            with one_bar_and_each_notice_once():
                result = audit(
                    loader(student_args),
                    dataset,
                    control,
                    panel,
                    student_args.inner_loop_config(),
                    script_args.settings(student_args.seed),
                    None if other is None else loader(student_args, other),
                    progress=True,
                    journal=output_dir / "audit.jsonl",
                    overwrite=script_args.overwrite,
                )
        except JournalError as error:
            raise UsageError(in_flags(f"--output_dir: {error}", FLAGS)) from error
        except SettingsError as error:
            raise UsageError(in_flags(str(error), FLAGS)) from error
    finish(script_args, student_args, result, output_dir, {"dataset": dataset, "control": control})
    if result.unwanted:
        raise SystemExit(FOUND)


def loader(student_args, path: str | None = None):
    """A function from seeds to fresh students: the student of the arguments, or the one at a path."""
    changes = {} if path is None else {"student_model_name_or_path": path}
    return lambda seed: replace(student_args, seed=seed, **changes).load_student()


def check_folder(output_dir: Path) -> None:
    """Refuse the folder of another command."""
    check_no_training(output_dir)
    if (output_dir / "summary.json").exists() and not (output_dir / "audit.html").exists():
        raise UsageError(
            f"--output_dir {str(output_dir)!r} has the summary.json of another command. Choose another folder."
        )


def finish(script_args: AuditArguments, student_args, result, output_dir: Path, inputs: dict[str, Any]) -> None:
    """Write the page, the figures, the scores and the manifest, and print the verdict."""
    from datasets import Dataset

    from trl_dpg.attribution.result import score_columns
    from trl_dpg.report.audit import write_audit_report

    from .mix import write_dataset

    names = ["dataset_name", "dataset_split", "control", "control_split", "metrics", "default_panel", "wanted"]
    names += ["num_parts", "alpha", "score_rows", "share_removed", "other_student_model_name_or_path"]
    settings = redacted({name: vars(script_args)[name] for name in names} | asdict(student_args))
    if script_args.control is None:
        settings["control"] = "written by the student before its fine-tuning"
    title = script_args.title or f"Audit of {script_args.dataset_name}"
    page = write_audit_report(result, output_dir, title, settings)
    files = [page, output_dir / "summary.json"]
    scored = output_dir / "scored.parquet"
    scored.unlink(missing_ok=True)  # of an earlier audit
    if result.scores:
        columns = {score_columns(name)[0]: scores for name, scores in result.scores.items()}
        write_dataset(Dataset.from_dict(result.samples.to_dict() | columns), scored)
        files.append(scored)
    write_json(output_dir / "summary.json", result.figures() | {"settings": settings})
    read = {name: data for name, data in inputs.items() if data is not None}  # a control of the student is not read
    leave_manifest(output_dir, "audit", asdict(script_args) | asdict(student_args), **read)
    say("\n".join(["", *result.verdict(), f"Written: {', '.join(map(str, files))}"]))


def make_parser(prog: str | None = None):
    from trl import TrlParser

    from trl_dpg.config import StudentArguments

    return TrlParser((AuditArguments, StudentArguments), prog=prog)


if __name__ == "__main__":
    from trl_dpg.scripts import launcher

    launcher.run("audit", make_parser, main, sys.argv[1:])
