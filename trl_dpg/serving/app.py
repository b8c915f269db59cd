"""The HTTP side of `trl-dpg serve`."""

import json
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

from accelerate import PartialState
from fastapi import Depends, FastAPI, Request
from fastapi.responses import Response
from pydantic import ValidationError
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ..environment import environment
from ..files import finite
from ..redaction import as_stored
from ..run_setup import reward_setup
from ..score_limits import Limits
from ..scored_batch import to_json
from .datasets import Dataset, Datasets, Id
from .engine import Engine
from .requests import Refused, ScoreRequest, digest


LOCAL = ("127.0.0.1", "localhost")
"""Addresses that need no token."""


def make_app(
    engine: Engine, limits: Limits | None = None, token: str | None = None, on_stop: Callable[[], None] | None = None
) -> FastAPI:
    """
    The application of a score server: `POST /score` and `GET /health`, see `docs/serve.md`.

    Args:
        engine ([`Engine`]): Scores the datasets. Another thread runs it.
        limits ([`Limits`], *optional*): How much the server takes.
        token (`str`, *optional*): The bearer token of every request. Without it, only requests to 127.0.0.1 and
            localhost are answered, so that no web page can reach the server by another name.
        on_stop (`Callable`, *optional*): Called without arguments when the server ends.
    """
    limits = limits or Limits()
    datasets = Datasets(engine.submit, limits)
    described = as_stored(reward_setup(engine.reward))
    described = {"set_up": digest(described)[:16]} | described
    fixed = described | {"limits": asdict(limits), "versions": environment()}

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        if on_stop is not None:
            on_stop()

    app = FastAPI(
        openapi_url=None,
        lifespan=lifespan,
        dependencies=[] if token is None else [Depends(_bearer(token))],
        exception_handlers={Refused: _refuse},
    )
    if token is None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOCAL))

    @app.get("/health")
    async def health() -> Response:
        return _json({"status": "ok"} | _work(datasets) | fixed)

    @app.post("/score")
    async def score(request: Request) -> Response:
        asked = _parse(await _body(request, limits))
        dataset = datasets.take(asked)
        wait = limits.poll_timeout if asked.wait is None else min(asked.wait, limits.poll_timeout)
        if not await datasets.wait(dataset, wait):
            waiting = {"dataset": dataset.name, "state": dataset.state, "size": dataset.size}
            return _json(waiting | {"received": len(dataset.digests)}, 202, {"Retry-After": "1"})
        if dataset.refused is not None:
            datasets.forget(dataset)
            raise dataset.refused
        ids = [place if own.id is None else own.id for place, own in enumerate(asked.samples)]
        return _json({"set_up": described["set_up"]} | _answer(dataset, ids))

    return app


def _bearer(token: str) -> Callable[[Request], None]:
    """Refuses requests without the token. The comparison takes as long for a token that is nearly right."""

    def authorized(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if not secrets.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise Refused(401, "The header `Authorization: Bearer <token>` is missing, or the token is wrong.")

    return authorized


def _work(datasets: Datasets) -> dict[str, Any]:
    """What the server has to do."""
    waiting, collecting = len(datasets.in_state("waiting")), len(datasets.in_state("collecting"))
    processes = PartialState().num_processes
    running = bool(datasets.in_state("running"))
    return {"running": running, "waiting": waiting, "collecting": collecting, "processes": processes}


def _answer(dataset: Dataset, ids: list[Id]) -> dict[str, Any]:
    places = [dataset.places[name] for name in ids]
    return {"dataset": dataset.name, "size": dataset.size} | to_json(dataset.scored, places)  # type: ignore[arg-type]


async def _body(request: Request, limits: Limits) -> bytes:
    """The body of a request, which is not read further than it may be long."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which a web page of another site cannot send
        raise Refused(415, f"The body must be JSON with `Content-Type: application/json`, got {kind[:80]!r}.")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Refused(415, "Compressed bodies are not read. Send the JSON as it is.")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limits.max_request_bytes:
            raise Refused(413, f"The body has more than {limits.max_request_bytes} bytes. Send the dataset in parts.")
    return bytes(body)


def _parse(body: bytes) -> ScoreRequest:
    try:
        return ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_input=False, include_url=False, include_context=False)
        reasons = [": ".join(filter(None, (".".join(map(str, own["loc"])), own["msg"]))) for own in found[:5]]
        more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
        raise Refused(422, f"{'; '.join(reasons):.800}{more}") from error  # a field's name may be long


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    headers = {} if error.retry_after is None else {"Retry-After": f"{error.retry_after:g}"}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return _json({"detail": error.reason}, error.status, headers)


def _json(value: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    text = json.dumps(finite(value), default=lambda number: finite(number.tolist()))  # of numpy, or a tensor
    return Response(text, status, headers, media_type="application/json")
