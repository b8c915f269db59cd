"""The result of a verification: figures, and whether each passes."""

import math
from dataclasses import dataclass, field

from .advice import Remedy


@dataclass
class Check:
    """
    One figure, and whether it passes.

    Attributes:
        name (`str`): Name of the figure, e.g. `"pearson"`.
        value (`float` or `None`): The figure. `None` if it could not be computed.
        threshold (`float` or `None`): The value that is needed to pass.
        status (`str`): `"pass"`, `"warn"`, `"fail"` or `"skip"`.
        meaning (`str`): What the figure measures. For a skipped check, the reason.
        advice (`str`): What to change. Empty if the check passes. Names of fields of [`InnerLoopConfig`] and of
            arguments of [`Student`] are in backticks.
    """

    name: str
    value: float | None
    threshold: float | None
    status: str
    meaning: str
    advice: str = ""

    def lines(self) -> list[str]:
        """The check as one or two lines for the terminal."""
        value = "" if self.value is None else f"{self.value:.3f}"
        line = f"{self.status:4}  {self.name:14} {value:>6}  {self.meaning}"
        return [line, f"      -> {self.advice}"] if self.advice else [line]


@dataclass
class Verification:
    """
    The result of [`verify`].

    Attributes:
        checks (`list[Check]`): The checks.
        remedies (`list[Remedy]`): Changes that were tried because a check did not pass, up to the first that helps.
        predicted (`list[float]`), actual (`list[float]`): Predicted and actual change of Φ in each direction.
        slope (`float`): The least-squares slope in actual ≈ slope · predicted.
        pearson_interval (`list[float]`): The 95 % confidence interval of `pearson`; see [`Agreement`].
        noise_scale (`float`): See [`GradientNoise`]; in samples.
        mean_square_gradient (`float`): See [`GradientNoise`].
        metric_before (`float`), metric_after (`float`): Φ before and after the student's fine-tuning.
        seconds (`float`): Time of the verification so far.
        passes (`int`): Forward and backward passes over all samples so far. Those over the metric's data count, too.
        complete (`bool`): Whether everything was measured.
    """

    checks: list[Check] = field(default_factory=list)
    remedies: list[Remedy] = field(default_factory=list)
    predicted: list[float] = field(default_factory=list)
    actual: list[float] = field(default_factory=list)
    slope: float = math.nan
    pearson_interval: list[float] = field(default_factory=lambda: [-1.0, 1.0])
    noise_scale: float = math.nan
    mean_square_gradient: float = math.nan
    metric_before: float = math.nan
    metric_after: float = math.nan
    seconds: float = math.nan
    passes: int = 0
    complete: bool = False

    @property
    def trustworthy(self) -> bool:
        """Whether no check failed."""
        return all(check.status != "fail" for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)

    def render(self) -> str:
        """The verdict and its reasons as text for the terminal. Names of fields are in backticks."""
        lines: list[str] = []
        for check in self.checks:
            lines += [line for line in check.lines() if line not in lines]  # several checks may have the same advice
        return "\n".join([*lines, *self.verdict()])

    def verdict(self) -> list[str]:
        """The last lines of `render`: what was tried, and whether the set-up is trustworthy."""
        lines = ["Tried:"] if self.remedies else []
        for remedy in self.remedies:
            figures = f"Pearson {remedy.pearson:.3f}, metasmoothness {remedy.metasmoothness:.3f}"
            lines.append(f"      {remedy.describe()}: {figures}")
        if self.remedies and self.remedies[-1].helps:
            lines.append(f"Change: {self.remedies[-1].describe()}")
        verdict = "trustworthy" if self.trustworthy else "NOT trustworthy"
        return [*lines, f"This set-up is {verdict} ({self.seconds:.0f} s)."]
