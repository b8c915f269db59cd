"""Samples texts from a generator with transformers or vLLM."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from torch.nn import Module
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BatchEncoding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl.models.utils import disable_gradient_checkpointing

from .student.loading import load_pretrained


Prompt = str | list[dict[str, Any]]
"""A text or a conversation."""


@torch.no_grad()
def generate_texts(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    batch_size: int = 256,
    seed: int = 42,
    chat_template_kwargs: dict[str, Any] | None = None,
    generation_kwargs: dict[str, Any] | None = None,
    skip_special_tokens: bool = True,
    **sampling: Any,
) -> list[str]:
    """
    Sample a completion of each prompt.

    The random state of torch is left as it was. The model is not switched to eval mode, because bitsandbytes repacks
    4-bit layers on a CPU in eval mode.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The generator.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        prompts (`list[str]` or `list[list[dict]]`):
            Texts or conversations.
        max_new_tokens (`int`):
            Length of the longest completion, in tokens.
        batch_size (`int`, *optional*, defaults to `256`):
            Prompts per call of `generate`.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the sampling.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Arguments of the chat template, for conversations.
        generation_kwargs (`dict[str, Any]`, *optional*):
            Further arguments of `generate`. As in TRL, they override all others.
        skip_special_tokens (`bool`, *optional*, defaults to `True`):
            Whether the texts are without special tokens. Some templates mark the reasoning by them.
        sampling:
            Arguments of `generate`. By default, texts are sampled from the model's distribution (temperature 1).
    """
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": None, "repetition_penalty": 1.0}
    sampling = {"do_sample": True, **plain} | sampling  # overrides the model's own generation config
    sampling |= {"max_new_tokens": max_new_tokens, "pad_token_id": processing_class.pad_token_id}
    sampling |= generation_kwargs or {}
    texts = []
    devices = [] if model.device.type == "cpu" else [model.device]
    # With gradient checkpointing, layers in train mode get no key-value cache.
    with torch.random.fork_rng(devices, device_type=model.device.type), disable_gradient_checkpointing(model):
        torch.manual_seed(seed)
        for first in range(0, len(prompts), batch_size):
            batch = prompts[first : first + batch_size]
            inputs = encode_prompts(processing_class, batch, chat_template_kwargs or {}).to(model.device)
            output = model.generate(**inputs, **sampling)
            texts += processing_class.batch_decode(
                output[:, inputs.input_ids.size(1) :], skip_special_tokens=skip_special_tokens
            )
    return texts


def encode_prompts(
    processing_class: PreTrainedTokenizerBase, prompts: Sequence[Prompt], chat_template_kwargs: dict[str, Any]
) -> BatchEncoding:
    """Tokenise texts or conversations, with padding on the left."""
    texts = [
        prompt
        if isinstance(prompt, str)
        else processing_class.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=False, **chat_template_kwargs
        )
        for prompt in prompts
    ]
    return processing_class(
        texts,
        padding=True,
        padding_side="left",
        return_tensors="pt",
        return_token_type_ids=False,
        add_special_tokens=isinstance(prompts[0], str),  # the chat template adds its own
    )


def generate_texts_by_vllm(
    path: str,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    dtype: str = "auto",
    revision: str = "main",
    trust_remote_code: bool = False,
    seed: int = 42,
    chat_template_kwargs: dict[str, Any] | None = None,
    generation_kwargs: dict[str, Any] | None = None,
    **sampling: Any,
) -> list[str]:
    """
    Sample a completion of each prompt with vLLM, which chooses the GPUs itself.

    Args:
        path (`str`):
            Path or Hub id of the generator.
        prompts (`list[str]` or `list[list[dict]]`):
            Texts or conversations.
        max_new_tokens (`int`):
            Length of the longest completion, in tokens.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type of the weights.
        revision (`str`, *optional*, defaults to `"main"`):
            Revision of a model on the Hub.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Run the code that comes with the model.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the sampling.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Arguments of the chat template, for conversations.
        generation_kwargs (`dict[str, Any]`, *optional*):
            Further arguments of vLLM's `SamplingParams`. They override all others.
        sampling:
            Arguments of [`generate_texts`]. As in transformers, `top_k=0` and `min_p=None` switch these filters off.

    Raises:
        `ImportError`: If vLLM is not installed.
    """
    try:
        from vllm import LLM, SamplingParams
    except ModuleNotFoundError as error:
        raise ImportError("vLLM is not installed: pip install vllm.") from error
    sampling = {"max_tokens": max_new_tokens} | sampling
    sampling |= {"top_k": sampling.get("top_k") or -1, "min_p": sampling.get("min_p") or 0.0}
    sampling |= generation_kwargs or {}
    if isinstance(structure := sampling.get("structured_outputs"), dict):
        from vllm.sampling_params import StructuredOutputsParams

        sampling["structured_outputs"] = StructuredOutputsParams(**structure)
    parameters = SamplingParams(**sampling)
    llm = LLM(path, dtype=dtype, seed=seed, revision=revision, trust_remote_code=trust_remote_code)
    if isinstance(prompts[0], str):
        outputs = llm.generate(prompts, parameters)
    else:
        outputs = llm.chat(prompts, parameters, chat_template_kwargs=chat_template_kwargs)
    return [output.outputs[0].text for output in outputs]


def load_generator(
    path: str, dtype: str = "auto", revision: str = "main", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Load a generator onto this process's device, and its tokenizer.

    Args:
        path (`str`):
            Path or Hub id of the generator or of its adapters.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type of the weights.
        revision (`str`, *optional*, defaults to `"main"`):
            Revision of a model on the Hub.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Run the code that comes with the model.
    """
    hub_kwargs = {"revision": revision, "trust_remote_code": trust_remote_code}
    model = load_pretrained(AutoModelForCausalLM, path, "the generator", dtype=dtype, **hub_kwargs)
    model = model.to(PartialState().device).eval()
    tokenizer = load_pretrained(AutoTokenizer, path, "the generator's tokenizer", **hub_kwargs)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def prompt_completion_pairs(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of `prompt` and `completion`. After a conversation, the completion is a message of the assistant."""
    return [
        {
            "prompt": prompt,
            "completion": text if isinstance(prompt, str) else [{"role": "assistant", "content": text}],
        }
        for prompt, text in zip(prompts, texts, strict=True)
    ]


def keep_one_input_hook(model: Module) -> None:
    """
    Let a model that is trained with gradient checkpointing have one hook on its embeddings at most.

    TRL switches gradient checkpointing off to generate, and on again. Each time, transformers adds a hook that makes
    the embeddings require a gradient, and keeps those of before. After thousands of steps they take memory and time.
    """
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.enable_input_require_grads = partial(_enable_input_require_grads, part)  # type: ignore[method-assign]


def _enable_input_require_grads(model: PreTrainedModel) -> None:
    model.disable_input_require_grads()
    type(model).enable_input_require_grads(model)
