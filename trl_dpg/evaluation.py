"""The honest test of a generator: a fresh student, fine-tuned on its texts by stock SFTTrainer, and the metric."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    set_seed,
)
from transformers.trainer_callback import ProgressCallback
from trl import SFTConfig, SFTTrainer
from trl.models.utils import disable_gradient_checkpointing

from .alignment import completion_text
from .metagradients import InnerLoopConfig
from .metrics.base import Metric
from .student import FinetunedStudent, Student


@dataclass
class Evaluation:
    """
    A fresh student after its fine-tuning.

    Attributes:
        metric (`float`): Φ.
        proxies (`dict[str, float]`): The metric's readable figures.
        finetuned (`FinetunedStudent`): The student itself.
    """

    metric: float
    proxies: dict[str, float]
    finetuned: FinetunedStudent = field(repr=False)

    def figures(self) -> dict[str, float]:
        return {"metric": self.metric, **self.proxies}


def evaluate_dataset(
    load_student: Callable[[], Student],
    dataset: Dataset | Sequence[str],
    metric: Callable[[FinetunedStudent], Tensor],
    config: InnerLoopConfig,
    seed: int = 42,
) -> Evaluation:
    """
    Fine-tune a fresh student on a dataset with stock [`~trl.SFTTrainer`], and read the metric off it.

    None of this package's sweeps takes part. The trainer's settings are those of the inner loop as far as it has them:
    torch's AdamW has no `eps_root`, so that its `eps` is raised to √eps_root, and its loss is the mean over a batch's
    tokens whatever `loss_normalization` is. Samples are shuffled by `seed`.

    Args:
        load_student (`Callable`):
            Makes the student at its start; called twice.
        dataset ([`~datasets.Dataset`] or `list[str]`):
            What SFTTrainer trains on, or texts. Empty texts and completions are left out, as in the inner loop.
        metric (`Callable`):
            Φ.
        config (`InnerLoopConfig`):
            The inner loop.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the order.

    Raises:
        `ValueError`: If all texts are empty.
    """
    if not isinstance(dataset, Dataset):
        dataset = Dataset.from_dict({"text": list(dataset)})
    dataset = without_empty(dataset)
    if len(dataset) == 0:
        raise ValueError("All texts are empty, so a student has nothing to be fine-tuned on.")
    start, trained = load_student(), load_student()
    with TemporaryDirectory() as folder:
        args = sft_config(config, folder, seed=seed, use_cpu=trained.device.type == "cpu")
        if args.n_gpu > 1:
            args._n_gpu = 1  # the student lies on one device, and the batch is not to grow with their number
        trainer = SFTTrainer(
            model=trained.model,
            args=args,
            train_dataset=dataset,
            processing_class=trained.processing_class,
        )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        for parameter in trained.model.parameters():
            if parameter.requires_grad:  # SFTTrainer casts the adapters of a quantised model to bfloat16
                parameter.data = parameter.data.float()
        trainer.train()
    finetuned = FinetunedStudent(start, trained.initial_theta(), start.initial_theta())
    with torch.no_grad(), start.train_mode():
        value = metric(finetuned).item()
        proxies = metric.proxies(finetuned, value) if isinstance(metric, Metric) else {}
    return Evaluation(value, proxies, finetuned)


def without_empty(dataset: Dataset) -> Dataset:
    """The rows with something to learn from: neither an empty `text` nor an empty `completion`."""
    column = next((name for name in ("text", "completion") if name in dataset.column_names), None)
    if column is None:
        return dataset
    return dataset.select([k for k, value in enumerate(dataset[column]) if completion_text(value)])


def sft_config(config: InnerLoopConfig, output_dir: str | Path, **overrides: Any) -> SFTConfig:
    """The inner loop as SFTTrainer's settings, see [`evaluate_dataset`]."""
    if config.optimizer == "adamw":
        optimizer = {
            "optim": "adamw_torch",
            "adam_beta1": config.betas[0],
            "adam_beta2": config.betas[1],
            "adam_epsilon": max(config.eps, math.sqrt(config.eps_root)),
        }
    else:
        optimizer = {"optim": "sgd", "optim_args": f"momentum={config.momentum}"}
    micro_batch_size = config.micro_batch_size or config.batch_size
    if config.batch_size % micro_batch_size:
        micro_batch_size = config.batch_size
    settings = dict(
        output_dir=str(output_dir),
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=config.batch_size // micro_batch_size,
        num_train_epochs=config.num_epochs,
        max_length=config.max_length,
        max_grad_norm=config.max_grad_norm or 0.0,  # 0: not clipped
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_steps,
        bf16=False,
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    sft = SFTConfig(**settings | optimizer | overrides)
    sft.mixed_precision = "no"  # whatever accelerate's environment says
    return sft


@torch.no_grad()
def generate_texts(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict[str, Any]]],
    max_new_tokens: int,
    batch_size: int = 256,
    seed: int = 42,
    chat_template_kwargs: dict[str, Any] | None = None,
    generation_kwargs: dict[str, Any] | None = None,
    **sampling: Any,
) -> list[str]:
    """
    A completion of each prompt, sampled. The model stays in the mode it is in (eval mode packs 4-bit layers on a CPU).

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The generator.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        prompts (`list[str]` or `list[list[dict]]`):
            Texts or conversations.
        max_new_tokens (`int`):
            Longest completion, in tokens.
        batch_size (`int`, *optional*, defaults to `256`):
            Prompts at a time.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the sampling.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            For conversations.
        generation_kwargs (`dict[str, Any]`, *optional*):
            Further arguments of `generate`; as in TRL, they override all others.
        sampling:
            Arguments of `generate`; without any, the model's distribution itself (temperature 1).
    """
    set_seed(seed)
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": None, "repetition_penalty": 1.0}
    sampling = {"do_sample": True, **plain} | sampling  # whatever the model's own generation config says
    sampling |= {"max_new_tokens": max_new_tokens, "pad_token_id": processing_class.pad_token_id}
    sampling |= generation_kwargs or {}
    texts = []
    for first in range(0, len(prompts), batch_size):
        batch = [
            prompt
            if isinstance(prompt, str)
            else processing_class.apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=False, **chat_template_kwargs or {}
            )
            for prompt in prompts[first : first + batch_size]
        ]
        inputs = processing_class(
            batch,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            return_token_type_ids=False,
            add_special_tokens=isinstance(prompts[first], str),
        ).to(model.device)
        with disable_gradient_checkpointing(model):  # in train mode, its layers are given no past
            output = model.generate(**inputs, **sampling)
        texts += processing_class.batch_decode(output[:, inputs.input_ids.size(1) :], skip_special_tokens=True)
    return texts


def load_generator(
    path: str, dtype: str = "auto", revision: str = "main", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    A generator on this process's device, and its tokenizer, ready to sample.

    Args:
        path (`str`):
            Its path or Hub id, or those of its adapters.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type of its weights.
        revision (`str`, *optional*, defaults to `"main"`):
            Of a model on the Hub.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Run the code that comes with the model.
    """
    hub_kwargs = {"revision": revision, "trust_remote_code": trust_remote_code}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **hub_kwargs).to(PartialState().device).eval()
    tokenizer = AutoTokenizer.from_pretrained(path, **hub_kwargs)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def prompt_completion_pairs(
    prompts: Sequence[str | list[dict[str, Any]]], texts: Sequence[str]
) -> list[dict[str, Any]]:
    """Rows of `prompt` and `completion`; after a conversation, the text is the assistant's message."""
    return [
        {
            "prompt": prompt,
            "completion": text if isinstance(prompt, str) else [{"role": "assistant", "content": text}],
        }
        for prompt, text in zip(prompts, texts, strict=True)
    ]
