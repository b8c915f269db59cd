"""`teach`: what is asked, stored, refused and written, against a server that misbehaves as each test says."""

import asyncio
import contextlib
import email.utils
import heapq
import itertools
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import datasets
import pytest
import trl
from trl import SFTConfig, SFTTrainer

from tests.teacher_server import Server, chunk
from tests.tiny import QUIET, make_byte_tokenizer, make_model, make_tokenizer
from trl_dpg import cli
from trl_dpg.practice.teaching import (
    PRESETS,
    Limits,
    LostError,
    Selection,
    Teacher,
    TeacherError,
    from_preset,
    reasoning_place,
    sft_row,
    teach,
)
from trl_dpg.practice.teaching.answers import Answer, read_answer
from trl_dpg.practice.teaching.client import Client
from trl_dpg.practice.teaching.errors import Refused, Unanswered, Unreachable, seconds_to_wait
from trl_dpg.practice.teaching.sft import check_rendered, render
from trl_dpg.practice.teaching.throttle import Throttle
from trl_dpg.provenance import check_manifest, read_manifest


ROWS = [{"prompt": f"question {number}", "solution": str(number)} for number in range(12)]
KEY = "sk-secret-0123456789"


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def asked(server):
    return [request["messages"][-1]["content"] for request in server.requests]


# -- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        {"content": "four", "reasoning_content": "two and two"},
        {"content": "four", "reasoning": "two and two"},
        {"content": "<think>\ntwo and two\n</think>\n\nfour"},
        {"content": "two and two\n</think>\n\nfour"},
    ],
)
def test_the_reasoning_is_apart_from_the_answer(message, tmp_path):
    with Server(lambda request, number: message) as server:
        teach(Teacher(server.url, "teacher"), ROWS[:1], tmp_path)
    (sample,) = lines(tmp_path / "samples.jsonl")
    assert list(sample)[:5] == ["prompt", "completion", "reasoning", "finish_reason", "usage"]
    assert (sample["completion"], sample["reasoning"], sample["finish_reason"]) == ("four", "two and two", "stop")
    assert sample["usage"]["completion_tokens"] == 20 and sample["solution"] == "0"


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_a_stream_is_put_together(field, tmp_path):
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    parts = [chunk(**{field: "two "}), chunk(**{field: "and two"}), chunk(content="fo"), chunk("stop", content="ur")]
    with Server(lambda request, number: [*parts, {**chunk(usage=usage), "choices": []}]) as server:
        teach(Teacher(server.url, "teacher", stream=True), ROWS[:1], tmp_path)
    (sample,) = lines(tmp_path / "samples.jsonl")
    assert (sample["completion"], sample["reasoning"]) == ("four", "two and two")
    assert sample["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(
    "first",
    [
        (500, {"error": {"message": "oops"}}),
        (502, b"<html>Bad gateway</html>"),
        b'{"choices": [{"mess',
        b"",
        b'"a text"',
        (200, {"error": {"message": "overloaded", "code": 500}}),
        (200, {"choices": []}),
        (429, {"error": {"message": "slow down"}}),
        (200, {"error": {"message": "slow down", "code": 429}}),
    ],
    ids=str,
)
def test_a_disturbed_request_is_sent_again(first, tmp_path):
    with Server(lambda request, number: first if number == 0 else {"content": "ok"}) as server:
        taught = teach(Teacher(server.url, "teacher"), ROWS[:3], tmp_path)
    assert taught.there == 3 and len(server.requests) == 6 and not lines(tmp_path / "failures.jsonl")


@pytest.mark.parametrize(
    "half", [[chunk(content="ha")], [chunk(content="ha"), None], [chunk(content="ha"), b"{not json"]], ids=str
)
def test_half_a_stream_is_no_answer(half, tmp_path):
    with Server(lambda request, number: [chunk("stop", content="whole")] if number else half) as server:
        teach(Teacher(server.url, "teacher", stream=True), ROWS[:1], tmp_path)
    assert [sample["completion"] for sample in lines(tmp_path / "samples.jsonl")] == ["whole"]
    assert len(server.requests) == 2


def test_a_request_that_takes_too_long_is_given_up_and_asked_again_by_the_next_call(tmp_path):
    with Server(seconds=0.5) as server:
        taught = teach(Teacher(server.url, "teacher", timeout=0.1), ROWS[:1], tmp_path, limits=Limits(max_retries=1))
        assert taught.there == 0 and len(server.requests) == 2
        (failure,) = lines(tmp_path / "failures.jsonl")
        assert failure["reason"] == "no answer within 0.1 s" and failure["attempts"] == 2 and not failure["final"]
        assert teach(Teacher(server.url, "teacher"), ROWS[:1], tmp_path).there == 1
    assert lines(tmp_path / "failures.jsonl") == []


# -- errors -----------------------------------------------------------------------------------------------------------


def test_filtered_prompts_are_kept_as_failures_and_never_sent_again(tmp_path):
    def reply(request, number):
        if request["messages"][-1]["content"] in ("question 1", "question 2"):
            return (400, {"error": {"message": "no", "code": "content_filter"}})
        return {"content": "ok"}

    with Server(reply) as server:
        for _ in range(2):
            assert teach(Teacher(server.url, "teacher"), ROWS[:6], tmp_path).there == 4
    assert len(server.requests) == 6
    failures = lines(tmp_path / "failures.jsonl")
    assert sorted(failure["row"] for failure in failures) == [1, 2]
    assert all(failure["reason"].startswith("content_filter") for failure in failures)
    assert "| failed | 2 (33.3%) (content_filter: 2) |" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "refuses the key"), (402, "no money"), (403, "forbids this"), (429, "no money or quota left")],
)
def test_a_key_that_does_not_work_stops_the_run_and_is_shown_nowhere(status, message, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    body = {"error": {"message": f"Incorrect API key provided: {KEY}", "code": "insufficient_quota" * (status == 429)}}
    with Server(lambda request, number: (status, body)) as server:
        with pytest.raises(TeacherError, match=message) as raised:
            teach(Teacher(server.url, "teacher"), ROWS, tmp_path)
    assert len(server.requests) <= 4 and server.headers[0]["authorization"] == f"Bearer {KEY}"
    import traceback

    shown = "".join(traceback.format_exception(raised.value)) + caplog.text
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    assert KEY not in shown and KEY not in written and "***" in shown


@pytest.mark.parametrize("status", [404, 400])
def test_an_unknown_model_is_answered_with_the_known_ones(status, tmp_path):
    error = {"error": {"message": "The model `x` does not exist"}}
    with Server(lambda request, number: (status, error), models=("kimi", "qwen")) as server:
        with pytest.raises(TeacherError, match=r"`model` 'x' .*'kimi', 'qwen'"):
            teach(Teacher(server.url, "x"), ROWS, tmp_path)
    assert len(server.requests) <= 4 and lines(tmp_path / "failures.jsonl") == []


def test_no_server_is_an_error_at_once(tmp_path):
    with pytest.raises(TeacherError, match="cannot be reached"):
        teach(Teacher("http://127.0.0.1:9/v1", "teacher"), ROWS, tmp_path)


def test_a_run_in_which_most_fails_stops(tmp_path):
    with Server(lambda request, number: (400, {"error": {"message": "prompt is too long"}})) as server:
        taught = teach(Teacher(server.url, "teacher"), ROWS * 4, tmp_path, limits=Limits(max_concurrency=2))
    assert "10 of 10 requests have failed" in taught.stopped and len(server.requests) <= 12


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("3", 3.0), ("0.5", 0.5), ("soon", None)],
)
def test_retry_after_is_seconds_or_a_date(value, seconds):
    found = seconds_to_wait({"retry-after": value})
    assert found is None if seconds is None else found == pytest.approx(seconds, abs=1.1)


def test_a_date_of_retry_after_is_the_seconds_until_then():
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert seconds_to_wait({"retry-after": date}) == pytest.approx(30, abs=2)


def test_retry_after_is_waited_for(tmp_path):
    refusal = (429, {"error": {"message": "slow"}}, [("retry-after", "1")])
    with Server(lambda request, number: {"content": "ok"} if number else refusal) as server:
        teach(Teacher(server.url, "teacher"), ROWS[:1], tmp_path)
    assert 1.0 <= server.times[1] - server.times[0] < 3.0


def test_a_server_that_refuses_everything_is_named_as_such(tmp_path):
    refusal = (429, {"error": {"message": "slow"}}, [("retry-after", "0.2")])
    with Server(lambda request, number: refusal) as server:
        taught = teach(Teacher(server.url, "teacher"), ROWS[:2], tmp_path, limits=Limits(max_wait=0.5))
    assert taught.broken and taught.stopped.startswith("the server refuses all for 0.5 s (HTTP 429")


@pytest.mark.parametrize(
    ("end", "arguments"), [(Throttle.accepted, ()), (Throttle.failed, (1,)), (Throttle.unreachable, ())]
)
def test_a_request_that_is_not_refused_ends_the_time_of_refusals(end, arguments):
    now = 5.0
    throttle = Throttle(4, clock=lambda: now)
    throttle.refused(throttle.start())
    now = 10.0
    throttle.refused(throttle.start())
    assert throttle.refused_since == 5.0
    end(throttle, throttle.start(), *arguments)
    assert throttle.refused_since is None


# -- the journal ------------------------------------------------------------------------------------------------------


def test_a_second_call_asks_only_for_what_is_missing(tmp_path):
    with Server() as server:
        teacher = Teacher(server.url, "teacher", {"seed": 5})
        teach(teacher, ROWS[:2], tmp_path, num_samples=2)
        with (tmp_path / "samples.jsonl").open("a") as file:
            file.write('{"prompt": "question 1", "comple')  # killed while it wrote
        taught = teach(teacher, ROWS[:3], tmp_path, num_samples=3)
    assert (taught.wanted, taught.there, taught.accepted) == (9, 9, 5)
    assert sorted(zip(asked(server), [request["seed"] for request in server.requests], strict=True)) == sorted(
        (row["prompt"], seed) for row in ROWS[:3] for seed in (5, 6, 7)
    )
    samples = lines(tmp_path / "samples.jsonl")
    assert [(s["row"], s["sample"]) for s in samples] == [(row, sample) for row in range(3) for sample in range(3)]


def test_prompts_that_are_the_same_have_samples_of_their_own(tmp_path):
    with Server() as server:
        teach(Teacher(server.url, "teacher"), ROWS[:1] * 3, tmp_path, num_samples=2)
    assert len(server.requests) == 6 == len({sample["key"] for sample in lines(tmp_path / "samples.jsonl")})


def test_samples_of_other_settings_are_refused_and_kept(tmp_path):
    with Server() as server:
        teach(Teacher(server.url, "teacher"), ROWS[:2], tmp_path)
        before = (tmp_path / "samples.jsonl").read_bytes()
        with pytest.raises(ValueError, match=r"other settings: parameters \(was \{\}\)"):
            teach(Teacher(server.url, "teacher", {"temperature": 1.0}), ROWS[:2], tmp_path)
    assert (tmp_path / "samples.jsonl").read_bytes() == before


def test_a_damaged_line_is_named_and_nothing_is_changed(tmp_path):
    with Server() as server:
        teach(Teacher(server.url, "teacher"), ROWS[:3], tmp_path)
        damaged = (tmp_path / "samples.jsonl").read_text().replace('"prompt": "question 1"', '"prompt" "question 1"')
        (tmp_path / "samples.jsonl").write_text(damaged)
        with pytest.raises(ValueError, match=r"Line 2 of .* is damaged"):
            teach(Teacher(server.url, "teacher"), ROWS[:3], tmp_path)
    assert (tmp_path / "samples.jsonl").read_text() == damaged


@pytest.mark.faults
def test_killed_twice_nothing_stored_is_asked_for_again(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"q": f"p{number}"}) + "\n" for number in range(60)))
    out = tmp_path / "out"
    stored = []
    with Server(seconds=0.05) as server:
        command = [sys.executable, "-m", "trl_dpg.cli", "teach", "--base_url", server.url, "--model", "teacher"]
        command += ["--dataset_name", str(rows), "--prompt_template", "{q}", "--num_samples", "2"]
        command += ["--max_concurrency", "4", "--output_dir", str(out)]
        for least in (20, 60, None):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            if least is not None:
                while not (out / "samples.jsonl").exists() or len(lines_whole(out / "samples.jsonl")) < least:
                    time.sleep(0.02)
                    assert process.poll() is None
                os.kill(process.pid, signal.SIGKILL)
            _, errors = process.communicate(timeout=120)
            assert least is not None or process.returncode == 0, errors
            first = len(server.requests)
            stored.append((first, {sample["key"] for sample in lines_whole(out / "samples.jsonl")}))
    assert len(stored[-1][1]) == 120 == len(lines(out / "samples.jsonl"))
    assert len(server.requests) <= 120 + 2 * 4  # what was on its way when it was killed


def lines_whole(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


# -- a server that goes away ------------------------------------------------------------------------------------------

MANY = [{"prompt": f"p{number}"} for number in range(60)]


def test_a_server_that_stays_away_ends_the_run_and_the_same_call_goes_on(tmp_path, capsys):
    with Server(seconds=0.05, leaves_after=10) as server:
        taught = teach(Teacher(server.url, "teacher"), MANY, tmp_path, limits=Limits(max_wait=2), progress=True)
    assert taught.broken and re.fullmatch(
        r"the server does not answer any more: no connection to http://\S+: .*, for 2 s", taught.stopped
    )
    shown = capsys.readouterr().err
    assert shown.count("The server does not answer (no connection to") >= 1
    assert "Next attempt in 1 s. If it stays away, this stops in 2 s." in shown
    assert taught.seconds < 30 and 10 <= taught.there < 60 and lines(tmp_path / "failures.jsonl") == []
    stored = {sample["key"] for sample in lines(tmp_path / "samples.jsonl")}
    with Server(port=server.port) as again:
        assert teach(Teacher(again.url, "teacher"), MANY, tmp_path).there == 60
    assert len(again.requests) == 60 - len(stored)


def test_a_server_that_comes_back_is_waited_for(tmp_path):
    with Server(seconds=0.05, leaves_after=10) as server:
        second = Server(port=server.port)

        def come_back():
            server.wait()
            time.sleep(1.5)
            second.__enter__()

        thread = threading.Thread(target=come_back)
        thread.start()
        taught = teach(Teacher(server.url, "teacher"), MANY, tmp_path, limits=Limits(max_retries=1))
        thread.join()
        second.__exit__()
    assert taught.there == 60 and taught.stopped is None and lines(tmp_path / "failures.jsonl") == []


def test_answers_on_their_way_are_waited_for_when_the_server_has_gone(tmp_path, monkeypatch):
    async def ask(client, messages, sample):
        seconds = {"p0": 0.0, "p1": 2.5, "p2": 600.0}.get(messages[0]["content"])
        await asyncio.sleep(0.1 if seconds is None else seconds)
        if seconds is None:
            raise Unreachable("no connection")
        return Answer("ok", "", "stop", {"prompt_tokens": 1, "completion_tokens": 1}, "t-1")

    monkeypatch.setattr(Client, "ask", ask)
    monkeypatch.setattr("trl_dpg.practice.teaching.run.GRACE", 4.0)
    taught = teach(Teacher("http://localhost/v1", "teacher"), MANY, tmp_path, limits=Limits(max_wait=0.5))
    assert taught.broken and "does not answer any more" in taught.stopped
    assert [sample["prompt"] for sample in lines(tmp_path / "samples.jsonl")] == ["p0", "p1"] and taught.seconds < 300


def test_a_server_that_is_back_and_answers_slowly_is_not_left(tmp_path, monkeypatch):
    attempts = 0

    async def ask(client, messages, sample):
        nonlocal attempts
        attempts += 1
        if attempts == 2:
            raise Unreachable("no connection")
        await asyncio.sleep(2.5 if attempts > 2 else 0.0)
        return Answer("ok", "", "stop", {"prompt_tokens": 1, "completion_tokens": 1}, "t-1")

    monkeypatch.setattr(Client, "ask", ask)
    limits = Limits(max_concurrency=1, max_wait=1.5)
    taught = teach(Teacher("http://localhost/v1", "teacher"), MANY[:3], tmp_path, limits=limits)
    assert taught.stopped is None and taught.there == 3


def test_only_an_answer_shows_that_the_server_is_back():
    now = 0.0
    throttle = Throttle(4, clock=lambda: now)
    throttle.unreachable(throttle.start())
    now = 10.0
    throttle.failed(throttle.start(), 1, answered=False)
    assert (throttle.away_since, throttle.pauses) == (0.0, 1)
    throttle.failed(throttle.start(), 1)
    assert (throttle.away_since, throttle.pauses) == (None, 0)


@pytest.mark.parametrize(("reply", "timeout"), [({"content": "late"}, 0.1), ([chunk(content="ha"), None], 10.0)])
def test_silence_and_a_broken_connection_are_no_answer(reply, timeout):
    async def ask(url):
        async with Client(Teacher(url, "teacher", timeout=timeout, stream=isinstance(reply, list))) as client:
            await client.ask([{"role": "user", "content": "q"}])

    with Server(lambda request, number: reply, seconds=0.3) as server, pytest.raises(Unanswered):
        asyncio.run(ask(server.url))


def test_a_host_that_does_not_take_a_connection_is_no_slow_answer(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_dpg.practice.teaching.client.CONNECT", 0.3)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(2):  # now its queue is full
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        with pytest.raises(TeacherError, match=r"cannot be reached: no connection to .*: no connection within 0.3 s"):
            teach(Teacher(url, "teacher"), ROWS, tmp_path)


def test_the_command_says_how_to_go_on_without_the_server(tmp_path, capsys):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    rows.write_text("".join(json.dumps(row) + "\n" for row in MANY))
    with Server(seconds=0.05, leaves_after=10) as server:
        command = ["teach", "--base_url", server.url, "--model", "teacher", "--dataset_name", str(rows)]
        with pytest.raises(SystemExit, match=r"Stopped: the server does not answer any more.*same command goes on"):
            cli.main([*command, "--output_dir", str(out), "--max_wait", "1"])
    assert len(lines(out / "samples.jsonl")) == len(lines(out / "train.jsonl")) >= 10
    manifest = read_manifest(out)
    assert check_manifest(out) == [] and manifest["models"]["model"]["name"] == "teacher"
    assert manifest["files"]["samples.jsonl"]["rows"] == len(lines(out / "samples.jsonl"))


# -- rates and costs --------------------------------------------------------------------------------------------------


async def ideal(url, number, at_once):
    """What a client takes that knows the limit, and sends again at once."""
    semaphore = asyncio.Semaphore(at_once)

    async def one(client, prompt):
        async with semaphore:
            while True:
                with contextlib.suppress(Exception):
                    return await client.ask([{"role": "user", "content": prompt}])

    async with Client(Teacher(url, "teacher")) as client:
        began = time.monotonic()
        await asyncio.gather(*(one(client, f"p{k}") for k in range(number)))
        return time.monotonic() - began


@pytest.mark.faults
def test_a_limit_of_requests_at_once_is_found_among_random_refusals(tmp_path):
    def unreliable(request, number):
        chance = rng.random()
        if chance < 0.35:
            return (429 if chance < 0.3 else 500, {"error": {"message": "no"}})
        return {"content": "ok"}

    rng = random.Random(0)
    with Server(unreliable, seconds=0.4, at_once=8) as server:
        best = asyncio.run(ideal(server.url, 200, 8))
    rng = random.Random(0)
    with Server(unreliable, seconds=0.4, at_once=8) as server:
        taught = teach(Teacher(server.url, "teacher"), [{"prompt": f"p{k}"} for k in range(200)], tmp_path)
    print(
        f"{taught.seconds:.1f} s, ideal {best:.1f} s; over the limit {len(server.over)} times, the last after "
        f"{max(server.over, default=0)} answers"
    )
    assert taught.there == 200
    assert taught.seconds <= 1.3 * best
    assert max(server.over, default=0) < 100


def test_a_limit_of_requests_at_once_is_found_in_simulated_time():
    now, answered, over, on_their_way = 0.0, 0, [], []
    throttle = Throttle(64, clock=lambda: now)
    while answered < 400:
        while throttle.wait() == 0:
            ticket = throttle.start()
            if len(on_their_way) >= 8:
                over.append(answered)
                throttle.refused(ticket)
                now += 0.001
            else:
                on_their_way.append((now + 0.1, ticket.number, ticket))
        end, _, ticket = min(on_their_way) if throttle.wait() == float("inf") else (now + throttle.wait(), None, None)
        now = end
        if ticket is not None:
            on_their_way.remove((end, ticket.number, ticket))
            throttle.accepted(ticket)
            answered += 1
    assert throttle.ceiling == 8 and max(over) < 60


def simulated(seed, number=200, at_once=8, seconds=0.2, latency=0.004):
    """Seconds of a run with 30 % 429s and 5 % 500s, and the answers before each request beyond the limit."""
    random.seed(seed)
    now, chance, order = 0.0, random.Random(seed), itertools.count()
    throttle = Throttle(64, clock=lambda: now)
    waiting = [(0.0, next(order), 0) for _ in range(number)]  # when it may be sent, and attempts that failed
    on_their_way = []  # when the reply comes, and what it is
    busy, answered, over = 0, 0, []
    while answered < number:
        while waiting and waiting[0][0] <= now and throttle.wait() == 0:
            attempts, ticket = heapq.heappop(waiting)[2], throttle.start()
            reply = "ok" if busy < at_once else "429"
            if reply == "429":
                over.append(answered)
            elif (found := chance.random()) < 0.35:
                reply = "429" if found < 0.3 else "500"
            busy += reply == "ok"
            end = now + latency + seconds * (reply == "ok")
            heapq.heappush(on_their_way, (end, next(order), reply, ticket, attempts))
        times = [on_their_way[0][0]] if on_their_way else []
        if waiting and throttle.wait() < math.inf:
            times.append(max(waiting[0][0], now + throttle.wait()))
        now = min(times)
        while on_their_way and on_their_way[0][0] <= now:
            _, _, reply, ticket, attempts = heapq.heappop(on_their_way)
            if reply == "ok":
                throttle.accepted(ticket)
                busy, answered = busy - 1, answered + 1
            elif reply == "429":
                heapq.heappush(waiting, (now + throttle.refused(ticket), next(order), attempts))
            else:
                heapq.heappush(waiting, (now + throttle.failed(ticket, attempts + 1), next(order), attempts + 1))
    return now, over


@pytest.mark.parametrize("seconds", [0.2, 0.4])
def test_random_refusals_rarely_lead_to_a_limit_that_is_too_low(seconds):
    best = 200 / 8 * (seconds + 0.004 / 0.65)  # each answer with the refusals before it
    runs = [simulated(seed, seconds=seconds) for seed in range(100)]
    ratios = sorted(time / best for time, _ in runs)
    assert ratios[50] < 1.15 and ratios[95] < 1.25, ratios[50::9]
    assert max(max(over, default=0) for _, over in runs) < 100


def test_a_limit_below_the_first_one_is_not_run_against():
    assert max(len(over) for _, over in (simulated(seed, at_once=3) for seed in range(40))) < 100


def test_budgets_of_a_minute_are_kept():
    now = 0.0
    throttle = Throttle(100, requests_per_minute=60, tokens_per_minute=1000, clock=lambda: now)
    starts = []
    for _ in range(20):
        now += throttle.wait(100)
        throttle.accepted(throttle.start(100), 100)
        starts.append(now)
    assert all(later - earlier >= 1.0 for earlier, later in itertools.pairwise(starts))
    assert all(later - earlier >= 60 for earlier, later in zip(starts, starts[10:], strict=False))


def test_the_cost_stays_below_its_limit_and_the_run_goes_on_with_a_higher_one(tmp_path):
    prices = {"input": 1e5, "output": 2e5}  # 10 and 20 tokens: 5 dollars an answer
    with Server() as server:
        teacher = Teacher(server.url, "teacher", prices=prices)
        taught = teach(teacher, ROWS, tmp_path, limits=Limits(max_cost=22))
        assert taught.tally.cost == pytest.approx(20) and "max_cost" in taught.stopped and len(server.requests) == 4
        taught = teach(teacher, ROWS, tmp_path, limits=Limits(max_cost=100))
    assert taught.there == 12 == len(server.requests) and taught.tally.cost == pytest.approx(60)


# -- the dataset for SFTTrainer ---------------------------------------------------------------------------------------

TEMPLATES = Path(trl.__file__).parent / "chat_templates"


def student(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    return tokenizer


PLACES = {"qwen3": "reasoning_content", "gptoss": "thinking", "llama3": "content", "qwen2_5": "content"}


@pytest.mark.parametrize("template", PLACES)
def test_the_reasoning_is_where_the_template_reads_it(template):
    tokenizer = student(template)
    assert reasoning_place(tokenizer) == PLACES[template]
    row = sft_row("What is 2 + 2?", "Two and two.", "Four.", PLACES[template])
    check_rendered(tokenizer, row, "Two and two.", "Four.")
    if template == "gptoss":
        assert "<|channel|>analysis<|message|>Two and two.<|end|>" in render(tokenizer, row).completion
    else:
        assert "<think>\nTwo and two.\n</think>\n\nFour." in render(tokenizer, row).completion


# That of SmolLM2, which TRL does not have
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TAGGED = "<think>\n{}\n</think>\n\n{}"
LEARNED = {
    "qwen3": (["<|im_start|>", "<|im_end|>"], TAGGED + "<|im_end|>\n"),
    "gptoss": (
        ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"],
        "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>",
    ),
    "smollm2": (["<|im_start|>", "<|im_end|>"], TAGGED + "<|im_end|>\n"),
    "llama3": (["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], TAGGED + "<|eot_id|>"),
}
"""The special tokens of each template, and what is learned of a reasoning and an answer."""


@pytest.mark.parametrize(
    ("template", "assistant_only"),
    [(name, only) for name in LEARNED for only in (False, True) if (name, only) != ("smollm2", True)],  # not in TRL
)
def test_sft_trainer_learns_reasoning_and_answer_and_not_the_question(template, assistant_only, tmp_path):
    special_tokens, learned = LEARNED[template]
    tokenizer = make_byte_tokenizer(special_tokens)
    tokenizer.chat_template = SMOLLM2 if template == "smollm2" else student(template).chat_template
    thoughts = {
        row["prompt"]: f"Is it {row['solution']}? Yes, as {row['solution']} was asked for." for row in ROWS[:4]
    }

    def reply(request, number):
        question = request["messages"][-1]["content"]
        return {"content": f"It is {question.split()[-1]}.", "reasoning_content": thoughts[question]}

    with Server(reply) as server:
        teach(Teacher(server.url, "teacher"), ROWS[:4], tmp_path / "data", student=tokenizer)
    trainer = SFTTrainer(
        make_model(vocab_size=len(tokenizer)),
        SFTConfig(str(tmp_path), assistant_only_loss=assistant_only, per_device_train_batch_size=4, **QUIET),
        train_dataset=datasets.load_dataset(str(tmp_path / "data"), split="train"),
        processing_class=tokenizer,
    )
    (batch,) = trainer.get_train_dataloader()
    whole = ["".join(tokenizer.batch_decode(ids[mask == 1])) for ids, mask in pairs(batch, "attention_mask")]
    with_loss = ["".join(tokenizer.batch_decode(ids[labels != -100])) for ids, labels in pairs(batch, "labels")]
    expected = [learned.format(thoughts[f"question {k}"], f"It is {k}.") for k in range(4)]
    ends = [text.rstrip("\n") for text in expected]  # assistant_only_loss may leave out what follows the last token
    assert sorted(text.rstrip("\n") for text in with_loss) == ends
    for text in whole:
        (k,) = [k for k in range(4) if f"question {k}" in text]
        assert text.endswith(expected[k]) and text.count(thoughts[f"question {k}"]) == 1


def pairs(batch, name):
    return zip(batch["input_ids"], batch[name], strict=True)


def test_a_template_that_loses_the_reasoning_is_an_error():
    with pytest.raises(LostError, match="leaves the reasoning out"):
        reasoning_place(student("deepseek_r1_distill"))
    with pytest.raises(LostError, match="leaves out its reasoning"):
        check_rendered(student("llama3"), sft_row("q", "because", "a", "thinking"), "because", "a")


def test_samples_that_are_left_out_are_counted(tmp_path):
    def reply(request, number):
        row = int(request["messages"][-1]["content"].split()[-1])
        return {
            "content": "" if row == 3 else rf"\boxed{{{row if row != 4 else 7}}}",
            "finish_reason": {1: "length", 2: "content_filter"}.get(row, "stop"),
        }

    with Server(reply) as server:
        taught = teach(Teacher(server.url, "teacher"), ROWS[:6], tmp_path, verifier="math")
        assert dict(taught.results.left_out) == {
            "finish_reason length": 1,
            "finish_reason content_filter": 1,
            "empty answer": 1,
            "wrong answer": 1,
        }
        assert [row["row"] for row in lines(tmp_path / "train.jsonl")] == [0, 5]
        assert len(lines(tmp_path / "samples.jsonl")) == 6 and taught.results.correct == 4
        both = Selection(finish_reasons=["stop", "length"], keep_wrong=True)
        taught = teach(Teacher(server.url, "teacher"), ROWS[:6], tmp_path, selection=both, verifier="exact")
    assert [row["row"] for row in lines(tmp_path / "train.jsonl")] == [0, 1, 4, 5]
    assert len(server.requests) == 6  # another choice asks for nothing


def test_a_verifier_that_fails_loses_no_sample(tmp_path):
    def broken(completion, answer):
        raise ZeroDivisionError

    with Server() as server:
        with pytest.raises(ValueError, match=r"`verifier` failed on row 0: ZeroDivisionError.*stored"):
            teach(Teacher(server.url, "teacher"), ROWS[:2], tmp_path, verifier=broken)
    assert len(lines(tmp_path / "samples.jsonl")) == 2


def test_the_folder_is_a_dataset_of_the_rows_for_sft(tmp_path):
    with Server(lambda request, number: {"content": "four", "reasoning": "two and two"}) as server:
        teach(Teacher(server.url, "teacher"), ROWS[:2], tmp_path, student=student("qwen3"))
    dataset = datasets.load_dataset(str(tmp_path), split="train")
    assert dataset[0]["completion"][0]["reasoning_content"] == "two and two" and len(dataset) == 2
    assert "`reasoning_content`" in (tmp_path / "README.md").read_text()


def test_folders_of_the_same_name_are_not_mistaken_for_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    with Server() as server:
        for place, number in (("here", 1), ("there", 3)):
            teach(Teacher(server.url, "teacher"), ROWS[:number], tmp_path / place / "teacher")
            dataset = datasets.load_dataset(str(tmp_path / place / "teacher"), split="train")
            assert len(dataset) == number


# -- the command ------------------------------------------------------------------------------------------------------

GOOD = ["--base_url", "http://127.0.0.1:9/v1", "--model", "m"]
BAD = {
    "no server": (["--model", "m"], "--base_url or --preset is required"),
    "preset": (["--preset", "kimmy"], "--preset must be one of kimi-k2.5"),
    "address": (["--base_url", "localhost:8000", "--model", "m"], "--base_url must be like https://host/v1"),
    "key in the address": (["--base_url", f"http://u:{KEY}@host/v1", "--model", "m"], "has a password or key in it"),
    "key as the name": ([*GOOD, "--api_key_env", KEY], "takes the name of an environment variable"),
    "no key": ([*GOOD, "--api_key_env", "NO_SUCH_KEY"], "NO_SUCH_KEY has no key"),
    "num_samples": ([*GOOD, "--num_samples", "0"], "--num_samples must be at least 1"),
    "concurrency": ([*GOOD, "--max_concurrency", "0"], "--max_concurrency must be between 1 and 1000"),
    "no prices": ([*GOOD, "--max_cost", "5"], "--max_cost needs --prices"),
    "prices": ([*GOOD, "--prices", '{"in": 1}'], "--prices must have `input`"),
    "n": ([*GOOD, "--request_parameters", '{"n": 4}'], "--request_parameters has n"),
    "no JSON": ([*GOOD, "--request_parameters", "n=4"], "--request_parameters must be JSON"),
    "same samples": ([*GOOD, "--temperature", "0", "--num_samples", "2"], "samples of a prompt would be the same"),
    "column": ([*GOOD, "--prompt_template", "{nothing}"], "--prompt_template needs columns"),
    "no file": ([*GOOD, "--dataset_name", "none.jsonl"], "there is no file 'none.jsonl'"),
    "verifier": ([*GOOD, "--verifier", "maths"], "--verifier: unknown name 'maths'. Did you mean 'math'"),
    "answers": ([*GOOD, "--verifier", "exact", "--answer_column", "right"], "--answer_column 'right' is none of"),
    "student": ([*GOOD, "--student_model_name_or_path", "none"], "--student_model_name_or_path 'none'"),
    "unreachable": (GOOD, "The server cannot be reached"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_a_clear_error(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    arguments, message = BAD[name]
    if "--dataset_name" not in arguments:
        arguments = [*arguments, "--dataset_name", "rows.jsonl"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["teach", *arguments, "--output_dir", "out"])
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and message in shown and KEY not in shown
    assert not Path("out/samples.jsonl").exists() or not Path("out/samples.jsonl").read_text()


def test_a_preset_is_overridden_by_arguments():
    teacher = from_preset("kimi-k2.5-instant", parameters={"thinking": None, "top_p": 0.9}, base_url="http://here/v1")
    assert teacher.parameters == {"max_tokens": 8192, "top_p": 0.9} and teacher.base_url == "http://here/v1"
    assert all(from_preset(name, model="m").model for name in PRESETS)


def test_an_empty_prompt_is_refused():
    for prompt in ("", " ", [], [{"role": "assistant", "content": "x"}], 5):
        with pytest.raises(ValueError, match="prompt of row 1"):
            teach(Teacher("http://h/v1", "m"), [ROWS[0], {"prompt": prompt}], "nowhere")
    assert not Path("nowhere").exists()


def test_errors_have_their_kind():
    assert Refused("x", 2.0).retry_after == 2.0
    assert read_answer({"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}).completion == ""
