"""The analysis: intervals, hard classes, confident mistakes, and a head wider than the data."""

import numpy as np
import pytest
import torch

from lib.tasks import build_task
from lib.tasks.classify_analysis import analyse, wilson_interval


def test_the_interval_is_wilsons():
    """Known values: Brown, Cai and DasGupta (2001); sound at the ends, where the normal one is not.
    """
    low, high = wilson_interval(81, 263)
    assert (low, high) == pytest.approx((0.2553, 0.3662), abs=2e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.fixture
def analysed(tmp_path, tiny_params):
    """An untrained network's analysis, some of its logits raised first."""

    def go(bias: dict[int, float], **overrides):
        task = build_task(tiny_params(tmp_path, **overrides), torch.device("cpu"))
        with torch.no_grad():
            for output, value in bias.items():
                task.model.fc.bias[output] = value
        return task, analyse(task, task.model.eval())

    return go


def test_a_head_wider_than_the_data_is_judged_to_the_end(analysed):
    """Every image taken for an output that has no class: named as such, no crash after a run."""
    task, analysis = analysed({11: 50.0}, **{"model.num_classes": 12})
    assert analysis.metrics["val/top1"] == 0.0
    per_class, confused, mistakes = analysis.views
    assert all(row[-1].endswith("output 11") for row in per_class.rows)
    assert "'output 11'" in confused.says and "24 most confident mistakes" in mistakes.says
    assert {sample["predicted"] for sample in analysis.samples} == {"output 11"}


def test_the_views_state_what_the_predictions_say(analysed):
    """Everything is called 7: that class is perfect, every other at zero."""
    task, analysis = analysed({7: 50.0})
    per_class, confused, _ = analysis.views
    rows = {row[0]: row for row in per_class.rows}
    assert rows["7"][2] == 1.0 and all(rows[name][2] == 0.0 for name in rows if name != "7")
    wrong = task.num_val - rows["7"][1]
    assert confused.says.startswith(f"{wrong} of {task.num_val} images are wrong")
    assert analysis.metrics["val/top1"] == pytest.approx(rows["7"][1] / task.num_val)


def test_training_is_judged_on_as_many_images_as_validation(analysed):
    """Not on all of it: a million training images would cost more than the validation."""
    task, analysis = analysed({})
    images = {name: count for name, *_, count in analysis.intervals}
    assert images["train/top1"] == images["val/top1"] == task.num_val < task.num_train


def test_confident_mistakes_come_first(analysed):
    _, analysis = analysed({3: 2.0})
    confidences = np.array([sample["confidence"] for sample in analysis.samples])
    assert len(confidences) == 24 and (np.diff(confidences) <= 0).all()
    assert all(sample["label"] != sample["predicted"] for sample in analysis.samples)
