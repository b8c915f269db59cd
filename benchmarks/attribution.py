"""
Which scores predict what a student becomes when samples are left out of its data?

A dataset of N samples in several languages, and a metric: minus the loss on texts in one of them. The student is
fine-tuned on the dataset without some of its samples, many times. Leaving a sample out sets its data weight to 0:
batches, order and number of steps stay the same. Each method gives every sample one score. Measured are:

- LDS, the linear datamodelling score (Park et al., arXiv 2303.14186): the rank correlation, over random halves of the
  dataset, of the metric of the student fine-tuned on the half with the sum of the half's scores. The intervals
  are of 95 %, by bootstrap over the halves; those of differences resample both methods together;
- the same with 5 % of the samples left out;
- the change of the metric when the 1, 5, 10 and 20 % of the samples with the highest scores are left out, and the
  mean of random samples;
- the metric of fresh students of the stock SFTTrainer on the half with the highest scores, for several seeds;
- CPU seconds of one thread, and peak resident memory with the student's weights.

    pip install rank-bm25 && python benchmarks/against_bergson.py --setup   # for these methods, once
    python benchmarks/attribution.py --toy                                  # minutes
    python benchmarks/attribution.py                                        # SmolLM2 and real paragraphs: hours

Everything measured is in `--output_dir`, so that a run that was stopped continues. `--table` prints what is there.
"""

import argparse
import json
import multiprocessing
import os
import resource
import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from _attribution_methods import METHODS
from scipy.stats import spearmanr

from trl_dpg import InnerLoopConfig, Student, toy
from trl_dpg.declaration import LANGUAGES, declaration_folder, declaration_world, model_folder, parse_declaration
from trl_dpg.evaluation import evaluate_dataset, interval
from trl_dpg.metagradients.fine_tuning import FineTuning
from trl_dpg.metrics import LanguageModelingMetric


TOPS = (0.01, 0.05, 0.10, 0.20)
FRESH_SEEDS = (0, 1, 2)
RATES = {"real": (1e-4, 1e-3), "toy": (1e-4, 1e-3)}


class Study:
    """The dataset, the metric and the student, and what was measured of them so far."""

    def __init__(self, folder, is_toy, num_samples, num_steps, length):
        self.folder, self.is_toy, self.num_steps, self.length = folder, is_toy, num_steps, length
        folder.mkdir(parents=True, exist_ok=True)
        world = folder / "world"
        if not (folder / "data.json").exists():
            world.mkdir(exist_ok=True)
            data = toy_data(world, num_samples) if is_toy else real_data(world, num_samples)
            (folder / "data.json").write_text(json.dumps(data))
        data = json.loads((folder / "data.json").read_text())
        self.texts, self.languages, self.queries = data["texts"], data["languages"], data["queries"]
        self.records = [json.loads(line) for line in self._read("truth.jsonl")]

    def _read(self, name):
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    @cached_property
    def metric(self):
        return LanguageModelingMetric(self.queries, max_length=self.length)

    @cached_property
    def student(self):
        return self.fresh_student()

    def fresh_student(self, seed=0):
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM

        path = self.folder / "world" / "student"
        torch.manual_seed(seed)
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        return Student(model, peft_config=None if self.is_toy else lora)

    def config(self, rate, **changes):
        config = InnerLoopConfig(
            batch_size=len(self.texts) // self.num_steps,
            micro_batch_size=16,
            learning_rate=rate,
            eps_root=1e-7,
            max_length=self.length,
            memory_budget=0,
        )
        return replace(config, **changes)

    def phi(self, rate, left, what):
        """Φ of the student that is fine-tuned at this learning rate without the samples of the rows `left`."""
        left = sorted(map(int, left))
        for record in self.records:
            if (record["rate"], record["left"]) == (rate, left):
                return record["phi"]
        started = time.perf_counter()
        rows = set(left)
        texts = ["" if row in rows else text for row, text in enumerate(self.texts)]  # an empty sample has weight 0
        fine_tuning = FineTuning(self.student, texts, self.config(rate))
        phi = fine_tuning.metric(torch.ones(len(texts)), self.metric)
        seconds = round(time.perf_counter() - started, 1)
        self._add("truth.jsonl", self.records, {"rate": rate, "what": what, "left": left, "phi": phi, "s": seconds})
        return phi

    def _add(self, name, records, record):
        records.append(record)
        with open(self.folder / name, "a") as file:
            file.write(json.dumps(record) + "\n")

    def random_sets(self, share, number):
        rng = np.random.default_rng([round(100 * share), len(self.texts)])
        size = round(share * len(self.texts))
        return [np.sort(rng.permutation(len(self.texts))[:size]) for _ in range(number)]

    def scores(self, method, rate):
        """The method's record: scores, seconds and peak memory. It is computed in a process of its own."""
        path = self.folder / "scores" / f"{method.replace(' ', '_')}_{rate:g}.json"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            process = multiprocessing.get_context("spawn").Process(target=compute, args=(self, method, rate, path))
            process.start()
            process.join()
            if process.exitcode:
                print(f"{method} failed with exit code {process.exitcode}", flush=True)
                return None
        return json.loads(path.read_text())

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name not in ("student", "metric")}

    def fresh(self, rate, rows, what):
        """Φ of SFTTrainer's fresh students on these rows, for each seed."""
        records = [json.loads(line) for line in self._read("fresh.jsonl")]
        rows, values = sorted(map(int, rows)), []
        for seed in FRESH_SEEDS:
            known = [r["phi"] for r in records if (r["rate"], r["rows"], r["seed"]) == (rate, rows, seed)]
            if not known:
                texts = [self.texts[row] for row in rows]
                config = self.config(rate, batch_size=len(rows) // self.num_steps, micro_batch_size=None)
                phi = evaluate_dataset(lambda seed=seed: self.fresh_student(seed), texts, self.metric, config, seed)
                known = [phi.metric]
                self._add("fresh.jsonl", [], {"rate": rate, "what": what, "rows": rows, "seed": seed, "phi": known[0]})
            values.append(known[0])
        return values


def real_data(world, num_samples):
    """Paragraphs of the Declaration of Human Rights in English, Spanish, French and German. Other ones are queries."""
    declaration_world(world)
    model = model_folder(Path((world / "student").resolve()).parent)
    texts = declaration_folder(model.parent)
    queries = [json.loads(line)["text"] for line in (world / "benchmark.jsonl").read_text().splitlines()]
    samples = []
    for language in ("eng", *LANGUAGES[:3]):
        name = {"deu": "deu_1996"}.get(language, language)
        paragraphs = parse_declaration((texts / f"{name}.html").read_text()).values()
        own = [text for text in paragraphs if len(text) >= 40 and text not in queries]
        if len(own) < num_samples // 4:
            raise SystemExit(f"{language} has {len(own)} paragraphs for {num_samples // 4} samples.")
        rng = np.random.default_rng(len(samples))
        samples += [(own[k], language) for k in rng.permutation(len(own))[: num_samples // 4]]
    order = np.random.default_rng(0).permutation(len(samples))
    return {
        "texts": [samples[k][0] for k in order],
        "languages": [samples[k][1] for k in order],
        "queries": queries,
    }


def toy_data(world, num_samples):
    """The quickstart's two languages. The student knows A; 30 % of the sentences and the queries are in B."""
    import random

    toy.languages_world(world, seed=0)
    rng = random.Random(1)
    languages = ["B" if rng.random() < 0.3 else "A" for _ in range(num_samples)]
    words = {"A": toy.LANGUAGE_A, "B": toy.LANGUAGE_B}
    queries = [json.loads(line)["text"] for line in (world / "benchmark.jsonl").read_text().splitlines()]
    return {
        "texts": [toy.sentence(words[name], rng) for name in languages],
        "languages": languages,
        "queries": queries,
    }


def compute(study, method, rate, path):
    """The work of a method's process."""
    torch.set_num_threads(1)
    study.student  # loading takes no part of the time  # noqa: B018
    started = sum(os.times()[:4])
    scores = METHODS[method](study, rate)
    who_ran = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    record = {
        "method": method,
        "rate": rate,
        "cpu_seconds": sum(os.times()[:4]) - started,  # with those of processes that have ended
        "peak_mb": max(resource.getrusage(who).ru_maxrss for who in who_ran) / 1000,
        "scores": np.asarray(scores, dtype=float).tolist(),
    }
    path.write_text(json.dumps(record))


# -- figures ---------------------------------------------------------------------------------------------------------


def kept_sums(scores, sets):
    """The sum of the kept samples' scores, for each set that is left out."""
    scores = np.asarray(scores)
    return np.array([scores.sum() - scores[left].sum() for left in sets])


def correlation(predicted, actual, draws=2000):
    """Spearman's correlation, and that of each bootstrap draw of the sets."""
    picks = np.random.default_rng(0).integers(len(actual), size=(draws, len(actual)))  # the same for all methods
    found = np.array([spearmanr(predicted[k], actual[k]).statistic for k in picks])
    return spearmanr(predicted, actual).statistic, found


def measure(study, args):
    """Everything, the figures that matter most first. Each one is kept, so that the order is only that of time."""
    for rate in args.rates:
        for method in args.methods:
            study.scores(method, rate)
        for left in study.random_sets(0.5, args.halves):
            study.phi(rate, left, "half")
    for rate in args.rates:
        study.phi(rate, [], "all")
        for left in study.random_sets(0.1, args.random):
            study.phi(rate, left, "10 %")
        for share in (0.10, *(top for top in TOPS if top != 0.10)):
            for method in args.methods:
                if (record := study.scores(method, rate)) is not None:
                    study.phi(rate, top(record["scores"], share), f"top {share:.0%} of {method}")
        for left in study.random_sets(0.05, args.small):
            study.phi(rate, left, "5 %")
    for rate in args.rates:
        for method in args.methods:
            if (record := study.scores(method, rate)) is not None:
                study.fresh(rate, top(record["scores"], 0.5), method)


def top(scores, share):
    number = max(1, round(share * len(scores)))
    return np.argsort(-np.asarray(scores), kind="stable")[:number]


def known(study, rate, sets):
    """Φ of those sets that were measured, and these sets."""
    values = {tuple(r["left"]): r["phi"] for r in study.records if r["rate"] == rate}
    done = [left for left in sets if tuple(map(int, left)) in values]
    return done, np.array([values[tuple(map(int, left))] for left in done])


def table(study, args):
    for rate in args.rates:
        halves, half = known(study, rate, study.random_sets(0.5, args.halves))
        fives, five = known(study, rate, study.random_sets(0.05, args.small))
        _, tens = known(study, rate, study.random_sets(0.1, args.random))
        _, whole = known(study, rate, [np.array([], dtype=int)])
        print(f"\nlearning rate {rate:g}: {len(half)} halves, {len(five)} times 5 %, {len(tens)} random 10 %", end="")
        if len(whole):
            print(f"; all samples {whole[0]:.4f}, random 10 % left out: {tens.mean() - whole[0]:+.5f}", end="")
        tops = " | ".join(f"top {share:.0%}" for share in TOPS)
        print(f"\n| method | LDS | first minus this | LDS, 5 % | {tops} | best half, fresh | CPU s | MB |")
        print(f"|{'---|' * (7 + len(TOPS))}")
        first = None
        for method in args.methods:
            path = study.folder / "scores" / f"{method.replace(' ', '_')}_{rate:g}.json"
            if not path.exists() or len(half) < 5:
                continue
            record = json.loads(path.read_text())
            value, draws = correlation(kept_sums(record["scores"], halves), half)
            first = draws if first is None else first
            cells = [method, f"{value:.3f} [{np.quantile(draws, 0.025):.3f}, {np.quantile(draws, 0.975):.3f}]"]
            low, high = np.quantile(first - draws, [0.025, 0.975])
            cells.append("" if first is draws else f"[{low:+.3f}, {high:+.3f}]")
            small = [f"{correlation(kept_sums(record['scores'], fives), five)[0]:.3f}"] if len(five) > 4 else [""]
            cells += small
            for share in TOPS:
                _, phi = known(study, rate, [np.sort(top(record["scores"], share))])
                cells.append(f"{phi[0] - whole[0]:+.4f}" if len(phi) and len(whole) else "")
            cells.append(fresh_cell(study, rate, record))
            cells += [f"{record['cpu_seconds']:.0f}", f"{record['peak_mb']:.0f}"]
            print(f"| {' | '.join(cells)} |")


def fresh_cell(study, rate, record):
    rows = sorted(map(int, top(record["scores"], 0.5)))
    lines = [json.loads(line) for line in study._read("fresh.jsonl")]
    values = [line["phi"] for line in lines if (line["rate"], line["rows"]) == (rate, rows)]
    if len(values) < 2:
        return ""
    mean, half_width = interval(values)
    return f"{mean:.4f} ± {half_width:.4f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--toy", action="store_true", help="the quickstart's student and sentences")
    parser.add_argument("--table", action="store_true", help="only print what was measured so far")
    parser.add_argument("--num_samples", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--length", type=int, default=32, help="tokens of a sample and of a query")
    parser.add_argument("--halves", type=int, default=50)
    parser.add_argument("--small", type=int, default=30, help="times that 5 %% are left out")
    parser.add_argument("--random", type=int, default=10, help="random sets of 10 %%")
    parser.add_argument("--rates", type=float, nargs="+", default=(1e-4, 1e-3))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    name = "attribution_toy" if args.toy else "attribution"
    study = Study(args.output_dir or Path("runs", name), args.toy, args.num_samples, args.steps, args.length)
    if not args.table:
        measure(study, args)
    table(study, args)


if __name__ == "__main__":
    main()
