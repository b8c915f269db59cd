"""The file of fitted regressors, from which any process can score a part of the dataset."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files import written_whole
from .distil import Distillation, Regressor


ARRAYS = ("features", "scores", "held_out")


@dataclass
class Distilled:
    """
    Regressors, and the exact scores that they learned from.

    Attributes:
        regressors (`dict[str, Regressor]`): By the names of metrics. The only metric has the name `None`.
        rows (`np.ndarray` of shape `[n]`): The rows of the dataset that have exact scores.
        exact (`dict[str, np.ndarray]`): These scores `[n]`, by the same names.
        figures (`dict[str, Any]`): What is to be reported of them, as values that JSON can hold.
        settings (`dict[str, Any]`): What all of this depends on, as values that JSON can hold.
    """

    regressors: dict[Any, Regressor]
    rows: np.ndarray
    exact: dict[Any, np.ndarray]
    figures: dict[str, Any]
    settings: dict[str, Any]

    def check(self, floor: float) -> None:
        """Refuse regressors that say too little, see [`Distillation.check`]."""
        for name, own in self.regressors.items():
            own.described.check(floor, name)

    def exact_scores(self, number: int) -> dict[Any, np.ndarray]:
        """The exact scores by name, `[number]` for all rows of the dataset. NaN for those that have none."""
        found = {}
        for name, scores in self.exact.items():
            found[name] = np.full(number, np.nan, dtype=np.float32)
            found[name][self.rows] = scores
        return found

    def save(self, path: Path) -> None:
        """
        Write a file, npz, that is whole at any time. It holds what the regressors are fitted to, and no code.
        """
        described = [{"name": name, **asdict(own.described)} for name, own in self.regressors.items()]
        text = json.dumps({"settings": self.settings, "figures": self.figures, "regressors": described})
        arrays: dict[str, Any] = {"described": np.array(text), "rows": self.rows}
        for index, (name, own) in enumerate(self.regressors.items()):
            arrays |= {f"{kind}_{index}": vars(own)[kind] for kind in ARRAYS} | {f"exact_{index}": self.exact[name]}
        with written_whole(path) as beside, beside.open("xb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> "Distilled":
        """What is in a file. The regressors are fitted anew."""
        with np.load(path, allow_pickle=False) as arrays:
            described = json.loads(str(arrays["described"]))
            regressors, exact = {}, {}
            for index, own in enumerate(described["regressors"]):
                name = own.pop("name")
                regressors[name] = Regressor(Distillation(**own), *(arrays[f"{kind}_{index}"] for kind in ARRAYS))
                exact[name] = arrays[f"exact_{index}"]
            return cls(regressors, arrays["rows"], exact, described["figures"], described["settings"])

    @staticmethod
    def settings_of(path: Path) -> dict[str, Any]:
        """The settings in a file."""
        with np.load(path, allow_pickle=False) as arrays:
            return json.loads(str(arrays["described"]))["settings"]
