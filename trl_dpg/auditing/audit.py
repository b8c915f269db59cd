"""`audit`: what a dataset does to a student beyond a control, on a panel of metrics, and which rows do it."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm

from ..attribution import Journal
from ..evaluation import without_empty
from ..metagradients import InnerLoopConfig
from ..metagradients.config import MEMORY_ONLY, SettingsError
from ..metagradients.goals import MetricFunction, check_metrics
from ..provenance import digest
from ..run_setup import metric_setup
from ..student import Examples, Student
from .config import AuditConfig
from .control import undirected_control
from .effects import (
    Effect,
    LoadStudent,
    Look,
    Measure,
    Values,
    as_dataset,
    disjoint_parts,
    fresh,
    look_at_panel,
    measure_effects,
    values_after,
)
from .journal import AuditJournal
from .result import Audit
from .rows import check_removal, mean_tokens, num_checks, rows_behind, scores_against_control, strongest


def audit(
    student: Student | LoadStudent,
    dataset: Examples,
    control: Examples | None,
    metrics: Mapping[str, MetricFunction],
    config: InnerLoopConfig | None = None,
    settings: AuditConfig | None = None,
    other_student: Student | LoadStudent | None = None,
    progress: bool = False,
    journal: str | Path | None = None,
    overwrite: bool = False,
) -> Audit:
    """
    Look for effects of a dataset on a student that a control does not have.

    Dataset and control are cut into disjoint random parts of equal size. Stock [`~trl.SFTTrainer`] fine-tunes a fresh
    student on each. The difference of a metric between the parts of both is tested by Student's t over the parts, with
    Holm's adjustment for the number of metrics. So an effect is compared with how much the metric varies between
    samples of one kind, and not with an absolute threshold.

    If there are unwanted effects, all rows are scored by all metrics in one attribution, see [`RowsBehind`]. Students
    on the dataset without its best rows show how much of the strongest effects comes from them. With `other_student`,
    the test is done again from another start.

    Args:
        student (`Student` or `Callable`):
            The student before fine-tuning, which is copied, or a function from a seed to a fresh student. With
            adapters, give a function, so that their start varies.
        dataset (`list[str]`, `list[dict]` or [`~datasets.Dataset`]):
            N samples, see [`Student.tokenize`].
        control (`list[str]`, `list[dict]`, [`~datasets.Dataset`] or `None`):
            Samples of the same kind and source without the suspected cause, N or more. `None`: the student writes
            them, see [`undirected_control`].
        metrics (`dict[str, Callable]`):
            The panel, by names that you choose, e.g. [`default_panel`]. Metrics without a gradient are tested as well,
            but rows are not scored by them.
        config (`InnerLoopConfig`, *optional*), settings (`AuditConfig`, *optional*):
            The inner loop, and how the audit is done.
        other_student (`Student` or `Callable`, *optional*):
            Another start: the same model from another seed, or another model. Metrics that it does not have, e.g. of
            a weight of another shape, are left out there and named in the result.
        progress (`bool`, *optional*, defaults to `False`):
            Show progress bars.
        journal (`str` or `Path`, *optional*):
            A file, e.g. `"audit.jsonl"`, from which an interrupted audit goes on. The scores of rows are in a journal
            beside it, `"audit_scores.jsonl"`. `wanted`, `alpha` and `share_removed` may be other ones than before.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to delete results of other settings in the journal.

    Raises:
        `ValueError`: If the control is smaller than the dataset, a part would have less than 2 samples, a metric
            returns no finite scalar tensor, or the journal has other settings or another student.
        `FloatingPointError`: If a metric is not finite after a fine-tuning.
    """
    with TemporaryDirectory() as folder:
        path = Path(journal or Path(folder, "audit.jsonl"))
        what = student, dataset, control, metrics, config, settings, other_student
        return Auditor(*what, progress, path, overwrite).run()


class Auditor:
    """
    One [`audit`], with its arguments.

    What is wrong with them is found before any student is trained: by the constructor, or by `begin`.
    """

    def __init__(
        self, student, dataset, control, metrics, config, settings, other_student, progress: bool, journal: Path,
        overwrite: bool = False
    ):  # fmt: skip
        self.config: InnerLoopConfig = config or InnerLoopConfig()
        self.settings: AuditConfig = settings or AuditConfig()
        self.config.check_numbers()
        check_metrics(metrics)
        self.settings.check_names(list(metrics))
        self.metrics, self.progress = metrics, progress
        self.loads = [fresh(own) for own in (student, other_student) if own is not None]
        self.start = self.loads[0](self.settings.seed)
        self.rows = without_empty(as_dataset(dataset, "dataset"))
        self.check_parts()
        self.others: Any = None if control is None else self.prepared(control)
        self.looks: list[Look] = []
        self.journal = AuditJournal(journal, self.described(), overwrite)

    def check_parts(self) -> None:
        """Refuse a dataset that has too few samples for the parts."""
        number, parts = len(self.rows), self.settings.num_parts
        if number // parts < 2:
            raise SettingsError(
                f"`dataset` has {number} samples that are not empty, so that {parts} parts would have less than 2 "
                "each. Give more samples, or fewer `num_parts`."
            )

    def prepared(self, control: Examples) -> Dataset:
        """The rows of a control that are not empty."""
        others, number = without_empty(as_dataset(control, "control")), len(self.rows)
        if len(others) < number:
            raise SettingsError(
                f"`control` has {len(others)} samples that are not empty, but the dataset has {number}. Give a "
                "control that is at least as large, or audit a part of the dataset."
            )
        return others

    def described(self) -> dict[str, Any]:
        """What the results in the journal depend on. Other settings may change when an audit goes on."""
        return {
            "student": self.start.describe(),
            "dataset": digest(self.rows),
            "control": None if self.others is None else digest(self.others),
            "metrics": {name: metric_setup(own) for name, own in self.metrics.items()},
            **{name: vars(self.settings)[name] for name in ("num_parts", "num_repeats", "removal_seeds")},
            "seed_of_parts": self.settings.seed,
            **{name: value for name, value in asdict(self.config).items() if name not in MEMORY_ONLY},
        }

    @property
    def scores_path(self) -> Path:
        """The journal of the scores of rows."""
        return self.journal.path.with_name(f"{self.journal.path.stem}_scores.jsonl")

    def begin(self) -> None:
        """What comes before the students, with the journal open: the control, and the panel at the starts."""
        config, seed, journal = self.config, self.settings.seed, self.journal
        if journal.is_new:
            self.scores_path.unlink(missing_ok=True)  # of other settings
        elif journal.done and self.progress:
            tqdm.write(f"{len(journal.done)} results are there already.", file=sys.stderr)
        if self.others is None:
            write = partial(undirected_control, self.start, self.rows, config.max_length, seed)
            self.others = self.prepared(journal.once("control", write))
        for place, load in enumerate(self.loads):
            look = look_at_panel(load(seed), self.metrics, skip_failed=place > 0)
            journal.compare(journal.once(f"start {place}", partial(dict, look.before)), look.before)
            self.looks.append(look)

    def run(self) -> Audit:
        """The test, and what follows if something is found."""
        with self.journal:
            self.begin()
            return self.audit()

    def audit(self) -> Audit:
        """The audit itself, after `begin`."""
        settings, scorable = self.settings, self.looks[0].differentiable
        not_scored = [name for name in self.metrics if name not in scorable]
        tokens = {"data": self.tokens(self.rows), "control": self.tokens(self.others)}
        effects = self.effects(0, self.metrics)
        result = Audit(effects, settings.alpha, self.rows, settings.num_parts, tokens, not_scored)
        if len(self.loads) > 1:
            result.not_on_other_start = self.looks[1].failed
            if there := [name for name in result.unwanted if name not in result.not_on_other_start]:
                result.other_start = self.effects(1, there)
        if settings.score_rows and set(result.unwanted) & set(scorable):
            self.look_for_rows(result)
        return result

    def tokens(self, rows: Dataset) -> float:
        return mean_tokens([own.num_supervised for own in self.start.tokenize(rows, self.config.max_length)])

    def effects(self, place: int, names: Iterable[str]) -> dict[str, Effect]:
        """The effects on some metrics of the student, or of the other one."""
        settings = self.settings
        parts = [
            disjoint_parts(side, len(self.rows), settings.num_parts, settings.seed)
            for side in (self.rows, self.others)
        ]
        metrics = {name: self.metrics[name] for name in names}
        before = {name: self.looks[place].before[name] for name in metrics}
        pairs, start = zip(*parts, strict=True), ("", ", from the other start")[place]
        with self.bar(2 * settings.num_parts, ("Students on parts", "Another start")[place]) as bar:
            return measure_effects(self.measure(place, bar), before, pairs, metrics, settings, start)

    def measure(self, place: int, bar: tqdm) -> Measure:
        """A function to the values of fresh students of a start. Values in the journal are not computed again."""

        def measure(rows: Dataset, metrics: Mapping[str, MetricFunction], seed: int, what: str) -> Values:
            new = partial(values_after, self.loads[place], rows, metrics, self.config, seed, what)
            name = f"{what}, seed {seed}: {', '.join(metrics)}"
            found = Values(**self.journal.once(name, lambda: asdict(new())))
            bar.update()
            return found

        return measure

    def look_for_rows(self, result: Audit) -> None:
        """Score all rows, and check the scores by students without the best ones."""
        settings, found = self.settings, result.unwanted
        metrics = {name: self.metrics[name] for name in self.looks[0].differentiable}
        (others,) = disjoint_parts(self.others, len(self.rows), 1, settings.seed)  # those of the test
        with Journal(self.scores_path, self.described()) as journal:
            attributions = scores_against_control(
                self.start, self.rows, others, metrics, self.config, settings.num_repeats, self.progress, journal
            )
        result.scores = {name: own.scores[: len(self.rows)] for name, own in attributions.items()}
        result.rows = {name: rows_behind(found[name], attributions[name]) for name in found if name in metrics}
        ranked = {name: found[name] for name, own in result.rows.items() if not own.all_equal}
        if settings.share_removed is None or not ranked:
            return
        behind = {name: result.rows[name] for name in strongest(ranked)}
        number, seeds = max(1, round(settings.share_removed * len(self.rows))), settings.removal_seeds
        with self.bar(num_checks(len(behind), len(seeds)), "Without the best rows") as bar:
            check_removal(self.measure(0, bar), self.rows, self.others, metrics, behind, number, seeds)

    def bar(self, total: int, title: str) -> tqdm:
        return tqdm(desc=title, total=total, unit="student", disable=not self.progress, delay=0)
