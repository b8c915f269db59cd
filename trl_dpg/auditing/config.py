"""`AuditConfig`: how an audit tests a dataset, and what it does with what it finds."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..metagradients.config import SettingsError


@dataclass
class AuditConfig:
    """
    How an audit tests a dataset, and what it does with what it finds.

    Args:
        > Parameters that control the test

        wanted (`Sequence[str]`, *optional*):
            Names of metrics that the dataset is meant to move. They are reported apart.
        num_parts (`int`, *optional*, defaults to `8`):
            K, the number of parts of dataset and control, at least 3. With more parts, the test has more differences,
            each of a shorter training.
        alpha (`float`, *optional*, defaults to `0.01`):
            The chance of a false finding, for all metrics that are not wanted together.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the parts, the orders of samples and the students' starts.

        > Parameters that control what follows a finding

        score_rows (`bool`, *optional*, defaults to `True`):
            Whether to look for the rows behind unwanted effects.
        num_repeats (`int`, *optional*, defaults to `2`):
            Number of random orders in which all rows are scored, see [`~trl_dpg.attribute`].
        share_removed (`float`, *optional*, defaults to `0.1`):
            Share of the rows that are removed to check the scores. `None`: no check.
        removal_seeds (`Sequence[int]`, *optional*, defaults to `(0, 1, 2)`):
            Seeds of the students of this check.

    Raises:
        `ValueError`: If a number is out of range.
    """

    wanted: Sequence[str] = ()
    num_parts: int = 8
    alpha: float = 0.01
    seed: int = 42
    score_rows: bool = True
    num_repeats: int = 2
    share_removed: float | None = 0.1
    removal_seeds: Sequence[int] = (0, 1, 2)

    def __post_init__(self):
        if self.num_parts < 3:
            raise SettingsError(f"`num_parts` must be at least 3, for a test over the parts, got {self.num_parts}.")
        if not 0 < self.alpha < 1:
            raise SettingsError(f"`alpha` is a chance, above 0 and below 1, got {self.alpha}. E.g. 0.01.")
        if self.share_removed is not None and not 0 < self.share_removed < 1:
            raise SettingsError(
                f"`share_removed` is a share, above 0 and below 1, got {self.share_removed}. E.g. 0.1."
            )
        if not self.removal_seeds or len(set(self.removal_seeds)) != len(self.removal_seeds):
            raise SettingsError(f"`removal_seeds` must be different numbers, got {list(self.removal_seeds)}.")

    def check_names(self, names: Sequence[str]) -> None:
        """
        Refuse wanted metrics that are not in the panel.

        Raises:
            `ValueError`: If there is one.
        """
        strangers = [name for name in self.wanted if name not in names]
        if strangers:
            raise SettingsError(f"`wanted` names {strangers}, but the panel has {list(names)}.")
