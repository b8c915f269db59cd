"""The student with its fine-tuned weights, as a target metric receives it."""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing

from ..ranks import ALONE, Ranks
from .student import Student


class FinetunedStudent:
    """
    The student with its fine-tuned weights `θ_T`. It is the argument of a target metric, and is differentiable in θ_T.

    Calling it runs the model: `student(input_ids=..., attention_mask=..., labels=...)` returns the model's output. Use
    it only while the metric runs.

    Attributes:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The student's tokenizer.
        theta (`torch.Tensor` of shape `[P]`):
            The fine-tuned values of the trainable parameters, as one flat vector.
        parameters (`dict[str, torch.Tensor]`):
            The parameters in `theta` by name, in the model's dtypes.
        ranks (`Ranks`):
            The processes that compute the metric. Each of them calls it, with the same θ_T.
    """

    def __init__(self, student: Student, theta: Tensor, initial_theta: Tensor, ranks: Ranks = ALONE):
        self.student = student
        self.ranks = ranks
        self.theta = theta
        self.parameters = student.unflatten(theta)
        self._initial_theta = initial_theta
        self.processing_class = student.processing_class

    @property
    def device(self) -> torch.device:
        return self.student.device

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs):
        """Run the model with `θ_T` on its device. Arguments and output are those of the model."""
        kwargs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        kwargs = {
            name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in kwargs.items()
        }
        return self.student.run(self.parameters, lambda model: model(**kwargs, use_cache=False))

    @torch.no_grad()
    def generate(self, prompt: str, max_new_tokens: int = 64) -> str:
        """The student's continuation of a prompt by greedy decoding. The prompt may be empty."""
        tokenizer: Any = self.processing_class
        ids = tokenizer(prompt)["input_ids"] or [
            tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        ]
        inputs = torch.tensor([ids], device=self.device)
        # In train mode, layers with gradient checkpointing get no key-value cache
        with self.student.train_mode(), disable_gradient_checkpointing(self.student.model):
            output = self.student.run(
                self.parameters,
                lambda model: model.generate(  # type: ignore[operator]
                    input_ids=inputs,
                    attention_mask=torch.ones_like(inputs),
                    do_sample=False,
                    max_new_tokens=max_new_tokens,
                    pad_token_id=self.student.pad_token_id,
                    synced_gpus=False,  # under ZeRO-3, it would wait for the other ranks
                ),
            )
        return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)

    def weight(self, name: str) -> Tensor:
        """The weight `name` (base and adapters merged) after fine-tuning, see [`Student.effective_weight`]."""
        return self.student.effective_weight(self.student.unflatten(self.theta, cast=False), name)

    def initial_weight(self, name: str) -> Tensor:
        """The effective weight `name` before fine-tuning, detached."""
        with torch.no_grad():
            return self.student.effective_weight(self.student.unflatten(self._initial_theta, cast=False), name)

    def evaluate(self, metric: "Callable[[FinetunedStudent], Tensor]") -> tuple[Tensor, Tensor | None]:
        """
        Φ, and its gradient ∇Φ in `theta`, of shape `[P]`. `None` if Φ has no gradient or gradients are disabled.

        The backward pass also runs with the fine-tuned weights, because gradient checkpointing runs the model again.
        """

        def value_and_gradient(_):
            value = metric(self)
            if not isinstance(value, Tensor) or not value.requires_grad or value.numel() != 1:
                return value, None
            return value.detach(), torch.autograd.grad(value, self.theta, allow_unused=True)[0]

        return self.student.run(self.parameters, value_and_gradient)

    def accumulate(self, function: Callable[[Any], Tensor], batches: Iterable[Any]) -> Tensor:
        """
        `Σ_b function(b)` over batches, which can be differentiated once in `theta` and needs the memory of one batch.

        The gradient of each batch is computed immediately and its graph is freed, so memory does not grow with the
        number of batches. Several ranks share the batches between them.

        Args:
            function (`Callable`):
                Maps a batch to a scalar tensor that depends on this student.
            batches (`Iterable`):
                The batches b.
        """
        value, gradient = self.theta.new_zeros(()), None
        for batch in islice(batches, self.ranks.index, None, self.ranks.size):
            part = function(batch)
            if part.requires_grad:
                (part_gradient,) = torch.autograd.grad(part, self.theta)
                gradient = part_gradient if gradient is None else gradient + part_gradient
            value = value + part.detach()
        if not self.ranks.alone:
            value, depends = self.ranks.sum(torch.stack([value, value.new_tensor(gradient is not None)]))
            if depends:
                gradient = self.ranks.sum(torch.zeros_like(self.theta) if gradient is None else gradient.clone())
        return value if gradient is None else _WithGradient.apply(self.theta, value, gradient)


class _WithGradient(torch.autograd.Function):
    """A scalar whose gradient in `theta` is known."""

    @staticmethod
    def forward(ctx, theta, value, gradient):
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, value_bar):
        (gradient,) = ctx.saved_tensors
        return value_bar.to(gradient.dtype) * gradient, None, None
