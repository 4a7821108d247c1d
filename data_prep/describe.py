"""`mochi-tune describe`: writes captions of the clips that have none, by a model that sees pictures.

It may be run again at any time: a clip with a caption is left alone, and no file is ever replaced.
"""

import contextlib
import os
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from mochi_tune.data_prep.caption_tables import CAPTION_LISTS, VIDEO_LISTS
from mochi_tune.data_prep.captioning import LostClip, Stopped, Wording, Writer
from mochi_tune.data_prep.captions import CaptionRules, load_captions
from mochi_tune.data_prep.clips import Cut
from mochi_tune.data_prep.decoder import ClipDecoder
from mochi_tune.data_prep.describe_tally import Prices, Result, Tally, open_log
from mochi_tune.data_prep.finding import find_videos, list_videos
from mochi_tune.data_prep.inspection import as_jpeg
from mochi_tune.errors import ConfigError, DataError, counted, printable
from mochi_tune.files import make_writable_folder, write_new
from mochi_tune.models.latents import FPS

LOG_NAME = "describe.jsonl"
# For a damaged file on which the decoder hangs.
DECODE_SECONDS = 120.0
# After so many clips in a row without any answer, the endpoint is taken to be gone.
MAX_LOST = 10


@dataclass(frozen=True)
class FoundClips:
    """The clips of a folder.

    Attributes:
        folder: that was looked through.
        without: clips that are to be described, in order.
        num_with: clips that have a caption.
        refused: why a clip gets none, by its name.
        notes: lines for the user.
    """

    folder: Path
    without: list[Path]
    num_with: int
    refused: dict[str, str]
    notes: list[str]

    def name(self, clip: Path) -> str:
        """Returns a clip's path in the folder; bytes that are not UTF-8 are escaped."""
        return clip.relative_to(self.folder).as_posix().encode(errors="backslashreplace").decode()


@dataclass(frozen=True)
class Sampling:
    """Which pictures of a clip are sent: how many, evenly spaced, and the most pixels of their longer side."""

    num_frames: int = 8
    image_size: int = 512


def find_clips(folder: Path, with_stills: bool) -> FoundClips:
    """Finds the clips that have no caption in a text file or a table, as `prepare` reads them.

    Raises:
        DataError: the folder is not there or holds no clip; a table cannot be read.
    """
    clips = find_videos(folder, with_stills, "videos", "stills=true")
    found = load_captions(folder, clips, CaptionRules())
    result, targets = FoundClips(folder, [], len(found.texts), {}, list(found.notes)), set()
    if not with_stills:
        everything = list_videos(folder, with_stills=True)
        if len(everything) > len(clips):
            result.notes.append(f"{len(everything) - len(clips)} stills are not described: stills=true describes them")
    for clip in clips:
        if clip in found.texts:
            continue
        target, name = caption_path(clip), result.name(clip)
        if name != clip.relative_to(folder).as_posix():
            result.refused[name] = f"{name}: its name is not valid UTF-8: rename it."
        elif clip in found.refused:
            result.refused[name] = found.refused[clip]
        elif os.path.lexists(target):
            result.refused[name] = f"{target}: is there and holds no caption: write it, or remove the file."
        elif lists := _lists_beside(target, targets):
            result.refused[name] = f"{clip}: {target.name} beside {lists} would be read as a list of clips: rename it."
        elif target in targets:
            # A video and a still of one name share the caption.
            result.notes.append(f"{name} gets the caption of the other clip of that name")
        else:
            targets.add(target)
            result.without.append(clip)
    return result


def caption_path(clip: Path) -> Path:
    """Returns the file that a clip's caption is written to."""
    return clip.with_suffix(".txt")


def _lists_beside(target: Path, targets: set[Path]) -> str:
    """Returns the file that would make a list of clips and one of captions out of a caption's file, or ""."""
    lists = CAPTION_LISTS if target.name in VIDEO_LISTS else VIDEO_LISTS if target.name in CAPTION_LISTS else ()
    others = (target.with_name(name) for name in lists)
    return next((other.name for other in others if other in targets or other.exists()), "")


def sample_frames(decoder: ClipDecoder, clip: Path, sampling: Sampling) -> tuple[list[bytes], float]:
    """Returns frames of a clip as a viewer sees it, evenly spaced, as JPEG, and the clip's seconds.

    Raises:
        DataError: it cannot be decoded.
    """
    if not clip.is_file():
        # Opening a pipe would wait for its other end.
        raise DataError(f"{clip}: is no file: remove it.")
    scan = decoder.scan(clip)
    count, share = min(sampling.num_frames, scan.num_frames), min(sampling.image_size / max(scan.width, scan.height), 1)
    height, width = (max(round(side * share), 1) for side in (scan.height, scan.width))
    # The middles of equal parts, as the ends of a clip are often those of a fade.
    starts = [(2 * number + 1) * scan.num_frames // (2 * count) for number in range(count)]
    cuts = [Cut(1, height, width, start, allow_upscale=True, hdr="tonemap") for start in starts]
    images = []
    for _, _, decoded in decoder.cut_all([(clip, cuts)]):
        if isinstance(decoded, DataError):
            raise decoded
        images.append(as_jpeg(decoded.frames[0], sampling.image_size))
    return images, scan.num_frames / FPS if not scan.is_still else 0.0


def describe(
    clips: FoundClips, writer: Writer, sampling: Sampling, num_workers: int, log: Path, prices: Prices | None
) -> int:
    """Describes the clips that have no caption, several at a time.

    Args:
        clips: of `find_clips`.
        writer: of the captions; its captioner was checked.
        sampling: which pictures it sees.
        num_workers: clips that are in work at a time.
        log: file that gets a line of JSON more for each clip.
        prices: of tokens; None: not told.

    Returns:
        The exit code: 0, or 1 where clips are left without a caption.

    Raises:
        ConfigError: the endpoint refuses every request, or is gone; what is done is kept.
        DataError: another process describes these clips.
        OSError: a file cannot be written.
    """
    folders = sorted({clip.parent for clip in clips.without})
    for folder in folders:
        make_writable_folder(folder)
    with open_log(log) as write_row:
        for folder in folders:
            # Of a process that was killed while it wrote a caption.
            for leftover in folder.glob(".write_new.*.tmp"):
                leftover.unlink(missing_ok=True)
        for name, reason in clips.refused.items():
            tqdm.write(printable(f"no caption: {reason}"))
            write_row({"clip": name, "status": "refused", "error": reason})
        tally = Tally(len(clips.without), prices)
        try:
            with contextlib.closing(_run(clips.without, writer, sampling, num_workers)) as results:
                for result in results:
                    _keep(result)
                    write_row(result.row(clips.name(result.clip)))
                    for note in [result.error, *result.notes]:
                        if note:
                            tally.say(note if note.startswith(f"{result.clip}:") else f"{result.clip}: {note}")
                    tally.add(result)
        finally:
            # Also of a run that was interrupted, whose captions stay.
            tally.close()
            tqdm.write(
                f"{clips.folder}: {tally.summary(clips.num_with, len(clips.refused))}. Each clip is a line of {log}"
            )
    return 1 if tally.num_failed or clips.refused else 0


def plan(clips: FoundClips, wording: Wording, sampling: Sampling, frames_to: Path | None) -> list[str]:
    """Returns lines about what `describe` would do; asks nobody.

    Args:
        clips: of `find_clips`.
        wording: of the prompt.
        sampling: of the pictures.
        frames_to: folder for the pictures of the first clip; None: they are counted only.

    Raises:
        DataError: the first clip cannot be decoded.
    """
    lines = [f"no caption: {reason}" for reason in clips.refused.values()]
    counts = f"{counted(len(clips.without), 'clip')} to describe, with a caption: {clips.num_with}"
    if not clips.without:
        return [*lines, counts]
    clip = clips.without[0]
    with ClipDecoder(DECODE_SECONDS) as decoder:
        images, seconds = sample_frames(decoder, clip, sampling)
    if frames_to is not None:
        frames_to.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images, start=1):
            write_new(frames_to / f"{clip.stem}_{number:02}.jpg", image)
        lines.append(f"{frames_to}: {len(images)} pictures of {clips.name(clip)}")
    size = sum(map(len, images)) / 1024
    lines.append(f"the prompt for {clips.name(clip)}, with {len(images)} pictures of {size:.0f} KiB in all:")
    lines += ["", *wording.prompt(len(images), seconds).splitlines(), ""]
    requests = counted(len(clips.without), "request")
    return [*lines, f"{counts}; {requests}, and more for retries and captions that are too long"]


def _keep(result: Result) -> None:
    """Writes a caption beside its clip, unless there is one by now."""
    if result.error:
        return
    target = caption_path(result.clip)
    try:
        write_new(target, f"{result.caption}\n".encode())
    except FileExistsError:
        result.error = f"{target}: was written by another program in the meantime, and stays as it is."


def _run(clips: Sequence[Path], writer: Writer, sampling: Sampling, num_workers: int) -> Generator[Result, None, None]:
    """Yields the result of each clip as it comes; ends the workers when it is closed."""
    todo: queue.SimpleQueue[Path] = queue.SimpleQueue()
    done: queue.SimpleQueue[Result | BaseException] = queue.SimpleQueue()
    for clip in clips:
        todo.put(clip)
    decoder, lock, num_lost = ClipDecoder(DECODE_SECONDS), threading.Lock(), 0

    def work() -> None:
        with contextlib.suppress(queue.Empty, Stopped):
            while True:
                clip = todo.get_nowait()
                try:
                    done.put(_describe_clip(clip, writer, sampling, decoder, lock))
                except Stopped:
                    raise
                except BaseException as error:  # noqa: BLE001  (raised again in the main thread)
                    done.put(error)
                    return

    # Daemons, as a request that hangs must not keep a process that was interrupted.
    for _ in range(min(num_workers, len(clips))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in clips:
            result = done.get()
            if isinstance(result, BaseException):
                writer.pace.stop()
                yield from _finished(done)
                raise result
            num_lost = num_lost + 1 if result.is_lost else 0
            yield result
            if num_lost >= MAX_LOST:
                raise ConfigError(
                    f"the endpoint gave no answer for {num_lost} clips in a row, the last time: {result.error}: the "
                    "same command goes on when it works again."
                )
    finally:
        writer.pace.stop()
        decoder.close()


def _finished(done: "queue.SimpleQueue[Result | BaseException]") -> Iterator[Result]:
    """Yields what other workers have finished by now, which was paid for."""
    with contextlib.suppress(queue.Empty):
        while True:
            result = done.get_nowait()
            if isinstance(result, Result):
                yield result


def _describe_clip(
    clip: Path, writer: Writer, sampling: Sampling, decoder: ClipDecoder, lock: threading.Lock
) -> Result:
    result = Result(clip)
    try:
        # One child decodes for all, as it is seldom what the others wait for.
        with lock:
            # Not after the end, when nobody would end the decoder that this starts.
            writer.pace.sleep(0)
            images, seconds = sample_frames(decoder, clip, sampling)
        result.caption, result.notes = writer.write(images, seconds, result.cost)
    except DataError as error:
        result.error, result.is_lost = str(error), isinstance(error, LostClip)
    return result
