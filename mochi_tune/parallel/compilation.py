"""Compiles the DiT's blocks: operations between matrix products are fused, and read and write memory once."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mochi_tune.models.attention import JointAttention
from mochi_tune.models.dit import AsymmDiT
from mochi_tune.parallel.recompute import BlockFunction, block_function

# Maximum graphs of one function: two kinds of block, with or without a prompt, for each bucket. torch's default is 8.
MAX_GRAPHS = 256


def apply_compilation(
    dit: AsymmDiT,
    log: Callable[[str], None],
    only_training: bool = False,
    before_each: Callable[[], None] | None = None,
    backend: str = "inductor",
) -> None:
    """Compiles the blocks: equal blocks share one graph for each video size, for prompts of any length.

    The first step with a new size is slow. Blocks that cannot be compiled run uncompiled, and `log` gets the reason.
    Batches of prompts with different lengths run uncompiled, because their rows are attended one by one.

    Args:
        dit: the model; other changes of its blocks, such as checkpointing, must be applied before.
        log: writes a line for the user.
        only_training: whether passes without gradients run uncompiled, because they would need separate graphs.
        before_each: called before each graph is compiled; an exception from it ends the pass.
        backend: of torch.compile.
    """
    # Not at the top: this import takes a second, which would delay the error for a wrong setting.
    import torch._dynamo
    import torch._functorch.config
    import torch._inductor.config

    if hasattr(torch._inductor.config, "deterministic"):
        # Otherwise kernels are chosen by measured times, which vary between runs, and so does rounding. This holds in
        # one thread; `train` also sets TORCHINDUCTOR_DETERMINISTIC, for the threads that compile backward passes.
        torch._inductor.config.deterministic = torch.are_deterministic_algorithms_enabled()
    compiler = _Compiler(log, only_training, before_each or (lambda: None), backend)
    for block in dit.blocks:
        core = block.get_submodule("attn.core")
        if not isinstance(core, JointAttention):
            # Cores other than JointAttention communicate between processes.
            core.forward = torch.compiler.disable(core.forward)
        block.forward = functools.partial(compiler.compiled(block_function(block)), block)


class _Compiler:
    """Compiles functions of blocks; cases that failed run uncompiled."""

    def __init__(
        self, log: Callable[[str], None], only_training: bool, before_each: Callable[[], None], backend: str
    ) -> None:
        self.log, self.only_training, self.before_each, self.backend = log, only_training, before_each, backend
        from torch._dynamo.exc import TorchDynamoException

        self.error = TorchDynamoException
        # Cases that were compiled: function, kind of block, size, whether there is a prompt, and whether gradients are
        # enabled. Only those that failed run uncompiled, because a pass recomputes the others as they ran.
        self.known: set[tuple[Any, ...]] = set()
        self.failed: set[tuple[Any, ...]] = set()
        self.functions: dict[BlockFunction, BlockFunction] = {}

    def compiled(self, function: BlockFunction) -> BlockFunction:
        if function not in self.functions:
            fast = torch.compile(function, backend=self.backend)
            # Not a partial: functools.partial(partial(...)) is flattened, and `block_function` reads its `func`.
            self.functions[function] = lambda block, *inputs: self._call(fast, function, block, *inputs)
        return self.functions[function]

    def _call(
        self,
        fast: BlockFunction,
        plain: BlockFunction,
        block: nn.Module,
        x: Tensor,
        y: Tensor,
        modulation: tuple[Tensor, Tensor],
        rope: tuple[Tensor, Tensor],
        text_lengths: Sequence[int] | None,
    ) -> Any:
        is_wanted = text_lengths is None and (torch.is_grad_enabled() or not self.only_training)
        case = fast, block.update_y, x.shape, y.shape[1] > 0, torch.is_grad_enabled()
        if not is_wanted or case in self.failed:
            return plain(block, x, y, modulation, rope, text_lengths)
        streams = x, y
        if torch.is_grad_enabled() and not x.requires_grad:
            # The first block: unneeded gradients for its inputs avoid a separate graph for it.
            streams = x.detach().requires_grad_(), y.detach().requires_grad_()
        torch._dynamo.mark_static(streams[0], 1)
        # One graph for prompts of any length, except the empty one: torch compiles a separate graph for size 0.
        torch._dynamo.maybe_mark_dynamic(streams[1], 1)
        if case not in self.known:
            self.before_each()
            self.known.add(case)
        try:
            with _options():
                return fast(block, *streams, modulation, rope, None)
        except self.error as error:
            if not self.failed:
                reason = " ".join(str(error).split())[:200]
                self.log(f"blocks run uncompiled, as torch could not compile them: {reason}")
            self.failed.add(case)
        return plain(block, x, y, modulation, rope, text_lengths)


@contextlib.contextmanager
def _options() -> Iterator[None]:
    """Sets torch's options in this thread, because they hold per thread, and autograd's threads recompute blocks."""
    from torch._functorch import config

    # This cache on the disk does not know which attention kernel was chosen, and returns code that runs another one.
    # That of inductor, behind it, stores the code by its kernels.
    with config.patch(enable_autograd_cache=False), torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS):
        yield
