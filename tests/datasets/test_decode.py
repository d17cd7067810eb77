"""Regions of pictures: PIL's result, for every kind of file, at a part of the time."""

import functools
import io
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import sklearn.datasets
import torch
from PIL import Image

from lib.datasets import decode, pictures
from lib.datasets.decode import decode_region, read_header

PHOTOS = [
    Image.open(Path(sklearn.datasets.__file__).parent / "images" / name).convert("RGB")
    for name in ("china.jpg", "flower.jpg")
]
"""Real photographs, 640 x 427."""


def jpeg(image: Image.Image, **options) -> bytes:
    return encoded(image, "JPEG", **({"quality": 90} | options))


def encoded(image: Image.Image, format_: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


def region(data: bytes, box, size=(224, 224), channels=3, **options) -> np.ndarray:
    out = np.full((*size, channels), 77, np.uint8)
    decode_region(data, read_header(data), box, out, **options)
    return out


def reference(data: bytes, box, size=(224, 224), mode="RGB", interpolation="bilinear"):
    """PIL's whole way, without scaling while decoding."""
    image = pictures.decoded(Image.open(io.BytesIO(data)), mode)
    filter_ = Image.Resampling[interpolation.upper()]
    image = image.resize(size[::-1], filter_, box=box)
    return np.asarray(image).reshape(*size, -1)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute, grey levels."""
    return np.abs(a.astype(int) - b).mean()


def random_boxes(width: int, height: int, count: int, whole: bool, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        w, h = rng.uniform(0.3, 1, 2) * (width, height)
        left, top = rng.uniform(0, 1, 2) * (width - w, height - h)
        box = left, top, left + w, top + h
        yield tuple(map(int, box)) if whole else box


# -- against PIL -------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("whole", [True, False])
def test_photographs_differ_from_pil_by_less_than_a_grey_level(interpolation, whole):
    """Where nothing is scaled while decoding: the mean over boxes below 0.5, each below 1."""
    found = []
    for photo in PHOTOS:
        data = jpeg(photo)
        for box in random_boxes(*photo.size, 8, whole):
            size = (400, 400) if box[2] - box[0] > 400 else (160, 200)
            size = (min(size[0], int(box[3] - box[1])), size[1])
            if min((box[2] - box[0]) / size[1], (box[3] - box[1]) / size[0]) >= 2:
                size = (size[0] * 2, size[1] * 2)
            ours = region(data, box, size, interpolation=interpolation)
            found.append(difference(ours, reference(data, box, size, interpolation=interpolation)))
    assert max(found) < 1 and np.mean(found) < 0.5, found


@pytest.mark.parametrize("times", [2, 3, 5])
def test_large_photographs_decoded_at_a_fraction_stay_within_two_levels(times, monkeypatch):
    scaled = []
    real = simplejpeg.decode_jpeg
    monkeypatch.setattr(
        simplejpeg, "decode_jpeg", lambda *a, **k: scaled.append(real(*a, **k)) or scaled[-1]
    )
    found = []
    for photo in PHOTOS:
        large = photo.resize((photo.width * times - 3, photo.height * times - 1))
        data = jpeg(large)
        for box in random_boxes(*large.size, 4, whole=True):
            found.append(difference(region(data, box, (96, 96)), reference(data, box, (96, 96))))
    assert np.mean(found) < 2 and max(found) < 4, found
    assert max(pixels.shape[1] for pixels in scaled) <= large.width // 2 + 1


def test_box_between_pixels_lies_where_it_should():
    """On a ramp of 5 grey levels a pixel a misplacement by a pixel is 5 levels."""
    ramp = np.broadcast_to((np.arange(50) * 5).astype(np.uint8)[None, :, None], (40, 50, 3))
    data = encoded(Image.fromarray(ramp), "PNG")
    for left in np.linspace(3, 4, 9):
        box = (left, 5, left + 30, 35)
        ours = region(data, box, (17, 21))
        centers = left + (np.arange(21) + 0.5) * 30 / 21
        assert np.abs(ours.mean((0, 2))[1:-1] - (centers - 0.5)[1:-1] * 5).max() < 1.2, left


def test_enlarging_is_plain_interpolation():
    data = jpeg(PHOTOS[0])
    box = (100, 50, 180, 110)
    assert difference(region(data, box), reference(data, box)) < 1.5


def test_flip_mirrors_the_result():
    data, box = jpeg(PHOTOS[1]), (10, 20, 400, 300)
    assert np.array_equal(region(data, box, flip=True), region(data, box)[:, ::-1])


def test_slot_may_be_a_window_of_a_larger_array():
    data, box = jpeg(PHOTOS[1]), (10, 20, 400, 300)
    canvas = np.full((300, 300, 3), 9, np.uint8)
    decode_region(data, read_header(data), box, canvas[20:120, 30:180])
    assert np.array_equal(canvas[20:120, 30:180], region(data, box, (100, 150)))
    canvas[20:120, 30:180] = 9
    assert (canvas == 9).all()


# -- the rows that are not decoded -----------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"restart_marker_rows": 1},
])
@pytest.mark.parametrize("times", [1, 3])
def test_leaving_out_rows_below_the_box_changes_nothing(options, times, monkeypatch):
    photo = PHOTOS[0].resize((PHOTOS[0].width * times, PHOTOS[0].height * times))
    data = jpeg(photo, **options)
    boxes = [(0, 0, photo.width, bottom) for bottom in (101, 130, 197, photo.height - 1)]
    heights = []
    real = simplejpeg.decode_jpeg
    monkeypatch.setattr(
        simplejpeg, "decode_jpeg",
        lambda *a, **k: heights.append(len(real(*a, **k))) or real(*a, **k),
    )
    few = [region(data, box, (90, 200)) for box in boxes]
    monkeypatch.setattr(decode, "CONTEXT", 10**6)
    for ours, box in zip(few, boxes, strict=True):
        assert np.array_equal(ours, region(data, box, (90, 200))), box
    assert heights[0] < 140 and heights[0] < heights[4]


# -- every kind of file -------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("flip", [False, True])
def test_every_exif_orientation_is_set_upright(orientation, flip):
    exif = Image.Exif()
    exif[pictures.EXIF_ORIENTATION] = orientation
    data = jpeg(PHOTOS[0], exif=exif)
    header = read_header(data)
    upright = (427, 640) if orientation >= 5 else (640, 427)
    assert header[:2] == upright and header.orientation == orientation
    box = (50, 30, upright[0] - 10, upright[1] - 70)
    wanted = reference(data, box, (200, 230))
    assert difference(region(data, box, (200, 230), flip=flip),
                      wanted[:, ::-1] if flip else wanted) < 1
    wrong = wanted[:, ::-1]
    assert difference(wrong, wanted) > 10  # the picture tells orientations apart


@functools.cache
def files() -> dict[str, bytes]:
    photo, grey = PHOTOS[0], PHOTOS[0].convert("L")
    exif = Image.Exif()
    exif[pictures.EXIF_ORIENTATION] = 6
    return {
        "grey jpeg": jpeg(grey),
        "cmyk jpeg": jpeg(photo.convert("CMYK")),
        "rgb jpeg, kept as rgb": jpeg(photo, keep_rgb=True),
        "progressive jpeg": jpeg(photo, progressive=True),
        "jpeg with bytes after its end": jpeg(photo) + bytes(50),
        "png": encoded(photo, "PNG", compress_level=1),
        "grey png": encoded(grey, "PNG"),
        "palette png": encoded(photo.quantize(64), "PNG"),
        "transparent png": encoded(photo.convert("RGBA"), "PNG"),
        "png lying on its side": encoded(photo, "PNG", exif=exif),
        "webp": encoded(photo, "WEBP"),
        "cmyk tiff": encoded(photo.convert("CMYK"), "TIFF"),
    }


@pytest.mark.parametrize("kind", files())
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_file_is_read_as_pil_reads_it(kind, channels):
    data = files()[kind]
    header = read_header(data)
    image = Image.open(io.BytesIO(data))
    assert header[:2] == pictures.upright_size(image)
    box, mode = (0, 0, *header[:2]), pictures.MODES[channels]
    ours = region(data, box, (240, 300), channels)
    assert difference(ours, reference(data, box, (240, 300), mode)) < 0.6
    whole = region(data, box, header[1::-1], channels)  # not resampled: PIL's pixels
    exact = reference(data, box, header[1::-1], mode)
    assert difference(whole, exact) <= (0.6 if header.frame and channels == 1 else 0), kind


@pytest.mark.parametrize("data", [memoryview, bytearray, bytes])
def test_any_buffer_will_do(data):
    content, box = jpeg(PHOTOS[1]), (10, 20, 400, 300)
    assert np.array_equal(region(data(content), box), region(content, box))


@functools.cache
def broken() -> dict[str, bytes]:
    content = jpeg(PHOTOS[0])
    deep = Image.fromarray(np.arange(24 * 40, dtype=np.uint16).reshape(24, 40) * 60)
    place = content.index(b"\xff\xc0") + 5
    huge = content[:place] + b"\xff\xdc\xff\xdc" + content[place + 4 :]
    return {
        "truncated jpeg": content[: len(content) // 2],
        "jpeg of four billion pixels": huge,
        "truncated progressive jpeg": jpeg(PHOTOS[0], progressive=True)[:20000],
        "jpeg cut in its header": content[:100],
        "truncated png": encoded(PHOTOS[0], "PNG")[:50000],
        "16-bit png": encoded(deep, "PNG"),
        "float tiff": encoded(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"),
        "an error page": b"<html><body>404 Not Found</body></html>",
        "nothing": b"",
        "zeros": bytes(500),
    }


@pytest.mark.parametrize("kind", broken())
def test_what_pil_cannot_decode_is_refused_and_the_slot_is_not_half_filled(kind):
    data = broken()[kind]
    out = np.full((32, 32, 3), 77, np.uint8)
    with pytest.raises(pictures.BROKEN) as caught:
        header = read_header(data)
        decode_region(data, header, (0, 0, header.width, header.height // 4), out)
    assert (out == 77).all()
    if "16" in kind or "float" in kind:
        assert "8 bits" in str(caught.value)


def test_damage_in_the_middle_that_pil_passes_over_is_passed_over():
    content = bytearray(jpeg(PHOTOS[0]))
    content[len(content) // 2 : len(content) // 2 + 40] = b"\x55" * 40
    box = (0, 0, 640, 427)
    assert difference(region(bytes(content), box), reference(bytes(content), box)) < 1


def test_threads_do_not_share_their_memory():
    from concurrent.futures import ThreadPoolExecutor

    torch.set_num_threads(1)
    jobs = [(jpeg(photo), box) for photo in PHOTOS for box in random_boxes(640, 427, 20, True)]
    alone = [region(*job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda job: region(*job), jobs * 3))
    assert all(np.array_equal(a, b) for a, b in zip(alone * 3, together, strict=True))
