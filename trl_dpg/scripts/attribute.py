"""
Score the samples of an existing dataset by what they do for a metric of a student that is fine-tuned on them.

    trl-dpg attribute --dataset_name samples.jsonl --student_model_name_or_path gpt2 --metric language_modeling \
        --metric_kwargs '{"dataset": "benchmark.jsonl"}' --keep_top 0.3 --output_dir attribution

The library side is [`trl_dpg.attribute`]. With `--num_processes`, several processes share the chunks.

Files in `output_dir`:

- `attribution.jsonl`, the journal: the settings, then a line for each finished chunk. The same command continues, or
  writes the files again, e.g. with another `keep_top`, or adds repeats.
- `scored.parquet` (or `.jsonl`): the dataset, in its order, with all its columns and `dpg_score` (float32). With
  `per_token`, also `dpg_token_scores`: a list, one score for each of the student's tokens, cut off at
  `student_max_length`. With `metrics`, there are such columns for each metric: `dpg_score_<name>`, and for their
  contrast `dpg_score_contrast`.
  With `student_models`, each student has a journal `attribution_<name>.jsonl` and a column `dpg_score_<name>`, and
  `dpg_score` is the mean of their scores on unit scale, or the lowest (`student_aggregation`).
- `top.parquet` (or `.jsonl`), with `keep_top`: the best rows, in the dataset's order.
- `summary.json`: counts, quantiles of the scores, the metric before and after, seconds (of all processes together).
- `attribution.lock`: prevents two commands from writing at the same time.
"""

import json
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from trl_dpg.attribution import Attribution, combine_attributions, write
from trl_dpg.attribution import plan_chunks as plan_chunks
from trl_dpg.attribution import rank_correlation as rank_correlation
from trl_dpg.attribution.attribute import CONTRAST, plan_results
from trl_dpg.attribution.chunks import SAMPLES_PER_CHUNK, chunk_size
from trl_dpg.attribution.journal import JournalError
from trl_dpg.attribution.journal import digest as digest
from trl_dpg.config import StudentArguments
from trl_dpg.files import write_json
from trl_dpg.metagradients.config import SettingsError
from trl_dpg.tuning import check_scores

from .arguments import MetricArguments, ReadingArguments, ToyWorldArguments, UsageError, at_least
from .data import check_no_training, check_student, check_token_ids, make_folder, make_replay, process_state
from .distill import DistillArguments, distill
from .flags import in_flags
from .manifest import leave_manifest
from .registry import make_metric, make_metrics
from .scored_by_student import FLAGS, OF_SEVERAL, RESULTS, Scored, check_several, journal_name
from .scored_by_student import MEMORY_ONLY as MEMORY_ONLY
from .scored_samples import best_and_worst, load_samples, ranking_lines
from .scored_samples import preview as preview
from .toy_world import toy_world
from .usage import metric_entries


@dataclass
class AttributeArguments(MetricArguments, ReadingArguments, DistillArguments, ToyWorldArguments):
    """
    Script arguments of `trl-dpg attribute`.

    Args:
        metrics (`dict[str, dict[str, Any]]` or `str`, *optional*):
            Several metrics in the place of `metric`, by names that you choose. Each entry has `metric` and perhaps
            `metric_kwargs`. JSON on the command line. Numbers in the place of `auto` are chosen for the first one.
        contrast (`list[str]`, *optional*):
            The names of two of the `metrics`, target and control. The samples are then also scored by target minus
            control. `keep_top` and the printed samples are by this score; without it, by that of the first metric.
        dataset_name (`str`):
            The samples: a Hub id, or a file (json, jsonl, parquet, csv, txt).
        dataset_config (`str`, *optional*):
            Configuration of a dataset of the Hub.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            Split, e.g. `"train[:10000]"`. Not a recipe's `dataset_train_split`, which is of its prompts.
        dataset_text_field (`str`, *optional*):
            The column with the text; by default the first of `input_ids`, `messages`, `prompt`, `text` that there is.
        dataset_chunk (`int`, *optional*):
            Samples that the student is fine-tuned on together. By default the smallest multiple of the batch from 256.
        num_repeats (`int`, *optional*, defaults to `1`):
            Number of random orders in which all samples are scored. The score is the mean.
        share_chunks (`bool`, *optional*, defaults to `False`):
            Whether several processes score each chunk together.
        path_points (`int`, *optional*):
            Number of random vectors of data weights over which a score is the mean; for large shares left out.
        metric_samples (`int`, *optional*):
            Texts of the metric that are drawn at random, once for all chunks. By default all of them.
        output_dir (`str`, *optional*, defaults to `"attribution"`):
            Folder for the results. With a recipe for `trl-dpg dpg`, give a folder other than the recipe's.
        output_format (`str`, *optional*, defaults to `"parquet"`):
            `"parquet"` or `"jsonl"`.
        keep_top (`float`, *optional*):
            Also write the best samples, this share of all.
        num_shown (`int`, *optional*, defaults to `3`):
            Number of best samples, and of worst samples, to print.
        overwrite (`bool`, *optional*, defaults to `False`):
            Delete the results of an earlier run with other settings in `output_dir`.
    """

    metrics: dict | str | None = field(
        default=None,
        metadata={"help": "Several metrics in the place of `metric`, by your names for them, as JSON."},
    )
    contrast: list[str] | None = field(
        default=None,
        metadata={"help": "Names of two `metrics`, target and control: also score by target minus control."},
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "The samples: a Hub id, or a file (json, jsonl, parquet, csv, txt)."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset of the Hub."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset, e.g. 'train[:10000]'."})
    dataset_text_field: str | None = field(
        default=None,
        metadata={
            "help": "Column with the text; by default the first that the dataset has of `input_ids`, `messages`, "
            "`prompt` and `completion`, `text`."
        },
    )
    dataset_chunk: int | None = field(
        default=None,
        metadata={
            "help": "Samples that the student is fine-tuned on together, a multiple of `student_batch_size`; by "
            f"default the smallest that is at least {SAMPLES_PER_CHUNK}."
        },
    )
    num_repeats: int = field(
        default=1, metadata={"help": "Number of random orders in which all samples are scored; the score is the mean."}
    )
    share_chunks: bool = field(default=False, metadata={"help": "Several processes score each chunk together."})
    path_points: int | None = field(default=None, metadata={"help": "Random data weights that scores are means over."})
    metric_samples: int | None = field(default=None, metadata={"help": "Texts of the metric to draw; all by default."})
    output_dir: str = field(default="attribution", metadata={"help": "Folder for the results."})
    output_format: str = field(default="parquet", metadata={"help": "'parquet' or 'jsonl'."})
    keep_top: float | None = field(
        default=None, metadata={"help": "Also write the best samples, this share of all, e.g. 0.3."}
    )
    num_shown: int = field(default=3, metadata={"help": "Number of best, and of worst, samples to print."})
    overwrite: bool = field(default=False, metadata={"help": "Delete the results of other settings in `output_dir`."})

    def __post_init__(self):
        self.metrics = metric_entries("metrics", self.metrics)
        if self.metrics is not None:
            if not self.metrics:
                raise UsageError("--metrics is empty. Give at least one metric, by a name that you choose.")
            first = next(iter(self.metrics.values()))
            self.metric, self.metric_kwargs = first["metric"], first.get("metric_kwargs")
        if self.contrast is not None and self.metrics is None:
            raise UsageError("--contrast needs --metrics, with the metrics that it names.")
        try:
            self.names = list(plan_results(self.metrics, self.contrast))
        except SettingsError as error:
            raise UsageError(in_flags(str(error), FLAGS)) from error
        super().__post_init__()
        if self.dataset_name is None:
            raise UsageError("--dataset_name is required: samples by Hub id or file (json, jsonl, parquet, csv, txt).")
        if self.keep_top is not None and not 0 < self.keep_top <= 1:
            raise UsageError(f"--keep_top is a share, above 0 and at most 1, got {self.keep_top}. E.g. 0.3.")
        at_least(1, num_repeats=self.num_repeats, metric_samples=self.metric_samples)
        at_least(2, path_points=self.path_points)
        at_least(0, num_shown=self.num_shown)
        if self.output_format not in ("parquet", "jsonl"):
            raise UsageError(f"--output_format must be 'parquet' or 'jsonl', got {self.output_format!r}.")

    @property
    def leading(self) -> str | None:
        """The name of the score by which samples are kept and shown."""
        return CONTRAST if self.contrast else self.names[0]


@dataclass
class AttributeStudentArguments(StudentArguments):
    """[`StudentArguments`], with a check of `per_token`."""

    def __post_init__(self):
        super().__post_init__()
        if self.per_token and self.attribution == "dataset":
            raise UsageError("--per_token: the naive baseline, --attribution dataset, has no scores of tokens.")


def check_folder(output_dir: Path) -> None:
    """Refuse the folder of another command."""
    check_no_training(output_dir)
    if not any(output_dir.glob("attribution*.jsonl")) and (output_dir / "summary.json").exists():
        raise UsageError(
            f"--output_dir {str(output_dir)!r} has the summary.json of another command. Choose another folder."
        )


def main(script_args: AttributeArguments, student_args: AttributeStudentArguments) -> None:
    state = process_state()
    script_args.set_threads()
    config = student_args.inner_loop_config()
    try:
        size = chunk_size(script_args.dataset_chunk, config.batch_size)
        output_dir = make_folder("output_dir", script_args.output_dir)
        check_folder(output_dir)
        with toy_world(script_args, student_args.seed, student_args, output_dir=script_args.output_dir):
            check_student(student_args)
            students = check_several(script_args, student_args)
            several = script_args.metrics
            metric: Any = make_metric(script_args) if several is None else make_metrics("metrics", several)
            dataset, samples = load_samples(script_args)
            replay = make_replay(student_args)
            check_token_ids(student_args, {str(script_args.metric): metric}, {"dataset_name": samples}, replay)
        check_scores(config)
        scored: Any = partial(Scored, script_args, metric=metric, size=size, replay=replay)
        if script_args.distill:
            distill(script_args, student_args, dataset, samples, scored)
            return
        scored = scored(samples)
        with ExitStack() as journals:
            each = {
                name: journals.enter_context(scored.by(own, journal_name(name, student_args)))
                for name, own in students.items()
            }
            if state.is_main_process:
                results = next(iter(each.values()))
                if len(each) > 1:
                    found = {name: own[None] for name, own in each.items()}
                    results = {None: combine_attributions(found, student_args.student_aggregation), **found}
                several_students = {name: vars(student_args)[name] for name in OF_SEVERAL} if len(each) > 1 else {}
                settings = scored.settings | several_students
                finish(script_args, results, dataset, samples, scored.student, settings)
    except JournalError as error:
        raise UsageError(in_flags(f"--output_dir: {error}", FLAGS)) from error
    except SettingsError as error:
        raise UsageError(in_flags(str(error), FLAGS)) from error


def finish(
    script_args: AttributeArguments,
    results: dict[str | None, Attribution],
    dataset,
    samples,
    student,
    settings: dict,
) -> None:
    """Write the results, and print them."""
    result = results[script_args.leading]
    if result.num_empty == len(samples):
        raise UsageError(
            f"None of the {len(samples)} samples of --dataset_name has a token to learn from. Name the column with "
            "the text by --dataset_text_field."
        )
    output_dir, kept = Path(script_args.output_dir), None
    figures = result.figures() | {"settings": json.loads(json.dumps(settings, default=str))}
    if script_args.metrics is not None:
        parts = {name: own.figures() for name, own in results.items()}
        own_keys = ("metric_before", "metric_after", "score")
        figures["metrics"] = {name: {key: part[key] for key in own_keys} for name, part in parts.items()}
        figures["contrast"], figures["ranked_by"] = script_args.contrast, script_args.leading
    elif len(results) > 1:
        figures["students"] = {name: own.figures() for name, own in results.items() if name is not None}
    if script_args.keep_top is not None:
        try:
            kept = result.top(script_args.keep_top)
        except SettingsError as error:
            raise UsageError(in_flags(f"--keep_top: {error}", FLAGS)) from error
        figures["num_kept"] = len(kept)
    figures |= best_and_worst(result.scores, samples, student, script_args.num_shown)
    files = write(results, dataset, output_dir, script_args.output_format, kept)
    for name in RESULTS:
        if output_dir / name not in files:
            (output_dir / name).unlink(missing_ok=True)  # of an earlier command; it would contradict the summary
    summary = output_dir / "summary.json"
    write_json(summary, figures)
    leave_manifest(output_dir, "attribute", asdict(script_args) | settings, dataset=settings["dataset_digest"])
    print(render(figures, in_flags(result.chance(), FLAGS), [*files, summary]))


def render(figures: dict[str, Any], chance: str, files: list[Path]) -> str:
    """A few lines for the terminal."""
    lines = [
        f"{figures['num_samples']} samples in {figures['seconds']:.0f} s; metric {figures['metric_before']:.6g} "
        f"before, {figures['metric_after']:.6g} after (mean of {figures['num_chunks']} students)",
        chance,
    ]
    for name, own in figures.get("metrics", figures.get("students", {})).items():
        before, after, agreement = own["metric_before"], own["metric_after"], own["score"]["rank_correlation"]
        known = "none" if agreement is None else f"{agreement:.2f}"
        lines.append(f"{name}: {before:.6g} before, {after:.6g} after; rank correlation {known}")
    if "ranked_by" in figures:
        lines.append(f"Samples are ranked by {figures['ranked_by']!r}.")
    return "\n".join([*lines, *ranking_lines(figures), "", f"Written: {', '.join(map(str, files))}"])


def make_parser(prog: str | None = None):
    from trl import TrlParser

    class Parser(TrlParser):
        """Knows whether `metric` was given beside `metrics`, and not by a recipe for `trl-dpg dpg`."""

        def parse_args_and_config(self, args=None, **kwargs):
            flags = {word.partition("=")[0] for word in args or ()}
            parsed = super().parse_args_and_config(args=args, **kwargs)
            if parsed[0].metrics is not None and flags & {"--metric", "--metric_kwargs"}:
                raise UsageError(
                    "--metric and --metrics both say what samples are scored by. Give --metrics alone, with the other "
                    "metric as one of its entries, or --metric alone."
                )
            return parsed

    return Parser((AttributeArguments, AttributeStudentArguments), prog=prog)


if __name__ == "__main__":
    from trl_dpg.scripts import launcher

    launcher.run("attribute", make_parser, main, sys.argv[1:])
