"""`trl-dpg serve`: what it prints and refuses."""

import json
import signal
import socket
import subprocess
import sys
import time
from urllib.request import urlopen

import pytest

from tests.tiny import make_model, make_tokenizer
from trl_dpg import cli
from trl_dpg.score_client import TOKEN_VARIABLE


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


def test_a_server_is_stopped_by_a_signal(command):
    process = subprocess.Popen([sys.executable, "-m", "trl_dpg.cli", *command], stdout=subprocess.PIPE, text=True)
    lines = iter(process.stdout.readline, "")
    url = next(line for line in lines if line.startswith("Serving on ")).split()[2]
    with urlopen(f"{url}/health", timeout=60) as response:
        assert json.load(response)["status"] == "ok"
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == -signal.SIGTERM and time.monotonic() - started < 20
