"""Gets a caption from a model: the prompt, retries, checks, and shortening of captions that are too long."""

import random
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from mochi_tune.data_prep.answers import CaptionLength, Language, clean_answer, find_fault
from mochi_tune.data_prep.chat import Answer, Captioner, TryAgain, Turn
from mochi_tune.errors import DataError

# Words that the prompt asks for. Models may write half as much again, which is then shortened.
_PROMPT_WORDS = 150
_PROMPT = """\
These pictures are {num_frames} frames of one video clip of {seconds} seconds, in order. Write the caption of the clip \
from which a text-to-video model learns. Say what the main subject is and what it looks like; then what moves, how and \
where to, from the beginning of the clip to its end; then what surrounds it; then where the camera is and how it \
moves, or that it stays still; and last the light, the colours and the style. """
_PROMPT_OF_STILL = """\
Write the caption of this picture from which a text-to-video model learns. Say what the main subject is and what it \
looks like; then what surrounds it; then where the camera is; and last the light, the colours and the style. """
_FORM = """\
Write one paragraph of plain English prose, at most {max_words} words, in the present tense. Describe only what can be \
seen. Do not mention frames, pictures or a video, do not guess names, and answer with the paragraph alone."""
_SHORTEN = "Shorten this caption to at most {words} words. Keep the subject, the motion, the camera and the light, and \
drop details. Answer with the shorter paragraph alone."
_AGAIN = "\n\nAn earlier answer was of no use: it {fault}. Answer with the caption alone."
# Maximum number of requests to shorten a caption; then it is cut.
_MAX_SHORTENINGS = 2
# Maximum pause between two tries of a clip, unless the endpoint asks for a longer one.
_MAX_PAUSE_SECONDS = 60.0


class Stopped(Exception):
    """Raised instead of a wait or a request after the run was stopped."""


class LostClip(DataError):
    """A clip for which the endpoint returned no answer at all."""


@dataclass(frozen=True)
class Wording:
    """The prompt and the required form of captions.

    Attributes:
        template: of the prompt, with the placeholders {num_frames}, {seconds}, {max_words} and {trigger}; "" is the
            default prompt.
        trigger: a word that every caption contains; "" for none.
        language: that answers are checked for.
    """

    template: str = ""
    trigger: str = ""
    language: Language = "en"

    def prompt(self, num_frames: int, seconds: float) -> str:
        """Returns the prompt for a clip."""
        values = {
            "num_frames": str(num_frames),
            "seconds": f"{seconds:.1f}",
            "max_words": str(_PROMPT_WORDS),
            "trigger": self.trigger,
        }
        text = self.template or (_PROMPT_OF_STILL if num_frames == 1 else _PROMPT) + _FORM
        for name, value in values.items():
            text = text.replace(f"{{{name}}}", value)
        return text.strip()

    def with_trigger(self, caption: str) -> str:
        """Puts the trigger first, unless the caption starts with it or contains it because the template asks for it."""
        # As a whole word: "Red" does not match "Redwoods".
        word = rf"(?<!\w){re.escape(self.trigger)}(?!\w)"
        if not self.trigger or ("{trigger}" in self.template and re.search(word, caption, re.IGNORECASE)):
            return caption
        return caption if re.match(word, caption) else f"{self.trigger}, {caption}"


@dataclass
class Cost:
    """The cost of a clip so far; `seconds` are those of its requests and of the pauses between its tries."""

    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class RetryLimits:
    """How long and how often a clip is tried.

    Attributes:
        retries: maximum number of retries of a clip, for any failure.
        timeout_seconds: maximum time of one request.
        clip_seconds: maximum time of all requests and pauses of a clip.
        backoff_seconds: pause before the first retry; doubled before each further one.
    """

    retries: int = 4
    timeout_seconds: float = 120.0
    clip_seconds: float = 600.0
    backoff_seconds: float = 1.0


class Pace:
    """Limits the rate of requests of all threads, by a monotonic clock.

    Args:
        requests_per_minute: maximum rate; 0 for no limit.
    """

    def __init__(self, requests_per_minute: float = 0) -> None:
        self._gap = 60 / requests_per_minute if requests_per_minute else 0.0
        self._next = time.monotonic()
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def wait(self) -> None:
        """Waits for this thread's turn."""
        while True:
            with self._lock:
                now = time.monotonic()
                if now >= self._next:
                    self._next = now + self._gap
                    delay = 0.0
                else:
                    # No fixed place in a queue: `hold` may delay all threads.
                    delay = self._next - now
            self.sleep(delay)
            if not delay:
                return

    def hold(self, seconds: float) -> None:
        """Delays all new requests by at least `seconds`."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

    def sleep(self, seconds: float) -> None:
        """Waits.

        Raises:
            Stopped: the run was stopped.
        """
        if self._stop.wait(seconds) if seconds > 0 else self._stop.is_set():
            raise Stopped

    def stop(self) -> None:
        """Ends all waits of all threads with `Stopped`."""
        self._stop.set()


@dataclass(frozen=True)
class Writer:
    """Writes captions with a model; any number of threads may use it.

    Attributes:
        captioner: the model.
        wording: of the prompt and the captions.
        limits: of each clip.
        pace: of all requests.
        length: limit of captions.
    """

    captioner: Captioner
    wording: Wording
    limits: RetryLimits
    pace: Pace
    length: CaptionLength
    # Tokenizers are not thread-safe.
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def write(self, images: Sequence[bytes], seconds: float, cost: Cost) -> tuple[str, list[str]]:
        """Writes the caption of a clip; returns it with notes for the user, such as how it was shortened.

        Args:
            images: JPEG of its frames, in order.
            seconds: length of the clip.
            cost: updated in place, also if there is no caption.

        Raises:
            DataError: no caption within the limits; LostClip if the last try returned no answer at all.
            ConfigError: the endpoint refuses every request.
            Stopped: the run was stopped.
        """
        prompt, hint = self.wording.prompt(len(images), seconds), ""
        while True:
            turns = [Turn("user", prompt + hint, tuple(images))]
            answer = self._ask(turns, cost)
            text = clean_answer(answer.text)
            fault = find_fault(text, self.wording.language)
            if answer.is_cut_off and (fault or len(text.split()) < _PROMPT_WORDS // 2):
                fault = "ends before a caption is complete: raise max_tokens="
            if not fault:
                return self._fit(turns, text, answer.is_cut_off, cost)
            hint = _AGAIN.format(fault=fault.partition(":")[0])
            self._pause(TryAgain(f"the answer {fault}", after_seconds=0), cost)

    def _fit(self, turns: list[Turn], text: str, is_cut_off: bool, cost: Cost) -> tuple[str, list[str]]:
        """Shortens a caption by asking again, and cuts it if that does not help."""
        notes: list[str] = []
        for _ in range(_MAX_SHORTENINGS):
            caption = self.wording.with_trigger(text)
            with self._lock:
                if self.length.fits(caption) and not is_cut_off:
                    return caption, notes
                words = min(self.length.words_to_ask_for(caption), _PROMPT_WORDS)
            turns = [*turns, Turn("assistant", text), Turn("user", _SHORTEN.format(words=words))]
            try:
                answer = self._ask(turns, cost)
            except LostClip:
                raise
            except DataError:
                # The longer conversation may not fit the model's context.
                break
            shorter = clean_answer(answer.text)
            if not find_fault(shorter, self.wording.language) and not answer.is_cut_off:
                notes = [f"shortened from {len(text.split())} to {len(shorter.split())} words by asking again"]
                text, is_cut_off = shorter, False
        caption = self.wording.with_trigger(text)
        with self._lock:
            if self.length.fits(caption) and not is_cut_off:
                return caption, notes
            why = "the model had no tokens left" if is_cut_off else f"it had {self.length.describe(caption)}"
            return self.length.cut(caption), [f"cut at a sentence, as {why}"]

    def _ask(self, turns: Sequence[Turn], cost: Cost) -> Answer:
        """Repeats a request until it succeeds or the clip's limits are reached."""
        while True:
            self.pace.wait()
            left = self.limits.clip_seconds - cost.seconds
            started, failure = time.monotonic(), None
            try:
                answer = self.captioner.ask(turns, min(self.limits.timeout_seconds, max(left, 0.1)))
                cost.prompt_tokens += answer.prompt_tokens
                cost.completion_tokens += answer.completion_tokens
                return answer
            except TryAgain as error:
                failure = error
            finally:
                cost.requests += 1
                cost.seconds += time.monotonic() - started
            self._pause(failure, cost)

    def _pause(self, failure: TryAgain, cost: Cost) -> None:
        """Waits before a retry; raises DataError if the clip's limits are reached."""
        limits, error = self.limits, LostClip if failure.is_lost else DataError
        if cost.retries >= limits.retries:
            raise error(f"no caption after {cost.requests} requests: {failure}")
        delay = failure.after_seconds
        if delay is None:
            delay = min(limits.backoff_seconds * 2**cost.retries, _MAX_PAUSE_SECONDS)
            # Jitter: threads that failed together must not retry together.
            delay *= random.uniform(0.5, 1)
        if cost.seconds + delay >= limits.clip_seconds:
            wait = f", and the endpoint asks for {delay:.0f} s more" if failure.after_seconds else ""
            raise error(f"no caption within clip_seconds={limits.clip_seconds:g}: {failure}{wait}")
        cost.retries += 1
        cost.seconds += delay
        if failure.is_throttled:
            self.pace.hold(delay)
        self.pace.sleep(delay)
