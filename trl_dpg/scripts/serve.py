"""
Serve a student over HTTP: datasets come in, the scores of their samples go out.

    trl-dpg serve --config recipe.yaml
    trl-dpg serve --config recipe.yaml --num_processes 4 --port 8001

A recipe of `trl-dpg dpg` can be used unchanged: its student, inner loop and metric are those of the server. Other
addresses than 127.0.0.1 need a token, in the environment variable TRL_DPG_SERVER_TOKEN or in a file. `docs/serve.md`
has the requests and the answers, and how trainers use them.
"""

import os
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from threading import Thread

from trl_dpg.score_client import TOKEN_VARIABLE, checked_token
from trl_dpg.score_limits import Limits

from .arguments import MetricArguments, ToyWorldArguments, UsageError
from .data import check_student, process_state, the_student
from .flags import in_flags
from .output import say
from .registry import make_metric
from .toy_world import toy_world


LEVELS = ("critical", "error", "warning", "info", "debug")
"""What uvicorn may log. Its level "trace" would log headers, and so the token."""
FAREWELL = 5  # seconds for open requests and the end of the other processes, when the server is stopped


@dataclass
class ServeArguments(Limits, MetricArguments, ToyWorldArguments):
    """
    Arguments of `trl-dpg serve`, in addition to those of the metric and of the student, and to
    [`~trl_dpg.serving.Limits`].

    Args:
        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            The address to listen on. Any other than 127.0.0.1 and localhost needs a token.
        port (`int`, *optional*, defaults to `8000`):
            The port. 0: one that is free.
        token_file (`str`, *optional*):
            A file with the token that each request must have. By default the environment variable
            `TRL_DPG_SERVER_TOKEN`, if it is set.
        log_level (`str`, *optional*, defaults to `"info"`):
            Log level of uvicorn: `"critical"`, `"error"`, `"warning"`, `"info"` or `"debug"`.
    """

    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; others need a token."})
    port: int = field(default=8000, metadata={"help": "Port to listen on; 0: one that is free."})
    token_file: str | None = field(
        default=None, metadata={"help": f"File with the token of requests; otherwise {TOKEN_VARIABLE}, if it is set."}
    )
    log_level: str = field(default="info", metadata={"help": f"Log level of uvicorn: {', '.join(LEVELS)}."})

    def __post_init__(self):
        MetricArguments.__post_init__(self)
        try:
            Limits.__post_init__(self)
        except ValueError as error:
            raise UsageError(f"--{error}") from error
        if not 0 <= self.port <= 65535:
            raise UsageError(f"--port must be from 0 to 65535, got {self.port}.")
        if self.log_level not in LEVELS:
            raise UsageError(f"--log_level must be one of {', '.join(LEVELS)}, got {self.log_level!r}.")


def main(script_args: ServeArguments, student_args) -> None:
    try:
        import uvicorn

        from trl_dpg.serving import Engine, make_app
    except ImportError as error:
        raise UsageError(f"serve needs the extra `serve`: pip install 'trl-dpg[serve]' ({error}).") from error
    token = read_token(script_args)
    limits = Limits(**{own.name: vars(script_args)[own.name] for own in fields(Limits)})
    state = process_state()
    script_args.set_threads()
    listener = listen(script_args) if state.is_main_process else None
    engine = Engine(make_reward(script_args, student_args))
    if listener is None:
        engine.run()
        return
    address = listener.getsockname()
    jobs = Thread(target=lambda: run(engine, server), daemon=True)

    def stop() -> None:
        engine.stop()
        jobs.join(FAREWELL)

    app = make_app(engine, limits, token, on_stop=stop)
    config = uvicorn.Config(app, log_level=script_args.log_level, timeout_graceful_shutdown=FAREWELL)
    server = uvicorn.Server(config)
    jobs.start()
    reward = engine.reward.described()
    say(f"Student: {reward['student']}. Metric: {reward['metric']}.")
    say(f"Serving on http://{script_args.host}:{address[1]} ({'with' if token else 'without'} a token).")
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listener])


def run(engine, server) -> None:
    """Do the jobs in a thread. If another process is lost, the server ends."""
    try:
        engine.run()
    except Exception as error:
        if not server.should_exit:  # a signal ends all processes
            say(f"Another process does not answer, so the server ends: {error}")
        server.should_exit = True


def read_token(script_args: ServeArguments) -> str | None:
    """The token that requests must have, which addresses of other machines need."""
    from trl_dpg.serving.app import LOCAL

    token = os.environ.get(TOKEN_VARIABLE, "")
    if script_args.token_file is not None:
        try:
            token = Path(script_args.token_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--token_file {script_args.token_file!r} cannot be read ({error}).") from error
        if not token.strip():
            raise UsageError(f"--token_file {script_args.token_file!r} is empty.")
    try:
        token = checked_token(token)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if not token and script_args.host not in LOCAL:
        raise UsageError(
            f"--host {script_args.host}: other machines can reach this address, so requests need a token. Set the "
            f"environment variable {TOKEN_VARIABLE}, or give --token_file; or use --host 127.0.0.1."
        )
    return token or None


def listen(script_args: ServeArguments) -> socket.socket:
    """The socket of the server. It is made before the student is loaded, so that an address in use is said at once."""
    try:
        return socket.create_server(
            (script_args.host, script_args.port),
            family=socket.AF_INET6 if ":" in script_args.host else socket.AF_INET,
            backlog=2048,
        )
    except OSError as error:
        raise UsageError(
            f"--host {script_args.host} --port {script_args.port}: cannot listen there ({error}). Choose another "
            "port, or --port 0 for one that is free."
        ) from error


def make_reward(script_args: ServeArguments, student_args):
    """The reward that scores the datasets, on every process."""
    from trl_dpg import DPGReward
    from trl_dpg.metagradients.config import SettingsError
    from trl_dpg.metric_state import is_constrained

    config = student_args.inner_loop_config()
    if config.auto:
        raise UsageError(
            f"serve has no first batch on which auto could choose student_{config.auto[0]}. Find the numbers with "
            "`trl-dpg tune`, and give them."
        )
    if config.per_token or config.attribution == "dataset":
        raise UsageError(
            "serve gives scores of samples: it has neither --per_token true nor --attribution dataset. Use them with "
            "`trl-dpg dpg`, where the student is in the same process."
        )
    the_student("serve", student_args)
    if student_args.replay_dataset is not None:
        raise UsageError("serve has no --replay_dataset: a dataset would get other scores each time. Use trl-dpg dpg.")
    with toy_world(script_args, student_args.seed, student_args):
        check_student(student_args)
        metric = make_metric(script_args)
        if is_constrained(metric):
            raise UsageError(
                "serve scores each dataset alike, so it has no multipliers that react to the datasets before. Use "
                "`constraints` with `trl-dpg dpg`, where the student is in the same process."
            )
        student = student_args.load_student()
        script_args.set_threads(student.model)
    try:
        return DPGReward(student, metric, config)
    except SettingsError as error:
        raise UsageError(in_flags(str(error))) from error


def make_parser(prog: str | None = None):
    from trl import TrlParser

    from trl_dpg.config import StudentArguments

    return TrlParser((ServeArguments, StudentArguments), prog=prog)


if __name__ == "__main__":
    from trl_dpg.scripts import launcher

    launcher.run("serve", make_parser, main, sys.argv[1:])
