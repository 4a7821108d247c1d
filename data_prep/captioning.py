"""Gets one caption out of a model: the prompt, the retries, the checks, and the shortening of what is too long."""

import random
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from mochi_tune.data_prep.answers import CaptionLength, Language, clean_answer, find_fault
from mochi_tune.data_prep.chat import Answer, Captioner, TryAgain, Turn
from mochi_tune.errors import DataError

# A model that is asked for it may still write half as much again, which is then shortened.
PROMPT_WORDS = 150
PROMPT = """\
These pictures are {num_frames} frames of one video clip of {seconds} seconds, in order. Write the caption of the clip \
from which a text-to-video model learns. Say what the main subject is and what it looks like; then what moves, how and \
where to, from the beginning of the clip to its end; then what surrounds it; then where the camera is and how it \
moves, or that it stays still; and last the light, the colours and the style. """
PROMPT_OF_STILL = """\
Write the caption of this picture from which a text-to-video model learns. Say what the main subject is and what it \
looks like; then what surrounds it; then where the camera is; and last the light, the colours and the style. """
FORM = """\
Write one paragraph of plain English prose, at most {max_words} words, in the present tense. Describe only what can be \
seen. Do not mention frames, pictures or a video, do not guess names, and answer with the paragraph alone."""
SHORTEN = "Shorten this caption to at most {words} words. Keep the subject, the motion, the camera and the light, and \
drop details. Answer with the shorter paragraph alone."
AGAIN = "\n\nAn earlier answer was of no use: it {fault}. Answer with the caption alone."
# A caption that is still too long after these is cut.
MAX_SHORTENINGS = 2
# The longest pause between two tries of a clip where the endpoint does not ask for one.
MAX_PAUSE_SECONDS = 60.0


class Stopped(Exception):
    """Raised in place of a wait or a request after the run was ended."""


class LostClip(DataError):
    """A clip of which the endpoint gave no answer at all."""


@dataclass(frozen=True)
class Wording:
    """What is asked for.

    Attributes:
        template: of the prompt; {num_frames}, {seconds}, {max_words} and {trigger} in it are replaced; "": our own.
        trigger: a word that every caption gets; "": none.
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
            "max_words": str(PROMPT_WORDS),
            "trigger": self.trigger,
        }
        text = self.template or (PROMPT_OF_STILL if num_frames == 1 else PROMPT) + FORM
        for name, value in values.items():
            text = text.replace(f"{{{name}}}", value)
        return text.strip()

    def with_trigger(self, caption: str) -> str:
        """Puts the trigger first, unless the caption has it already where the template asked for it."""
        # As a word of its own: "Red" does not begin "Redwoods".
        word = rf"(?<!\w){re.escape(self.trigger)}(?!\w)"
        if not self.trigger or ("{trigger}" in self.template and re.search(word, caption, re.IGNORECASE)):
            return caption
        return caption if re.match(word, caption) else f"{self.trigger}, {caption}"


@dataclass
class Cost:
    """What a clip has cost so far; `seconds` are those of its requests and of the pauses between its tries."""

    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class RetryLimits:
    """How long and how often a clip is tried.

    Attributes:
        retries: after the first request, whatever fails.
        timeout_seconds: of one request.
        clip_seconds: of all requests and pauses of a clip.
        backoff_seconds: before the first retry; twice as much before each further one.
    """

    retries: int = 4
    timeout_seconds: float = 120.0
    clip_seconds: float = 600.0
    backoff_seconds: float = 1.0


class Pace:
    """Lets requests of many threads begin no faster than allowed, by a clock that does not jump.

    Args:
        requests_per_minute: 0: as fast as they come.
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
                    # Not one's own place in a queue: a hold may come and move all of them.
                    delay = self._next - now
            self.sleep(delay)
            if not delay:
                return

    def hold(self, seconds: float) -> None:
        """Lets no request begin for so long."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

    def sleep(self, seconds: float) -> None:
        """Waits, unless the run is ended, which raises Stopped."""
        if self._stop.wait(seconds) if seconds > 0 else self._stop.is_set():
            raise Stopped

    def stop(self) -> None:
        """Ends all waits."""
        self._stop.set()


@dataclass(frozen=True)
class Writer:
    """Writes captions with a model; any number of threads may use it.

    Attributes:
        captioner: the model.
        wording: what is asked for.
        limits: of each clip.
        pace: of all requests.
        length: what a caption must fit into.
    """

    captioner: Captioner
    wording: Wording
    limits: RetryLimits
    pace: Pace
    length: CaptionLength
    # A tokenizer is no tool for many threads.
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def write(self, images: Sequence[bytes], seconds: float, cost: Cost) -> tuple[str, list[str]]:
        """Returns the caption of a clip, and what a user should know of how it came about.

        Args:
            images: JPEG of its frames, in order.
            seconds: of the clip.
            cost: is added to, also where no caption comes out.

        Raises:
            DataError: no caption within the limits; LostClip where the last try brought no answer at all.
            ConfigError: the endpoint refuses whatever it is asked.
            Stopped: the run was ended.
        """
        prompt, hint = self.wording.prompt(len(images), seconds), ""
        while True:
            turns = [Turn("user", prompt + hint, tuple(images))]
            answer = self._ask(turns, cost)
            text = clean_answer(answer.text)
            fault = find_fault(text, self.wording.language)
            if answer.is_cut_off and (fault or len(text.split()) < PROMPT_WORDS // 2):
                fault = "ends before a caption is complete: raise max_tokens="
            if not fault:
                return self._fit(turns, text, answer.is_cut_off, cost)
            hint = AGAIN.format(fault=fault.partition(":")[0])
            self._pause(TryAgain(f"the answer {fault}", after_seconds=0), cost)

    def _fit(self, turns: list[Turn], text: str, is_cut_off: bool, cost: Cost) -> tuple[str, list[str]]:
        """Shortens a caption by asking again, and cuts it where that does not help."""
        notes: list[str] = []
        for _ in range(MAX_SHORTENINGS):
            caption = self.wording.with_trigger(text)
            with self._lock:
                if self.length.fits(caption) and not is_cut_off:
                    return caption, notes
                words = min(self.length.words_to_ask_for(caption), PROMPT_WORDS)
            turns = [*turns, Turn("assistant", text), Turn("user", SHORTEN.format(words=words))]
            try:
                answer = self._ask(turns, cost)
            except LostClip:
                raise
            except DataError:
                # The longer conversation is refused, as more than the model takes.
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
        """Asks until an answer comes."""
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
        """Waits before a retry; raises DataError where a clip has none left."""
        limits, error = self.limits, LostClip if failure.is_lost else DataError
        if cost.retries >= limits.retries:
            raise error(f"no caption after {cost.requests} requests: {failure}")
        delay = failure.after_seconds
        if delay is None:
            delay = min(limits.backoff_seconds * 2**cost.retries, MAX_PAUSE_SECONDS)
            # So that threads that failed together do not come back together.
            delay *= random.uniform(0.5, 1)
        if cost.seconds + delay >= limits.clip_seconds:
            wait = f", and the endpoint asks for {delay:.0f} s more" if failure.after_seconds else ""
            raise error(f"no caption within clip_seconds={limits.clip_seconds:g}: {failure}{wait}")
        cost.retries += 1
        cost.seconds += delay
        if failure.is_throttled:
            self.pace.hold(delay)
        self.pace.sleep(delay)
