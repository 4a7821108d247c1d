"""The one Accelerator of a training, and the adapter's optimizer under it: data parallel, or DeepSpeed's ZeRO.

Both optimizers save and load the same state under the same names, so that a run can resume with the other one.
"""

import contextlib
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from torch import Tensor, nn

from mochi_tune.errors import CheckpointError
from mochi_tune.training.optim import (
    check_names,
    inference_weights,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
    temporarily,
)

# State of one parameter, by entry: "exp_avg", "step" and so on.
OptimizerState = Mapping[str, dict[str, Tensor]]


def build_accelerator(
    device: torch.device, strategy: str, accumulation_steps: int, max_grad_norm: float
) -> Accelerator:
    """Builds the Accelerator of a training; every process calls it, one process too.

    Args:
        device: of this process.
        strategy: a value of `parallel.strategy`.
        accumulation_steps: number of micro-batches per step on this process.
        max_grad_norm: gradients above this norm are scaled down to it.
    """
    if strategy == "data":
        return Accelerator(cpu=device.type == "cpu", gradient_accumulation_steps=accumulation_steps)
    import deepspeed

    # DeepSpeed would compile this extension for a minute; a training never calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    settings = {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only counts samples with it.
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": max_grad_norm,
        # DeepSpeed's own Linear adds the bias after it has rounded the product to bf16.
        "zero_optimization": {"stage": int(strategy.removeprefix("zero")), "memory_efficient_linear": False},
        "zero_allow_untested_optimizer": True,
        # Parameters keep the dtypes that they were loaded in: an fp32 adapter over a base of any dtype.
        "bf16": {"enabled": False},
        "communication_data_type": "fp32",
        "wall_clock_breakdown": False,
        "steps_per_print": 10**12,
    }
    plugin = DeepSpeedPlugin(hf_ds_config=settings)
    return Accelerator(gradient_accumulation_steps=accumulation_steps, deepspeed_plugin=plugin)


def broadcast(value: Any) -> Any:
    """Returns the main process's value on every process."""
    shared = [value]
    broadcast_object_list(shared)
    return shared[0]


def host_memory() -> tuple[int, int]:
    """Returns the bytes of this host's memory that are free, and how many processes of the run share them.

    All processes call it together. Each looks before it waits for the others, so that none has loaded anything then.
    """
    own = socket.gethostname(), psutil.virtual_memory().available
    free = [bytes_free for host, bytes_free in gather_object([own]) if host == own[0]]
    return min(free), len(free)


def prepare(
    accelerator: Accelerator,
    dit: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
) -> tuple[nn.Module, "AdapterOptimizer | ZeroOptimizer"]:
    """Returns the model to call and the optimizer to step, for one process or for many.

    Args:
        accelerator: from `build_accelerator`.
        dit: with a trainable adapter, on the device.
        parameters: of the adapter, by name.
        optimizer: over them, without state.
        max_grad_norm: gradients above this norm are scaled down to it.
    """
    if accelerator.deepspeed_plugin is None:
        # The model is not wrapped: DDP lays its buckets out anew after the first step, so that the sums over processes
        # have another order in a resumed run, and other bits. `AdapterOptimizer` averages gradients in one piece.
        return dit, AdapterOptimizer(accelerator, parameters, optimizer, max_grad_norm)
    engine, _ = accelerator.prepare(dit, optimizer)
    # Accelerate's own wrapper makes DeepSpeed's update inside `backward`, before anyone has seen that the loss and the
    # gradients are finite.
    accelerator.deepspeed_engine_wrapped = _BackwardOnly(engine, parameters.values())
    return engine, ZeroOptimizer(engine, parameters, optimizer)


@dataclass
class AdapterOptimizer:
    """Trains an adapter whose model is complete on every process.

    Attributes:
        accelerator: averages and clips.
        parameters: of the adapter, by name.
        optimizer: over them.
        max_grad_norm: gradients above this norm are scaled down to it.
        replaced: while other weights are in the adapter, the trained ones and those.
    """

    accelerator: Accelerator
    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    max_grad_norm: float
    replaced: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None

    def clip_grad_norm(self) -> Tensor:
        """Averages the gradients over the processes, clips them, and returns their norm before that, a tensor ()."""
        parameters = list(self.parameters.values())
        if self.accelerator.num_processes > 1:
            # One flat all-reduce: its sums have the same order in every run, resumed or not.
            gradients = [p.grad for p in parameters if p.grad is not None]
            averaged = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
            assert isinstance(averaged, Tensor)
            for gradient, part in zip(gradients, averaged.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        norm = self.accelerator.clip_grad_norm_(parameters, self.max_grad_norm)
        assert norm is not None
        return norm

    def step(self) -> None:
        """Updates the adapter."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def skip_step(self) -> None:
        """Drops the gradients of a step without an update."""
        self.optimizer.zero_grad(set_to_none=True)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Sets the learning rate of the next step."""
        set_learning_rate(self.optimizer, learning_rate)

    def weights(self) -> Mapping[str, Tensor]:
        """Returns the trained weights, on the device, whatever is in their place now; every process calls it."""
        return self.parameters if self.replaced is None else self.replaced[0]

    def inference_weights(self) -> Mapping[str, Tensor] | None:
        """Returns the weights to use, where the optimizer says that these are not the trained ones, else None."""
        return inference_weights(self.optimizer, self.parameters) if self.replaced is None else self.replaced[1]

    @contextlib.contextmanager
    def temporarily(self, weights: Mapping[str, Tensor] | None) -> Iterator[None]:
        """Puts other weights into the adapter while the context lasts; None changes nothing."""
        with temporarily(self.parameters, weights) as trained:
            self.replaced = None if weights is None else (trained, weights)
            try:
                yield
            finally:
                self.replaced = None

    def state(self) -> tuple[dict[str, dict[str, Tensor]], list[dict]]:
        """Returns each parameter's state, on the CPU, and each group's numbers; every process calls it."""
        return optimizer_state(self.optimizer, self.parameters)

    def load(self, adapter: Mapping[str, Tensor], state: OptimizerState, groups: list[dict]) -> None:
        """Restores a saved adapter and the state of its optimizer.

        Raises:
            CheckpointError: they belong to another adapter or optimizer.
        """
        check_adapter_fits(self.parameters, adapter)
        load_optimizer_state(self.optimizer, self.parameters, state, groups)
        for name, parameter in self.parameters.items():
            parameter.data.copy_(adapter[name])


class ZeroOptimizer:
    """Trains an adapter under DeepSpeed, which shards the optimizer and gradients, at stage 3 the model too."""

    def __init__(self, engine: Any, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        self.engine = engine
        self.parameters = dict(parameters)
        self.optimizer = optimizer
        self._is_linked = False

    def clip_grad_norm(self) -> Tensor:
        """Returns the norm of the averaged gradients; DeepSpeed clips them in `step`."""
        from deepspeed.utils import safe_get_full_grad

        gradients = [_present(safe_get_full_grad(parameter)) for parameter in self.parameters.values()]
        return torch.stack([gradient.float().norm() for gradient in gradients]).norm()

    def step(self) -> None:
        """Updates the adapter."""
        self.engine.step()
        zero = self.engine.optimizer
        if not self._is_linked and hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
            # Stage 2 looks for the states of all groups when the first one is updated: the others have none yet.
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()
        self._is_linked = True

    def skip_step(self) -> None:
        """Drops the gradients of a step: DeepSpeed drops them only in an update, which is made and undone."""
        adapter, (state, _) = self._copy_weights(), self.state()
        self.step()
        self._restore(adapter, state)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Sets the learning rate of the next step."""
        set_learning_rate(self.optimizer, learning_rate)

    def weights(self) -> Mapping[str, Tensor]:
        """Returns the complete trained weights, on the device; every process calls it."""
        from deepspeed.utils import safe_get_full_fp32_param

        full = {name: _present(safe_get_full_fp32_param(parameter)) for name, parameter in self.parameters.items()}
        assert all(tensor.numel() for tensor in full.values()), "a shard is not an adapter"
        return full

    def inference_weights(self) -> None:
        """Returns None: the weights to use are the trained ones."""

    @contextlib.contextmanager
    def temporarily(self, weights: Mapping[str, Tensor] | None) -> Iterator[None]:
        """Puts other weights into the adapter while the context lasts; None changes nothing."""
        if weights is None:
            yield
            return
        kept = self._copy_weights()
        self._set_computing_weights(weights)
        try:
            yield
        finally:
            self._set_computing_weights(kept)

    def state(self) -> tuple[dict[str, dict[str, Tensor]], list[dict]]:
        """Returns each parameter's complete state, on the CPU, and each group's numbers; every process calls it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        groups: list[dict] = [{} for _ in self.optimizer.param_groups]
        flat = next((dict(state) for state in self.optimizer.state.values() if state), {})
        if not flat:
            return {}, groups
        scalars = {key: value for key, value in flat.items() if value.ndim == 0}
        # The getters sum over the processes, so that each process must ask for the entries in the same order.
        sharded = [key for key in flat if key not in scalars]
        return {
            name: {key: value.detach().cpu().clone() for key, value in scalars.items()}
            | {key: _present(safe_get_full_optimizer_state(parameter, key)).detach().cpu().clone() for key in sharded}
            for name, parameter in self.parameters.items()
        }, groups

    def load(self, adapter: Mapping[str, Tensor], state: OptimizerState, groups: list[dict]) -> None:
        """Restores a saved adapter and the state of its optimizer; `groups` have nothing that ZeRO keeps.

        DeepSpeed creates the state in its first step: one is made at a learning rate of 0, on zeros, and its state is
        replaced.

        Raises:
            CheckpointError: they belong to another adapter or optimizer.
        """
        check_adapter_fits(self._copy_weights(), adapter)
        check_names(self.parameters, state)
        self.set_learning_rate(0.0)
        config, device = self.engine.module.config, self.engine.device
        frame = torch.zeros(1, config.in_channels, 1, config.patch_size, config.patch_size, device=device)
        prompt = torch.zeros(1, 1, config.t5_feat_dim, device=device)
        velocity = self.engine(frame, torch.zeros(1, device=device), prompt, torch.ones(1, 1, dtype=torch.bool))
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.backward(velocity.float().mean())
        self.step()
        self._restore(adapter, state)

    def _copy_weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().cpu().clone() for name, tensor in self.weights().items()}

    def _restore(self, adapter: Mapping[str, Tensor], state: OptimizerState) -> None:
        """Replaces DeepSpeed's fp32 copy of the weights, the one that computes, and the optimizer's state."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for name, parameter in self.parameters.items():
            safe_set_full_fp32_param(parameter, adapter[name])
            for key, value in state[name].items():
                if value.ndim:
                    safe_set_full_optimizer_state(parameter, value, key)
        self._set_computing_weights(adapter)
        scalars = {key: value for key, value in next(iter(state.values())).items() if value.ndim == 0}
        for flat in self.optimizer.state.values():
            for key, value in scalars.items():
                flat[key].copy_(value)

    def _set_computing_weights(self, weights: Mapping[str, Tensor]) -> None:
        from deepspeed.runtime.zero import GatheredParameters

        for name, parameter in self.parameters.items():
            with GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(weights[name])


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "DeepSpeed holds no such tensor"
    return tensor


class _InOrder(torch.autograd.Function):
    """A loss whose gradients reach the parameters in the order of these, in whatever order they are computed."""

    @staticmethod
    def forward(ctx: Any, losses: list[Tensor], *parameters: Tensor) -> Tensor:
        # In a list, or autograd would pass on to it what `backward` returns.
        ctx.loss, ctx.parameters = losses[0], parameters
        return losses[0].detach().clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        found = torch.autograd.grad(ctx.loss, ctx.parameters, gradients, allow_unused=True)
        ctx.loss = None
        return None, *found


class _BackwardOnly(DeepSpeedEngineWrapper):
    """What `accelerator.backward` calls under DeepSpeed: the backward pass, without the update."""

    def __init__(self, engine: Any, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(engine)
        self.parameters = tuple(parameters)

    def backward(self, loss: Tensor, sync_gradients: bool = True, **_: Any) -> None:
        self.engine.set_gradient_accumulation_boundary(sync_gradients)
        # Stage 2 packs gradients in the order in which they come, and adds up what each process has packed. Where one
        # of them runs compiled and another one does not, they come in different orders.
        is_packed = self.engine.zero_optimization_stage() == 2
        self.engine.backward(_InOrder.apply([loss], *self.parameters) if is_packed else loss)
        if not sync_gradients:
            self.engine.step()  # Between micro-batches this only counts them.


def check_adapter_fits(parameters: Mapping[str, Tensor], adapter: Mapping[str, Tensor]) -> None:
    """Refuses a saved adapter that does not belong to these parameters.

    Raises:
        CheckpointError: names or sizes differ.
    """
    check_names(parameters, adapter)
    for name, parameter in parameters.items():
        if parameter.shape != adapter[name].shape:
            sizes = tuple(adapter[name].shape), tuple(parameter.shape)
            raise CheckpointError(f"the checkpoint is not this run's: {name} is {sizes[0]} there, {sizes[1]} here.")
