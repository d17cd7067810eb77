"""The loader: one order, whoever decodes; resume; errors and threads that end."""

import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from lib.datasets import loader, transforms
from lib.datasets.loader import Request
from lib.errors import BadInput
from lib.loops.schedule import Plan
from lib.tasks import build_task

CPU = torch.device("cpu")


def requests(count: int, batch: int = 4, size: tuple[int, int] = (8, 6)) -> list[Request]:
    return [Request(i, 0, np.arange(i * batch, (i + 1) * batch), size, range(batch))
            for i in range(count)]


def fill_index(request: Request, i: int, slot: np.ndarray) -> None:
    slot[:] = int(request.indices[i])


def decoding_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def wait_for_threads_to_end(seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while decoding_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not decoding_threads()


# -- the order -----------------------------------------------------------------------------------


def run_batches(tmp_path, tiny_params, num_workers: int, first_step: int = 0, **overrides):
    """Every training batch of a short run as the network gets it, augmentation and mixing on."""
    params = tiny_params(tmp_path, **{
        "train.steps": 6, "train.batch_size": 8, "data.num_workers": num_workers,
        "data.augment.hflip": 0.5, "data.augment.mixup": 0.5, "data.augment.color_jitter": 0.2,
    } | overrides)
    task = build_task(params, CPU)
    return [task.to_device(batch)
            for batch in task.train_batches(Plan(params, task.num_train).requests(first_step))]


def assert_same(first: list[dict], second: list[dict]) -> None:
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("num_workers", [1, 4])
def test_batches_are_the_same_bit_for_bit_with_any_number_of_workers(tmp_path, tiny_params,
                                                                     num_workers):
    alone = run_batches(tmp_path, tiny_params, 0)
    assert_same(alone, run_batches(tmp_path, tiny_params, num_workers))
    assert len({batch["images"].sum().item() for batch in alone}) == 6


def test_batches_keep_their_order_where_later_ones_decode_faster():
    def slower_first(request, i, slot):
        time.sleep(0.02 if request.step % 2 == 0 and i == 0 else 0)
        fill_index(request, i, slot)

    found = list(loader.load(requests(8), slower_first, 3, 4))
    assert [request.step for request, _ in found] == list(range(8))
    for request, images in found:
        assert images.shape == (4, 3, 8, 6) and images.dtype == torch.uint8
        assert images[:, 0, 0, 0].tolist() == request.indices.tolist()


@pytest.mark.parametrize("num_workers", [0, 3])
def test_batches_in_use_are_not_overwritten_by_later_ones(num_workers):
    found = list(loader.load(requests(12), fill_index, 1, num_workers))
    for request, images in found:
        assert images[:, 0, 3, 3].tolist() == request.indices.tolist()


@pytest.mark.parametrize("first_step", [1, 4])
def test_starting_at_a_step_is_the_same_as_skipping_to_it(tmp_path, tiny_params, first_step):
    """What resume rests on, across the end of an epoch too (3 steps each)."""
    short = {"data.classes": ["0", "1"], "train.batch_size": 80}
    whole = run_batches(tmp_path, tiny_params, 0, **short)
    resumed = run_batches(tmp_path, tiny_params, 2, first_step, **short)
    assert_same(whole[first_step:], resumed)


def plan(tmp_path, tiny_params, num_samples: int, **overrides) -> Plan:
    return Plan(tiny_params(tmp_path, **overrides), num_samples)


def test_each_epoch_is_a_permutation_and_no_two_are_alike(tmp_path, tiny_params):
    orders = [transforms.epoch_order(0, epoch, 101).tolist() for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(101))
    assert len(set(map(tuple, orders))) == 3
    assert transforms.epoch_order(1, 0, 101).tolist() not in orders
    assert transforms.epoch_order(0, 1, 101).tolist() == orders[1]


def test_an_epoch_of_steps_takes_each_sample_at_most_once_and_all_but_a_rest(tmp_path, tiny_params):
    made = plan(tmp_path, tiny_params, 101, train__steps=6, train__batch_size=32,
                train__accumulate=4)
    found = list(made.requests())
    assert [request.step for request in found] == sorted(list(range(6)) * 4)
    assert [request.positions for request in found[:4]] == [
        range(0, 8), range(8, 16), range(16, 24), range(24, 32)
    ]
    for epoch in range(2):
        taken = np.concatenate([r.indices for r in found if r.epoch == epoch])
        assert len(taken) == len(set(taken.tolist())) == 96
        assert taken.tolist() == transforms.epoch_order(0, epoch, 101)[:96].tolist()


def test_accumulation_only_cuts_the_same_global_batches(tmp_path, tiny_params):
    whole, cut = (
        np.concatenate([r.indices for r in plan(
            tmp_path, tiny_params, 101, train__batch_size=32, train__accumulate=parts).requests()])
        for parts in (1, 8)
    )
    assert whole.tolist() == cut.tolist()


def test_progressive_sizes_share_the_run_and_leave_the_order_alone(tmp_path, tiny_params):
    plain, growing = (
        list(plan(tmp_path, tiny_params, 101, train__steps=9, train__batch_size=32,
                  train__image_sizes=sizes).requests())
        for sizes in ([], [16, 24, [40, 48]])
    )
    assert [request.size for request in plain] == [(32, 32)] * 9
    assert [request.size for request in growing] == [(16, 16)] * 3 + [(24, 24)] * 3 + [(40, 48)] * 3
    for one, other in zip(plain, growing, strict=True):
        assert one.indices.tolist() == other.indices.tolist() and one.epoch == other.epoch


def test_batches_have_the_progressive_sizes(tmp_path, tiny_params):
    sizes = [images["images"].shape[-2:] for images in run_batches(
        tmp_path, tiny_params, 2, **{"train.image_sizes": [16, [24, 32]]})]
    assert sizes == [(16, 16)] * 3 + [(24, 32)] * 3


@pytest.mark.parametrize("num_samples", [8, 9, 7, 1])
def test_evaluation_takes_every_sample_once_in_order(num_samples):
    found = list(loader.eval_requests(np.arange(num_samples), 4, (8, 6)))
    assert {r.size for r in found} == {(8, 6)} and not any(r.is_late for r in found)
    assert np.concatenate([r.indices for r in found]).tolist() == list(range(num_samples))
    assert all(len(r.indices) == 4 for r in found[:-1]) and 1 <= len(found[-1].indices) <= 4


# -- errors and the end ------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 1, 4])
def test_an_unreadable_file_reaches_the_caller_by_name(tmp_path, tiny_params, num_workers):
    root = tmp_path / "data"
    for split in ("train", "val"):
        (root / split / "a").mkdir(parents=True)
        for i in range(16):
            Image.new("RGB", (40, 40), (i, 0, 0)).save(root / split / "a" / f"{i:02d}.png")
    bad = root / "train" / "a" / "11.png"
    bad.write_bytes(bad.read_bytes()[:60])
    params = tiny_params(tmp_path, data__root=str(root), data__num_workers=num_workers,
                         train__batch_size=4)
    task = build_task(params, CPU)
    good = []
    with pytest.raises(BadInput) as caught:
        for batch in task.eval_batches("train"):
            good.append(batch["indices"].tolist())
    assert str(bad) in str(caught.value)
    assert good == [[0, 1, 2, 3], [4, 5, 6, 7]]  # what came before it was delivered
    wait_for_threads_to_end()


@pytest.mark.parametrize("num_workers", [0, 4])
def test_any_other_exception_of_a_worker_reaches_the_caller_too(num_workers):
    def fill(request, i, slot):
        if request.indices[i] == 6:
            raise ZeroDivisionError("sample 6")

    with pytest.raises(ZeroDivisionError, match="sample 6"):
        list(loader.load(requests(4), fill, 1, num_workers))
    wait_for_threads_to_end()


def test_closing_early_ends_the_threads_and_decodes_no_more():
    filled = []

    def fill(request, i, slot):
        filled.append(request.step)
        time.sleep(0.001)

    batches = loader.load(requests(200), fill, 1, 4)
    next(batches)
    assert decoding_threads()
    batches.close()
    wait_for_threads_to_end()
    assert max(filled) <= 1 + loader.BATCHES_AHEAD


def test_the_first_few_batches_end_the_threads():
    found = loader.first(loader.load(requests(50), fill_index, 1, 2), 2)
    assert [request.step for request, _ in found] == [0, 1]
    wait_for_threads_to_end()


def test_decoding_runs_ahead_but_not_further_than_it_may():
    """While the network works on the first batch the next ones are being made."""
    started = set()

    def fill(request, i, slot):
        started.add(request.step)

    batches = loader.load(requests(50), fill, 1, 2)
    next(batches)
    deadline = time.monotonic() + 5
    while len(started) <= loader.BATCHES_AHEAD and time.monotonic() < deadline:
        time.sleep(0.01)
    assert started == set(range(loader.BATCHES_AHEAD + 1))
    batches.close()


def test_frozen_batches_are_unaugmented_and_never_the_same_image_twice(tmp_path, tiny_params):
    """M7 of the failures: the overfit gate must not re-shuffle or augment."""
    params = tiny_params(tmp_path, **{"data.augment.mixup": 1.0, "data.augment.color_jitter": 1.0})
    task = build_task(params, CPU)
    first, again = task.frozen_batches(3, 8), task.frozen_batches(3, 8)
    assert_same(first, again)
    assert [len(batch["labels"]) for batch in first] == [8, 8, 8]
    indices = torch.cat([batch["indices"] for batch in first])
    assert len(indices.unique()) == 24
    shown = {batch["indices"][i].item(): batch["images"][i]
             for batch in task.eval_batches("train") for i in range(len(batch["indices"]))}
    for batch in first:
        assert batch.keys() == {"images", "labels", "indices"}
        for index, image in zip(batch["indices"].tolist(), batch["images"], strict=True):
            assert torch.equal(image, shown[index])
