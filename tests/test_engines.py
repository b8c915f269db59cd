"""The engines that train the generator: the rewards under each, the accelerate configs and the SLURM script."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed.run
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin, is_deepspeed_available

from tests.small_runs import TOKENIZER
from tests.tiny import make_model, on_two_processes
from trl_dpg import cli


ROOT = Path(__file__).parents[1]
RECIPE = str(ROOT / "recipes" / "new_language" / "8b.yaml")
DEEPSPEED = bool(is_deepspeed_available())
ZERO = pytest.mark.skipif(not DEEPSPEED, reason="needs deepspeed")
SHARE = {"fsdp2": 1.0, "zero2": 0.0, "zero3": 1.0}
"""The share of the generator's parameters that is sharded. ZeRO-2 shards gradients and the optimizer's states."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The results of both ranks by engine."""
    folder = tmp_path_factory.mktemp("engines")
    for name, seed in dict(generator=1, student=2).items():
        make_model(seed=seed, scale=1.0).save_pretrained(folder / name)
        TOKENIZER.save_pretrained(folder / name)
    engines = ["multi_gpu", "fsdp2", "multi_gpu-lora", "fsdp2-lora", *["zero2", "zero3"] * DEEPSPEED]
    process = on_two_processes("tests.engines", str(folder), *engines)
    assert process.returncode == 0, process.stderr[-3000:]
    return {
        engine: [json.loads((folder / f"{engine}-{rank}.json").read_text()) for rank in (0, 1)] for engine in engines
    }


@pytest.mark.faults
@pytest.mark.parametrize(
    "name", ["fsdp2", "fsdp2-lora", pytest.param("zero2", marks=ZERO), pytest.param("zero3", marks=ZERO)]
)
def test_a_generator_that_is_sharded_has_the_rewards_of_one_that_is_not(name, runs):
    engine, _, adapters = name.partition("-")
    (whole, _), (first, second) = runs[f"multi_gpu-{adapters}".rstrip("-")], runs[name]
    assert first["kind"] == ("FSDP" if engine == "fsdp2" else "DEEPSPEED") and first["sharded"] == SHARE[engine]
    assert first["trained"] == whole["trained"] == [bool(adapters)]
    assert first["student"] == second["student"] == whole["student"]  # whole on every rank
    assert first["buffers"] == second["buffers"] == whole["buffers"]
    assert len(whole["logs"]) == len(first["logs"]) == 3
    assert first["scores"] == pytest.approx(whole["scores"], rel=1e-5)
    for ours, theirs in zip(first["logs"], whole["logs"], strict=True):
        for name in ("dpg/metric_after", "dpg/score/std", "loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
    for then, again in zip(first["logs"], first["restarted"], strict=True):
        assert [again[name] for name in ("dpg/metric_after", "grad_norm")] == [
            then[name] for name in ("dpg/metric_after", "grad_norm")
        ]


def launch(monkeypatch, *arguments):
    """How the processes of one node are started: torch's configuration, their command and environment."""
    started = []
    monkeypatch.setattr(torch.distributed.run, "run", lambda args: started.append((args, dict(os.environ))))
    if not DEEPSPEED:
        monkeypatch.setattr("accelerate.commands.launch.is_deepspeed_available", lambda: True)
        runner = SimpleNamespace(DEEPSPEED_ENVIRONMENT_NAME="")
        for name, module in {
            "deepspeed": None,
            "deepspeed.launcher": None,
            "deepspeed.launcher.runner": runner,
        }.items():
            monkeypatch.setitem(sys.modules, name, module)
    cli.main(["dpg", *arguments])
    ((args, environment),) = started
    config, _, command = torch.distributed.run.config_from_args(args)
    return config, command, environment


NODES = ["--num_machines", "4", "--num_processes", "32", "--machine_rank", "2"]
NODES += ["--main_process_ip", "node7", "--main_process_port", "29500"]


@pytest.mark.parametrize("several_nodes", [False, True], ids=["one node", "four nodes"])
@pytest.mark.parametrize("engine", ["multi_gpu", *SHARE])
def test_an_accelerate_config_starts_its_engine(engine, several_nodes, monkeypatch):
    config, command, environment = launch(
        monkeypatch, "--accelerate_config", engine, "--config", RECIPE, *NODES * several_nodes
    )
    assert config.nproc_per_node == 8 and config.min_nodes == config.max_nodes == 1 + 3 * several_nodes
    assert command[-3:] == ["trl_dpg.scripts.dpg", "--config", RECIPE]
    if several_nodes:
        assert config.rdzv_endpoint == "node7:29500" and config.rdzv_configs["rank"] == 2
    monkeypatch.setattr(os, "environ", environment)
    if engine == "fsdp2":
        plugin = FullyShardedDataParallelPlugin()
        assert environment["ACCELERATE_USE_FSDP"] == "true" and plugin.fsdp_version == 2
        assert plugin.reshard_after_forward is True
    elif engine == "multi_gpu":
        assert not {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & set(environment)
    else:
        assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
        assert DeepSpeedPlugin().zero_stage == int(engine[-1])


def test_one_process_with_a_second_gpu_for_the_student_is_started_by_the_launcher(monkeypatch):
    """Without it, TRL's trainer sees two GPUs in one process and refuses."""
    flags = ["--accelerate_config", "multi_gpu", "--num_processes", "1", "--student_device", "cuda:1"]
    config, command, _ = launch(monkeypatch, *flags, "--config", RECIPE, "--student_offload", "false")
    assert config.nproc_per_node == 1 and command[-6:-4] == ["--student_device", "cuda:1"]


def test_the_slurm_script_starts_every_node_with_its_number(tmp_path, monkeypatch):
    commands = {
        "scontrol": 'if [ "$1" = show ]; then echo node7; echo node8; else echo "$@" >> "$LOG"; fi',
        "srun": 'shift 2; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" || status=$?; done; exit $status',
        "trl-dpg": 'printf "%s\\n" "$*" >> "$LOG"; exit 75',  # stopped by a signal
    }
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"
    slurm = dict(SLURM_NNODES="2", SLURM_JOB_NODELIST="node[7-8]", SLURM_JOB_ID="5", LOG=str(log))
    script = ["bash", str(ROOT / "examples" / "slurm.sh"), "--config", RECIPE, "--run_name", "two words"]
    ended = subprocess.run(script, env=os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    *nodes, queued = log.read_text().splitlines()
    assert ended.returncode == 75 and queued == "requeue 5" and len(nodes) == 2
    for rank, node in enumerate(nodes):
        flags = node.replace("two words", "two_words").split()[1:]
        config, command, environment = launch(monkeypatch, *flags)
        assert (config.min_nodes, config.nproc_per_node, config.rdzv_endpoint) == (2, 8, "node7:29500")
        assert config.rdzv_configs["rank"] == rank and "ACCELERATE_USE_FSDP" not in environment
        assert command[-6:] == ["--resume_from_checkpoint", "auto", "--config", RECIPE, "--run_name", "two_words"]
