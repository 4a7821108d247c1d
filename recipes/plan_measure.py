"""Runs a real training step where a GPU, the weights and a cache are at hand, to compare it with the plan."""

import contextlib
import functools
import sys
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from mochi_tune.adapters.lora import apply_lora
from mochi_tune.config.load import weights_paths
from mochi_tune.config.schema import RunConfig
from mochi_tune.models.device import DTYPES, peak_gib, reset_peak
from mochi_tune.parallel.kernels import attention_by, deterministic_kernels
from mochi_tune.parallel.modulation import HostModulation
from mochi_tune.recipes.bench import make_step
from mochi_tune.recipes.measuring import timed
from mochi_tune.training.choose_attention import choose_attention
from mochi_tune.training.preflight import check
from mochi_tune.training.resume import ResumePoint
from mochi_tune.weights.folder import WeightsFolder


@dataclass(frozen=True)
class Measured:
    """A training step measured on this machine: its seconds, those of the first step, and the peak memory in GiB."""

    seconds: float
    first_seconds: float
    peak_gib: float


def can_measure(config: RunConfig) -> bool:
    """Whether this machine has a GPU, the weights and a cache for a training step."""
    is_here = config.device != "cpu" and torch.cuda.is_available()
    return is_here and WeightsFolder(weights_paths(config)).has("dit") and (Path(config.data.cache) / "data").exists()


def measure(config: RunConfig) -> Measured:
    """Runs two training steps with the weights and clips of this machine; measures both.

    Raises:
        MochiTuneError: as `train`.
    """
    plan = check(config, 1)
    device = plan.device
    with contextlib.ExitStack() as stack:
        # The kernels of `train`, of operations and of attention.
        if config.train.deterministic:
            stack.enter_context(deterministic_kernels())
        if attention := choose_attention(plan, ResumePoint()):
            stack.enter_context(attention_by(attention))
        where = "cpu" if plan.memory.is_streamed else device
        dit = plan.weights.load_dit(where, DTYPES[config.model.dtype], plan.shrink_block)
        host_modulation = HostModulation(dit)
        apply_lora(dit, plan.layers, 0, config.lora.dora)
        plan.memory.apply(dit, device, functools.partial(tqdm.write, file=sys.stderr))
        dit.train()
        # Any caption will do: all have about the same length.
        prompt = plan.dataset[0]["prompt_embeds"][None].expand(config.train.batch_size, -1, -1)
        step = make_step(dit, host_modulation, prompt, astuple(plan.largest), device)
        reset_peak(device)
        stack.enter_context(plan.explains_out_of_memory())
        first, _ = timed(step, 1, device, num_warm_up=0)
        seconds, peak = timed(step, 1, device, num_warm_up=0)
    return Measured(seconds, first, max(peak, peak_gib(device)))
