"""What a target metric receives: the student under its fine-tuned weights."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing

from .student import Student


class FinetunedStudent:
    """
    What a target metric receives: the student under its fine-tuned weights `θ_T`, differentiable in them.

    Calling it runs the model: `student(input_ids=..., attention_mask=..., labels=...)` returns the model's output.
    Valid while the metric runs.

    Attributes:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The student's tokenizer.
        theta (`torch.Tensor` of shape `[P]`):
            The fine-tuned trainable parameters, flat.
        parameters (`dict[str, torch.Tensor]`):
            The same by name: views of `theta`.
    """

    def __init__(self, student: Student, theta: Tensor, initial_theta: Tensor):
        self.student = student
        self.theta = theta
        self.parameters = student.unflatten(theta)
        self._initial_theta = initial_theta
        self.processing_class = student.processing_class

    @property
    def device(self) -> torch.device:
        return self.student.device

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs):
        """Run the model under `θ_T`, on its device; arguments and output are the model's own."""
        kwargs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        kwargs = {
            name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in kwargs.items()
        }
        return self.student.run(self.parameters, lambda model: model(**kwargs, use_cache=False))

    @torch.no_grad()
    def generate(self, prompt: str, max_new_tokens: int = 64) -> str:
        """What the student writes greedily after a prompt, which may be empty."""
        tokenizer: Any = self.processing_class
        ids = tokenizer(prompt)["input_ids"] or [
            tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        ]
        inputs = torch.tensor([ids], device=self.device)
        # In train mode, layers with gradient checkpointing are given no past
        with self.student.train_mode(), disable_gradient_checkpointing(self.student.model):
            output = self.student.run(
                self.parameters,
                lambda model: model.generate(  # type: ignore[operator]
                    input_ids=inputs,
                    attention_mask=torch.ones_like(inputs),
                    do_sample=False,
                    max_new_tokens=max_new_tokens,
                    pad_token_id=self.student.pad_token_id,
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
        Φ and, where gradients are enabled and there is one, ∇Φ in `theta`, of shape `[P]`.

        The weights are in place for the backward pass as well: gradient checkpointing runs the model in it again.
        """

        def value_and_gradient(_):
            value = metric(self)
            if not isinstance(value, Tensor) or not value.requires_grad or value.numel() != 1:
                return value, None
            return value.detach(), torch.autograd.grad(value, self.theta, allow_unused=True)[0]

        return self.student.run(self.parameters, value_and_gradient)

    def accumulate(self, function: Callable[[Any], Tensor], batches: Iterable[Any]) -> Tensor:
        """
        `Σ_b function(b)` over batches, differentiable (once) in `theta`, in the memory of one batch.

        Each batch's gradient is taken at once and its graph freed, so that a benchmark of any size fits.

        Args:
            function (`Callable`):
                Maps a batch to a scalar tensor that depends on this student.
            batches (`Iterable`):
                Its arguments.
        """
        value, gradient = self.theta.new_zeros(()), None
        for batch in batches:
            part = function(batch)
            if part.requires_grad:
                (part_gradient,) = torch.autograd.grad(part, self.theta)
                gradient = part_gradient if gradient is None else gradient + part_gradient
            value = value + part.detach()
        return value if gradient is None else _WithGradient.apply(self.theta, value, gradient)


class _WithGradient(torch.autograd.Function):
    """A scalar whose gradient in `theta` was computed already."""

    @staticmethod
    def forward(ctx, theta, value, gradient):
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, value_bar):
        (gradient,) = ctx.saved_tensors
        return value_bar.to(gradient.dtype) * gradient, None, None
