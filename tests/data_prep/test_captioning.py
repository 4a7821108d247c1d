import re
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from helpers_chat import CAPTION, ChatServer, Reply
from helpers_prepare import TINY

from mochi_tune.data_prep.answers import CaptionLength
from mochi_tune.data_prep.captioning import Cost, LostClip, Pace, RetryLimits, Stopped, Wording, Writer
from mochi_tune.data_prep.describe_tally import Result, Tally
from mochi_tune.data_prep.endpoint import Endpoint
from mochi_tune.errors import ConfigError, DataError
from mochi_tune.models.text_encoder import load_tokenizer

QUICK = RetryLimits(retries=3, timeout_seconds=5, clip_seconds=20, backoff_seconds=0.01)
LONG = " ".join(f"The ball{number} rolls over the table{number} slowly." for number in range(80))
SAD = Reply({"error": {"message": "out of order"}}, 500)


@contextmanager
def writing(answer, wording=Wording(), limits=QUICK, pace=None, tokenizer=None):  # noqa: B008  (it is frozen)
    """Yields a server, and a function that writes a caption with it and returns caption, notes and cost."""
    with ChatServer(answer) as server:
        endpoint = Endpoint(server.url, "seer", "", 300)
        writer = Writer(endpoint, wording, limits, pace or Pace(), CaptionLength(tokenizer))

        def write(cost=None):
            cost = cost or Cost()
            return *writer.write([b"picture", b"another"], 2.5, cost), cost

        yield server, write
        endpoint.close()


def script(*replies):
    """Returns the answers of a list in order, and then a caption."""
    return lambda request, number: replies[number] if number < len(replies) else Reply()


def test_a_caption_comes_with_its_cost():
    with writing(script()) as (server, write):
        caption, notes, cost = write()
    assert (caption, notes) == (CAPTION, [])
    assert (cost.requests, cost.retries, cost.prompt_tokens, cost.completion_tokens) == (1, 0, 1000, 50)
    (prompt,) = server.chats[0].texts
    assert "2 frames of one video clip of 2.5 seconds" in prompt and "at most 150 words" in prompt
    assert "{" not in prompt and "{" not in Wording().prompt(1, 0) and "frames of" not in Wording().prompt(1, 0)


@pytest.mark.parametrize(
    "bad",
    [
        SAD,
        Reply({}, 503),
        Reply({}, 408),
        Reply(hangs_up=True),
        Reply(b"<html>Sign in</html>"),
        Reply(b"x" * (10 * 2**20)),
        Reply(""),
        Reply("I'm sorry, I can't help with that."),
        Reply("一个红色的小球在灰色的桌子上从左向右缓慢滚动。"),
        Reply("no " * 100),
        Reply("<think>Let me see", finish_reason="length"),
    ],
)
def test_what_fails_once_is_asked_again(bad):
    with writing(script(bad)) as (server, write):
        caption, _, cost = write()
    assert caption == CAPTION and (cost.requests, cost.retries, len(server.chats)) == (2, 1, 2)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (SAD, "no caption after 4 requests: 500: out of order"),
        (Reply(""), "no caption after 4 requests: the answer is empty"),
        (Reply("- one\n- two"), "no caption after 4 requests: the answer is a list"),
        (Reply("", finish_reason="length"), "ends before a caption is complete: raise max_tokens="),
    ],
)
def test_what_always_fails_costs_the_retries_and_then_the_clip(bad, reason):
    cost = Cost()
    with writing(lambda request, number: bad) as (_, write), pytest.raises(DataError, match=reason):
        write(cost)
    assert (cost.requests, cost.retries) == (4, 3)


def test_an_answer_of_no_use_is_told_to_the_model():
    with writing(script(Reply("一个红色的小球在桌子上滚动。"), Reply("- a\n- b"))) as (server, write):
        assert write()[0] == CAPTION
    assert server.chats[1].texts[0].endswith("it is not English. Answer with the caption alone.")
    assert server.chats[2].texts[0].endswith("it is a list. Answer with the caption alone.")


def test_what_is_refused_for_good_is_not_asked_again():
    for status, error in ((400, DataError), (404, ConfigError)):
        with writing(lambda request, number, status=status: Reply({}, status)) as (server, write):
            with pytest.raises(error):
                write()
            assert len(server.chats) == 1


def test_a_server_that_stalls_costs_its_time_and_no_more():
    limits = RetryLimits(retries=9, timeout_seconds=0.2, clip_seconds=0.5, backoff_seconds=0.01)
    with (
        writing(lambda request, number: Reply(wait_seconds=1.5), limits=limits) as (server, write),
        pytest.raises(LostClip, match=r"no caption within clip_seconds=0.5: no answer within 0.\d+ s"),
    ):
        write()
    assert 2 <= len(server.chats) <= 4


def test_the_server_is_left_alone_for_as_long_as_it_asks():
    with writing(script(Reply({}, 429, {"Retry-After": "1"}))) as (server, write):
        write()
    assert server.chats[1].time - server.chats[0].time >= 1
    with (
        writing(script(Reply({}, 429, {"Retry-After": "3600"}))) as (_, write),
        pytest.raises(DataError, match=r"within clip_seconds=20: 429: {}, and the endpoint asks for 3600 s more"),
    ):
        write()


def test_pauses_become_longer():
    limits = RetryLimits(retries=4, timeout_seconds=5, clip_seconds=20, backoff_seconds=0.05)
    with writing(script(SAD, SAD, SAD), limits=limits) as (server, write):
        write()
    times = [chat.time for chat in server.chats]
    # A pause is between half and all of its nominal length, and requests take time too.
    assert all(later - earlier >= 0.025 * 2**i for i, (earlier, later) in enumerate(pairwise(times)))


def test_requests_of_all_threads_keep_the_pace():
    pace, limits = Pace(requests_per_minute=1200), QUICK
    with writing(script(), limits=limits, pace=pace) as (server, write):
        threads = [threading.Thread(target=write) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    times = sorted(chat.time for chat in server.chats)
    # 6 requests have 5 gaps of 0.05 s; the first may take longer to arrive than the last.
    assert len(times) == 6 and times[-1] - times[0] >= 4 * 0.05


def test_one_that_is_throttled_holds_all():
    pace = Pace()
    # The one that is throttled does not pause: only the hold on all requests makes it wait.
    pace.sleep = lambda seconds: time.sleep(min(seconds, 0.01))
    with writing(script(Reply({}, 429, {"Retry-After": "0.3"})), pace=pace) as (server, write):
        write()
    assert server.chats[1].time - server.chats[0].time >= 0.3


def test_the_end_of_the_run_ends_the_waits():
    pace = Pace(requests_per_minute=0.01)
    pace.wait()
    threading.Timer(0.1, pace.stop).start()
    with pytest.raises(Stopped):
        pace.wait()


def test_a_caption_that_is_too_long_is_shortened_by_asking_again():
    tokenizer = load_tokenizer(TINY / "tokenizer")
    with writing(script(Reply(LONG)), Wording(trigger="ohwx"), tokenizer=tokenizer) as (server, write):
        caption, notes, cost = write()
    assert caption == f"ohwx, {CAPTION}" and cost.requests == 2 and cost.retries == 0
    assert notes == ["shortened from 560 to 38 words by asking again"]
    texts = server.chats[1].texts
    assert texts[0] == server.chats[0].texts[0] and texts[1] == LONG and "Shorten this caption to at most" in texts[2]
    assert server.chats[1].body["messages"][0]["content"][0]["type"] == "image_url"


@pytest.mark.parametrize("answer", [Reply(LONG), Reply(""), Reply({}, 413)])
def test_one_that_stays_too_long_is_cut_at_a_sentence_and_told(answer):
    with writing(script(Reply(LONG), answer, answer), Wording(trigger="ohwx")) as (_, write):
        caption, notes, _ = write()
    assert caption.startswith("ohwx, The ball0 rolls") and caption.endswith(".")
    assert f"ohwx, {LONG}".startswith(caption) and len(caption.split()) <= 160
    assert notes == ["cut at a sentence, as it had 561 words, counted without T5's tokenizer, the maximum is 160"]


def test_one_that_was_cut_off_is_finished_by_asking_again():
    start = " ".join(LONG.split()[:100])
    with writing(script(Reply(start, finish_reason="length"))) as (_, write):
        assert write()[0] == CAPTION
    cut = Reply(start, finish_reason="length")
    with writing(script(cut, cut, cut)) as (_, write):
        caption, notes, _ = write()
    assert start.startswith(caption) and caption.endswith(".")
    assert notes == ["cut at a sentence, as the model had no tokens left"]
    # A few words are no caption, however often the answer is cut off there.
    few = Reply(" ".join(CAPTION.split()[:12]), finish_reason="length")
    with (
        writing(lambda request, number: few, limits=replace(QUICK, retries=1)) as (_, write),
        pytest.raises(DataError, match="ends before a caption is complete: raise max_tokens="),
    ):
        write()


def test_a_trigger_is_put_first_or_woven_in():
    woven = Wording("Describe {trigger}, the ball, in {num_frames} frames. {braces} stay.", "ohwx")
    assert woven.prompt(3, 1) == "Describe ohwx, the ball, in 3 frames. {braces} stay."
    assert woven.with_trigger("A ball named OHWX rolls.") == "A ball named OHWX rolls."
    assert woven.with_trigger("A ball rolls.") == "ohwx, A ball rolls."
    first = Wording(trigger="ohwx")
    assert first.with_trigger("A ball.") == "ohwx, A ball." == first.with_trigger("ohwx, A ball.")
    assert Wording().with_trigger("A ball.") == "A ball."


def test_clocks_that_jump_change_nothing(monkeypatch):
    """Sets the system clock ten years ahead and an hour back, alternately, at every read."""
    true_time, reads = time.time, []

    def jumping() -> float:
        reads.append(None)
        return true_time() + (3.2e8 if len(reads) % 2 else -3600)

    monkeypatch.setattr(time, "time", jumping)
    limits = RetryLimits(retries=3, timeout_seconds=0.3, clip_seconds=20, backoff_seconds=0.05)
    replies = script(Reply(wait_seconds=1), Reply({}, 429, {"Retry-After": "0.2"}))
    started = time.monotonic()
    tally = Tally(2, None)
    with writing(replies, limits=limits, pace=Pace(600)) as (server, write):
        caption, _, cost = write()
    for _ in range(2):
        tally.add(Result(Path("clip.mp4"), caption, cost=cost))
    tally.close()
    # With the system clock, the summary would show hours or a negative time.
    assert reads and re.search(r"; \d+ (s|min), \d+\.\d clips/min", tally.summary(0, 0))
    took = time.monotonic() - started
    assert caption == CAPTION and len(server.chats) == 3 and server.chats[2].time - server.chats[1].time >= 0.2
    # The clip's cost includes the timeout, two pauses and three requests, and is at most the elapsed time.
    assert 0.3 + 0.025 + 0.2 <= cost.seconds <= took


@pytest.mark.parametrize(
    ("trigger", "template", "caption", "expected"),
    [
        ("Red", "", "Redwood trees sway", "Red, Redwood trees sway"),
        ("Red", "", "Red, a ball", "Red, a ball"),
        ("cat", "use {trigger}", "The location changes", "cat, The location changes"),
        ("cat", "use {trigger}", "A Cat sits", "A Cat sits"),
        ("c++", "", "c++ code", "c++ code"),
    ],
)
def test_a_trigger_is_a_word_of_its_own(trigger, template, caption, expected):
    assert Wording(trigger=trigger, template=template).with_trigger(caption) == expected
