"""
Train a generator by Dataset Policy Gradients.

    trl-dpg dpg --config recipes/pattern_67/mini.yaml
    accelerate launch -m trl_dpg.scripts.dpg --config recipes/pattern_67/full.yaml --learning_rate 1e-6

After the training, fresh students are tested, unless `--evaluate false` is given. Stock SFTTrainer fine-tunes one on
newly sampled texts of the trained generator, and one on texts of the untrained generator. All figures are written to
`<output_dir>/summary.json`.

`--resume_from_checkpoint auto` goes on from the newest whole checkpoint in the output folder. If there is none, it
starts anew. SIGTERM, SIGUSR1 and Ctrl-C save a checkpoint and end with exit status 75 (docs/reliability.md).
"""

import gc
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from trl_dpg.files import write_json as write

from .arguments import DPGScriptArguments, UsageError, make_recipe_parser
from .data import check_model, check_student, check_token_ids, load_data, make_folder, make_prompts, make_replay
from .flags import in_flags
from .fresh_students import TRAINED, UNTRAINED, FreshStudents, judge, sample
from .manifest import leave_manifest
from .registry import make_held_out_metrics, make_metric, make_rewards
from .resuming import checkpoint, one_run, train
from .toy_world import make_world, world_folder


__all__ = [
    "checkpoint",
    "judge",
    "main",
    "make_parser",
    "make_toy_world",
    "make_trainer",
    "sample",
    "training_figures",
]


def make_toy_world(script_args: DPGScriptArguments, training_args, model_args) -> None:
    """Write the toy world, and set the arguments that are not given to its models and data."""
    world = world_folder(training_args.output_dir)
    make_world(world, script_args, training_args.seed, training_args, model_args)
    benchmark = str(world / "benchmark.jsonl")
    references = (
        {"references": [row["text"] for row in load_data(benchmark)]} if Path(benchmark).stat().st_size else {}
    )
    defaults: dict[str, dict] = {
        "levenshtein": references,
        "embedding_similarity": references | {"model": str(world / "encoder")},
        "language_id": {"language": "B", "model": str(world / "language_id.bin")},
        "target_language": {"language": (script_args.toy_world_kwargs or {}).get("language", "spa")},  # type: ignore
    }
    for name, entry in (script_args.held_out_metrics or {}).items():  # type: ignore[union-attr]
        kwargs = entry.get("metric_kwargs") or {}
        if entry["metric"] == "language_modeling" and not {"dataset", "texts"} & set(kwargs):
            entry["metric_kwargs"] = kwargs | {"dataset": str(world / f"{name}.jsonl")}
    given: dict[str, dict] = script_args.reward_kwargs or {}  # type: ignore[assignment]
    script_args.reward_kwargs = given | {
        name: defaults[name] | given.get(name, {}) for name in script_args.reward_funcs or [] if name in defaults
    }


def main(script_args, training_args, model_args, dataset_args):
    with one_run(make_folder("output_dir", training_args.output_dir)) as stop:
        train_and_test(script_args, training_args, model_args, dataset_args, stop)


def train_and_test(script_args, training_args, model_args, dataset_args, stop) -> None:
    """Train a generator, and test fresh students on its texts."""
    from accelerate import PartialState

    script_args.set_threads()
    if script_args.toy_world is not None:
        make_toy_world(script_args, training_args, model_args)
    check_model("model_name_or_path", model_args.model_name_or_path, **hub_kwargs(training_args, model_args))
    if training_args.student_server is None or script_args.evaluate:
        check_student(training_args)
    metric = make_metric(script_args)
    held_out = make_held_out_metrics(script_args)
    check_token_ids(training_args, {str(script_args.metric): metric} | held_out)
    rewards = make_rewards(script_args.reward_funcs, script_args.reward_kwargs)
    last = checkpoint(training_args)
    trainer = make_trainer(script_args, training_args, model_args, dataset_args, metric, rewards)
    trainer.restart.further = fixed_settings(script_args, model_args)
    check_server(trainer, metric)
    script_args.set_threads(trainer.model, *(student.model for student in trainer.dpg_reward.students))
    if not training_args.log_completions:
        show_live_table(trainer)
    evaluate = script_args.evaluate and PartialState().num_processes == 1
    if script_args.evaluate and not evaluate:
        trainer.accelerator.print("Several processes: fresh students are not tested, see `trl-dpg evaluate`.")
    fresh = None
    if evaluate:
        rows = first_rows(trainer, training_args.generation_batch_size)
        number, greedy = script_args.num_fresh_students, script_args.greedy_prompt
        fresh = FreshStudents(trainer, rows, metric, held_out, rewards, number, greedy)
        fresh.sample(UNTRAINED)

    train(trainer, last, stop)
    set_numbers(trainer.args, trainer.dpg_reward)
    seconds = trainer.restart.seconds
    summary = training_figures(trainer, seconds, script_args)
    trainer.save_model(training_args.output_dir)
    path = Path(training_args.output_dir, "summary.json")
    if trainer.is_world_process_zero():
        write(path, summary)  # before the fresh students, which may fail
        print(f"{summary['steps']} step{'s' * (summary['steps'] != 1)} in {seconds:.0f} s", flush=True)

    try:
        if fresh is not None:
            fresh.sample(TRAINED)
            for figures in fresh.judge():
                write(path, summary | figures)
                trainer.fresh_students = {state: figures[state] for state in (UNTRAINED, TRAINED)}
    except Exception:  # a signal is none, and ends at once
        publish(trainer, script_args.dataset_name)
        raise
    publish(trainer, script_args.dataset_name)
    if fresh is not None:
        print(f"\n{fresh.render()}\n")
    if trainer.is_world_process_zero():
        print(f"All figures: {path}")
    accelerator = trainer.accelerator
    accelerator.free_memory()
    del trainer  # DDP's reducer must be freed before the process group (gloo can wait for ever)
    gc.collect()
    accelerator.end_training()


def publish(trainer, dataset_name: str | None) -> None:
    """Write the manifest and the model card, and push the generator to the Hub if that was asked for."""
    from trl_dpg.run_setup import run_setup

    if trainer.is_world_process_zero():
        setup = run_setup(trainer, trainer.dpg_reward, trainer.restart.further)
        further = trainer.restart.further | setup.pop("further")
        settings = json.loads(trainer.args.to_json_string()) | further | setup.pop("settings") | setup
        leave_manifest(trainer.args.output_dir, "dpg", settings, prompts=setup["run"]["data"])
    trainer.create_model_card(dataset_name=dataset_name)
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)


def set_numbers(training_args, reward) -> None:
    """Set arguments of the student that are `auto` to the numbers that the training chose."""
    if reward.inner_loop_config.auto:  # a run that was resumed at its end makes no reward step
        raise UsageError(
            f"No step was left to train, and {str(reward.choice.path)!r} has no choice for this set-up. Give the "
            "numbers of the training in the place of auto, e.g. those of its dpg_config.json."
        )
    training_args.set_numbers(reward.inner_loop_config)


def hub_kwargs(training_args, model_args) -> dict[str, Any]:
    """Arguments of `from_pretrained` for the generator's files."""
    return {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}


def make_trainer(script_args, training_args, model_args, dataset_args, metric, rewards: list):
    """The [`DPGTrainer`] of a recipe. Settings that cannot be combined are usage errors."""
    from transformers import AutoTokenizer
    from trl import get_peft_config, get_quantization_config

    from trl_dpg import DPGTrainer
    from trl_dpg.metagradients.config import SettingsError
    from trl_dpg.student.loading import load_pretrained

    weights = training_args.reward_weights
    if weights is not None and len(weights) not in (len(rewards), 1 + len(rewards)):
        raise UsageError(
            f"--reward_weights has {len(weights)} weights for {1 + len(rewards)} rewards: DPG's, then --reward_funcs. "
            "DPG's may be left out; it is then 1."
        )
    path = model_args.model_name_or_path
    tokenizer = load_pretrained(
        AutoTokenizer, path, "the generator's tokenizer", **hub_kwargs(training_args, model_args)
    )
    data, replay = load_prompts(script_args, training_args, dataset_args, tokenizer), make_replay(training_args)
    model_init_kwargs = dict(
        revision=model_args.model_revision,
        attn_implementation=model_args.attn_implementation,
        dtype=model_args.dtype,
    )
    training_args.model_init_kwargs = model_init_kwargs | (training_args.model_init_kwargs or {})
    try:
        return DPGTrainer(
            model=path,
            target_metric=metric if training_args.student_server is None else None,
            args=training_args,
            reward_funcs=rewards,
            train_dataset=data["train"],
            eval_dataset=data.get("eval"),
            replay_dataset=None if replay is None else replay.rows,
            processing_class=tokenizer,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
    except SettingsError as error:
        raise UsageError(in_flags(str(error))) from error
    except ValueError as error:
        raise UsageError(str(error)) from error


def check_server(trainer, metric) -> None:
    """Refuse a server with another metric or inner loop than the arguments, with which fresh students are tested."""
    from dataclasses import asdict

    from trl_dpg.run_setup import metric_setup

    reward, own = trainer.dpg_reward, asdict(trainer.args.inner_loop_config())
    if reward.client is None:
        return
    reward.described()  # waits for the server
    if reward.client.known["metric"] != metric_setup(metric):
        raise UsageError(
            f"--student_server: the server's metric is {reward.client.known['metric']}, that of these arguments is "
            f"{metric_setup(metric)}. Start it with the same recipe, or change the arguments."
        )
    there = asdict(reward.inner_loop_config)
    changed = [name for name in reward.client.known["inner_loop"] if there[name] != own[name]]
    if changed:
        values = "; ".join(f"{name} is {there[name]!r} there, {own[name]!r} here" for name in changed)
        raise UsageError(
            f"--student_server: the server has another inner loop than these arguments ({values}). Start it with the "
            "same recipe, or change the arguments."
        )


def load_prompts(script_args, training_args, dataset_args, tokenizer) -> dict[str, Any]:
    """The prompts for training (`"train"`) and, if there is an evaluation, those for it (`"eval"`)."""
    from trl import get_dataset

    splits = {"train": script_args.dataset_train_split}
    if training_args.eval_strategy != "no":
        splits["eval"] = script_args.dataset_test_split
    if dataset_args.datasets:
        mixture = get_dataset(dataset_args)
        data = {key: mixture[split] for key, split in splits.items()}
    elif script_args.dataset_name is not None:
        name, config, streaming = script_args.dataset_name, script_args.dataset_config, script_args.dataset_streaming
        data = {key: load_data(name, config, split, streaming) for key, split in splits.items()}
    else:
        raise UsageError("--dataset_name is required: prompts by Hub id or file (json, jsonl, parquet, csv, txt).")
    return {key: make_prompts(split, script_args, tokenizer) for key, split in data.items()}


def show_live_table(trainer) -> None:
    """A table in the terminal, or lines of text, in the place of the trainer's own progress bar and figures."""
    from transformers import PrinterCallback, ProgressCallback

    from trl_dpg.live_table import LiveTable

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(LiveTable(Path(trainer.args.output_dir).name, reward=trainer.dpg_reward))


def first_rows(trainer, number: int):
    """
    The first rows of the trainer's dataset for evaluation, or for training if there is no evaluation.

    A dataset with fewer rows is repeated, as in the training.
    """
    from datasets import Dataset

    dataset = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
    return Dataset.from_list(list(itertools.islice(itertools.cycle(dataset), number)))


def fixed_settings(script_args, model_args) -> dict[str, Any]:
    """The settings that make a run what it is, beside those of the trainer: without its tests at the end."""
    tests = ("evaluate", "num_fresh_students", "held_out_metrics", "greedy_prompt", "num_threads")
    settings = vars(script_args) | vars(model_args)
    return {name: value for name, value in settings.items() if name not in tests}


def training_figures(trainer, seconds: float, script_args) -> dict[str, Any]:
    """The curves of a run, and their first and last values."""
    curves: dict[str, list[float]] = {}
    for logs in trainer.state.log_history:
        for name, value in logs.items():
            if name.startswith(("dpg/", "rewards/")) or name in ("entropy", "completions/mean_length"):
                curves.setdefault(name, []).append(value)
    return {
        "metric": script_args.metric,
        "seed": trainer.args.seed,
        "steps": trainer.state.global_step,
        "seconds": seconds,
        "training": {
            name: {"first": values[0], "last10": sum(values[-10:]) / len(values[-10:])}
            for name, values in curves.items()
        },
        "curves": curves,
    }


def make_parser(prog: str | None = None):
    return make_recipe_parser(prog)


if __name__ == "__main__":
    from trl_dpg.scripts import launcher

    launcher.run("dpg", make_parser, main, sys.argv[1:])
