"""
The scores that `attribution.py` compares. A method maps a study and a learning rate to the scores `[N]`.

A higher score means that the sample is expected to help the metric more.
"""

import json
import math
import re
import subprocess
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from trl_dpg import metagradient
from trl_dpg.metagradients.fine_tuning import FineTuning


def exact(study, rate, **changes):
    return metagradient(study.student, study.texts, study.metric, study.config(rate, **changes)).scores.numpy()


def first_order(study, rate):
    return exact(study, rate, attribution="first_order")


def one_step(study, rate):
    """The metagradient of another fine-tuning: one step on all samples."""
    return exact(study, rate, batch_size=len(study.texts))


def gradient_dot(study, rate):
    """⟨∇Φ, ∇ℓ_i⟩ at the student's start: the metagradient of one step of SGD of size zero."""
    return exact(study, 1e-6, batch_size=len(study.texts), optimizer="sgd")


def averaged(study, rate, num_points):
    """The mean of the metagradients at random data weights: pairs of w and 1 - w, each weight uniform in [0, 1]."""
    rng = np.random.default_rng(0)
    total = np.zeros(len(study.texts))
    for _ in range(num_points // 2):
        w = rng.random(len(study.texts))
        for point in (w, 1 - w):
            weights = torch.tensor(point, dtype=torch.float32)
            total += metagradient(study.student, study.texts, study.metric, study.config(rate), weights).scores.numpy()
    return total / num_points


def embedding(study, rate):
    """Cosine similarity of a sample with the queries: the student's last hidden states, mean over the tokens."""

    def embed(text):
        ids = study.student.processing_class(text, return_tensors="pt").input_ids[:, : study.length]
        with torch.no_grad():
            hidden = study.student.model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        return torch.nn.functional.normalize(hidden[0].mean(dim=0), dim=0)

    queries = torch.stack([embed(text) for text in study.queries]).mean(dim=0)
    return np.array([float(embed(text) @ queries) for text in study.texts])


def words(text):
    return re.findall(r"\w+", text.lower())


def bm25(study, rate):
    """Okapi BM25 of a sample for the words of each query, summed over the queries."""
    from rank_bm25 import BM25Okapi

    index = BM25Okapi([words(text) for text in study.texts])
    return sum(index.get_scores(words(query)) for query in study.queries)


def dsir(study, rate, buckets=10_000):
    """
    log p(x | queries) - log p(x | dataset), by bags of hashed words and pairs of words (DSIR, arXiv 2302.03169).

    Per n-gram, as the samples have different lengths.
    """

    def features(text):
        tokens = words(text)
        return [hash_of(gram) % buckets for gram in (*tokens, *map(" ".join, pairwise(tokens)))]

    def log_probabilities(texts):
        counts = Counter(feature for text in texts for feature in features(text))
        total = sum(counts.values()) + buckets
        return lambda feature: math.log((counts[feature] + 1) / total)

    target, raw = log_probabilities(study.queries), log_probabilities(study.texts)
    return [np.mean([target(f) - raw(f) for f in features(text)]) for text in study.texts]


def hash_of(text):
    from zlib import crc32

    return crc32(text.encode())


def loss_at_start(study, rate):
    """The loss of a sample under the student before fine-tuning, per token."""
    losses = []
    for text in study.texts:
        ids = study.student.processing_class(text, return_tensors="pt").input_ids[:, : study.length]
        with torch.no_grad():
            losses.append(study.student.model(input_ids=ids, labels=ids).loss.item())
    return losses


def random_scores(study, rate):
    return np.random.default_rng(0).random(len(study.texts))


def bergson(method):
    """
    A method of bergson, computed in its own virtual environment.

    MAGIC starts at the adapters that our student starts at. The others read the gradients of the fine-tuned ones.
    """

    def scores(study, rate):
        python = Path(__file__).parents[1] / ".venv-bergson" / "bin" / "python"
        folder = (study.folder / "bergson").resolve()
        folder.mkdir(exist_ok=True)
        save_for_bergson(study, rate, folder)
        batch = len(study.texts) // study.num_steps
        settings = {"folder": str(folder), "method": method, "kind": "lora", "end": f"end_{rate:g}", "device": "cpu"}
        settings |= {"learning_rate": rate, "batch": batch, "save_mode": "sqrt", "betas": (0.9, 0.95), "eps": 1e-8}
        settings |= {"loss_reduction": "sum_of_means", "eps_root": 1e-7 * batch**2}  # its loss is ours times the batch
        worker = Path(__file__).with_name("_bergson_methods.py")
        subprocess.run([python, worker, json.dumps(settings)], check=True)
        return json.loads((folder / f"{method}.json").read_text())

    return scores


def save_for_bergson(study, rate, folder):
    tokenizer, model = study.student.processing_class, study.student.model
    base = str((study.folder / "world" / "student").resolve())
    for name, own, texts in (("samples", "data", study.texts), ("queries", "held_out", study.queries)):
        ids = [tokenizer(text).input_ids[: study.length] for text in texts]
        (folder / f"{own}.json").write_text(json.dumps(ids))
        cut = [{"text": tokenizer.decode(some)} for some in ids]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in cut))
    model.peft_config["default"].base_model_name_or_path = base
    start = study.student.initial_theta()
    model.save_pretrained(folder / "lora")
    theta = FineTuning(study.student, study.texts, study.config(rate)).theta(torch.ones(len(study.texts)))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for vector, where in ((theta, folder / f"end_{rate:g}"), (start, None)):
            for parameter, values in zip(trained, vector.split([p.numel() for p in trained]), strict=True):
                parameter.copy_(values.view_as(parameter))
            if where is not None:
                model.save_pretrained(where)
                tokenizer.save_pretrained(where)


METHODS = {
    "exact": exact,
    "exact, 4 points": lambda study, rate: averaged(study, rate, 4),
    "first order": first_order,
    "one step": one_step,
    "gradient dot product": gradient_dot,
    "bergson magic": bergson("magic"),
    "bergson trackstar": bergson("trackstar"),
    "bergson ekfac": bergson("ekfac"),
    "embedding": embedding,
    "BM25": bm25,
    "DSIR": dsir,
    "loss at start": loss_at_start,
    "random": random_scores,
}
