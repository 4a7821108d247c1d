"""Renders prompts to videos, with or without adapters, on one device or many: T5, DiT and VAE in turn."""

import contextlib
import functools
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from mochi_tune.adapters.files import Adapter, check_adapter, load_adapter
from mochi_tune.adapters.lora import linear_shapes, switch_adapters
from mochi_tune.config.load import RunConfig, weights_folder
from mochi_tune.errors import ConfigError
from mochi_tune.files import file_sha256, make_writable_folder, write_whole
from mochi_tune.models.device import DTYPES, find_device, free_memory, peak_gib, reset_peak
from mochi_tune.models.dit import DiTConfig
from mochi_tune.models.latents import FPS, TOKEN_PIXELS, num_latent_frames
from mochi_tune.models.text_encoder import MAX_TOKENS, TextEncoder
from mochi_tune.models.vae_streaming import WHOLE, check_tiles
from mochi_tune.parallel.mesh import Layout, Mesh, choose_layout
from mochi_tune.sampling.prompt_cache import PromptCache
from mochi_tune.sampling.render import choose_guide, decoded_frames, latent_states, prepare_dit
from mochi_tune.sampling.requests import Request, read_requests
from mochi_tune.sampling.sampler import draw_noise
from mochi_tune.sampling.video import write_video
from mochi_tune.training.interrupts import StopSignal
from mochi_tune.weights.load import base_identity, check_weights, fingerprint, load_decoder, load_dit, meta_dit


@dataclass(frozen=True)
class Job:
    """What is to be rendered, checked as far as it can be before a weight is read."""

    folder: Path
    requests: list[Request]
    adapters: list[tuple[Path, float, Adapter]]
    identity: str
    dit: DiTConfig
    layout: Layout


def main(config: RunConfig) -> Iterator[Path]:
    """Renders what `config.sample` asks for, yielding each video when it is there, its settings beside it as .json.

    Of several processes each yields those that it writes.

    Raises:
        KeyboardInterrupt: it was asked to stop; what was finished by then has been written and yielded.
    """
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    job, device, dtype = check(config, num_ranks), find_device(config.device), DTYPES[config.model.dtype]
    prompt_cache = Path(config.sample.prompt_cache).expanduser()
    for folder in {prompt_cache, *(request.video.parent for request in job.requests)}:
        make_writable_folder(folder)
    mesh = Mesh(job.layout, device, config.parallel.timeout_seconds) if num_ranks > 1 else None
    mine = job.requests if mesh is None else job.requests[mesh.data_rank :: job.layout.data]
    is_writer, is_quiet = mesh is None or mesh.is_writer, mesh is not None and dist.get_rank() > 0
    usage = Usage(device, is_quiet)
    if not is_quiet:
        tell("; ".join(f"adapter {path} x {strength}" for path, strength, _ in job.adapters) or "no adapter: the base")
        if mesh is not None:
            tell(f"{num_ranks} processes: {job.layout}")

    with usage.stage("text"):
        features = encode_prompts(job, device, dtype, prompt_cache)
    with usage.stage("sample"):
        latents = render(config, job, mine, features, device, dtype, mesh, is_quiet)
    with usage.stage("decode"):
        decoder = load_decoder(job.folder, device, dtype)
        tiles = WHOLE if config.memory.tiles is None else tuple(config.memory.tiles)
        finished = list(zip(mine, latents, strict=False))
        for request, states in tqdm(finished, "decode", leave=False, disable=is_quiet):
            chunks = side_by_side([decoded_frames(decoder, state, mesh, tiles) for state in states.values()])
            if not is_writer:
                assert not list(chunks), "only the writer has frames"
                continue
            # Another process may have taken the name since it was chosen; what goes beside the video follows it.
            request = replace(request, video=write_video(request.video, chunks, may_replace=False))
            save_latents(config, request, states)
            save_settings(config, job, request, list(states), usage)
            yield request.video
    if len(finished) < len(mine):
        raise KeyboardInterrupt


def check(config: RunConfig, num_ranks: int) -> Job:
    """Checks everything that can be refused before a weight is read; seconds.

    Raises:
        MochiTuneError: of any kind, in one line.
    """
    folder = weights_folder(config)
    requests = read_requests(config.sample, config.data, config.seed, Path(config.run_dir))
    for request in requests if config.memory.tiles is not None else []:
        check_tiles(config.memory.tiles, request.height, request.width)
    check_weights(folder, ["text_encoder", "dit", "decoder"])
    identity, skeleton = base_identity(folder), meta_dit(folder)
    shapes = linear_shapes(skeleton)
    adapters = []
    for path, strength in find_adapters(config):
        adapter = load_adapter(path)
        check_adapter(adapter, shapes, identity)
        adapters.append((path, strength, adapter))
    if config.sample.compare and not any(strength for _, strength, _ in adapters):
        raise ConfigError(
            "sample.compare=base has no adapter to compare with: name adapter=FILE, of a strength other than 0."
        )
    tokens = max(num_latent_frames(r.num_frames) * r.height * r.width // TOKEN_PIXELS**2 for r in requests)
    parallel = config.parallel
    asked = {"data": parallel.data, "guidance": parallel.guidance, "context": parallel.context}
    guided = any(r.is_guided for r in requests)
    layout = choose_layout(num_ranks, skeleton.config, len(requests), tokens, guided, asked)
    if config.memory.dit == "shard" and layout.guidance * layout.context == 1:
        raise ConfigError(
            "memory.dit=shard splits the weights over the processes of one video, and here each has a video of its "
            "own: use parallel.num_processes=2 parallel.context=2, or memory.dit=offload."
        )
    return Job(folder, requests, adapters, identity, skeleton.config, layout)


def encode_prompts(job: Job, device: torch.device, dtype: torch.dtype, cache_folder: Path) -> dict[str, Tensor]:
    """Returns the features of every distinct prompt, on the CPU; the first rank encodes what no run has yet."""
    prompts = list(dict.fromkeys(text for r in job.requests for text in (r.prompt, r.negative_prompt)))
    features: dict[str, Tensor] = {}
    if not dist.is_initialized() or dist.get_rank() == 0:
        cache = PromptCache(cache_folder, fingerprint(job.folder, "text_encoder"), dtype)
        features = {prompt: found for prompt in prompts if (found := cache.get(prompt)) is not None}
        new = [prompt for prompt in prompts if prompt not in features]
        if new:
            encoder = TextEncoder.load(job.folder, device, dtype)
            for prompt in tqdm(new, "prompts", leave=False):
                num_tokens = encoder.count_tokens(prompt)
                if num_tokens > MAX_TOKENS:
                    tell(f"{prompt[:40]}...: {num_tokens} tokens, only the first {MAX_TOKENS} are used")
                features[prompt] = encoder.encode([prompt])[0].cpu()
                cache.put(prompt, features[prompt])
            del encoder
            free_memory()
    if dist.is_initialized():
        shared = [features]
        dist.broadcast_object_list(shared, src=0)
        features = shared[0]
    return features


def render(
    config: RunConfig,
    job: Job,
    requests: list[Request],
    features: dict[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
    mesh: Mesh | None,
    is_quiet: bool,
) -> list[dict[str, Tensor]]:
    """Renders requests to latents on the CPU, "base" and "adapted" or one of them; what is finished at a Ctrl-C."""
    live = {f"adapter_{i}": (a.layers, strength) for i, (_, strength, a) in enumerate(job.adapters) if strength}
    load = functools.partial(load_dit, job.folder)
    dit = prepare_dit(load, device, dtype, config.memory.dit, live, mesh, config.sample.compile)
    kinds = (["base"] if config.sample.compare or not live else []) + (["adapted"] if live else [])
    guide = choose_guide(config.memory.dit, mesh)
    finished = []
    with StopSignal() as stop:
        for number, request in enumerate(requests, 1):
            noise = draw_noise(request.seed, request.num_frames, request.height, request.width)
            if mesh is None or mesh.is_writer:
                tell(f"{request.video.name}: noise {tensor_sha256(noise)}")
            prompt, negative = features[request.prompt], features[request.negative_prompt]
            states: dict[str, Tensor] = {}
            for kind in kinds:
                switch_adapters(dit, kind == "adapted")
                steps = latent_states(dit, noise, prompt, negative, request.settings, guide)
                label = f"{number}/{len(requests)} {kind}" if len(kinds) > 1 else f"{number}/{len(requests)}"
                for state in tqdm(steps, label, request.settings.steps, unit="step", leave=False, disable=is_quiet):
                    states[kind] = state
                    if anyone(stop.received, mesh):
                        if not is_quiet:
                            whose = "" if mesh is None or mesh.layout.data == 1 else " of this process"
                            tell(f"stopped: of {len(requests)} videos{whose}, {len(finished)} are finished and kept")
                        return finished
            finished.append({kind: state.cpu() for kind, state in states.items()})
    del dit
    free_memory()
    return finished


def tell(text: str) -> None:
    """Writes a line beside the progress bars."""
    tqdm.write(text, file=sys.stderr)


def anyone(flag: int, mesh: Mesh | None) -> bool:
    """Whether a flag is up on any rank of this video, so that all of them stop at the same step."""
    if mesh is None:
        return bool(flag)
    flags = torch.tensor([int(bool(flag))])
    dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=mesh.video_group)
    return bool(flags.item())


def side_by_side(videos: list[Iterator[Tensor]]) -> Iterator[Tensor]:
    """Joins the frames (F, H, W, 3) of several videos of one length, left to right."""
    for chunks in zip(*videos, strict=True):
        yield torch.cat(chunks, dim=2)


def tensor_sha256(tensor: Tensor) -> str:
    """Returns the hex sha256 of a tensor's bytes."""
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def save_latents(config: RunConfig, request: Request, states: dict[str, Tensor]) -> None:
    """Writes a video's latents beside it, where they are asked for: "latents", and "base" when it is compared with."""
    if config.sample.save_latents:
        from safetensors.torch import save

        named = {"latents": states[list(states)[-1]]} | ({"base": states["base"]} if len(states) > 1 else {})
        write_whole(request.video.with_suffix(".safetensors"), save(named, {"space": "dit", "layout": "B C T h w"}))


def save_settings(config: RunConfig, job: Job, request: Request, kinds: list[str], usage: "Usage") -> None:
    """Writes a video's settings as .json beside it."""
    noise = draw_noise(request.seed, request.num_frames, request.height, request.width)
    settings = {key: value for key, value in asdict(request.settings).items() if key != "own_sigmas" or value}
    record = {
        **{key: getattr(request, key) for key in ("prompt", "negative_prompt", "seed")},
        **{key: getattr(request, key) for key in ("num_frames", "height", "width")},
        "fps": FPS,
        "sampler": settings,
        "adapters": [
            {"file": str(path), "sha256": file_sha256(path), "strength": strength} for path, strength, _ in job.adapters
        ],
        "side_by_side": kinds,
        "model": config.model.name,
        "base_fingerprint": job.identity,
        "dtype": config.model.dtype,
        "memory": config.memory.model_dump(),
        "layout": asdict(job.layout),
        "device": torch.cuda.get_device_name() if usage.device.type == "cuda" else "cpu",
        "noise_sha256": tensor_sha256(noise),
        "versions": {name: version(name) for name in ("mochi-tune", "torch")},
        **usage.so_far(),
    }
    write_whole(request.video.with_suffix(".json"), json.dumps(record, indent=1).encode() + b"\n")


class Usage:
    """Seconds and peak memory of each stage: of the GPU's, or on a CPU of the process until then."""

    def __init__(self, device: torch.device, is_quiet: bool) -> None:
        self.device = device
        self.is_quiet = is_quiet
        self.started: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self.peak_gib: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures what runs inside, and tells."""
        reset_peak(self.device)
        self.started = {name: time.perf_counter()}
        yield
        self.so_far()
        if not self.is_quiet:
            tell(f"{name}: {self.seconds[name]:.1f} s, peak {self.peak_gib[name]} GiB")

    def so_far(self) -> dict[str, dict[str, float]]:
        """Returns the seconds and the peak of each stage, the one under way included."""
        for name, started in self.started.items():
            self.seconds[name] = round(time.perf_counter() - started, 3)
            self.peak_gib[name] = peak_gib(self.device)
        return {"seconds": dict(self.seconds), "peak_gib": dict(self.peak_gib)}


def find_adapters(config: RunConfig) -> list[tuple[Path, float]]:
    """Returns the adapter files and their strengths; the run's own adapter where none is named and there is one.

    Raises:
        ConfigError: not one strength an adapter, or a strength that is no number.
    """
    named, strengths = config.sample.adapter, config.sample.adapter_strength
    if named is None:
        own = Path(config.run_dir) / "adapter.safetensors"
        named = [own] if own.exists() else []
    paths = [Path(str(path)) for path in (named if isinstance(named, list) else [named])]
    for strength in strengths if isinstance(strengths, list) else [strengths]:
        if isinstance(strength, bool) or not isinstance(strength, int | float):
            raise ConfigError(f"adapter_strength={strength} is not a number: use for example 0.8.")
    if not paths and strengths not in (0, 1):
        raise ConfigError(f"adapter_strength={strengths} has no adapter: name one with adapter=FILE, or train first.")
    if not isinstance(strengths, list):
        strengths = [strengths] * len(paths)
    if len(strengths) != len(paths):
        raise ConfigError(
            f"adapter_strength has {len(strengths)} values for {len(paths)} adapters: give one for all or one each."
        )
    return list(zip(paths, map(float, strengths), strict=True))
