"""Layers of the AsymmVAE between which features stay channels last: a pixel's channels are neighbours in memory.

Convolutions and matrix products take that layout as it is. By their shape, features are (B, C, T, H, W) all the same.
Shape letters: B batch, C channels, T frames, H W rows and columns.

With gradients enabled, layers make new tensors; without, they write into the padded tensor that a convolution reads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mochi_tune.models.device import uses_triton
from mochi_tune.models.layers import at_least_fp32

# Of the features that are normed at a time, at least a frame: 4 MB in fp32, which stay in a processor's cache; on a GPU
# as many as cost little memory, as each operation there is a launch.
NORM_ELEMENTS = {"cpu": 2**20, "cuda": 2**25}


class FrameCache:
    """The last two frames of the previous chunk, layer by layer; a new one for each clip."""

    def __init__(self) -> None:
        self._past: dict[nn.Module, Tensor] = {}
        self._begun: set[nn.Module] = set()

    def previous_frames(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Returns the two frames before the chunk x (B, C, T, H, W), and keeps the last two of x for the next call.

        Before a clip's first chunk its first frame is repeated.
        """
        past = self._past[layer] if layer in self._past else x[:, :, :1].expand(-1, -1, 2, -1, -1)
        # A copy, as a view would hold the whole chunk.
        newest = x[:, :, -2:] if x.shape[2] > 1 else torch.cat([past[:, :, -1:], x], dim=2)
        self._past[layer] = newest.clone()
        return past

    def is_first_chunk(self, layer: nn.Module) -> bool:
        """Whether the chunk is the clip's first; each layer asks once a chunk."""
        first = layer not in self._begun
        self._begun.add(layer)
        return first


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...] = (1, 1, 1)) -> Tensor:
    """Convolves x (B, C, T, H, W) without padding, in its layout.

    On a CPU, torch gives oneDNN only large inputs in fp32, and small ones to a loop that is several times slower:
    oneDNN is called directly.
    """
    is_onednn = x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    if is_onednn and not torch.is_grad_enabled():
        return torch.mkldnn_convolution(x, weight, bias, (0, 0, 0), stride, (1, 1, 1), 1)
    # A processor without convolutions in bf16 gives them channels first.
    return F.conv3d(x, weight, bias, stride).contiguous(memory_format=torch.channels_last_3d)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Maps the channels of x (B, C, T, H, W) by weight (C', C); the result is channels last, whatever x is."""
    return F.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)


class FrameNorm(nn.GroupNorm):
    """GroupNorm of 32 groups over each frame by itself, computed in fp32 and followed by a SiLU where asked."""

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
        """Norms (B, T, H, W, C) into `out`, some frames at a time: the whole in fp32 would cost memory."""
        if uses_triton(frames):
            self._write_by_kernels(frames, out)
            return
        num_frames = max(1, NORM_ELEMENTS.get(frames.device.type, 2**20) // frames[:, 0].numel())
        for part, normed in zip(frames.split(num_frames, 1), out.split(num_frames, 1), strict=True):
            normed.copy_(self._norm(part))

    def write_padded(self, x: Tensor, out: Tensor) -> None:
        """Norms x (B, C, T, H, W) into `out`, (B, C, T, H + 2, W + 2), and repeats the outermost rows and columns."""
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
        """Norms frames (..., H, W, C); at least fp32.

        Squares are summed of what is left without the mean: torch's own kernel for channels last does not, and loses
        digits. On CUDA, it would change the layout.
        """
        frames = at_least_fp32(frames)
        centred = frames - self._of_groups(frames.mean((-3, -2), keepdim=True))
        variance = self._of_groups(centred.square().mean((-3, -2), keepdim=True))
        scale = (variance + self.eps).rsqrt() * at_least_fp32(self.weight)
        normed = torch.addcmul(at_least_fp32(self.bias), centred, scale)
        return F.silu(normed, inplace=not torch.is_grad_enabled()) if self.silu else normed

    def _of_groups(self, x: Tensor) -> Tensor:
        """Replaces each channel of (..., C) by the mean over the channels of its group."""
        groups = x.unflatten(-1, (self.num_groups, -1))
        return groups.mean(-1, keepdim=True).expand_as(groups).flatten(-2)


class PointwiseConv(nn.Linear):
    """A 1x1x1 convolution over (B, C, T, H, W), stored as a Linear weight."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps the channels of (B, C, T, H, W)."""
        return pointwise(x, self.weight, self.bias)


class CausalConv(nn.Conv3d):
    """A 3x3x3 convolution that sees two frames of the past and none of the future; replicated at every border."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3)

    def forward(self, x: Tensor, norm: FrameNorm, cache: FrameCache | None = None) -> Tensor:
        """Norms and convolves (B, C, T, H, W) to the same shape."""
        if torch.is_grad_enabled():
            padded = F.pad(norm(x), (1, 1, 1, 1, 0, 0), mode="replicate")
            return conv3d(torch.cat([self._past(padded, cache), padded], dim=2), self.weight, self.bias)
        batch, channels, num_frames, height, width = x.shape
        padded = x.new_empty(batch, num_frames + 2, height + 2, width + 2, channels).movedim(-1, 1)
        norm.write_padded(x, padded[:, :, 2:])
        padded[:, :, :2] = self._past(padded[:, :, 2:], cache)
        return conv3d(padded, self.weight, self.bias)

    def _past(self, padded: Tensor, cache: FrameCache | None) -> Tensor:
        """Returns the two frames before normed and padded ones."""
        return padded[:, :, :1].expand(-1, -1, 2, -1, -1) if cache is None else cache.previous_frames(self, padded)


class Downsample(nn.Conv3d):
    """A strided convolution that shrinks time by `temporal` and space by `spatial`, causal in time."""

    def __init__(self, in_channels: int, out_channels: int, temporal: int, spatial: int) -> None:
        kernel = (temporal, spatial, spatial)
        super().__init__(in_channels, out_channels, kernel, stride=kernel)

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        """Maps (B, C, T, H, W) to (B, C', T', H / spatial, W / spatial)."""
        if self.stride[0] > 1 and (cache is None or cache.is_first_chunk(self)):
            x = torch.cat([*[x[:, :, :1]] * (self.stride[0] - 1), x], dim=2)
        return conv3d(x, self.weight, self.bias, self.stride)
