"""
`trl-dpg attribute --distill`: exact scores of a random sample of the dataset, learned for all of it.

The library side is `trl_dpg.attribution.distil`. Files in `output_dir`, beside the journal `attribution.jsonl`:

- `exact/scored.parquet`: the sample with its exact scores.
- `distilled.npz`: the regressors. It holds what they are fitted to.
- `scored/00000-of-00012.parquet` and so on: the dataset in shards, with all its columns, `dpg_score` (distilled, for
  all rows) and `dpg_score_exact` (for the rows of the sample).
- `top.parquet`, with `keep_top`, and `summary.json`.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from trl_dpg.attribution.corpus import Shards, exact_name, read_scores, score_shards
from trl_dpg.attribution.distil import COVERAGE, FLOOR, check_number, fit, make_regressor
from trl_dpg.attribution.distilled import Distilled
from trl_dpg.attribution.features import FeatureReader, blocks_of
from trl_dpg.attribution.result import Estimates, quantiles, score_columns, top_rows, write
from trl_dpg.files import write_json
from trl_dpg.provenance import file_hash
from trl_dpg.ranks import from_all_ranks
from trl_dpg.redaction import as_stored
from trl_dpg.run_setup import dataset_digest

from .arguments import CommandArguments, UsageError, at_least
from .data import make_folder, process_state
from .manifest import leave_manifest
from .output import say
from .scored_samples import best_and_worst, ranking_lines


OF_A_SHARD = "[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9].*"
FOLDERS = ("exact", "scored", "scored/notes")
NUM_BLOCKS = (1, 2, 4)
"""Numbers of the student's blocks that are tried by default."""
OWN = ("distill_samples", "distill_blocks", "distill_window", "distill_coverage", "distill_shard_size")
FURTHER = ("contrast", "num_repeats", "output_format", "dataset_name", "dataset_config", "dataset_split")
"""Settings on which distilled scores depend, beside those of the exact ones."""
FLAGS = {"num_samples": "distill_samples", "numbers": "distill_blocks", "floor": "distill_floor"}


@dataclass
class DistillArguments(CommandArguments):
    """
    Arguments of `trl-dpg attribute --distill`.

    Args:
        distill (`bool`, *optional*, defaults to `False`):
            Score a random sample of the dataset, and learn from it the scores of all rows.
        distill_samples (`int`, *optional*, defaults to `2000`):
            Number of samples with exact scores.
        distill_blocks (`list[int]`, *optional*):
            Numbers of the student's first blocks whose hidden states are tried as features. 0: the embeddings. By
            default 1, 2 and 4. The fewest that do as well as the best are used.
        distill_window (`int`, *optional*):
            The hidden states are those of this number of tokens at the beginning of a sample. By default all that the
            student is fine-tuned on.
        distill_floor (`float`, *optional*, defaults to `0.3`):
            Smallest rank correlation with exact scores, on held-out samples, with which the dataset is scored.
        distill_coverage (`float`, *optional*, defaults to `0.9`):
            Share of the samples whose exact score is to lie within the half width that is reported.
        distill_shard_size (`int`, *optional*, defaults to `10000`):
            Rows of a shard. An interrupted command goes on after the last whole shard.
        distill_fit_only (`bool`, *optional*, defaults to `False`):
            End when the regressor is there and tested. The same command without it, in any number of processes, goes
            on with the shards.
    """

    distill: bool = field(
        default=False, metadata={"help": "Score a random sample, and learn from it the scores of the whole dataset."}
    )
    distill_samples: int = field(default=2000, metadata={"help": "Number of samples with exact scores."})
    distill_blocks: list[int] | None = field(
        default=None,
        metadata={"help": "Numbers of first blocks whose hidden states are tried as features, by default 1 2 4."},
    )
    distill_window: int | None = field(
        default=None, metadata={"help": "Tokens of a sample whose hidden states are read; by default all."}
    )
    distill_floor: float = field(
        default=FLOOR, metadata={"help": "Smallest rank correlation on held-out samples that is accepted."}
    )
    distill_coverage: float = field(
        default=COVERAGE, metadata={"help": "Share of exact scores that are to lie within the reported half width."}
    )
    distill_shard_size: int = field(default=10_000, metadata={"help": "Rows of a shard."})
    distill_fit_only: bool = field(default=False, metadata={"help": "End before the shards are scored."})

    def __post_init__(self):
        super().__post_init__()
        at_least(1, distill_samples=self.distill_samples, distill_window=self.distill_window)
        at_least(1, distill_shard_size=self.distill_shard_size)
        for number in self.distill_blocks or ():
            at_least(0, distill_blocks=number)
        if not 0 < self.distill_coverage < 1:
            raise UsageError(f"--distill_coverage is a share between 0 and 1, got {self.distill_coverage}. E.g. 0.9.")
        if not -1 <= self.distill_floor <= 1:
            raise UsageError(f"--distill_floor is a correlation, from -1 to 1, got {self.distill_floor}. E.g. 0.3.")
        if self.distill_fit_only and not self.distill:
            raise UsageError("--distill_fit_only needs --distill.")


def distill(script_args, student_args, dataset, samples, scored: Callable) -> None:
    """
    Score a sample of a dataset, fit a regressor, and score the shards that no other process has.

    Args:
        script_args ([`AttributeArguments`]), student_args ([`AttributeStudentArguments`]): The arguments.
        dataset ([`~datasets.Dataset`]), samples ([`~datasets.Dataset`]): The rows, and what the student reads of them.
        scored (`Callable`): Maps samples to their [`Scored`].
    """
    if student_args.per_token:
        raise UsageError("--per_token: distilled scores are of samples. Leave out --distill or --per_token.")
    make_regressor("ridge", seed=0, num_samples=1, num_features=1)  # scikit-learn is there
    check_output(script_args, dataset.column_names)
    folder, main = Path(script_args.output_dir), process_state().is_main_process
    rng = np.random.default_rng(student_args.seed)
    rows = np.sort(rng.choice(len(dataset), min(script_args.distill_samples, len(dataset)), replace=False))
    sample = samples.select(rows)
    exactly = scored(sample)
    check_number(len(rows), script_args.distill_coverage)
    own = {name: vars(script_args)[name] for name in (*OWN, *FURTHER)} | exactly.run_settings(student_args)
    own = as_stored(own | {"corpus": dataset_digest(samples)})
    stored = folder / "distilled.npz"
    if from_all_ranks(lambda: main and is_fitted(stored, own, script_args.overwrite), "Reading the regressors")[0]:
        student = student_args.load_student()
        script_args.set_threads(student.model)
        reader = make_reader(script_args, student_args, student)
    else:
        with exactly.by(student_args, "attribution.jsonl", partial(blocks, script_args)) as results:
            student = exactly.student
            reader = make_reader(script_args, student_args, student)

            def fit_and_save() -> None:
                write(results, dataset.select(rows), make(folder / "exact"), script_args.output_format)
                say("Choosing a regressor ...")
                read = reader.read(sample, blocks(script_args, student))
                exact = {name: result.scores for name, result in results.items()}
                how = student_args.seed, script_args.distill_coverage
                regressors = {name: fit(*read, scores, *how) for name, scores in exact.items()}
                figures = {str(name): result.figures() for name, result in results.items()}
                Distilled(regressors, rows, exact, figures, own).save(stored)

            from_all_ranks(lambda: fit_and_save() if main else None, "Fitting the regressors")
    distilled = Distilled.load(stored)
    say("\n".join(described(distilled)))
    distilled.check(script_args.distill_floor)
    if script_args.distill_fit_only:
        return
    notes = make(folder / "scored" / "notes")
    own_format = script_args.distill_shard_size, script_args.output_format
    shards = Shards(notes.parent, len(dataset), *own_format, regressors=file_hash(stored))
    exact = distilled.exact_scores(len(dataset))
    score_shards(shards, dataset, samples, reader, distilled.regressors, exact, progress=True)
    if not main:
        return
    done = len(shards.notes())
    if done < shards.number:
        say(f"{done} of {shards.number} shards are done. The last of the other processes writes summary.json.")
        return
    with FileLock(notes / "finish.lock"):
        finish(script_args, distilled, shards, dataset, samples, student)


def check_output(script_args, columns: list[str]) -> None:
    """Refuse names of scores that are taken, and files and links in the place of folders."""
    check_columns(script_args.names, columns)
    for name in FOLDERS:
        if Path(script_args.output_dir, name).exists():
            make(Path(script_args.output_dir, name))


def check_columns(names: list[Any], there: list[str]) -> None:
    """Refuse names of metrics, and columns of the dataset, that are those of exact scores."""
    taken = {*there, *(score_columns(name)[0] for name in names)}
    for name in names:
        column = score_columns(exact_name(name))[0]
        if column in taken:
            raise UsageError(
                f"--distill writes exact scores to the column {column!r}, which is that of another metric or of the "
                "dataset. Rename it."
            )


def is_fitted(stored: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """Whether regressors for these settings are there. Those of others are deleted, with their shards."""
    found = Distilled.settings_of(stored) if stored.exists() else None
    if found == settings:
        return True
    shards = stored.parent / "scored"
    left = [*shards.glob("notes/*"), *shards.glob(OF_A_SHARD)]
    if left and not overwrite:
        changes = (
            f"{stored.name} is missing"
            if found is None
            else ", ".join(
                f"{name} (was {found.get(name)!r}, is {settings.get(name)!r})"
                for name in {**settings, **found}
                if settings.get(name) != found.get(name)
            )
        )
        raise UsageError(
            f"--output_dir: {str(stored.parent)!r} has distilled scores of other settings: {changes}. Choose another "
            "folder, or delete these scores with --overwrite."
        )
    for path in left:  # the folder may be a link to another disk
        path.unlink()
    stored.unlink(missing_ok=True)
    return False


def make(folder: Path) -> Path:
    """A folder in `output_dir`, in which links are refused."""
    return make_folder("output_dir", folder)


def make_reader(script_args, student_args, student) -> FeatureReader:
    return FeatureReader(student, student_args.student_max_length, script_args.distill_window)


def blocks(script_args, student) -> list[int]:
    """The numbers of blocks that are tried."""
    given, there = script_args.distill_blocks, len(blocks_of(student.model))
    if given is None:
        return sorted({min(number, there) for number in NUM_BLOCKS})
    if max(given) > there:
        raise UsageError(f"--distill_blocks {max(given)}: the student has {there} blocks.")
    return sorted(set(given))


def described(distilled: Distilled) -> list[str]:
    """What is known of the regressors, a line for each."""
    lines = []
    for name, regressor in distilled.regressors.items():
        own = regressor.described
        low, high = own.spearman_interval
        lines.append(
            f"{'' if name is None else f'{name}: '}{own.regressor} on the {own.pooling.replace('_', ' ')} of hidden "
            f"states after {own.num_blocks} blocks. Rank correlation with exact scores on {own.num_held_out} held-out "
            f"samples: {own.spearman:.2f} ({low:.2f} to {high:.2f}). {own.nominal:.0%} of exact scores should be "
            f"within {own.half_width:.3g} of the distilled ones. Of those held out, {own.coverage:.0%} are."
        )
    return lines


def finish(script_args, distilled: Distilled, shards: Shards, dataset, samples, student) -> None:
    """Write the summary and the best rows, and print them. All shards are done."""
    folder, leading = Path(script_args.output_dir), script_args.leading
    scores = {name: read_scores(shards, name) for name in distilled.regressors}
    seconds = sum(note["seconds"] for note in shards.notes())
    exact = distilled.figures[str(leading)]
    own_rate = len(dataset) / seconds
    figures: dict[str, Any] = {
        "num_samples": len(dataset),
        "num_scored": len(distilled.rows),
        "num_shards": shards.number,
        "seconds": seconds,
        "samples_per_second": own_rate,
        "times_as_fast_as_exact": own_rate / exact["samples_per_second"],
        "ranked_by": leading,
        "distilled": {str(name): asdict(own.described) for name, own in distilled.regressors.items()},
        "score": {str(name): quantiles(own) for name, own in scores.items()},
        "exact": distilled.figures,
        "settings": distilled.settings,
    }
    files = [*shards.files[:1], *(["..."] if shards.number > 1 else [])]
    top = folder / f"top.{script_args.output_format}"
    top.unlink(missing_ok=True)  # of an earlier command; it would contradict the summary
    if script_args.keep_top is not None:
        kept = top_rows(scores[leading], script_args.keep_top)
        figures["num_kept"] = len(kept)
        results = {name: Estimates(own[kept]) for name, own in scores.items()}
        files += write(results, dataset.select(kept), folder, script_args.output_format, file_name="top")
    figures |= best_and_worst(scores[leading], samples, student, script_args.num_shown)
    write_json(folder / "summary.json", figures)
    settings, corpus = asdict(script_args) | distilled.settings, distilled.settings["corpus"]
    leave_manifest(folder, "attribute", settings, dataset=corpus, sample=settings["dataset_digest"])
    lines = [
        f"{len(dataset)} samples in {seconds:.0f} s, {own_rate:.3g} a second: {figures['times_as_fast_as_exact']:.3g} "
        f"times as fast as exact scores ({exact['samples_per_second']:.3g} a second)"
    ]
    lines += [] if leading is None else [f"Samples are ranked by {leading!r}."]
    lines += [*ranking_lines(figures), "", f"Written: {', '.join(map(str, [*files, folder / 'summary.json']))}"]
    print("\n".join(lines))
