import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from filelock import FileLock

from tests.distributed import sweeps
from tests.tiny import make_model, on_processes
from tests.unroll import log_likelihood, unroll
from trl_dpg import Student
from trl_dpg.evaluation import evaluate_dataset


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """What each of four processes found. The workers of a test run share it."""
    parallel = "PYTEST_XDIST_WORKER" in os.environ
    folder = (tmp_path_factory.getbasetemp().parent if parallel else tmp_path_factory.mktemp("four")) / "ranks"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            process = on_processes(4, "tests.distributed.sweeps", "equal_scores", str(folder))
            assert process.returncode == 0, process.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


def difference(found, expected):
    found, expected = torch.tensor(found), torch.tensor(expected)
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.first
@pytest.mark.faults
def test_scores_are_those_of_one_rank(four):
    one = {name.removesuffix(", 1"): found for name, found in four[0].items() if name.endswith(", 1")}
    assert len(one) == 11
    for name, found in four[0].items():
        setting, _, size = name.rpartition(", ")
        if setting in one and size != "1":
            expected = one[setting]
            assert difference(found["scores"], expected["scores"]) <= 1e-5, name
            assert found["metric"] == pytest.approx(expected["metric"], rel=1e-5), name
            assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5), name
            if expected["tokens"] is not None:
                assert difference(found["tokens"], expected["tokens"]) <= 1e-5, name


@pytest.mark.faults
def test_all_ranks_have_the_same_result(four):
    for name in ("full, four steps, 4", "lora, one step, 4", "float64", "verify", "attribute"):
        assert all(rank[name] == four[0][name] for rank in four[1:]), name


@pytest.mark.faults
def test_multipliers_and_draws_are_the_same_on_all_ranks(four):
    alone = [
        sweeps.constrained_reward(),
        sweeps.constrained_reward(cross_group_batching=False, num_generations=2),
    ]
    for rank in four:
        assert [step["weights"] for steps in rank["reward"] for step in steps] == [
            step["weights"] for steps in four[0]["reward"] for step in steps
        ]
        for found, expected in zip(rank["reward"], alone, strict=True):
            for step, own in zip(found, expected, strict=True):
                assert difference(step["scores"], own["scores"]) <= 1e-3
                for name in ("dpg/metric_before", "dpg/metric_after", "dpg/multiplier/b", "dpg/metric_noise_1"):
                    assert step[name] == pytest.approx(own[name], rel=1e-3, abs=1e-6), name
            assert len({tuple(step["weights"]) for step in found}) > 1


@pytest.mark.faults
def test_scores_on_four_ranks_are_exact_in_float64(four):
    weights = torch.linspace(0, 1.5, 12, dtype=torch.float64)
    benchmarks = {"benchmark": sweeps.BENCHMARK, "one text": sweeps.BENCHMARK[:1]}
    for name, texts in benchmarks.items():
        metric = log_likelihood([{"input_ids": sweeps.TOKENIZER(text)["input_ids"]} for text in texts])
        settings = dict(lr=1e-3, eps_root=1e-6, batch_size=3)
        scores, tokens, *_ = unroll(make_model(scale=1.0), sweeps.SAMPLES, metric, weights, **settings)
        found = four[0]["float64"][name]
        assert difference(found["scores"], scores.tolist()) <= 1e-6  # the results are float32
        assert difference(found["tokens"], tokens.tolist()) <= 1e-6


@pytest.mark.faults
def test_a_rank_keeps_its_share_of_the_trajectory(four):
    alone, shared = four[0]["kept"]
    assert shared <= 0.27 * alone
    assert four[0]["kept with checkpoints"] < shared


@pytest.mark.faults
def test_the_predicted_peak_is_that_of_a_rank(four):
    for rank in four:
        for name, (predicted, measured) in rank["peaks"].items():
            assert predicted == pytest.approx(measured, rel=0.15), name


@pytest.mark.faults
def test_changed_weights_and_verification_are_those_of_one_rank(four):
    (found,) = four[:1]
    for steps in ("one", "four"):
        assert found[f"changes {steps} together"] == pytest.approx(found[f"changes {steps} alone"], rel=1e-2)
    assert found["losses together"] == pytest.approx(found["losses alone"], rel=1e-5)
    assert found["verify"]["pearson"] > 0.99


@pytest.mark.faults
def test_attribute_shares_a_chunk_between_ranks(four):
    apart, together = four[0]["attribute"]
    assert len(together) == 24 and difference(together, apart) <= 1e-5


@pytest.mark.faults
def test_fresh_students_are_those_of_one_process(four):
    config = replace(sweeps.CONFIG, batch_size=4, learning_rate=1e-2)
    alone = evaluate_dataset(
        lambda: Student(make_model(scale=1.0), sweeps.TOKENIZER), four[0]["texts"], sweeps.METRIC, config
    )
    assert all(rank["evaluate"] == pytest.approx(alone.metric, rel=1e-5) for rank in four)
    assert all("6 samples in batches of 4 leave 2" in rank["uneven"] for rank in four)


@pytest.mark.faults
def test_an_error_on_one_rank_is_raised_on_all(four):
    first, second, *others = (rank["errors"] for rank in four)
    for name in ("first", "second", "text", "saved", "saved again"):
        assert "failed on rank 1: " in first[name] and all(other[name] == first[name] for other in others), name
    assert "no benchmark" in second["first"] and "no benchmark" in first["first"]
    words = dict(samples="samples", settings="inner loop", interval="inner loop", frozen="student", diverged="rate")
    for name, word in words.items():
        assert all(other[name] == first[name] for other in (second, *others)) and word in first[name], name


@pytest.mark.faults
@pytest.mark.parametrize("where", ["in the metric", "on the host", "in an exchange"])
def test_all_ranks_halve_the_micro_batch_if_one_is_out_of_memory(where, four):
    for rank in four:
        size, scores = rank["errors"][f"out of memory {where}"]
        assert size == 1  # of 3 samples
        assert difference(scores, four[0]["full, one step, 1"]["scores"]) <= 1e-5


@pytest.mark.faults
@pytest.mark.parametrize("phase", ["forward", "reverse"])
def test_a_killed_rank_stops_the_others(phase, tmp_path):
    started = time.monotonic()
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000), "WORLD_SIZE": "3"}
    command = [sys.executable, "-m", "tests.distributed.sweeps", "killed", str(tmp_path), phase]
    places = [os.environ | address | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(3)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=place) for place in places]
    ends = [(process.communicate(timeout=120)[1], process.returncode) for process in processes]
    assert time.monotonic() - started < 120
    assert ends[1][1] == -9
    for text, code in (ends[0], ends[2]):
        assert code > 0 and "other ranks" in text, text[-2000:]
