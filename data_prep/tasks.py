"""The work of a `prepare`, piece by piece: a file's clips, or a caption, and what encodes them in any process."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from mochi_tune.data.rows import CacheSettings
from mochi_tune.data_prep.decoder import ClipDecoder
from mochi_tune.data_prep.encode import encode_caption, encode_frames
from mochi_tune.data_prep.gather import Clip
from mochi_tune.data_prep.hashes import Signature, signature
from mochi_tune.data_prep.preview import write_preview
from mochi_tune.errors import DataError, ParallelError
from mochi_tune.files import file_sha256
from mochi_tune.models.device import DTYPES, free_memory
from mochi_tune.models.text_encoder import T5_DTYPES
from mochi_tune.weights.folder import WeightsFolder
from mochi_tune.weights.paths import WeightsPaths


@dataclass(frozen=True)
class WorkerSettings:
    """What every worker of a `prepare` is told; it can be sent to other processes.

    Attributes:
        weights: where they are.
        cache: settings of the cache, with the fingerprints that the weights must have.
        parts: folder for what is encoded.
        device: "cpu" or "cuda".
        decode_timeout_seconds: as of `ClipDecoder`.
        num_threads: of torch; another number may give other bits.
    """

    weights: WeightsPaths
    cache: CacheSettings
    parts: Path
    device: str
    decode_timeout_seconds: float
    num_threads: int


@dataclass(frozen=True)
class ClipTask:
    """Clips of one file, which is decoded once for all of them.

    Attributes:
        clips: in ascending order of their start.
        before: the file's signature when it was hashed.
        is_missing: of each clip, whether its latents are to be encoded.
        previews: of each clip, where its preview goes; None: nowhere.
    """

    clips: tuple[Clip, ...]
    before: Signature
    is_missing: tuple[bool, ...]
    previews: tuple[Path | None, ...]

    @property
    def name(self) -> str:
        """The file's name, for errors."""
        return str(self.clips[0].file.path)

    @property
    def to_decode(self) -> tuple[Path, list]:
        """The file and its cuts, as `ClipDecoder.cut_all` takes them."""
        return self.clips[0].file.path, [clip.cut for clip in self.clips]


@dataclass(frozen=True)
class CaptionTask:
    """A caption: the key of its features, its text, and the first clip that has it."""

    key: str
    caption: str
    name: str


Task = ClipTask | CaptionTask
AnyTask = TypeVar("AnyTask", ClipTask, CaptionTask)


class Store(Protocol):
    """Where encoded tensors go: a `CacheWriter` in the main process, a `PartsFolder` in others."""

    def has_latents(self, clip_key: str, /) -> bool:
        """Whether a clip's latents are there."""
        ...

    def has_text(self, text_key: str, /) -> bool:
        """Whether a caption's features are there."""
        ...

    def put_latents(self, clip_key: str, mean: Any, logvar: Any, clip_report: dict[str, Any], /) -> object:
        """Saves a clip's posterior."""
        ...

    def put_text(self, text_key: str, prompt_embeds: Any, caption_tokens: int, /) -> object:
        """Saves a caption's features."""
        ...


class Worker:
    """Encodes tasks one after the other; holds one model at a time, loaded when the first task needs it.

    Args:
        settings: of the run.
        store: where the tensors go.
        decoder: to use.
        checks_weights: whether the weights' fingerprints are compared with the main process's.
    """

    def __init__(self, settings: WorkerSettings, store: Store, decoder: ClipDecoder, checks_weights: bool) -> None:
        self.settings, self.store, self._decoder, self._checks_weights = settings, store, decoder, checks_weights
        self._saver, self._saving = ThreadPoolExecutor(1), None
        self._part, self._model = "", None

    def run(self, task: Task, ahead: Task | None = None, update: Callable[[], object] | None = None) -> list[str]:
        """Encodes a task; what it has last encoded is on disk after `finish`, or after the next clip.

        Args:
            task: of the run.
            ahead: the task of the next call, whose decoding is begun; None where it is not known.
            update: called after each clip or caption.

        Returns:
            Of a ClipTask why each clip is refused, "" where it is not; of a caption nothing.

        Raises:
            DataError: the model gave NaN or infinity, or memory does not suffice.
            ParallelError: the weights are others than those of the main process.
            OSError: the disk is full, or refuses.
        """
        update = update or (lambda: None)
        if isinstance(task, ClipTask):
            reasons = []
            for reason in self._encode_clips(task, ahead.to_decode if isinstance(ahead, ClipTask) else None):
                reasons.append(reason)
                update()
            return reasons
        if not self.store.has_text(task.key):
            # Not in model.dtype: features are computed once, and T5's rounding affects all of training.
            model = self._load("text_encoder")
            self.store.put_text(task.key, *encode_caption(model, task.caption, task.name))
        update()
        return []

    def finish(self) -> None:
        """Waits until what was encoded is on disk."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def close(self) -> None:
        """Frees the model and ends the thread that saves, when that has saved."""
        self._saver.shutdown()
        self._part, self._model = "", None
        free_memory()

    def _encode_clips(self, task: ClipTask, ahead: tuple[Path, list] | None) -> Iterator[str]:
        decoded_clips = self._decoder.cut_all([task.to_decode], ahead)
        each = zip(task.clips, task.is_missing, task.previews, decoded_clips, strict=True)
        for clip, is_missing, preview, (_, _, decoded) in each:
            if isinstance(decoded, DataError):
                yield str(decoded)
                continue
            if not _is_unchanged(clip, task.before):
                yield f"{clip.file.path}: was changed while it was read: run this again."
                continue
            if preview is not None:
                write_preview(preview, decoded.frames)
            if is_missing and not self.store.has_latents(clip.row.clip_key):
                # Loaded only when a clip is there to be encoded: a second run over a bad clip reads no weights.
                mean, logvar = encode_frames(self._load("encoder"), decoded.frames, clip.row.sample_id)
                # A sync takes as long as a part of a clip's encoding: one is saved while the next one is encoded.
                self.finish()
                self._saving = self._save(clip.row.clip_key, mean, logvar, decoded.report)
            yield ""

    def _save(self, *latents: Any) -> "Future[object]":
        return self._saver.submit(self.store.put_latents, *latents)

    def _load(self, part: str) -> Any:
        """Returns the model of a part, and frees the other one."""
        if self._part == part:
            return self._model
        self._part, self._model = "", None
        free_memory()
        weights, settings = WeightsFolder(self.settings.weights), self.settings.cache
        if self._checks_weights:
            expected, found = settings.vae if part == "encoder" else settings.t5, weights.fingerprint(part)
            if found != expected:
                raise ParallelError(
                    f"the weights of the {part} in {self.settings.weights.root} are {found[:16]}… in a worker and "
                    f"{expected[:16]}… in the main process: give each process and machine the same files."
                )
        if part == "encoder":
            self._model = weights.load_encoder(torch.device(self.settings.device), DTYPES[settings.vae_dtype])
        else:
            self._model = weights.load_text_encoder(torch.device(self.settings.device), T5_DTYPES[settings.t5_dtype])
        self._part = part
        return self._model


class WorkHere:
    """Encodes in this process."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def __enter__(self) -> "WorkHere":
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.close()

    def run(self, tasks: Sequence[AnyTask], update: Callable[[], object]) -> Iterator[tuple[AnyTask, list[str]]]:
        """Yields each task when it is done, with what `Worker.run` returns; `update` is called for each clip."""
        for number, task in enumerate(tasks):
            ahead = tasks[number + 1] if number + 1 < len(tasks) else None
            yield task, self._worker.run(task, ahead, update)
        self._worker.finish()


def _is_unchanged(clip: Clip, before: Signature) -> bool:
    """Whether a video still has the content that its latents' key was computed from."""
    try:
        # A long file with many clips is not read for each of them.
        return signature(clip.file.path) == before or file_sha256(clip.file.path) == clip.row.source_sha256
    except (OSError, DataError):
        return False
