"""From a picture to what the network sees: geometry on the CPU, arithmetic on the device.

Every random number is a function of (seed, epoch, sample) or (seed, step, pair of samples), so a
batch is the same whoever makes it: any number of workers or devices, before and after a resume.
"""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lib.params import Augment, Data

EXIF_ORIENTATION = 0x0112

CROP, JITTER, PAIR, ORDER = range(4)
"""Families of random numbers: the second word of every seed, so that no two share a stream."""


def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """The permutation of the data set in one epoch, (num_samples,)."""
    return np.random.default_rng((seed, ORDER, epoch)).permutation(num_samples)


def crop_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of one sample's crop and flip in one epoch."""
    return np.random.default_rng((seed, CROP, epoch, index))


def resampling(data: Data) -> Image.Resampling:
    return Image.Resampling[data.interpolation.upper()]


def random_crop_box(
    width: int, height: int, augment: Augment, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a random-resized-crop, pixels (Szegedy et al. 2015).

    Area share uniform in `scale`, aspect ratio log-uniform in `ratio`; after ten misses the
    largest centred crop of an allowed ratio.
    """
    area = width * height
    log_ratio = np.log(augment.ratio)
    for _ in range(10):
        target = area * rng.uniform(*augment.scale)
        ratio = math.exp(rng.uniform(*log_ratio))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    w = min(width, round(height * augment.ratio[1]))
    h = min(height, round(width / augment.ratio[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def train_view(
    image: Image.Image, size: tuple[int, int], data: Data, rng: np.random.Generator
) -> tuple[Image.Image, tuple[float, float, float, float], bool]:
    """Choose a training view: the JPEG read at a fitting scale, the box to crop, whether to flip.

    The JPEG decoder can drop whole octaves while it decodes (DCT scaling), which is several times
    faster for large photographs; the box is scaled along. The box is of the upright image.
    """
    turned = image.getexif().get(EXIF_ORIENTATION, 1) >= 5  # stored lying on its side
    width, height = image.size[::-1] if turned else image.size
    left, top, right, bottom = random_crop_box(width, height, data.augment, rng)
    flip = bool(rng.random() < data.augment.hflip)
    shrink = min((right - left) / size[1], (bottom - top) / size[0])
    if image.format == "JPEG" and shrink >= 2:
        image.draft(None, tuple(math.ceil(side / shrink) for side in image.size))
    new_width, new_height = image.size[::-1] if turned else image.size
    sx, sy = new_width / width, new_height / height
    return image, (left * sx, top * sy, right * sx, bottom * sy), flip


def val_box(width: int, height: int, data: Data) -> tuple[float, float, float, float]:
    """The centred box of the input's aspect ratio: `val_crop` of the largest there is, pixels."""
    input_height, input_width = data.input_size
    scale = min(width / input_width, height / input_height) * data.val_crop
    half_width, half_height = input_width * scale / 2, input_height * scale / 2
    x, y = width / 2, height / 2
    return x - half_width, y - half_height, x + half_width, y + half_height


# --------------------------------------------------------------------------------------------
# On the device, for a whole batch
# --------------------------------------------------------------------------------------------


def moments(data: Data, device: torch.device) -> tuple[Tensor, Tensor]:
    """Channel means and deviations of values in [0, 255], each (1, C, 1, 1) on the device."""
    mean, std = (
        torch.tensor(values, device=device).view(1, -1, 1, 1) * 255
        for values in (data.mean, data.std)
    )
    return mean, std


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 (B, C, H, W) to float32, channel means taken off and deviations divided by."""
    return (images.float() - mean) / std


def denormalize(images: Tensor, mean: Tensor, std: Tensor) -> np.ndarray:
    """What `normalize` made, back as uint8 pictures (B, H, W, C) for people."""
    pictures = (images.float() * std + mean).round().clamp(0, 255).byte()
    return pictures.permute(0, 2, 3, 1).cpu().numpy()


def color_jitter(images: Tensor, factors: Tensor) -> Tensor:
    """Scale brightness, contrast and saturation of uint8-valued float images.

    images: (B, C, H, W) in [0, 255]. factors: (B, 3), 1 changes nothing.
    """
    brightness, contrast, saturation = factors.view(-1, 3, 1, 1, 1).unbind(1)  # each (B, 1, 1, 1)
    images = images * brightness
    mean = images.mean((1, 2, 3), keepdim=True)
    images = mean + (images - mean) * contrast
    grey = images.mean(1, keepdim=True)
    return (grey + (images - grey) * saturation).clamp(0, 255)


def jitter_factors(
    strength: float, seed: int, step: int, positions: range, batch_size: int
) -> Tensor:
    """Brightness, contrast and saturation factors of the samples at `positions`, (B, 3)."""
    rng = np.random.default_rng((seed, JITTER, step))
    factors = rng.uniform(max(0.0, 1 - strength), 1 + strength, (batch_size, 3))
    return torch.from_numpy(factors[positions.start : positions.stop].astype(np.float32))


def mix_plan(
    augment: Augment, seed: int, step: int, positions: range, batch_size: int,
    size: tuple[int, int],
) -> Tensor:
    """How each sample of a batch is mixed with its neighbour, (B, 5): share, then the box cut out.

    Mixup (Zhang et al. 2018) keeps `share` of every pixel; cutmix (Yun et al. 2019) keeps all but
    the box left, top, right, bottom. Partners are positions 2i and 2i + 1 of the *global* batch of
    `batch_size`, for which all numbers are drawn, so the result does not depend on how it is split
    over devices or micro-batches. With both alphas set each pair takes one by a fair coin.
    """
    num_pairs = batch_size // 2
    rng = np.random.default_rng((seed, PAIR, step))
    coin, corner = rng.random(num_pairs), rng.random((num_pairs, 2))
    use_cutmix = (coin < 0.5) | (augment.mixup == 0) if augment.cutmix else coin < 0
    mixup_share, cutmix_share = (
        rng.beta(alpha, alpha, num_pairs) if alpha else np.ones(num_pairs)
        for alpha in (augment.mixup, augment.cutmix)
    )
    extent = np.array(size[::-1])  # width, height
    sides = np.where(use_cutmix, np.sqrt(1 - cutmix_share), 0)[:, None] * extent  # (pairs, 2)
    sides = np.round(sides)
    low = np.floor(corner * (extent - sides + 1))  # left, top
    plan = np.zeros((batch_size, 5), np.float32)
    plan[:, 0] = 1  # an unpaired last sample stays as it is
    pairs = np.column_stack((np.where(use_cutmix, 1, mixup_share), low, low + sides))
    plan[: 2 * num_pairs] = pairs.repeat(2, axis=0)
    return torch.from_numpy(plan[positions.start : positions.stop])


def swap_pairs(values: Tensor) -> Tensor:
    """Each sample's partner along the first axis; an unpaired last sample is its own."""
    even = len(values) // 2 * 2
    pairs = values[:even].unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return torch.cat([pairs, values[even:]])


def mix(images: Tensor, plan: Tensor) -> tuple[Tensor, Tensor]:
    """Carry out a `mix_plan`. images: float (B, C, H, W). Returns them mixed, and own shares (B,).
    """
    height, width = images.shape[-2:]
    share, left, top, right, bottom = plan.view(-1, 5, 1, 1, 1).unbind(1)  # each (B, 1, 1, 1)
    y = torch.arange(height, device=images.device).view(1, 1, -1, 1)
    x = torch.arange(width, device=images.device).view(1, 1, 1, -1)
    inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)  # (B, 1, H, W)
    keep = share * ~inside
    partner = swap_pairs(images)
    return partner + (images - partner) * keep, keep.mean((1, 2, 3))
