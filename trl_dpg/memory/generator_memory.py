"""The memory of the generator: weights, optimizer, generation and update, on one of several devices."""

from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from transformers.modeling_layers import GradientCheckpointingLayer
from trl import GRPOConfig

from ..kernels.blocks import of_an_accelerator
from ..student import Batch, Student
from .empty_models import held_tensors, weight_bytes
from .live_bytes import LiveBytes
from .student_memory import Phase


@dataclass
class Sharding:
    """
    What the R processes of a training share of the generator.

    Attributes:
        num_processes (`int`): R.
        optimizer (`bool`), gradients (`bool`), weights (`bool`): Whether each process has only 1/R of it: all three
            with FSDP and ZeRO-3, the first two with ZeRO-2, the first with ZeRO-1.
        master_weights (`bool`): Whether weights in 16 bits have a copy in float32 for the optimizer (DeepSpeed).
    """

    num_processes: int = 1
    optimizer: bool = False
    gradients: bool = False
    weights: bool = False
    master_weights: bool = False

    def share(self, size: int, sharded: bool) -> int:
        return size // self.num_processes if sharded else size


class GeneratorMemory:
    """
    What the generator needs on a device, with W the bytes of its weights, and n the numbers that it trains:

    - weights: W, or W / R if they are sharded. With `beta` and without adapters also those of the reference model.
    - optimizer: the moments of n numbers in the weights' type (two for Adam; in 8 bits one byte each), / R if they are
      sharded. With DeepSpeed and weights in 16 bits: 12 bytes a number.
    - gradients: n in the weights' type, / R if they are sharded. With several processes and no sharding twice, because
      DDP has buckets of that size.
    - activations: measured on the model's own code with tensors without data, for `per_device_train_batch_size`
      completions with their prompts. With sharded weights also the two largest blocks, which are gathered.
    - generation by transformers: keys and values of all completions of a device, and their logits.
    - vLLM in the same process: its share of the device; with sleep mode only while it generates.

    Args:
        model (`torch.nn.Module`): The generator, see [`~trl_dpg.memory.empty_models.empty_model`].
        args ([`~trl.GRPOConfig`]): The training. `generation_batch_size` counts for all processes.
        prompt_length (`int`): Tokens of a prompt.
        sharding (`Sharding`): What the processes share.
        accelerator (`bool`): Whether the device is an accelerator.
        device_bytes (`int`): Memory of the device, of which vLLM takes a share.
    """

    def __init__(
        self,
        model: nn.Module,
        args: GRPOConfig,
        prompt_length: int,
        sharding: Sharding,
        accelerator: bool,
        device_bytes: int,
    ):
        self.model, self.args, self.sharding, self.accelerator = model, args, sharding, accelerator
        self.prompt_length, self.device_bytes = prompt_length, device_bytes
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self._activations: int | None = None

    def changed(self, name: str, value: Any) -> "GeneratorMemory":
        """The same with another value of a field of `args`."""
        args = copy(self.args)
        setattr(args, name, value)
        own = self.prompt_length, self.sharding, self.accelerator, self.device_bytes
        return GeneratorMemory(self.model, args, *own)

    def resident(self) -> dict[str, int]:
        """What is there in every phase."""
        weights = weight_bytes(self.model)
        adapters = len(self.trained) < sum(1 for _ in self.model.parameters())
        if self.args.beta and not adapters:
            weights *= 2
        parts = {"generator's weights": self.sharding.share(weights, self.sharding.weights)}
        parts["generator's optimizer"] = self.sharding.share(self._optimizer(), self.sharding.optimizer)
        if self._buckets:
            parts["generator's gradients"] = self._gradients
        if self._vllm and not self.args.vllm_enable_sleep_mode:
            parts["vLLM"] = self._vllm
        return parts

    def generation(self) -> Phase:
        """The phase in which completions are sampled, without what is resident."""
        if self._vllm:
            return Phase("generation", {"vLLM": self._vllm} if self.args.vllm_enable_sleep_mode else {})
        if self.args.use_vllm:  # a server has its own devices
            return Phase("generation")
        model: Any = self.model
        config = model.config.get_text_config()
        number = max(1, self.args.generation_batch_size // self.sharding.num_processes)
        length = self.prompt_length + self.args.max_completion_length
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        item = 2 if self.args.bf16 or self.args.fp16 else self.trained[0].element_size()
        cache = number * length * 2 * config.num_hidden_layers * heads * width * item
        return Phase("generation", {"keys and values": cache, "logits": 3 * 4 * number * config.vocab_size})

    def update(self) -> Phase:
        """The phase in which the generator is updated, without what is resident."""
        own = self.sharding.share(self._gradients, self.sharding.gradients)
        return Phase("update", {"generator's gradients": own, "generator's activations": self.activations()})

    @property
    def _gradients(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.trained)

    @property
    def _buckets(self) -> bool:
        return self.sharding.num_processes > 1 and not (self.sharding.gradients or self.sharding.weights)

    @property
    def _vllm(self) -> int:
        colocated = self.args.use_vllm and self.args.vllm_mode == "colocate"
        return int(self.args.vllm_gpu_memory_utilization * self.device_bytes) if colocated else 0

    def _optimizer(self) -> int:
        name, number = str(self.args.optim), sum(p.numel() for p in self.trained)
        if self.sharding.master_weights and self.trained[0].element_size() == 2:
            return 12 * number
        if "8bit" in name or "4bit" in name:
            return 2 * number
        if "sgd" in name or "adafactor" in name:
            return 0
        return 2 * self._gradients

    def activations(self) -> int:
        """The most that a forward and backward pass takes, beside weights and gradients."""
        if self._activations is None:
            self._activations = self._trace()
        return self._activations + (self._gathered() if self.sharding.weights else 0)

    def _gathered(self) -> int:
        blocks = [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]
        sizes = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks]
        return 2 * max(sizes, default=0)

    def _trace(self) -> int:
        args, model = self.args, self.model
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        model.train()
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        autocast = nullcontext() if dtype is None else torch.autocast("cpu", dtype)
        batch = self._batch()
        weights = torch.ones(batch.labels.shape)
        reader = Student(model, disable_dropout=True)
        blocks = of_an_accelerator() if self.accelerator else nullcontext()
        with LiveBytes(held_tensors(model)) as live, blocks:
            with autocast:
                loss, _ = reader.loss(model, batch, weights)
            gradients = torch.autograd.grad(loss, self.trained, allow_unused=True)
            del gradients, loss
        return max(0, live.peak - self._gradients)

    def _batch(self) -> Batch:
        number, completion = self.args.per_device_train_batch_size, self.args.max_completion_length
        length = self.prompt_length + completion
        mode = next(p for p in self.model.parameters() if isinstance(p, FakeTensor)).fake_mode
        mask = torch.ones(number, length, dtype=torch.long)
        mask[-1, 0] = 0  # TRL pads prompts on the left
        targets = torch.cat([row * length + torch.arange(self.prompt_length, length) for row in range(number)])
        made: list[Tensor] = [torch.zeros(number, length, dtype=torch.long), mask, torch.zeros_like(targets), targets]
        return Batch(*map(mode.from_tensor, made))
