"""Geometry against the params' ranges and torchvision; mixing and jitter pixel by pixel."""

import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import stats
from torchvision.transforms import v2

from lib.datasets import transforms
from lib.datasets.folder import EXIF_ORIENTATION, FolderDataset
from lib.models.classifier import cross_entropy
from lib.params import Augment, Data
from lib.tasks import build_task

CPU = torch.device("cpu")


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Pictures of the world fall off as 1/f: colour noise of that spectrum, with a few edges."""
    rng = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    falloff = 1 / np.maximum(np.hypot(fy, fx), 1 / max(width, height))
    planes = []
    for _ in range(3):
        phases = rng.standard_normal(falloff.shape) + 1j * rng.standard_normal(falloff.shape)
        plane = np.fft.irfft2(phases * falloff, (height, width))
        planes.append(128 + 50 * plane / plane.std())
    pixels = np.stack(planes, -1)
    pixels[height // 4 : height // 2, width // 3 : width // 2] += 60
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, format_: str, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, format_, **options)
    file.seek(0)
    return file


def crops(augment: Augment, width: int, height: int, count: int) -> np.ndarray:
    """(count, 4) boxes of as many samples."""
    return np.array([
        transforms.random_crop_box(width, height, augment, transforms.crop_rng(0, 0, index))
        for index in range(count)
    ])


# -- the random-resized-crop ------------------------------------------------------------------


def test_crops_are_spread_over_the_ranges_of_the_params():
    """Area share uniform, aspect ratio log-uniform, position uniform (Kolmogorov-Smirnov)."""
    augment = Augment(scale=(0.1, 0.5), ratio=(0.75, 4 / 3))  # every draw fits into the square
    left, top, right, bottom = crops(augment, 1000, 1000, 4000).T
    width, height = right - left, bottom - top
    area, ratio = width * height / 1e6, np.log(width / height)
    assert area.min() >= 0.1 - 2e-3 and area.max() <= 0.5 + 2e-3
    assert stats.kstest(area, stats.uniform(0.1, 0.4).cdf).pvalue > 0.01
    low, high = np.log([0.75, 4 / 3])
    assert stats.kstest(ratio, stats.uniform(low, high - low).cdf).pvalue > 0.01
    for start, side in ((left, width), (top, height)):
        assert stats.kstest(start / (1000 - side), stats.uniform().cdf).pvalue > 0.01
    assert abs(stats.spearmanr(area, ratio).statistic) < 0.05


@pytest.mark.parametrize("size", [(640, 480), (333, 500), (3000, 40), (40, 3000), (9, 9), (1, 1)])
def test_crops_lie_inside_the_picture(size):
    width, height = size
    left, top, right, bottom = crops(Augment(), width, height, 500).T
    assert (0 <= left).all() and (left < right).all() and (right <= width).all()
    assert (0 <= top).all() and (top < bottom).all() and (bottom <= height).all()


@pytest.mark.parametrize("size", [(1000, 50), (50, 1000)])
def test_where_no_crop_fits_the_largest_centred_one_of_an_allowed_ratio_is_taken(size):
    boxes = crops(Augment(scale=(0.9, 1.0), ratio=(0.8, 1.25)), *size, 20)
    assert len(set(map(tuple, boxes))) == 1
    left, top, right, bottom = boxes[0]
    expected = (62, 50) if size[0] > size[1] else (50, 62)  # 50 x 1.25
    assert (right - left, bottom - top) == expected
    assert abs(left + right - size[0]) <= 1 and abs(top + bottom - size[1]) <= 1


def test_full_scale_takes_the_whole_picture():
    assert (crops(Augment(scale=(1, 1), ratio=(1, 1)), 64, 64, 5) == (0, 0, 64, 64)).all()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_flips_come_as_often_as_the_params_say(share):
    data = Data(augment=Augment(hflip=share))
    image = Image.new("RGB", (32, 32))
    flips = [transforms.train_view(image, (8, 8), data, transforms.crop_rng(0, 0, i))[2]
             for i in range(2000)]
    assert abs(np.mean(flips) - share) <= 4 * math.sqrt(share * (1 - share) / 2000)


def test_a_flip_mirrors_the_pixels(tmp_path, tiny_params):
    """With the whole picture as crop, a batch of hflip 1 is the mirrored batch of hflip 0."""
    images = []
    for hflip in (0.0, 1.0):
        params = tiny_params(tmp_path, **{"data.augment.scale": [1, 1],
                                          "data.augment.ratio": [1, 1],
                                          "data.augment.hflip": hflip})
        task = build_task(params, CPU)
        request = transforms_request(range(8))
        images.append(next(iter(task.train_batches([request])))["images"])
    assert torch.equal(images[0], images[1].flip(3))
    assert not torch.equal(images[0], images[1])


def transforms_request(positions: range, step: int = 0, epoch: int = 0, size=(32, 32)):
    from lib.datasets.loader import Request

    return Request(step, epoch, np.arange(100)[positions.start : positions.stop], size, positions)


def test_crop_and_flip_depend_on_seed_epoch_and_sample_alone():
    def draw(*key):
        return transforms.crop_rng(*key).random(4).tolist()

    assert draw(1, 2, 3) == draw(1, 2, 3)
    others = [draw(*key) for key in ((0, 2, 3), (1, 0, 3), (1, 2, 0), (2, 1, 3), (3, 2, 1))]
    assert all(other != draw(1, 2, 3) for other in others)


# -- reading a JPEG at a smaller scale --------------------------------------------------------


def view(image: Image.Image, data: Data, size: tuple[int, int], index: int) -> np.ndarray:
    """As the task makes it: view, decode upright, crop and resize."""
    reader = FolderDataset.__new__(FolderDataset)
    reader.mode = "RGB"
    image, box, flip = transforms.train_view(image, size, data, transforms.crop_rng(0, 0, index))
    pixels = np.asarray(reader.pixels(image).resize(size[::-1], Image.Resampling.BILINEAR, box))
    return (pixels[:, ::-1] if flip else pixels).astype(float)


@pytest.fixture(scope="module")
def large_jpeg() -> bytes:
    return encoded(photograph(2000, 1500), "JPEG", quality=90).getvalue()


@pytest.mark.parametrize("size", [(64, 64), (160, 160), (160, 128)])
def test_reading_a_jpeg_at_a_smaller_scale_gives_nearly_the_same_picture(large_jpeg, size):
    """Mean absolute difference to the full read: about 2 of 255 levels, 6 where the smaller read is
    hardly larger than the view; a shift by one pixel would be 15."""
    data = Data(augment=Augment(scale=(0.3, 1.0)))
    decoded, differences = [], []
    for index in range(6):
        scaled = Image.open(io.BytesIO(large_jpeg))
        full = Image.open(io.BytesIO(large_jpeg))
        full.format = None  # not known to be a JPEG: read whole
        near, exact = view(scaled, data, size, index), view(full, data, size, index)
        assert full.size == (2000, 1500)
        decoded.append(scaled.size[0] / 2000)
        differences.append(np.abs(near - exact).mean())
        assert np.abs(near[:, 1:] - exact[:, :-1]).mean() > 13
    assert np.median(differences) < 3 and max(differences) < 6, differences
    assert max(decoded) <= 0.5


@pytest.mark.parametrize("size", [(50, 50), (64, 64), (224, 160), (700, 700)])
def test_a_smaller_read_never_leaves_fewer_pixels_than_the_network_sees(large_jpeg, size):
    data = Data(augment=Augment(scale=(0.08, 1.0)))
    for index in range(40):
        image = Image.open(io.BytesIO(large_jpeg))
        whole = transforms.random_crop_box(
            *image.size, data.augment, transforms.crop_rng(0, 0, index)
        )
        _, box, _ = transforms.train_view(image, size, data, transforms.crop_rng(0, 0, index))
        for near, far, side in ((0, 2, size[1]), (1, 3, size[0])):
            there, taken = whole[far] - whole[near], box[far] - box[near]
            assert taken >= min(side, there) * 0.999


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_", ["PNG", "JPEG"])
def test_the_crop_is_of_the_upright_picture(orientation, format_):
    """A picture stored lying on its side gives the view that its upright twin gives."""
    upright = photograph(600, 260)
    undo = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270}.get(orientation)
    stored = upright.transpose(undo) if undo is not None else upright
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    options = {"exif": exif} | ({"quality": 95} if format_ == "JPEG" else {})
    data = Data(augment=Augment(scale=(0.2, 1.0)))
    for index in range(6):
        wanted = view(upright, data, (32, 40), index)
        found = view(Image.open(encoded(stored, format_, **options)), data, (32, 40), index)
        if format_ == "PNG":
            assert np.array_equal(found, wanted)
        else:
            assert np.abs(found - wanted).mean() < 3


# -- validation's crop ------------------------------------------------------------------------


@pytest.mark.parametrize("shape, most", [
    ((384, 256), 0.3), ((256, 512), 0.3), ((400, 400), 0.3), ((500, 375), 3), ((375, 500), 3),
])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_validation_sees_what_torchvision_would_show(shape, most, interpolation):
    """Resize + CenterCrop in one step: mean absolute difference under 0.3 of 255 levels, and under
    3 where torchvision has to round the resized side or the crop's corner to whole pixels."""
    data = Data(val_crop=0.75, interpolation=interpolation)
    image = photograph(*shape)
    box = transforms.val_box(*shape, data)
    ours = np.asarray(image.resize((96, 96), transforms.resampling(data), box), float)
    theirs = v2.Compose([
        v2.Resize(128, v2.InterpolationMode(interpolation), antialias=True), v2.CenterCrop(96),
    ])(image)
    assert np.abs(ours - np.asarray(theirs, float)).mean() < most


def test_validation_keeps_the_stated_share_of_the_shorter_side():
    left, top, right, bottom = transforms.val_box(500, 300, Data(val_crop=0.8))
    assert right - left == bottom - top == pytest.approx(240)
    assert (left + right, top + bottom) == pytest.approx((500, 300))


@pytest.mark.parametrize("image_size, width, height", [
    ((100, 150), 360, 240), ((300, 100), 80, 240), ((120, 240), 400, 200),
])
def test_d12_validation_keeps_the_input_s_aspect_ratio(image_size, width, height):
    """The largest box of the input's shape that the 500 x 300 picture holds, and 0.8 of it."""
    data = Data(val_crop=0.8, image_size=image_size)
    left, top, right, bottom = transforms.val_box(500, 300, data)
    assert (right - left, bottom - top) == pytest.approx((width, height))
    assert (left + right, top + bottom) == pytest.approx((500, 300))


def test_d12_height_and_width_reach_the_network_in_that_order(tmp_path, tiny_params):
    params = tiny_params(tmp_path, **{"data.image_size": [24, 40], "train.batch_size": 4})
    task = build_task(params, CPU)
    request = transforms_request(range(4), size=(24, 40))
    for batches in (task.train_batches([request]), task.eval_batches("val")):
        assert task.to_device(next(batches))["images"].shape == (4, 3, 24, 40)


# -- normalize --------------------------------------------------------------------------------

ALL_VALUES = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)


def test_normalize_is_torchvisions():
    data = Data()
    theirs = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.mean, data.std)])
    torch.testing.assert_close(transforms.normalize(ALL_VALUES, *transforms.moments(data, CPU)),
                               theirs(ALL_VALUES))


@pytest.mark.parametrize("data", [Data(), Data(mean=(0.5, 0, 1), std=(0.5, 1, 0.01))])
def test_denormalize_gives_back_every_value(data):
    moments = transforms.moments(data, CPU)
    pictures = transforms.denormalize(transforms.normalize(ALL_VALUES, *moments), *moments)
    assert np.array_equal(pictures, ALL_VALUES.permute(0, 2, 3, 1).numpy())


# -- mixup and cutmix -------------------------------------------------------------------------

MIXES = {"mixup": Augment(mixup=0.4), "cutmix": Augment(cutmix=1.0),
         "both": Augment(mixup=0.4, cutmix=1.0)}


@pytest.mark.parametrize("kind", MIXES)
def test_shares_say_how_much_of_each_picture_is_there(kind):
    """Sample i is everywhere i, so each mixed pixel tells what it is made of."""
    plan = transforms.mix_plan(MIXES[kind], 0, 3, range(64), 64, (24, 20))
    images = torch.arange(64.0).view(-1, 1, 1, 1).expand(-1, 3, 24, 20)
    mixed, shares = transforms.mix(images, plan)
    partners = torch.arange(64).view(-1, 2).flip(1).flatten()
    seen = 0
    for i, (share, partner) in enumerate(zip(shares.tolist(), partners.tolist(), strict=True)):
        assert mixed[i].mean().item() == pytest.approx(share * i + (1 - share) * partner, abs=1e-3)
        cut = mixed[i, 0] == partner
        is_cut = bool(cut.any()) and bool((mixed[i] == i).any())
        if is_cut:  # a box of the partner, the same in every channel
            rows, columns = cut.any(1).nonzero(), cut.any(0).nonzero()
            assert cut.sum() == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
            assert share == pytest.approx(1 - cut.sum().item() / 480)
            assert torch.equal(mixed[i, 0], mixed[i, 2])
        else:  # the same everywhere
            assert mixed[i].std() < 1e-4
        seen += is_cut
    assert {"mixup": seen == 0, "cutmix": seen > 50, "both": 10 < seen < 54}[kind]


@pytest.mark.parametrize("kind, alpha", [("mixup", 0.2), ("mixup", 1.0), ("cutmix", 1.0)])
def test_shares_follow_the_beta_distribution_of_the_params(kind, alpha):
    plan = transforms.mix_plan(Augment(**{kind: alpha}), 0, 0, range(4000), 4000, (500, 2000))
    _, left, top, right, bottom = plan.T.numpy().astype(float)
    share = plan[:, 0].numpy() if kind == "mixup" else 1 - (right - left) * (bottom - top) / 1e6
    assert np.array_equal(share[::2], share[1::2])  # one draw a pair
    assert stats.kstest(share[::2], stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_without_mixing_nothing_changes_and_an_unpaired_last_sample_stays_whole():
    images = torch.rand(5, 3, 8, 8)
    mixed, shares = transforms.mix(images, transforms.mix_plan(Augment(mixup=1.0), 0, 0, range(5),
                                                               5, (8, 8)))
    torch.testing.assert_close(mixed[4], images[4])
    assert shares[4] == 1 and (shares[:4] < 1).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_weighs_both_labels_by_their_shares(smoothing):
    """Equals torch's cross-entropy against the soft target of both labels."""
    torch.manual_seed(0)
    logits, labels, partners = torch.randn(6, 5), torch.randint(5, (6,)), torch.randint(5, (6,))
    share = torch.rand(6)
    soft = share[:, None] * F.one_hot(labels, 5) + (1 - share)[:, None] * F.one_hot(partners, 5)
    wanted = F.cross_entropy(logits, soft, label_smoothing=smoothing)
    found = cross_entropy(logits, labels, smoothing, (partners, share))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", MIXES)
@pytest.mark.parametrize("accumulate", [2, 4])
def test_a_step_sees_the_same_mixed_pictures_however_it_is_split(tmp_path, tiny_params, kind,
                                                                 accumulate):
    """Micro-batches and, later, devices must not change what is learnt from."""
    whole = mixed_step(tmp_path, tiny_params, kind, 1)
    split = mixed_step(tmp_path, tiny_params, kind, accumulate)
    for name in ("images", "labels", "partner_labels", "share"):
        assert torch.equal(whole[name], split[name]), name
    assert (whole["share"] < 1).any()


def mixed_step(tmp_path, tiny_params, kind: str, accumulate: int) -> dict[str, torch.Tensor]:
    """One global batch, as the network gets it, from its micro-batches."""
    from lib.loops.schedule import Plan

    augment = MIXES[kind]
    params = tiny_params(tmp_path, **{
        "train.batch_size": 16, "train.accumulate": accumulate, "train.steps": 1,
        "data.augment.mixup": augment.mixup, "data.augment.cutmix": augment.cutmix,
        "data.augment.color_jitter": 0.3,
    })
    task = build_task(params, CPU)
    parts = [task.to_device(part)
             for part in task.train_batches(Plan(params, task.num_train).requests())]
    assert len(parts) == accumulate
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def test_every_step_and_pair_is_mixed_differently():
    first, second = (transforms.mix_plan(Augment(mixup=1.0), 0, step, range(8), 8, (8, 8))[::2, 0]
                     for step in (0, 1))
    assert len({*first.tolist(), *second.tolist()}) == 8
    other_seed = transforms.mix_plan(Augment(mixup=1.0), 1, 0, range(8), 8, (8, 8))[::2, 0]
    assert not set(other_seed.tolist()) & set(first.tolist())


# -- colour jitter ----------------------------------------------------------------------------

PICTURES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 200 + 20


def jittered(*factors: float) -> torch.Tensor:
    return transforms.color_jitter(PICTURES, torch.tensor([factors] * 4))


def test_factors_of_one_change_nothing():
    torch.testing.assert_close(jittered(1, 1, 1), PICTURES)


def test_brightness_scales_contrast_spreads_saturation_colours():
    torch.testing.assert_close(jittered(0.5, 1, 1), PICTURES / 2)
    flat = jittered(1, 0, 1)
    torch.testing.assert_close(flat, PICTURES.mean((1, 2, 3), keepdim=True).expand_as(flat))
    low = jittered(1, 0.5, 1)
    torch.testing.assert_close(low.mean((1, 2, 3)), PICTURES.mean((1, 2, 3)))
    torch.testing.assert_close(low.std((1, 2, 3)), PICTURES.std((1, 2, 3)) / 2)
    grey = jittered(1, 1, 0)
    torch.testing.assert_close(grey, PICTURES.mean(1, keepdim=True).expand_as(grey))
    assert jittered(9, 1, 1).max() == 255 and jittered(1, 9, 1).min() == 0


def test_each_sample_has_its_own_factors_whatever_part_of_the_batch_it_is_in():
    factors = transforms.jitter_factors(0.4, 0, 2, range(2000), 2000)
    part = transforms.jitter_factors(0.4, 0, 2, range(100, 104), 2000)
    assert torch.equal(factors[100:104], part)
    assert not torch.equal(factors, transforms.jitter_factors(0.4, 0, 3, range(2000), 2000))
    assert len(factors.unique()) > 5990
    for column in factors.T:
        assert stats.kstest(column.numpy(), stats.uniform(0.6, 0.8).cdf).pvalue > 0.01


def test_jitter_reaches_the_network(tmp_path, tiny_params):
    plain, jitter = (
        build_task(tiny_params(tmp_path, **{"data.augment.color_jitter": strength}), CPU)
        for strength in (0.0, 0.5)
    )
    request = transforms_request(range(8))
    before = plain.to_device(next(iter(plain.train_batches([request]))))["images"]
    after = jitter.to_device(next(iter(jitter.train_batches([request]))))["images"]
    changed = (before - after).abs().mean((1, 2, 3))
    assert (changed > 0.01).all()
