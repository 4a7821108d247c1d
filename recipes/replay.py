"""Recomputes one step of a run, without its update: the step that a run refused to make, sample by sample."""

import contextlib
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mochi_tune.adapters.lora import apply_lora, linear_shapes, lora_parameters
from mochi_tune.config.load import RunConfig, load_config, weights_paths
from mochi_tune.config.lora import lora_settings
from mochi_tune.config.sources import buckets_by_source
from mochi_tune.data.cache import open_cache
from mochi_tune.data.dataset import LatentDataset, collate
from mochi_tune.errors import CheckpointError, DataError, some
from mochi_tune.files import load_tensors, read_json
from mochi_tune.models.device import DTYPES, find_device
from mochi_tune.models.dit import AsymmDiT, DiTConfig
from mochi_tune.parallel.kernels import ALL_KERNELS, attention_by, has_kernel
from mochi_tune.parallel.modulation import HostModulation
from mochi_tune.parallel.precision import shrink_block
from mochi_tune.parallel.recompute import apply_activation_checkpointing
from mochi_tune.recipes.train_lora import make_inputs
from mochi_tune.training.accelerator import check_adapter_fits
from mochi_tune.training.draws import KeyedDraws, key_seed
from mochi_tune.training.guards import is_finite
from mochi_tune.training.objective import velocity_loss
from mochi_tune.training.preflight import num_tokens
from mochi_tune.weights.folder import WeightsFolder


@dataclass(frozen=True)
class Sample:
    """One sample of the step that was made again.

    Attributes:
        clip: its path.
        sigma: its noise level.
        loss: its own.
        grad_norm: of its own gradient.
        origin: where the first number that is not finite came up, "" if none did; in the forward pass it is noted of
            every sample of a micro-batch.
    """

    clip: str
    sigma: float
    loss: float
    grad_norm: float
    origin: str


@dataclass(frozen=True)
class Replay:
    """A step that was made again.

    Attributes:
        recorded: what the run wrote about the step.
        samples: one after the other.
        loss: of the step.
        grad_norm: of the step, of the mean over its samples.
        attention: the kernel that attention runs, or those that torch chooses from; and which one the run had, if it
            is not here.
    """

    recorded: dict
    samples: list[Sample]
    loss: float
    grad_norm: float
    attention: str

    @property
    def is_finite(self) -> bool:
        """Whether the step's numbers are finite this time."""
        return is_finite(self.loss, self.grad_norm)


def main(bundle: Path, device_name: str) -> Replay:
    """Makes the step of a bundle again, in one process.

    Args:
        bundle: folder that a run wrote when it refused a step.
        device_name: "cpu", "cuda" or "auto".

    Raises:
        MochiTuneError: the bundle is not whole, or its clips or weights are not there any more.
    """
    if not (bundle / "step.json").is_file():
        others = sorted(str(path.parent) for path in bundle.parent.glob("*/step.json"))
        there = f"those there are {some(others)}" if others else "a run writes RUN/bundles/step_NUMBER"
        raise CheckpointError(f"{bundle} is no bundle of a refused step, which has a step.json: {there}.")
    recorded = read_json(bundle / "step.json")
    needed = ("step", "draws", "clips", "loss", "grad_norm")
    if missing := [key for key in needed if not recorded.get(key) and recorded.get(key) != 0]:
        raise CheckpointError(f"{bundle / 'step.json'} has no {', '.join(missing)}: it is no bundle of a run.")
    config = load_config(str(bundle / "config.yaml"), [])
    train, num_micro_batches = config.train, recorded["draws"]["num_micro_batches"]
    draws = KeyedDraws(config.seed, train.batch_size, num_micro_batches, train.caption_dropout, train.sigma_stratified)
    device = find_device(device_name)
    # Bundles of before these were recorded have none of them.
    identity = recorded.get("identity", {})
    dataset, places = find_clips(config, recorded["clips"], identity.get("cache"))
    check_base(config, identity.get("base"))
    dit = load_adapted(config, bundle, device, recorded.get("host_modulation", False))
    kernel, attention = choose_kernel(recorded.get("attention"), config, dit.config, device)
    parameters = lora_parameters(dit)
    watch = NonFiniteWatch(dit)
    # After the watch, which then sees the embedders that it copies, too.
    host_modulation = HostModulation(dit)
    done, count = [], draws.num_micro_batches * draws.batch_size
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for number in range(draws.num_micro_batches):
        first = number * draws.batch_size
        rows = places[first : first + draws.batch_size]
        captions = [draws.caption(recorded["step"], first + r, dataset.num_captions(i)) for r, i in enumerate(rows)]
        batch = collate([dataset.load(i, caption) for i, caption in zip(rows, captions, strict=True)])
        drawn = draws.draw(recorded["step"], number, batch["mean"].shape[1:])
        watch.origin = ""
        with attention_by(kernel) if kernel else contextlib.nullcontext():
            inputs = make_inputs(train, host_modulation, batch, drawn).moved(lambda tensor: tensor.to(device))
            torch.manual_seed(inputs.dropout_seed)
            velocity = dit(inputs.noisy, inputs.sigma, inputs.prompt, inputs.mask, inputs.modulation)
            losses = velocity_loss(velocity, inputs.target) * inputs.weight
            on_the_way = watch.origin
            for row, loss in enumerate(losses):
                watch.origin = on_the_way
                gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
                norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
                done.append(Sample(inputs.clips[row], inputs.sigma[row].item(), loss.item(), norm, watch.origin))
                for sum_so_far, gradient in zip(total.values(), gradients, strict=True):
                    sum_so_far += gradient / count
    loss = sum(each.loss for each in done) / len(done)
    grad_norm = torch.stack([gradient.norm() for gradient in total.values()]).norm().item()
    return Replay(recorded, done, loss, grad_norm, attention)


def check_base(config: RunConfig, of_run: str | None) -> None:
    """Refuses another base than that of the run.

    Raises:
        CheckpointError: the weights are others by now.
    """
    here = WeightsFolder(weights_paths(config)).base_identity()
    if of_run not in (None, here):
        raise CheckpointError(
            f"{config.model.weights} has another base than the run's: the base is {here[:12]} here, {of_run[:12]} "
            "there: put the run's weights back to replay its step."
        )


def find_clips(config: RunConfig, paths: list[str], of_run: str | None) -> tuple[LatentDataset, list[int]]:
    """Returns the cache's clips and the numbers of those of a step.

    Args:
        config: of the run.
        paths: the clips.
        of_run: fingerprint of the run's cache; None: none was recorded.

    Raises:
        DataError: the cache is another one by now.
    """
    cache = open_cache(Path(config.data.cache), buckets_by_source(config.data))
    dataset = LatentDataset(cache)
    numbers = {name: number for number, name in enumerate(dataset.cache.rows.column("sample_id"))}
    if gone := sorted(set(paths) - numbers.keys()):
        raise DataError(
            f"the cache {config.data.cache} has no clip {gone[0]} any more: put it back to replay its step."
        )
    if of_run not in (None, cache.fingerprint):
        raise DataError(
            f"the cache {config.data.cache} has other clips or captions than the run's: prepare it with the run's "
            "settings to replay its step."
        )
    return dataset, [numbers[path] for path in paths]


def load_adapted(config: RunConfig, bundle: Path, device: torch.device, has_host_modulation: bool) -> AsymmDiT:
    """Loads the base with the adapter as it was before the step, in training mode."""
    weights = WeightsFolder(weights_paths(config))
    weights.check(["dit"])
    shrink = functools.partial(
        shrink_block,
        precision=config.model.precision or "bf16",
        read_fp8=weights.read_fp8,
        has_host_modulation=has_host_modulation,
    )
    saved = load_tensors(bundle / "adapter.safetensors")
    dit = weights.load_dit(device, DTYPES[config.model.dtype], shrink)
    layers = lora_settings(config.lora, linear_shapes(dit))
    apply_lora(dit, layers, key_seed(config.seed, "adapter"), config.lora.dora)
    if config.train.recompute != "none":
        apply_activation_checkpointing(dit, ["block"] * len(dit.blocks))
    parameters = lora_parameters(dit)
    check_adapter_fits(parameters, saved)
    for name, parameter in parameters.items():
        parameter.data.copy_(saved[name])
    return dit.train()


class NonFiniteWatch:
    """Remembers where the first number that is not finite comes up, on the way there or on the way back."""

    def __init__(self, dit: nn.Module) -> None:
        self.origin = ""
        for name, module in dit.named_modules():
            if name:
                module.register_forward_hook(lambda _module, _inputs, output, name=name: self._look(name, output))

    def _look(self, name: str, output: object) -> None:
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self._note(f"the output of {name}", tensor)
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: self._note(f"the gradient of the output of {name}", gradient))

    def _note(self, where: str, tensor: torch.Tensor) -> None:
        # Detached: a checkpointed block counts what is kept for the backward pass, and this is no part of it.
        if not self.origin and not bool(tensor.detach().isfinite().all()):
            self.origin = where


def choose_kernel(
    of_run: str | None, config: RunConfig, dit: DiTConfig, device: torch.device
) -> tuple[str | None, str]:
    """Returns the kernel that attention runs, None for torch's choice, and words for it.

    Args:
        of_run: the kernel of the run; None: torch's choice, or none was recorded.
        config: of the run.
        dit: its sizes.
        device: of the replay.
    """
    shape = (dit.num_heads, num_tokens(config), dit.hidden_size_x // dit.num_heads)
    if of_run in ALL_KERNELS and has_kernel(of_run, shape, device, DTYPES[config.model.dtype]):
        return of_run, f"{of_run}, as in the run"
    here = "the CPU's kernel" if device.type == "cpu" else f"what torch chooses of {enabled_kernels()}"
    return None, here if of_run is None else f"{here}: the run's, {of_run}, does not run here"


def enabled_kernels() -> str:
    """Returns the kernels that torch may choose from on a GPU."""
    backends = torch.backends.cuda
    enabled = {
        "flash": backends.flash_sdp_enabled(),
        "efficient": backends.mem_efficient_sdp_enabled(),
        "math": backends.math_sdp_enabled(),
        "cudnn": backends.cudnn_sdp_enabled(),
    }
    return ", ".join(name for name, is_on in enabled.items() if is_on)
