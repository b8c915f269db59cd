"""A score server in threads of this process, and requests to it."""

import json
import threading
import time
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import uvicorn

from tests.small_runs import CONFIG, METRIC, make_student
from trl_dpg import DPGReward
from trl_dpg.serving import Engine, make_app


class ScoreServer:
    """
    Serves the small runs' student, or that of another reward.

    Args:
        reward (`DPGReward`, *optional*): Student, metric and inner loop.
        limits (`Limits`, *optional*), token (`str`, *optional*): Those of `make_app`.
        port (`int`, *optional*): 0: one that is free.
        app (*optional*): Another service in the place of the score server.
    """

    def __init__(self, reward=None, limits=None, token=None, port=0, app=None):
        self.engine = Engine(reward or DPGReward(make_student(), METRIC, CONFIG), heartbeat=0.2)
        self._jobs = threading.Thread(target=self.engine.run, daemon=True)
        app = app or make_app(self.engine, limits, token, on_stop=self.engine.stop)
        config = uvicorn.Config(app, port=port, log_level="warning", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._http = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self):
        self._jobs.start()
        self._http.start()
        while not self._server.started:
            assert self._http.is_alive()
            time.sleep(0.01)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *exception):
        self._server.should_exit = True
        self._http.join()
        self.engine.stop()
        self._jobs.join()

    def post(self, samples, token=None, **body):
        """Status and answer of `POST /score`."""
        content = json.dumps({"samples": samples, **body}).encode()
        return ask(Request(f"{self.url}/score", content, {"Content-Type": "application/json"}), token)

    def health(self, token=None):
        return ask(Request(f"{self.url}/health"), token)


def ask(request, token=None):
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except HTTPError as error:
        return error.code, json.loads(error.read()) | {"retry_after": error.headers.get("Retry-After")}
