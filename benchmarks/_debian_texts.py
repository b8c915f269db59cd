"""Short texts in eight languages: sayings (`fortunes-*`) and manual pages (`manpages-*`), from packages of Debian."""

import gzip
import random
import re
import subprocess
from pathlib import Path


PACKAGES = {
    "en": ("fortunes", "fortunes-min"),
    "es": ("fortunes-es", "manpages-es"),
    "de": ("fortunes-de", "manpages-de"),
    "fr": ("manpages-fr",),
    "it": ("fortunes-it", "manpages-it"),
    "pl": ("fortunes-pl",),
    "ru": ("fortunes-ru",),
    "cs": ("fortunes-cs",),
}
SHARES = {"en": 0.2, "es": 0.2, "de": 0.15, "fr": 0.15, "it": 0.1, "pl": 0.07, "cs": 0.07, "ru": 0.06}


def debian_texts(folder: Path, number: int, tokenizer, low: int, high: int, seed: int = 0) -> list[dict[str, str]]:
    """
    Texts with their languages, in a random order.

    Args:
        folder (`Path`): Where packages are kept. Missing ones are downloaded by `apt-get download`.
        number (`int`): Number of texts.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]), low (`int`), high (`int`): Texts of `low` to `high` of
            its tokens are taken.
        seed (`int`): Seed of the choice.
    """
    rng = random.Random(seed)
    rows, rest = [], []
    for language, share in SHARES.items():
        found = sorted({text for package in PACKAGES[language] for text in texts_of(unpacked(folder, package))})
        lengths = [len(ids) for ids in tokenizer(found)["input_ids"]]
        fitting = [text for text, length in zip(found, lengths, strict=True) if low <= length <= high]
        chosen = [{"text": text, "language": language} for text in rng.sample(fitting, len(fitting))]
        rows += chosen[: round(share * number)]
        rest += chosen[round(share * number) :]
    if len(rows) + len(rest) < number:
        raise ValueError(f"{len(rows) + len(rest)} texts of {low} to {high} tokens, {number} are wanted.")
    rows += rng.sample(rest, max(number - len(rows), 0))  # in the place of languages with too few
    rng.shuffle(rows)
    return rows[:number]


def unpacked(folder: Path, package: str) -> Path:
    """The folder with the files of a package."""
    tree = folder / package
    if not tree.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "-q", package], cwd=folder, check=True)
        (archive,) = folder.glob(f"{package}_*.deb")
        subprocess.run(["dpkg", "-x", archive, tree], check=True)
    return tree


def texts_of(tree: Path) -> list[str]:
    """The sayings and paragraphs in a package's files, on one line each."""
    pages = [read(path) for path in sorted(tree.glob("usr/share/man/*/man*/*.gz")) if path.is_file()]
    texts = [text for page in pages for text in paragraphs(page)]
    for path in sorted(tree.glob("usr/share/games/fortunes*/**/*")):
        if path.is_file() and path.suffix not in (".dat", ".u8") and "off" not in path.parts:
            texts += sayings(read(path))
    return [text for text in texts if sum(letter.isalpha() or letter == " " for letter in text) > 0.85 * len(text)]


def read(path: Path) -> str:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return data.decode("utf-8", "ignore")


def sayings(text: str) -> list[str]:
    """The sayings of a file of `fortune`, without their sources."""
    bodies = [re.split(r"\n\s*(?:--|—)", part)[0] for part in re.split(r"^%.*$", text, flags=re.MULTILINE)]
    return [joined for body in bodies if (joined := " ".join(body.split()))]


def paragraphs(page: str) -> list[str]:
    """The paragraphs of a manual page, without its macros and fonts."""
    found: list[list[str]] = [[]]
    for line in page.splitlines():
        if line.startswith((".", "'")) or not line.strip():
            found.append([])
        else:
            found[-1].append(re.sub(r"\\f(?:\[\w*\]|\(\w\w|\w)|\\,|\\/", "", line).replace("\\-", "-"))
    joined = (" ".join(" ".join(lines).split()) for lines in found)
    return [text for text in joined if text and "\\" not in text]
