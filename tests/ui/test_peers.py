"""Other users of the machine do not get in without a password."""

import asyncio
import os
import socket
import threading

import httpx
import pytest

from mochi_tune.errors import ConfigError
from mochi_tune.ui import peers
from mochi_tune.ui.peers import is_of_this_user
from mochi_tune.ui.server import Guard, bind, serve

OTHER = os.getuid() + 1
pytestmark = pytest.mark.skipif(not peers.TABLES[0].exists(), reason="the system has no table of sockets")


def ask(guard, client, server):
    """Returns the status of a request, as the ASGI server gets it; 200 is that of the application."""
    scope = {"type": "http", "headers": [(b"host", b"127.0.0.1:7860")], "client": client, "server": server}
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(guard(scope, None, send))
    return sent[0]["status"]


async def application(_scope, _receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@pytest.mark.parametrize(
    ("host", "other"), [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("127.0.0.1", "::ffff:127.0.0.1")]
)
def test_the_user_of_a_connection_is_told_by_its_socket(monkeypatch, host, other):
    try:
        bound = bind(host, 0)
    except ConfigError:
        pytest.skip("the machine has no IPv6")
    family = socket.AF_INET6 if ":" in other else socket.AF_INET
    with bound, socket.socket(family) as mine:
        mine.connect((other, bound.getsockname()[1]))
        accepted, client = bound.accept()
        client, server = client[:2], accepted.getsockname()[:2]
        guard = Guard(application, host, "")
        assert is_of_this_user(client, server)
        if host == "127.0.0.1":
            assert ask(guard, client, server) == 200
        # The page belongs to another user than the client, who is not root.
        monkeypatch.setattr(peers.os, "getuid", lambda: OTHER)
        assert is_of_this_user(client, server) == (OTHER - 1 == 0)
        monkeypatch.undo()
        # The same port with another page is another connection.
        assert not is_of_this_user(client, (server[0], server[1] - 1))
        # The client sends and closes at once. The row that is left has user 0, which is not root.
        mine.close()
        assert not is_of_this_user(client, server)
        accepted.close()


def row(uid, inode):
    ends = "0100007F:1388 0100007F:1EB4"
    return f"   7: {ends} 01 00000000:00000000 00:00000000 00000000  {uid:4}        0 {inode} 1 00 20 4 30 10 -1\n"


def test_another_user_is_refused_unless_by_the_password(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "TABLES", (tmp_path / "tcp", tmp_path / "tcp6"))
    ends, guard = (("127.0.0.1", 5000), ("127.0.0.1", 7860)), Guard(application, "127.0.0.1", "")
    # Such as on macOS.
    assert ask(guard, *ends) == 200
    for uid, inode, status in ((os.getuid(), 9, 200), (0, 9, 200), (OTHER, 9, 403), (0, 0, 403)):
        peers.TABLES[0].write_text("  sl  local_address rem_address\n" + row(uid, inode))
        assert ask(guard, *ends) == status
    assert ask(guard, ("127.0.0.1", 5001), ends[1]) == 403 and ask(guard, None, None) == 403
    assert Guard(None, "127.0.0.1", "x").judge_user(*ends)[0] == 0
    assert Guard(None, "0.0.0.0", "x").judge_user(*ends)[0] == 0


def test_a_header_does_not_name_another_client():
    bound = bind("127.0.0.1", 0)
    threading.Thread(target=serve, args=(Guard(application, "127.0.0.1", ""), bound), daemon=True).start()
    port = bound.getsockname()[1]
    for headers in ({}, {"x-forwarded-for": "127.0.0.1:5000"}):
        assert httpx.get(f"http://127.0.0.1:{port}/", headers=headers).status_code == 200
