"""The rivals of `against_unrolling.py` and our own side of `against_bergson.py`: one worker process each."""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from _side_by_side import serve
from peft import PeftModel
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaForCausalLM


def load_model(settings):
    folder = Path(settings["folder"])
    model = LlamaForCausalLM.from_pretrained(folder / "full", dtype=torch.float32)
    if settings["kind"] == "lora":
        model = PeftModel.from_pretrained(model, folder / "lora", is_trainable=True)
    model.config.name_or_path = ""  # nowhere to look for a tokenizer: samples are token ids
    return model.to(settings["device"]).train()


def sample_losses(logits, ids):
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).mean(dim=1)


def held_out(settings):
    return json.loads(Path(settings["folder"], "held_out.json").read_text())


# -- ours -------------------------------------------------------------------------------------------------------------


def ours(settings, memory_budget):
    from trl_dpg import InnerLoopConfig, Student, metagradient

    student = Student(load_model(settings))
    rows = [torch.tensor(row) for row in held_out(settings)]
    ids, labels = (pad_sequence(rows, True, padding).to(settings["device"]) for padding in (0, -100))
    config = InnerLoopConfig(
        batch_size=settings["batch"],
        learning_rate=settings["learning_rate"],
        betas=tuple(settings["betas"]),
        eps=settings["eps"],
        eps_root=settings["eps_root"],
        loss_normalization="batch_tokens",  # bergson's
        memory_budget=memory_budget,
        checkpoint_interval=settings["checkpoint_interval"],
        gradient_checkpointing=settings["gradient_checkpointing"],
    )

    def metric(finetuned):
        return -finetuned(input_ids=ids, labels=labels).loss

    def start(data):
        samples = [{"input_ids": row} for row in data]
        return lambda: metagradient(student, samples, metric, config, metric_before=0.0).scores

    return start


def recompute(settings):
    return ours(settings, memory_budget=0)


def retention(settings):
    return ours(settings, memory_budget="auto")


# -- one graph over all steps -----------------------------------------------------------------------------------------


def unrolled(settings, init, update):
    """All steps with `create_graph=True`, the metric at their end, one backward pass through everything."""
    model = load_model(settings)
    benchmark = torch.tensor(held_out(settings), device=settings["device"])

    def run(data):
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        data_weights = torch.ones(len(data), device=data.device, requires_grad=True)
        state = init(parameters)
        for ids, weights in zip(data.split(settings["batch"]), data_weights.split(settings["batch"]), strict=True):
            with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivative
                logits = functional_call(model, parameters, kwargs={"input_ids": ids, "use_cache": False}).logits
            loss = (weights * sample_losses(logits, ids)).mean()
            gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
            parameters, state = update(dict(zip(parameters, gradients, strict=True)), state, parameters)
        logits = functional_call(model, parameters, kwargs={"input_ids": benchmark, "use_cache": False}).logits
        (scores,) = torch.autograd.grad(-sample_losses(logits, benchmark).mean(), data_weights)
        return scores.cpu()

    def start(data):
        return lambda: run(torch.tensor(data, device=settings["device"]))

    return start


def torchopt(settings):
    try:
        import torchopt
    except ImportError:
        sys.exit("torchopt is not installed: pip install torchopt")

    # Its eps_root is ours: added to the corrected second moment, inside the square root.
    optimizer = torchopt.adamw(
        settings["learning_rate"],
        tuple(settings["betas"]),
        settings["eps"],
        weight_decay=0.0,
        eps_root=settings["eps_root"],
    )

    def update(gradients, state, parameters):
        updates, state = optimizer.update(gradients, state, params=parameters, inplace=False)
        return torchopt.apply_updates(parameters, updates, inplace=False), state

    return unrolled(settings, optimizer.init, update)


def by_hand(settings):
    """As with `higher`: AdamW in plain PyTorch operations."""
    beta1, beta2 = settings["betas"]
    lr, eps, eps_root = settings["learning_rate"], settings["eps"], settings["eps_root"]

    def init(parameters):
        zeros = {name: torch.zeros_like(p) for name, p in parameters.items()}
        return 0, zeros, zeros

    def update(gradients, state, parameters):
        step, exp_avg, exp_avg_sq = state
        step += 1
        exp_avg = {name: beta1 * exp_avg[name] + (1 - beta1) * g for name, g in gradients.items()}
        exp_avg_sq = {name: beta2 * exp_avg_sq[name] + (1 - beta2) * g * g for name, g in gradients.items()}
        moved = {}
        for name, p in parameters.items():
            root = (exp_avg_sq[name] / (1 - beta2**step) + eps_root).sqrt()
            moved[name] = p - lr * (exp_avg[name] / (1 - beta1**step)) / (root + eps)
        return moved, (step, exp_avg, exp_avg_sq)

    return unrolled(settings, init, update)


if __name__ == "__main__":
    serve({"recompute": recompute, "retention": retention, "torchopt": torchopt, "by hand": by_hand}[sys.argv[1]])
