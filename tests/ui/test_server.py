"""Access control and served files, through the real application, without a browser."""

import asyncio
import base64
import contextlib
import hashlib
import os
import re
import socket
import subprocess
import sys
import threading
from functools import partial

import httpx
import pytest

from mochi_tune.errors import ConfigError, DataError
from mochi_tune.pages import video_tables
from mochi_tune.ui.server import Guard, bind, build_app, check_host, serve, served_file

PASSWORD = "pass: wörd"
HOST = "127.0.0.1:7860"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    outside = tmp_path_factory.mktemp("outside")
    (outside / "secret.txt").write_text("secret")
    (folder / "videos").mkdir()
    (folder / "videos" / "a b.txt").write_text("a cat")
    (folder / "videos" / "link.txt").symlink_to(outside / "secret.txt")
    (folder / "folder_link").symlink_to(outside)
    (folder / ".git").mkdir()
    (folder / ".git" / "config.txt").write_text("hidden")
    (folder / "script.py").write_text("secret")
    (folder / "page.html").write_text("<script>1</script>")
    os.environ["GRADIO_TEMP_DIR"] = str(folder / ".mochi_tune" / "uploads")
    return folder


@pytest.fixture(scope="module")
def blocks(folder):
    import gradio as gr

    with gr.Blocks(analytics_enabled=False) as blocks:
        gr.Textbox()
    return blocks


@pytest.fixture(scope="module")
def address(folder, blocks):
    """The address of a running server with a password."""
    bound = bind("127.0.0.1", 0)
    app = build_app(folder, "127.0.0.1", PASSWORD, blocks, {})
    threading.Thread(target=serve, args=(app, bound), daemon=True).start()
    return f"http://127.0.0.1:{bound.getsockname()[1]}"


PATHS = [
    "/", "/config", "/theme.css", "/files/videos/a%20b.txt", "/gradio_api/info", "/gradio_api/startup-events",
    "/gradio_api/queue/data?session_hash=a", "/gradio_api/file=/etc/passwd", "/login", "/robots.txt", "/nothing",
]  # fmt: skip


def test_nobody_gets_in_without_the_password(address):
    async def ask() -> list[httpx.Response]:
        # Wrong passwords are answered with a delay, so all requests run concurrently.
        async with httpx.AsyncClient() as client:
            tries = [client.get(address + path, auth=auth) for path in PATHS for auth in (None, ("", ""))]
            return await asyncio.gather(*tries)

    for answer in asyncio.run(ask()):
        assert answer.status_code == 401 and "Basic" in answer.headers["www-authenticate"], answer.url


def test_the_password_lets_in_and_a_wrong_one_does_not(address):
    async def ask() -> list[int]:
        async with httpx.AsyncClient() as client:
            tries = [PASSWORD, "pass", PASSWORD + "x", "PASS: WÖRD"]
            answers = await asyncio.gather(*(client.get(f"{address}/", auth=("any", each)) for each in tries))
            garbage = await client.get(f"{address}/", headers={"authorization": "Basic %%%"})
            return [*(answer.status_code for answer in answers), garbage.status_code]

    assert asyncio.run(ask()) == [200, 401, 401, 401, 401]


def test_uploads_and_events_need_the_password_too(address):
    assert httpx.post(f"{address}/gradio_api/upload", files={"files": ("a.mp4", b"x")}).status_code == 401
    assert httpx.post(f"{address}/gradio_api/queue/join", json={}).status_code == 401


@pytest.mark.parametrize(
    "path",
    ["/files/../outside/secret.txt", "/files/..%2f..%2fetc%2fpasswd", "/files//etc/passwd", "/files/%2fetc%2fpasswd",
     "/files/videos/link.txt", "/files/folder_link/secret.txt", "/files/.git/config.txt", "/files/script.py",
     "/files/videos", "/files/none.txt", "/files/a%00.txt",
     "/gradio_api/file=/etc/passwd", "/gradio_api/file=script.py", "/gradio_api/file=videos/link.txt",
     "/gradio_api/file=../outside/secret.txt"],
)  # fmt: skip
def test_no_other_file_is_given_out(address, folder, path):
    with httpx.Client(auth=("", PASSWORD)) as client:
        # A raw request, because httpx resolves the dots itself.
        request = client.build_request("GET", address + "/")
        request.url = request.url.copy_with(raw_path=path.encode())
        answer = client.send(request)
    assert answer.status_code in (403, 404), answer.text
    assert "secret" not in answer.text.replace("secret.txt", "") and "root:" not in answer.text


def test_a_file_of_the_folder_is_given_out_and_a_page_in_a_sandbox(address):
    with httpx.Client(auth=("", PASSWORD)) as client:
        text = client.get(f"{address}/files/videos/a%20b.txt")
        part = client.get(f"{address}/files/videos/a%20b.txt", headers={"range": "bytes=2-4"})
        page = client.get(f"{address}/files/page.html")
        front = client.get(f"{address}/")
    assert text.text == "a cat" and (part.status_code, part.text) == (206, "cat")
    assert page.headers["content-security-policy"].startswith("sandbox allow-scripts;")
    assert "default-src 'self'" in front.headers["content-security-policy"]


@pytest.mark.parametrize("name", ["runs/a/report.html", "runs/a/grids/grid_1/index.html"])
def test_a_page_with_videos_beside_it_shows_them_and_runs_its_own_script_alone(address, folder, name):
    page = folder / name
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(f"<p>a</p>{video_tables.SCRIPT}")
    with httpx.Client(auth=("", PASSWORD)) as client:
        answer = client.get(f"{address}/files/{name}")
    policy = answer.headers["content-security-policy"]
    script = re.search("<script>(.*)</script>", answer.text, re.DOTALL)
    assert script
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy and "media-src 'self'" in policy
    assert "unsafe-inline" not in policy.partition("script-src")[2]


def test_a_file_that_vanishes_is_one_line(address, folder):
    (folder / "videos" / "gone.txt").write_text("x")
    with httpx.Client(auth=("", PASSWORD)) as client:
        assert client.get(f"{address}/files/videos/gone.txt").status_code == 200
        (folder / "videos" / "gone.txt").unlink()
        answer = client.get(f"{address}/files/videos/gone.txt")
    assert answer.status_code == 404 and len(answer.text.splitlines()) == 1


def test_an_upload_that_is_too_large_is_refused_and_leaves_nothing(address, folder, blocks):
    """Bytes beyond the limit are not read."""
    limit, uploads = blocks.max_file_size, folder / ".mochi_tune" / "uploads"
    assert limit == 2 * 1024**3
    blocks.max_file_size = 100_000
    try:
        with httpx.Client(auth=("", PASSWORD)) as client:
            send = partial(client.post, f"{address}/gradio_api/upload")
            refused = send(files={"files": ("large.mp4", b"x" * 5_000_000)})
            taken = send(files={"files": ("../../<b>.mp4", b"x" * 1000)})
    finally:
        blocks.max_file_size = limit
    assert refused.status_code == 413 and "maximum allowed size" in refused.text
    assert taken.status_code == 200
    # Its name cannot lead out of the folder of uploads.
    left = [path for path in uploads.rglob("*") if path.is_file()]
    assert [path.stat().st_size for path in left] == [1000]


def judge(host="127.0.0.1", password="", method="GET", **headers):
    headers = {key.replace("_", "-"): value for key, value in ({"host": HOST} | headers).items()}
    return Guard(None, host, password).judge(headers, method)[0]


def test_other_origins_are_refused():
    assert judge() == 0
    assert judge(origin=f"http://{HOST}", method="POST") == 0
    for origin in (
        "http://evil.example",
        "http://127.0.0.1:8000",
        "null",
        "http://127.0.0.1",
        f"http://{HOST}.evil.example",
    ):
        assert judge(origin=origin, method="POST") == 403
        assert judge(origin=origin) == 403
    # DNS rebinding: a foreign name that resolves to this machine.
    assert Guard(None, "127.0.0.1", "").judge({"host": "evil.example:7860"}, "GET")[0] == 403
    assert Guard(None, "127.0.0.1", "").judge({}, "GET")[0] == 403
    assert Guard(None, "127.0.0.1", "").judge({"host": "localhost:7860"}, "GET")[0] == 0
    # Images and frames of other pages send no origin and are refused; links to the page work.
    assert judge(sec_fetch_site="cross-site", sec_fetch_mode="no-cors", sec_fetch_dest="image") == 403
    assert judge(sec_fetch_site="same-site", sec_fetch_mode="navigate", sec_fetch_dest="iframe") == 403
    assert judge(sec_fetch_site="cross-site", sec_fetch_mode="navigate", sec_fetch_dest="document") == 0
    assert (
        judge(sec_fetch_site="cross-site", sec_fetch_mode="navigate", sec_fetch_dest="document", method="POST") == 403
    )


def test_beyond_this_machine_the_password_stops_a_foreign_name_that_leads_here():
    """A browser stores a password for the name that asked for it, so pages of another name do not send it."""
    foreign = {"host": "evil.example:7860", "origin": "http://evil.example:7860", "sec-fetch-site": "same-origin"}
    right = {"authorization": "Basic " + base64.b64encode(f"any:{PASSWORD}".encode()).decode()}
    wrong = {"authorization": "Basic " + base64.b64encode(b"any:x").decode()}
    for host in ("0.0.0.0", "192.168.1.7"):
        guard = Guard(None, host, PASSWORD)
        assert [guard.judge(foreign | more, "POST")[0] for more in ({}, wrong, right)] == [401, 401, 0]
        # The password is not sufficient, because requests of another page may have it, too.
        another = right | {"host": "studio.example:7860", "origin": "http://evil.example"}
        assert guard.judge(another, "POST")[0] == 403
    # A server on 127.0.0.1 refuses the name in any case.
    assert Guard(None, "127.0.0.1", PASSWORD).judge(foreign | right, "GET")[0] == 403


def test_a_request_of_another_page_does_nothing(address):
    headers = {"origin": "http://evil.example"}
    with httpx.Client(auth=("", PASSWORD)) as client:
        assert client.post(f"{address}/gradio_api/queue/join", json={}, headers=headers).status_code == 403
        answer = client.post(f"{address}/gradio_api/upload", files={"files": ("a.mp4", b"x")}, headers=headers)
    assert answer.status_code == 403


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.com", ""])
def test_other_machines_need_a_password(host):
    with pytest.raises(ConfigError, match="password"):
        check_host(host, "")
    check_host(host, "x")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.7", "::1", "localhost"])
def test_this_machine_needs_none(host):
    check_host(host, "")


def test_a_port_that_is_taken_is_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port={port} is taken"):
            bind("127.0.0.1", port)
    for host, port in (("no.such.host.invalid", 7860), ("127.0.0.1", 99999)):
        with pytest.raises(ConfigError):
            bind(host, port)
    with contextlib.closing(bind("127.0.0.1", 0)) as bound:
        assert bound.getsockname()[1] > 0


def test_served_files_by_name(folder):
    # The server passes decoded names, so a name with %20 is that of another file.
    assert served_file(folder, "videos/a b.txt").read_text() == "a cat"
    (folder / "videos" / "a%20b.txt").write_text("a dog")
    assert served_file(folder, "videos/a%20b.txt").read_text() == "a dog"
    (folder / "videos" / "a%20b.txt").unlink()
    with pytest.raises(DataError):
        served_file(folder, "../outside/secret.txt")


def run_ui(*arguments):
    command = [sys.executable, "-m", "mochi_tune.cli", "ui", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_verb_refuses_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    for arguments, line in (
        (("host=0.0.0.0",), "lets other machines in"),
        ((f"folder={tmp_path / 'none'}",), "is not a folder"),
        (("port=x",), "whole number"),
    ):
        done = run_ui(*arguments)
        assert done.returncode == 2 and line in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_missing_gradio_is_one_line(tmp_path):
    code = "import sys; sys.modules['gradio'] = None; from mochi_tune.cli.main import main; main(['ui'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 2 and "pip install 'mochi-tune[ui]'" in done.stderr, done.stderr
