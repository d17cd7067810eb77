"""The analysis of a detector: hand-made errors are counted as what they are, and read well."""

from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest

from lib.datasets import coco, scenes
from lib.params import Data
from lib.tasks import detect_analysis
from lib.tasks.coco_metric import Detections, evaluate
from lib.tasks.task import spread
from tests.tasks.test_coco_metric import make_dataset, no_detections, perfect

TRUE = (0.5, 0.5, 0.4, 0.4)


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """30 training scenes, 20 of validation: 2 without objects, 1 with a crowd region."""
    root = tmp_path_factory.mktemp("data") / "scenes"
    scenes.write_scenes(root, num_train=30, num_val=20)
    return coco.open_splits(Data(root=str(root)), 3)


class FakeTask:
    """Answers with given detections instead of a network's; remembers what it was asked."""

    headline = "val/mAP"

    def __init__(self, train, val, found, letterbox=False):
        self.train_data, self.val_data, self.found = train, val, found
        self.class_names, self.num_val = val.class_names, len(val)
        self.params = SimpleNamespace(
            data=SimpleNamespace(input_size=(64, 64), letterbox=letterbox)
        )
        self.asked = []

    def eval_batches(self, split, most=None):
        self.asked.append((split, most))
        return split

    def predict(self, model, batches):
        if batches == "val":
            return self.found
        everything = perfect(self.train_data)
        chosen = np.isin(everything.images, spread(len(self.train_data), self.num_val))
        return Detections(*(column[chosen] for column in everything))


def analysed(splits, found):
    task = FakeTask(*splits, found)
    return task, detect_analysis.analyse(task, None)


def joined(*parts: Detections) -> Detections:
    return Detections(*map(np.concatenate, zip(*parts, strict=True)))


def box(image: int, cxcywh, label: int, score: float = 0.9) -> Detections:
    return Detections(
        np.array([image]), np.array([cxcywh], np.float32), np.array([score]), np.array([label])
    )


def views(analysis):
    names = ("classes", "curves", "sizes", "negatives", "errors")
    return SimpleNamespace(**dict(zip(names, analysis.views, strict=True)))


def draw_all(analysis) -> str:
    """Every text of every picture."""
    return "\n".join(text.get_text() for view in analysis.views if view.draw
                     for text in view.draw().findobj(matplotlib.text.Text))


# --------------------------------------------------------------------------------------------
# Whole analyses
# --------------------------------------------------------------------------------------------


def test_perfect_predictions_leave_nothing_to_say(splits):
    val = splits[1]
    task, analysis = analysed(splits, perfect(val))
    found = views(analysis)
    assert analysis.metrics["val/mAP"] == analysis.metrics["train/mAP"] == 1.0
    assert analysis.metrics["val/false_alarms"] == 0.0 and analysis.samples == []
    objects = int((~val.is_crowd).sum())
    assert found.errors.says == (
        f"At score >= 0.5 it finds all {objects} objects, and no box is false."
    )
    assert found.errors.draw is None and not found.errors.rows
    assert found.negatives.says.startswith("No box of score >= 0.5 on any of the 2 pictures")
    assert "is 90 % or more up to a recall of 100%" in found.curves.says
    assert [row[2:] for row in found.classes.rows if row[1]] == [(1.0, 1.0, 1.0)] * sum(
        row[1] > 0 for row in found.classes.rows
    )
    assert {row[1:] for row in analysis.intervals} == {(1.0, 1.0, 1.0, 20)}
    assert task.asked == [("val", None), ("train", 20)]
    draw_all(analysis)


def test_nothing_found_is_all_missed(splits):
    _, analysis = analysed(splits, no_detections())
    val, found = splits[1], views(analysis)
    objects = int((~val.is_crowd).sum())
    assert analysis.metrics["val/mAP"] == 0.0
    assert found.errors.says.startswith(
        f"No box reaches score 0.5: all {objects} objects are missed. The pictures below hold"
    )
    assert dict(row[:2] for row in found.errors.rows) == {
        "class": 0, "location": 0, "both": 0, "duplicate": 0, "background": 0, "missed": objects
    }
    assert "reaches 90 % at no recall" in found.curves.says
    assert len(analysis.samples) == 12 and analysis.samples[0] == {
        "split": "val", "image": "scene_0007.jpg",  # the crowded one
        "missed": int(np.diff(val.offsets)[7]), "false": 0,
    }
    draw_all(analysis)


def test_a_false_alarm_a_wrong_class_and_a_miss_are_counted_and_shown(splits):
    """Of perfect predictions one is renamed and two are left out; a box on an empty picture."""
    val = splits[1]
    right = perfect(val)
    start = val.offsets[7]
    labels = right.labels.copy()
    labels[start] = (labels[start] + 1) % 10
    keep = ~np.isin(np.arange(len(labels)), (start + 1, start + 2))
    right = Detections(*(column[keep] for column in right._replace(labels=labels)))
    wrong_name = f"{val.class_names[labels[start]]} 1.00"
    _, analysis = analysed(splits, joined(right, box(3, (0.5, 0.5, 0.3, 0.3), 4, 0.87)))
    found, objects = views(analysis), int((~val.is_crowd).sum())
    assert (f"3 of {objects} objects are missed and 2 of {objects - 1} boxes are false, 1 of them "
            "on an object of another class. The pictures below hold 5 of these 5 errors"
            in found.errors.says)
    counts = dict(row[:2] for row in found.errors.rows)
    assert counts == {"class": 1, "location": 0, "both": 0, "duplicate": 0, "background": 1,
                      "missed": 2}  # TIDE: the wrong class explains the third
    assert "on 1 of the 2 pictures without objects" in found.negatives.says
    assert ": 1 in all, at most 1 on one" in found.negatives.says
    assert analysis.samples == [
        {"split": "val", "image": "scene_0007.jpg", "missed": 3, "false": 1},
        {"split": "val", "image": "scene_0003.jpg", "missed": 0, "false": 1},
    ]
    shown = draw_all(analysis)
    assert "4 0.87" in shown and wrong_name in shown and "3 missed, 1 false" in shown
    assert shown.count("1.00") == 1  # what is right carries no label


def test_sizes_are_measured_where_the_network_looks(splits):
    """Stretched to 64 x 64, scenes 128 high: sides shrink by 64 / sqrt(128 x width)."""
    val = splits[1]
    _, analysis = analysed(splits, perfect(val))
    widths = np.repeat(val.sizes[:, 0], np.diff(val.offsets))[~val.is_crowd]
    sides = np.sqrt(val.boxes[:, 2:].prod(1)[~val.is_crowd]) * 64
    shrink = np.median(64 / np.sqrt(128 * widths))
    says = views(analysis).sizes.says
    assert f"sides {shrink:.2f} times as long" in says
    assert f"measures {sides.min():.1f} pixels" in says
    rows = views(analysis).sizes.rows
    assert sum(row[1] for row in rows) == len(sides)
    assert {row[0]: row[2] for row in rows} == {"small": 1.0, "medium": 1.0}
    letterboxed = detect_analysis.analyse(FakeTask(*splits, perfect(val), letterbox=True), None)
    kept = np.median(64 / widths)  # the scenes are never higher than wide
    assert f"sides {kept:.2f} times as long" in views(letterboxed).sizes.says


def test_classes_without_objects_and_a_split_without_negatives_read_well():
    data = make_dataset(3, lambda i: [(i % 2, 0.5, 0.5, 0.2, 0.2, 0)], num_classes=5)
    task = FakeTask(data, data, perfect(data))
    analysis = detect_analysis.analyse(task, None)
    found = views(analysis)
    assert "Without an object to judge by: 'class 2', 'class 3', 'class 4'." in found.classes.says
    assert found.classes.rows[2:] == [(f"class {k}", 0, "", "", "") for k in (2, 3, 4)]
    assert found.negatives.says.startswith("Every picture holds an object")
    assert "nan" not in " ".join(view.says for view in analysis.views)


def test_a_head_wider_than_the_data_is_judged_to_the_end(splits):
    """A box of an output that has no class: named as such, no crash after a long run."""
    _, analysis = analysed(splits, joined(perfect(splits[1]), box(3, TRUE, 11)))
    assert "output 11 0.90" in draw_all(analysis)
    assert dict(row[:2] for row in views(analysis).errors.rows)["background"] == 1


def test_a_single_image_has_no_interval():
    data = make_dataset(1, lambda i: [(0, *TRUE, 0)])
    assert detect_analysis.intervals(perfect(data), data, evaluate(perfect(data), data)) == []


def test_a_split_without_any_object_reads_well():
    data = make_dataset(3, lambda i: [])
    alarm = box(1, (0.5, 0.5, 0.2, 0.2), 0, 0.3)
    analysis = detect_analysis.analyse(FakeTask(data, data, alarm), None)
    assert analysis.intervals == [] and not any(view.draw for view in analysis.views)
    assert "nan" not in " ".join(view.says for view in analysis.views)


# --------------------------------------------------------------------------------------------
# Matching
# --------------------------------------------------------------------------------------------

def shifted(iou: float) -> tuple:
    """TRUE moved to the right until their IoU is this."""
    return (0.5 + 0.4 * (1 - iou) / (1 + iou), 0.5, 0.4, 0.4)


@pytest.mark.parametrize("moved, label, kind, missed, unexplained", [
    (TRUE, 0, "right", 0, 0),
    (shifted(0.51), 0, "right", 0, 0),
    (shifted(0.49), 0, "location", 1, 0),
    (shifted(0.11), 0, "location", 1, 0),
    (shifted(0.09), 0, "background", 1, 1),
    (shifted(0.51), 1, "class", 1, 0),
    (shifted(0.49), 1, "both", 1, 1),
    (shifted(0.09), 1, "background", 1, 1),
])
def test_each_error_of_tide(moved, label, kind, missed, unexplained):
    data = make_dataset(2, lambda i: [(0, *TRUE, 0)] if i == 1 else [])
    matches = detect_analysis.match(box(1, moved, label), data)
    assert matches.kinds.tolist() == [kind]
    assert matches.missed.tolist() == [0, missed] and matches.unexplained == unexplained
    assert matches.false.tolist() == [0, int(kind != "right")]


def test_the_higher_score_takes_the_object_and_the_other_is_a_duplicate():
    data = make_dataset(1, lambda i: [(0, *TRUE, 0)])
    both = joined(box(0, TRUE, 0, 0.6), box(0, shifted(0.7), 0, 0.8))
    matches = detect_analysis.match(both, data)
    assert matches.shown.scores.tolist() == [0.8, 0.6]
    assert matches.kinds.tolist() == ["right", "duplicate"]


def test_a_box_in_a_crowd_region_is_no_error_and_below_half_a_score_is_not_shown():
    data = make_dataset(1, lambda i: [(0, 0.5, 0.5, 0.8, 0.8, 1), (1, 0.1, 0.1, 0.1, 0.1, 0)])
    found = joined(box(0, (0.5, 0.5, 0.1, 0.1), 0), box(0, (0.5, 0.5, 0.1, 0.1), 1),
                   box(0, (0.1, 0.1, 0.1, 0.1), 1, 0.49))
    matches = detect_analysis.match(found, data)
    assert matches.kinds.tolist() == ["ignored", "background"]
    assert matches.found.tolist() == [False, False] and matches.missed.tolist() == [1]


# --------------------------------------------------------------------------------------------
# Intervals
# --------------------------------------------------------------------------------------------


def test_intervals_are_as_wide_as_sets_of_images_differ():
    """30 sets of 60 images, every object found with probability 0.7: what the metric scatters by
    is what the interval of a single set says, on average.
    """

    def one_set(seed):
        rng = np.random.default_rng(seed)
        data = make_dataset(60, lambda i: [(rng.integers(2), 0.5, 0.5, 0.2, 0.2, 0)], 2)
        kept = rng.random(60) < 0.7
        found = perfect(data)._replace(scores=rng.random(60))
        found = Detections(*(column[kept] for column in found))
        result = evaluate(found, data)
        rows = detect_analysis.intervals(found, data, result)
        return [(value, high - low) for _, value, low, high, _ in rows]

    values, widths = np.moveaxis([one_set(seed) for seed in range(30)], 2, 0)
    wanted = 2 * 2.093 * values.std(0, ddof=1)
    np.testing.assert_allclose(widths.mean(0), wanted, rtol=0.3)


def test_intervals_are_the_same_each_time(splits):
    val = splits[1]
    everything = perfect(val)
    half = Detections(*(column[::2] for column in everything))
    result = evaluate(half, val)
    first, again = (detect_analysis.intervals(half, val, result) for _ in range(2))
    assert first == again
    for name, value, low, high, num_images in first:
        assert value == result.metrics[name.removeprefix("val/")] and num_images == 20
        assert 0 < low < value < high < 1
