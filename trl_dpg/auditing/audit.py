"""`audit`: what a dataset does to a student beyond a control, on a panel of metrics, and which rows do it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm

from ..evaluation import without_empty
from ..metagradients import InnerLoopConfig
from ..metagradients.config import SettingsError
from ..metagradients.goals import MetricFunction, check_metrics
from ..student import Examples, Student
from .control import undirected_control
from .effects import Effect, LoadStudent, as_dataset, disjoint_parts, fresh, look_at_panel, measure_effects
from .result import Audit
from .rows import check_removal, mean_tokens, num_checks, rows_behind, score_rows, strongest


def audit(
    student: Student | LoadStudent,
    dataset: Examples,
    control: Examples | None,
    metrics: Mapping[str, MetricFunction],
    config: InnerLoopConfig | None = None,
    wanted: Sequence[str] = (),
    num_parts: int = 8,
    alpha: float = 0.01,
    share_removed: float | None = 0.1,
    removal_seeds: Sequence[int] = (0, 1, 2),
    num_repeats: int = 2,
    other_student: Student | LoadStudent | None = None,
    seed: int = 42,
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
        config (`InnerLoopConfig`, *optional*):
            The inner loop.
        wanted (`Sequence[str]`, *optional*):
            Names of metrics that the dataset is meant to move. They are reported apart.
        num_parts (`int`, *optional*, defaults to `8`):
            K, the number of parts, at least 3. More parts give a more exact test of smaller students' trainings.
        alpha (`float`, *optional*, defaults to `0.01`):
            The chance of a false finding, for all metrics that are not wanted together.
        share_removed (`float`, *optional*, defaults to `0.1`):
            Share of the rows that are removed to check the scores. `None`: no check.
        removal_seeds (`Sequence[int]`, *optional*, defaults to `(0, 1, 2)`):
            Seeds of the students of this check.
        num_repeats (`int`, *optional*, defaults to `2`):
            Number of random orders in which all rows are scored, see [`~trl_dpg.attribute`].
        other_student (`Student` or `Callable`, *optional*):
            Another start: the same model from another seed, or another model.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the parts, the orders of samples and the students' starts.
        progress (`bool`, *optional*, defaults to `False`):
            Show progress bars.

    Raises:
        `ValueError`: If the control is smaller than the dataset, a part would have less than 2 samples, `wanted` names
            no metric, a number is out of range, or a metric returns no finite scalar tensor.
    """
    config = config or InnerLoopConfig()
    config.check_numbers()
    check_metrics(metrics)
    check_settings(metrics, wanted, num_parts, alpha, share_removed, removal_seeds)
    load = fresh(student)
    start = load(seed)
    rows, others = prepared(start, dataset, control, config, num_parts, seed)
    before, differentiable = look_at_panel(start, metrics)
    before_other = None if other_student is None else look_at_panel(fresh(other_student)(seed), metrics)[0]

    def parts() -> Iterator[tuple[Dataset, Dataset]]:
        sides = (disjoint_parts(side, len(rows), num_parts, seed) for side in (rows, others))
        yield from zip(*sides, strict=True)

    settings: dict[str, Any] = {"config": config, "wanted": wanted, "alpha": alpha, "seed": seed}
    with _bar(2 * num_parts, "Students on parts", progress) as bar:
        effects = measure_effects(load, before, parts(), metrics, **settings, bar=bar)
    not_scored = [name for name in metrics if name not in differentiable]
    result = Audit(effects, alpha, rows, num_parts, {}, not_scored)
    for name, side in (("data", rows), ("control", others)):
        result.tokens[name] = mean_tokens([own.num_supervised for own in start.tokenize(side, config.max_length)])
    found = result.unwanted
    if found and before_other is not None:
        again: dict[str, MetricFunction] = {name: metrics[name] for name in found}
        first = {name: before_other[name] for name in found}
        with _bar(2 * num_parts, "Another start", progress) as bar:
            load_other = fresh(other_student)  # type: ignore[arg-type]  # not None here
            result.other_start = measure_effects(load_other, first, parts(), again, **settings, bar=bar)
    scored = {name: metrics[name] for name in differentiable}
    if set(found) & set(scored):
        attributions = score_rows(start, rows, others, scored, config, num_repeats, progress)
        result.scores = {name: own.scores[: len(rows)] for name, own in attributions.items()}
        result.rows = {name: rows_behind(found[name], attributions[name]) for name in found if name in scored}
        if share_removed is not None:
            _check(result, load, rows, others, metrics, config, share_removed, removal_seeds, progress)
    return result


def check_settings(
    metrics: Mapping[str, object],
    wanted: Sequence[str],
    num_parts: int,
    alpha: float,
    share_removed: float | None,
    removal_seeds: Sequence[int],
) -> None:
    """
    Refuse settings that are out of range.

    Raises:
        `ValueError`: If one is.
    """
    strangers = [name for name in wanted if name not in metrics]
    if strangers:
        raise SettingsError(f"`wanted` names {strangers}, but the panel has {list(metrics)}.")
    if num_parts < 3:
        raise SettingsError(f"`num_parts` must be at least 3, for a test over the parts, got {num_parts}.")
    if not 0 < alpha < 1:
        raise SettingsError(f"`alpha` is a chance, above 0 and below 1, got {alpha}. E.g. 0.01.")
    if share_removed is not None and not 0 < share_removed < 1:
        raise SettingsError(f"`share_removed` is a share, above 0 and below 1, got {share_removed}. E.g. 0.1.")
    if not removal_seeds or len(set(removal_seeds)) != len(removal_seeds):
        raise SettingsError(f"`removal_seeds` must be different numbers, got {list(removal_seeds)}.")


def prepared(
    student: Student, dataset: Examples, control: Examples | None, config: InnerLoopConfig, num_parts: int, seed: int
) -> tuple[Dataset, Dataset]:
    """The rows of dataset and control that are not empty. A control that is not given is written by the student."""
    rows = without_empty(as_dataset(dataset, "dataset"))
    if len(rows) // num_parts < 2:
        raise SettingsError(
            f"`dataset` has {len(rows)} samples that are not empty, so that {num_parts} parts would have less than 2 "
            "each. Give more samples, or fewer `num_parts`."
        )
    if control is None:
        control = undirected_control(student, rows, config.max_length, seed)
    others = without_empty(as_dataset(control, "control"))
    if len(others) < len(rows):
        raise SettingsError(
            f"`control` has {len(others)} samples that are not empty, but the dataset has {len(rows)}. Give a control "
            "that is at least as large, or audit a part of the dataset."
        )
    return rows, others


def _check(result: Audit, load, rows, others, metrics, config, share: float, seeds, progress: bool) -> None:
    """The removal check of the strongest effects."""
    found: dict[str, Effect] = {name: result.effects[name] for name in result.rows}
    behind = {name: result.rows[name] for name in strongest(found)}
    number = max(1, round(share * len(rows)))
    with _bar(num_checks(len(behind), len(seeds)), "Without the best rows", progress) as bar:
        check_removal(load, rows, others, metrics, behind, config, number, seeds, bar)


def _bar(total: int, title: str, progress: bool) -> tqdm:
    return tqdm(desc=title, total=total, unit="student", disable=not progress, delay=0)
