"""Sends conversations with pictures to an OpenAI-compatible chat endpoint over HTTP.

Source: the fields of requests and answers are those of openai/openai-openapi openapi.yaml (createChatCompletion), which
vLLM, Ollama and LM Studio serve.
"""

import base64
import re
import time
from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from mochi_tune.data_prep.chat import Answer, TryAgain, Turn
from mochi_tune.errors import STAND_IN_BYTES, ConfigError, DataError, name_stand_in, some
from mochi_tune.files import parse_object

# Maximum bytes that are read of an answer; a caption has a thousandth of it.
MAX_ANSWER_BYTES = 2 * 2**20
# Timeouts of the check before the first clip, and of each connection.
_CHECK_SECONDS, _CONNECT_SECONDS = 30.0, 10.0
# Maximum characters of an endpoint's own error that are shown.
_MAX_QUOTED = 200
# Status codes that would be the same for every clip, with their meaning.
_FATAL = {401: "refuses the key", 402: "requires payment", 404: "has no such address or model", 405: "has no chat API"}
# Status codes that are retried: timeouts, conflicts, too many requests.
_PASSING = (408, 409, 425, 429)


class Endpoint:
    """An OpenAI-compatible endpoint; thread-safe.

    Args:
        url: including /v1.
        model: its name at the endpoint.
        key: sent as a bearer token; "" for none.
        max_tokens: maximum tokens of an answer, including reasoning.

    Raises:
        ConfigError: the address or the key is malformed.
    """

    def __init__(self, url: str, model: str, key: str, max_tokens: int) -> None:
        import httpx

        self.url, self.model, self._key = _check_url(url), model, key
        self._limit = {"max_tokens": max_tokens}
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError("the API key has invalid characters: check key_file= or OPENAI_API_KEY.")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # Redirects are not followed, so that the key is sent to this address only. Proxies from the environment are not
        # used for this machine.
        limits = httpx.Limits(max_connections=None)
        self._client = httpx.Client(headers=headers, limits=limits, trust_env=not _is_this_machine(self.url))

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def check(self) -> list[str]:
        """Lists the models; if that does not answer whether the model exists, sends a short request to it.

        Raises:
            ConfigError: the endpoint cannot be reached, is not one, refuses the key or does not have the model.
        """
        try:
            status, _, content = self._send("GET", "/models", None, _CHECK_SECONDS)
            names = _model_names(content) if status == 200 else None
            if names is None and status not in (404, 405, 429):
                if status == 200:
                    raise ConfigError(f"{self._at} answers with {_kind(content)}: is /v1 missing at its end?")
                raise self._refusal(status, content)
            if names is None or not {self.model, f"{self.model}:latest"} & set(names):
                known = "" if not names else f"; it has {some(name[:100] for name in names)}"
                self._check_model(known)
                if known:
                    return [f"{self._at} does not list model={self.model}, but it answers{known}"]
        except TryAgain as failure:
            raise ConfigError(f"{self._at} cannot be used ({failure}): start it, or correct the address.") from None
        return []

    def ask(self, turns: Sequence[Turn], seconds: float) -> Answer:
        """Sends a conversation; see `Captioner.ask`."""
        messages = [_as_message(turn) for turn in turns]
        content = self._chat({"model": self.model, "messages": messages}, seconds)
        return _read_answer(content)

    def _check_model(self, known: str) -> None:
        try:
            self._chat({"model": self.model, "messages": [{"role": "user", "content": "Say yes."}]}, _CHECK_SECONDS)
        except (ConfigError, DataError) as error:
            raise ConfigError(f"{str(error).rstrip('.')}{known}.") from None
        except TryAgain as failure:
            # A throttled endpoint is available.
            if not failure.is_throttled:
                raise

    def _chat(self, body: dict[str, Any], seconds: float) -> bytes:
        started, limit = time.monotonic(), self._limit
        status, headers, content = self._send("POST", "/chat/completions", body | limit, seconds)
        if status == 400 and b"max_completion_tokens" in content and "max_tokens" in limit:
            # Newer models of OpenAI have another name for the limit.
            self._limit = {"max_completion_tokens": limit["max_tokens"]}
            left = max(seconds - (time.monotonic() - started), 0.1)
            status, headers, content = self._send("POST", "/chat/completions", body | self._limit, left)
        if status == 200:
            return content
        if status in _PASSING or status >= 500:
            if b"insufficient_quota" in content:
                raise ConfigError(f"{self._at} has no quota left ({self._quote(content)}): add quota, then run again.")
            is_throttled = status in (429, 503)
            raise TryAgain(f"{status}{self._quoted(content)}", _wait_seconds(headers), is_throttled=is_throttled)
        raise self._refusal(status, content)

    def _refusal(self, status: int, content: bytes) -> ConfigError | DataError:
        said = f"({status}{self._quoted(content)})"
        if status in _FATAL:
            advice = "give another key, see key_file=" if status in (401, 402) else "correct endpoint= or model="
            return ConfigError(f"{self._at}, model={self.model}, {_FATAL[status]} {said}: {advice}.")
        if 300 <= status < 400:
            return ConfigError(f"{self._at} redirects to another address {said}: use that one.")
        return DataError(f"{self._at} refuses the request {said}")

    def _send(self, method: str, path: str, body: dict | None, seconds: float) -> tuple[int, Any, bytes]:
        """Returns status, headers and content.

        Raises:
            TryAgain: they did not arrive completely in time.
        """
        import httpx

        deadline, content = time.monotonic() + seconds, bytearray()
        timeout = httpx.Timeout(seconds, connect=min(_CONNECT_SECONDS, seconds))
        late = f"no answer within {seconds:.3g} s"
        try:
            with self._client.stream(method, self.url + path, json=body, timeout=timeout) as response:
                for piece in response.iter_bytes():
                    content += piece
                    if len(content) > MAX_ANSWER_BYTES:
                        raise TryAgain(f"an answer of more than {MAX_ANSWER_BYTES // 2**20} MiB")
                    # httpx's timeout is for a single read, which a slow trickle of bytes never reaches.
                    if time.monotonic() > deadline:
                        raise TryAgain(late, is_lost=True)
                return response.status_code, response.headers, bytes(content)
        except httpx.TimeoutException:
            raise TryAgain(late, is_lost=True) from None
        except httpx.HTTPError as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise TryAgain(f"no connection: {reason}", is_lost=True) from None

    def _quoted(self, content: bytes) -> str:
        quote = self._quote(content)
        return f": {quote}" if quote else ""

    def _quote(self, content: bytes) -> str:
        """Returns an endpoint's error message, short, printable and without the key."""
        if kind := name_stand_in(content[:STAND_IN_BYTES]):
            return kind
        answer = parse_object(content) or {}
        error = answer.get("error", answer.get("message", answer.get("detail")))
        text = error.get("message") if isinstance(error, dict) else error
        text = " ".join((text if isinstance(text, str) else content[:1000].decode(errors="replace")).split())
        text = "".join(letter for letter in text if letter.isprintable())
        text = text.replace(self._key, "***") if self._key else text
        return text[:_MAX_QUOTED]

    @property
    def _at(self) -> str:
        return f"endpoint={self.url}"


def _check_url(url: str) -> str:
    """Checks an address; returns it without a trailing slash or /chat/completions."""
    try:
        parts = urlsplit(url)
        is_one = parts.scheme in ("http", "https") and bool(parts.hostname) and url.isprintable() and " " not in url
        # `parts.port` raises if the port is invalid.
        is_one = is_one and parts.port != 0 and not (parts.query or parts.fragment or parts.username)
    except ValueError:
        is_one = False
    if not is_one:
        raise ConfigError(f"endpoint={url} is not an address: use one like http://localhost:8000/v1, or local.")
    return url.rstrip("/").removesuffix("/chat/completions")


def _is_this_machine(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _as_message(turn: Turn) -> dict[str, Any]:
    if not turn.images:
        return {"role": turn.role, "content": turn.text}
    urls = (f"data:image/jpeg;base64,{base64.b64encode(image).decode()}" for image in turn.images)
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": turn.role, "content": [*images, {"type": "text", "text": turn.text}]}


def _read_answer(content: bytes) -> Answer:
    answer = parse_object(content)
    if answer is None:
        raise TryAgain(f"the answer is {_kind(content)}")
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None
    message = choice.get("message") if choice else None
    if choice is None or not isinstance(message, dict):
        error = answer.get("error")
        said = error.get("message") if isinstance(error, dict) else error
        raise TryAgain(f"the answer has no text{f' ({str(said)[:_MAX_QUOTED]})' if said else ''}")
    usage = answer.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    text, reason = message.get("content"), choice.get("finish_reason")
    if isinstance(text, list):
        text = "".join(part["text"] for part in text if isinstance(part, dict) and isinstance(part.get("text"), str))
    refusal = message.get("refusal")
    if (isinstance(refusal, str) and refusal) or reason == "content_filter":
        raise TryAgain("the model refused to describe it")
    numbers = [counts.get(name) for name in ("prompt_tokens", "completion_tokens")]
    tokens = [number if isinstance(number, int) and number > 0 else 0 for number in numbers]
    return Answer(text if isinstance(text, str) else "", *tokens, is_cut_off=reason == "length")


def _model_names(content: bytes) -> list[str] | None:
    """Returns the models in a listing; None if the content is not a listing."""
    models = (parse_object(content) or {}).get("data")
    if not isinstance(models, list):
        return None
    return [str(model["id"]) for model in models if isinstance(model, dict) and "id" in model]


def _kind(content: bytes) -> str:
    return name_stand_in(content[:STAND_IN_BYTES]) or ("nothing" if not content.strip() else "not the JSON of a chat")


def _wait_seconds(headers: Any) -> float | None:
    """Returns the seconds in Retry-After, a number or a date; a date is compared with the server's clock.

    Source: RFC 9110 section 10.2.3.
    """
    text = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d+)?", text):
        return float(text)
    try:
        wait = parsedate_to_datetime(text) - parsedate_to_datetime(headers.get("date", ""))
        return max(wait.total_seconds(), 0.0)
    except (ValueError, TypeError):
        return None
