"""
Target distributions of lengths, by difficulty.

A target is a quantile function: level u from 0 to 1 ↦ length in tokens. Distances and matching take logarithms of
lengths, so that 100 tokens are as far from 200 as 1000 are from 2000.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from scipy.special import ndtri


LAYOUT = "trl-dpg length target 1"
"""Stands in every file of a fitted target."""
ALL = "all"
"""The name of a target that is meant for every difficulty."""
FORMS = "'lognormal:MEDIAN,SIGMA' (sigma of the log-length), 'quantiles:LEVEL=LENGTH,...' or 'empirical:LENGTH,...'"


@dataclass(frozen=True)
class LengthTarget:
    """
    A distribution of lengths. The subclasses have a `form`, which is its name in files.

    Raises:
        `ValueError`: If a parameter is out of its range.
    """

    form: ClassVar[str]

    def quantile(self, levels: np.ndarray) -> np.ndarray:
        """Lengths in tokens at levels from 0 to 1, shape as given."""
        raise NotImplementedError

    def spread(self, number: int) -> np.ndarray:
        """The target as `number` lengths `[number]` of equal weight: the quantiles at (i - 1/2) / number."""
        return self.quantile((np.arange(number) + 0.5) / number)

    def as_json(self) -> dict[str, Any]:
        return {"form": self.form} | asdict(self)


@dataclass(frozen=True)
class LogNormal(LengthTarget):
    """
    The logarithm of the length is normal.

    Args:
        median (`float`): Median in tokens.
        sigma (`float`): Standard deviation of the natural logarithm.
    """

    form: ClassVar[str] = "lognormal"
    median: float
    sigma: float

    def __post_init__(self):
        if not (0 < self.median < np.inf and 0 < self.sigma < np.inf):
            raise ValueError(f"lognormal needs a median and a sigma above 0, got {self.median:g} and {self.sigma:g}.")

    def quantile(self, levels: np.ndarray) -> np.ndarray:
        return self.median * np.exp(self.sigma * ndtri(levels))


@dataclass(frozen=True)
class Quantiles(LengthTarget):
    """
    Lengths at some levels. Between them the logarithm of the length is interpolated.

    Args:
        levels (`list[float]`): Increasing levels, from 0 to 1.
        lengths (`list[float]`): Lengths in tokens, not decreasing.
    """

    form: ClassVar[str] = "quantiles"
    levels: list[float]
    lengths: list[float]

    def __post_init__(self):
        levels, lengths = np.asarray(self.levels), np.asarray(self.lengths)
        if len(levels) != len(lengths) or len(levels) < 2 or (np.diff(levels) <= 0).any():
            raise ValueError(f"quantiles needs two or more increasing levels with a length each, got {self.levels}.")
        if levels[0] < 0 or levels[-1] > 1:
            raise ValueError(f"quantiles needs levels from 0 to 1, got {self.levels}.")
        if not (np.isfinite(lengths).all() and (lengths > 0).all() and (np.diff(lengths) >= 0).all()):
            raise ValueError(f"quantiles needs lengths above 0 that do not decrease, got {self.lengths}.")

    def quantile(self, levels: np.ndarray) -> np.ndarray:
        return np.exp(np.interp(levels, self.levels, np.log(self.lengths)))


@dataclass(frozen=True)
class Empirical(LengthTarget):
    """
    The lengths of given samples.

    Args:
        lengths (`list[float]`): Increasing lengths in tokens.
        weights (`list[float]`): How often each occurs, or any other weight above 0.
    """

    form: ClassVar[str] = "empirical"
    lengths: list[float]
    weights: list[float]

    def __post_init__(self):
        lengths, weights = np.asarray(self.lengths), np.asarray(self.weights)
        if len(lengths) == 0 or len(lengths) != len(weights) or (np.diff(lengths) <= 0).any() or lengths[0] <= 0:
            raise ValueError("empirical needs increasing lengths above 0 with a weight each.")
        if not (np.isfinite(lengths).all() and np.isfinite(weights).all() and (weights > 0).all()):
            raise ValueError("empirical needs finite lengths, and finite weights above 0.")

    def quantile(self, levels: np.ndarray) -> np.ndarray:
        reached = np.cumsum(self.weights) / np.sum(self.weights)
        places = np.searchsorted(reached, np.asarray(levels) - 1e-12)  # rounding must not lift a level over a step
        return np.asarray(self.lengths, dtype=float)[np.minimum(places, len(self.lengths) - 1)]


FORM_CLASSES: dict[str, type[LengthTarget]] = {cls.form: cls for cls in (LogNormal, Quantiles, Empirical)}


class LengthTargets(dict[str, LengthTarget]):
    """Targets by difficulty. A target with the name `"all"` is that of every difficulty without its own."""

    def of(self, difficulty: str) -> LengthTarget:
        """
        The target of a difficulty.

        Raises:
            `ValueError`: If there is none.
        """
        target = self.get(difficulty) or self.get(ALL)
        if target is None and difficulty == ALL:
            raise ValueError(
                f"The target has lengths for {', '.join(map(repr, self))}, but the samples have no difficulty. "
                "Name its column, or give one target for all."
            )
        if target is None:
            raise ValueError(
                f"The target has no lengths for the difficulty {difficulty!r}; it has {', '.join(map(repr, self))}. "
                f"Add it, or a target {ALL!r} for all others."
            )
        return target

    @classmethod
    def read(cls, given: Any) -> "LengthTargets":
        """
        Targets from what a user gives.

        Args:
            given ([`LengthTargets`], [`LengthTarget`], `Mapping` or `str`):
                Targets; a target for every difficulty; a mapping from difficulties to targets; a form such as
                `"lognormal:200,0.5"`, `"quantiles:0=50,0.5=200,1=900"` or `"empirical:120,150,400"`; a JSON mapping;
                or the path of a fitted target, as `trl-dpg lengths` writes it.

        Raises:
            `ValueError`: If it is none of these, with what was expected.
        """
        if isinstance(given, cls):
            return given
        if isinstance(given, LengthTarget):
            return cls({ALL: given})
        if isinstance(given, str) and given.lstrip().startswith("{"):
            try:
                given = json.loads(given)
            except json.JSONDecodeError as error:
                raise ValueError(f"The target is not valid JSON: {given!r} ({error}).") from error
        if isinstance(given, str):
            return cls._from_file(Path(given)) if Path(given).is_file() else cls({ALL: parse_form(given)})
        if not isinstance(given, Mapping) or not given:
            raise ValueError(
                f"A target of lengths is {FORMS}, or a mapping from difficulties to these, got {given!r}."
            )
        if "form" in given:
            return cls({ALL: from_json(given)})
        targets = cls()
        for name, part in given.items():
            found = cls.read(part)
            if set(found) != {ALL}:
                raise ValueError(f"The target of the difficulty {name!r} is itself by difficulty. Give one target.")
            targets[str(name)] = found[ALL]
        return targets

    @classmethod
    def _from_file(cls, path: Path) -> "LengthTargets":
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{str(path)!r} is no file of a target of lengths ({error}).") from error
        if not isinstance(content, dict) or content.get("layout") != LAYOUT:
            raise ValueError(f"{str(path)!r} is no file of a target of lengths: it has no layout {LAYOUT!r}.")
        return cls({name: from_json(target) for name, target in content["targets"].items()})

    def as_json(self, **about: Any) -> dict[str, Any]:
        """The contents of a file, with further entries that say what was measured."""
        return {"layout": LAYOUT, **about, "targets": {name: target.as_json() for name, target in self.items()}}


def from_json(entry: Mapping[str, Any]) -> LengthTarget:
    """A target from its entry in a file."""
    values = dict(entry)
    form = values.pop("form", None)
    if form not in FORM_CLASSES:
        raise ValueError(f"Unknown form {form!r} of a target of lengths. Choose one of {', '.join(FORM_CLASSES)}.")
    try:
        return FORM_CLASSES[form](**values)
    except TypeError as error:
        raise ValueError(f"The form {form!r} of a target of lengths does not fit {values}: {error}.") from error


def parse_form(text: str) -> LengthTarget:
    """
    A target from its short form.

    Raises:
        `ValueError`: If it cannot be read.
    """
    form, colon, rest = text.partition(":")
    if form not in FORM_CLASSES or not colon:
        raise ValueError(
            f"{text!r} is neither a file nor a target of lengths. A target is {FORMS}, a mapping from difficulties to "
            "these in JSON, or a file that `trl-dpg lengths` has written."
        )
    parts = [part for part in rest.split(",") if part.strip()]
    try:
        if form == "quantiles":
            pairs = [part.split("=") for part in parts]
            return Quantiles([float(level) for level, _ in pairs], [float(length) for _, length in pairs])
        numbers = [float(part) for part in parts]
    except ValueError as error:
        if "quantiles needs" in str(error):
            raise
        raise ValueError(f"The target {text!r} cannot be read ({error}). A target is {FORMS}.") from error
    if form == "lognormal":
        if len(numbers) != 2:
            raise ValueError(f"The target {text!r} needs two numbers, the median and the sigma: lognormal:200,0.5.")
        return LogNormal(*numbers)
    lengths, counts = np.unique(numbers, return_counts=True)
    return Empirical(lengths.tolist(), counts.astype(float).tolist())
