"""Layouts and groups of the processes: data (videos) x guidance (prompt, negative prompt) x context (tokens)."""

import datetime
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mochi_tune.errors import ParallelError
from mochi_tune.models.dit import DiTConfig
from mochi_tune.parallel.forecast import Card
from mochi_tune.parallel.forecast_context import TRAINING, choose_split, pass_seconds


@dataclass(frozen=True)
class Layout:
    """The number of ranks along each axis.

    Attributes:
        data, guidance, context: number of ranks along this axis.
        heads: number of ranks of a row of the context axis, which share the heads of attention. The rows form a ring.
    """

    data: int = 1
    guidance: int = 1
    context: int = 1
    heads: int = 1

    def __post_init__(self) -> None:
        assert self.context % self.heads == 0, self

    @property
    def num_ranks(self) -> int:
        """The total number of ranks."""
        return self.data * self.guidance * self.context

    @property
    def split(self) -> tuple[int, int]:
        """The number of ranks that share the heads, and of rows in the ring."""
        return self.heads, self.context // self.heads

    def __str__(self) -> str:
        return f"parallel.data={self.data} parallel.guidance={self.guidance} parallel.context={self.context}"

    @property
    def in_words(self) -> str:
        """The layout with the split of its context axis, for messages."""
        return f"{self}{self.split_in_words}"

    @property
    def split_in_words(self) -> str:
        """The split of the context axis, to append to a message; empty if there is one context rank."""
        return f", {self.heads} heads x {self.context // self.heads} ring" if self.context > 1 else ""


@dataclass(frozen=True)
class Videos:
    """The videos to render.

    Attributes:
        count: number of videos.
        num_tokens: visual tokens of one video.
        is_guided: whether any step has a guidance other than 1.
    """

    count: int
    num_tokens: int
    is_guided: bool


def possible_layouts(num_ranks: int, is_guided: bool) -> list[Layout]:
    """Returns all layouts that use all ranks: one or, with guidance, two for guidance, and any number for context."""
    return [
        Layout(num_ranks // (guidance * context), guidance, context)
        for guidance in ((1, 2) if is_guided else (1,))
        for context in range(1, num_ranks + 1)
        if num_ranks % (guidance * context) == 0
    ]


def choose_layout(
    num_ranks: int, config: DiTConfig, videos: Videos, asked: dict[str, int | None], card: Card
) -> Layout:
    """Returns the layout with the lowest estimated time among those that fit the settings.

    Args:
        num_ranks: number of processes.
        config: sizes of the DiT.
        videos: the videos to render.
        asked: the required number of ranks for "data", "guidance" and "context"; None: any number.
        card: GPU of each process.

    Raises:
        ParallelError: no layout fits; names the possible ones.
    """
    if num_ranks == 1 and (more := [f"parallel.{axis}={n}" for axis, n in asked.items() if n not in (None, 1)]):
        needed = math.prod(n for n in asked.values() if n is not None)
        raise ParallelError(f"{' '.join(more)} needs {needed} processes: use parallel.num_processes={needed}.")
    possible = possible_layouts(num_ranks, videos.is_guided)
    if asked.get("data") is None:
        # A rank without a video would do nothing.
        possible = [layout for layout in possible if layout.data <= videos.count]
    fitting = [
        layout for layout in possible if all(n is None or getattr(layout, axis) == n for axis, n in asked.items())
    ]
    if not fitting:
        wanted = " ".join(f"parallel.{axis}={n}" for axis, n in asked.items() if n is not None)
        raise ParallelError(
            f"{wanted} is not possible with {num_ranks} processes"
            f"{'' if videos.is_guided else ' and no guidance'}: use {' or '.join(map(str, possible))}."
        )
    split = [
        replace(layout, heads=choose_split(layout.context, config, videos.num_tokens, card)[0]) for layout in fitting
    ]
    return min(split, key=lambda layout: estimate_seconds(layout, config, videos, card))


def estimate_seconds(layout: Layout, config: DiTConfig, videos: Videos, card: Card) -> float:
    """Estimates the seconds of one step of all videos, with the communication between GPUs."""
    turns = (2 if videos.is_guided else 1) / layout.guidance
    return -(-videos.count // layout.data) * turns * pass_seconds(layout.split, config, videos.num_tokens, card)


def training_layout(num_ranks: int, context: int, config: DiTConfig, num_tokens: int, card: Card) -> Layout:
    """Returns the layout of a training: the data axis shares samples, the context axis the tokens of each.

    Args:
        num_ranks: number of processes.
        context: `parallel.context`.
        config: sizes of the DiT.
        num_tokens: visual tokens of a sample.
        card: GPU of each process.

    Raises:
        ParallelError: `context` does not divide the number of processes.
    """
    if num_ranks % context:
        raise ParallelError(
            f"parallel.context={context} does not divide {num_ranks} processes: "
            f"use parallel.num_processes={max(1, num_ranks // context) * context}."
        )
    heads, _ = choose_split(context, config, num_tokens, card, TRAINING)
    return Layout(data=num_ranks // context, context=context, heads=heads)


class Mesh:
    """The ranks and the groups of this process in a layout. All processes must build it together.

    Args:
        layout: the layout of all processes.
        device: the device of this process.
        timeout_seconds: seconds that a process waits for another.
        checks_inputs: whether the context ranks compare their inputs of the DiT, see `apply_context_parallel`.
    """

    def __init__(
        self, layout: Layout, device: torch.device, timeout_seconds: float, checks_inputs: bool = False
    ) -> None:
        self.layout, self.checks_inputs = layout, checks_inputs
        grid = torch.arange(layout.num_ranks).view(layout.data, layout.guidance, layout.context)
        self.data_rank, _, self.context_rank = (grid == dist.get_rank()).nonzero()[0].tolist()
        timeout = datetime.timedelta(seconds=timeout_seconds)

        def group_of(rows: Tensor) -> dist.ProcessGroup:
            # `new_group` requires that every rank takes part in creating every group.
            groups = {tuple(row): dist.new_group(row, timeout=timeout) for row in rows.tolist()}
            mine = next(group for ranks, group in groups.items() if dist.get_rank() in ranks)
            assert isinstance(mine, dist.ProcessGroup), "a group of this process"
            return mine

        self.context_group = group_of(grid.flatten(0, 1))
        self.guidance_group = group_of(grid.transpose(1, 2).flatten(0, 1))
        # The ranks that render one video together.
        self.video_group = group_of(grid.flatten(1))
        self.video_mesh = DeviceMesh.from_group(self.video_group, device.type)

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes the videos of its `video_group`."""
        return dist.get_rank(self.video_group) == 0

    def largest(self, number: int) -> int:
        """Returns the largest number that a process of this video has. With it, they all stop at the same step."""
        numbers = torch.tensor([number])
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self.video_group)
        return int(numbers.item())

    def gather_parts(self, part: Tensor) -> Iterator[Tensor]:
        """Yields the parts (F', H, W, 3) of all ranks of a video in order on the rank that writes it; else nothing.

        Parts without frames are not yielded.
        """
        group = self.video_group
        counts = [0] * dist.get_world_size(group)
        dist.all_gather_object(counts, len(part), group=group)
        if not self.is_writer:
            if len(part):
                dist.send(part.contiguous(), group_dst=0, group=group)
            return
        if len(part):
            yield part
        for sender in (rank for rank, count in enumerate(counts) if rank and count):
            received = part.new_empty(counts[sender], *part.shape[1:])
            dist.recv(received, group_src=sender, group=group)
            yield received
