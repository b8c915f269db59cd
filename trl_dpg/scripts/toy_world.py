"""Toy worlds: sets arguments that are not given to models and data of `trl_dpg.toy`."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .arguments import WORLDS, ToyWorldArguments
from .data import make_folder, process_state
from .registry import call_with, resolve


def world_folder(output_dir: str) -> Path:
    """The folder of a toy world. It is not inside `output_dir`, which may be pushed to the Hub."""
    return Path(f"{output_dir.rstrip('/')}_world")


@contextmanager
def toy_world(
    script_args: ToyWorldArguments, seed: int, *others: Any, output_dir: str | None = None
) -> Iterator[None]:
    """
    A toy world, if the arguments name one. It is kept if there is an `output_dir`, and removed at the end otherwise.
    """
    from accelerate.utils import broadcast_object_list

    if script_args.toy_world is None:
        yield
        return
    state = process_state()
    with TemporaryDirectory() if output_dir is None else nullcontext(str(world_folder(output_dir))) as folder:
        (folder,) = broadcast_object_list([folder])  # the first process writes it
        make_world(Path(folder), script_args, seed, *others)
        yield
        state.wait_for_everyone()


OF_A_WORLD = ("student_models", "student_model_name_or_path", "replay_dataset")
"""Arguments whose values may be names of folders or files in the world."""


def _in(world: Path, name: str) -> str:
    return str(world / name) if (world / name).exists() and not Path(name).exists() else name


def make_world(world: Path, script_args: ToyWorldArguments, seed: int, *others: Any) -> None:
    """Write a toy world, and set the arguments for models and datasets that are not given to its files."""
    from accelerate import PartialState

    make = resolve(str(script_args.toy_world), WORLDS, "toy_world")
    if PartialState().is_main_process:
        make_folder("output_dir", world)
        kwargs = {"folder": world, "seed": seed} | (script_args.toy_world_kwargs or {})  # type: ignore[operator]
        call_with(make, kwargs, "toy_world_kwargs", str(script_args.toy_world))
    PartialState().wait_for_everyone()
    stand_ins = {"model_name_or_path": "generator", "student_model_name_or_path": "student"}
    stand_ins |= {"dataset_name": "prompts.jsonl"}
    if (world / "control.jsonl").exists():  # a world of samples, not of prompts
        stand_ins |= {"dataset_name": "samples.jsonl", "control": "control.jsonl"}
        stand_ins["other_student_model_name_or_path"] = "other_student"
    for arguments in (script_args, *others):
        several = vars(arguments).get("student_models") is not None
        for name, file in stand_ins.items():
            if vars(arguments).get(name, "") is None and not (several and file == "student"):
                setattr(arguments, name, str(world / file))
        for name in OF_A_WORLD:
            values = vars(arguments).get(name)
            if isinstance(values, list):
                setattr(arguments, name, [_in(world, value) for value in values])
            elif isinstance(values, str):
                setattr(arguments, name, _in(world, values))
    for entry in [vars(script_args), *(vars(script_args).get("metrics") or {}).values()]:
        parts = (entry.get("metric_kwargs") or {}).get("metrics") if entry.get("metric") == "combined" else None
        for own in [entry, *(parts if isinstance(parts, list) else [])]:
            if isinstance(own, dict):
                set_texts(own, world)


def set_texts(entry: dict[str, Any], world: Path) -> None:
    """The texts of a metric that has none: the world's file of its name or, without a name, the benchmark."""
    kwargs = entry.get("metric_kwargs") or {}
    if entry.get("metric") == "language_modeling" and not {"dataset", "texts"} & set(kwargs):
        entry["metric_kwargs"] = kwargs | {"dataset": str(world / f"{entry.get('name', 'benchmark')}.jsonl")}
