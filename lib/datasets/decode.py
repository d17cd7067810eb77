"""A region of an encoded picture, resampled into a given slot: the hot path of every loader.

JPEG is decoded by simplejpeg, at a fraction of its size where that is enough and not below the
region; what it refuses and everything else by PIL. torch resamples: its antialiased uint8 kernel
gives PIL's result in a third of the time. All of them free Python's lock.
"""

import io
import threading
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from lib.datasets import pictures

Box = tuple[float, float, float, float]  # left, top, right, bottom, pixels

MAX_EXTRA = 24  # output pixels computed beyond an edge of the box, to end on a whole pixel
TOLERANCE = 1 / 16  # of a pixel, by which the box may be misplaced
CONTEXT = 8  # rows decoded below the box: chroma is smoothed over its neighbours
SCRATCH_BYTES = 8 << 20  # decoded into memory that a thread keeps; a larger picture gets its own
FRAMES = (0xC0, 0xC1, 0xC2)  # JPEG's Huffman frames: baseline, extended, progressive
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations stored with width and height swapped
_scratch = threading.local()


class Header(NamedTuple):
    """What a picture says of itself before its pixels."""

    width: int  # of the upright picture, pixels
    height: int
    orientation: int  # EXIF's, 1 (upright) to 8
    frame: int  # where a JPEG's frame header stands; 0: PIL decodes this picture


def read_header(data: bytes | memoryview) -> Header:
    """Size and orientation without decoding. Raises one of pictures.BROKEN: no picture."""
    frame, has_app1 = _find_frame(data)
    if frame and not has_app1:  # neither EXIF nor XMP: the stored picture is upright
        height, width = (int.from_bytes(data[frame + i : frame + i + 2], "big") for i in (5, 7))
        if width * height <= Image.MAX_IMAGE_PIXELS:  # else PIL says what is wrong
            return Header(width, height, 1, frame)
    with Image.open(io.BytesIO(data)) as image:
        orientation = pictures.orientation(image)
        size = image.size[::-1] if orientation in SIDEWAYS else image.size
        return Header(*size, orientation, frame)


def _find_frame(data: bytes | memoryview) -> tuple[int, bool]:
    """Where the frame of an 8-bit JPEG of 1 or 3 channels stands or 0; whether APP1 precedes it."""
    place, has_app1 = 2, False
    while data[:2] == b"\xff\xd8" and place + 10 < len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker in FRAMES:
            return (place if data[place + 4] == 8 and data[place + 9] in (1, 3) else 0), has_app1
        has_app1 |= marker == 0xE1
        place += 2 + length
    return 0, has_app1


def decode_region(
    data: bytes | memoryview, header: Header, box: Box, out: np.ndarray, flip: bool = False,
    interpolation: str = "bilinear",
) -> None:
    """Resample `box` of the upright picture into `out`, uint8 (H, W, C), C 1 (grey) or 3 (RGB).

    `interpolation` is bilinear or bicubic, antialiased; `flip` mirrors the result. Raises one of
    pictures.BROKEN for data that PIL cannot decode either, or of more than 8 bits a channel.
    """
    (width, height, orientation, frame), size = header, out.shape[:2]
    left, top, right, bottom = box
    # Stored pixels become upright when transposed, then mirrored.
    transpose, mirror_x = orientation in SIDEWAYS, orientation in (2, 3, 6, 7)
    mirror_y = orientation in (3, 4, 7, 8)
    if mirror_x:
        left, right = width - right, width - left
    if mirror_y:
        top, bottom = height - bottom, height - top
    if transpose:
        left, top, right, bottom = top, left, bottom, right
        width, height, size = height, width, size[::-1]
    box = (left, top, right, bottom)  # as it lies in the stored picture
    fast = _decode_jpeg(data, frame, (width, height), box, size, out.shape[2]) if frame else None
    pixels, box = fast or (_decode_by_pil(data, out.shape[2]), box)
    result = _resample(pixels, box, size, interpolation)  # (1, C, h, w)
    result = result.transpose(2, 3) if transpose else result
    mirrored = [axis for axis, yes in ((3, mirror_x != flip), (2, mirror_y)) if yes]
    result = result.flip(mirrored) if mirrored else result
    torch.from_numpy(out)[None].permute(0, 3, 1, 2).copy_(result)


def _decode_jpeg(
    data: bytes | memoryview, frame: int, stored_size: tuple[int, int], box: Box,
    size: tuple[int, int], num_channels: int,
) -> tuple[np.ndarray, Box] | None:
    """The stored picture (h, w, C) at a fitting scale and the box in it; None: refused.

    Rows below the box are left out, by a smaller height in a copy of the frame header.
    """
    (width, height), (left, top, right, bottom) = stored_size, box
    shrink = min((right - left) / size[1], (bottom - top) / size[0])
    factor = next(factor for factor in (8, 4, 2, 1) if factor <= max(shrink, 1))
    small_width, small_height = -(-width // factor), -(-height // factor)
    to_x, to_y = small_width / width, small_height / height
    box = (left * to_x, top * to_y, right * to_x, bottom * to_y)
    edge = _whole_pixel(box[3], (box[3] - box[1]) / size[0], small_height)
    # Only with its end marker: a truncated file must not pass for one whose rest is skipped.
    is_cut = edge and edge[0] + CONTEXT < small_height and data[-2:] == b"\xff\xd9"
    if is_cut:
        small_height = edge[0] + CONTEXT
        data = bytearray(data)
        data[frame + 5 : frame + 7] = (small_height * factor).to_bytes(2, "big")
    if not hasattr(_scratch, "pixels"):
        _scratch.pixels = np.empty(SCRATCH_BYTES, np.uint8)
    fits = small_width * small_height * num_channels <= SCRATCH_BYTES
    at_least = (small_height, small_width) if factor > 1 else (0, 0)
    try:
        return simplejpeg.decode_jpeg(
            data, "RGB" if num_channels == 3 else "GRAY", False, False, *at_least, min_factor=2,
            buffer=_scratch.pixels if fits else None, strict=not is_cut,
        ), box
    except ValueError:
        return None


def _decode_by_pil(data: bytes | memoryview, num_channels: int) -> np.ndarray:
    """The picture as it is stored, (h, w, C)."""
    with Image.open(io.BytesIO(data)) as image:
        if pictures.orientation(image) != 1:
            image.getexif()[pictures.EXIF_ORIENTATION] = 1  # turned after the resampling
        pixels = np.array(pictures.decoded(image, pictures.MODES[num_channels]))
    return pixels.reshape(*pixels.shape[:2], num_channels)


def _resample(pixels: np.ndarray, box: Box, size: tuple[int, int], interpolation: str) -> Tensor:
    """The box of `pixels` (h, w, C) at `size` (H, W): uint8 (1, C, H, W).

    torch resamples between whole pixels. So the box is extended by whole output pixels to where its
    edges meet whole pixels, and these are cut off again; where they do not meet, PIL does it.
    """
    (height, width), (h, w) = size, pixels.shape[:2]
    step_x, step_y = (box[2] - box[0]) / width, (box[3] - box[1]) / height
    steps, limits = (-step_x, -step_y, step_x, step_y), (w, h, w, h)
    edges = [_whole_pixel(*edge) for edge in zip(box, steps, limits, strict=True)]
    if None in edges:
        image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
        result = image.resize((width, height), Image.Resampling[interpolation.upper()], box=box)
        return torch.from_numpy(np.array(result).reshape(1, height, width, -1)).permute(0, 3, 1, 2)
    (x0, more_left), (y0, more_top), (x1, more_right), (y1, more_bottom) = edges
    region = torch.from_numpy(np.ascontiguousarray(pixels[y0:y1, x0:x1]))
    full_size = (more_top + height + more_bottom, more_left + width + more_right)
    result = torch.nn.functional.interpolate(
        region[None].permute(0, 3, 1, 2), full_size, mode=interpolation, antialias=True
    )
    return result[:, :, more_top : more_top + height, more_left : more_left + width]


def _whole_pixel(edge: float, step: float, limit: int) -> tuple[int, int] | None:
    """The first whole pixel that lies `count` steps outward from an edge, and that count."""
    for count in range(MAX_EXTRA + 1):
        place = edge + count * step
        pixel = min(max(round(place), 0), limit)
        if abs(place - pixel) <= TOLERANCE * min(abs(step), 1):
            return pixel, count
    return None
