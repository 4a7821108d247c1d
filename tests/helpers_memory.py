"""Counts the bytes of living tensors, on any device; on the meta device at full size, in no time."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorMemory(TorchDispatchMode):
    """Notes the most bytes that tensors made inside held at one time; kernels' own workspace is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._tensors: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return out

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._tensors:
            self._tensors[key] = 0
            self.held += size
            self.peak = max(self.peak, self.held)
        self._tensors[key] += 1
        weakref.finalize(tensor, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._tensors[key] -= 1
        if not self._tensors[key]:
            del self._tensors[key]
            self.held -= size


class HeldMemory(TensorMemory):
    """Counts like that, without tensors on the meta device, which hold nothing."""

    def _count(self, tensor: torch.Tensor) -> None:
        if not tensor.is_meta:
            super()._count(tensor)
