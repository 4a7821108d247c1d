"""How processes share the work: data (videos) x guidance (prompt, negative prompt) x context (tokens)."""

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
        data, guidance, context: along the axes.
        heads: ranks of the context axis that share the heads of attention; rows of them form a ring.
    """

    data: int = 1
    guidance: int = 1
    context: int = 1
    heads: int = 1

    def __post_init__(self) -> None:
        assert self.context % self.heads == 0, self

    @property
    def num_ranks(self) -> int:
        """Ranks in all."""
        return self.data * self.guidance * self.context

    @property
    def split(self) -> tuple[int, int]:
        """Ranks that share the heads, and rows of them in the ring."""
        return self.heads, self.context // self.heads

    def __str__(self) -> str:
        return f"parallel.data={self.data} parallel.guidance={self.guidance} parallel.context={self.context}"

    @property
    def in_words(self) -> str:
        """The layout and how its context axis is split."""
        return f"{self}{self.split_in_words}"

    @property
    def split_in_words(self) -> str:
        """How the context axis is split, behind what names it; nothing where it is not."""
        return f", {self.heads} heads x {self.context // self.heads} ring" if self.context > 1 else ""


@dataclass(frozen=True)
class Videos:
    """What is to be rendered.

    Attributes:
        count: how many.
        num_tokens: visual tokens of one.
        is_guided: whether any step has a guidance other than 1.
    """

    count: int
    num_tokens: int
    is_guided: bool


def possible_layouts(num_ranks: int, is_guided: bool) -> list[Layout]:
    """Returns every way to use all ranks: two for guidance where there is any, and any number for context."""
    return [
        Layout(num_ranks // (guidance * context), guidance, context)
        for guidance in ((1, 2) if is_guided else (1,))
        for context in range(1, num_ranks + 1)
        if num_ranks % (guidance * context) == 0
    ]


def choose_layout(
    num_ranks: int, config: DiTConfig, videos: Videos, asked: dict[str, int | None], card: Card
) -> Layout:
    """Returns the layout that is foretold to be the fastest of those that fit the settings.

    Args:
        num_ranks: processes.
        config: of the DiT.
        videos: to render.
        asked: a number for "data", "guidance" or "context", or None where any will do.
        card: of each process.

    Raises:
        ParallelError: none is possible; those that are, are named.
    """
    if num_ranks == 1 and (more := [f"parallel.{axis}={n}" for axis, n in asked.items() if n not in (None, 1)]):
        needed = math.prod(n for n in asked.values() if n is not None)
        raise ParallelError(f"{' '.join(more)} wants {needed} processes: use parallel.num_processes={needed}.")
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
    """Estimates the seconds of a step of all videos: arithmetic, and what goes between the GPUs."""
    turns = (2 if videos.is_guided else 1) / layout.guidance
    return -(-videos.count // layout.data) * turns * pass_seconds(layout.split, config, videos.num_tokens, card)


def training_layout(num_ranks: int, context: int, config: DiTConfig, num_tokens: int, card: Card) -> Layout:
    """Returns how the ranks of a training share a step: samples, and with `context` the tokens of each.

    Args:
        num_ranks: processes.
        context: `parallel.context`.
        config: of the DiT.
        num_tokens: visual tokens of a sample.
        card: of each process.

    Raises:
        ParallelError: the context ranks do not divide all ranks.
    """
    if num_ranks % context:
        raise ParallelError(
            f"parallel.context={context} does not divide {num_ranks} processes: "
            f"use parallel.num_processes={max(1, num_ranks // context) * context}."
        )
    heads, _ = choose_split(context, config, num_tokens, card, TRAINING)
    return Layout(data=num_ranks // context, context=context, heads=heads)


class Mesh:
    """This process's ranks in a layout, and its groups; all processes build it together.

    Args:
        layout: of all processes.
        device: of this one.
        timeout_seconds: that a process waits for another.
        checks_inputs: whether the context ranks compare what they give the DiT, see `apply_context_parallel`.
    """

    def __init__(
        self, layout: Layout, device: torch.device, timeout_seconds: float, checks_inputs: bool = False
    ) -> None:
        self.layout, self.checks_inputs = layout, checks_inputs
        grid = torch.arange(layout.num_ranks).view(layout.data, layout.guidance, layout.context)
        self.data_rank, self.guidance_rank, self.context_rank = (grid == dist.get_rank()).nonzero()[0].tolist()
        timeout = datetime.timedelta(seconds=timeout_seconds)

        def group_of(rows: Tensor) -> dist.ProcessGroup:
            # Every rank takes part in making every group.
            groups = {tuple(row): dist.new_group(row, timeout=timeout) for row in rows.tolist()}
            mine = next(group for ranks, group in groups.items() if dist.get_rank() in ranks)
            assert isinstance(mine, dist.ProcessGroup), "a group of this process"
            return mine

        self.context_group = group_of(grid.flatten(0, 1))
        self.guidance_group = group_of(grid.transpose(1, 2).flatten(0, 1))
        # The ranks that make one video together.
        self.video_group = group_of(grid.flatten(1))
        self.video_mesh = DeviceMesh.from_group(self.video_group, device.type)

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes the videos that it makes together with others."""
        return dist.get_rank(self.video_group) == 0

    def is_any(self, flag: bool) -> bool:
        """Whether a flag is set in any process of this video, so that all of them stop at the same step."""
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.video_group)
        return bool(flags.item())

    def gather_parts(self, part: Tensor) -> Iterator[Tensor]:
        """Yields the parts (F', H, W, 3) of a video's ranks in order on the rank that writes it; none on the others."""
        group = self.video_group
        counts = [0] * dist.get_world_size(group)
        dist.all_gather_object(counts, len(part), group=group)
        if not self.is_writer:
            dist.send(part.contiguous(), group_dst=0, group=group)
            return
        yield part
        for sender, count in enumerate(counts[1:], 1):
            received = part.new_empty(count, *part.shape[1:])
            dist.recv(received, group_src=sender, group=group)
            yield received
