"""Where a training has its weights and what it keeps of each block: as asked, or as the free memory allows."""

import contextlib
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

from mochi_tune.errors import ConfigError, TrainingError
from mochi_tune.models.dit import AsymmDiT
from mochi_tune.parallel.compilation import apply_compilation
from mochi_tune.parallel.forecast import GIB, SPARE_BYTES, Step, fits
from mochi_tune.parallel.recompute import HostInputs, apply_activation_checkpointing, apply_mlp_slices
from mochi_tune.parallel.stream import apply_streaming

# At a time, where memory is short.
MLP_TOKENS = 4096


@dataclass
class MemoryPlan:
    """Where a training has its blocks, and what it keeps of them for the backward pass; none of it changes a result.

    Attributes:
        recompute: what each block computes again, one of `parallel.recompute.POLICIES`; `keep_less` changes it.
        is_compiled: whether the blocks are compiled.
        is_streamed: whether the blocks' weights are in host memory.
        offloads_inputs: whether the blocks' inputs wait in host memory for the backward pass; their feed-forward layers
            then work on MLP_TOKENS at a time.
    """

    recompute: list[str]
    is_compiled: bool
    is_streamed: bool
    offloads_inputs: bool
    _checkpoint: Callable[[], None] | None = field(default=None, init=False, repr=False, compare=False)

    def apply(
        self,
        dit: AsymmDiT,
        device: torch.device,
        log: Callable[[str], None],
        before_compiling: Callable[[], None] | None = None,
    ) -> None:
        """Arranges the blocks of a model that has its adapter: on the device, or on the CPU where it is streamed.

        Args:
            dit: the model.
            device: where it computes.
            log: writes a line for the user.
            before_compiling: called before each graph is compiled, which takes some seconds; may raise.
        """
        if self.offloads_inputs:
            apply_mlp_slices(dit, MLP_TOKENS)
        if self.is_compiled and self.is_streamed:
            # A graph of what is between two copies; otherwise a graph partitions what is kept, too.
            apply_compilation(dit, log, True, before_compiling)
        if self.is_streamed:
            apply_streaming(dit, device)
        inputs = HostInputs(device) if self.offloads_inputs else None
        forwards = [block.__dict__.get("forward") for block in dit.blocks]

        def checkpoint() -> None:
            for block, forward in zip(dit.blocks, forwards, strict=True):
                block.__dict__.pop("forward", None)
                if forward is not None:
                    block.forward = forward
            apply_activation_checkpointing(dit, self.recompute, inputs)
            if self.is_compiled and not self.is_streamed:
                apply_compilation(dit, log, True, before_compiling)

        checkpoint()
        self._checkpoint = checkpoint

    @property
    def can_keep_less(self) -> bool:
        """Whether a block keeps more than its input."""
        return set(self.recompute) != {"block"}

    def keep_less(self) -> None:
        """Makes all blocks of the model that the plan was applied to keep their inputs alone."""
        assert self._checkpoint is not None, "the plan was not applied"
        self.recompute[:] = ["block"] * len(self.recompute)
        self._checkpoint()


def check_host_memory(needed: int, available: int, num_processes: int = 1) -> None:
    """Refuses weights and blocks' inputs in host memory that does not suffice for them.

    Args:
        needed: bytes of each process.
        available: bytes that are free on this host.
        num_processes: of the run on this host; each has its own.

    Raises:
        ConfigError: naming what is needed.
    """
    if num_processes * needed > available:
        each = f", {needed / GIB:.1f} for each of {num_processes} processes" if num_processes > 1 else ""
        raise ConfigError(
            f"host memory has {available / GIB:.1f} GiB free, and {num_processes * needed / GIB:.1f} GiB of weights "
            f"and blocks' inputs are to stay there{each}: free some, or use memory.dit=resident, "
            f"fewer frames{', fewer processes a machine' if num_processes > 1 else ''} or model.precision=int8."
        )


# Of `train`, the one that takes least time first: preset, whether it streams the blocks, and offloads their inputs.
ARRANGEMENTS = (("80gb", False, False), ("16gb", True, False), ("12gb", True, True))
# Functions that an out-of-memory error may come through, and what was done there; the first that is found says most.
PLACES = {
    "load_dit": "while the DiT was loaded",
    "encode_eval_prompts": "while T5 encoded the eval prompts",
    "decoded_frames": "while an eval video was decoded",
    "evaluate_if_due": "in an evaluation",
    "backward": "in the backward pass of a step",
}


def arrange(step: Step, dit: str, activations: str, free: int | None) -> MemoryPlan:
    """Returns the plan of a training step: what was asked for, or with memory.dit=auto the fastest that fits.

    Args:
        step: its sizes.
        dit: `memory.dit`.
        activations: `memory.activations`.
        free: bytes of the device that are free before the weights are loaded; None: enough.

    Raises:
        ConfigError: it does not fit; the error names settings that do.
    """
    asked = [("", dit in ("stream", "offload"), activations == "offload")]
    candidates = asked if dit != "auto" else list(ARRANGEMENTS if can_stream(step) else ARRANGEMENTS[:1])
    plans = [
        MemoryPlan(step.policies(free, is_streamed, is_offloaded), step.is_compiled, is_streamed, is_offloaded)
        for _, is_streamed, is_offloaded in candidates
    ]
    if free is None:
        return plans[0]
    for plan in plans:
        if fits(held_by(step, plan), free):
            return plan
    needed = describe(held_by(step, plans[-1]))
    raise ConfigError(f"this training needs {needed}, and {free / GIB:.1f} GiB are free: {ways_out(step, free)}.")


def can_stream(step: Step) -> bool:
    """Whether a block's weights may leave the device: not where it keeps them, nor where ZeRO-3 splits them."""
    return step.recompute != "none" and step.num_shards == 1


def held_by(step: Step, plan: MemoryPlan) -> dict[str, int]:
    """Returns the bytes on the device at a step's peak, by what they are for."""
    return step.held(plan.recompute, plan.is_streamed, plan.offloads_inputs)


def describe(held: dict[str, int]) -> str:
    """Returns the sum of what is held, and its parts, in GiB."""
    parts = ", ".join(f"{part} {size / GIB:.1f}" for part, size in held.items() if size >= GIB // 20)
    return f"{(sum(held.values()) + SPARE_BYTES) / GIB:.1f} GiB of the GPU ({parts}, to spare {SPARE_BYTES / GIB:.1f})"


def ways_out(step: Step, free: int, failed: MemoryPlan | None = None) -> str:
    """Returns the settings with which a step fits, the one that costs least first; else what is to become smaller.

    Args:
        step: its sizes.
        free: bytes of the device.
        failed: the plan that ran out of memory, if one did.
    """
    found = ["train.recompute=block"] if failed is not None and failed.can_keep_less else []
    smaller = replace(step, recompute="block" if step.recompute == "none" else step.recompute)
    # ZeRO-3 splits the weights: none of them can wait in host memory, or be held in 8 bits.
    is_split = step.num_shards > 1
    precisions = (step.precision,) if is_split or step.needs_exact else (step.precision, "int8")
    for name, is_streamed, is_offloaded in ARRANGEMENTS[:1] if is_split else ARRANGEMENTS:
        is_failed = failed is not None and (is_streamed, is_offloaded) == (failed.is_streamed, failed.offloads_inputs)
        for precision in dict.fromkeys(precisions):
            if is_failed and precision == step.precision:
                continue
            candidate = replace(smaller, precision=precision)
            held = candidate.held(candidate.policies(free, is_streamed, is_offloaded), is_streamed, is_offloaded)
            if fits(held, free):
                settings = [f"memory={name}"] if is_streamed else []
                settings += [f"model.precision={precision}"] if precision != step.precision else []
                settings += ["train.recompute=auto"] if step.recompute == "none" else []
                needed = (sum(held.values()) + SPARE_BYTES) / GIB
                found.append(f"{' '.join(settings) or f'memory={name}'} ({needed:.1f} GiB)")
                break
    lower = "lower data.num_frames, data.height, data.width or train.batch_size"
    return f"use {' or '.join(found)}, or {lower}" if found else f"{lower}, or use a GPU with more memory"


@contextlib.contextmanager
def explain_out_of_memory(step: Step, plan: MemoryPlan) -> Iterator[None]:
    """Makes one line of an out-of-memory error: where it happened, what the plan holds, and what to change.

    Raises:
        TrainingError: instead of torch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        functions = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
        where = next((words for name, words in PLACES.items() if name in functions), "in a step")
        reason = str(error).split(". ")[0]
        if "encode_eval_prompts" in functions:
            # No DiT is there yet, and nothing that the plan counts.
            raise TrainingError(
                f"the GPU's memory does not suffice {where} ({reason}): use train.sample_every=0, and render with "
                "`sample` after the run."
            ) from error
        held = held_by(step, plan)
        # Any that holds clearly less: what was foretold is not what was free.
        smaller = ways_out(step, int(0.9 * sum(held.values())) + SPARE_BYTES, plan)
        raise TrainingError(
            f"the GPU's memory does not suffice {where} ({reason}); held are {describe(held)}: {smaller}."
        ) from error
