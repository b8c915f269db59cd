"""`trl-dpg serve`: what it prints and refuses."""

import json
import os
import signal
import socket
import threading
import time
from urllib.request import Request

import pytest

from tests.score_server import ask
from tests.tiny import make_model, make_tokenizer
from trl_dpg import cli
from trl_dpg.score_client import TOKEN_VARIABLE


PARTS = [{"metric": "language_modeling", "metric_kwargs": {"texts": ["w1 w2"]}}]
PARTS += [{"metric": "weight_norm", "name": "a"}]
CONSTRAINED = json.dumps({"metrics": PARTS, "constraints": {"a": 0.1}})


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The arguments of a server of a tiny student."""
    folder = tmp_path_factory.mktemp("student")
    make_model(scale=1.0).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    metric = ["--metric", "language_modeling", "--metric_kwargs", json.dumps({"texts": ["w1 w2 w3 w4"]})]
    return ["serve", "--student_model_name_or_path", str(folder), *metric, "--port", "0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], f"requests need a token. Set the environment variable {TOKEN_VARIABLE}"),
        (["--host", "::1"], "requests need a token"),
        (["--token_file", "not-there"], "--token_file 'not-there' cannot be read"),
        (["--port", "70000"], "--port must be from 0 to 65535, got 70000"),
        (["--max_samples", "0"], "--max_samples must be at least 1, got 0"),
        (["--poll_timeout", "nan"], "--poll_timeout must be at least 1, got nan"),
        (["--log_level", "trace"], "--log_level must be one of critical"),
        (["--student_learning_rate", "auto"], "no first batch on which auto could choose student_learning_rate"),
        (["--per_token", "true"], "neither --per_token true nor --attribution dataset"),
        (["--attribution", "dataset"], "neither --per_token true nor --attribution dataset"),
        (["--metric", "combined", "--metric_kwargs", CONSTRAINED], "it has no multipliers that react to the datasets"),
        (
            ["--student_model_name_or_path", "not-there"],
            "--student_model_name_or_path 'not-there' could not be loaded",
        ),
    ],
)
def test_wrong_usage_is_named(arguments, message, command, capsys, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command, *arguments])
    assert stopped.value.code == 2 and message in " ".join(capsys.readouterr().err.split())


def test_an_address_in_use_and_an_empty_token_file_are_named(command, tmp_path, capsys):
    (tmp_path / "token").write_text("\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for arguments in (["--port", str(taken.getsockname()[1])], ["--token_file", str(tmp_path / "token")]):
            with pytest.raises(SystemExit) as stopped:
                cli.main([*command, *arguments])
            assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "cannot listen there" in said and "is empty" in said


def test_a_server_answers_until_ctrl_c(command, capsys):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    answers = []

    def ask_and_interrupt():
        url = f"http://127.0.0.1:{port}"
        while not answers:
            try:
                answers.append(ask(Request(f"{url}/health")))
            except OSError:
                time.sleep(0.05)
        content = json.dumps({"samples": ["w1 w2", "w3 w4"]}).encode()
        answers.append(ask(Request(f"{url}/score", content, {"Content-Type": "application/json"})))
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=ask_and_interrupt)
    thread.start()
    cli.main([*command, "--port", str(port)])
    thread.join()
    (health, _), (status, answer) = answers
    assert health == status == 200 and len(answer["scores"]) == 2
    assert f"Serving on http://127.0.0.1:{port} (without a token)." in capsys.readouterr().out
