"""An OpenAI-compatible endpoint on loopback, for tests and bars."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, Mapping[str, str], Any]
"""Status, headers, and the body: bytes as they are, anything else as JSON."""
Answer = Callable[[dict[str, Any]], Reply]


class Server:
    """Answers each request by `answer`, and keeps the requests and their headers."""

    def __init__(self, answer: Answer) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, answer))
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(server: Server, answer: Answer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append(request)
            server.headers.append(dict(self.headers))
            status, headers, body = answer(request)
            payload = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(payload))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def in_turn(replies: Iterable[Reply]) -> Answer:
    """The next of `replies` for each request, the last of them again and again."""
    left = list(replies)
    return lambda request: left.pop(0) if len(left) > 1 else left[0]


def adds(request: dict[str, Any]) -> Reply:
    """A model that adds: it calls the tool `add` with the prompt's two numbers, then repeats the result."""
    last = request["messages"][-1]
    if last["role"] == "tool":
        message = {"role": "assistant", "content": last["content"]}
    else:
        a, b = map(int, re.findall(r"\d+", last["content"]))
        function = {"name": "add", "arguments": json.dumps({"a": a, "b": b})}
        message = {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "function": function}]}
    return 200, {}, {"choices": [{"message": message}], "usage": {"prompt_tokens": 20, "completion_tokens": 5}}
