"""A teacher for tests: an OpenAI-compatible server in a thread, which answers as a test tells it, and keeps count."""

import asyncio
import json
import threading
import time
from collections import Counter
from contextlib import AbstractContextManager

import uvicorn


class Server(AbstractContextManager):
    """
    Runs `reply(request, number)` for each chat completion. Its result is what is sent.

    A result is a `dict` (a message's fields: an answer), `(status, body, headers)`, `bytes` (a body as it is), or a
    list of chunks for a stream, in which `None` breaks the connection.

    Args:
        reply (`Callable`): Makes the replies. `number` counts the requests with the same prompt and seed.
        seconds (`float`): What an answer takes.
        at_once (`int`, *optional*): Requests beyond this number at once get a 429.
        models (`list[str]`): What GET /models lists.
        port (`int`): The port; by default a free one.
        leaves_after (`int`, *optional*): Answers after which the server is gone. All connections break.

    Attributes:
        requests (`list[dict]`): The bodies of all requests.
        over (`list[int]`): Answers that had been given, for each request beyond `at_once`.
    """

    def __init__(self, reply=None, seconds=0.0, at_once=None, models=("teacher",), port=0, leaves_after=None):
        self.reply = reply or (lambda request, number: {"content": f"To {request['messages'][-1]['content']}"})
        self.seconds, self.at_once, self.models, self.leaves_after = seconds, at_once, models, leaves_after
        self.requests, self.headers, self.over, self.times = [], [], [], []
        self.answered = self.busy = self.most = 0
        self._numbers: Counter = Counter()
        config = uvicorn.Config(
            self._app, host="127.0.0.1", port=port, log_level="critical", lifespan="off", interface="asgi3"
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self):
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        return self

    def __exit__(self, *_):
        self._leave()
        self.wait()

    def _leave(self):
        self._server.should_exit = self._server.force_exit = True

    def wait(self):
        """Until it has left."""
        self._thread.join()

    async def _app(self, scope, receive, send):
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        if scope["path"] == "/v1/models":
            await self._send(send, 200, {"object": "list", "data": [{"id": name} for name in self.models]})
            return
        request = json.loads(body)
        self.headers.append({key.decode(): value.decode() for key, value in scope["headers"]})
        self.requests.append(request)
        self.times.append(time.monotonic())
        name = json.dumps([request["messages"], request.get("seed")])
        number = self._numbers[name]
        self._numbers[name] += 1
        if self.at_once is not None and self.busy >= self.at_once:
            self.over.append(self.answered)
            await self._send(send, 429, {"error": {"message": "too many at once"}})
            return
        result = self.reply(request, number)
        if isinstance(result, tuple):
            await self._send(send, *result)
            return
        self.busy += 1
        self.most = max(self.most, self.busy)
        await asyncio.sleep(self.seconds)
        self.busy -= 1
        self.answered += 1
        if self.answered == self.leaves_after:
            self._leave()
        if isinstance(result, list):
            await self._stream(send, result)
        elif isinstance(result, bytes):
            await self._send(send, 200, result)
        else:
            await self._send(send, 200, completion(**result))

    async def _send(self, send, status, body, headers=()):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = [(b"content-type", b"application/json"), *((k.encode(), v.encode()) for k, v in headers)]
        headers.append((b"content-length", str(len(content)).encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    async def _stream(self, send, chunks):
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for chunk in chunks:
            if chunk is None:
                raise ConnectionError  # uvicorn closes the connection
            line = chunk if isinstance(chunk, bytes) else json.dumps(chunk).encode()
            await send({"type": "http.response.body", "body": b"data: " + line + b"\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def completion(finish_reason="stop", prompt_tokens=10, completion_tokens=20, **message):
    """The body of a chat completion."""
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    usage["total_tokens"] = prompt_tokens + completion_tokens
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish_reason}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "t-1", "choices": [choice], "usage": usage}


def chunk(finish_reason=None, usage=None, **delta):
    """One part of a stream."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return {
        "id": "x",
        "object": "chat.completion.chunk",
        "created": 0,
        "model": "t-1",
        "choices": [choice],
        "usage": usage,
    }
