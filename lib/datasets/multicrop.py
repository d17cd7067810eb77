"""Views of multi-channel fields for self-supervision, and the patches to mask: a plan, then pixels.

Every random number is a function of (seed, step, position in the global batch), drawn by numpy on
the CPU for the whole batch; a process takes the rows of its own samples. What is done to pixels is
batched arithmetic on the device in float, from the fields' full bit depth.

Shapes: B fields, C channels, S crops of one resolution, c channels of a crop, h x w patches.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

VIEWS, MASKS = range(4, 6)
"""Families of random numbers, beside those of `transforms`."""

MAX_PIXELS = 65536  # of a channel, that its percentiles are read from
MIN_SIGMA = 0.1  # pixels; a blur of nothing
MIN_BLOCK = 4  # patches of the smallest block that is asked for
MAX_ASPECT = 1 / 0.3  # of a block, either way
NUM_TRIES = 40  # blocks tried an image


@dataclass(frozen=True)
class Crops:
    """Crops of one resolution."""

    num_crops: int
    size: int
    """Side, pixels."""
    scale: tuple[float, float]
    """Range of a crop's share of the field's area."""
    means: tuple[float, ...] = ()
    """Each crop's probability to be the mean of the channels, else it is one of them, drawn evenly:
    (1, 0) makes the first the mean and the second a single channel. Empty: all channels as a stack.
    """
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the aspect ratio (width / height) in the field."""
    brightness: float = 0.2
    """Each channel is multiplied by up to this more or less."""
    contrast: float = 0.2
    """Each channel's spread around its mean changes by up to this factor."""
    blur: float = 0.5
    """Probability of a Gaussian blur."""
    sigma: tuple[float, float] = (0.1, 2.0)
    """Range of its deviation, pixels of the crop."""


class Plan(NamedTuple):
    """How S crops of each of B fields are made."""

    box: Tensor  # (S, B, 4) top, left, height, width as shares of the field
    turn: Tensor  # (S, B, 3) bool: flip rows, flip columns, then transpose
    mix: Tensor  # (S, B, c, C) weights of the field's channels
    factors: Tensor  # (S, B, c, 2) brightness, contrast
    sigma: Tensor  # (S, B)

    def to(self, device: torch.device) -> "Plan":
        return Plan(*(t.to(device, non_blocking=True) for t in self))


# --------------------------------------------------------------------------------------------
# On the CPU: what to do
# --------------------------------------------------------------------------------------------


def plan_crops(
    crops: Crops,
    group: int,
    num_channels: int,
    field_size: tuple[int, int],
    seed: int,
    step: int,
    positions: range,
    batch_size: int,
) -> Plan:
    """Draw the crops of the samples at `positions` of the global batch of `batch_size`.

    group: which of the step's resolutions this is. field_size: height, width, pixels. The area's
    share is uniform, the ratio log-uniform (Szegedy et al. 2015), sides cut to the field's; all
    eight symmetries of the square are equally likely.
    """
    S, B = crops.num_crops, batch_size
    rng = np.random.default_rng((seed, VIEWS, step, group))
    u = rng.random((S, B, 10))
    height, width = field_size
    area = _between(u[..., 0], crops.scale) * height * width
    ratio = np.exp(_between(u[..., 1], np.log(crops.ratio)))
    h = np.minimum(1, np.sqrt(area / ratio) / height)
    w = np.minimum(1, np.sqrt(area * ratio) / width)
    box = np.stack((u[..., 2] * (1 - h), u[..., 3] * (1 - w), h, w), axis=-1)
    sigma = np.where(u[..., 7] < crops.blur, _between(u[..., 8], crops.sigma), 0)

    mix = np.eye(num_channels)  # (c, C)
    if crops.means:
        single = mix[(u[..., 9] * num_channels).astype(int)]  # (S, B, C)
        is_mean = rng.random((S, B)) < np.array(crops.means)[:, None]
        mix = np.where(is_mean[..., None], 1 / num_channels, single)[:, :, None]
    mix = np.broadcast_to(mix, (S, B, *mix.shape[-2:]))
    spread = np.array((crops.brightness, crops.contrast))
    factors = 1 + spread * (2 * rng.random((S, B, mix.shape[2], 2)) - 1)

    mine = slice(positions.start, positions.stop)
    box, mix, factors, sigma = (
        torch.from_numpy(x[:, mine].astype(np.float32)) for x in (box, mix, factors, sigma)
    )
    return Plan(box, torch.from_numpy(u[:, mine, 4:7] < 0.5), mix, factors, sigma)


def _between(u: np.ndarray, ends: tuple[float, float] | np.ndarray) -> np.ndarray:
    return ends[0] + (ends[1] - ends[0]) * u


def plan_masks(
    h: int,
    w: int,
    share: float,
    ratio: tuple[float, float],
    seed: int,
    step: int,
    positions: range,
    batch_size: int,
) -> Tensor:
    """Patches to hide in the two global crops of the samples at `positions`: (2, B, h, w) bool."""
    rng = np.random.default_rng((seed, MASKS, step))
    rows = np.arange(2 * batch_size).reshape(2, batch_size)[:, positions.start : positions.stop]
    masks = block_masks(rng, 2 * batch_size, rows.flatten(), h, w, share, ratio)
    return torch.from_numpy(masks.reshape(*rows.shape, h, w))


def block_masks(
    rng: np.random.Generator,
    num_images: int,
    rows: np.ndarray,
    h: int,
    w: int,
    share: float,
    ratio: tuple[float, float],
) -> np.ndarray:
    """Rectangles of patches to hide in the images `rows` of `num_images`, (rows, h, w) bool.

    Bao et al. 2022, algorithm 1. round(share x num_images) images are masked, their ratios spread
    evenly over `ratio` (Oquab et al. 2024). A mask never exceeds its ratio, holds at least one
    patch, and may end a little short.
    """
    num_masked_images = round(share * num_images)
    edges = np.linspace(*ratio, num_masked_images + 1)
    spread = edges[:-1] + np.diff(edges) * rng.random(num_masked_images)
    most = np.zeros(num_images, int)
    most[:num_masked_images] = np.maximum(1, spread * h * w)
    most = rng.permutation(most)
    tries = rng.random((num_images, NUM_TRIES, 4))
    masks = np.zeros((len(rows), h, w), bool)
    for mask, row in zip(masks, rows, strict=True):
        if most[row]:
            _hide_blocks(mask, int(most[row]), tries[row])
    return masks


def _hide_blocks(mask: np.ndarray, left: int, tries: np.ndarray) -> None:
    """Put random blocks into `mask` until `left` patches are hidden or the tries run out.

    Two of three tries fit even where a single patch is left, so that none ends empty.
    """
    h, w = mask.shape
    for area, aspect, y, x in tries:
        area = min(MIN_BLOCK, left) + area * max(0, left - MIN_BLOCK)
        aspect = MAX_ASPECT ** (2 * aspect - 1)
        height = min(h, max(1, round(math.sqrt(area * aspect))))
        width = min(w, max(1, round(math.sqrt(area / aspect))))
        top, start = int(y * (h - height + 1)), int(x * (w - width + 1))
        block = mask[top : top + height, start : start + width]
        num_new = int(block.size - block.sum())
        if num_new <= left:
            left -= num_new
            block[:] = True
        if left == 0:
            break


def masked_patches(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Flat indices (M,) int64 into the (N, h, w) patches, and each one's weight in iBOT (M,).

    An image's weights sum to 1 / N. On the CPU: on a device the host would wait for the count.
    """
    per_image = masks.flatten(1).sum(1)
    indices = masks.flatten().nonzero().squeeze(1)
    weight = 1 / (len(masks) * per_image.clamp(min=1))
    return indices, weight.repeat_interleave(per_image)


# --------------------------------------------------------------------------------------------
# On the device: pixels
# --------------------------------------------------------------------------------------------


def normalize_percentiles(images: Tensor, low: float = 0.1, high: float = 99.9) -> Tensor:
    """Each channel of each field from its percentiles `low`, `high` to 0 and 1, cut there.

    images: (B, C, H, W) of any bit depth, to float32. Percentiles are read from at most 65,536
    evenly spaced pixels. A channel without contrast becomes 0.
    """
    images = images.float()
    pixels = images.flatten(2)  # (B, C, H x W)
    pixels = pixels[..., :: math.ceil(pixels.shape[2] / MAX_PIXELS)]
    # Few pixels lie beyond either end, so topk is far faster than sorting all.
    below, above = (1 + round(p / 100 * (pixels.shape[2] - 1)) for p in (low, 100 - high))
    bottom = pixels.topk(below, largest=False).values[..., -1:, None]  # (B, C, 1, 1)
    top = pixels.topk(above).values[..., -1:, None]
    width = top - bottom
    return ((images - bottom) / width.where(width > 0, torch.inf)).clamp(0, 1)


def make_crops(images: Tensor, plan: Plan, size: int) -> Tensor:
    """Carry out a plan: (B, C, H, W) to (S, B, c, size, size), on the images' device."""
    crops = []
    for box, turn, mix in zip(plan.box, plan.turn, plan.mix, strict=True):  # one of S at a time
        mixed = torch.einsum("bdc,bchw->bdhw", mix, images)
        crops.append(_crop(mixed, box, turn, size))
    out = torch.stack(crops)  # (S, B, c, size, size)
    blur = _gaussian(plan.sigma, size).unsqueeze(2)  # (S, B, 1, size, size)
    out = blur @ out @ blur.transpose(-2, -1)
    brightness, contrast = plan.factors[..., None, None].unbind(3)  # (S, B, c, 1, 1)
    out = out * brightness
    mean = out.mean((-2, -1), keepdim=True)
    return mean + (out - mean) * contrast


def resize(images: Tensor, size: int) -> Tensor:
    """Whole fields (B, C, H, W) to (B, C, size, size), filtered as the crops are."""
    box = images.new_tensor((0.0, 0.0, 1.0, 1.0)).expand(len(images), 4)
    turn = torch.zeros(len(images), 3, dtype=torch.bool, device=images.device)
    return _crop(images, box, turn, size)


def _crop(images: Tensor, box: Tensor, turn: Tensor, size: int) -> Tensor:
    """Cut (B, C, H, W) to boxes (B, 4), resample to `size`, turn by (B, 3)."""
    H, W = images.shape[-2:]
    top, left, height, width = box.unbind(1)
    rows = _triangles(top, height, turn[:, 0], H, size).unsqueeze(1)  # (B, 1, size, H)
    columns = _triangles(left, width, turn[:, 1], W, size).unsqueeze(1)
    out = rows @ images @ columns.transpose(-2, -1)
    return torch.where(turn[:, 2, None, None, None], out.transpose(-2, -1), out)


def _triangles(start: Tensor, extent: Tensor, flip: Tensor, length: int, size: int) -> Tensor:
    """Weights (B, size, length) that resample one axis, antialiased as Pillow's bilinear filter.

    start, extent: (B,) shares of the axis. As a matrix product a crop costs little beside the
    network, needs no gather and no pyramid, and flips by the order of its rows. `grid_sample` would
    leave out most pixels when it shrinks, and small bright spots with them.
    """
    i = torch.arange(size, device=start.device) + 0.5
    i = torch.where(flip[:, None], size - i, i)  # (B, size)
    step = (extent * length / size)[:, None]  # pixels of the field for one of the crop
    center = start[:, None] * length + i * step
    x = torch.arange(length, device=start.device) + 0.5
    distance = (x - center[..., None]).abs() / step.clamp(min=1)[..., None]
    weights = (1 - distance).clamp(min=0)
    return weights / weights.sum(-1, keepdim=True)


def _gaussian(sigma: Tensor, size: int) -> Tensor:
    """Weights (..., size, size) that blur one axis by `sigma` (...) pixels; 0 changes nothing."""
    x = torch.arange(size, device=sigma.device)
    distance = (x[:, None] - x) / sigma.clamp(min=MIN_SIGMA)[..., None, None]
    weights = torch.exp(-0.5 * distance**2)
    return weights / weights.sum(-1, keepdim=True)
