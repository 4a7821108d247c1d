"""A small chat endpoint on localhost that answers, stalls, fails or talks nonsense, as a test wants it."""

import base64
import io
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from helpers_video import frame_number

CAPTION = (
    "A small red ball rolls slowly from the left to the right over a grey table, while the camera stays still at the "
    "height of the table, and a soft white light falls on it from a window."
)


@dataclass(frozen=True)
class Reply:
    """What the server sends; `wait_seconds` before it, `drip_seconds` between its bytes, or nothing at all."""

    body: Any = CAPTION
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    wait_seconds: float = 0.0
    drip_seconds: float = 0.0
    hangs_up: bool = False
    finish_reason: str = "stop"

    def content(self) -> bytes:
        if isinstance(self.body, bytes):
            return self.body
        if isinstance(self.body, dict):
            return json.dumps(self.body).encode()
        message = {"role": "assistant", "content": self.body}
        usage = {"prompt_tokens": 1000, "completion_tokens": 50, "total_tokens": 1050}
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason}
        return json.dumps({"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage}).encode()


@dataclass(frozen=True)
class Request:
    """What the server got: when by a clock that does not jump, the path, the key and the body."""

    time: float
    path: str
    key: str
    body: dict

    @property
    def images(self) -> list[np.ndarray]:
        """The pictures of the first message, uint8 (H, W, 3)."""
        from PIL import Image

        parts = self.body["messages"][0]["content"]
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        start = "data:image/jpeg;base64,"
        assert all(url.startswith(start) for url in urls)
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(url.removeprefix(start))))) for url in urls]

    @property
    def clip(self) -> int:
        """The number that is painted on the first picture, which tells the clips apart."""
        return frame_number(self.images[0])

    @property
    def texts(self) -> list[str]:
        """What each message says."""
        contents = [message["content"] for message in self.body["messages"]]
        return [content if isinstance(content, str) else content[-1]["text"] for content in contents]


class ChatServer:
    """Serves chats; use as a context manager.

    Args:
        answer: takes a request and its number among all chats, from 0, and returns what is sent.
        models: what is sent for the list of models; None: the list of "seer".
    """

    def __init__(self, answer: Callable[[Request, int], Reply] | None = None, models: Reply | None = None) -> None:
        self.answer = answer or (lambda request, number: Reply())
        self.models = models or Reply({"object": "list", "data": [{"id": "seer"}, {"id": "other"}]})
        self.chats: list[Request] = []
        self.requests: list[Request] = []
        self._lock = threading.Lock()
        chat = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                chat._serve(self, {})

            def do_POST(self):
                chat._serve(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            # A client that was killed or has lost patience is what tests do to it.
            def handle_error(self, *_):
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> "ChatServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _serve(self, handler: BaseHTTPRequestHandler, body: dict) -> None:
        key = handler.headers.get("Authorization", "").removeprefix("Bearer ")
        request = Request(time.monotonic(), handler.path, key, body)
        with self._lock:
            self.requests.append(request)
            is_chat = handler.path == "/v1/chat/completions"
            if is_chat:
                self.chats.append(request)
            number = len(self.chats) - 1
        reply = self.answer(request, number) if is_chat else self.models
        if not is_chat and handler.path != "/v1/models":
            reply = Reply({"detail": "Not Found"}, 404)
        time.sleep(reply.wait_seconds)
        if reply.hangs_up:
            handler.close_connection = True
            return
        content = reply.content()
        # The other one adds a Date.
        send = handler.send_response_only if "Date" in reply.headers else handler.send_response
        send(reply.status)
        for name, value in reply.headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        if not reply.drip_seconds:
            handler.wfile.write(content)
            return
        for byte in content:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            time.sleep(reply.drip_seconds)
