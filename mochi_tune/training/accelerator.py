"""Builds the Accelerator of a training and wraps the adapter's optimizer: data parallel or DeepSpeed's ZeRO.

Both optimizers save and load the same state under the same names, so that a run can resume with the other one.
"""

import contextlib
import importlib.util
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from torch import Tensor, nn

from mochi_tune.errors import CheckpointError, ConfigError
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


def check_strategy(strategy: str, num_processes: int) -> None:
    """Refuses a strategy for several processes if there is only one."""
    if strategy != "data" and num_processes == 1:
        raise ConfigError(
            f"parallel.strategy={strategy} shares a run among processes, but there is only one: use "
            "parallel.num_processes=2 or more, or parallel=single."
        )


def check_deepspeed(strategy: str) -> None:
    """Refuses ZeRO if its package is not installed."""
    if strategy != "data" and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f"parallel.strategy={strategy} needs deepspeed, which is not installed: run pip install deepspeed, or use "
            "parallel=data."
        )


def build_accelerator(
    device: torch.device, strategy: str, accumulation_steps: int, max_grad_norm: float
) -> Accelerator:
    """Builds the Accelerator of a training; every process calls this, even a single one.

    Args:
        device: the device of this process.
        strategy: a value of `parallel.strategy`.
        accumulation_steps: number of micro-batches per step on this process.
        max_grad_norm: gradients above this norm are scaled down to it; 0: none are.
    """
    if strategy == "data":
        return Accelerator(cpu=device.type == "cpu", gradient_accumulation_steps=accumulation_steps)
    import deepspeed

    # DeepSpeed would spend a minute compiling this extension, which training does not use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    settings = {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only uses it to count samples.
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": max_grad_norm,
        # DeepSpeed's own Linear adds the bias after rounding the product to bf16.
        "zero_optimization": {"stage": int(strategy.removeprefix("zero")), "memory_efficient_linear": False},
        "zero_allow_untested_optimizer": True,
        # Parameters keep their dtypes: the adapter is fp32, the base may have another one.
        "bf16": {"enabled": False},
        "communication_data_type": "fp32",
        "wall_clock_breakdown": False,
        "steps_per_print": 10**12,
    }
    plugin = DeepSpeedPlugin(hf_ds_config=settings)
    return Accelerator(gradient_accumulation_steps=accumulation_steps, deepspeed_plugin=plugin)


def then_partitioned(
    accelerator: Accelerator, each_block: Callable[[Any, nn.Module], None], is_measured: bool
) -> Callable[[Any, nn.Module], None]:
    """Returns a function for `load_dit` that, with ZeRO-3, splits each block over the processes after `each_block`.

    DeepSpeed would split the complete model, on GPUs that can hold only a part of it. A DoRA, for which the base
    `is_measured`, reads complete weights.
    """
    plugin = accelerator.deepspeed_plugin
    if plugin is None or plugin.zero_stage != 3 or is_measured:
        return each_block
    import deepspeed

    def prepare_and_partition(model: Any, block: nn.Module) -> None:
        each_block(model, block)
        deepspeed.zero.Init(module=block, config_dict_or_path=plugin.deepspeed_config)

    return prepare_and_partition


def broadcast(value: Any) -> Any:
    """Returns the value of the main process on every process."""
    shared = [value]
    broadcast_object_list(shared)
    return shared[0]


def host_memory() -> tuple[int, int]:
    """Returns the free bytes of this host's memory, and the number of processes of the run on this host.

    All processes call this together. Each measures before it waits for the others, so that none has loaded weights.
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
    """Returns the model to call and the optimizer to step, for one process or several.

    Args:
        accelerator: the result of `build_accelerator`.
        dit: the model with a trainable adapter, on the device.
        parameters: the parameters of the adapter, by name.
        optimizer: an optimizer of these parameters, without state.
        max_grad_norm: gradients above this norm are scaled down to it; 0: none are.
    """
    if accelerator.deepspeed_plugin is None:
        # The model is not wrapped in DDP, which rebuilds its buckets after the first step: a resumed run would sum in
        # another order, with other rounding. `AdapterOptimizer` averages all gradients in one all-reduce.
        return dit, AdapterOptimizer(accelerator, parameters, optimizer, max_grad_norm)
    engine, _ = accelerator.prepare(dit, optimizer)
    # Accelerate's own wrapper updates the weights inside `backward`, before the loss and the gradients are checked.
    accelerator.deepspeed_engine_wrapped = _BackwardOnly(engine, parameters.values())
    return engine, ZeroOptimizer(engine, parameters, optimizer)


@dataclass
class AdapterOptimizer:
    """Trains an adapter whose model is complete on every process.

    Attributes:
        accelerator: averages and clips the gradients.
        parameters: the parameters of the adapter, by name.
        optimizer: the optimizer of these parameters.
        max_grad_norm: gradients above this norm are scaled down to it; 0: none are.
        replaced: while the adapter has other weights, the trained weights and these.
    """

    accelerator: Accelerator
    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    max_grad_norm: float
    replaced: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None

    def clip_grad_norm(self) -> Tensor:
        """Averages the gradients over the processes and clips them; returns their norm before clipping, a tensor ()."""
        parameters = list(self.parameters.values())
        if self.accelerator.num_processes > 1:
            # One flat all-reduce sums in the same order in every run, resumed or not.
            gradients = [p.grad for p in parameters if p.grad is not None]
            averaged = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
            assert isinstance(averaged, Tensor)
            for gradient, part in zip(gradients, averaged.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        norm = self.accelerator.clip_grad_norm_(parameters, self.max_grad_norm or torch.inf)
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
        """Returns the trained weights on the device, even while others replace them; every process calls this."""
        return self.parameters if self.replaced is None else self.replaced[0]

    def inference_weights(self) -> Mapping[str, Tensor] | None:
        """Returns the weights for inference if the optimizer has other ones than the trained weights, else None."""
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
        """Returns the state of each parameter, on the CPU, and the numbers of each group; every process calls this."""
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
    """Trains an adapter with DeepSpeed, which shards the optimizer and the gradients, and in stage 3 the model."""

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
            # Stage 2 links the states of all groups after the update of the first one, when the others have none.
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()
        self._is_linked = True

    def skip_step(self) -> None:
        """Drops the gradients of a step. DeepSpeed drops them only in an update, so this makes one and undoes it."""
        adapter, (state, _) = self._copy_weights(), self.state()
        self.step()
        self._restore(adapter, state)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Sets the learning rate of the next step."""
        set_learning_rate(self.optimizer, learning_rate)

    def weights(self) -> Mapping[str, Tensor]:
        """Returns the complete trained weights on the device; every process calls this."""
        from deepspeed.utils import safe_get_full_fp32_param

        full = {name: _present(safe_get_full_fp32_param(parameter)) for name, parameter in self.parameters.items()}
        assert all(tensor.numel() for tensor in full.values()), "a shard is not an adapter"
        return full

    def inference_weights(self) -> None:
        """Returns None: inference uses the trained weights."""

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
        """Returns the complete state of each parameter, on the CPU, and a dict per group; every process calls this."""
        from deepspeed.utils import safe_get_full_optimizer_state

        groups: list[dict] = [{} for _ in self.optimizer.param_groups]
        flat = next((dict(state) for state in self.optimizer.state.values() if state), {})
        if not flat:
            return {}, groups
        scalars = {key: value for key, value in flat.items() if value.ndim == 0}
        # The getters are collectives, so all processes must call them in the same order.
        sharded = [key for key in flat if key not in scalars]
        return {
            name: {key: value.detach().cpu().clone() for key, value in scalars.items()}
            | {key: _present(safe_get_full_optimizer_state(parameter, key)).detach().cpu().clone() for key in sharded}
            for name, parameter in self.parameters.items()
        }, groups

    def load(self, adapter: Mapping[str, Tensor], state: OptimizerState, groups: list[dict]) -> None:
        """Restores a saved adapter and the state of its optimizer; ignores `groups`.

        DeepSpeed creates the optimizer state in its first step. This makes a step on zeros at a learning rate of 0 and
        replaces the state.

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
        """Replaces DeepSpeed's fp32 copy of the weights, the weights of the model, and the optimizer state."""
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
    """Passes the gradients of a loss to the parameters in the order of the parameters."""

    @staticmethod
    def forward(ctx: Any, losses: list[Tensor], *parameters: Tensor) -> Tensor:
        # The list hides the loss from autograd, which would otherwise pass a gradient on to it.
        ctx.loss, ctx.parameters = losses[0], parameters
        return losses[0].detach().clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        found = torch.autograd.grad(ctx.loss, ctx.parameters, gradients, allow_unused=True)
        ctx.loss = None
        return None, *found


class _BackwardOnly(DeepSpeedEngineWrapper):
    """Runs the backward pass for `accelerator.backward` under DeepSpeed, without the update."""

    def __init__(self, engine: Any, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(engine)
        self.parameters = tuple(parameters)

    def backward(self, loss: Tensor, sync_gradients: bool = True, **_: Any) -> None:
        self.engine.set_gradient_accumulation_boundary(sync_gradients)
        # Stage 2 packs gradients in the order in which they are computed, and sums the packed gradients of all
        # processes. The order differs between compiled and uncompiled processes.
        is_packed = self.engine.zero_optimization_stage() == 2
        self.engine.backward(_InOrder.apply([loss], *self.parameters) if is_packed else loss)
        if not sync_gradients:
            self.engine.step()  # Between micro-batches, this only counts them.


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
