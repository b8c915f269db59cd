"""Tiny models in folders, as TRL's tests take them from the Hub: same architectures, made on the spot."""

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    Gemma2Config,
    Gemma3Config,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SiglipVisionConfig,
)
from trl import chat_template_utils


IMAGE_TOKENS = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}
SPECIAL_TOKENS = ["<pad>", "<|im_end|>", "<bos>", "<|im_start|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
SPECIAL_TOKENS += IMAGE_TOKENS.values()
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
PAD, EOS, BOS = 0, 1, 2
IMAGE_SIZE, PATCH_SIZE, TOKENS_PER_IMAGE = 28, 7, 4

_SHAPE = dict(
    vocab_size=len(SPECIAL_TOKENS) + len(BYTES),
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=1024,
    bos_token_id=BOS,
    eos_token_id=EOS,
    pad_token_id=PAD,
    initializer_range=0.2,
    tie_word_embeddings=False,
)
_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)

CONFIGS: dict[str, Callable] = {
    "qwen2": lambda: Qwen2Config(**_SHAPE),
    "qwen3": lambda: Qwen3Config(**_SHAPE),
    "qwen3-moe": lambda: Qwen3MoeConfig(**_SHAPE | _EXPERTS),
    "llama": lambda: LlamaConfig(**_SHAPE),
    "mistral": lambda: MistralConfig(**_SHAPE),
    "gemma2": lambda: Gemma2Config(**_SHAPE | {"tie_word_embeddings": True}),
    "gemma3-vision": lambda: Gemma3Config(
        text_config=Gemma3TextConfig(**_SHAPE | {"tie_word_embeddings": True}),
        vision_config=SiglipVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
        ),
        mm_tokens_per_image=TOKENS_PER_IMAGE,
        image_token_index=SPECIAL_TOKENS.index(IMAGE_TOKENS["image_token"]),
        boi_token_index=SPECIAL_TOKENS.index(IMAGE_TOKENS["boi_token"]),
        eoi_token_index=SPECIAL_TOKENS.index(IMAGE_TOKENS["eoi_token"]),
        eos_token_id=EOS,
        initializer_range=0.2,
    ),
}
TEMPLATES = {
    "llama": chat_template_utils.llama3_chat_template,
    "gemma3-vision": chat_template_utils.gemma3_chat_template,
}


def make_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A token for each byte. All models share it, apart from the chat template."""
    vocab = {token: k for k, token in enumerate([*SPECIAL_TOKENS, *BYTES])}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Tokens of tool calls and thoughts are not special: they belong to a completion's text.
    tokenizer.add_tokens([token for token in SPECIAL_TOKENS if "tool" in token or "think" in token])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        bos_token="<bos>",
        extra_special_tokens=IMAGE_TOKENS | {"start_token": "<|im_start|>"},
        chat_template=TEMPLATES.get(name, chat_template_utils.qwen3_chat_template),
    )


def make_processor(name: str) -> Gemma3Processor:
    image_processor = Gemma3ImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    tokenizer = make_tokenizer(name)
    return Gemma3Processor(
        image_processor, tokenizer, chat_template=tokenizer.chat_template, image_seq_length=TOKENS_PER_IMAGE
    )


class Models:
    """
    Folders of models, made when they are first asked for.

    `models("qwen2")` is the path of a causal language model, `models("qwen2", reward=True)` that of a reward model.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, name: str, reward: bool = False) -> str:
        path = self.folder / f"tiny-{name}{'-reward' if reward else ''}"
        if not path.exists():
            torch.manual_seed(len(str(path.name)))
            config = CONFIGS[name]()
            if reward:
                config.num_labels = 1
                model_class: type = AutoModelForSequenceClassification
            else:
                model_class = AutoModelForImageTextToText if "vision" in name else AutoModelForCausalLM
            model_class.from_config(config).save_pretrained(path)
            (make_processor(name) if "vision" in name else make_tokenizer(name)).save_pretrained(path)
        return str(path)
