"""How processes share the work: data (videos) x guidance (prompt, negative prompt) x context (tokens)."""

import datetime
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mochi_tune.errors import ParallelError
from mochi_tune.models.dit import DiTConfig
from mochi_tune.models.flops import dit_flops
from mochi_tune.parallel.context import heads_and_ring

# What one H100 does a second in bf16: matrix products, attention; and bytes to the other GPUs of its machine. Their
# proportions decide which layout is the fastest.
MATRIX_FLOPS, ATTENTION_FLOPS, LINK_BYTES = 790e12, 600e12, 370e9


@dataclass(frozen=True)
class Layout:
    """The number of ranks along each axis."""

    data: int = 1
    guidance: int = 1
    context: int = 1

    @property
    def num_ranks(self) -> int:
        """Ranks in all."""
        return self.data * self.guidance * self.context

    def __str__(self) -> str:
        return f"parallel.data={self.data} parallel.guidance={self.guidance} parallel.context={self.context}"


def possible_layouts(num_ranks: int, is_guided: bool) -> list[Layout]:
    """Returns every way to use all ranks: two for guidance where there is any, and any number for context."""
    return [
        Layout(num_ranks // (guidance * context), guidance, context)
        for guidance in ((1, 2) if is_guided else (1,))
        for context in range(1, num_ranks + 1)
        if num_ranks % (guidance * context) == 0
    ]


def choose_layout(
    num_ranks: int, config: DiTConfig, num_videos: int, num_tokens: int, is_guided: bool, asked: dict[str, int | None]
) -> Layout:
    """Returns the layout that is estimated to be the fastest of those that fit the settings.

    Args:
        num_ranks: processes.
        config: of the DiT.
        num_videos: to render.
        num_tokens: visual tokens of one video.
        is_guided: whether any step has a guidance other than 1.
        asked: a number for "data", "guidance" or "context", or None where any will do.

    Raises:
        ParallelError: none is possible; those that are, are named.
    """
    if num_ranks == 1 and (more := [f"parallel.{axis}={n}" for axis, n in asked.items() if n not in (None, 1)]):
        needed = math.prod(n for n in asked.values() if n is not None)
        raise ParallelError(f"{' '.join(more)} wants {needed} processes: use parallel.num_processes={needed}.")
    possible = possible_layouts(num_ranks, is_guided)
    if asked.get("data") is None:
        # A rank without a video would do nothing.
        possible = [layout for layout in possible if layout.data <= num_videos]
    fitting = [
        layout for layout in possible if all(n is None or getattr(layout, axis) == n for axis, n in asked.items())
    ]
    if not fitting:
        wanted = " ".join(f"parallel.{axis}={n}" for axis, n in asked.items() if n is not None)
        raise ParallelError(
            f"{wanted} is not possible with {num_ranks} processes"
            f"{'' if is_guided else ' and no guidance'}: use {' or '.join(map(str, possible))}."
        )
    return min(fitting, key=lambda layout: estimate_seconds(layout, config, num_videos, num_tokens, is_guided))


def estimate_seconds(layout: Layout, config: DiTConfig, num_videos: int, num_tokens: int, is_guided: bool) -> float:
    """Estimates the seconds a step of all videos on H100s: arithmetic, and what goes between the GPUs.

    Exchanged for heads are q, k, v and the output of attention, 2 bytes each. The tokens of the fullest rank count.
    In a ring the keys and values of all others come in, 2 bytes each, while attention computes.
    """
    mine = -(-num_tokens // layout.context)
    heads, ring = heads_and_ring(layout.context, config.num_heads)
    matrices, attention = (flops * mine / num_tokens for flops in dit_flops(config, num_tokens, 0))
    exchanged = config.depth * 2 * 4 * config.hidden_size_x * mine * (heads - 1) / heads
    travelled = config.depth * 2 * 2 * config.hidden_size_x / heads * num_tokens * (ring - 1) / ring
    attending = max(attention / ATTENTION_FLOPS, travelled / LINK_BYTES)
    forward = matrices / MATRIX_FLOPS + attending + exchanged / LINK_BYTES
    turns = (2 if is_guided else 1) / layout.guidance
    return -(-num_videos // layout.data) * turns * forward


def training_layout(num_ranks: int, context: int) -> Layout:
    """Returns how the ranks of a training share a step: samples, and with `context` the tokens of each.

    Raises:
        ParallelError: the context ranks do not divide all ranks.
    """
    if num_ranks % context:
        raise ParallelError(
            f"parallel.context={context} does not divide {num_ranks} processes: "
            f"use parallel.num_processes={max(1, num_ranks // context) * context}."
        )
    return Layout(data=num_ranks // context, context=context)


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
