"""What a reward keeps of its metric from step to step: the draw of texts, Φ at the start, the multipliers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from .metagradients import MetagradientOutput
from .metrics import CombinedMetric
from .metrics.constraints import Multiplier
from .metrics.draw import drawn
from .scored_batch import ScoredDataset
from .student import Student


class AtStart(NamedTuple):
    """Φ of the student before its fine-tuning, the values of a combined metric's parts, and what they depend on."""

    key: tuple
    value: float
    parts: dict[str, float]


class MetricState:
    """
    What a reward keeps of its metric from step to step.

    All of it depends on the number of the step and on values that are the same on all ranks. So it is the same on all
    ranks, and a run that goes on from a checkpoint has it again.

    Args:
        num_samples (`int`, *optional*): Texts of the metric that are drawn for each step. All of them when `None`.
        seed (`int`): Seed of the draws.

    Attributes:
        num_draws (`int`): Steps whose texts were drawn.
    """

    def __init__(self, num_samples: int | None, seed: int):
        self.num_samples, self.seed = num_samples, seed
        self.num_draws = 0
        self._drawn: int | None = None  # the draw that the metric reads now
        self._starts: WeakKeyDictionary[Student, AtStart] = WeakKeyDictionary()

    @contextmanager
    def texts(self, metric: Callable, training: bool) -> Iterator[None]:
        """Context in which the metric reads the texts of a step: in training those drawn for it, otherwise all."""
        number = self.num_samples if training else None
        with drawn(metric, number, [self.seed, self.num_draws]):
            self._drawn = None if number is None else self.num_draws
            self.num_draws += number is not None
            try:
                yield
            finally:
                self._drawn = None

    # -- Φ at the start ---------------------------------------------------------------------------------------------

    def known(self, student: Student, metric: Callable) -> float | None:
        """Φ at the start, if the student's weights, the metric and its texts are still the same."""
        start = self._starts.get(student)
        if start is None or start.key != self._key(student, metric):
            return None
        return start.value

    def remember(self, student: Student, metric: Callable, output: MetagradientOutput) -> MetagradientOutput:
        """Keep Φ at the start. Returns the output with the values of the parts at the start, if they were known."""
        key, start = self._key(student, metric), self._starts.get(student)
        parts = start.parts if start is not None and start.key == key else output.parts_before
        self._starts[student] = AtStart(key, output.metric_before, parts)
        if not is_constrained(metric):
            return replace(output, parts_before=parts)
        # the same number with a new sum: the multipliers change from step to step
        return replace(output, parts_before=parts, metric_before=metric.total(parts))  # type: ignore[attr-defined]

    def move(self, student: Student, metric: Callable, move: Callable[[Student], None]) -> None:
        """Move the student. It is the same student afterwards, with the same value of the metric."""
        same = self.known(student, metric) is not None
        move(student)
        if same:
            self._starts[student] = self._starts[student]._replace(key=self._key(student, metric))

    def _key(self, student: Student, metric: Callable) -> tuple:
        parameters = [(parameter.data_ptr(), parameter._version) for parameter in student.model.parameters()]
        return parameters, metric, self._drawn

    # -- multipliers ------------------------------------------------------------------------------------------------

    def react(self, metric: Callable, scored: list[ScoredDataset], training: bool) -> list[ScoredDataset]:
        """
        Update the multipliers of a metric with constraints by the results of a step, which all ranks have.

        Returns:
            `list[ScoredDataset]`: The results. The first one also has the multipliers that were in force, and how far
            the limits were exceeded.
        """
        if not is_constrained(metric):
            return scored
        outputs = [dataset.output for dataset in scored]
        changes = {
            name: sum(output.parts_after[name] - output.parts_before[name] for output in outputs) / len(outputs)
            for name in metric.names  # type: ignore[attr-defined]
        }
        found = {}
        for name, own in metric.constraints.items():  # type: ignore[attr-defined]
            found[f"multiplier/{name}"] = metric.multipliers[name].weight(own)  # type: ignore[attr-defined]
            found[f"violation/{name}"] = own.violation(changes[name])
        if training:
            metric.react(changes)  # type: ignore[attr-defined]
        return [scored[0]._replace(further=scored[0].further | found), *scored[1:]]

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def state(self, metric: Callable) -> dict[str, Any]:
        """The state between two steps, as values that JSON can hold."""
        multipliers = metric.multipliers if is_constrained(metric) else {}  # type: ignore[attr-defined]
        return {"num_draws": self.num_draws, "multipliers": {name: asdict(own) for name, own in multipliers.items()}}

    def load(self, metric: Callable, state: dict[str, Any]) -> None:
        """Take a state of [`MetricState.state`]."""
        self.num_draws = state["num_draws"]
        if is_constrained(metric):
            known = {name: Multiplier(**own) for name, own in state["multipliers"].items()}
            metric.multipliers = {name: known.get(name, own) for name, own in metric.multipliers.items()}  # type: ignore[attr-defined]


def is_constrained(metric: Any) -> bool:
    """Whether parts of a metric have limits."""
    return isinstance(metric, CombinedMetric) and bool(metric.constraints)
