"""The predicted peak of a training on one device, and which settings lower it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from ..metagradients import InnerLoopConfig
from .generator_memory import GeneratorMemory
from .student_memory import Phase, StudentMemory


@dataclass
class Change:
    """
    A setting that lowers the peak.

    Attributes:
        setting (`str`): The field of the configuration.
        value (`Any`): Its new value.
        peak (`int`): The peak with it, and with the changes before it.
        phase (`str`): The phase of that peak.
        fits (`bool`): Whether this is enough.
    """

    setting: str
    value: Any
    peak: int
    phase: str
    fits: bool


@dataclass
class MemoryEstimate:
    """
    The memory of each phase of a training step on one device, in bytes.

    Attributes:
        phases (`list[Phase]`): What is in memory at the peak of each phase, by part.
        memory (`int`): What the device has.
        changes (`list[Change]`): If it does not fit: settings to change, one after the other, until it does.
    """

    phases: list[Phase]
    memory: int
    changes: list[Change] = field(default_factory=list)

    @property
    def peak(self) -> Phase:
        """The phase that takes the most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def fits(self) -> bool:
        return self.peak.total <= self.memory

    def figures(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {
            "fits": self.fits,
            "memory": self.memory,
            "peak": self.peak.total,
            "phase": self.peak.name,
            "phases": {phase.name: phase.parts | {"total": phase.total} for phase in self.phases},
            "changes": [asdict(change) for change in self.changes],
        }

    @property
    def _unit(self) -> tuple[float, str]:
        return (1e9, "GB") if self.peak.total > 1e10 else (1e6, "MB")

    def size(self, number: int) -> str:
        """A number of bytes in the unit of the table."""
        unit, name = self._unit
        return f"{number / unit:.1f} {name}"

    def render(self) -> str:
        """A table: a row for each part, a column for each phase."""
        parts = list(dict.fromkeys(name for phase in self.phases for name in phase.parts))
        unit, name = self._unit
        title = f"predicted peak, {name}"
        width = max(map(len, [title, *parts]))
        head = "  ".join(f"{phase.name:>11}" for phase in self.phases)
        rows = [f"{title:{width}}  {head}"]
        for name in parts:
            cells = (f"{phase.parts.get(name, 0) / unit:11.1f}" for phase in self.phases)
            rows.append(f"{name:{width}}  {'  '.join(cells)}")
        totals = "  ".join(f"{phase.total / unit:11.1f}" for phase in self.phases)
        return "\n".join([*rows, f"{'together':{width}}  {totals}"])


class Setup(NamedTuple):
    """
    A training, as far as its memory goes.

    Attributes:
        student_weights (`int`): Bytes of the student's weights.
        make_student (`Callable`): Makes a [`StudentMemory`] for an inner loop and the bytes that are free.
        config (`InnerLoopConfig`): The inner loop.
        generator (`GeneratorMemory` or `None`): The generator; `None`: only the student is on the device.
        memory (`int`): Bytes of the device.
        student_offload (`bool`): Whether the student is on the device in its own phases only.
    """

    student_weights: int
    make_student: Callable[[InnerLoopConfig, int], StudentMemory]
    config: InnerLoopConfig
    generator: GeneratorMemory | None
    memory: int
    student_offload: bool = False

    def phases(self) -> list[Phase]:
        """All phases with all that is in memory in them."""
        resident = {"student's weights": self.student_weights}
        if self.generator is not None:
            resident |= self.generator.resident()
        free = max(0, self.memory - sum(resident.values()))
        phases = self.make_student(self.config, free).phases()
        if self.generator is not None:
            phases = [self.generator.generation(), *phases, self.generator.update()]
        found = []
        for phase in phases:
            together = dict(resident)
            if self.student_offload and phase.name not in STUDENT_PHASES:
                together["student's weights"] = 0
            for name, size in phase.parts.items():
                together[name] = together.get(name, 0) + size
            found.append(Phase(phase.name, together))
        return found


STUDENT_PHASES = ("fine-tuning", "metric", "attribution")


def estimate(setup: Setup) -> MemoryEstimate:
    """
    The memory of a training. If it does not fit, settings that change no scores are tried, each on top of the last.

    Those that change what is trained (4 bits, adapters, shorter samples) are for the user to decide.
    """
    found = now = MemoryEstimate(setup.phases(), setup.memory)
    while not now.fits:
        better = _first_that_helps(setup, now)
        if better is None:
            break
        setup, now, change = better
        if found.changes and found.changes[-1].setting == change.setting:
            found.changes.pop()
        found.changes.append(change)
    if found.changes and found.changes[-1].peak == found.peak.total:
        found.changes.clear()  # no graphs were kept, and nothing else helps
    return found


def _first_that_helps(setup: Setup, now: MemoryEstimate) -> tuple[Setup, MemoryEstimate, Change] | None:
    for setting, value in _candidates(setup):
        if setting.startswith("student_") != (now.peak.name in STUDENT_PHASES) and not setting.startswith("vllm"):
            continue  # it does not matter to the phase of the peak
        changed = _with(setup, setting, value)
        tried = MemoryEstimate(changed.phases(), setup.memory)
        # Without graphs, smaller micro-batches help. Otherwise graphs may take the place that these leave
        if tried.peak.total < now.peak.total + (setting == "student_memory_budget"):
            return changed, tried, Change(setting, value, tried.peak.total, tried.peak.name, tried.fits)
    return None


def _candidates(setup: Setup):
    """Settings to try, those that cost the least time first."""
    config, generator = setup.config, setup.generator
    if generator is not None and generator.args.use_vllm and generator.args.vllm_mode == "colocate":
        if not generator.args.vllm_enable_sleep_mode:
            yield "vllm_enable_sleep_mode", True
    if config.memory_budget != 0:
        yield "student_memory_budget", "0"
    size = config.micro_batch_size or config.batch_size
    if size > 1:
        yield "student_micro_batch_size", size // 2
    if config.checkpoint_interval != "auto":
        yield "student_checkpoint_interval", "auto"
    if not config.offload_trajectory and generator is not None and generator.accelerator:
        yield "student_offload_trajectory", True
    if generator is not None:
        if not generator.args.gradient_checkpointing:
            yield "gradient_checkpointing", True
        if generator.args.per_device_train_batch_size > 1:
            yield "per_device_train_batch_size", generator.args.per_device_train_batch_size // 2


def _with(setup: Setup, setting: str, value: Any) -> Setup:
    """The set-up with a setting of the student or of the generator changed."""
    name = setting.removeprefix("student_")
    if name != setting:
        changed: dict[str, Any] = {name: int(value) if str(value).isdecimal() else value}
        return setup._replace(config=replace(setup.config, **changed))
    assert setup.generator is not None
    return setup._replace(generator=setup.generator.changed(name, value))
