"""Models, tokenizers and samples made on the spot."""

import subprocess
import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)


VOCAB = 61
QUIET = dict(report_to="none", save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True)
"""Settings of every trainer in the tests: nothing is reported, saved or drawn, and no GPU is looked for."""

_SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)

FAMILIES = {
    "llama": lambda: LlamaConfig(**_SHAPE),
    "llama-tied": lambda: LlamaConfig(**_SHAPE, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**_SHAPE),
    "qwen3": lambda: Qwen3Config(**_SHAPE, head_dim=8),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    "mistral": lambda: MistralConfig(**_SHAPE, sliding_window=6),
    "gemma": lambda: GemmaConfig(**_SHAPE, head_dim=8),
    "gemma3": lambda: Gemma3TextConfig(**_SHAPE, head_dim=8),
}


def make_model(family="llama", seed=0, scale=3.0, dtype=torch.float32, vocab_size=VOCAB, hidden_size=None, **kwargs):
    """A small model whose weights are large enough for its loss to bend."""
    torch.manual_seed(seed)
    config = FAMILIES[family]()
    config.vocab_size = vocab_size
    if hidden_size is not None:
        config.hidden_size, config.intermediate_size, config.head_dim = hidden_size, 2 * hidden_size, hidden_size // 4
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, 1, 0
    model = AutoModelForCausalLM.from_config(config, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model.to(dtype)


def make_samples(n, seed=1, low=4, high=12):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high, (n,), generator=generator).tolist()
    return [{"input_ids": torch.randint(0, VOCAB, (length,), generator=generator).tolist()} for length in lengths]


def make_tokenizer(words=None, bos=False):
    """A tokenizer of whole words, `w0` ... by default."""
    words = words or [f"w{k}" for k in range(VOCAB - 4)]
    vocab = {token: k for k, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def on_two_processes(module, *arguments):
    return on_processes(2, module, *arguments)


def on_processes(number, module, *arguments):
    """Run a module on several processes, as accelerate does on a machine without a GPU."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(number), "-m"]
    command = [sys.executable, "-m", *launcher, module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def make_byte_tokenizer(special_tokens):
    """A tokenizer of bytes, which loses no text. The last special token ends a text."""
    vocab = {token: k for k, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = dict(pad_token="<pad>", bos_token="<bos>", eos_token=special_tokens[-1])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    made.add_special_tokens({"additional_special_tokens": special_tokens[:-1]})
    return made


class LiveStorages(TorchDispatchMode):
    """
    Counts the bytes of all tensors that were made inside of it and still exist.

    Attributes:
        peak (`int`): The most there were, looked at after every 20th operation.
    """

    def __init__(self):
        super().__init__()
        self.storages = {}
        self.operations = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[StorageWeakRef(storage)] = storage.nbytes()
        self.operations += 1
        if self.operations % 20 == 0:
            self.peak = max(self.peak, self.live())
        return result

    def live(self):
        self.storages = {reference: size for reference, size in self.storages.items() if not reference.expired()}
        return sum(self.storages.values())
