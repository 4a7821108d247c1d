"""`mochi-tune describe`: writes captions for clips that have none, with a vision-language model.

It can run again at any time: clips with a caption are skipped, and no file is ever replaced.
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
# Maximum seconds for decoding; the decoder may hang on a damaged file.
_DECODE_SECONDS = 120.0
# Maximum number of consecutive clips without any answer; then the run stops.
_MAX_LOST = 10


@dataclass(frozen=True)
class FoundClips:
    """The clips of a folder.

    Attributes:
        folder: that was searched.
        folders: of all clips.
        without: clips without a caption, to describe, in order.
        num_with: number of clips with a caption.
        refused: why a clip gets none, by its name.
        notes: lines for the user.
    """

    folder: Path
    folders: list[Path]
    without: list[Path]
    num_with: int
    refused: dict[str, str]
    notes: list[str]

    def name(self, clip: Path) -> str:
        """Returns a clip's path in the folder; bytes that are not UTF-8 are escaped."""
        return clip.relative_to(self.folder).as_posix().encode(errors="backslashreplace").decode()


@dataclass(frozen=True)
class Sampling:
    """Pictures of a clip that are sent: their number, evenly spaced, and the maximum pixels of their longer side."""

    num_frames: int = 8
    image_size: int = 512


def find_clips(folder: Path, with_stills: bool) -> FoundClips:
    """Finds the clips without a caption in a text file or a table, as `prepare` reads them.

    Raises:
        DataError: the folder is missing or has no clips, or a table cannot be read.
    """
    clips = find_videos(folder, with_stills, "videos", "stills=true")
    found = load_captions(folder, clips, CaptionRules())
    folders, targets = sorted({clip.parent for clip in clips}), set()
    result = FoundClips(folder, folders, [], len(found.texts), {}, list(found.notes))
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
            result.refused[name] = f"{target}: exists but has no caption: write it, or remove the file."
        elif lists := _lists_beside(target, targets):
            result.refused[name] = f"{clip}: {target.name} next to {lists} would be read as a list of clips: rename it."
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
    """Returns the file with which `target` would be read as a list of clips or captions, or ""."""
    lists = CAPTION_LISTS if target.name in VIDEO_LISTS else VIDEO_LISTS if target.name in CAPTION_LISTS else ()
    others = (target.with_name(name) for name in lists)
    return next((other.name for other in others if other in targets or other.exists()), "")


def sample_frames(decoder: ClipDecoder, clip: Path, sampling: Sampling) -> tuple[list[bytes], float]:
    """Returns evenly spaced frames of a clip as JPEG, as a viewer sees them, and the clip's seconds.

    Raises:
        DataError: the clip cannot be decoded.
    """
    if not clip.is_file():
        # Opening a pipe would block.
        raise DataError(f"{clip}: is not a file: remove it.")
    scan = decoder.scan(clip)
    count, share = min(sampling.num_frames, scan.num_frames), min(sampling.image_size / max(scan.width, scan.height), 1)
    height, width = (max(round(side * share), 1) for side in (scan.height, scan.width))
    # The middles of equal parts, as clips often begin and end with a fade.
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
        clips: result of `find_clips`.
        writer: of the captions; its captioner was checked.
        sampling: of the pictures.
        num_workers: number of clips that are described at a time.
        log: file to append a line of JSON to for each clip.
        prices: of tokens; None if unknown.

    Returns:
        The exit code: 0, or 1 if clips are left without a caption.

    Raises:
        ConfigError: the endpoint refuses every request or does not answer; finished captions are kept.
        DataError: another process writes the log, or a caption cannot be written.
        OSError: another file cannot be written.
    """
    for folder in sorted({clip.parent for clip in clips.without}):
        make_writable_folder(folder)
    with open_log(log) as write_row:
        for folder in clips.folders:
            # Left from a process that was killed while it wrote a caption.
            for leftover in folder.glob(".write_new.*.tmp"):
                leftover.unlink(missing_ok=True)
        for name, reason in clips.refused.items():
            tqdm.write(printable(f"no caption: {reason}"))
            write_row({"clip": name, "status": "refused", "error": reason})
        tally = Tally(len(clips.without), prices)
        try:
            with contextlib.closing(_run(clips.without, writer, sampling, num_workers)) as results:
                for result in results:
                    try:
                        _keep(result)
                    finally:
                        # The request of a caption that cannot be written has been paid for too.
                        tally.add(result)
                    write_row(result.row(clips.name(result.clip)))
                    for note in [result.error, *result.notes]:
                        if note:
                            tally.say(note if note.startswith(f"{result.clip}:") else f"{result.clip}: {note}")
        finally:
            # Also after an interrupt: the captions so far are kept.
            tally.close()
            tqdm.write(
                f"{clips.folder}: {tally.summary(clips.num_with, len(clips.refused))}. Each clip is a line of {log}"
            )
    return 1 if tally.num_failed or clips.refused else 0


def plan(clips: FoundClips, wording: Wording, sampling: Sampling, frames_to: Path | None) -> list[str]:
    """Returns lines about what `describe` would do; sends no request.

    Args:
        clips: result of `find_clips`.
        wording: of the prompt.
        sampling: of the pictures.
        frames_to: folder to write the pictures of the first clip to; None to write none.

    Raises:
        ConfigError: the folder of the pictures is not empty.
        DataError: the first clip cannot be decoded.
    """
    if frames_to is not None and frames_to.exists() and not (frames_to.is_dir() and not any(frames_to.iterdir())):
        raise ConfigError(f"frames_out={frames_to} is not an empty folder: name a new one.")
    lines = [f"no caption: {reason}" for reason in clips.refused.values()]
    counts = f"{counted(len(clips.without), 'clip')} to describe, with a caption: {clips.num_with}"
    if not clips.without:
        return [*lines, counts]
    clip = clips.without[0]
    with ClipDecoder(_DECODE_SECONDS) as decoder:
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
    """Writes a caption next to its clip, unless another program has written one.

    Raises:
        DataError: the disk is full or refuses.
    """
    if result.error:
        return
    target = caption_path(result.clip)
    try:
        write_new(target, f"{result.caption}\n".encode())
    except FileExistsError:
        result.error = f"{target}: was written by another program in the meantime, and is kept."
    except OSError as error:
        result.error = (
            f"{target}: cannot be written ({error.strerror}): make room, or change the permissions of its folder, and "
            "run the same command again; finished captions are kept."
        )
        raise DataError(result.error) from error


def _run(clips: Sequence[Path], writer: Writer, sampling: Sampling, num_workers: int) -> Generator[Result, None, None]:
    """Yields results in the order in which they finish; stops the workers when it is closed."""
    todo: queue.SimpleQueue[Path] = queue.SimpleQueue()
    done: queue.SimpleQueue[Result | BaseException] = queue.SimpleQueue()
    for clip in clips:
        todo.put(clip)
    decoder, lock, num_lost = ClipDecoder(_DECODE_SECONDS), threading.Lock(), 0

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

    # Daemon threads: a request that hangs must not keep an interrupted process alive.
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
            if num_lost >= _MAX_LOST:
                raise ConfigError(
                    f"the endpoint did not answer for {num_lost} clips in a row, the last error: {result.error}: run "
                    "the same command when it works again; finished captions are kept."
                )
    finally:
        writer.pace.stop()
        decoder.close()


def _finished(done: "queue.SimpleQueue[Result | BaseException]") -> Iterator[Result]:
    """Yields results that other workers have finished by now: their requests have been paid for."""
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
        # One decoder for all threads: requests take much longer than decoding.
        with lock:
            # Raises after a stop: a decoder that is started then would not be closed.
            writer.pace.sleep(0)
            images, seconds = sample_frames(decoder, clip, sampling)
        result.caption, result.notes = writer.write(images, seconds, result.cost)
    except DataError as error:
        result.error, result.is_lost = str(error), isinstance(error, LostClip)
    return result
