import inspect

import numpy as np
import pytest
import torch
from PIL import Image

from lib.datasets import multicrop, transforms
from lib.datasets.multicrop import Crops, Plan, make_crops, plan_crops, plan_masks

torch.set_num_threads(1)

GLOBAL = Crops(num_crops=2, size=24, scale=(0.4, 1.0))
MIXED = Crops(num_crops=2, size=24, scale=(0.4, 1.0), means=(1, 0))
C, FIELD, BATCH = 5, (48, 64), 8


def plan(crops=GLOBAL, group=0, seed=0, step=0, positions=range(BATCH), batch_size=BATCH):
    return plan_crops(crops, group, C, FIELD, seed, step, positions, batch_size)


def fields(n: int = BATCH, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, C, *FIELD, generator=torch.Generator().manual_seed(seed))


def still(box, turn=(False, False, False), mix=None, factors=(1.0, 1.0), sigma=0.0) -> Plan:
    """A plan of one crop of one field."""
    mix = torch.eye(C) if mix is None else torch.tensor(mix)
    return Plan(
        torch.tensor([[box]]), torch.tensor([[turn]]), mix[None, None],
        torch.tensor(factors).expand(1, 1, len(mix), 2), torch.tensor([[sigma]]),
    )


# Random numbers


def test_families_of_random_numbers_share_no_stream():
    own = [multicrop.VIEWS, multicrop.MASKS]
    others = [transforms.CROP, transforms.JITTER, transforms.PAIR, transforms.ORDER]
    assert len({*own, *others}) == 6


@pytest.mark.parametrize("crops", [GLOBAL, MIXED])
def test_crops_do_not_depend_on_how_the_batch_is_split(crops):
    images = fields()
    whole = make_crops(images, plan(crops), crops.size)
    parts = [
        make_crops(images[r.start : r.stop], plan(crops, positions=r), crops.size)
        for r in (range(0, 3), range(3, 8))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    assert whole.shape == (2, BATCH, C if crops is GLOBAL else 1, 24, 24)
    assert whole.dtype == torch.float32


def test_masks_do_not_depend_on_how_the_batch_is_split():
    args = 8, 8, 0.5, (0.1, 0.5), 0, 3
    whole = plan_masks(*args, range(BATCH), BATCH)
    parts = [plan_masks(*args, r, BATCH) for r in (range(0, 3), range(3, 8))]
    assert whole.shape == (2, BATCH, 8, 8) and torch.equal(torch.cat(parts, dim=1), whole)


def test_plans_repeat_and_differ_by_seed_step_group_crop_and_sample():
    first = plan()
    assert all(torch.equal(a, b) for a, b in zip(first, plan(), strict=True))
    for other in (plan(seed=1), plan(step=1), plan(group=1)):
        for name in ("box", "turn", "factors", "sigma"):
            assert not torch.equal(getattr(first, name), getattr(other, name))
    assert len(first.box.flatten(0, 1).unique(dim=0)) == 2 * BATCH
    masks = [plan_masks(8, 8, 0.5, (0.1, 0.5), *at, range(BATCH), BATCH) for at in
             ((0, 0), (0, 1), (1, 0))]
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_global_random_state_is_left_alone():
    np.random.seed(0)
    torch.manual_seed(0)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    make_crops(fields(), plan(), 24)
    plan_masks(8, 8, 0.5, (0.1, 0.5), 0, 0, range(4), 4)
    assert np.array_equal(np.random.get_state()[1], before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


def test_boxes_keep_to_the_field_the_area_and_the_ratio():
    n = 2000
    box = plan(Crops(2, 24, (0.1, 0.4)), positions=range(n), batch_size=n).box
    top, left, height, width = box.flatten(0, 1).T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= 1 + 1e-6).all() and (left + width <= 1 + 1e-6).all()
    area = height * width
    assert 0.1 - 1e-5 <= area.min() < 0.11 and 0.39 < area.max() <= 0.4 + 1e-5
    assert area.mean().item() == pytest.approx(0.25, abs=0.01)
    ratio = width * FIELD[1] / (height * FIELD[0])
    assert 0.75 - 1e-4 <= ratio.min() < 0.77 and 1.31 < ratio.max() <= 4 / 3 + 1e-4
    # Wherever it fits, evenly.
    assert (top / (1 - height)).mean().item() == pytest.approx(0.5, abs=0.03)


def test_channels_are_mixed_as_the_recipe_says():
    n = 2000
    mixed = plan(MIXED, positions=range(n), batch_size=n).mix
    assert mixed.shape == (2, n, 1, C)
    torch.testing.assert_close(mixed[0], torch.full((n, 1, C), 1 / C))  # global 1: the mean
    single = mixed[1, :, 0]
    assert ((single == 1).sum(1) == 1).all() and (single.sum(1) == 1).all()  # global 2: a channel
    np.testing.assert_allclose(single.mean(0), 1 / C, atol=0.04)
    local = plan(Crops(4, 8, (0.1, 0.4), means=(0.3,) * 4), positions=range(n), batch_size=n).mix
    assert (local.amax(-1) < 1).float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(plan().mix[0, 0], torch.eye(C))


def test_all_symmetries_blur_and_jitter_are_drawn():
    n = 2000
    drawn = plan(Crops(1, 24, (0.4, 1.0), blur=0.3), positions=range(n), batch_size=n)
    codes = (drawn.turn[0] * torch.tensor([1, 2, 4])).sum(1)
    np.testing.assert_allclose(torch.bincount(codes, minlength=8) / n, 1 / 8, atol=0.03)
    assert (drawn.sigma > 0).float().mean().item() == pytest.approx(0.3, abs=0.04)
    assert drawn.sigma[drawn.sigma > 0].min() >= 0.1 and 1.9 < drawn.sigma.max() <= 2
    assert 0.8 <= drawn.factors.min() < 0.81 and 1.19 < drawn.factors.max() <= 1.2


# Masks


def test_masks_cover_their_share_of_images_and_ratios():
    masks = plan_masks(14, 14, 0.5, (0.1, 0.5), 0, 0, range(100), 100).flatten(0, 1)
    ratio = masks.flatten(1).float().mean(1)
    masked = ratio[ratio > 0].sort().values
    assert len(masked) == 100  # half of two global crops of a hundred samples
    assert masked.max() <= 0.5
    ideal = torch.linspace(0.1, 0.5, 100)
    assert (masked - ideal).abs().mean() < 0.02
    neighbours = masks[:, 1:] == masks[:, :-1]
    assert neighbours.float().mean() > 0.9  # blocks, not salt and pepper


def test_a_mask_asked_for_is_never_empty():
    for h, w in ((1, 1), (2, 2), (3, 7)):
        masks = plan_masks(h, w, 1.0, (0.01, 0.2), 0, 0, range(20), 20)
        assert (masks.flatten(2).sum(2) >= 1).all()
    assert not plan_masks(4, 4, 0.0, (0.1, 0.5), 0, 0, range(4), 4).any()


def test_masked_patches_are_flat_indices_with_even_weights():
    masks = torch.zeros(4, 2, 3, dtype=torch.bool)
    masks[1, 0, 2] = masks[3, 1, 0] = masks[3, 1, 1] = True
    indices, weights = multicrop.masked_patches(masks)
    assert indices.tolist() == [6 + 2, 18 + 3, 18 + 4]
    assert weights.tolist() == [1 / 4, 1 / 8, 1 / 8]


# Pixels


def test_percentiles_stretch_each_channel_of_each_field_from_16_bits():
    rng = np.random.default_rng(0)
    raw = rng.integers(1000, 60000, (2, 3, 50, 40)).astype(np.uint16)
    raw[1, 2] = 777  # nothing there
    raw[0, 0] //= 100
    raw[0, 1, 0, 0] = 65535  # a hot pixel
    out = multicrop.normalize_percentiles(torch.from_numpy(raw.astype(np.int32)), 1.0, 99.0)
    for b, c in ((0, 0), (0, 1), (1, 0)):
        low, high = np.percentile(raw[b, c], (1, 99))
        expected = np.clip((raw[b, c] - low) / (high - low), 0, 1)
        np.testing.assert_allclose(out[b, c], expected, atol=2e-3)
    assert (out[1, 2] == 0).all()
    assert len(out[1, 0].unique()) > 1500  # more steps than 8 bits have


def test_percentiles_of_large_fields_are_read_from_a_part_of_the_pixels():
    image = torch.arange(600 * 600.0).view(1, 1, 600, 600)
    out = multicrop.normalize_percentiles(image, 10, 90)
    expected = ((image / image.max() - 0.1) / 0.8).clamp(0, 1)
    torch.testing.assert_close(out, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("size", [20, 100])
def test_resampling_is_pillows_antialiased_bilinear(size):
    image = fields(1)[0, 0]
    expected = np.asarray(Image.fromarray(image.numpy()).resize((size, size), Image.BILINEAR))
    np.testing.assert_allclose(multicrop.resize(image[None, None], size)[0, 0], expected, atol=1e-4)
    box = (8.0, 12.0, 40.0, 36.0)  # left, top, right, bottom
    shares = (12 / 48, 8 / 64, 24 / 48, 32 / 64)
    crop = make_crops(fields(1), still(shares), size)[0, 0, 0]
    expected = np.asarray(Image.fromarray(image.numpy()).resize((size, size), Image.BILINEAR, box))
    inner = slice(size // 6, -size // 6)  # Pillow does not look past a box's edge
    np.testing.assert_allclose(crop[inner, inner], expected[inner, inner], atol=1e-4)


@pytest.mark.parametrize("code", range(8))
def test_turns_are_the_symmetries_of_the_square(code):
    turn = bool(code & 1), bool(code & 2), bool(code & 4)
    image = torch.rand(1, C, 24, 24)
    out = make_crops(image, still((0.0, 0.0, 1.0, 1.0), turn), 24)[0]
    expected = image.flip([d for d, on in ((2, turn[0]), (3, turn[1])) if on])
    expected = expected.transpose(2, 3) if turn[2] else expected
    torch.testing.assert_close(out, expected)


def test_mixing_brightness_and_contrast():
    image = torch.rand(1, C, 24, 24)
    whole = (0.0, 0.0, 1.0, 1.0)
    mean = make_crops(image, still(whole, mix=[[1 / C] * C]), 24)[0]
    torch.testing.assert_close(mean, image.mean(1, keepdim=True))
    one = make_crops(image, still(whole, mix=[[0.0, 0, 1, 0, 0]]), 24)[0]
    torch.testing.assert_close(one, image[:, 2:3])
    bright = make_crops(image, still(whole, factors=(1.5, 0.5)), 24)[0]
    average = 1.5 * image.mean((2, 3), keepdim=True)
    torch.testing.assert_close(bright, average + 0.5 * (1.5 * image - average))


def test_blur_is_a_gaussian():
    image = torch.zeros(1, C, 25, 25)
    image[..., 12, 12] = 1
    out = make_crops(image, still((0.0, 0.0, 1.0, 1.0), sigma=1.5), 25)[0, 0, 0]
    x = torch.arange(25) - 12.0
    kernel = torch.exp(-0.5 * (x / 1.5) ** 2)
    torch.testing.assert_close(out, torch.outer(kernel, kernel) / kernel.sum() ** 2)


def test_each_sample_of_a_batch_follows_its_own_plan():
    images, drawn = fields(3), plan(positions=range(3), batch_size=3)
    together = make_crops(images, drawn, 24)
    for b in range(3):
        own = Plan(*(t[:, b : b + 1] for t in drawn))
        torch.testing.assert_close(make_crops(images[b : b + 1], own, 24)[:, 0], together[:, b])


def test_crops_are_made_of_keys_that_are_read():
    source = inspect.getsource(plan_crops)
    unread = [name for name in Crops.__dataclass_fields__
              if f"crops.{name}" not in source and name != "size"]
    assert unread == []
