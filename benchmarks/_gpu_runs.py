"""Checks of `gpu.py` that run trainings and commands."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pandas
import torch
from _gpu_costs import CARD, saved_llama
from _gpu_ranks import rank_scores
from _gpu_rows import Row, Setting, at_least, at_most, free_at_most, needs
from _side_by_side import _peak, _reset_peak

from tests.small_runs import PROMPTS, TEXTS
from tests.tiny import make_model, make_tokenizer
from tests.unroll import relative_error
from trl_dpg.scripts import dpg, quickstart
from trl_dpg.scripts.registry import make_metric, make_rewards


ROOT = Path(__file__).parents[1]
TINY_RECIPE = {
    "--max_steps": 1,
    "--per_device_train_batch_size": 8,
    "--gradient_accumulation_steps": 1,
    "--generation_batch_size": 8,
    "--max_completion_length": 8,
    "--max_prompt_tokens": 16,
    "--student_batch_size": 8,
    "--dtype": "float32",
    "--bf16": "false",
    "--dataloader_pin_memory": "false",
}


def recipe(setting: Setting):
    """Two reward steps of recipes/uuid/qlora.yaml with random weights and words, on a card with 24 GiB free."""
    path = saved_llama(setting)
    words = 600 if setting.real else 12  # more than `max_prompt_tokens`
    prompts = setting.folder / "prompts.jsonl"
    lines = [json.dumps({"text": " ".join(f"w{(k + j) % 50}" for j in range(words))}) for k in range(512)]
    prompts.write_text("\n".join(lines))
    flags = {
        "--model_name_or_path": path,
        "--student_model_name_or_path": path,
        "--dataset_name": prompts,
        "--dataset_train_split": "train",
        "--output_dir": setting.folder / "recipe",
        "--metric_kwargs": json.dumps({"texts": ["w1 w2 w3 w4 w5 w6 w7 w8"]}),
        "--max_steps": 16,
        "--logging_steps": 1,
        "--save_strategy": "no",
        "--report_to": "none",
        "--use_cpu": str(not setting.cuda).lower(),
    }
    flags |= {} if setting.real else TINY_RECIPE
    argv = ["--config", str(ROOT / "recipes/uuid/qlora.yaml"), *(str(x) for flag in flags.items() for x in flag)]
    script_args, training_args, model_args, dataset_args = dpg.make_parser().parse_args_and_config(args=argv)
    with free_at_most(setting, CARD):
        before = _reset_peak(setting.device)
        metric = make_metric(script_args)
        rewards = make_rewards(script_args.reward_funcs, script_args.reward_kwargs)
        trainer = dpg.make_trainer(script_args, training_args, model_args, dataset_args, metric, rewards)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        peak = (_peak(setting.device) - before) / CARD
    logs = [entry for entry in trainer.state.log_history if "dpg/seconds" in entry]
    shape = f"{training_args.generation_batch_size} completions of {training_args.max_completion_length} tokens"
    each = f"the reward {logs[-1]['dpg/seconds']:.1f} s each"
    yield Row(f"time of {len(logs)} reward steps of {shape}", f"{seconds:.1f} s, of which {each}")
    what = "peak, with generator and student, / 24 GiB"
    yield at_most(what, peak, 1.0) if setting.cuda else needs(what, "CUDA")


def quickstart_language(setting: Setting):
    """The quickstart's first act with both models on the device."""
    steps = 60 if setting.real else 1
    usual = quickstart.common_arguments
    arguments = lambda folder: usual(folder) | {"use_cpu": not setting.cuda}  # noqa: E731
    with mock.patch.object(quickstart, "common_arguments", arguments):
        summary = quickstart.language_act(setting.folder / "language", steps)
    first, last = summary["target_language_share_first"], summary["target_language_share_last10"]
    what = f"share of words in B: first of {steps} steps, last ten"
    yield at_least(what, last, 0.9, f", first {first:.2f}") if setting.real else Row(what, f"{first:.2f}, {last:.2f}")
    gained = summary["fresh_student_language_metric"] - summary["untrained_language_metric"]
    what = "Φ of a fresh student: trained - untrained generator"
    yield at_least(what, gained, 0.0) if setting.real else Row(what, f"{gained:.3f}")


# -- commands --------------------------------------------------------------------------------------------------------


def run(setting: Setting, *command: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a Python module in the repository's root. It may take the time that the check has left."""
    paths = os.pathsep.join([str(ROOT), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths} | environment,
        capture_output=True,
        text=True,
        timeout=0.9 * setting.seconds,
    )
    print(done.stdout, done.stderr, sep="\n", flush=True)
    return done


def checked(done: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(done.args[1:4])} ended with {done.returncode}: {done.stderr[-400:]}")
    return done


def launch(setting: Setting, *command: str) -> None:
    """Run a script on two processes."""
    checked(run(setting, "torch.distributed.run", "--standalone", "--nproc_per_node=2", *command))


def lacks_gpus(setting: Setting) -> bool:
    return setting.cuda and torch.cuda.device_count() < 2


def two_ranks(setting: Setting):
    """A reward on two ranks (NCCL on GPUs, gloo on the CPU) against one process."""
    what = "scores on two ranks: relative difference to one process"
    if lacks_gpus(setting):
        yield needs(what, "two GPUs")
        return
    path = setting.folder / "two_ranks.json"
    launch(setting, str(Path(__file__).with_name("_gpu_ranks.py")), setting.device, str(path))
    together = torch.tensor(json.loads(path.read_text()))
    yield at_most(what, relative_error(together, rank_scores(setting.device)), 1e-5)


def commands(setting: Setting):
    """`attribute` and `generate` on two processes, against one."""
    what = "`attribute` and `generate` on two processes"
    if lacks_gpus(setting):
        yield needs(what, "two GPUs")
        return
    folder = setting.folder / "commands"
    make_model(scale=1.0).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    for name, column, texts in (("samples", "text", TEXTS), ("prompts", "prompt", PROMPTS)):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({column: text}) for text in texts))
    metric = ["--metric", "language_modeling", "--metric_kwargs", json.dumps({"texts": ["w1 w2 w3 w4"]})]
    attribute = [
        "--student_model_name_or_path",
        str(folder / "model"),
        "--dataset_name",
        str(folder / "samples.jsonl"),
    ]
    attribute += [*metric, "--student_batch_size", "4", "--dataset_chunk", "4", "--output_format", "jsonl"]
    generate = ["--model_name_or_path", str(folder / "model"), "--dataset_name", str(folder / "prompts.jsonl")]
    generate += ["--max_completion_length", "6", "--batch_size", "4"]
    one_gpu = {"CUDA_VISIBLE_DEVICES": "0"} if setting.cuda else {}
    for name, flags, file in (("attribute", attribute, "scored.jsonl"), ("generate", generate, "train.parquet")):
        module, found = f"trl_dpg.scripts.{name}", {}
        for number in (1, 2):
            output = folder / f"{name}-{number}"
            command = [module, *flags, "--output_dir", str(output)]
            if number == 1:
                checked(run(setting, *command, **one_gpu))
            else:
                launch(setting, "-m", *command)
            found[number] = read(output / file)
        same = found[1].equals(found[2])
        yield Row(f"`{name}` on two processes", f"{len(found[2])} rows", "pass" if same else "fail", "the rows of one")


def read(path: Path) -> pandas.DataFrame:
    return pandas.read_json(path, lines=True) if path.suffix == ".jsonl" else pandas.read_parquet(path)


def engines(setting: Setting):
    """Three steps of a recipe with sharded generators, against DDP."""
    what = "Φ of the student in 3 steps: relative difference to DDP"
    if not setting.cuda or lacks_gpus(setting):
        yield needs(what, "two GPUs")
        return
    found = {}
    sharded = ["fsdp2", *(["zero2", "zero3"] if importlib.util.find_spec("deepspeed") else [])]
    for engine in ("multi_gpu", *sharded):
        output = setting.folder / engine
        flags = [
            "--config",
            str(ROOT / "recipes/pattern_67/mini.yaml"),
            "--max_steps",
            "3",
            "--output_dir",
            str(output),
        ]
        flags += ["--accelerate_config", engine, "--num_processes", "2", "--per_device_train_batch_size", "128"]
        checked(run(setting, "trl_dpg.cli", "dpg", *flags))
        logs = pandas.read_json(output / "dpg_log.jsonl", lines=True)
        found[engine] = torch.tensor(logs["dpg/metric_after"].dropna().to_numpy())
    for engine in sharded:
        yield at_most(f"{engine}: {what}", relative_error(found[engine], found["multi_gpu"]), 1e-3)
    if len(sharded) == 1:
        yield needs("zero2, zero3", "deepspeed")


def vllm(setting: Setting):
    what = "`generate --use_vllm`"
    if importlib.util.find_spec("vllm") is None:
        yield needs(what, "vllm")
        return
    output = setting.folder / "vllm"
    flags = ["--toy_world", "languages", "--num_samples", "16", "--max_completion_length", "8", "--use_vllm", "true"]
    checked(run(setting, "trl_dpg.scripts.generate", *flags, "--output_dir", str(output)))
    number = len(read(output / "train.parquet"))
    yield Row(what, f"{number} texts", "pass" if number == 16 else "fail", "16 texts")


def tests(setting: Setting):
    """The tests of this repository, with a process for each core."""
    what = "the tests on this machine"
    if importlib.util.find_spec("xdist") is None:
        yield needs(what, "pytest and pytest-xdist")
        return
    which = "tests" if setting.real else "tests/test_prefix_sums.py"
    workers = str(os.cpu_count() if setting.real else 0)
    flags = ["-p", "no:cacheprovider", "--continue-on-collection-errors", "-n", workers, "--dist", "worksteal"]
    try:
        done = run(setting, "pytest", which, *flags)
    except subprocess.TimeoutExpired:
        yield Row(what, f"not finished in {0.9 * setting.seconds:.0f} s", "open")
        return
    figure = done.stdout.strip().splitlines()[-1].strip("= ")
    yield Row(what, figure, "pass" if done.returncode == 0 else "fail", "none fails")
