"""
Small worlds to try things in: models, tokenizers and data made on the spot, without a network.

A *language* here is a list of words; the word at each index means the same in every language. Sentences are walks
through the meanings, so that a model trained on one language's sentences has something to learn beyond the words'
frequencies.
"""

import random
import string
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


NUM_MEANINGS = 16
SENTENCE_LENGTH = 6
LANGUAGE_A = [consonant + vowel for consonant in "bdgk" for vowel in "aeio"]
LANGUAGE_B = [consonant + vowel + "n" for consonant in "lrst" for vowel in "aeio"]
CHARACTERS = string.ascii_lowercase + " "


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, separated by spaces."""
    vocabulary = {token: k for k, token in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def character_tokenizer(characters: str = CHARACTERS) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters."""
    vocabulary = {token: k for k, token in enumerate(["<pad>", "<eos>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def tiny_llama(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int, num_layers: int, seed: int, initializer_range: float = 0.02
) -> LlamaForCausalLM:
    """A Llama with random weights, an untied head and four attention heads."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=initializer_range,
    )
    return LlamaForCausalLM(config)


def sentence(language: Sequence[str], rng: random.Random) -> str:
    """A sentence: from each meaning the walk goes to one of the three that follow it."""
    meaning = rng.randrange(NUM_MEANINGS)
    words = []
    for _ in range(SENTENCE_LENGTH):
        words.append(language[meaning])
        meaning = (meaning + rng.choice((1, 2, 3))) % NUM_MEANINGS
    return " ".join(words)


def pretrain(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], epochs: int, lr: float = 3e-3
) -> None:
    """Train a model on texts for seconds: plain AdamW, 64 texts a step, the eos token after each."""
    ids = tokenizer(
        [text + tokenizer.eos_token for text in texts], padding=True, padding_side="right", return_tensors="pt"
    )
    labels = ids.input_ids.masked_fill(ids.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(epochs):
        for rows in torch.randperm(len(texts)).split(64):
            loss = model(ids.input_ids[rows], attention_mask=ids.attention_mask[rows], labels=labels[rows]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


@torch.no_grad()
def sample(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], max_new_tokens: int
) -> list[str]:
    """A completion of each prompt, sampled at temperature 1."""
    inputs = tokenizer(
        list(prompts), padding=True, padding_side="left", return_tensors="pt", return_token_type_ids=False
    )
    output = model.generate(
        **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens
    )
    return tokenizer.batch_decode(output[:, inputs.input_ids.size(1) :], skip_special_tokens=True)


def language_share(language: Sequence[str], texts: Sequence[str]) -> float:
    """The share of the texts' words that belong to a language."""
    words = [word for text in texts for word in text.split()]
    return sum(word in set(language) for word in words) / max(len(words), 1)


def sentence_encoder(tokenizer: PreTrainedTokenizerFast, embedding_dim: int, seed: int) -> "SentenceTransformer":
    """A sentence encoder: a text's embedding is the mean of its tokens' random vectors. Needs the `rewards` extra."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    torch.manual_seed(seed)
    embedding = StaticEmbedding(tokenizer, embedding_dim=embedding_dim)
    return SentenceTransformer(modules=[embedding], device="cpu")


def train_language_id(languages: dict[str, Sequence[str]], path: str, seed: int) -> None:
    """
    Train a fastText classifier of languages on 200 sentences of each, and save it. Needs the `rewards` extra.

    Its threads step in an order left to chance, so that probabilities differ in the third digit from run to run.

    Args:
        languages (`dict[str, Sequence[str]]`): Name and words of each language.
        path (`str`): Of the file, a `.bin`.
        seed (`int`): Of the sentences.
    """
    import fasttext

    rng = random.Random(seed)
    lines = [f"__label__{name} {sentence(words, rng)}\n" for name, words in languages.items() for _ in range(200)]
    rng.shuffle(lines)
    with tempfile.NamedTemporaryFile("w") as file:
        file.writelines(lines)
        file.flush()
        # Each of ten threads initialises a tenth of the vectors, and an eleventh what is left over. With fewer
        # threads, some vectors start as whatever was in memory.
        model = fasttext.train_supervised(file.name, dim=8, minn=1, maxn=2, bucket=1000, thread=11, verbose=0)
    model.save_model(path)
