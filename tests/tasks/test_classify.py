"""Classification: what it expects at first, what it refuses, and how it counts."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lib.errors import BadInput
from lib.loops.evaluate import evaluate
from lib.tasks import build_task
from lib.tasks.classify import Predictions
from lib.tasks.classify_analysis import wilson_interval

CPU = torch.device("cpu")


@pytest.fixture
def task(tmp_path, tiny_params):
    return build_task(tiny_params(tmp_path), CPU)


# -- an untrained network ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_resnet", "test_byobnet", "test_convnext"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_first_loss_is_in_the_range_that_theory_gives(tmp_path, tiny_params, name, seed):
    task = build_task(tiny_params(tmp_path, model__name=name, seed=seed), CPU)
    (batch,) = task.frozen_batches(1, 32)
    loss = task.losses(task.model.train(), task.to_device(batch))["loss"].item()
    low, high = task.expected_initial(batch)["loss"]
    assert low <= loss <= high
    assert low < math.log(10) < high


@pytest.mark.parametrize("wrong", ["inputs in 0 to 255", "head ten times too large", "leak"])
def test_the_first_loss_leaves_that_range_where_something_is_wrong(task, wrong):
    (batch,) = task.frozen_batches(1, 32)
    batch, model = task.to_device(batch), task.model.train()
    if wrong == "inputs in 0 to 255":
        model.eval()  # without BatchNorm's help
        batch["images"] = batch["images"] * 127 + 127
    elif wrong == "leak":
        model = lambda images: 5.0 * F.one_hot(batch["labels"], 10)  # noqa: E731
    else:
        with torch.no_grad():
            model.get_classifier().weight *= 10
            model.get_classifier().bias += 10 * torch.randn(10)
    loss = task.losses(model, batch)["loss"].item()
    low, high = task.expected_initial(batch)["loss"]
    assert not low <= loss <= high


def test_the_network_is_a_function_of_the_seed(tmp_path, tiny_params):
    one, same, other = (
        build_task(tiny_params(tmp_path, seed=seed), CPU).model.state_dict() for seed in (3, 3, 4)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


# -- what is refused --------------------------------------------------------------------------


def refusal(tmp_path, tiny_params, **overrides) -> str:
    with pytest.raises(BadInput) as caught:
        build_task(tiny_params(tmp_path, **overrides), CPU)
    return str(caught.value)


def test_a_head_narrower_than_the_labels_names_the_first_label_outside(tmp_path, tiny_params):
    """D2 of the failures: a CUDA assert an hour later."""
    text = refusal(tmp_path, tiny_params, model__num_classes=7)
    assert "label 7 ('7')" in text and "model.num_classes" in text and "10 classes" in text


def test_a_head_wider_than_the_labels_is_fine_and_judged_on_the_labels(tmp_path, tiny_params):
    task = build_task(tiny_params(tmp_path, model__num_classes=12), CPU)
    metrics = task.evaluate(oracle(task), task.eval_batches("val"), "val")
    assert metrics["top1"] == 1.0
    assert task.guessing == {"loss": math.log(10), "top1": 0.1}


@pytest.mark.parametrize("split", [{"train__batch_size": 1},
                                   {"train__batch_size": 4, "train__accumulate": 4}])
def test_one_image_a_forward_pass_is_too_few_for_batch_norm(tmp_path, tiny_params, split):
    text = refusal(tmp_path, tiny_params, **split)
    assert "BatchNorm of test_resnet" in text and "one image" in text
    build_task(tiny_params(tmp_path, model__name="test_convnext", **split), CPU)  # has none


def test_mixing_pairs_needs_even_micro_batches(tmp_path, tiny_params):
    overrides = {"train__batch_size": 12, "train__accumulate": 4, "data.augment.mixup": 1.0}
    assert "even number" in refusal(tmp_path, tiny_params, **overrides)
    build_task(tiny_params(tmp_path, **overrides | {"train__accumulate": 3}), CPU)


# -- metrics ----------------------------------------------------------------------------------


def predictions(labels: list[int], guesses: list[list[int]]) -> Predictions:
    num = len(labels)
    return Predictions(np.arange(num), np.array(labels), np.array(guesses),
                       np.full((num, len(guesses[0])), 0.2), np.arange(num, dtype=float))


def test_top1_and_top5_of_a_hand_made_case(task):
    metrics = task.metrics(predictions(
        [0, 1, 2, 3],
        [[0, 1, 2, 3, 4],    # first guess
         [2, 3, 4, 5, 1],    # fifth guess
         [9, 8, 7, 6, 5],    # not at all
         [3, 0, 1, 2, 4]],
    ))
    assert metrics["top1"] == 0.5 and metrics["top5"] == 0.75 and metrics["loss"] == 1.5


def test_relabelled_top1_mends_a_renaming_and_nothing_else(task):
    """D4 of the failures: cyclically renamed folders look like a poor network until renamed."""
    labels = [0, 0, 1, 1, 2, 2, 3, 3]
    guesses = [[label] + [9, 8, 7, 6] for label in labels]
    right = task.metrics(predictions(labels, guesses))
    assert right["top1"] == right["top1_relabelled"] == 1.0
    cyclic = task.metrics(predictions([(label + 1) % 4 for label in labels], guesses))
    assert cyclic["top1"] == 0.0 and cyclic["top1_relabelled"] == 1.0
    # Two classes guessed as one: no one-to-one renaming brings both back.
    merged = task.metrics(predictions([0, 0, 0, 1, 1], [[5, 9, 8, 7, 6]] * 5))
    assert merged["top1"] == 0.0 and merged["top1_relabelled"] == pytest.approx(0.6)


def test_confusion_has_true_classes_in_rows(task):
    table = predictions([0, 0, 2], [[1], [0], [1]]).confusion(3)
    assert table.tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 0]]


def oracle(task, offset: int = 0) -> nn.Module:
    """Answers one-hot logits of the true labels (moved on by `offset`) in the data set's order."""

    class Oracle(nn.Module):
        seen = 0

        def forward(self, images):
            labels = torch.from_numpy(task.val_data.labels[self.seen : self.seen + len(images)])
            self.seen += len(images)
            return 50.0 * F.one_hot((labels + offset) % 10, task.num_classes)

    return Oracle()


def test_ground_truth_fed_back_scores_one(task):
    metrics = task.evaluate(oracle(task), task.eval_batches("val"), "val")
    assert metrics["top1"] == metrics["top5"] == metrics["top1_relabelled"] == 1.0
    assert metrics["loss"] < 1e-6
    assert task.memorised(metrics).passed


def test_ground_truth_of_the_next_class_scores_zero_and_is_mended_by_renaming(task):
    metrics = task.evaluate(oracle(task, offset=1), task.eval_batches("val"), "val")
    assert metrics["top1"] == 0.0 and metrics["top1_relabelled"] == 1.0
    assert metrics["loss"] == pytest.approx(50)
    assert not task.memorised(metrics).passed


def test_predictions_line_up_with_the_files(task):
    found = task.predict(oracle(task), task.eval_batches("val"))
    assert found.indices.tolist() == list(range(task.num_val))
    assert found.labels.tolist() == [int(path.parent.name) for path in task.val_data.paths]
    assert found.guesses.shape == (task.num_val, 5)


def test_fewer_than_five_classes_give_as_many_guesses(tmp_path, tiny_params):
    task = build_task(tiny_params(tmp_path, data__classes=["3", "7"]), CPU)
    metrics = task.evaluate(task.model.eval(), task.eval_batches("val"), "val")
    assert metrics["top5"] == 1.0


# -- evaluation depends on the network alone --------------------------------------------------


def test_evaluation_does_not_depend_on_batch_size_or_workers(tmp_path, tiny_params):
    found = []
    for batch_size, num_workers in ((32, 0), (7, 3), (1, 1)):
        task = build_task(tiny_params(
            tmp_path, model__name="test_convnext", train__batch_size=batch_size,
            data__num_workers=num_workers, data__classes=["0", "1", "2"]), CPU)
        found.append(task.predict(task.model.eval(), task.eval_batches("val")))
    for other in found[1:]:
        assert np.array_equal(found[0].indices, other.indices)
        assert np.array_equal(found[0].guesses[:, 0], other.guesses[:, 0])
        np.testing.assert_allclose(found[0].losses, other.losses, atol=1e-5)


def test_evaluation_leaves_the_network_as_it_was(task):
    """Running statistics, weights and training mode; and it is not in training mode meanwhile."""
    model = task.model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = []
    model.register_forward_hook(lambda module, *_: modes.append(module.training))
    first, second = evaluate(task, model, "val"), evaluate(task, model, "train")
    assert model.training and not any(modes) and modes
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert "val/top1" in first and "train/top1" in second and first["seconds"] > 0


def test_training_augmentation_never_reaches_evaluation(tmp_path, tiny_params, task):
    wild = build_task(tiny_params(tmp_path, **{
        "data.augment.scale": [0.08, 0.2], "data.augment.hflip": 1.0,
        "data.augment.color_jitter": 1.0, "data.augment.cutmix": 1.0}), CPU)
    for split in ("train", "val"):
        one, other = (next(iter(each.eval_batches(split))) for each in (task, wild))
        assert one.keys() == other.keys() and torch.equal(one["images"], other["images"])


# -- confidence intervals ---------------------------------------------------------------------


@pytest.mark.parametrize("hits, total", [(0, 10), (10, 10), (5, 10), (81, 263), (1, 29)])
def test_intervals_are_wilsons(hits, total):
    from scipy.stats import binomtest

    wanted = binomtest(hits, total).proportion_ci(0.95, "wilson")
    assert wilson_interval(hits, total) == pytest.approx((wanted.low, wanted.high), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)
