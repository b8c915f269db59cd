"""The score server: its answers, what it refuses, and datasets that come in parts."""

import asyncio
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from starlette.testclient import TestClient

from tests.score_server import ScoreServer
from tests.small_runs import CONFIG, METRIC, PROMPTS, TEXTS, make_student
from trl_dpg import DPGReward, metagradient
from trl_dpg.serving import Engine, Limits, make_app
from trl_dpg.serving.datasets import OVERHEAD, Datasets
from trl_dpg.serving.requests import Refused, ScoreRequest, bytes_of


HALVES = (slice(0, 4), slice(4, 8))
TOKEN = "a-secret-of-this-test"
FEW = Limits(max_request_bytes=4000, max_samples=64, max_text_length=200, max_waiting=1, poll_timeout=20)


@pytest.fixture(scope="module")
def server():
    with ScoreServer(limits=FEW) as running:
        yield running


def library(examples):
    return metagradient(make_student(), examples, METRIC, CONFIG)


# -- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["texts", "pairs", "messages"])
def test_the_answer_is_that_of_the_library_to_the_bit(form, server):
    examples = {
        "texts": TEXTS,
        "pairs": [{"prompt": f"{p} ", "completion": t} for p, t in zip(PROMPTS, TEXTS, strict=True)],
        "messages": [
            {"prompt": [{"role": "user", "content": p}], "completion": [{"role": "assistant", "content": t}]}
            for p, t in zip(PROMPTS, TEXTS, strict=True)
        ],
    }[form]
    if form == "messages":
        student = server.engine.reward.student
        student.processing_class.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    out, (status, answer) = library(examples), server.post(examples)
    assert status == 200 and answer["scores"] == out.scores.tolist() and answer["losses"] == out.losses.tolist()
    assert (answer["metric_before"], answer["metric_after"]) == (out.metric_before, out.metric_after)
    assert answer["proxies"] == out.proxies and answer["num_empty"] == answer["num_truncated"] == 0
    if form == "texts":
        assert answer["rewards"] == DPGReward(make_student(), METRIC, CONFIG)(PROMPTS, TEXTS)


def test_a_dataset_without_a_name_that_fails_says_so_to_a_client_that_polls():
    calls = []

    def metric(student):
        calls.append(student)
        raise RuntimeError("no benchmark")

    with ScoreServer(DPGReward(make_student(), metric, CONFIG)) as running:
        answers = []
        while not answers or answers[-1][0] == 202:
            answers.append(running.post(TEXTS, wait=0))
            time.sleep(0.2)
        assert answers[-1][0] == 500 and "no benchmark" in answers[-1][1]["detail"] and len(calls) == 1
        running.post(TEXTS)
    assert len(calls) == 2  # it was tried again after the client had the message


def test_samples_that_come_one_by_one_in_any_order_are_one_dataset(server):
    places = list(range(8))
    random.Random(0).shuffle(places)

    def send(place):
        return place, server.post([{"id": place, "text": TEXTS[place]}], dataset="step-1", size=8)

    with ThreadPoolExecutor(8) as threads:
        answers = dict(threads.map(send, places))
    assert {status for status, _ in answers.values()} == {200}
    assert [answers[place][1]["scores"] for place in range(8)] == [[score] for score in library(TEXTS).scores.tolist()]
    assert {answer["size"] for _, answer in answers.values()} == {8}


def test_samples_that_are_sent_again_are_not_taken_twice(server):
    first = [{"id": k, "text": TEXTS[k]} for k in range(5)]
    for _ in range(2):
        status, answer = server.post(first, dataset="again", size=8, wait=0)
        assert status == 202 and answer["state"] == "collecting" and (answer["received"], answer["size"]) == (5, 8)
    rest = [{"id": k, "text": TEXTS[k]} for k in range(5, 8)]
    scores = library(TEXTS).scores.tolist()
    assert server.post(rest, dataset="again", size=8)[1]["scores"] == scores[5:]
    assert server.post(first, dataset="again", size=8)[1]["scores"] == scores[:5]  # they are kept


def test_a_dataset_without_a_name_that_is_sent_again_is_not_scored_again(server):
    texts = ["w1 w5 w3", *TEXTS[1:]]
    first, second = server.post(texts), server.post(texts)
    assert first[0] == second[0] == 200 and first[1]["seconds"] == second[1]["seconds"]


def test_a_stream_is_cut_into_datasets_as_samples_arrive(server):
    parts = [[{"id": f"{name}{k}", "text": TEXTS[k]} for k in range(8)] for name in "ab"]
    with ThreadPoolExecutor(2) as threads:
        halves = [threads.submit(server.post, parts[0][own], stream="rollouts", size=8) for own in HALVES]
        first = [half.result()[1] for half in halves]
    status, second = server.post(parts[1], stream="rollouts", size=8)
    assert status == 200 and first[0]["dataset"] == first[1]["dataset"] != second["dataset"]
    assert second["scores"] == first[0]["scores"] + first[1]["scores"] == library(TEXTS).scores.tolist()
    again = server.post(parts[0][:2], stream="rollouts", size=8)[1]
    assert again["dataset"] == first[0]["dataset"] and again["scores"] == second["scores"][:2]


def test_health_says_what_is_served_and_no_secrets(server):
    status, answer = server.health()
    assert status == 200 and answer["status"] == "ok" and answer["running"] is False
    assert "LanguageModelingMetric" in answer["metric"] and "Llama" in answer["student"]
    assert answer["inner_loop"]["learning_rate"] == CONFIG.learning_rate and answer["limits"]["max_samples"] == 64
    assert {"trl-dpg", "torch", "trl"} <= set(answer["versions"]) and answer["processes"] == 1


# -- wrong requests -------------------------------------------------------------------------------------------------

JSON = {"Content-Type": "application/json"}


def body(**entries):
    return json.dumps({"samples": TEXTS} | entries)


def samples(*entries, **further):
    return json.dumps({"samples": entries} | further)


WRONG = {
    "no JSON": ("{", 422, "Invalid JSON"),
    "not UTF-8": (b'{"samples": ["\xff"]}', 422, "Invalid JSON"),
    "no object": ("[1]", 422, "object"),
    "nothing": ("", 422, "Invalid JSON"),
    "no samples": ("{}", 422, "samples: Field required"),
    "empty": (samples(), 422, "at least 1 item"),
    "unknown field": (body(texts=[]), 422, "texts: Extra inputs are not permitted"),
    "a field with a long name": (body(**{"x" * 3000: 1}), 422, "xxx"),
    "many wrong samples": (samples(*range(20)), 422, "; and 15 more"),
    "a number": (samples(3), 422, "samples.0"),
    "null": (samples(None), 422, "samples.0"),
    "a number as text": (samples({"text": 3}), 422, "samples.0.text: Input should be a valid string"),
    "no text": (samples({"id": 3}), 422, "either `text`, or `prompt` and `completion`"),
    "half a pair": (samples({"prompt": "w1"}), 422, "either `text`, or `prompt` and `completion`"),
    "text and pair": (samples({"text": "", "prompt": "", "completion": ""}), 422, "either `text`"),
    "unlike pair": (samples({"prompt": "", "completion": [{"role": "a", "content": ""}]}), 422, "must both be texts"),
    "a message without a role": (samples({"prompt": [{"content": ""}], "completion": [{}]}), 422, "role"),
    "half a surrogate": ('{"samples": ["\\ud800"]}', 422, ""),
    "a name with spaces": (body(dataset="my data", size=8), 422, "dataset: String should match"),
    "no size": (body(dataset="d"), 422, "need `size`"),
    "size zero": (body(dataset="d", size=0), 422, "size: Input should be greater than or equal to 1"),
    "a size that is a text": (body(dataset="d", size="8"), 422, "size: Input should be a valid integer"),
    "dataset and stream": (body(dataset="d", stream="s", size=8), 422, "not both"),
    "no ids": (body(dataset="d", size=9), 422, "needs an `id`"),
    "no ids in a stream": (body(stream="s", size=8), 422, "needs an `id`"),
    "one id twice": (samples({"id": 1, "text": ""}, {"id": 1, "text": ""}, dataset="d", size=8), 422, "the same `id`"),
    "a truth value as id": (samples({"id": True, "text": ""}, dataset="d", size=8), 422, "samples.0.id"),
    "a negative wait": (body(wait=-1), 422, "wait: Input should be greater than or equal to 0"),
    "an endless wait": ('{"samples": ["w1"], "wait": Infinity}', 422, ""),
    "too many samples": (json.dumps({"samples": [""] * 65}), 413, "may have 64 samples, not 65"),
    "too large a dataset": (samples({"id": 1, "text": ""}, dataset="d", size=10**9), 413, "not 1000000000"),
    "too long a text": (samples("w1 " * 100), 413, "Sample 0 has 300 characters; at most 200"),
    "too long a body": (body() + " " * 4000, 413, "more than 4000 bytes"),
    "more than its size": (
        samples(*[{"id": k, "text": "w1"} for k in range(9)], stream="s", size=8),
        409,
        "room for 8",
    ),
}


@pytest.fixture(scope="module")
def client():
    engine = Engine(DPGReward(make_student(), METRIC, CONFIG))
    with TestClient(make_app(engine, FEW), base_url="http://127.0.0.1") as running:
        yield running


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_gets_a_reason(name, client):
    content, status, reason = WRONG[name]
    answer = client.post("/score", content=content, headers=JSON)
    assert answer.status_code == status and reason in answer.json()["detail"], answer.text
    assert len(answer.text) < 1000  # what was sent is not sent back
    assert client.get("/health").json()["collecting"] == 0


def test_what_is_no_json_or_asks_for_another_place_is_refused(client):
    for headers in ({"Content-Type": "text/plain"}, {}, JSON | {"Content-Encoding": "gzip"}):
        assert client.post("/score", content=body(), headers=headers).status_code == 415
    assert client.get("/score").status_code == 405 and client.get("/elsewhere").status_code == 404
    assert client.post("/score", content=body(), headers=JSON | {"Host": "evil.example"}).status_code == 400


def test_requests_need_the_token_which_is_nowhere_shown(caplog):
    engine = Engine(DPGReward(make_student(), METRIC, CONFIG))
    with caplog.at_level("DEBUG"), TestClient(make_app(engine, FEW, TOKEN)) as client:
        for given in (None, "", "Bearer", "Bearer wrong", f"Bearer {TOKEN.upper()}", TOKEN, "Bearer \xe9"):
            headers = JSON if given is None else JSON | {"Authorization": given.encode("latin-1")}
            answers = client.get("/health", headers=headers), client.post("/score", content=body(), headers=headers)
            for answer in answers:
                assert answer.status_code == 401 and "the token is wrong" in answer.json()["detail"]
                assert answer.headers["WWW-Authenticate"] == "Bearer"
        answer = client.get("/health", headers={"Authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == 200 and TOKEN not in answer.text + caplog.text


# -- datasets that have no simple end ---------------------------------------------------------------------------------


def test_what_contradicts_a_dataset_is_a_conflict(server):
    first = [{"id": k, "text": TEXTS[k]} for k in range(8)]
    server.post(first[:4], dataset="conflict", size=8, wait=0)
    for part, size, reason in (
        ([{"id": 3, "text": "another"}], 8, "Sample 3 of dataset 'conflict' was sent before with another text"),
        (first[4:], 9, "has the size 8, not 9"),
        ([{"id": f"x{k}", "text": "w1"} for k in range(5)], 8, "room for 4"),
    ):
        status, answer = server.post(part, dataset="conflict", size=size)
        assert status == 409 and reason in answer["detail"]
    status, answer = server.post(first[4:], dataset="conflict", size=8)
    assert status == 200 and answer["scores"] == library(TEXTS).scores.tolist()[4:]
    status, answer = server.post([{"id": 8, "text": "w1"}], dataset="conflict", size=8)
    assert status == 409 and "is complete, or given up, without sample 8" in answer["detail"]


def test_a_dataset_waits_for_its_turn_and_one_too_many_is_asked_to_come_again():
    running, go_on = threading.Event(), threading.Event()
    expected = [library(texts).scores.tolist() for texts in (TEXTS, TEXTS[::-1])]  # before another thread computes

    def metric(student):
        running.set()
        assert go_on.wait(30)
        return METRIC(student)

    with ScoreServer(DPGReward(make_student(), metric, CONFIG), FEW) as server, ThreadPoolExecutor(2) as threads:
        first = threads.submit(server.post, TEXTS)
        assert running.wait(30)
        second = threads.submit(server.post, TEXTS[::-1])
        while server.health()[1]["waiting"] < 1:
            time.sleep(0.01)
        assert server.health()[1]["running"] is True
        status, answer = server.post(TEXTS[:4])
        assert status == 503 and answer["retry_after"] == "5" and "1 datasets wait for their turn" in answer["detail"]
        assert server.post(TEXTS, wait=0)[0] == 202
        go_on.set()
        assert [first.result()[1]["scores"], second.result()[1]["scores"]] == expected
        assert server.post(TEXTS[:4])[0] == 200


def test_an_error_is_an_answer_and_the_server_lives_on():
    errors = [RuntimeError("no benchmark, api_key='sk-secret'")]

    def metric(student):
        if errors:
            raise errors.pop()
        return METRIC(student)

    with ScoreServer(DPGReward(make_student(), metric, CONFIG)) as server:
        status, answer = server.post(TEXTS)
        assert status == 500 and "no benchmark, api_key='<hidden>'" in answer["detail"]
        assert "reward of rank 0, with the metric metric" in answer["detail"]
        status, answer = server.post([""] * 4)
        assert status == 500 and "None of the 4 samples has a token to learn from" in answer["detail"]
        assert server.post(TEXTS)[1]["scores"] == library(TEXTS).scores.tolist()


class Clock:
    seconds = 0.0

    def __call__(self):
        return self.seconds


def request(*ids, dataset="d", size=3):
    return ScoreRequest(dataset=dataset, size=size, samples=[{"id": name, "text": f"w{name}"} for name in ids])


def in_a_loop(function):
    async def run():
        return function()

    return asyncio.run(run())


def test_a_dataset_that_never_gets_complete_is_given_up_and_forgotten_later():
    clock, jobs = Clock(), []
    datasets = Datasets(jobs.append, Limits(dataset_timeout=60, keep=300), clock)

    def check():
        datasets.take(request(0))
        clock.seconds = 59
        datasets.take(request(1))
        clock.seconds = 118
        waiting = datasets.take(request(0))  # a sample that was there does not prolong it
        assert waiting.refused is None
        clock.seconds = 120
        refused = datasets.take(request(0)).refused
        assert refused.status == 410 and "2 of its 3 samples came, and none in the last 60 s" in refused.reason
        with pytest.raises(Refused, match="given up, without sample 2"):
            datasets.take(request(2))
        assert datasets.take(request(2, dataset="another")).refused is None
        clock.seconds = 420
        assert datasets.take(request(0)).refused is None and not jobs

    in_a_loop(check)


def test_a_request_that_waits_hears_that_its_dataset_is_given_up():
    with ScoreServer(limits=Limits(dataset_timeout=1)) as server:
        status, answer = server.post([{"id": 1, "text": "w1"}], dataset="late", size=2)
        assert status == 410 and "'late' was given up: 1 of its 2 samples came" in answer["detail"]


@pytest.mark.parametrize(("character", "each"), [("w", 1), ("я", 2), ("言", 2), ("🙂", 4)])
def test_wide_characters_count_as_the_memory_that_they_take(character, each):
    for example in (character * 1000, {"prompt": "", "completion": character * 1000}):
        assert 0 <= bytes_of(example) - 1000 * each < 400


def test_datasets_that_are_never_finished_do_not_fill_the_memory():
    datasets = Datasets(None, Limits(max_request_bytes=300), Clock())

    def fill():
        for number in range(20):
            sample = {"id": 0, "text": "w" * 100}
            datasets.take(ScoreRequest(dataset=f"d{number}", size=2, samples=[sample]))

    with pytest.raises(Refused, match="fill the server's memory"):
        in_a_loop(fill)
    assert len(datasets.in_state("collecting")) == 16 * 300 // (bytes_of("w" * 100) + OVERHEAD) == 13
