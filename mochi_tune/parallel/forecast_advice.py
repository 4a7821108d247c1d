"""Advice for a stage of a run that does not fit a GPU: settings that fit by the same estimate, else what to reduce.

For `train`, `training.memory_plan` gives this advice.
"""

from itertools import product

from mochi_tune.errors import ConfigError
from mochi_tune.models.dit import DiTConfig
from mochi_tune.models.latents import TEMPORAL_FACTOR
from mochi_tune.models.text_encoder import T5_DTYPES
from mochi_tune.models.vae_streaming import check_tiles
from mochi_tune.parallel.forecast import (
    GIB,
    SAMPLING,
    SPARE_BYTES,
    encoding_held,
    fits,
    text_held,
)
from mochi_tune.parallel.forecast_sampling import decoding_held, sampling_held

# Maximum tiles over rows and over columns: more of them would consist mostly of overlap.
MOST_TILES = 8
LARGER = "a GPU with more memory"


def for_captions(free: int) -> str:
    """Returns what to set if T5 does not fit in `prepare`.

    Args:
        free: free bytes of the device, here and in the functions below.
    """
    if names := [name for name, dtype in T5_DTYPES.items() if fits(text_held(dtype.itemsize), free)]:
        return f"prepare: use memory.t5_dtype={' or '.join(names)}"
    least = (sum(text_held(1).values()) + SPARE_BYTES) / GIB
    return f"prepare: T5 takes {least:.1f} GiB even with memory.t5_dtype=int8: prepare on {LARGER}, or with device=cpu"


def for_clips(num_frames: int, height: int, width: int, dtype_bytes: int, free: int) -> str:
    """Returns what to set if clips of this size do not fit in `prepare`."""
    lengths = range(1, num_frames, TEMPORAL_FACTOR)
    fitting = [frames for frames in lengths if fits(encoding_held(frames, height, width, dtype_bytes), free)]
    fewer = f"use clips of at most {fitting[-1]} frames, or " if fitting else ""
    return f"prepare: {fewer}lower data.height or data.width, or prepare on {LARGER}"


def for_prompts(dtype_bytes: int, free: int) -> str:
    """Returns what to set if T5 does not fit in `sample` and for the eval prompts of `train`."""
    if dtype_bytes > 2 and fits(text_held(2), free):
        return "sample: use model.dtype=bf16"
    if fits(text_held(1), free):
        return "sample: use memory.t5_dtype=int8"
    needed = (sum(text_held(1).values()) + SPARE_BYTES) / GIB
    return (
        f"sample: T5 takes {needed:.1f} GiB even with memory.t5_dtype=int8: use {LARGER}, or a sample.prompt_cache "
        "filled on one; train: the same for eval prompts, or use train.sample_every=0"
    )


def for_denoising(config: DiTConfig, num_tokens: int, dtype_bytes: int, free: int, is_compiled: bool = True) -> str:
    """Returns what to set if the DiT does not fit in `sample`; `is_compiled` is that of `sampling_held`."""
    held = {
        name: sampling_held(config, num_tokens, dit, dtype_bytes, is_compiled=is_compiled)
        for name, dit in SAMPLING.items()
    }
    fitting = [name for name in held if fits(held[name], free)]
    if not fitting:
        return f"sample: lower sample.num_frames, sample.height or sample.width, or use more GPUs or {LARGER}"
    # Only the first of equal presets. `auto` chooses the faster of resident and offload, which give the same numbers.
    chosen = [name for name in fitting if SAMPLING[name] not in [SAMPLING[n] for n in fitting[: fitting.index(name)]]]
    if any(SAMPLING[name] in ("resident", "offload") for name in fitting):
        chosen.append("auto")
    return f"sample: use {' or '.join(f'memory={name}' for name in chosen)}"


def for_decoding(height: int, width: int, dtype_bytes: int, free: int) -> str:
    """Returns what to set if the decoder does not fit: the fewest tiles that do."""
    numbers = range(1, MOST_TILES + 1)
    counts = sorted(product(numbers, numbers), key=lambda tiles: (tiles[0] * tiles[1], -min(tiles)))
    for tiles in counts:
        try:
            check_tiles(tiles, height, width)
        except ConfigError:
            continue
        if fits(decoding_held(height, width, tiles, dtype_bytes), free):
            return f"sample: use memory.tiles=[{tiles[0]},{tiles[1]}]"
    return f"sample: lower sample.height or sample.width, or decode on {LARGER}"
