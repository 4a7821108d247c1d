"""Which kernel a run's attention has."""

from tqdm import tqdm

from mochi_tune.models.device import DTYPES, free_memory
from mochi_tune.parallel.kernels import ALL_KERNELS, KERNELS, has_kernel, preferred, time_attention
from mochi_tune.training.preflight import TrainPlan, num_tokens
from mochi_tune.training.resume import ResumePoint


def choose_attention(plan: TrainPlan, start: ResumePoint) -> str | None:
    """Returns the kernel that attention runs: the one that a resumed run had, else the fastest at the run's shape, or
    with train.deterministic=true the first that repeats.

    None on a CPU, which has one.
    """
    if plan.device.type != "cuda":
        return None
    config = plan.weights.dit_config
    heads, ring = plan.layout.split
    shape = (config.num_heads // heads, num_tokens(plan.config) // ring, config.hidden_size_x // config.num_heads)
    dtype, is_deterministic = DTYPES[plan.config.model.dtype], plan.config.train.deterministic
    known = start.state.get("environment", {}).get("attention")
    if known in KERNELS or (known in ALL_KERNELS and has_kernel(known, shape, plan.device, dtype)):
        return known
    # Of the packages that bring other versions, nothing is known of the order of their sums.
    seconds = time_attention(shape, plan.device, dtype, KERNELS if is_deterministic else ALL_KERNELS)
    # What torch keeps of it would not count as free when the memory of the run is planned.
    free_memory()
    if not seconds:
        return None
    chosen = preferred(seconds, is_deterministic)
    measured = ", ".join(f"{name} {1000 * value:.1f} ms" for name, value in seconds.items())
    tqdm.write(f"attention by {chosen}: forward and backward {measured}")
    return chosen
