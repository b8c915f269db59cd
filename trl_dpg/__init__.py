"""Dataset Policy Gradients for TRL."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING


__version__ = version("trl-dpg")

_MODULES = {
    "DPGConfig": "config",
    "DPGTrainer": "trainer",
    "DPGReward": "reward",
    "RestartCallback": "restart",
    "StopOnSignal": "stopping",
    "Student": "student",
    "FinetunedStudent": "student",
    "InnerLoopConfig": "metagradients",
    "MetagradientOutput": "metagradients",
    "metagradient": "metagradients",
    "Attribution": "attribution",
    "attribute": "attribution",
}

__all__ = list(_MODULES)

if TYPE_CHECKING:
    from .attribution import Attribution as Attribution
    from .attribution import attribute as attribute
    from .config import DPGConfig as DPGConfig
    from .metagradients import InnerLoopConfig as InnerLoopConfig
    from .metagradients import MetagradientOutput as MetagradientOutput
    from .metagradients import metagradient as metagradient
    from .restart import RestartCallback as RestartCallback
    from .reward import DPGReward as DPGReward
    from .stopping import StopOnSignal as StopOnSignal
    from .student import FinetunedStudent as FinetunedStudent
    from .student import Student as Student
    from .trainer import DPGTrainer as DPGTrainer


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return [*globals(), *__all__]
