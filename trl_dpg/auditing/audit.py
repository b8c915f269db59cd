"""`audit`: what a dataset does to a student beyond a control, on a panel of metrics, and which rows do it."""

from collections.abc import Iterable, Mapping

from datasets import Dataset
from tqdm.auto import tqdm

from ..evaluation import without_empty
from ..metagradients import InnerLoopConfig
from ..metagradients.config import SettingsError
from ..metagradients.goals import MetricFunction, check_metrics
from ..student import Examples, Student
from .config import AuditConfig
from .control import undirected_control
from .effects import Effect, LoadStudent, as_dataset, disjoint_parts, fresh, look_at_panel, measure_effects
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

    Raises:
        `ValueError`: If the control is smaller than the dataset, a part would have less than 2 samples, or a metric
            returns no finite scalar tensor.
        `FloatingPointError`: If a metric is not finite after a fine-tuning.
    """
    return Auditor(student, dataset, control, metrics, config, settings, other_student, progress).run()


class Auditor:
    """One [`audit`], with its arguments. All that can be wrong with them is found before any student is trained."""

    def __init__(self, student, dataset, control, metrics, config, settings, other_student, progress: bool):
        self.config: InnerLoopConfig = config or InnerLoopConfig()
        self.settings: AuditConfig = settings or AuditConfig()
        self.config.check_numbers()
        check_metrics(metrics)
        self.settings.check_names(list(metrics))
        self.metrics, self.progress, seed = metrics, progress, self.settings.seed
        self.loads = [fresh(own) for own in (student, other_student) if own is not None]
        self.start = self.loads[0](seed)
        self.rows = without_empty(as_dataset(dataset, "dataset"))
        self.others = self.prepared_control(control)
        self.looks = [
            look_at_panel(load(seed), metrics, skip_failed=place > 0) for place, load in enumerate(self.loads)
        ]

    def prepared_control(self, control: Examples | None) -> Dataset:
        """The rows of the control that are not empty. One that is not given is written by the student."""
        number, parts = len(self.rows), self.settings.num_parts
        if number // parts < 2:
            raise SettingsError(
                f"`dataset` has {number} samples that are not empty, so that {parts} parts would have less than 2 "
                "each. Give more samples, or fewer `num_parts`."
            )
        if control is None:
            control = undirected_control(self.start, self.rows, self.config.max_length, self.settings.seed)
        others = without_empty(as_dataset(control, "control"))
        if len(others) < number:
            raise SettingsError(
                f"`control` has {len(others)} samples that are not empty, but the dataset has {number}. Give a "
                "control that is at least as large, or audit a part of the dataset."
            )
        return others

    def run(self) -> Audit:
        """The test, and what follows if something is found."""
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
        with self.bar(2 * settings.num_parts, ("Students on parts", "Another start")[place]) as bar:
            pairs = zip(*parts, strict=True)
            start = ("", ", from the other start")[place]
            return measure_effects(self.loads[place], before, pairs, metrics, self.config, settings, bar, start)

    def look_for_rows(self, result: Audit) -> None:
        """Score all rows, and check the scores by students without the best ones."""
        settings, found = self.settings, result.unwanted
        metrics = {name: self.metrics[name] for name in self.looks[0].differentiable}
        (others,) = disjoint_parts(self.others, len(self.rows), 1, settings.seed)  # those of the test
        attributions = scores_against_control(
            self.start, self.rows, others, metrics, self.config, settings.num_repeats, self.progress
        )
        result.scores = {name: own.scores[: len(self.rows)] for name, own in attributions.items()}
        result.rows = {name: rows_behind(found[name], attributions[name]) for name in found if name in metrics}
        ranked = {name: found[name] for name, own in result.rows.items() if not own.all_equal}
        if settings.share_removed is None or not ranked:
            return
        behind = {name: result.rows[name] for name in strongest(ranked)}
        number, seeds = max(1, round(settings.share_removed * len(self.rows))), settings.removal_seeds
        with self.bar(num_checks(len(behind), len(seeds)), "Without the best rows") as bar:
            sides = self.rows, self.others
            check_removal(self.loads[0], *sides, metrics, behind, self.config, number, seeds, bar)

    def bar(self, total: int, title: str) -> tqdm:
        return tqdm(desc=title, total=total, unit="student", disable=not self.progress, delay=0)
