"""
Train a generator by Dataset Policy Gradients.

    trl-dpg dpg --config recipes/pattern_67/mini.yaml
    accelerate launch -m trl_dpg.scripts.dpg --config recipes/pattern_67/full.yaml --learning_rate 1e-6

After the training, fresh students are tested, unless `--evaluate false` is given. Stock SFTTrainer fine-tunes one on
newly sampled texts of the trained generator, and one on texts of the untrained generator. All figures are written to
`<output_dir>/summary.json`.

`--resume_from_checkpoint auto` goes on from the last checkpoint in the output folder. If there is none, it starts
anew.
"""

import gc
import inspect
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

from .arguments import SAMPLING, DPGScriptArguments, UsageError, make_recipe_parser
from .data import check_model, check_student, load_data, make_folder, make_prompts
from .registry import make_metric, make_rewards
from .toy_world import make_world, world_folder


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
    given: dict[str, dict] = script_args.reward_kwargs or {}  # type: ignore[assignment]
    script_args.reward_kwargs = given | {
        name: defaults[name] | given.get(name, {}) for name in script_args.reward_funcs or [] if name in defaults
    }


def main(script_args, training_args, model_args, dataset_args):
    from accelerate import PartialState

    script_args.set_threads()
    if script_args.toy_world is not None:
        make_toy_world(script_args, training_args, model_args)
    check_model("model_name_or_path", model_args.model_name_or_path, **hub_kwargs(training_args, model_args))
    check_student(training_args)
    output_dir = make_folder("output_dir", training_args.output_dir)
    metric = make_metric(script_args)
    rewards = make_rewards(script_args.reward_funcs, script_args.reward_kwargs)
    trainer = make_trainer(script_args, training_args, model_args, dataset_args, metric, rewards)
    if sys.stdout.isatty() and not training_args.log_completions:
        show_live_table(trainer)
    evaluate = script_args.evaluate and PartialState().num_processes == 1
    if script_args.evaluate and not evaluate:
        trainer.accelerator.print("Several processes: fresh students are not tested, see `trl-dpg evaluate`.")
    texts: dict[str, list[str]] = {}
    if evaluate:
        rows = first_rows(trainer, training_args.generation_batch_size)
        texts["untrained"] = sample(trainer, rows["prompt"])

    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint(training_args))
    set_numbers(training_args, trainer.dpg_reward)
    summary = training_figures(trainer, time.perf_counter() - started, script_args)
    trainer.save_model(training_args.output_dir)
    path = output_dir / "summary.json"
    if trainer.is_world_process_zero():
        write(path, summary)  # before the fresh students, which may fail

    try:
        if evaluate:
            texts["trained"] = sample(trainer, rows["prompt"])
        for name, samples in texts.items():
            summary[name] = judge(samples, rows, training_args, metric, rewards, script_args.greedy_prompt)
            write(path, summary)
    finally:
        trainer.fresh_students = {name: summary[name] for name in texts if name in summary}
        trainer.create_model_card(dataset_name=script_args.dataset_name)
        if training_args.push_to_hub:
            trainer.push_to_hub(dataset_name=script_args.dataset_name)
    if trainer.is_world_process_zero():
        print(render(summary) + f"\nAll figures: {path}")
    accelerator = trainer.accelerator
    accelerator.free_memory()
    del trainer  # DDP's reducer must be freed before the process group (gloo can wait for ever)
    gc.collect()
    accelerator.end_training()


def set_numbers(training_args, reward) -> None:
    """Set arguments of the student that are `auto` to the numbers that the training chose."""
    from trl_dpg.tuning import read_figures

    config = reward.inner_loop_config
    if config.auto:  # a run that was resumed at its end has made no reward step
        config = read_figures(reward.tuning_file).apply(config)
    training_args.set_numbers(config)


def checkpoint(training_args) -> str | None:
    """The checkpoint to go on from. `"auto"` is the last one of the output folder, if there is one."""
    from transformers.trainer_utils import get_last_checkpoint

    if training_args.resume_from_checkpoint == "auto":
        return get_last_checkpoint(training_args.output_dir)
    return training_args.resume_from_checkpoint


def hub_kwargs(training_args, model_args) -> dict[str, Any]:
    """Arguments of `from_pretrained` for the generator's files."""
    return {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}


def make_trainer(script_args, training_args, model_args, dataset_args, metric, rewards: list):
    """The [`DPGTrainer`] of a recipe. Settings that cannot be combined are usage errors."""
    from transformers import AutoTokenizer
    from trl import get_peft_config, get_quantization_config

    from trl_dpg import DPGTrainer

    weights = training_args.reward_weights
    if weights is not None and len(weights) not in (len(rewards), 1 + len(rewards)):
        raise UsageError(
            f"--reward_weights has {len(weights)} weights for {1 + len(rewards)} rewards: DPG's, then --reward_funcs. "
            "DPG's may be left out; it is then 1."
        )
    path = model_args.model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(path, **hub_kwargs(training_args, model_args))
    data = load_prompts(script_args, training_args, dataset_args, tokenizer)
    model_init_kwargs = dict(
        revision=model_args.model_revision,
        attn_implementation=model_args.attn_implementation,
        dtype=model_args.dtype,
    )
    training_args.model_init_kwargs = model_init_kwargs | (training_args.model_init_kwargs or {})
    try:
        return DPGTrainer(
            model=path,
            target_metric=metric,
            args=training_args,
            reward_funcs=rewards,
            train_dataset=data["train"],
            eval_dataset=data.get("eval"),
            processing_class=tokenizer,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


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
    """A table in the terminal in the place of the trainer's own progress bar."""
    from transformers import PrinterCallback, ProgressCallback

    from trl_dpg.live_table import LiveTable

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(LiveTable(Path(trainer.args.output_dir).name))


def first_rows(trainer, number: int):
    """The first rows of the trainer's dataset for evaluation, or for training if there is no evaluation."""
    from datasets import Dataset

    dataset = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
    return Dataset.from_list(list(itertools.islice(dataset, number)))


def write(path: Path, figures: dict[str, Any]) -> None:
    """Write figures as JSON."""
    path.write_text(json.dumps(figures, indent=2, ensure_ascii=False))


def sample(trainer, prompts) -> list[str]:
    """Completions, sampled with the settings of the trainer."""
    from trl_dpg.generation import generate_texts

    args = trainer.args
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.train()  # as in training; eval mode would pack a 4-bit model for inference, which cannot be undone
    return generate_texts(
        model,
        trainer.processing_class,
        prompts,
        args.max_completion_length,
        seed=args.seed,
        chat_template_kwargs=args.chat_template_kwargs,
        generation_kwargs=args.generation_kwargs,
        **{name: vars(args)[name] for name in SAMPLING},
    )


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


def judge(texts: list[str], rows, args, metric, rewards: list, greedy_prompt: str | None = None) -> dict[str, Any]:
    """
    Test a fresh student on texts, and compute the further rewards of the texts.

    Args:
        texts (`list[str]`): Completions.
        rows ([`~datasets.Dataset`]): The row of the prompts' dataset for each text.
        args ([`DPGConfig`]): The student and its fine-tuning.
        metric (`Callable`): Φ.
        rewards (`list`): Reward functions. Asynchronous functions and reward models are left out.
        greedy_prompt (`str`, *optional*): A prompt that the student completes greedily.
    """
    from datasets import Dataset

    from trl_dpg.evaluation import evaluate_dataset
    from trl_dpg.generation import prompt_completion_pairs
    from trl_dpg.metrics import Metric

    pairs = prompt_completion_pairs(rows["prompt"], texts)
    data: Any = Dataset.from_list(pairs) if args.train_on == "prompt_completion" else texts
    result = evaluate_dataset(args.load_student, data, metric, args.inner_loop_config(), args.seed)
    figures: dict[str, Any] = result.figures()
    columns = {name: list(rows[name]) for name in rows.column_names if name != "prompt"}
    for reward in rewards:
        if callable(reward) and not inspect.iscoroutinefunction(reward):
            completions = [pair["completion"] for pair in pairs]
            values = reward(prompts=list(rows["prompt"]), completions=completions, **columns)
            values = [value for value in values if value is not None]
            figures[reward.__name__] = sum(values) / max(len(values), 1)
    if isinstance(metric, Metric):
        figures |= metric.readout(result.finetuned)
    if greedy_prompt is not None:
        figures["greedy"] = result.finetuned.generate(greedy_prompt)
    return figures | {"samples": texts[:8]}


def render(summary: dict[str, Any]) -> str:
    """The main figures as lines for the terminal."""
    lines = [f"{summary['steps']} steps in {summary['seconds']:.0f} s"]
    for name in ("untrained", "trained"):
        if name in summary:
            figures = {k: v for k, v in summary[name].items() if isinstance(v, float | str)}
            shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v!r}" for k, v in figures.items())
            lines.append(f"fresh student on the {name} generator's texts: {shown}")
    return "\n".join(lines)


def make_parser(prog: str | None = None):
    return make_recipe_parser(prog)


if __name__ == "__main__":
    from trl_dpg.scripts import launcher

    launcher.run("dpg", make_parser, main, sys.argv[1:])
