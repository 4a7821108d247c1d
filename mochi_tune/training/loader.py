"""Reads the micro-batches of a training ahead in a background thread."""

import contextlib
import hashlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mochi_tune.data.dataset import LatentDataset, collate
from mochi_tune.data.order import ClipOrder
from mochi_tune.errors import ConfigError, DataError, counted
from mochi_tune.models.dit import Modulation
from mochi_tune.training.draws import Draws, KeyedDraws, keyed_generator

# A run stops when more than this share of its clips, and more than one clip, are damaged.
MAX_DAMAGED_SHARE = 0.1
# Minimum number of clips in the cache for each clip that is held out.
MIN_CLIPS_A_HELD_OUT = 5
# The result of `collate` and its random numbers.
MicroBatch = tuple[Mapping[str, Any], Draws]


def held_out(videos: Sequence[str], count: int, seed: int) -> list[int]:
    """Returns the indices of the clips to hold out for validation, at most a fifth of all.

    The hash of their videos decides, so that adding clips changes few of them. All clips of a video are held out
    together, because they look alike. A video with too many clips is skipped; if all have too many, the one with the
    fewest clips is held out.

    Args:
        videos: the video of each clip.
        count: number of clips to hold out: at most this many, except where each video has more.
        seed: the seed of the run.
    """
    clips: dict[str, list[int]] = {}
    for number, video in enumerate(videos):
        clips.setdefault(video, []).append(number)
    most, held = len(videos) // MIN_CLIPS_A_HELD_OUT, []
    drawn = sorted(clips, key=lambda video: hashlib.sha256(f"{seed}/{video}".encode()).digest())
    for video in drawn:
        if len(held) + len(clips[video]) <= min(count, most):
            held += clips[video]
    if drawn and count and not held:
        fewest = min((clips[video] for video in drawn), key=len)
        held = fewest if len(fewest) <= most else []
    return sorted(held)


def describe_held_out(num_held: int, num_measured: int, num_clips: int) -> str:
    """Returns a line that says which clips the validation uses."""
    if not num_held:
        return (
            f"no clip of {num_clips} can be held out, as each video has more than a fifth of them: the validation uses "
            "clips that are trained on"
        )
    measured = f"; {num_measured} of them are measured" if num_measured < num_held else ""
    return f"held out for validation: {num_held} of {counted(num_clips, 'clip')}{measured}"


def spread(clips: Sequence[int], count: int) -> list[int]:
    """Returns `count` of the clips, or all if there are fewer, at even distances."""
    count = min(count, len(clips))
    return [clips[i * len(clips) // count] for i in range(count)]


def spread_over(groups: Sequence[Sequence[int]], count: int) -> list[int]:
    """Returns `count` of the clips, or all if there are fewer: equally many of each group, as far as it has them."""
    shares = [0] * len(groups)
    for _ in range(min(count, sum(map(len, groups)))):
        # A group with clips left that has given the fewest.
        shares[min((i for i, group in enumerate(groups) if shares[i] < len(group)), key=lambda i: shares[i])] += 1
    return sorted(clip for group, share in zip(groups, shares, strict=True) for clip in spread(group, share))


def check_replacing(damaged: str, strategy: str, context: int) -> None:
    """Refuses to replace damaged clips where processes compute a clip together: each process chooses alone.

    Args:
        damaged: a value of `data.damaged`.
        strategy: a value of `parallel.strategy`; with ZeRO-3, all processes validate together.
        context: number of processes that share the tokens of a clip.

    Raises:
        ConfigError: damaged clips would be replaced.
    """
    if damaged == "quarantine" and (context > 1 or strategy == "zero3"):
        raise ConfigError(
            "data.damaged=quarantine needs parallel.context=1 and another strategy than zero3, as processes that "
            "compute a clip together would replace it by different ones: use data.damaged=strict, or parallel=data."
        )


class ClipLoader:
    """Reads the clips of micro-batches. A damaged clip stops the run or is replaced by another clip."""

    def __init__(
        self,
        dataset: LatentDataset,
        order: ClipOrder,
        draws: KeyedDraws,
        is_strict: bool,
        log: Callable[[str], None],
    ) -> None:
        """Prepares to read.

        Args:
            dataset: all clips of the cache.
            order: the order of the training clips.
            draws: the random numbers of each sample.
            is_strict: whether a damaged clip stops the run.
            log: prints a line.
        """
        self.dataset = dataset
        self.order = order
        self.draws = draws
        self.is_strict = is_strict
        self.log = log
        self.damaged: set[int] = set()

    def load(self, step: int, micro_batch: int) -> MicroBatch:
        """Reads a micro-batch and draws its random numbers.

        Raises:
            DataError: a clip is damaged and the run is strict, or too many clips are damaged.
        """
        first = micro_batch * self.draws.batch_size
        chosen = self.order.batch(self.draws.batch_number(step, micro_batch))
        batch = collate([self._load_clip(step, first + row, index) for row, index in enumerate(chosen)])
        return batch, self.draws.draw(step, micro_batch, batch["mean"].shape[1:])

    def _load_clip(self, step: int, sample: int, index: int) -> dict[str, Any]:
        # The replacement is keyed by the sample, so that the order of all other clips stays the same.
        generator = keyed_generator(self.draws.seed, "stand-in", step, sample)
        while True:
            if index not in self.damaged:
                try:
                    caption = self.draws.caption(step, sample, self.dataset.num_captions(index))
                    return self.dataset.load(index, caption)
                except DataError as error:
                    if self.is_strict:
                        raise
                    self._quarantine(index, error)
            # All clips of a batch have the same size.
            others = self.order.pool_of(index).clips
            index = others[int(torch.randint(len(others), (), generator=generator))]

    def _quarantine(self, index: int, error: DataError) -> None:
        self.damaged.add(index)
        count = sum(len(pool.clips) for pool in self.order.pools)
        reason = str(error).partition("; data.damaged")[0]
        is_empty = self.damaged.issuperset(self.order.pool_of(index).clips)
        if is_empty or len(self.damaged) > max(1, MAX_DAMAGED_SHARE * count):
            raise DataError(
                f"{len(self.damaged)} of {count} clips are damaged, and data.damaged=quarantine replaces at most a "
                f"tenth, and not all clips of a size; the last one: {reason}"
            ) from None
        self.log(f"quarantined, another clip takes its place: {reason}")


@dataclass(frozen=True)
class Inputs:
    """The model inputs and the target of one micro-batch of B samples.

    A training step gets the tensors from `noisy` on on its device.

    Attributes:
        clips: path of the clip of each sample.
        sigma: noise levels, (B,), on the CPU.
        mask: mask of the prompts, (B, L), on the CPU, so that the model reads it without waiting for the GPU.
        dropout_seed: seed of the adapter's dropout.
        noisy: noisy latents, (B, C, T, h, w).
        target: velocity, (B, C, T, h, w).
        prompt: embeddings, (B, L, D).
        weight: of each sample's loss, (B,).
        modulation: of the model's blocks; None where the model computes it.
    """

    clips: list[str]
    sigma: Tensor
    mask: Tensor
    dropout_seed: int
    noisy: Tensor
    target: Tensor
    prompt: Tensor
    weight: Tensor
    modulation: Modulation | None

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Inputs":
        """Returns the inputs with `move` applied to all tensors that belong on the device."""
        moved: dict[str, Any] = {name: move(getattr(self, name)) for name in ("noisy", "target", "prompt", "weight")}
        if self.modulation is not None:
            blocks = tuple((move(mod_x), move(mod_y)) for mod_x, mod_y in self.modulation.blocks)
            moved["modulation"] = Modulation(move(self.modulation.c), blocks)
        return replace(self, **moved)


class DeviceCopier:
    """Copies inputs to a GPU while it computes, from pinned memory and on a separate stream; a CPU needs no copy."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def enter_thread(self) -> None:
        """Selects the GPU for this thread, before any other call.

        The current device of a new thread is the first GPU, and each use of the stream returns to the current device.
        Without this, every process would use memory of the first GPU.
        """
        if self.stream is not None:
            torch.cuda.set_device(self.stream.device)

    def send(self, inputs: Inputs) -> tuple[Inputs, Any]:
        """Starts the copies; returns them and the event that is recorded after them."""
        if self.stream is None:
            return inputs, None
        with torch.cuda.stream(self.stream):
            moved = inputs.moved(lambda tensor: tensor.pin_memory().to(self.device, non_blocking=True))
            return moved, self.stream.record_event()

    def receive(self, inputs: Inputs, arrived: Any) -> Inputs:
        """Makes the current stream wait for the copies, and keeps their memory until the stream has used it."""
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(arrived)

            def hold(tensor: Tensor) -> Tensor:
                tensor.record_stream(current)
                return tensor

            inputs.moved(hold)
        return inputs


class Prefetcher:
    """Prepares the inputs of micro-batches in a background thread, up to two ahead of the training."""

    def __init__(
        self, load: Callable[[int, int], Inputs], keys: Iterable[tuple[int, int]], device: torch.device
    ) -> None:
        """Prepares to load.

        Args:
            load: returns the inputs of a micro-batch on the CPU, given its step and number.
            keys: step and number of all micro-batches, in order.
            device: the device of the training.
        """
        self._load = load
        self._keys = keys
        self._copier = DeviceCopier(device)
        self._queue: queue.Queue[tuple[Inputs, Any] | Exception] = queue.Queue(maxsize=1)
        self._is_closed = False
        # A daemon thread, so that a read that hangs does not keep the process alive.
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Prefetcher":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closed = True
        with contextlib.suppress(queue.Empty):
            self._queue.get_nowait()

    def take(self, count: int, while_waiting: Callable[[], None]) -> Iterator[Inputs]:
        """Yields the inputs of the next micro-batches, on the device.

        Args:
            count: number of micro-batches.
            while_waiting: called five times per second during a wait; an exception that it raises ends the wait.

        Raises:
            DataError: a clip is damaged.
        """
        for _ in range(count):
            while True:
                try:
                    item = self._queue.get(timeout=0.2)
                    break
                except queue.Empty:
                    while_waiting()
            if isinstance(item, Exception):
                raise item
            yield self._copier.receive(*item)

    def _run(self) -> None:
        try:
            self._copier.enter_thread()
            for step, micro_batch in self._keys:
                self._queue.put(self._copier.send(self._load(step, micro_batch)))
                if self._is_closed:
                    return
        except Exception as error:  # noqa: BLE001 - raised where the micro-batch is taken
            self._queue.put(error)
