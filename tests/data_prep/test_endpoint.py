import socket

import pytest
from helpers_chat import CAPTION, ChatServer, Reply

from mochi_tune.data_prep.chat import Answer, TryAgain, Turn
from mochi_tune.data_prep.endpoint import MAX_ANSWER_BYTES, Endpoint
from mochi_tune.errors import ConfigError, DataError

TURNS = [Turn("user", "What is it?", (b"picture",)), Turn("assistant", "A ball."), Turn("user", "Shorter.")]
PAGE = b"<!DOCTYPE html><html><body>Sign in</body></html>"


def ask(reply, seconds=5.0, key=""):
    with ChatServer(lambda request, number: reply) as server:
        endpoint = Endpoint(server.url, "seer", key, 300)
        try:
            return endpoint.ask(TURNS, seconds)
        finally:
            endpoint.close()


def check(url, model="seer", key=""):
    endpoint = Endpoint(url, model, key, 300)
    try:
        return endpoint.check()
    finally:
        endpoint.close()


@pytest.mark.parametrize("ending", ["/", "/chat/completions"])
def test_a_conversation_goes_out_as_the_field_writes_it(ending):
    with ChatServer() as server:
        endpoint = Endpoint(f"{server.url}{ending}", "seer", "secret", 300)
        assert endpoint.ask(TURNS, 5) == Answer(CAPTION, 1000, 50)
        endpoint.close()
    (request,) = server.chats
    assert request.key == "secret" and request.body["model"] == "seer" and request.body["max_tokens"] == 300
    first, second, third = request.body["messages"]
    assert first["content"] == [
        {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,cGljdHVyZQ=="}},
        {"type": "text", "text": "What is it?"},
    ]
    assert (second, third) == (
        {"role": "assistant", "content": "A ball."},
        {"role": "user", "content": "Shorter."},
    )


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply({"error": {"message": "broken\npipe"}}, 500), "500: broken pipe"),
        (Reply(PAGE, 502), "502: a web page"),
        (Reply({"detail": "slow down"}, 429), "429: slow down"),
        (Reply(PAGE), "the answer is a web page"),
        (Reply(b""), "the answer is nothing"),
        (Reply(b"\xff\xfe"), "the answer is not the JSON of a chat"),
        (Reply(b"[" * 100_000), "the answer is not the JSON of a chat"),
        (Reply({"error": {"message": "overloaded"}}), r"the answer has no text \(overloaded\)"),
        (Reply({"choices": []}), "the answer has no text"),
        (Reply({"choices": [3]}), "the answer has no text"),
        (Reply(CAPTION, finish_reason="content_filter"), "the model refused"),
        (Reply({"choices": [{"message": {"refusal": "No."}}]}), "the model refused"),
        (Reply(b" " * (10 * 2**20)), "an answer of more than 2 MiB"),
        (Reply(hangs_up=True), "no connection: "),
        (Reply(headers={"Content-Encoding": "gzip"}), "no connection: "),
    ],
)
def test_what_may_pass_is_tried_again(reply, reason):
    with pytest.raises(TryAgain, match=reason):
        ask(reply)


@pytest.mark.parametrize("reply", [Reply(wait_seconds=1.5), Reply(drip_seconds=0.05)])
def test_an_answer_that_does_not_come_in_time_is_lost(reply):
    with pytest.raises(TryAgain, match=r"no answer within 0\.3 s") as caught:
        ask(reply, 0.3)
    assert caught.value.is_lost


def test_the_server_says_how_long_to_wait():
    for headers, seconds in [
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "-3"}, None),
        # The date is compared with the server's clock, not with the local one.
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:30 GMT", "Date": "Wed, 21 Oct 2015 07:28:00 GMT"}, 30),
    ]:
        with pytest.raises(TryAgain) as caught:
            ask(Reply({}, 429, headers))
        assert caught.value.after_seconds == seconds and caught.value.is_throttled


def test_a_request_that_is_refused_is_the_clips_own_trouble():
    with pytest.raises(DataError, match=r"refuses the request \(400: 9 pictures are too many\)"):
        ask(Reply({"error": {"message": "9 pictures are too many"}}, 400))


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (401, r"refuses the key \(401: key \*\*\* is wrong\): give another key, see key_file="),
        (402, "requires payment"),
        (404, "has no such address or model"),
        (307, "redirects to another address"),
    ],
)
def test_what_no_clip_would_pass_ends_the_run_and_the_key_is_not_told(status, text):
    headers = {"Location": "http://127.0.0.1:9/"} if status == 307 else {}
    with pytest.raises(ConfigError, match=text) as caught:
        ask(Reply({"error": {"message": "key sk-123 is wrong"}}, status, headers), key="sk-123")
    assert "sk-123" not in str(caught.value)


def test_no_quota_is_not_waited_for():
    with pytest.raises(ConfigError, match="has no quota left"):
        ask(Reply({"error": {"message": "You exceeded", "code": "insufficient_quota"}}, 429))


def test_an_answer_in_parts_and_one_that_is_cut_off():
    parts = [{"type": "text", "text": "A ball "}, {"type": "text", "text": "rolls."}, 3, {"type": "image"}]
    assert ask(Reply({"choices": [{"message": {"content": parts}}]})) == Answer("A ball rolls.")
    assert ask(Reply({"choices": [{"message": {"content": None}}], "usage": "none"})) == Answer("")
    assert ask(Reply(finish_reason="length")).is_cut_off


def test_newer_models_know_the_limit_by_another_name():
    def answer(request, number):
        if "max_tokens" in request.body:
            return Reply({"error": {"message": "Use 'max_completion_tokens' instead of 'max_tokens'."}}, 400)
        return Reply()

    with ChatServer(answer) as server:
        endpoint = Endpoint(server.url, "seer", "", 300)
        assert [endpoint.ask(TURNS, 5).text for _ in range(2)] == [CAPTION] * 2
        endpoint.close()
    assert [sorted(chat.body.keys() & {"max_tokens", "max_completion_tokens"})[0] for chat in server.chats] == [
        "max_tokens", "max_completion_tokens", "max_completion_tokens",
    ]  # fmt: skip


def test_the_check_accepts_what_lists_or_answers():
    with ChatServer() as server:
        assert check(server.url) == [] and not server.chats
        (note,) = check(server.url, "unlisted")
        assert "does not list model=unlisted, but it answers; it has seer, other" in note
    for models in (Reply({}, 404), Reply({}, 429)):
        with ChatServer(models=models) as server:
            assert check(server.url) == [] and len(server.chats) == 1
    with ChatServer(models=Reply({"data": [{"id": "seer:latest"}]})) as server:
        assert check(server.url) == [] and not server.chats
    with ChatServer(lambda request, number: Reply({}, 429), Reply({}, 404)) as server:
        assert check(server.url) == []


def test_a_server_on_this_machine_is_not_asked_by_a_proxy(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with ChatServer() as server:
        assert check(server.url) == check(server.url.replace("127.0.0.1", "localhost")) == []
    with pytest.raises(ConfigError, match="no connection"):
        check("http://192.0.2.1:8000/v1")


def test_the_check_refuses_what_is_no_endpoint():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(ConfigError, match=r"cannot be used \(no connection: .*refused.*\): start it, or correct"):
            check(f"http://127.0.0.1:{free.getsockname()[1]}/v1")
    with ChatServer(models=Reply(PAGE)) as server, pytest.raises(ConfigError, match=r"a web page.*is /v1 missing"):
        check(server.url)
    with ChatServer() as server, pytest.raises(ConfigError, match=r"has no such address or model \(404: Not Found\)"):
        check(server.url.removesuffix("/v1"))
    with ChatServer(models=Reply({}, 401)) as server, pytest.raises(ConfigError, match="refuses the key"):
        check(server.url)
    with (
        ChatServer(lambda request, number: Reply({"error": "model 'x' not found"}, 404)) as server,
        pytest.raises(ConfigError, match=r"model 'x' not found.*; it has seer, other"),
    ):
        check(server.url, "x")


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "ftp://x/v1", "http:///v1", "http://x:y/v1", "http://a b/v1", "http://x/v1?a=b", ""]
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ConfigError, match="is not an address"):
        Endpoint(url, "seer", "", 300)


@pytest.mark.parametrize("key", ["sk\n-1", "schlüssel", "two words"])
def test_what_is_no_key_is_refused(key):
    with pytest.raises(ConfigError, match="has invalid characters"):
        Endpoint("http://localhost:1/v1", "seer", key, 300)


def test_the_limit_leaves_room_for_any_answer():
    # Tokens have about four letters; a reasoning model writes some ten thousand.
    assert MAX_ANSWER_BYTES > 10 * 4 * 10_000
