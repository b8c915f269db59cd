"""What the checks of `gpu.py` share: where they run, the rows that they yield, and the memory of a device."""

from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


GIB = 2**30


class Setting(NamedTuple):
    """
    Where and how large the checks run.

    Attributes:
        device (`str`): `"cuda"` or `"cpu"`.
        real (`bool`): Whether models and data have a real size. Otherwise each check takes seconds on a CPU.
        folder (`Path`): A folder for models and results, which the checks share.
        seconds (`float`): Time that the check has.
    """

    device: str
    real: bool
    folder: Path
    seconds: float = 600.0

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"


class Row(NamedTuple):
    """
    One figure.

    Attributes:
        what (`str`): What was measured.
        figure (`str`): The figure, as text.
        state (`str`): `"pass"`, `"fail"`, `"measured"` (there is no limit), or `"open"` (not measured here).
        wanted (`str`): The limit, if there is one.
        value (`float` or `None`): The figure as a number.
    """

    what: str
    figure: str
    state: str = "measured"
    wanted: str = ""
    value: float | None = None


def at_most(what: str, value: float, limit: float, more: str = "") -> Row:
    return Row(what, f"{value:.3g}{more}", "pass" if value <= limit else "fail", f"at most {limit:g}", value)


def at_least(what: str, value: float, limit: float, more: str = "") -> Row:
    return Row(what, f"{value:.4f}{more}", "pass" if value >= limit else "fail", f"at least {limit:g}", value)


def needs(what: str, reason: str) -> Row:
    """A row that stays open here."""
    return Row(what, f"needs {reason}", "open")


@contextmanager
def tf32(enabled: bool):
    """Context in which float32 matrix products of a GPU use TF32, or do not."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if enabled else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def free_at_most(setting: Setting, size: int):
    """Context in which a GPU has no more than `size` bytes free. The rest is taken by a tensor that nobody uses."""
    import torch

    from trl_dpg.metagradients.memory import free_memory

    ballast = None
    if setting.cuda:
        torch.cuda.empty_cache()
        beyond = free_memory(torch.device("cuda")) - size
        ballast = torch.empty(max(0, beyond), dtype=torch.uint8, device="cuda")
    try:
        yield
    finally:
        del ballast


def allocated(setting: Setting) -> int:
    """Bytes of tensors on a GPU, or of a process on the CPU."""
    import psutil
    import torch

    return torch.cuda.memory_allocated() if setting.cuda else psutil.Process().memory_info().rss
