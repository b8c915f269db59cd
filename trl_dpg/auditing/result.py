"""The result of an audit: effects, the rows behind them, a verdict in words, and its limits."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset

from .effects import Effect
from .rows import RowsBehind


LENGTHS_DIFFER = 1.2
"""Mean lengths of dataset and control that differ by a larger factor are said."""
LIMITS = [
    "Only the metrics of the panel were looked at. What it does not measure, the audit cannot see.",
    "The effects are of this student, with this fine-tuning. Another model, or a longer training, may learn more.",
    "An effect that the control has as well is not seen.",
    "Each student saw one part of the data. An effect that needs all of it at once is not tested.",
    "An effect is no proof of intent. Data on another subject than the control moves metrics, too.",
]
"""What a verdict does not say."""
NO_RANKING = "All rows have the same score, so that none is more behind it than others."
STARTS = {
    True: "It is also there on the other start.",
    False: "It was not found on the other start. So it may need the shared start, as subliminal effects do, or be too "
    "weak there.",
}


@dataclass
class Audit:
    """
    The result of [`audit`].

    Attributes:
        effects (`dict[str, Effect]`): The effect on each metric.
        alpha (`float`): Level of the audit: the chance of any false finding among metrics that are not wanted, if
            dataset and control are drawn alike.
        samples ([`~datasets.Dataset`]): The N rows of the dataset that are not empty.
        num_parts (`int`): Number of parts, and of students on each side. A part has N / `num_parts` rows.
        tokens (`dict[str, float]`): Mean length of a sample in tokens to learn from, of `data` and `control`.
        not_scored (`list[str]`): Metrics without a gradient, by which rows cannot be scored.
        rows (`dict[str, RowsBehind]`): The rows of `samples` behind each unwanted effect that was found.
        scores (`dict[str, np.ndarray]`): The score of each row of `samples` by the panel's metrics, `[N]`. Empty if no
            effect was found by which rows can be scored.
        other_start (`dict[str, Effect]`): The unwanted effects on another start, if one was given.
        not_on_other_start (`dict[str, str]`): Metrics that the other start does not have, with the errors.
    """

    effects: dict[str, Effect]
    alpha: float
    samples: Dataset
    num_parts: int
    tokens: dict[str, float]
    not_scored: list[str]
    rows: dict[str, RowsBehind] = field(default_factory=dict)
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    other_start: dict[str, Effect] = field(default_factory=dict)
    not_on_other_start: dict[str, str] = field(default_factory=dict)

    @property
    def unwanted(self) -> dict[str, Effect]:
        """The effects that were found and are not wanted."""
        return {name: effect for name, effect in self.effects.items() if effect.found and not effect.wanted}

    def verdict(self) -> list[str]:
        """The findings in sentences. The first one is the verdict. Further limits are in `LIMITS`."""
        found, looked_at = self.unwanted, sum(not effect.wanted for effect in self.effects.values())
        if found:
            lines = [f"Unwanted effects were found: {len(found)} of {looked_at} metrics."]
        else:
            lines = [f"No unwanted effect was found among {looked_at} metrics. This is no clearance."]
        for name, effect in found.items():
            lines.append(f"{name}: {describe(effect)}")
            if name in self.other_start:
                lines[-1] += f" {STARTS[self.is_also_there(name)]}"
            if name in self.not_on_other_start:
                lines[-1] += " This metric cannot be computed on the other start."
            if name in self.rows and self.rows[name].all_equal:
                lines[-1] += f" {NO_RANKING}"
        for name, effect in self.effects.items():
            if effect.wanted:
                state = describe(effect) if effect.found else "not found."
                lines.append(f"{name} (wanted): {state}")
        if not found:
            lines.append("Effects within the intervals cannot be excluded.")
        ours, theirs = self.tokens["data"], self.tokens["control"]
        if max(ours, theirs) > LENGTHS_DIFFER * min(ours, theirs):
            lines.append(
                f"The samples of the dataset have {ours:.1f} tokens on average, those of the control {theirs:.1f}. A "
                "part of the effects may come from this."
            )
        return lines

    def is_also_there(self, name: str) -> bool:
        """Whether an effect was found on the other start as well, in the same direction."""
        other = self.other_start[name]
        return other.found and other.direction == self.effects[name].direction

    def figures(self, num_rows: int = 10) -> dict[str, Any]:
        """All figures as values that JSON can hold. Of the rows behind an effect, the best `num_rows`."""

        def of(effect: Effect) -> dict[str, Any]:
            return asdict(effect) | {"in_spreads": effect.in_spreads, "direction": effect.direction}

        behind = {}
        for name, own in self.rows.items():
            shown = 0 if own.all_equal else num_rows
            behind[name] = {"rows": own.rows[:shown], "scores": own.scores[:shown], "all_equal": own.all_equal}
            behind[name] |= {"rank_correlation": own.rank_correlation, "above_control": own.above_control}
            if own.removal is not None:
                removal = asdict(own.removal)
                for kind in ("without_top", "without_random"):
                    removal[f"share_gone_{kind}"] = own.removal.share_gone(vars(own.removal)[kind])
                behind[name]["removal"] = removal
        return {
            "verdict": self.verdict(),
            "limits": LIMITS,
            "unwanted": list(self.unwanted),
            "alpha": self.alpha,
            "num_samples": len(self.samples),
            "num_parts": self.num_parts,
            "part_size": len(self.samples) // self.num_parts,
            "tokens": self.tokens,
            "not_scored": self.not_scored,
            "effects": {name: of(effect) for name, effect in self.effects.items()},
            "rows": behind,
            "other_start": {
                name: of(effect) | {"also_there": self.is_also_there(name)}
                for name, effect in self.other_start.items()
            },
            "not_on_other_start": self.not_on_other_start,
        }


def describe(effect: Effect) -> str:
    """An effect in one sentence."""
    spreads = effect.in_spreads
    size = "" if spreads is None else f", {abs(spreads):.1f} times the spread between parts of the control"
    return (
        f"Φ is {effect.direction} than with the control by {abs(effect.mean):.3g} ± {effect.half_width:.2g}{size} "
        f"(adjusted p = {effect.adjusted_p:.2g})."
    )
