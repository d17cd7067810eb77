"""Reading one picture file: what every format of data shares."""

import os
import struct
from pathlib import Path

from PIL import Image, ImageOps

from lib.errors import BadInput

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"))
EXIF_ORIENTATION = 0x0112
MODES = {1: "L", 3: "RGB"}
"""PIL's mode by the number of channels the network reads."""
BROKEN = (OSError, SyntaxError, ValueError, TypeError, struct.error, Image.DecompressionBombError)
"""What PIL's decoders raise for a file that is no good picture."""


def is_image_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def open_picture(path: Path) -> Image.Image:
    """The picture, header read and pixels still on disk."""
    try:
        return Image.open(path)
    except BROKEN as error:
        raise unreadable(path, error) from None


def orientation(image: Image.Image) -> int:
    """The EXIF tag, 1 for upright; 5 and above swap width and height."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # else PIL decodes all pixels to see whether the tag comes after them
    return image.getexif().get(EXIF_ORIENTATION, 1)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height as a viewer shows the picture."""
    return image.size[::-1] if orientation(image) >= 5 else image.size


def decoded(image: Image.Image, mode: str) -> Image.Image:
    """The pixels, upright by the EXIF tag, as `mode` "L" or "RGB"."""
    if orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        # PIL would cut these at 255: thousands of grey levels become a handful.
        raise ValueError(f"more than 8 bits a channel, mode {image.mode}; scale it to 8 bits")
    return image if image.mode == mode else image.convert(mode)


def unreadable(path: Path, error: Exception) -> BadInput:
    return BadInput(f"{path}: cannot be decoded ({error}); replace or remove the file")
