"""
Report the lengths of a dataset's reasoning, and fit targets to them.

    trl-dpg lengths --dataset_name samples.jsonl --tokenizer Qwen/Qwen3-0.6B --output_dir lengths

Lengths are counted in the tokens of `tokenizer`: the reasoning if the samples have one, otherwise the whole text. The
report has quantiles and histograms by difficulty, correct against wrong samples, the share that was cut off, the share
of correct samples by length, and a reference dataset if one is given.

Files in `output_dir`:

- `lengths.json`: all figures.
- `lengths.html`, and its figures as PNGs.
- `target_empirical.json`, `target_lognormal.json`, `target_quantiles.json`: targets by difficulty that follow the
  lengths, for `trl-dpg mix --target` and for the reward `length_distribution`.
"""

import sys
from dataclasses import dataclass, field

from trl import TrlParser

from .arguments import UsageError
from .data import load_data, make_folder, one_process
from .flags import in_flags


FLAGS = {
    name: name
    for name in ("measure", "length_column", "difficulty", "difficulty_edges", "correct_column", "tokenizer")
}
"""What the library's arguments are called here."""


@dataclass
class LengthArguments:
    """
    Arguments that say what a sample's length, difficulty and correctness are. For `lengths` and `mix`.

    Args:
        dataset_name (`str`):
            The samples: a Hub id, or a file (json, jsonl, parquet, csv, txt).
        dataset_config (`str`, *optional*):
            Configuration of a dataset of the Hub.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            Split, e.g. `"train[:10000]"`.
        tokenizer (`str`, *optional*):
            Path or Hub id of the student's tokenizer. Without it, words are counted.
        measure (`str`, *optional*):
            `"reasoning"`, `"answer"` or `"all"`. By default the reasoning, if the samples have one, otherwise all.
        length_column (`str`, *optional*):
            A column with lengths, in the place of a tokenizer.
        difficulty (`str`, *optional*):
            A column with the difficulty, `"solved"` (the share of correct samples of a prompt) or `"none"`. By default
            the column `difficulty` if there is one; else `"solved"`, if it is known which samples are correct and
            prompts have several; else none.
        difficulty_edges (`list[float]`, *optional*):
            Where numbers of the difficulty are cut. For `"solved"` 1/3 and 2/3 by default.
        correct_column (`str`, *optional*):
            A column that says which samples are correct; `correct` by default, if there is one.
    """

    dataset_name: str | None = field(
        default=None, metadata={"help": "The samples: a Hub id, or a file (json, jsonl, parquet, csv, txt)."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset of the Hub."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset, e.g. 'train[:10000]'."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Path or Hub id of the student's tokenizer; words are counted without it."}
    )
    measure: str | None = field(
        default=None, metadata={"help": "'reasoning', 'answer' or 'all'; the reasoning, if there is one, by default."}
    )
    length_column: str | None = field(
        default=None, metadata={"help": "Column with lengths, in the place of a tokenizer."}
    )
    difficulty: str | None = field(
        default=None,
        metadata={"help": "Column with the difficulty, 'solved' (share of correct samples of a prompt) or 'none'."},
    )
    difficulty_edges: list[float] | None = field(
        default=None, metadata={"help": "Where numbers of the difficulty are cut, e.g. 0.33 0.67."}
    )
    correct_column: str | None = field(
        default=None, metadata={"help": "Column that says which samples are correct; 'correct' by default."}
    )

    def __post_init__(self):
        if self.dataset_name is None:
            raise UsageError("--dataset_name is required: samples by Hub id or file (json, jsonl, parquet, csv, txt).")
        if self.tokenizer is not None and self.length_column is not None:
            raise UsageError("--tokenizer counts lengths, and --length_column has them. Give one of the two.")


@dataclass
class LengthsArguments(LengthArguments):
    """
    Arguments of `trl-dpg lengths`, in addition to those of [`LengthArguments`].

    Args:
        reference_dataset (`str`, *optional*):
            A dataset to compare with: a Hub id, or a file.
        output_dir (`str`, *optional*, defaults to `"lengths"`):
            Folder for the report and the targets.
        title (`str`, *optional*):
            Title of the report.
    """

    reference_dataset: str | None = field(
        default=None, metadata={"help": "A dataset to compare with: a Hub id, or a file."}
    )
    output_dir: str = field(default="lengths", metadata={"help": "Folder for the report and the targets."})
    title: str | None = field(default=None, metadata={"help": "Title of the report."})


def load_tokenizer(name: str | None):
    """The tokenizer that counts lengths."""
    if name is None:
        return None
    from transformers import AutoTokenizer  # and with it torch, which takes seconds

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--tokenizer {name!r} could not be loaded: {str(error).splitlines()[0]} -- Give the path or Hub id of a "
            "model or tokenizer."
        ) from error


def measure_data(arguments: LengthArguments, dataset, tokenizer, flag: str = "dataset_name"):
    """What `measure` finds on a dataset. Its errors name the flags."""
    from trl_dpg.practice.lengths import measure
    from trl_dpg.practice.lengths.rows import DataError

    try:
        return measure(
            dataset,
            tokenizer,
            arguments.measure,
            arguments.length_column,
            arguments.difficulty,
            arguments.difficulty_edges,
            arguments.correct_column,
            progress=True,
        )
    except DataError as error:
        raise UsageError(f"--{flag}: {in_flags(str(error), FLAGS)}") from error


def main(script_args: LengthsArguments) -> None:
    from trl_dpg.files import write_json
    from trl_dpg.practice.lengths import summarize
    from trl_dpg.report.lengths import write_lengths_report

    one_process("lengths", "Start it without accelerate, or with --num_processes 1.")
    name = str(script_args.dataset_name)
    dataset = load_data(name, script_args.dataset_config, script_args.dataset_split)
    other = None
    if script_args.reference_dataset is not None:
        other = load_data(script_args.reference_dataset, flag="reference_dataset")
    tokenizer = load_tokenizer(script_args.tokenizer)
    measured = measure_data(script_args, dataset, tokenizer)
    if not (measured.lengths > 0).any():
        raise UsageError(
            f"None of the {len(dataset)} samples of --dataset_name has anything to measure (--measure "
            f"{measured.measure}). Choose another --measure."
        )
    reference = None if other is None else measure_data(script_args, other, tokenizer, "reference_dataset")
    figures, targets = summarize(measured, reference)
    about = {
        "dataset": name,
        "unit": measured.unit,
        "measure": measured.measure,
        "difficulty": measured.difficulty_from,
    }
    if script_args.reference_dataset is not None:
        about["reference"] = script_args.reference_dataset
    output_dir = make_folder("output_dir", script_args.output_dir)
    write_json(output_dir / "lengths.json", about | figures)
    for form, fitted in targets.items():
        write_json(output_dir / f"target_{form}.json", fitted.as_json(**about))
    page = write_lengths_report(figures, targets, output_dir, script_args.title or f"Lengths of {name}", about)
    print(render(figures))
    print(f"Counted: {measured.unit}; difficulty: {measured.difficulty_from}.")
    print(f"Written: {output_dir / 'lengths.json'}, {page}, its PNGs, and the targets {output_dir}/target_*.json")


def render(figures: dict) -> str:
    """A table for the terminal."""
    head = f"{'difficulty':>16} {'samples':>8} {'5%':>7} {'25%':>7} {'median':>7} {'75%':>7} {'95%':>7}"
    lines = [f"{head} {'truncated':>9} {'correct':>8}"]
    parts = figures["by_difficulty"]
    for name, part in ({"all": figures["overall"]} | (parts if len(parts) > 1 else {})).items():
        shown = [part["quantiles"].get(level) for level in ("0.05", "0.25", "0.5", "0.75", "0.95")]
        cells = " ".join(f"{'-' if value is None else f'{value:.0f}':>7}" for value in shown)
        correct = "-" if part["share_correct"] != part["share_correct"] else f"{part['share_correct']:.1%}"
        lines.append(f"{name[:16]:>16} {part['num_samples']:>8} {cells} {part['share_truncated']:>9.1%} {correct:>8}")
    if "reference" in figures:
        lines += [
            f"{name[:16]:>16} against the reference: Wasserstein-1 {part['wasserstein']:.3f} in log-length, "
            f"KS {part['ks']:.3f}"
            for name, part in figures["reference"].items()
        ]
    return "\n".join(lines)


def make_parser(prog: str | None = None) -> TrlParser:
    return TrlParser(LengthsArguments, prog=prog)


if __name__ == "__main__":
    from trl_dpg.scripts import launcher

    launcher.run("lengths", make_parser, main, sys.argv[1:])
