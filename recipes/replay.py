"""Recomputes a step that a run refused, sample by sample and without its update."""

import contextlib
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mochi_tune.adapters.lora import apply_lora, linear_shapes, lora_parameters
from mochi_tune.config.load import RunConfig, load_config, weights_paths
from mochi_tune.config.lora import lora_settings
from mochi_tune.config.sources import buckets_by_source, largest_bucket
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
from mochi_tune.weights.folder import WeightsFolder


@dataclass(frozen=True)
class Sample:
    """A sample of the recomputed step.

    Attributes:
        clip: path of the clip.
        sigma: noise level.
        loss: loss of this sample.
        grad_norm: norm of the gradient of this loss.
        origin: where the first number that is not finite appeared, "" if there is none. One of the forward pass is
            reported for every sample of the micro-batch.
    """

    clip: str
    sigma: float
    loss: float
    grad_norm: float
    origin: str


@dataclass(frozen=True)
class Replay:
    """A recomputed step.

    Attributes:
        recorded: what the run wrote about the step.
        samples: the samples of the step, in order.
        loss: mean loss of the samples.
        grad_norm: norm of the mean gradient of the samples.
        attention: a text with the attention kernel, or the kernels that torch chooses from, and with the kernel of the
            run if that is not available.
    """

    recorded: dict
    samples: list[Sample]
    loss: float
    grad_norm: float
    attention: str

    @property
    def is_finite(self) -> bool:
        """Whether the recomputed loss and gradient norm are finite."""
        return is_finite(self.loss, self.grad_norm)


def main(bundle: Path, device_name: str) -> Replay:
    """Recomputes the step of a bundle in one process.

    Args:
        bundle: the folder that a run wrote when it refused a step.
        device_name: "cpu", "cuda" or "auto".

    Raises:
        MochiTuneError: the bundle is incomplete, or its clips or weights are no longer available.
    """
    if not (bundle / "step.json").is_file():
        others = sorted(str(path.parent) for path in bundle.parent.glob("*/step.json"))
        there = f"use one of {some(others)}" if others else "name a folder RUN_DIR/bundles/step_NNNNNN"
        raise CheckpointError(f"{bundle} is not a bundle of a refused step, which has a step.json: {there}.")
    recorded = read_json(bundle / "step.json")
    needed = ("step", "draws", "clips", "loss", "grad_norm")
    if missing := [key for key in needed if not recorded.get(key) and recorded.get(key) != 0]:
        raise CheckpointError(f"{bundle / 'step.json'} has no {', '.join(missing)}: it is not a bundle of a run.")
    config = load_config(str(bundle / "config.yaml"), [])
    train, num_micro_batches = config.train, recorded["draws"]["num_micro_batches"]
    draws = KeyedDraws(config.seed, train.batch_size, num_micro_batches, train.caption_dropout, train.sigma_stratified)
    device = find_device(device_name)
    # Bundles of older versions have no identity.
    identity = recorded.get("identity", {})
    dataset, places = find_clips(config, recorded["clips"], identity.get("cache"))
    check_base(config, identity.get("base"))
    dit = load_adapted(config, bundle, device, recorded.get("host_modulation", False))
    kernel, attention = choose_kernel(recorded.get("attention"), config, dit.config, device)
    parameters = lora_parameters(dit)
    watch = NonFiniteWatch(dit)
    # Created after the watch, so that the copies of the embedders have its hooks too.
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
    """Checks that the base is the one of the run.

    Raises:
        CheckpointError: the weights have changed.
    """
    here = WeightsFolder(weights_paths(config)).base_identity()
    if of_run not in (None, here):
        raise CheckpointError(
            f"{config.model.weights} has another base than the run: its fingerprint is {here[:12]}, not {of_run[:12]}: "
            "restore the weights of the run to replay its step."
        )


def find_clips(config: RunConfig, paths: list[str], of_run: str | None) -> tuple[LatentDataset, list[int]]:
    """Returns the clips of the cache and the indices of the clips of a step.

    Args:
        config: the settings of the run.
        paths: the clips of the step.
        of_run: fingerprint of the run's cache; None if it was not recorded.

    Raises:
        DataError: the cache has changed.
    """
    cache = open_cache(Path(config.data.cache), buckets_by_source(config.data))
    dataset = LatentDataset(cache)
    numbers = {name: number for number, name in enumerate(dataset.cache.rows.column("sample_id"))}
    if gone := sorted(set(paths) - numbers.keys()):
        raise DataError(
            f"the cache {config.data.cache} no longer has the clip {gone[0]}: restore it to replay the step."
        )
    if of_run not in (None, cache.fingerprint):
        raise DataError(
            f"the cache {config.data.cache} has other clips or captions than the run's: prepare it with the run's "
            "settings to replay its step."
        )
    return dataset, [numbers[path] for path in paths]


def load_adapted(config: RunConfig, bundle: Path, device: torch.device, has_host_modulation: bool) -> AsymmDiT:
    """Loads the base with the adapter before the step, in training mode."""
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
    """Records where the first number that is not finite appears in the forward or the backward pass."""

    def __init__(self, dit: nn.Module) -> None:
        self.origin = ""
        for name, module in dit.named_modules():
            if name:
                module.register_forward_hook(lambda _module, _inputs, output, name=name: self._check(name, output))

    def _check(self, name: str, output: object) -> None:
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self._record(f"the output of {name}", tensor)
                if tensor.requires_grad:
                    tensor.register_hook(
                        lambda gradient: self._record(f"the gradient of the output of {name}", gradient)
                    )

    def _record(self, where: str, tensor: torch.Tensor) -> None:
        # Detached, because activation checkpointing counts the tensors that are kept for the backward pass.
        if not self.origin and not bool(tensor.detach().isfinite().all()):
            self.origin = where


def choose_kernel(
    of_run: str | None, config: RunConfig, dit: DiTConfig, device: torch.device
) -> tuple[str | None, str]:
    """Returns the attention kernel, or None if torch chooses it, and a text that describes it.

    Args:
        of_run: the kernel of the run; None if torch chose it or none was recorded.
        config: the settings of the run.
        dit: the sizes of the model.
        device: the device of the replay.
    """
    shape = (dit.num_heads, largest_bucket(config.data).num_tokens, dit.hidden_size_x // dit.num_heads)
    if of_run in ALL_KERNELS and has_kernel(of_run, shape, device, DTYPES[config.model.dtype]):
        return of_run, f"{of_run}, as in the run"
    here = "the CPU's kernel" if device.type == "cpu" else f"what torch chooses of {enabled_kernels()}"
    return None, here if of_run is None else f"{here}: the run's kernel, {of_run}, is not available here"


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
