"""Boxes and pixels move together, there and back, as a function of (seed, epoch, sample) alone."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lib.datasets import box_transforms as bt
from lib.datasets import coco
from lib.datasets.box_transforms import BoxAugment, View
from lib.datasets.transforms import crop_rng
from lib.errors import BadInput
from lib.params import Data
from lib.tasks import coco_metric

BILINEAR = Image.Resampling.BILINEAR
REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "coco128"
SIZES = [(64, 64), (96, 160), (97, 333), (808, 1440)]
RTDETR = BoxAugment(hflip=0.5, zoom_out=0.5, iou_crop=0.8)
YOLO = BoxAugment(hflip=0.5, scale=(0.5, 1.5), translate=0.1, mosaic=1.0)
COLOURS = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255),
                    (255, 0, 255), (255, 255, 255), (0, 0, 0)])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Eight mid-grey pictures of several sizes, each with one rectangle in a colour of its own,
    which is its box; the label is the picture.
    """
    root = tmp_path_factory.mktemp("rectangles")
    rng = np.random.default_rng(0)
    images, annotations = [], []
    (root / "annotations").mkdir()
    (root / "train").mkdir()
    for i, (width, height) in enumerate(
        [(200, 100), (100, 200), (150, 150), (640, 480), (90, 120), (300, 80), (120, 90), (64, 64)]
    ):
        w, h = rng.integers(width // 3, width // 2), rng.integers(height // 3, height // 2)
        x, y = rng.integers(0, width - w), rng.integers(0, height - h)
        pixels = np.full((height, width, 3), 114, np.uint8)
        pixels[y : y + h, x : x + w] = COLOURS[i]
        Image.fromarray(pixels).save(root / "train" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": width, "height": height})
        annotations.append({"id": i, "image_id": i, "category_id": i,
                            "bbox": [int(x), int(y), int(w), int(h)]})
    categories = [{"id": i, "name": str(i)} for i in range(8)]
    (root / "annotations" / "instances_train.json").write_text(json.dumps(
        {"images": images, "annotations": annotations, "categories": categories}
    ))
    return coco.open_splits(Data(root=str(root), val="train"), 3)[0]


def rendered(sample, dataset) -> np.ndarray:
    slot = np.empty((*sample.size, 3), np.uint8)
    bt.render(sample, dataset, slot, BILINEAR)
    return slot


def painted_box(pixels: np.ndarray, colour: np.ndarray) -> tuple | None:
    """Left, top, right, bottom of what is of this colour; None: hardly anything is."""
    near = (np.abs(pixels.astype(int) - colour) < 60).all(2)
    rows, columns = np.flatnonzero(near.any(1)), np.flatnonzero(near.any(0))
    if not len(rows):
        return None
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def corners(box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    cx, cy, w, h = box * np.array([size[1], size[0]] * 2)
    return np.array([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])


def check_boxes_lie_on_their_rectangles(sample, dataset) -> None:
    pixels = rendered(sample, dataset)
    times = Counter(tile.index for tiles in sample.layers for tile in tiles)
    for box, label in zip(sample.boxes, sample.labels, strict=True):
        if times[label] > 1:
            continue  # a mosaic may hold a picture twice
        wanted = corners(box, sample.size)
        found = painted_box(pixels, COLOURS[label])
        if (wanted[2:] - wanted[:2]).min() > 8:  # large enough to have pixels of the pure colour
            # A pixel of blur at the rim, and one that the picture's edge covers in part.
            np.testing.assert_allclose(found, wanted, atol=2.1)
    for label in set(range(8)) - set(sample.labels.tolist()):
        found = painted_box(pixels, COLOURS[label])
        # What has no box is hardly there. (Black and white also come from overshoot: skip.)
        if found is not None and label < 6:
            shown = (found[2] - found[0]) * (found[3] - found[1])
            assert shown < 0.15 * np.prod(sample.size)


@pytest.mark.parametrize("letterbox", [False, True])
@pytest.mark.parametrize("size", [*SIZES[:3], (202, 360)])
def test_plain_boxes_lie_on_their_rectangles(dataset, size, letterbox):
    for index in range(len(dataset)):
        check_boxes_lie_on_their_rectangles(bt.plain(dataset, index, size, letterbox), dataset)


@pytest.mark.parametrize("letterbox", [False, True])
@pytest.mark.parametrize("augment", [RTDETR, YOLO, BoxAugment(hflip=1.0)],
                         ids=["rtdetr", "yolo", "flip"])
def test_augmented_boxes_lie_on_their_rectangles(dataset, augment, letterbox):
    for index in range(len(dataset)):
        for epoch in range(5):
            sample = bt.plan(
                dataset, index, (160, 224), letterbox, augment, crop_rng(0, epoch, index)
            )
            check_boxes_lie_on_their_rectangles(sample, dataset)


@pytest.mark.parametrize("letterbox", [False, True])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_ground_truth_there_and_back_scores_one(dataset, size, mirrored, letterbox):
    """The property that the whole way rests on: AP 1.0 at every size, after flips too."""
    images, boxes, labels = [], [], []
    for index in range(len(dataset)):
        sample = bt.plain(dataset, index, size, letterbox)
        view = sample.layers[0][0].view
        there = sample.boxes
        if mirrored:
            view = view.mirrored()
            there = bt.to_network(dataset.targets(index)[0], view.array()).astype(np.float32)
        boxes.append(bt.to_image(there, view.array()))
        labels.append(sample.labels)
        images += [index] * len(sample.labels)
    detections = coco_metric.Detections(
        np.array(images), np.concatenate(boxes), np.ones(len(images)), np.concatenate(labels)
    )
    assert coco_metric.evaluate(detections, dataset).metrics["mAP"] == 1.0


@pytest.mark.skipif(not REAL.is_dir(), reason="the real COCO images are not here")
@pytest.mark.parametrize("letterbox", [False, True])
@pytest.mark.parametrize("size", [(320, 320), (256, 448)])
def test_real_ground_truth_there_and_back_scores_one(size, letterbox):
    _, val = coco.open_splits(Data(root=str(REAL), train="train2017", val="val2017"), 3)
    samples = [bt.plain(val, index, size, letterbox) for index in range(len(val))]
    boxes = [bt.to_image(sample.boxes, sample.layers[0][0].view.array()) for sample in samples]
    counts = [len(sample.labels) for sample in samples]
    detections = coco_metric.Detections(
        np.repeat(np.arange(len(val)), counts), np.concatenate(boxes), np.ones(sum(counts)),
        np.concatenate([sample.labels for sample in samples]),
    )
    metrics = coco_metric.evaluate(detections, val).metrics
    assert metrics["mAP"] == metrics["mAP_small"] == metrics["mAP_large"] == 1.0


def test_to_image_takes_a_batch_and_cuts_to_the_picture():
    views = np.stack([View(1, 1, 0, 0).array(), View(0.5, 1, 0.25, 0).mirrored().array()])
    boxes = np.tile(np.array([0.3, 0.5, 0.2, 1.2]), (2, 3, 1))  # (B, n, 4)
    back = bt.to_image(boxes, views)
    assert back.shape == (2, 3, 4) and back.dtype == np.float32
    np.testing.assert_allclose(back[0, 0], [0.3, 0.5, 0.2, 1.0], atol=1e-6)
    # In the mirror 0.3 is 0.7, which is 0.9 of the middle half; from 0.7 on, cut at 1.
    np.testing.assert_allclose(back[1, 0], [0.85, 0.5, 0.3, 1.0], atol=1e-6)


@pytest.mark.parametrize("image_size, size, covered", [
    ((1920, 1080), (808, 1440), (808, 1436)),
    ((1440, 808), (808, 1440), (808, 1440)),
    ((640, 480), (640, 640), (480, 640)),
    ((3, 1000), (64, 64), (64, 1)),
])
def test_d12_the_letterbox_is_of_the_asked_size(image_size, size, covered):
    view = bt.fit(image_size, size, letterbox=True)
    assert round(view.scale_y * size[0], 6) == covered[0]
    assert round(view.scale_x * size[1], 6) == covered[1]
    assert (view.offset_x * size[1]).is_integer() and (view.offset_y * size[0]).is_integer()


def test_the_defaults_change_nothing(dataset):
    for letterbox in (False, True):
        plain = bt.plain(dataset, 3, (96, 160), letterbox)
        planned = bt.plan(dataset, 3, (96, 160), letterbox, BoxAugment(), crop_rng(0, 0, 3))
        views = [sample.layers[0][0].view.array() for sample in (planned, plain)]
        np.testing.assert_allclose(*views, atol=1e-12)
        assert planned.layers[0][0].window == plain.layers[0][0].window == (0, 0, 160, 96)
        np.testing.assert_allclose(planned.boxes, plain.boxes, atol=1e-7)


def test_a_sample_is_a_function_of_seed_epoch_and_index(dataset):
    mixed = BoxAugment(mosaic=0.5, mixup=0.5, scale=(0.5, 1.5), hflip=0.5)

    def make(seed, epoch, index):
        sample = bt.plan(dataset, index, (64, 64), True, mixed, crop_rng(seed, epoch, index))
        return rendered(sample, dataset).tobytes() + sample.boxes.tobytes()

    first = make(0, 0, 2)
    make(0, 0, 5)  # what was made before does not matter
    assert make(0, 0, 2) == first
    assert len({first, make(1, 0, 2), make(0, 1, 2), make(0, 0, 3)}) == 4


@pytest.mark.parametrize("hflip", [0.0, 1.0])
def test_the_pictures_of_a_mosaic_meet_where_their_windows_do(dataset, hflip):
    augment = BoxAugment(mosaic=1.0, scale=(0.5, 1.5), translate=0.2, hflip=hflip)
    seams = 0
    for index in range(20):
        sample = bt.plan(dataset, index % 8, (90, 130), True, augment, crop_rng(0, 0, index))
        for tile in sample.layers[0]:
            ends = np.array([[tile.view.offset_x, tile.view.offset_x + tile.view.scale_x],
                             [tile.view.offset_y, tile.view.offset_y + tile.view.scale_y]])
            ends = np.sort(ends, 1) * [[130], [90]]  # where the picture begins and ends, x and y
            for axis, side in ((0, 130), (1, 90)):
                for end, edge in enumerate((tile.window[axis], tile.window[axis + 2])):
                    if 0 < edge < side:
                        assert abs(ends[axis, end] - edge) <= 0.5
                        seams += 1
        covered = sum((r - x) * (b - y) for x, y, r, b in (t.window for t in sample.layers[0]))
        assert covered == 90 * 130
    assert seams > 50


def test_mosaic_and_mixup_have_an_off_switch(dataset):
    augment = BoxAugment(mosaic=1.0, mixup=1.0)
    on = bt.plan(dataset, 0, (64, 64), True, augment, crop_rng(0, 0, 0))
    off = bt.plan(dataset, 0, (64, 64), True, augment, crop_rng(0, 0, 0), join=False)
    assert len(on.layers) == 2 and len(on.layers[0]) > 1
    assert len(off.layers) == 1 and len(off.layers[0]) == 1 and off.labels.tolist() == [0]


def test_mixup_blends_pixels_and_joins_boxes(dataset):
    augment = BoxAugment(mixup=1.0)
    sample = bt.plan(dataset, 0, (64, 64), False, augment, crop_rng(0, 0, 0))
    assert sum(sample.weights) == 1 and 0.2 < sample.weights[0] < 0.8
    parts = [rendered(bt.plain(dataset, layer[0].index, (64, 64), False), dataset)
             for layer in sample.layers]
    wanted = sum(part * weight for part, weight in zip(parts, sample.weights, strict=True))
    np.testing.assert_allclose(rendered(sample, dataset), wanted, atol=1)
    assert sample.labels.tolist() == [layer[0].index for layer in sample.layers]


def test_iou_crop_keeps_a_box_by_the_drawn_overlap():
    boxes = np.array([[0.2, 0.3, 0.1, 0.2], [0.7, 0.6, 0.3, 0.4]])
    sizes = Counter()
    for seed in range(200):
        left, top, right, bottom = bt.iou_crop(
            boxes, (0.0, 0.0, 1.0, 1.0), 1.5, np.random.default_rng(seed)
        )
        assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
        inside = (boxes[:, :2] > (left, top)) & (boxes[:, :2] < (right, bottom))
        assert inside.all(1).any()
        whole = (left, top, right, bottom) == (0, 0, 1, 1)
        sizes["whole" if whole else "part"] += 1
        if not whole:
            assert 0.5 <= 1.5 * (right - left) / (bottom - top) <= 2
    assert sizes["part"] > 100 and sizes["whole"] > 15


def test_iou_crop_reaches_the_drawn_overlap(monkeypatch):
    monkeypatch.setattr(bt, "MIN_IOUS", (0.7,))
    box = np.array([[0.5, 0.5, 0.6, 0.6]])
    for seed in range(20):
        crop = bt.iou_crop(box, (0.0, 0.0, 1.0, 1.0), 1.0, np.random.default_rng(seed))
        sides = np.minimum(crop[2:], 0.8) - np.maximum(crop[:2], 0.2)
        area = (crop[2] - crop[0]) * (crop[3] - crop[1])
        assert sides.prod() / (0.36 + area - sides.prod()) >= 0.7


def test_after_a_crop_only_boxes_with_their_centre_inside_are_kept(dataset, monkeypatch):
    cx, cy, w, h = dataset.targets(0)[0][0].tolist()
    for share, kept in ((0.4, 0), (0.6, 1)):  # of the box's width inside
        crop = (0.0, 0.0, cx - w / 2 + share * w, 1.0)
        monkeypatch.setattr(bt, "iou_crop", lambda *arguments, crop=crop: crop)
        sample = bt.plan(dataset, 0, (64, 64), False, BoxAugment(iou_crop=1.0), crop_rng(0, 0, 0))
        assert len(sample.boxes) == len(sample.labels) == kept


def test_zoom_is_about_the_middle():
    whole = View(1, 1, 0, 0)
    assert whole.zoomed(0.5, (0.5, 0.5)) == View(0.5, 0.5, 0.25, 0.25)
    assert whole.zoomed(2.0, (0.6, 0.5)) == View(2.0, 2.0, -0.4, -0.5)


def test_a_picture_without_boxes_is_augmented_too(dataset, monkeypatch):
    nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    monkeypatch.setattr(dataset, "targets", lambda index: nothing, raising=False)
    for augment in (RTDETR, YOLO):
        sample = bt.plan(dataset, 0, (64, 64), True, augment, crop_rng(0, 0, 0))
        assert sample.boxes.shape == (0, 4) and sample.labels.shape == (0,)


def test_a_sliver_of_a_box_is_no_target(dataset):
    tile = bt.Tile(0, View(1, 1, 0, 0), (0, 0, 100, 100))
    boxes = np.array([
        [1.04, 0.5, 0.2, 0.2],  # 30 % inside
        [1.085, 0.5, 0.2, 0.2],  # 7.5 %
        [0.5, 0.5, 0.009, 0.2],  # less than a pixel
    ])
    kept, keep = bt._visible(boxes, tile, (100, 100))
    assert keep.tolist() == [True, False, False]
    np.testing.assert_allclose(kept, [[0.97, 0.5, 0.06, 0.2]], atol=1e-6)


def test_sizes_of_steps():
    sizes = [bt.step_size(0, step, (640, 960), 0.25) for step in range(200)]
    assert sizes == [bt.step_size(0, step, (640, 960), 0.25) for step in range(200)]
    heights, widths = map(set, zip(*sizes, strict=True))
    assert heights == set(range(480, 801, 32))
    assert widths <= set(range(704, 1217, 32))
    assert all(abs(w / h - 1.5) < 0.1 for h, w in sizes)
    assert bt.step_size(0, 3, (808, 1440), 0.0) == (808, 1440)


def test_large_jpegs_are_decoded_small(tmp_path):
    """The shortcut gives the same picture, upright too, and is not taken where it would blur."""
    gradient = np.linspace(0, 255, 1600).astype(np.uint8)
    pixels = np.stack([np.tile(gradient, (1200, 1)), np.tile(gradient[:1200, None], (1, 1600)),
                       np.full((1200, 1600), 90, np.uint8)], 2)
    (tmp_path / "train").mkdir()
    picture = Image.fromarray(pixels)
    exif = picture.getexif()
    exif[0x0112] = 3  # upside down
    picture.save(tmp_path / "train" / "a.jpg", exif=exif, quality=95)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_train.json").write_text(json.dumps({
        "images": [{"id": 1, "file_name": "a.jpg", "width": 1600, "height": 1200}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9]}],
        "categories": [{"id": 1, "name": "a"}],
    }))
    dataset, _ = coco.open_splits(Data(root=str(tmp_path), val="train"), 3)
    image = dataset.open(0)
    bt._draft(image, View(1, 1, 0, 0), (120, 160, 3))
    assert image.size == (200, 150)
    image = dataset.open(0)
    bt._draft(image, View(4, 4, 0, 0), (1200, 1600, 3))
    assert image.size == (1600, 1200)
    small = rendered(bt.plain(dataset, 0, (120, 160), False), dataset)
    wanted = picture.rotate(180).resize((160, 120), BILINEAR)
    assert np.abs(small.astype(int) - np.asarray(wanted)).mean() < 2


def test_d6_a_broken_picture_is_named(dataset, tmp_path, monkeypatch):
    whole = (dataset.root / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes(whole[: len(whole) // 2])
    monkeypatch.setattr(dataset, "root", tmp_path)
    with pytest.raises(BadInput, match="0.png: cannot be decoded"):
        rendered(bt.plain(dataset, 0, (64, 64), False), dataset)


def test_padding_of_targets(dataset):
    samples = [bt.plain(dataset, i, (64, 64), False) for i in (1, 2)]
    empty = bt.Sample((64, 64), (), (), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    boxes, labels = bt.pad_targets([samples[0], empty, samples[1]])
    assert boxes.shape == (3, 1, 4) and boxes.dtype == torch.float32
    assert labels.tolist() == [[1], [-1], [2]] and labels.dtype == torch.int64
    boxes, labels = bt.pad_targets([empty])
    assert boxes.shape == (1, 0, 4) and labels.shape == (1, 0)


@pytest.mark.parametrize("num_channels", [1, 3])
def test_colour_changes_nothing_by_default(num_channels):
    images = torch.rand(2, num_channels, 4, 4) * 255
    maps = bt.colour_matrices(BoxAugment(), 0, 0, np.arange(2), num_channels)
    torch.testing.assert_close(bt.recolour(images, maps), images, atol=1e-3, rtol=0)


def test_colour_by_hand():
    grey = torch.full((1, 3, 2, 2), 100.0)
    for augment in (BoxAugment(hue=0.5), BoxAugment(saturation=0.9)):
        maps = bt.colour_matrices(augment, 0, 0, np.array([5]), 3)
        torch.testing.assert_close(bt.recolour(grey, maps), grey, atol=0.1, rtol=0)  # no colour
    middle = torch.full((1, 3, 2, 2), 127.5)
    maps = bt.colour_matrices(BoxAugment(contrast=0.9), 0, 0, np.array([5]), 3)
    torch.testing.assert_close(bt.recolour(middle, maps), middle, atol=0.1, rtol=0)
    maps = bt.colour_matrices(BoxAugment(brightness=0.4), 0, 0, np.arange(50), 1)
    factors = maps[:, 0, 0]
    assert 0.6 <= factors.min() < 0.7 and 1.3 < factors.max() <= 1.4
    again = bt.colour_matrices(BoxAugment(brightness=0.4), 0, 0, np.array([7]), 1)
    assert again[0, 0, 0] == factors[7]
