"""
Choose samples such that their lengths follow a target, and mix datasets.

    trl-dpg mix --dataset_name samples.jsonl --target lognormal:400,0.6 --num_samples 2000 --output_dir mixed

The target is a form (`lognormal:MEDIAN,SIGMA`), a file that `trl-dpg lengths` has written, a dataset whose lengths are
followed, or JSON with a form or file for each difficulty. Samples that were cut off, are known to be wrong, repeat
others, or contain a text of `benchmarks` are left out. Short samples and other data can be mixed in.

Files in `output_dir`:

- `train.parquet` (or `.jsonl`): the mixture, with all columns, and `length`, `difficulty` and `source`.
- `mix.json`: the distances to the target before and after, what was left out, and what could not be filled.
- `README.md`: a dataset card.
- `rewrites`, with a teacher: its answers, as `trl-dpg teach` keeps them.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trl import TrlParser

from ..files import write_json, written_whole
from ..redaction import redacted
from ..rows import FILE_FORMATS
from .arguments import UsageError, at_least, from_json
from .data import check_no_training, load_data, make_folder, one_process
from .flags import in_flags
from .lengths import FLAGS as LENGTH_FLAGS
from .lengths import load_tokenizer, measure_data
from .manifest import leave_manifest
from .rewrites import RewriteArguments, make_rewriter


OPTIONS = (
    "num_samples",
    "bin_width",
    "difficulty_shares",
    "fill",
    "keep_truncated",
    "keep_wrong",
    "score_column",
    "deduplicate",
    "near_duplicates",
    "ngram",
    "short_ratio",
    "long_prompt",
    "short_prompt",
    "replay_ratio",
    "seed",
)
"""Arguments that are fields of [`~trl_dpg.practice.mixing.MixConfig`]."""
FLAGS = LENGTH_FLAGS | {
    name: name
    for name in (
        *OPTIONS,
        "short_dataset",
        "replay_dataset",
        "base_url",
        "request_parameters",
        "max_concurrency",
        "verifier",
    )
}


@dataclass
class MixArguments(RewriteArguments):
    """
    Arguments of `trl-dpg mix`, in addition to those of [`RewriteArguments`].

    Args:
        target (`str` or `dict[str, str]`, *optional*):
            The target: `lognormal:MEDIAN,SIGMA`; `quantiles:LEVEL=LENGTH,...`; `empirical:LENGTH,...`; a file of a
            fitted target; a file of a dataset, whose lengths are followed; or a mapping from difficulties to forms or
            files of fitted targets, JSON on the command line. Without it, samples are chosen at random.
        num_samples (`int`):
            Samples of the mixture.
        output_dir (`str`, *optional*, defaults to `"mixed"`):
            Folder for the mixture.
        output_format (`str`, *optional*, defaults to `"parquet"`):
            `"parquet"` or `"jsonl"`.
        overwrite (`bool`, *optional*, defaults to `False`):
            Replace an earlier mixture in `output_dir`.
        benchmarks (`list[str]`, *optional*):
            Files or Hub ids of benchmarks. A sample that shares a run of `ngram` words with one is left out.
        benchmark_column (`str`, *optional*):
            The benchmarks' column with the text. By default all columns that usually have text.
        short_dataset (`str`, *optional*), replay_dataset (`str`, *optional*):
            Short samples, and other data. A Hub id, or a file.
        bin_width, difficulty_shares, fill, keep_truncated, keep_wrong, score_column, deduplicate, near_duplicates,
        ngram, short_ratio, long_prompt, short_prompt, replay_ratio, seed:
            Those of [`~trl_dpg.practice.mixing.MixConfig`].
    """

    target: str | None = field(
        default=None,
        metadata={
            "help": "A form such as 'lognormal:400,0.6', a file of a fitted target or of a dataset, or JSON with one "
            "for each difficulty."
        },
    )
    num_samples: int | None = field(default=None, metadata={"help": "Samples of the mixture."})
    output_dir: str = field(default="mixed", metadata={"help": "Folder for the mixture."})
    output_format: str = field(default="parquet", metadata={"help": "'parquet' or 'jsonl'."})
    overwrite: bool = field(default=False, metadata={"help": "Replace an earlier mixture in output_dir."})
    bin_width: float = field(default=0.1, metadata={"help": "Width of the bins in log-length; 0.1 is about 10 %%."})
    difficulty_shares: str | None = field(
        default=None, metadata={"help": "JSON: share of each difficulty; as in the dataset by default."}
    )
    fill: bool = field(
        default=True, metadata={"help": "Let the nearest other lengths take the place of missing ones."}
    )
    keep_truncated: bool = field(default=False, metadata={"help": "Samples that were cut off may be chosen."})
    keep_wrong: bool = field(default=False, metadata={"help": "Samples that are known to be wrong may be chosen."})
    score_column: str | None = field(
        default=None, metadata={"help": "Column with scores, e.g. dpg_score; larger ones are preferred in each bin."}
    )
    deduplicate: str = field(default="exact", metadata={"help": "'exact', 'near' (also very similar ones) or 'none'."})
    near_duplicates: float = field(
        default=0.8, metadata={"help": "Similarity from which samples count as near duplicates."}
    )
    benchmarks: list[str] | None = field(
        default=None, metadata={"help": "Files or Hub ids of benchmarks that no sample may contain."}
    )
    benchmark_column: str | None = field(default=None, metadata={"help": "The benchmarks' column with the text."})
    ngram: int = field(default=13, metadata={"help": "Words of a run that no sample may share with a benchmark."})
    short_dataset: str | None = field(default=None, metadata={"help": "Short samples: a Hub id, or a file."})
    short_ratio: float = field(default=0.0, metadata={"help": "Share of short samples among long and short ones."})
    long_prompt: str = field(
        default="Think it through in detail before you answer.",
        metadata={"help": "Added to the prompts of long samples, if short ones are mixed in."},
    )
    short_prompt: str = field(
        default="Think briefly before you answer.", metadata={"help": "Added to the prompts of short samples."}
    )
    replay_dataset: str | None = field(default=None, metadata={"help": "Other data: a Hub id, or a file."})
    replay_ratio: float = field(default=0.0, metadata={"help": "Share of other data in the mixture."})
    seed: int = field(default=42, metadata={"help": "Seed of all choices and of the order."})

    def __post_init__(self):
        super().__post_init__()
        if self.num_samples is None:
            raise UsageError("--num_samples is required: the samples of the mixture.")
        at_least(1, num_samples=self.num_samples)
        if self.output_format not in ("parquet", "jsonl"):
            raise UsageError(f"--output_format must be 'parquet' or 'jsonl', got {self.output_format!r}.")
        if self.teacher is not None and self.short_dataset is not None:
            raise UsageError("--teacher writes short samples, and --short_dataset has them. Give one of the two.")
        if self.benchmark_column is not None and not self.benchmarks:
            raise UsageError("--benchmark_column names a column of --benchmarks. Give both.")
        shares = from_json("difficulty_shares", self.difficulty_shares)
        strange = [share for share in (shares or {}).values() if not isinstance(share, int | float)]
        if strange:
            raise UsageError(f"--difficulty_shares maps difficulties to numbers, got {strange[0]!r}.")
        self.difficulty_shares = shares  # type: ignore[assignment]

    def config(self):
        """The library's configuration. Its errors name the flags."""
        from trl_dpg.practice.lengths.rows import DataError
        from trl_dpg.practice.mixing import MixConfig

        try:
            return MixConfig(**{name: vars(self)[name] for name in OPTIONS})
        except DataError as error:
            raise UsageError(in_flags(str(error), FLAGS)) from error


def main(script_args: MixArguments) -> None:
    from trl_dpg.practice.lengths.rows import DataError
    from trl_dpg.practice.mixing import Sources, mix

    one_process("mix", "Start it without accelerate, or with --num_processes 1.")
    config = script_args.config()
    output_dir = Path(script_args.output_dir)
    files = [output_dir / name for name in (f"train.{script_args.output_format}", "mix.json", "README.md")]
    there = [path.name for path in files if path.exists()]
    if there and not script_args.overwrite:
        raise UsageError(
            f"--output_dir: {script_args.output_dir!r} has {' and '.join(there)} already. Choose another folder, or "
            "set --overwrite."
        )
    name = str(script_args.dataset_name)
    tokenizer = load_tokenizer(script_args.tokenizer)
    target = read_target(script_args, tokenizer)
    dataset = load_data(name, script_args.dataset_config, script_args.dataset_split)
    benchmark = read_benchmarks(script_args)
    short, replay = (
        None if path is None else load_data(path, flag=flag)
        for flag, path in (
            ("short_dataset", script_args.short_dataset),
            ("replay_dataset", script_args.replay_dataset),
        )
    )
    measured = measure_data(script_args, dataset, tokenizer)
    short_measured = None if short is None else measure_data(script_args, short, tokenizer, "short_dataset")
    try:
        rewriter = make_rewriter(script_args, tokenizer, output_dir / "rewrites")
        sources = Sources(dataset, measured, short, short_measured, replay, benchmark, rewriter)
        mixture = mix(sources, target, config, progress=True)
    except (DataError, ImportError) as error:
        raise UsageError(in_flags(str(error), FLAGS)) from error
    except UsageError:
        raise
    except ValueError as error:  # of a target, or of a teacher
        raise UsageError(in_flags(str(error), FLAGS)) from error
    make_folder("output_dir", output_dir)
    check_no_training(output_dir)
    figures = {"dataset": name, "target": None if target is None else target_text(script_args)} | mixture.figures
    write_dataset(mixture.dataset, files[0])
    write_json(files[1], figures | {"settings": asdict(script_args)})
    card(script_args, figures).save(files[2])
    leave_manifest(output_dir, "mix", asdict(script_args), dataset=dataset)
    print(render(figures))
    print(f"Written: {', '.join(map(str, files))}")


def read_target(script_args: MixArguments, tokenizer):
    """The target that the argument names."""
    from trl_dpg.length_target import LAYOUT, LengthTargets
    from trl_dpg.practice.lengths.summary import fit_all

    given: Any = script_args.target
    if given is None:
        return None
    path = Path(given) if isinstance(given, str) and not given.lstrip().startswith("{") else None
    if path is not None and path.suffix in FILE_FORMATS:
        fitted = path.suffix == ".json" and path.is_file() and LAYOUT in path.read_text(encoding="utf-8")[:1000]
        if not fitted:
            found = fit_all(measure_data(script_args, load_data(str(path), flag="target"), tokenizer, "target"))
            if not found["empirical"]:
                raise UsageError(f"--target: {given!r} has too few samples with a length to be followed.")
            return found["empirical"]
    try:
        return LengthTargets.read(given)
    except ValueError as error:
        raise UsageError(f"--target: {error}") from error


def target_text(script_args: MixArguments) -> str:
    """The target as it was given."""
    return script_args.target if isinstance(script_args.target, str) else json.dumps(script_args.target)


def read_benchmarks(script_args: MixArguments) -> list[str]:
    """The texts of the benchmarks."""
    from trl_dpg.practice.lengths.rows import DataError
    from trl_dpg.practice.mixing.cleaning import texts_of

    texts: list[str] = []
    for name in script_args.benchmarks or []:
        data, column = load_data(name, flag="benchmarks"), script_args.benchmark_column
        if column is None:
            try:
                texts += texts_of(data)
            except DataError as error:
                raise UsageError(f"--benchmarks {name!r}: {error} Name it by --benchmark_column.") from error
        elif column not in data.column_names:
            raise UsageError(f"--benchmark_column: {name!r} has no column {column!r} among {data.column_names}.")
        else:
            texts += [str(value) for value in data[column]]
    return texts


def write_dataset(dataset, path: Path) -> None:
    """Write the mixture such that the file is whole at any time."""
    with written_whole(path) as part:
        if path.suffix == ".parquet":
            dataset.to_parquet(part)
        else:
            dataset.to_json(part, force_ascii=False)


def render(figures: dict[str, Any]) -> str:
    """A few lines for the terminal."""
    left = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in figures["dropped"].items() if number)
    sources = ", ".join(f"{number} {name}" for name, number in figures["sources"].items())
    lines = [f"{figures['num_written']} of {figures['num_samples']} samples ({sources}). Left out: {left or 'none'}."]
    if "before" in figures:
        before, after = figures["before"], figures["after"]
        lines += [
            f"{'difficulty':>16} {'samples':>15} {'W1 in log-length':>16} {'KS':>15} {'effective samples':>17}",
            *(
                f"{name[:16]:>16} {_pair(b, a, 'num_samples', '.0f'):>15} {_pair(b, a, 'wasserstein', '.3f'):>16} "
                f"{_pair(b, a, 'ks', '.3f'):>15} {_pair(b, a, 'effective_sample_size', '.0f'):>17}"
                for name, b, a in [
                    *((n, before["by_difficulty"][n], after["by_difficulty"][n]) for n in after["by_difficulty"]),
                    ("all", before, after),
                ]
            ),
        ]
        for name, holes in figures["holes"].items():
            worst = sorted(holes, key=lambda hole: -hole["missing"])[:3]
            parts = [f"{h['missing']} of {h['wanted']} from {h['low']:.0f} to {h['high']:.0f}" for h in worst]
            more = sum(hole["missing"] for hole in holes) - sum(hole["missing"] for hole in worst)
            lines.append(f"Missing, {name}: {'; '.join(parts)}" + (f"; {more} elsewhere." if more else "."))
        if figures["num_from_other_lengths"]:
            lines.append(
                f"{figures['num_from_other_lengths']} samples of other lengths took the place of missing ones."
            )
    if "asked" in figures.get("short", {}):
        short = figures["short"]
        why = ", ".join(
            f"{number} {name}" for name, number in {**short["dropped"], "unanswered": short["unanswered"]}.items()
        )
        lines.append(f"{short['written']} of {short['asked']} rewrites can be used; the others: {why}.")
    if "prompt_for_use" in figures:
        lines.append(f"To use the student, ask it: {figures['prompt_for_use']!r}")
    return "\n".join([*lines, f"Counted: {figures['unit']}; difficulty: {figures['difficulty']}."])


def _pair(before: dict, after: dict, key: str, form: str) -> str:
    return f"{before[key]:{form}} → {after[key]:{form}}"


def card(script_args: MixArguments, figures: dict[str, Any]):
    """The dataset card: what was mixed, and how."""
    from huggingface_hub import DatasetCard, DatasetCardData

    data = DatasetCardData(task_categories=["text-generation"], tags=["trl", "dpg", "reasoning-length"])
    settings = json.dumps(redacted(asdict(script_args)), indent=2)
    return DatasetCard(f"""---
{data.to_yaml()}
---

# A mixture of {Path(str(script_args.dataset_name)).name}

Made by `trl-dpg mix`.

```text
{render(figures)}
```

## Settings

```json
{settings}
```
""")


def make_parser(prog: str | None = None) -> TrlParser:
    return TrlParser(MixArguments, prog=prog)


if __name__ == "__main__":
    from trl_dpg.scripts import launcher

    launcher.run("mix", make_parser, main, sys.argv[1:])
