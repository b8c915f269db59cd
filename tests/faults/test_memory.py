"""A training of days must not grow."""

import ctypes
import gc
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from tests.small_runs import dpg_config, make_trainer


class Memory(TrainerCallback):
    """After each of some steps: live tensors, and resident megabytes without what the C library keeps for later."""

    def __init__(self, steps):
        self.steps = steps
        self.tensors: list[int] = []
        self.megabytes: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            self.tensors.append(sum(isinstance(each, torch.Tensor) for each in gc.get_objects()))
            pages = Path("/proc/self/statm").read_text().split()[1]
            self.megabytes.append(int(pages) * 4096 / 2**20)


@pytest.mark.parametrize("adapters", [None, LoraConfig(r=2, target_modules="all-linear")], ids=["full", "lora"])
def test_hooks_on_the_embeddings_do_not_pile_up(adapters, tmp_path):
    """transformers adds one whenever gradient checkpointing is switched on again, as TRL does twice a step."""
    args = dpg_config(tmp_path, max_steps=3, gradient_checkpointing=True)
    trainer = make_trainer(args, peft_config=adapters)
    trainer.train()
    assert len(trainer.model.get_input_embeddings()._forward_hooks) == 1
    assert trainer.model.is_gradient_checkpointing


@pytest.mark.faults
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's own count of pages")
def test_memory_does_not_grow_over_300_reward_steps(tmp_path):
    memory = Memory((10, 100, 200, 300))
    trainer = make_trainer(dpg_config(tmp_path, max_steps=300, learning_rate=1e-3, save_strategy="no"))
    trainer.add_callback(memory)
    trainer.train()
    assert len(set(memory.tensors)) == 1, memory.tensors
    assert max(memory.megabytes) <= 1.02 * memory.megabytes[0], memory.megabytes
