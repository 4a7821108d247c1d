"""Plans the memory of a training: where the weights are, and what each block keeps for the backward pass."""

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

# Number of tokens at a time in the feed-forward layers if the blocks' inputs are offloaded.
MLP_TOKENS = 4096


@dataclass
class MemoryPlan:
    """Where the blocks are, and what they keep for the backward pass. No choice changes a result.

    Attributes:
        recompute: what each block recomputes, one of `parallel.recompute.POLICIES`; `keep_less` changes it.
        is_compiled: whether the blocks are compiled.
        is_streamed: whether the weights of the blocks are in host memory.
        offloads_inputs: whether the inputs of the blocks wait in host memory for the backward pass. The feed-forward
            layers then process MLP_TOKENS at a time.
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
        """Applies the plan to a model.

        Args:
            dit: the model with its adapter: on the CPU if it is streamed, else on the device.
            device: the device that computes.
            log: prints a line.
            before_compiling: called before each graph is compiled, which takes some seconds. It may raise an exception.
        """
        if self.offloads_inputs:
            apply_mlp_slices(dit, MLP_TOKENS)
        if self.is_compiled and self.is_streamed:
            # Compiles before streaming and checkpointing: each graph covers only what is between two copies. Without
            # streaming, the graph includes the checkpointing.
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
        """Whether any block keeps more than its input."""
        return set(self.recompute) != {"block"}

    def keep_less(self) -> None:
        """Makes all blocks of the model keep only their inputs; `apply` was called before."""
        assert self._checkpoint is not None, "the plan was not applied"
        self.recompute[:] = ["block"] * len(self.recompute)
        self._checkpoint()


def check_host_memory(needed: int, available: int, num_processes: int = 1) -> None:
    """Checks that host memory suffices for the weights and the blocks' inputs.

    Args:
        needed: bytes that each process needs.
        available: free bytes of this host.
        num_processes: number of processes of the run on this host.

    Raises:
        ConfigError: it does not suffice; the error says how much is needed.
    """
    if num_processes * needed > available:
        each = f", {needed / GIB:.1f} for each of {num_processes} processes" if num_processes > 1 else ""
        raise ConfigError(
            f"host memory has {available / GIB:.1f} GiB free, but {num_processes * needed / GIB:.1f} GiB of weights "
            f"and blocks' inputs need to stay there{each}: free some, or use memory.dit=resident, "
            f"fewer frames{', fewer processes a machine' if num_processes > 1 else ''} or model.precision=int8."
        )


# Memory presets of `train`, the fastest first: name, whether it streams the blocks, whether it offloads their inputs.
ARRANGEMENTS = (("80gb", False, False), ("16gb", True, False), ("12gb", True, True))
# What a strategy does with weights that could otherwise be in host memory.
KEEP_WEIGHTS = {"zero2": "keeps on the GPU", "zero3": "splits"}
# What the functions in the traceback of an out-of-memory error were doing, the most specific first.
PLACES = {
    "load_dit": "while the DiT was loaded",
    "encode_eval_prompts": "while T5 encoded the eval prompts",
    "_side_by_side": "while an eval video was decoded",
    "evaluate_if_due": "in an evaluation",
    "backward": "in the backward pass of a step",
}


def arrange(step: Step, dit: str, activations: str, free: int | None) -> MemoryPlan:
    """Returns the memory plan of a training: the one of the settings, or with memory.dit=auto the fastest that fits.

    Args:
        step: the sizes of a training step.
        dit: the value of `memory.dit`.
        activations: the value of `memory.activations`.
        free: free bytes of the device before the weights are loaded; None for enough.

    Raises:
        ConfigError: no plan fits; the error names settings that do.
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


def check_streaming(dit: str, strategy: str, recompute: str) -> None:
    """Refuses settings that conflict with streamed weights in a training; `sample` accepts them.

    Args:
        dit: `memory.dit`.
        strategy: `parallel.strategy`.
        recompute: `train.recompute`.
    """
    if dit not in ("stream", "offload"):
        return
    other = f"parallel.strategy={strategy} {KEEP_WEIGHTS[strategy]}" if strategy in KEEP_WEIGHTS else ""
    other = "train.recompute=none keeps" if recompute == "none" else other
    if other:
        raise ConfigError(f"{other} the weights that memory.dit={dit} takes from the GPU: leave one of them out.")


def can_stream(step: Step) -> bool:
    """Whether the weights of a block may leave the device: not with train.recompute=none, and not with ZeRO."""
    return step.recompute != "none" and step.may_stream


def held_by(step: Step, plan: MemoryPlan) -> dict[str, int]:
    """Returns the bytes on the device at the peak of a step, by purpose."""
    return step.held(plan.recompute, plan.is_streamed, plan.offloads_inputs)


def describe(held: dict[str, int]) -> str:
    """Returns a text with the sum and the parts of the held memory in GiB."""
    parts = ", ".join(f"{part} {size / GIB:.1f}" for part, size in held.items() if size >= GIB // 20)
    return f"{(sum(held.values()) + SPARE_BYTES) / GIB:.1f} GiB of the GPU ({parts}, to spare {SPARE_BYTES / GIB:.1f})"


def ways_out(step: Step, free: int, failed: MemoryPlan | None = None) -> str:
    """Returns a text with settings that make a step fit, the fastest first, or with what to reduce.

    Args:
        step: the sizes of a training step.
        free: free bytes of the device.
        failed: the plan that ran out of memory, if one did.
    """
    found = ["train.recompute=block"] if failed is not None and failed.can_keep_less else []
    smaller = replace(step, recompute="block" if step.recompute == "none" else step.recompute)
    # ZeRO-3 shards the weights, which can then not be in 8 bits.
    is_exact = step.num_shards > 1 or step.needs_exact
    precisions = (step.precision,) if is_exact else (step.precision, "int8")
    for name, is_streamed, is_offloaded in ARRANGEMENTS if step.may_stream else ARRANGEMENTS[:1]:
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
    """Replaces an out-of-memory error by one line that says where it happened, what is held, and what to change.

    Raises:
        TrainingError: replaces torch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        functions = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
        where = next((words for name, words in PLACES.items() if name in functions), "in a step")
        reason = str(error).split(". ")[0]
        if "encode_eval_prompts" in functions:
            # The DiT is not loaded yet, nor anything else in the plan.
            raise TrainingError(
                f"the GPU's memory does not suffice {where} ({reason}): use memory.t5_dtype=int8, or "
                "train.sample_every=0 and render with `sample` after the run."
            ) from error
        held = held_by(step, plan)
        # Settings that hold at least 10 % less, because the estimate was too low.
        smaller = ways_out(step, int(0.9 * sum(held.values())) + SPARE_BYTES, plan)
        raise TrainingError(
            f"the GPU's memory does not suffice {where} ({reason}); held are {describe(held)}: {smaller}."
        ) from error
