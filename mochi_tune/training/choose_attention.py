"""Chooses the attention kernel of a run."""

from tqdm import tqdm

from mochi_tune.models.device import DTYPES, free_memory
from mochi_tune.parallel.kernels import ALL_KERNELS, KERNELS, has_kernel, preferred, time_attention
from mochi_tune.training.preflight import TrainPlan
from mochi_tune.training.resume import ResumePoint


def choose_attention(plan: TrainPlan, start: ResumePoint) -> str | None:
    """Returns the attention kernel of a run, or None on a CPU, which has only one.

    A resumed run keeps its kernel. A new run measures all kernels at its shape and takes the fastest, or with
    train.deterministic=true the first deterministic one.
    """
    if plan.device.type != "cuda":
        return None
    config = plan.weights.dit_config
    heads, ring = plan.layout.split
    shape = (config.num_heads // heads, plan.largest.num_tokens // ring, config.hidden_size_x // config.num_heads)
    dtype, is_deterministic = DTYPES[plan.config.model.dtype], plan.config.train.deterministic
    known = start.state.get("environment", {}).get("attention")
    if known in KERNELS or (known in ALL_KERNELS and has_kernel(known, shape, plan.device, dtype)):
        return known
    # Kernels of other packages may sum in any order.
    seconds = time_attention(shape, plan.device, dtype, KERNELS if is_deterministic else ALL_KERNELS)
    # Memory that torch has cached would not count as free when the memory of the run is planned.
    free_memory()
    if not seconds:
        return None
    chosen = preferred(seconds, is_deterministic)
    measured = ", ".join(f"{name} {1000 * value:.1f} ms" for name, value in seconds.items())
    tqdm.write(f"attention by {chosen}: forward and backward {measured}")
    return chosen
