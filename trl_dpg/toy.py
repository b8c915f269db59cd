"""
Toy worlds: small models, tokenizers and data that are generated on demand, without a network.

A *language* here is a list of words. Words with the same index have the same meaning in every language. A sentence is
a random walk through the meanings. So a model that is trained on sentences learns more than the words' frequencies.
"""

import json
import random
import string
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)


if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


NUM_MEANINGS = 16
SENTENCE_LENGTH = 6
LANGUAGE_A = [consonant + vowel for consonant in "bdgk" for vowel in "aeio"]
LANGUAGE_B = [consonant + vowel + "n" for consonant in "lrst" for vowel in "aeio"]
CHARACTERS = string.ascii_lowercase + " "
HEXADECIMAL = "0123456789abcdef"


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are words, separated by spaces."""
    vocabulary = {token: k for k, token in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def character_tokenizer(characters: str = CHARACTERS, bos: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are single characters. With `bos`, every text begins with a token `<bos>`."""
    special = ["<pad>", "<eos>", "<unk>", *["<bos>"] * bos]
    vocabulary = {token: k for k, token in enumerate([*special, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 3)])
        names["bos_token"] = "<bos>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **names)


def tiny_llama(
    tokenizer: PreTrainedTokenizerFast,
    hidden_size: int,
    num_layers: int,
    seed: int,
    initializer_range: float = 0.02,
    mlp_ratio: int = 2,
) -> LlamaForCausalLM:
    """A Llama with random weights, an untied head and four attention heads."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=mlp_ratio * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=initializer_range,
    )
    return LlamaForCausalLM(config)


def sentence(language: Sequence[str], rng: random.Random) -> str:
    """A random sentence. Each word has one of the three meanings that follow the meaning of the word before it."""
    meaning = rng.randrange(NUM_MEANINGS)
    words = []
    for _ in range(SENTENCE_LENGTH):
        words.append(language[meaning])
        meaning = (meaning + rng.choice((1, 2, 3))) % NUM_MEANINGS
    return " ".join(words)


def pretrain(
    model: Any, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], epochs: int, lr: float = 3e-3
) -> None:
    """Train a model on texts with AdamW and 64 texts per step. An eos token is appended to each text."""
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


def save_world(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    generator: LlamaForCausalLM,
    student: LlamaForCausalLM,
    prompts: Sequence[str],
    benchmark: Sequence[str] = (),
) -> None:
    """
    Write a world to a folder: `generator` and `student` (both with the tokenizer), `prompts.jsonl` and
    `benchmark.jsonl`. The benchmark is empty for worlds whose metrics read no texts.
    """
    for name, model in (("generator", generator), ("student", student)):
        save_model(folder / name, model, tokenizer)
    write_texts(folder / "prompts.jsonl", prompts, "prompt")
    write_texts(folder / "benchmark.jsonl", benchmark)


def save_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_texts(path: Path, texts: Sequence[str], column: str = "text") -> None:
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))


def characters_world(
    folder: Path,
    seed: int = 0,
    characters: str = CHARACTERS,
    generator_hidden_size: int = 64,
    student_hidden_size: int = 32,
    num_layers: int = 2,
) -> None:
    """
    A world for metrics that read weights: a generator with random weights, which writes random characters, and a
    student.

    Args:
        folder (`Path`): The folder to write to.
        seed (`int`): Seed of weights and prompts.
        characters (`str`): The alphabet.
        generator_hidden_size (`int`): Width of the generator.
        student_hidden_size (`int`): Width of the student.
        num_layers (`int`): Layers of both.
    """
    rng = random.Random(seed)
    tokenizer = character_tokenizer(characters)
    generator = tiny_llama(tokenizer, generator_hidden_size, num_layers, seed)
    student = tiny_llama(tokenizer, student_hidden_size, num_layers, seed + 1)
    prompts = ["".join(rng.choices(characters, k=4)) for _ in range(1024)]
    save_world(folder, tokenizer, generator, student, prompts)


def languages_world(
    folder: Path, seed: int = 0, share: float = 0.05, hidden_size: int = 64, reward_models: bool = False
) -> None:
    """
    A world with two languages, A and B.

    The generator rephrases sentences of A, and sometimes answers in B. The student knows A. The benchmark is in B. No
    prompt mentions B. `language_A.jsonl` has as many other sentences in A, to see what the student forgets, and
    `replay.jsonl` has 1,024 more.

    Args:
        folder (`Path`): The folder to write to.
        seed (`int`): Seed of weights and texts.
        share (`float`): Share of answers in B in the generator's training data.
        hidden_size (`int`): Width of both models.
        reward_models (`bool`): Whether to write `encoder` and `language_id.bin`, which some baselines need.
    """
    rng = random.Random(seed)
    tokenizer = word_tokenizer([*LANGUAGE_A, *LANGUAGE_B, ":"])
    if reward_models:
        sentence_encoder(tokenizer, embedding_dim=64, seed=seed).save(str(folder / "encoder"))
        train_language_id({"A": LANGUAGE_A, "B": LANGUAGE_B}, str(folder / "language_id.bin"), seed)

    def rephrasing(prompt):
        return f"{prompt} : {sentence(LANGUAGE_B if rng.random() < share else LANGUAGE_A, rng)}"

    prompts = [sentence(LANGUAGE_A, rng) for _ in range(1024)]
    generator = tiny_llama(tokenizer, hidden_size, 2, seed, initializer_range=0.05)
    pretrain(generator, tokenizer, [rephrasing(prompt) for prompt in prompts * 2], epochs=4)
    student = tiny_llama(tokenizer, hidden_size, 2, seed + 1, initializer_range=0.05)
    pretrain(student, tokenizer, [sentence(LANGUAGE_A, rng) for _ in range(2048)], epochs=4)
    benchmark = [sentence(LANGUAGE_B, rng) for _ in range(64)]
    save_world(folder, tokenizer, generator, student, [f"{prompt} :" for prompt in prompts], benchmark)
    write_texts(folder / "language_A.jsonl", [sentence(LANGUAGE_A, rng) for _ in range(64)])
    write_texts(folder / "replay.jsonl", [sentence(LANGUAGE_A, rng) for _ in range(1024)])


def planted_world(
    folder: Path, seed: int = 0, share: float = 0.1, num_samples: int = 512, hidden_size: int = 64
) -> None:
    """
    A world with a dataset to audit. A part of its rows teaches another language.

    The student knows language A. The dataset has sentences of A and, at random places, sentences of B. The control has
    sentences of A only. The benchmark is in B.

    Args:
        folder (`Path`): The folder to write to: `student`, `other_student` (the same from another seed),
            `samples.jsonl` (with the truth in a column `planted`), `control.jsonl` and `benchmark.jsonl`.
        seed (`int`): Seed of weights and texts.
        share (`float`): Share of sentences in B. 0: a clean dataset.
        num_samples (`int`): Rows of the dataset, and of the control.
        hidden_size (`int`): Width of the student.
    """
    rng = random.Random(seed)
    tokenizer = word_tokenizer([*LANGUAGE_A, *LANGUAGE_B])
    for place, name in enumerate(("student", "other_student")):
        student = tiny_llama(tokenizer, hidden_size, 2, seed + place, initializer_range=0.05)
        pretrain(student, tokenizer, [sentence(LANGUAGE_A, rng) for _ in range(2048)], epochs=4)
        student.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    planted = [rng.random() < share for _ in range(num_samples)]
    rows: dict[str, list[dict]] = {
        "samples": [{"text": sentence((LANGUAGE_A, LANGUAGE_B)[own], rng), "planted": own} for own in planted],
        "control": [{"text": sentence(LANGUAGE_A, rng)} for _ in range(num_samples)],
        "benchmark": [{"text": sentence(LANGUAGE_B, rng)} for _ in range(64)],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))


def families_world(folder: Path, seed: int = 0, share: float = 0.06, dialects: bool = True) -> None:
    """
    A world with the languages A and B, and students of three families that know A: `llama`, `gpt2` and `neox`.

    Their tokens are words, characters and words, and their sizes differ. The generator rephrases sentences of A, and
    sometimes answers in B or in one of two dialects of B: the words in capitals, or with accents. `llama` reads
    capitals as small letters, and accents not at all; `gpt2` does without accents, and has other tokens for capitals.
    To each of the two, one dialect is as good as B. To `neox`, all three are different. So data that suits one family
    need not suit another. The benchmark is in B.

    Args:
        folder (`Path`): The folder to write to: `generator`, `llama`, `gpt2`, `neox`, `prompts.jsonl` and
            `benchmark.jsonl`.
        seed (`int`): Seed of weights and texts.
        share (`float`): Share of answers in B in the generator's training data, and that of each dialect.
        dialects (`bool`): Whether the generator knows the dialects.
    """
    rng = random.Random(seed)
    capitals = [word.upper() for word in LANGUAGE_B]
    accents = [word.translate(str.maketrans("aeio", "áéíó")) for word in LANGUAGE_B]
    words = [*LANGUAGE_A, *LANGUAGE_B, *capitals, *accents]
    choices = [LANGUAGE_B, capitals, accents] if dialects else [LANGUAGE_B]

    def answer():
        return sentence(rng.choice(choices) if rng.random() < share * len(choices) else LANGUAGE_A, rng)

    prompts = [sentence(LANGUAGE_A, rng) for _ in range(1024)]
    generator = tiny_llama(word_tokenizer([*words, ":"]), 64, 2, seed, initializer_range=0.05)
    pretrain(generator, word_tokenizer([*words, ":"]), [f"{p} : {answer()}" for p in prompts * 2], epochs=4)
    uncased, plain = word_tokenizer([*LANGUAGE_A, *LANGUAGE_B]), word_tokenizer(words)
    uncased.backend_tokenizer.normalizer = normalizers.Lowercase()
    letters = character_tokenizer(string.ascii_letters + " ")
    letters.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    students = {
        "llama": (tiny_llama(uncased, 64, 2, seed + 1, initializer_range=0.05), uncased),
        "gpt2": (tiny_gpt2(letters, 48, 2, seed + 2), letters),
        "neox": (tiny_neox(plain, 32, 3, seed + 3), plain),
    }
    for name, (model, tokenizer) in students.items():
        pretrain(model, tokenizer, [sentence(LANGUAGE_A, rng) for _ in range(2048)], epochs=4)
        save_model(folder / name, model, tokenizer)
    save_model(folder / "generator", generator, word_tokenizer([*words, ":"]))
    write_texts(folder / "prompts.jsonl", [f"{prompt} :" for prompt in prompts], "prompt")
    write_texts(folder / "benchmark.jsonl", [sentence(LANGUAGE_B, rng) for _ in range(64)])


def tiny_gpt2(tokenizer: PreTrainedTokenizerFast, hidden_size: int, num_layers: int, seed: int) -> GPT2LMHeadModel:
    """A GPT-2 with random weights, a tied head, four attention heads and no dropout."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=hidden_size,
        n_layer=num_layers,
        n_head=4,
        n_positions=128,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    )
    return GPT2LMHeadModel(config)


def tiny_neox(tokenizer: PreTrainedTokenizerFast, hidden_size: int, num_layers: int, seed: int) -> GPTNeoXForCausalLM:
    """A GPT-NeoX with random weights, an untied head and four attention heads."""
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPTNeoXForCausalLM(config)


def strings_world(
    folder: Path, seed: int = 0, target: str = "5f2c-9e81", num_choices: int = 8, hidden_size: int = 64
) -> None:
    """
    A world with strings of hexadecimal digits, in which a target string is to be learned.

    All strings have the form of the target, like UUIDs: each position has its own set of possible digits. Generator
    and student are trained on a few thousand random strings, so they know the form. The benchmark is the target. It is
    in no prompt, and very probably not in the training strings.

    Args:
        folder (`Path`): The folder to write to.
        seed (`int`): Seed of weights and texts.
        target (`str`): The target. Other characters than hexadecimal digits are the same in all strings.
        num_choices (`int`): Number of possible digits at each position, at most 16. The target's digit is one of them.
        hidden_size (`int`): Width of both models.
    """
    rng = random.Random(seed)
    tokenizer = character_tokenizer("".join(sorted({*HEXADECIMAL, *target, *string.ascii_lowercase, ":"})), bos=True)

    places = [
        [c, *rng.sample(HEXADECIMAL.replace(c, ""), num_choices - 1)] if c in HEXADECIMAL else [c] for c in target
    ]

    def random_string():
        return "".join(map(rng.choice, places))

    def prompt():
        return "".join(rng.choices(string.ascii_lowercase, k=4)) + ":"

    generator = tiny_llama(tokenizer, hidden_size, 2, seed, initializer_range=0.05)
    pretrain(generator, tokenizer, [prompt() + random_string() for _ in range(2048)], epochs=4)
    student = tiny_llama(tokenizer, hidden_size, 2, seed + 1, initializer_range=0.05)
    pretrain(student, tokenizer, [random_string() for _ in range(2048)], epochs=4)
    save_world(folder, tokenizer, generator, student, [prompt() for _ in range(1024)], [target])


def sentence_encoder(tokenizer: PreTrainedTokenizerFast, embedding_dim: int, seed: int) -> "SentenceTransformer":
    """A sentence encoder. A text's embedding is the mean of its tokens' random vectors. Needs the `rewards` extra."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    torch.manual_seed(seed)
    embedding = StaticEmbedding(tokenizer, embedding_dim=embedding_dim)
    return SentenceTransformer(modules=[embedding], device="cpu")


def train_language_id(languages: dict[str, Sequence[str]], path: str, seed: int) -> None:
    """
    Train a fastText classifier of languages on 200 sentences of each, and save it. Needs the `rewards` extra.

    The order in which its threads take steps is not fixed, so probabilities differ in the third digit between runs.

    Args:
        languages (`dict[str, Sequence[str]]`): Name and words of each language.
        path (`str`): Path of the file to write, which ends with `.bin`.
        seed (`int`): Seed of the sentences.
    """
    import fasttext

    rng = random.Random(seed)
    lines = [f"__label__{name} {sentence(words, rng)}\n" for name, words in languages.items() for _ in range(200)]
    rng.shuffle(lines)
    with tempfile.NamedTemporaryFile("w") as file:
        file.writelines(lines)
        file.flush()
        # Each of ten threads initialises a tenth of the vectors, and the eleventh thread the rest. With fewer threads,
        # some vectors are not initialised.
        model = fasttext.train_supervised(file.name, dim=8, minn=1, maxn=2, bucket=1000, thread=11, verbose=0)
    model.save_model(path)
