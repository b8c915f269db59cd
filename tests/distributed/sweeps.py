"""Sweeps on one to four processes; started by tests/distributed/test_sweeps.py, see `on_processes`."""

import datetime
import json
import os
import signal
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate import PartialState
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import tests.conftest  # noqa: F401  (one thread, offline)
from tests import test_memory
from tests.tiny import make_model, make_samples, make_tokenizer
from trl_dpg import DPGReward, InnerLoopConfig, Student, attribute, metagradient
from trl_dpg.evaluation import evaluate_dataset
from trl_dpg.memory import StudentMemory, StudentTraces
from trl_dpg.memory.live_bytes import LiveBytes
from trl_dpg.metagradients.fine_tuning import FineTuning
from trl_dpg.metrics import CombinedMetric, Constraint, LanguageModelingMetric
from trl_dpg.ranks import ALONE, Ranks
from trl_dpg.verification import predicted_and_actual, random_signs, verify


SAMPLES = [*make_samples(11, low=3, high=14), {"input_ids": [5]}]  # the last has no token to learn from
TOKENIZER = make_tokenizer()
BENCHMARK = ["w3 w4 w5 w6", "w7 w8", "w9 w10 w11", "w12 w13", "w14 w15 w16"]
METRIC = LanguageModelingMetric(BENCHMARK, batch_size=2)
CONFIG = InnerLoopConfig(learning_rate=1e-3, eps_root=1e-6)
ONE, FOUR = replace(CONFIG, batch_size=12), replace(CONFIG, batch_size=3)
SETTINGS = {
    "one step": ONE,
    "four steps": FOUR,
    "recomputed": replace(FOUR, memory_budget=0, checkpoint_interval=2, micro_batch_size=1),
    "clipped": replace(FOUR, max_grad_norm=0.05),
    "tokens": replace(FOUR, per_token=True),
    "first order": replace(FOUR, attribution="first_order"),
    "sgd": replace(FOUR, optimizer="sgd", momentum=0.5, learning_rate=0.1),
}


def student(kind, folder, dtype=torch.float32):
    """A student whose trainable weights differ between ranks where they are random: those of the first one count."""
    if kind == "full":
        return Student(make_model(scale=1.0, dtype=dtype), TOKENIZER)
    torch.manual_seed(100 if dist.get_rank() == 0 else dist.get_rank())
    lora = LoraConfig(r=4, target_modules="all-linear")
    if kind == "lora":
        return Student(make_model(scale=1.0, dtype=dtype), TOKENIZER, peft_config=lora)
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="float32", bnb_4bit_quant_type="nf4")
    return Student(str(folder / "model"), TOKENIZER, peft_config=lora, quantization_config=quantized)


def figures(out):
    tokens = None if out.token_scores is None else out.token_scores.tolist()
    return dict(
        scores=out.scores.tolist(),
        tokens=tokens,
        metric=[out.metric_before, out.metric_after],
        losses=out.losses.tolist(),
    )


def kept_bytes(config, ranks):
    """Bytes of θ, moments and gradients that a rank keeps for the reverse sweep."""
    trajectory = FineTuning(Student(make_model(scale=1.0)), SAMPLES, config, ranks).sweep(torch.ones(12), True)
    tensors = [trajectory.last.theta, *trajectory.last.state[1:]]
    tensors += [x for step in trajectory.last.steps for x in (step.theta, step.gradient, *step.state[1:])]
    tensors += [x for point in trajectory.checkpoints for x in (point.theta, *point.state[1:])]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def peaks(group):
    """The predicted peak of a rank's tensors, and the largest that there was."""
    found = {}
    number = dist.get_world_size(group)
    for name, settings in {"one step": dict(batch_size=32), "four steps": dict(batch_size=8, memory_budget=0)}.items():
        config = InnerLoopConfig(**settings)
        traces = StudentTraces(test_memory.planned_student("full"), test_memory.LENGTH, False)
        planned = StudentMemory(traces, config, 32, test_memory.METRIC, test_memory.GIGABYTE, number)
        own = Student(AutoModelForCausalLM.from_config(test_memory.LLAMA), disable_dropout=True)
        arguments = dict(metric=test_memory.METRIC, process_group=group)
        metagradient(own, test_memory.data(number), config=InnerLoopConfig(), **arguments)  # checks that are made once
        with LiveBytes(own.model.parameters()) as live:
            metagradient(own, test_memory.data(32), config=config, **arguments)
        found[name] = [max(phase.total for phase in planned.phases()), live.peak]
    return found


def equal_scores(folder):
    rank, groups = dist.get_rank(), {size: dist.new_group(list(range(size))) for size in (2, 3, 4)}
    if rank == 0:
        make_model(scale=1.0).save_pretrained(folder / "model")  # makes the folder as well
    dist.barrier()
    results = {}
    for kind in ("full", "lora", "4-bit"):
        for name, config in SETTINGS.items():
            plain = name in ("one step", "four steps")
            for size in (1, 2, 3, 4) if plain else (1, 3) if kind == "lora" else ():
                if rank < size:
                    group = groups[size] if size > 1 else None
                    out = metagradient(student(kind, folder), SAMPLES, METRIC, config, process_group=group)
                    results[f"{kind}, {name}, {size}"] = figures(out)
    double = student("full", folder, torch.float64)
    weights = torch.linspace(0, 1.5, 12, dtype=torch.float64)
    many = {"benchmark": METRIC, "one text": LanguageModelingMetric(BENCHMARK[:1])}
    out = metagradient(double, SAMPLES, many, replace(FOUR, per_token=True), weights, process_group=groups[4])
    results["float64"] = {name: figures(own) for name, own in out.items()}
    results["kept"] = [kept_bytes(FOUR, ranks) for ranks in (ALONE, Ranks(groups[4]))]
    results["kept with checkpoints"] = kept_bytes(replace(FOUR, checkpoint_interval=2), Ranks(groups[4]))

    own = student("lora", folder)
    for name, ranks in dict(alone=ALONE, together=Ranks(groups[4])).items():
        for steps, config in dict(one=ONE, four=FOUR).items():
            fine_tuning = FineTuning(own, SAMPLES, replace(config, learning_rate=1e-2), ranks)
            agreement = predicted_and_actual(fine_tuning, METRIC, torch.ones(12), random_signs(3, 12, 0), 0.05)
            results[f"changes {steps} {name}"] = agreement.actual.tolist()
        results[f"losses {name}"] = fine_tuning.losses(fine_tuning.initial_theta()).tolist()
    chunked = dict(metric=METRIC, config=replace(CONFIG, batch_size=4), size=8)
    shared = attribute(own, SAMPLES * 2, **chunked, share_chunks=True)
    results["attribute"] = [attribute(own, SAMPLES * 2, **chunked).scores.tolist(), shared.scores.tolist()]
    verified = verify(own, SAMPLES, METRIC, FOUR, num_directions=4, try_remedies=False, process_group=groups[4])
    results["verify"] = {check.name: check.value for check in verified.checks}
    results["peaks"] = peaks(groups[4])
    texts = [" ".join(f"w{k * j % 50}" for j in range(2, 6)) for k in range(8)]
    fine = replace(CONFIG, batch_size=4, learning_rate=1e-2)
    results["evaluate"] = evaluate_dataset(
        lambda: Student(make_model(scale=1.0), TOKENIZER), texts, METRIC, fine
    ).metric
    results["reward"] = [constrained_reward(), constrained_reward(cross_group_batching=False, num_generations=2)]
    try:
        evaluate_dataset(lambda: None, texts[:6], METRIC, fine)
    except ValueError as error:
        results["uneven"] = str(error)
    return results | {"errors": errors(), "texts": texts}


def constrained_reward(**settings):
    """Three steps of a reward whose metric has a constraint and draws its texts. The ranks share the completions."""
    known = LanguageModelingMetric(["w20 w21 w22", "w23 w24", "w25 w26 w27"], batch_size=1)
    metric = CombinedMetric([METRIC, known], names=["a", "b"], constraints={"b": Constraint(0.05, multiplier=1.0)})
    own = Student(make_model(scale=1.0), TOKENIZER)
    reward = DPGReward(own, metric, replace(CONFIG, batch_size=4, learning_rate=1e-2), metric_samples=2, **settings)
    state = PartialState()
    share = 8 // state.num_processes
    texts = [" ".join(f"w{k * j % 50}" for j in range(2, 6)) for k in range(8)][state.process_index * share :][:share]
    prompts = [f"w{k // 2}" for k in range(8)][state.process_index * share :][:share]
    steps = []
    for _ in range(3):
        logged = {}
        reward(prompts, texts, log_metric=logged.__setitem__)
        figures = {name: value for name, value in logged.items() if "seconds" not in name}
        steps.append(figures | {"scores": reward.last_batch.scores.tolist(), "weights": metric.present_weights})
    return steps


@contextmanager
def fails_once(size, fails):
    """Context in which the memory does not suffice for the first vector `[P]` that is gathered."""
    gather, new_empty, calls = Ranks.gather, torch.Tensor.new_empty, []

    def gathering(self, shard, whole):
        with patch.object(torch.Tensor, "new_empty", failing):
            return gather(self, shard, whole)

    def failing(self, *sizes, **kwargs):
        if sizes[-1] == size and not calls:
            calls.append(sizes)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return new_empty(self, *sizes, **kwargs)

    with patch.object(Ranks, "gather", gathering) if fails else nullcontext():
        yield
    assert bool(calls) == fails


def errors():
    rank, group = dist.get_rank(), dist.group.WORLD

    class Failing(LanguageModelingMetric):
        def __init__(self, error, call):
            super().__init__(BENCHMARK, batch_size=2)
            self.error, self.call, self.calls = error, call, 0

        def __call__(self, student):
            self.calls += 1
            if rank == 1 and self.calls == self.call:
                raise self.error
            return super().__call__(student)

    def score(samples=SAMPLES, metric=METRIC, config=FOUR, **kwargs):
        metagradient(Student(make_model(scale=1.0, **kwargs), TOKENIZER), samples, metric, config, process_group=group)

    def frozen():
        model = make_model(scale=1.0, seed=0 if rank == 0 else 1).requires_grad_(False)
        model.lm_head.requires_grad_(True)
        metagradient(Student(model, TOKENIZER), SAMPLES, METRIC, FOUR, process_group=group)

    calls = dict(
        first=lambda: score(metric=Failing(RuntimeError("no benchmark"), 1)),
        second=lambda: score(metric=Failing(KeyError("no row"), 2)),
        text=lambda: score(samples=[*SAMPLES[:-1], {"input_ids": [-1 if rank == 1 else 1, 2]}]),
        samples=lambda: score(samples=SAMPLES[: 12 - rank]),
        settings=lambda: score(config=replace(FOUR, learning_rate=1e-3 * (1 + rank))),
        frozen=frozen,
        interval=lambda: score(config=replace(FOUR, checkpoint_interval=1 + rank % 2)),
        diverged=lambda: score(config=replace(FOUR, learning_rate=1e30, optimizer="sgd")),
    )
    saved = KeyError("saved")  # an error object may be raised again
    calls |= {name: lambda: score(metric=Failing(saved, 1)) for name in ("saved", "saved again")}
    results = {}
    for name, call in calls.items():
        try:
            call()
        except Exception as error:
            results[name] = repr(error)
    score()  # nothing is out of step after the errors
    for name, error in {
        "in the metric": torch.OutOfMemoryError("Allocation would exceed the allowed memory."),
        "on the host": RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        "in an exchange": None,
    }.items():
        own, metric = Student(make_model(scale=1.0), TOKENIZER), METRIC if error is None else Failing(error, 2)
        with fails_once(own.num_trainable, error is None and rank == 1):
            out = metagradient(own, SAMPLES, metric, ONE, process_group=group)
        results[f"out of memory {name}"] = [own.micro_batch_size, out.scores.tolist()]
    return results


def killed(folder, phase):
    """The second rank is killed in a phase of a metagradient."""

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == 1:
        module = sys.modules["trl_dpg.metagradients." + {"reverse": "metagradient", "forward": "fine_tuning"}[phase]]
        setattr(module, f"{phase}_sweep", die)
    metagradient(student("full", folder), SAMPLES, METRIC, FOUR, process_group=dist.group.WORLD)


if __name__ == "__main__":
    state = PartialState(cpu=True, timeout=datetime.timedelta(seconds=120))
    where = Path(sys.argv[2])
    found = globals()[sys.argv[1]](where, *sys.argv[3:])
    (where / f"{state.process_index}.json").write_text(json.dumps(found))
