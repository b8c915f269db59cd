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
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


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
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], epochs: int, lr: float = 3e-3
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
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, column, texts in (("prompts", "prompt", prompts), ("benchmark", "text", benchmark)):
        lines = [json.dumps({column: text}) + "\n" for text in texts]
        (folder / f"{name}.jsonl").write_text("".join(lines))


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
    prompt mentions B. `language_A.jsonl` has as many sentences in A, to see what the student forgets.

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
    known = [{"text": sentence(LANGUAGE_A, rng)} for _ in range(64)]
    (folder / "language_A.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in known))


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
