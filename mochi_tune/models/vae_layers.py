"""Layers of the AsymmVAE. Features stay in the channels-last layout: the channels of a pixel are contiguous in memory.

Convolutions and matrix products read this layout without a copy. The shape of features is (B, C, T, H, W) nevertheless.
Shape letters: B batch, C channels, T frames, H W rows and columns.

With gradients enabled, layers create new tensors; without, norms write into the padded tensor that a convolution reads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mochi_tune.models.device import uses_triton
from mochi_tune.models.layers import at_least_fp32

# Maximum elements that are normed at a time, but at least one frame. On a CPU: 4 MB in fp32, which fit its cache. On a
# GPU: more, because each operation is a kernel launch, but still little memory.
NORM_ELEMENTS = {"cpu": 2**20, "cuda": 2**25}


class HostFrames:
    """Frames by layer in host memory, for caches that wait in turn; reading them copies them to their device.

    The copies are queued like kernels. The host does not wait for them, and never reads the pinned buffers itself.
    """

    def __init__(self) -> None:
        self._buffers: dict[nn.Module, tuple[Tensor, torch.device]] = {}

    def __contains__(self, layer: object) -> bool:
        return layer in self._buffers

    def __getitem__(self, layer: nn.Module) -> Tensor:
        buffer, device = self._buffers[layer]
        return buffer.to(device, non_blocking=True, copy=True)

    def __setitem__(self, layer: nn.Module, frames: Tensor) -> None:
        if layer not in self._buffers:
            is_pinned = frames.device.type == "cuda"
            self._buffers[layer] = torch.empty_like(frames, device="cpu", pin_memory=is_pinned), frames.device
        self._buffers[layer][0].copy_(frames, non_blocking=True)


def newest_frames(past: Tensor, x: Tensor) -> Tensor:
    """Returns the last two frames of the chunk x, or, if it has one frame, that frame and the one before it.

    It is a copy, because a view would keep the whole chunk in memory.
    """
    return (x[:, :, -2:] if x.shape[2] > 1 else torch.cat([past[:, :, -1:], x], dim=2)).clone()


class FrameCache:
    """Holds the last two frames of the previous chunk for each layer. Each clip needs a new cache.

    Args:
        past: where the frames are held; None: on their device.
    """

    def __init__(self, past: dict[nn.Module, Tensor] | HostFrames | None = None) -> None:
        self._past = {} if past is None else past
        self._begun: set[nn.Module] = set()

    def previous_frames(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Returns the two frames before the chunk x (B, C, T, H, W), and keeps the last two of x for the next call.

        For the first chunk of a clip, it returns the first frame twice.
        """
        past = self._past[layer] if layer in self._past else x[:, :, :1].expand(-1, -1, 2, -1, -1)
        self._past[layer] = newest_frames(past, x)
        return past

    def is_first_chunk(self, layer: nn.Module) -> bool:
        """Whether the chunk is the first of the clip. Each layer must call this once per chunk."""
        first = layer not in self._begun
        self._begun.add(layer)
        return first


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...] = (1, 1, 1)) -> Tensor:
    """Convolves x (B, C, T, H, W) without padding; the output is channels last.

    On a CPU, torch uses oneDNN only for large fp32 inputs, and a loop that is several times slower for small ones. So
    this calls oneDNN directly.
    """
    is_onednn = x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    if is_onednn and not torch.is_grad_enabled():
        return torch.mkldnn_convolution(x, weight, bias, (0, 0, 0), stride, (1, 1, 1), 1)
    # A CPU without bf16 convolutions returns a channels-first output.
    return F.conv3d(x, weight, bias, stride).contiguous(memory_format=torch.channels_last_3d)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Maps the channels of x (B, C, T, H, W), of any layout, by weight (C', C); the output is channels last."""
    return F.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)


class FrameNorm(nn.GroupNorm):
    """GroupNorm with 32 groups over each frame separately, computed in fp32; a SiLU follows unless `silu` is False."""

    def __init__(self, channels: int, silu: bool = True) -> None:
        super().__init__(32, channels, eps=1e-5)
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        """Norms (B, C, T, H, W)."""
        frames = x.movedim(1, -1)
        if torch.is_grad_enabled():
            return self._norm(frames).to(x.dtype).movedim(-1, 1)
        out = torch.empty(frames.shape, dtype=frames.dtype, device=frames.device)
        self.write(frames, out)
        return out.movedim(-1, 1)

    def write(self, frames: Tensor, out: Tensor) -> None:
        """Norms frames (B, T, H, W, C) into `out`, a few frames at a time to limit the memory of the fp32 copies."""
        if uses_triton(frames):
            self._write_by_kernels(frames, out)
            return
        num_frames = max(1, NORM_ELEMENTS.get(frames.device.type, 2**20) // frames[:, 0].numel())
        for part, normed in zip(frames.split(num_frames, 1), out.split(num_frames, 1), strict=True):
            normed.copy_(self._norm(part))

    def write_padded(self, x: Tensor, out: Tensor) -> None:
        """Norms x (B, C, T, H, W) into `out` (B, C, T, H + 2, W + 2), and repeats the outermost rows and columns."""
        if uses_triton(x):
            self._write_by_kernels(x.movedim(1, -1), out.movedim(1, -1))
            return
        self.write(x.movedim(1, -1), out[..., 1:-1, 1:-1].movedim(1, -1))
        out[..., 0, :], out[..., -1, :] = out[..., 1, :], out[..., -2, :]
        out[..., 0], out[..., -1] = out[..., 1], out[..., -2]

    def _write_by_kernels(self, frames: Tensor, out: Tensor) -> None:
        from mochi_tune.models.vae_kernels import norm_frames

        norm_frames(frames, out, self.weight, self.bias, self.num_groups, self.eps, self.silu)

    def _norm(self, frames: Tensor) -> Tensor:
        """Norms frames (..., H, W, C) in at least fp32.

        The mean is subtracted before squares are summed. torch's kernel for channels last does not do this, and loses
        digits. On CUDA, it also changes the layout.
        """
        frames = at_least_fp32(frames)
        centred = frames - self._of_groups(frames.mean((-3, -2), keepdim=True))
        variance = self._of_groups(centred.square().mean((-3, -2), keepdim=True))
        scale = (variance + self.eps).rsqrt() * at_least_fp32(self.weight)
        normed = torch.addcmul(at_least_fp32(self.bias), centred, scale)
        return F.silu(normed, inplace=not torch.is_grad_enabled()) if self.silu else normed

    def _of_groups(self, x: Tensor) -> Tensor:
        """Replaces each channel of x (..., C) by the mean over the channels of its group."""
        groups = x.unflatten(-1, (self.num_groups, -1))
        return groups.mean(-1, keepdim=True).expand_as(groups).flatten(-2)


class PointwiseConv(nn.Linear):
    """A 1x1x1 convolution over (B, C, T, H, W), stored as a Linear weight."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps the channels of (B, C, T, H, W)."""
        return pointwise(x, self.weight, self.bias)


class CausalConv(nn.Conv3d):
    """A 3x3x3 convolution, causal in time: it sees two past frames and no future one. Borders are replicated."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3)

    def forward(self, x: Tensor, norm: FrameNorm, cache: FrameCache | None = None) -> Tensor:
        """Norms and convolves x (B, C, T, H, W); the shape stays the same."""
        if torch.is_grad_enabled():
            padded = F.pad(norm(x), (1, 1, 1, 1, 0, 0), mode="replicate")
            return conv3d(torch.cat([self._past(padded, cache), padded], dim=2), self.weight, self.bias)
        batch, channels, num_frames, height, width = x.shape
        padded = x.new_empty(batch, num_frames + 2, height + 2, width + 2, channels).movedim(-1, 1)
        norm.write_padded(x, padded[:, :, 2:])
        padded[:, :, :2] = self._past(padded[:, :, 2:], cache)
        return conv3d(padded, self.weight, self.bias)

    def _past(self, padded: Tensor, cache: FrameCache | None) -> Tensor:
        """Returns the two frames before the normed and padded ones."""
        return padded[:, :, :1].expand(-1, -1, 2, -1, -1) if cache is None else cache.previous_frames(self, padded)


class Downsample(nn.Conv3d):
    """A strided convolution that reduces time by `temporal` and space by `spatial`; causal in time."""

    def __init__(self, in_channels: int, out_channels: int, temporal: int, spatial: int) -> None:
        kernel = (temporal, spatial, spatial)
        super().__init__(in_channels, out_channels, kernel, stride=kernel)

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        """Maps (B, C, T, H, W) to (B, C', T', H / spatial, W / spatial)."""
        if self.stride[0] > 1 and (cache is None or cache.is_first_chunk(self)):
            x = torch.cat([*[x[:, :, :1]] * (self.stride[0] - 1), x], dim=2)
        return conv3d(x, self.weight, self.bias, self.stride)
