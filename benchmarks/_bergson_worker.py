"""bergson's MAGIC trainer as a rival of `against_bergson.py`; runs in bergson's own virtual environment."""

import itertools
import json
from pathlib import Path

import torch
from _side_by_side import serve
from bergson.config.config import TrainingConfig
from bergson.magic import DataStream
from bergson.magic.cli import compute_query_gradients
from bergson.magic.trainer import BackwardState, TrainerState, prepare_trainer
from datasets import Dataset
from torchopt.pytree import tree_iter


def load(settings):
    folder = Path(settings["folder"])
    config = TrainingConfig(
        run_path=str(folder / "bergson"),
        model=str(folder / settings["kind"]),
        precision="fp32",
        adam_beta1=settings["betas"][0],
        adam_beta2=settings["betas"][1],
        adam_eps=settings["eps"],
        eps_root=settings["eps_root"],
        weight_decay=0.0,
        save_mode=settings["save_mode"],
    )
    trainer, state, model = prepare_trainer(config, 0, lambda step: settings["learning_rate"])
    parameters, buffers = state.params, state.buffers
    at_start = {name: p.detach().clone() for name, p in parameters.items()}
    del state  # each run makes its own optimizer state, as ours does

    def stream(data):
        rows = Dataset.from_dict({"input_ids": data})
        return DataStream(rows, min(settings["batch"], len(data)), device=settings["device"])

    queries = stream(json.loads((folder / "held_out.json").read_text()))
    runs = itertools.count()

    def start(data):
        with torch.no_grad():  # bergson trains the weights in place
            for name, p in parameters.items():
                p.copy_(at_start[name])
        checkpoints = f"{config.run_path}/{next(runs)}"
        examples = stream(data)
        return lambda: attribute(examples, checkpoints)

    def attribute(examples, checkpoints):
        """The steps of `bergson.magic.cli.worker`, with its settings."""
        state = TrainerState(dict(parameters), trainer.optimizer.init(parameters), buffers)
        state = trainer.train(state, examples, inplace=True, save_dir=checkpoints, save_mode=config.save_mode)
        query_gradients, _ = compute_query_gradients(state, model, queries)
        examples.requires_grad = True
        moments = [buffer for buffer in tree_iter(state.opt_state) if buffer.is_floating_point()]
        backward_state = BackwardState(
            query_gradients, [torch.zeros_like(buffer) for buffer in moments], torch.zeros_like(examples.weights)
        )
        backward_state = trainer.backward(
            checkpoints, examples, backward_state, state, inplace=True, save_mode=config.save_mode
        )
        return -backward_state.weight_grads.cpu()  # of the loss; our metric is minus the loss

    return start


if __name__ == "__main__":
    serve(load)
