"""The server of the page: access control, the files that it serves, and its socket."""

import asyncio
import base64
import binascii
import errno
import hashlib
import hmac
import ipaddress
import mimetypes
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mochi_tune.errors import ConfigError, DataError
from mochi_tune.pages import video_tables
from mochi_tune.ui.folder import OWN_FOLDER, inside
from mochi_tune.ui.peers import is_of_this_user

# Suffixes of the files that the server delivers.
SERVED = (
    ".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".gif", ".png", ".jpg",
    ".jpeg", ".webp", ".bmp", ".html", ".json", ".jsonl", ".csv", ".txt", ".yaml", ".log", ".safetensors",
)  # fmt: skip
# Policy of self-contained pages. In a sandbox their scripts have no origin, so they cannot send requests here.
SANDBOX = "sandbox allow-scripts; default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; "
SANDBOX += "script-src 'unsafe-inline'"
# Policy of reports and pages of grids. They load the videos next to them, which a page without an origin cannot do, and
# they run only their own script.
_REPORT_SCRIPT = hashlib.sha256(video_tables.SCRIPT.strip().removeprefix("<script>").removesuffix("</script>").encode())
REPORT = "default-src 'none'; img-src 'self' data:; media-src 'self' data:; style-src 'unsafe-inline'; "
REPORT += f"script-src 'sha256-{base64.b64encode(_REPORT_SCRIPT.digest()).decode()}'; "
REPORT += "form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
# Policy of the page itself, which loads nothing from other servers and is not shown in frames.
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'none'; form-action 'self'; base-uri 'self'; object-src 'none'"
)
WRONG_PASSWORD_SECONDS = 1.0
Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_host(host: str, password: str) -> None:
    """Checks that a page which other machines can reach has a password.

    Raises:
        ConfigError: other machines can reach the host, and there is no password.
    """
    if not is_loopback(host) and not password:
        raise ConfigError(
            f"host={host} lets other machines in, which could start programs here: set password=... or leave host= out."
        )


def bind(host: str, port: int) -> socket.socket:
    """Returns a bound and listening socket.

    Raises:
        ConfigError: the port is taken or impossible, or the address is not one of this machine.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"port={port} does not fit: use 1024 to 65535, or 0 for any that is free.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ConfigError(f"host={host} is not an address of this machine ({error.strerror}): use 127.0.0.1.") from None
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
        bound.listen(128)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port={port} is taken, perhaps by another page: use port={port + 1}, or 0.") from None
        raise ConfigError(f"host={host} port={port} cannot be listened on: {error.strerror}.") from None
    return bound


class Guard:
    """ASGI middleware that checks the host, the origin, and the password or the user of each request.

    Args:
        app: application to protect.
        host: address that the server listens on.
        password: "" for none.
    """

    def __init__(self, app: Any, host: str, password: str) -> None:
        self.app = app
        self.host = host
        self.password = password

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request to the application, or refuses it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        status, text = self.judge(headers, scope.get("method", "GET"))
        if not status:
            status, text = self.judge_user(scope.get("client"), scope.get("server"))
        if not status:
            await self.app(scope, receive, _with_policy(send))
            return
        if status == 401 and "authorization" in headers:
            await asyncio.sleep(WRONG_PASSWORD_SECONDS)
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        answer = [(b"content-type", b"text/plain; charset=utf-8")]
        if status == 401:
            answer.append((b"www-authenticate", b'Basic realm="mochi-tune", charset="UTF-8"'))
        await send({"type": "http.response.start", "status": status, "headers": answer})
        await send({"type": "http.response.body", "body": text.encode()})

    def judge(self, headers: dict[str, str], method: str) -> tuple[int, str]:
        """Returns the HTTP status and the message of a refusal, with status 0 if the request is allowed.

        Args:
            headers: headers with lower-case names.
            method: HTTP method.
        """
        host = headers.get("host", "")
        # DNS rebinding: a foreign name that resolves to this machine would give foreign pages this origin. On other
        # hosts the names of this machine are not known. There the password protects the page, because a browser stores
        # it for the name that asked for it.
        if is_loopback(self.host) and not is_loopback(_host_name(host)):
            return 403, f"{host!r} is not the address of this page: use http://{self.host}.\n"
        origin = headers.get("origin", "")
        if origin and urlsplit(origin).netloc != host:
            return 403, f"{origin!r} is another page, whose requests are refused.\n"
        site = headers.get("sec-fetch-site", "same-origin")
        if site not in ("same-origin", "none") and not (
            method == "GET"
            and headers.get("sec-fetch-mode") == "navigate"
            and headers.get("sec-fetch-dest") == "document"
        ):
            return 403, "another page asks for this, which is refused.\n"
        if self.password and not _has_password(headers.get("authorization", ""), self.password):
            return 401, "the page asks for its password; the user name may be anything.\n"
        return 0, ""

    def judge_user(self, client: tuple[str, int] | None, server: tuple[str, int] | None) -> tuple[int, str]:
        """Returns the refusal of a connection as `judge` does; the arguments are those of `is_of_this_user`."""
        # Without a password, every user of this machine could otherwise start programs as the owner of the page.
        if self.password or not is_loopback(self.host) or is_of_this_user(client, server):
            return 0, ""
        return 403, "the page answers programs of its own user alone: start it with password=... to let others in.\n"


def _host_name(host: str) -> str:
    return urlsplit(f"//{host}").hostname or ""


def _has_password(authorization: str, password: str) -> bool:
    kind, _, encoded = authorization.partition(" ")
    try:
        given = base64.b64decode(encoded, validate=True).partition(b":")[2] if kind.lower() == "basic" else b""
    except (binascii.Error, ValueError):
        return False
    return hmac.compare_digest(given, password.encode())


def _with_policy(send: Send) -> Send:
    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", []))
            if not any(key.lower() == b"content-security-policy" for key, _ in headers):
                headers.append((b"content-security-policy", POLICY.encode()))
            headers += [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
            message = {**message, "headers": headers}
        await send(message)

    return sending


def served_file(folder: Path, name: str) -> Path:
    """Returns the path of a file that the server may deliver.

    Raises:
        DataError: the file is outside of the folder, hidden, of another kind, or does not exist.
    """
    path = inside(folder, name)
    parts = path.relative_to(folder.resolve()).parts
    is_hidden = any(part.startswith(".") for part in parts)
    if is_hidden and parts[:2] not in ((OWN_FOLDER, "thumbnails"), (OWN_FOLDER, "jobs")):
        raise DataError(f"{name} is hidden: the page does not serve it.")
    if path.suffix.lower() not in SERVED or not path.is_file():
        raise DataError(f"{name} does not exist, or is of a kind that the page does not serve.")
    return path


def policy_of(page: Path) -> str:
    """Returns the content security policy of an HTML file in the folder."""
    shows_videos = page.name == "report.html" or page.match("runs/*/grids/*/index.html")
    return REPORT if shows_videos else SANDBOX


def build_app(folder: Path, host: str, password: str, blocks: Any, looks: dict[str, Any]) -> Guard:
    """Returns the guarded application: the page at /, and the folder's files at /files.

    Args:
        folder: folder of the page.
        host: address that the server listens on.
        password: "" for none.
        blocks: the page, a `gradio.Blocks`.
        looks: theme, css and so on, for `gradio.mount_gradio_app`.
    """
    import gradio as gr
    from fastapi import FastAPI
    from fastapi.responses import FileResponse, PlainTextResponse

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/files/{name:path}")
    def give(name: str, download: bool = False) -> Any:
        try:
            path = served_file(folder, name)
            facts = path.stat()
        except FileNotFoundError:
            return PlainTextResponse(f"{name} has vanished: reload the page.\n", 404)
        except DataError as error:
            return PlainTextResponse(f"{error}\n", 404)
        headers = {"cache-control": "no-cache"}
        if path.suffix.lower() == ".html":
            headers["content-security-policy"] = policy_of(path)
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        shown = "text/plain" if path.suffix.lower() in (".log", ".yaml", ".jsonl") else kind
        given = path.name if download else None
        return FileResponse(path, media_type=shown, headers=headers, stat_result=facts, filename=given)

    mounted = gr.mount_gradio_app(
        app, blocks, path="/", server_name=host, footer_links=[], run_history=False, max_file_size=MAX_UPLOAD,
        show_error=True, ssr_mode=False, enable_monitoring=False, pwa=False, mcp_server=False, **looks,
    )  # fmt: skip
    return Guard(mounted, host, password)


# Maximum size of an upload, enough for some seconds in the best quality of cameras.
MAX_UPLOAD = "2gb"


def serve(app: Any, bound: socket.socket) -> None:
    """Answers requests until SIGINT or SIGTERM."""
    import uvicorn

    # Without a timeout, event streams of open pages would delay the shutdown indefinitely. No header may replace the
    # address of the client, by which the guard finds its user.
    config = uvicorn.Config(
        app, log_level="error", access_log=False, timeout_graceful_shutdown=2, ws="none", proxy_headers=False
    )
    uvicorn.Server(config).run(sockets=[bound])
