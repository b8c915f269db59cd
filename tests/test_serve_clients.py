"""What a score server is for: `DPGReward(server=...)` in TRL's trainers, and the hooks of verl and OpenRLHF."""

import asyncio
import importlib.util
import json
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from trl import GRPOConfig, GRPOTrainer

from tests.score_server import ScoreServer
from tests.small_runs import (
    CONFIG,
    METRIC,
    PROMPTS,
    TEXTS,
    TOKENIZER,
    TRAIN_METRIC,
    TRAIN_PROMPTS,
    dpg_config,
    make_student,
    make_trainer,
)
from tests.tiny import QUIET, make_model
from trl_dpg import DPGConfig, DPGReward, InnerLoopConfig, Student, cli
from trl_dpg.live_table import work_of_a_step
from trl_dpg.restart import RestartCallback
from trl_dpg.score_client import TOKEN_VARIABLE, ScoreClient
from trl_dpg.serving import Limits


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def server():
    with ScoreServer(limits=Limits(max_text_length=60)) as running:
        yield running


# -- TRL --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"train_on": "prompt_completion"}, {"cross_group_batching": False, "num_generations": 2}],
    ids=["one dataset", "pairs", "several datasets"],
)
def test_rewards_and_figures_of_a_server_are_those_of_the_same_student_here(kwargs, server):
    prompts = [f"{prompt} " for prompt in PROMPTS]
    figures = {}
    for name, reward in (
        ("here", DPGReward(make_student(), METRIC, CONFIG, **kwargs)),
        ("there", DPGReward(server=server.url, **kwargs)),
    ):
        logged, columns = {}, {}
        rewards = reward(prompts, TEXTS, log_metric=logged.__setitem__, log_extra=columns.__setitem__)
        times = {figure for figure in logged if "seconds" in figure}
        batch = reward.last_batch
        figures[name] = rewards, columns, batch.completions, batch.scores.tolist(), times
        figures[name] += ({figure: value for figure, value in logged.items() if figure not in times},)
    assert figures["here"] == figures["there"]


def test_a_server_reads_what_a_thinking_generator_answers(server):
    thought = [f"<think>w8 w8</think>{text}" for text in TEXTS]
    assert DPGReward(server=server.url)(PROMPTS, thought) == DPGReward(server=server.url)(PROMPTS, TEXTS)


def grpo(reward, folder, **kwargs):
    settings = dict(
        per_device_train_batch_size=8, num_generations=4, max_completion_length=6, max_steps=3, logging_steps=1
    )
    args = GRPOConfig(output_dir=str(folder), **QUIET | settings | kwargs)
    model = make_model(seed=1, scale=1.0)
    return GRPOTrainer(model, reward_funcs=reward, args=args, train_dataset=TRAIN_PROMPTS, processing_class=TOKENIZER)


def curve(trainer):
    return [log["dpg/metric_change"] for log in trainer.state.log_history if "dpg/metric_change" in log]


class Interrupted(DPGReward):
    """Before its second call, calls a function in another thread."""

    def __call__(self, *args, **kwargs):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 2:
            self.thread = threading.Thread(target=self.interrupt)
            self.thread.start()
            self.gone.wait()
        return super().__call__(*args, **kwargs)


def test_a_run_waits_for_a_server_that_is_gone_and_goes_on(tmp_path, caplog):
    alone = grpo(DPGReward(make_student(), METRIC, CONFIG), tmp_path / "here")
    alone.train()
    first = ScoreServer()
    first.__enter__()
    reward = Interrupted(server=first.url)
    second = ScoreServer(port=first.port)  # its student is made before, as that sets the seed of this process
    reward.gone = threading.Event()

    def interrupt():
        first.__exit__()
        reward.gone.set()
        while "does not answer" not in caplog.text:
            time.sleep(0.01)
        second.__enter__()

    reward.interrupt = interrupt
    trainer = grpo(reward, tmp_path / "there")
    trainer.train()
    second.__exit__()
    assert curve(trainer) == curve(alone)
    assert f"{first.url} answers again, after " in caplog.text


def test_a_checkpoint_knows_the_set_up_of_the_server(server, tmp_path):
    trainer = grpo(DPGReward(server=server.url), tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    RestartCallback.add_to(trainer)
    trainer.train()
    other = DPGReward(make_student(), METRIC, InnerLoopConfig(learning_rate=2e-3, eps_root=1e-6, batch_size=4))
    with ScoreServer(other) as changed:
        trainer = grpo(DPGReward(server=changed.url), tmp_path, max_steps=2)
        RestartCallback.add_to(trainer)
        with pytest.raises(ValueError, match=r"learning_rate \(was 0.001, is 0.002\)"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_server_that_comes_back_with_another_student_is_named(tmp_path):
    with ScoreServer() as first:
        reward = DPGReward(server=first.url)
        reward(PROMPTS, TEXTS)
    other = Student(make_model(seed=3, scale=1.0), processing_class=TOKENIZER)
    with ScoreServer(DPGReward(other, METRIC, CONFIG), port=first.port):
        with pytest.raises(RuntimeError, match=r"another set-up than before \(weights\)"):
            reward(PROMPTS, TEXTS)


def test_what_a_server_refuses_is_raised_with_its_reason(server):
    with pytest.raises(RuntimeError, match="answers 413: Sample 7 has 300 characters; at most 60"):
        DPGReward(server=server.url)(PROMPTS, [*TEXTS[:-1], "w1 " * 100])
    with pytest.raises(RuntimeError, match=r"answers 500: .*None of the 8 samples has a token to learn from"):
        DPGReward(server=server.url)(PROMPTS, [""] * 8)
    assert DPGReward(server=server.url)(PROMPTS, TEXTS)


def test_the_token_is_in_the_environment(monkeypatch):
    with ScoreServer(token="of-this-test") as server:
        monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
        with pytest.raises(RuntimeError, match=rf"answers 401: .* The token is read from .* {TOKEN_VARIABLE}"):
            DPGReward(server=server.url)(PROMPTS, TEXTS)
        monkeypatch.setenv(TOKEN_VARIABLE, "of-this-test")
        assert DPGReward(server=server.url)(PROMPTS, TEXTS)


def test_a_token_that_no_header_can_hold_is_not_shown(monkeypatch, server):
    for token in ("a\nb", "a b", "\xe9"):
        monkeypatch.setenv(TOKEN_VARIABLE, token)
        with pytest.raises(ValueError, match="must be ASCII characters without spaces") as raised:
            DPGReward(server=server.url)(PROMPTS, TEXTS)
        assert token not in repr(raised.value)


def test_another_service_at_the_address_is_named():
    app = Starlette(routes=[Route("/health", lambda request: PlainTextResponse("I am fine"))])
    with ScoreServer(app=app) as other, pytest.raises(RuntimeError, match="is no `trl-dpg serve`: b'I am fine'"):
        DPGReward(server=other.url)(PROMPTS, TEXTS)


def test_a_server_that_stays_away_ends_the_run(caplog):
    with ScoreServer() as server:
        pass
    with pytest.raises(RuntimeError, match=r"did not answer for 0.3 s \(.*Connection refused.*`server_max_wait`"):
        DPGReward(server=server.url, server_max_wait=0.3)(PROMPTS, TEXTS)
    assert "This run waits up to 0.3 s" in caplog.text


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (dict(student=make_student()), "`student`"),
        (dict(metric=METRIC), "`metric`"),
        (dict(inner_loop_config=CONFIG, verify_steps=2), "`inner_loop_config`, `verify_steps`"),
    ],
)
def test_what_lives_in_the_server_is_not_given_here(given, named):
    with pytest.raises(ValueError, match=f"so {named} would have no effect"):
        DPGReward(server="http://127.0.0.1:8000", **given)
    with pytest.raises(ValueError, match="A student is required"):
        DPGReward(metric=METRIC)


def test_the_wait_is_a_number_of_seconds():
    for wait in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="server_max_wait must be 0 or more seconds"):
            DPGReward(server="http://127.0.0.1:8000", server_max_wait=wait)


@pytest.mark.parametrize("wrong", [False, True], ids=["too large", "wrong token"])
def test_what_a_server_refuses_before_it_has_read_it_is_not_taken_for_a_server_that_is_away(wrong, monkeypatch):
    monkeypatch.setenv("TRL_DPG_SERVER_TOKEN", "another" if wrong else "right")
    limits = Limits(max_request_bytes=10**6)
    with ScoreServer(limits=limits, token="right") as running:
        with pytest.raises(RuntimeError, match="401" if wrong else "1000000. Start it with|answers 413") as raised:
            ScoreClient(running.url, max_wait=20).score(["w1 " * 10**7])
        assert "did not answer" not in str(raised.value)


@pytest.mark.parametrize("address", ["127.0.0.1:8000", "ftp://host", "http://", "", "http://user:secret@host"])
def test_a_server_is_an_address_without_a_password(address):
    with pytest.raises(ValueError, match="must be an address such as") as raised:
        ScoreClient(address)
    assert "secret" not in str(raised.value)


RANKS = """
    import json, pathlib, sys, threading
    sys.path.insert(0, {root!r})
    import tests.conftest
    from accelerate import PartialState
    from tests.score_server import ScoreServer
    from tests.small_runs import *
    from trl_dpg import DPGReward
    from trl_dpg.serving import Engine

    state = PartialState(cpu=True)
    rank, mine = state.process_index, slice(4 * state.process_index, 4 * state.process_index + 4)
    reward, logged = DPGReward(server={url!r}), dict()
    results = dict(rewards=reward(PROMPTS[mine], TEXTS[mine], log_metric=logged.__setitem__))
    results["before"] = logged["dpg/metric_before"]
    if rank:  # only the main process asks the server
        assert reward.client._count == 0
    for name, completions in dict(refused=["w1 " * 100] * 4, again=TEXTS[mine]).items():
        try:
            results[name] = reward(PROMPTS[mine], completions)
        except RuntimeError as error:
            results[name] = str(error)

    # A server on two processes, on the second of which one dataset fails
    served, calls = DPGReward(make_student(), METRIC, CONFIG), []

    def fails(*arguments, score=served._scorers[0].score):
        calls.append(arguments)
        if rank == 1 and len(calls) == 2:
            raise RuntimeError("out of luck")
        return score(*arguments)

    served._scorers[0].score = fails
    if rank == 0:
        with ScoreServer(served) as server:
            results["served"] = [server.post(TEXTS[: 8 - number]) for number in range(3)]
            results["processes"] = server.health()[1]["processes"]
    else:
        Engine(served).run()
    pathlib.Path({out!r}, f"{{rank}}.json").write_text(json.dumps(results))
"""


def test_several_ranks_share_a_server_and_a_server_has_several_ranks(server, tmp_path):
    path = tmp_path / "ranks.py"
    path.write_text(textwrap.dedent(RANKS).format(root=str(ROOT), out=str(tmp_path), url=server.url))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(path)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert output.returncode == 0, output.stderr[-2000:]
    first, second = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    here, logged = DPGReward(make_student(), METRIC, CONFIG), {}
    assert first["rewards"] + second["rewards"] == here(PROMPTS, TEXTS, log_metric=logged.__setitem__)
    assert first["again"] + second["again"] == here(PROMPTS, TEXTS)
    assert first["before"] == second["before"] == logged["dpg/metric_before"]
    assert first["refused"].startswith(f"The server at {server.url} answers 413: Sample 0 has 300 characters")
    assert second["refused"].startswith("The DPG reward failed on rank 0: RuntimeError") and "413" in second["refused"]
    (status, whole), (failed, reason), (again, third) = first["served"]
    assert (status, failed, again) == (200, 500, 200) and first["processes"] == 2
    for found, texts in ((whole, TEXTS), (third, TEXTS[:6])):
        assert found["scores"] == pytest.approx(server.post(texts)[1]["scores"], rel=1e-4)
    assert "The DPG reward failed on rank 1: RuntimeError('out of luck')" in reason["detail"]


# -- other frameworks -------------------------------------------------------------------------------------------------


ONE_STEP = InnerLoopConfig(learning_rate=1e-3, eps_root=1e-6, batch_size=8)
"""All samples are one batch of the student, so their order, which chance decides here, matters to rounding only."""


@pytest.fixture(scope="module")
def one_step():
    with ScoreServer(DPGReward(make_student(), METRIC, ONE_STEP), Limits(max_text_length=60)) as running:
        yield running


@pytest.fixture
def hook(request, one_step, monkeypatch):
    """The module of an example."""
    monkeypatch.setenv("DPG_SERVER", one_step.url)
    monkeypatch.setenv("DPG_SIZE", "8")
    monkeypatch.setenv("DPG_STREAM", request.node.name.replace("[", "-").strip("]"))
    spec = importlib.util.spec_from_file_location("hook", ROOT / "examples" / f"{request.param}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def expected(texts):
    return pytest.approx(DPGReward(make_student(), METRIC, ONE_STEP)(PROMPTS, texts), rel=1e-4, abs=1e-5)


def asked(hook, texts):
    """The rewards of texts that are asked for at once."""
    if Path(hook.__file__).stem == "verl_reward":
        return hook.compute_scores([""] * len(texts), texts, [""] * len(texts), [None] * len(texts))
    return hook.reward_func(texts, [""] * len(texts), [""] * len(texts))["rewards"].tolist()


OTHERS = [*TEXTS[1:], "w9 w9 w9"]


@pytest.mark.parametrize("hook", ["verl_reward"], indirect=True)
def test_verl_asks_sample_by_sample_in_two_steps_and_a_validation(hook):
    async def step(texts):
        calls = [
            hook.compute_score(data_source="d", solution_str=text, ground_truth="", extra_info={"split": "train"})
            for text in texts
        ]
        return await asyncio.gather(*calls)

    async def validate():
        return await hook.compute_score("d", "w1", "", {"split": "test"}, reward_router_address="")

    assert asyncio.run(step(TEXTS)) == expected(TEXTS)
    assert asyncio.run(validate()) == 0.0
    assert asyncio.run(step(OTHERS)) == expected(OTHERS)


@pytest.mark.parametrize("hook", ["verl_reward"], indirect=True)
def test_verls_batch_manager_asks_by_chunk(hook):
    infos = [None, {}, {"split": "test"}, {"split": "train"}, {}]
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(hook.compute_scores, ["d"] * 4, TEXTS[:4], [""] * 4, [None] * 4)
        second = threads.submit(hook.compute_scores, ["d"] * 5, [*TEXTS[4:6], "w1", *TEXTS[6:]], [""] * 5, infos)
        rewards = second.result()
    assert rewards.pop(2) == 0.0 and first.result() + rewards == expected(TEXTS)


@pytest.mark.parametrize("hook", ["openrlhf_reward"], indirect=True)
def test_openrlhf_asks_by_chunk_with_prompt_and_end_in_the_query(hook):
    queries = [f"<s>{prompt}{text}<|im_end|>\n</s>" for prompt, text in zip(PROMPTS, TEXTS, strict=True)]
    parts = [slice(place, place + 2) for place in range(0, 8, 2)]

    async def step():  # as its agent executor calls it
        return await asyncio.gather(
            *(asyncio.to_thread(hook.reward_func, queries[own], PROMPTS[own], [""] * 2) for own in parts)
        )

    answers = asyncio.run(step())
    rewards = torch.cat([answer["rewards"] for answer in answers])
    scores = torch.cat([answer["extra_logs"]["dpg_score"] for answer in answers])
    assert rewards.tolist() == expected(TEXTS)
    torch.testing.assert_close(rewards, scores / scores.std(correction=0))
    assert all(torch.equal(answer["scores"], answer["rewards"]) for answer in answers)
    with pytest.raises(ValueError, match="does not have its prompt in it"):
        hook.reward_func(["w1 w2"], ["w9"], [""])


@pytest.mark.parametrize("hook", ["verl_reward", "openrlhf_reward"], indirect=True)
def test_a_hook_raises_what_the_server_refuses(hook):
    with pytest.raises(RuntimeError, match=r"answers 413: .*characters; at most 60"):
        asked(hook, ["w1 " * 100])


@pytest.mark.parametrize("hook", ["verl_reward", "openrlhf_reward"], indirect=True)
def test_a_hook_waits_for_a_server_that_is_gone(hook, monkeypatch):
    with ScoreServer() as gone:
        pass
    pauses = []

    def sleep(seconds):  # in which the server is started again
        pauses.append(seconds)
        hook.SERVER = one_step_url

    one_step_url, hook.SERVER = hook.SERVER, gone.url
    monkeypatch.setattr(hook, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    assert asked(hook, TEXTS) == expected(TEXTS) and pauses == [2]


# -- DPGTrainer and `trl-dpg dpg` -------------------------------------------------------------------------------------


def test_dpg_trainer_takes_scores_from_a_server(tmp_path):
    def trained(name, **kwargs):
        args = dpg_config(tmp_path / name, max_steps=2, save_strategy="steps", save_steps=1)
        args.student_server = kwargs.pop("server", None)
        trainer = make_trainer(args, **kwargs)
        trainer.train()
        trainer.create_model_card()
        return trainer

    here = trained("here")
    with ScoreServer(DPGReward(here.dpg_reward.student, TRAIN_METRIC, here.args.inner_loop_config())) as server:
        there = trained("there", server=server.url, student=None, target_metric=None)
    assert curve(here) == curve(there) and len(curve(here)) == 2
    assert "- Target metric: `LanguageModelingMetric, " in (tmp_path / "there" / "README.md").read_text()
    config = json.loads((tmp_path / "there" / "dpg_config.json").read_text())
    assert config["inner_loop"]["learning_rate"] == 1e-3 and "Llama" in config["student"]
    assert "scored by http://127.0.0.1:" in work_of_a_step(there.args, there.dpg_reward)
    with pytest.raises(ValueError, match="so `metric` would have no effect"):
        make_trainer(there.args, student=None)


def test_a_wait_for_the_server_that_other_processes_do_not_wait_for_is_warned_of(tmp_path, monkeypatch, caplog):
    for processes, wait, warned in ((1, 3600.0, False), (2, 900.0, False), (2, 3600.0, True)):
        monkeypatch.setattr(DPGConfig, "world_size", processes)
        caplog.clear()
        settings = dict(student_server="http://127.0.0.1:8000", student_server_max_wait=wait)
        DPGConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **settings)
        assert ("Raise `ddp_timeout` above it" in caplog.text) == warned


def test_a_recipe_serves_and_trains_if_its_inner_loop_is_the_servers(tmp_path, capsys):
    for name, seed in (("generator", 1), ("student", 0)):
        make_model(seed=seed, scale=1.0).save_pretrained(tmp_path / name)
        TOKENIZER.save_pretrained(tmp_path / name)
    TRAIN_PROMPTS.to_json(tmp_path / "prompts.jsonl")
    recipe = {
        "model_name_or_path": str(tmp_path / "generator"),
        "student_model_name_or_path": str(tmp_path / "student"),
        "dataset_name": str(tmp_path / "prompts.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "metric": "language_modeling",
        "metric_kwargs": {"texts": ["w1 w2 w3 w4"]},
        "max_steps": 1,
        "max_completion_length": 4,
        "per_device_train_batch_size": 8,
        "student_learning_rate": CONFIG.learning_rate,
        "student_eps_root": CONFIG.eps_root,
        "student_batch_size": CONFIG.batch_size,
        "evaluate": False,
        "report_to": "none",
        "bf16": False,
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    with ScoreServer() as server:
        run = ["dpg", "--config", str(tmp_path / "recipe.yaml"), "--student_server", server.url]
        cli.main(run)
        with pytest.raises(SystemExit) as stopped:
            cli.main([*run, "--student_learning_rate", "0.5"])
        assert stopped.value.code == 2 and "learning_rate is 0.001 there, 0.5 here" in capsys.readouterr().err
        with pytest.raises(SystemExit) as stopped:
            cli.main([*run, "--metric_kwargs", '{"texts": ["w4 w3"]}'])
    assert stopped.value.code == 2 and "the server's metric is LanguageModelingMetric, " in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 1
