"""The COCO metric against pycocotools, and where there is nothing to count."""

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from lib.datasets.detection import DetectionDataset, Listing, Tally
from lib.params import Data
from lib.tasks import coco_metric
from lib.tasks.coco_metric import Detections


def make_dataset(num_images: int, boxes_of, num_classes: int = 5) -> DetectionDataset:
    """`boxes_of(i)` gives rows (label, cx, cy, w, h, crowd) of image i, which is 640 x 480."""
    rows = [(i, *row) for i in range(num_images) for row in boxes_of(i)]
    table = np.array(rows, np.float64).reshape(-1, 7)
    center, size = table[:, 2:4], table[:, 4:6]
    listing = Listing(
        split="val", root=None, names=[f"class {k}" for k in range(num_classes)],
        category_ids=range(1, num_classes + 1), paths=[f"{i:05d}.jpg" for i in range(num_images)],
        file_sizes=[1] * num_images, sizes=np.tile((640, 480), (num_images, 1)),
        image_ids=np.arange(num_images), image_of_box=table[:, 0].astype(int),
        corners=np.concatenate((center - size / 2, center + size / 2), 1), in_pixels=False,
        labels=table[:, 1].astype(int), is_crowd=table[:, 6] > 0,
        # Areas of masks: smaller than the box, as in COCO.
        areas=0.6 * table[:, 4] * table[:, 5] * 640 * 480,
        places=[""] * len(table), tally=Tally(),
    )
    return DetectionDataset(listing, Data(), 3)


def no_detections() -> Detections:
    return Detections(np.zeros(0, int), np.zeros((0, 4)), np.zeros(0), np.zeros(0, int))


def perfect(dataset: DetectionDataset) -> Detections:
    images = np.repeat(np.arange(len(dataset)), np.diff(dataset.offsets))
    keep = ~dataset.is_crowd
    return Detections(
        images[keep], dataset.boxes[keep], np.ones(keep.sum()), dataset.labels[keep]
    )


def random_truth(seed: int):
    def boxes_of(i: int):
        rng = np.random.default_rng((seed, i))
        for _ in range(rng.integers(0, 12)):
            size = np.exp(rng.uniform(np.log(0.01), np.log(0.5), 2))
            center = rng.uniform(size / 2, 1 - size / 2)
            yield rng.integers(4), *center, *size, rng.random() < 0.1  # class 4 is never true
    return boxes_of


def random_detections(dataset: DetectionDataset, per_image: int, seed: int) -> Detections:
    """A tenth of them near true boxes, the rest anywhere; scores with ties, to two digits."""
    rng = np.random.default_rng(seed)
    images = np.repeat(np.arange(len(dataset)), per_image)
    size = rng.uniform(0.01, 0.4, (len(images), 2))
    boxes = np.concatenate((rng.uniform(0.1, 0.9, (len(images), 2)), size), 1)
    labels = rng.integers(0, 5, len(images))
    scores = rng.uniform(0, 0.7, len(images)).round(2)
    for row, image in enumerate(images):
        truth = dataset.annotations(image)
        if len(truth.labels) and rng.random() < 0.1:
            pick = rng.integers(len(truth.labels))
            box = truth.boxes[pick]
            boxes[row] = box + 0.1 * rng.normal(size=4) * box[[2, 3, 2, 3]]
            labels[row] = truth.labels[pick] if rng.random() < 0.8 else labels[row]
            scores[row] = round(rng.uniform(0.3, 1), 2)
    return Detections(images, boxes.astype(np.float32), scores, labels)


def pycocotools_stats(dataset: DetectionDataset, detections: Detections) -> COCOeval:
    """The reference, fed with pixels that are worked out here one box at a time."""
    truth = COCO()
    annotations = []
    for i in range(len(dataset)):
        for box, label, crowd, area in zip(*dataset.annotations(i), strict=True):
            cx, cy, w, h = map(float, box)
            annotations.append({
                "id": len(annotations) + 1, "image_id": i, "category_id": int(label),
                "bbox": [cx * 640 - w * 640 / 2, cy * 480 - h * 480 / 2, w * 640, h * 480],
                "area": float(area), "iscrowd": int(crowd),
            })
    truth.dataset = {
        "images": [{"id": i, "width": 640, "height": 480} for i in range(len(dataset))],
        "annotations": annotations,
        "categories": [{"id": k, "name": name} for k, name in enumerate(dataset.class_names)],
    }
    truth.createIndex()
    results = []
    for image, box, score, label in zip(*detections, strict=True):
        cx, cy, w, h = map(float, box)
        results.append({
            "image_id": int(image), "category_id": int(label), "score": float(score),
            "bbox": [cx * 640 - w * 640 / 2, cy * 480 - h * 480 / 2, w * 640, h * 480],
        })
    evaluator = COCOeval(truth, truth.loadRes(results), "bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    return evaluator


def test_equals_pycocotools_on_500_images_with_100_detections(capsys):
    dataset = make_dataset(500, random_truth(0))
    assert dataset.census.crowd > 50 and dataset.census.negatives > 10
    detections = random_detections(dataset, 100, 1)
    ours = coco_metric.evaluate(detections, dataset)
    reference = pycocotools_stats(dataset, detections)
    names = ("mAP", "mAP50", "mAP75", "mAP_small", "mAP_medium", "mAP_large",
             "AR1", "AR10", "AR100")
    for name, wanted in zip(names, reference.stats, strict=False):
        assert 0.01 < wanted < 0.99
        assert ours.metrics[name] == pytest.approx(wanted, abs=1e-12), name
    wanted = reference.eval["precision"][..., 0, -1]  # (T, R, K)
    np.testing.assert_allclose(
        np.nan_to_num(ours.precision, nan=-1), wanted, rtol=0, atol=1e-12
    )
    np.testing.assert_array_equal(ours.iou_thresholds, reference.params.iouThrs)
    np.testing.assert_array_equal(ours.recalls, reference.params.recThrs)
    for k, name in enumerate(dataset.class_names[:4]):
        assert ours.per_class[name] == pytest.approx(wanted[..., k].mean(), abs=1e-12)
        assert ours.per_class50[name] == pytest.approx(wanted[0, :, k].mean(), abs=1e-12)
    assert np.isnan(ours.per_class["class 4"])  # never true: not part of any mean
    capsys.readouterr()  # pycocotools prints


def test_ground_truth_as_predictions_scores_one():
    dataset = make_dataset(20, random_truth(2))
    result = coco_metric.evaluate(perfect(dataset), dataset)
    assert result.metrics["mAP"] == result.metrics["mAP_small"] == 1.0
    assert result.metrics["AR100"] == 1.0 and result.metrics["false_alarms"] == 0.0


def test_some_images_only():
    dataset = make_dataset(20, random_truth(2))
    detections = perfect(dataset)
    only = detections.images < 5
    detections = Detections(*(column[only] for column in detections))
    assert coco_metric.evaluate(detections, dataset, range(5)).metrics["mAP"] == 1.0
    assert coco_metric.evaluate(detections, dataset).metrics["mAP"] < 0.6


def test_a_detection_in_a_crowd_is_neither_right_nor_wrong():
    def boxes_of(i):
        yield 0, 0.2, 0.2, 0.1, 0.1, 0
        yield 0, 0.7, 0.7, 0.4, 0.4, 1

    dataset = make_dataset(1, boxes_of)
    boxes = np.array([[0.7, 0.7, 0.1, 0.1], [0.2, 0.2, 0.1, 0.1]], np.float32)
    inside = Detections(np.zeros(2, int), boxes, np.array([0.9, 0.5]), np.zeros(2, int))
    assert coco_metric.evaluate(inside, dataset).metrics["mAP"] == 1.0
    boxes[0] = [0.2, 0.8, 0.1, 0.1]  # in no crowd: a false positive above the true one
    assert coco_metric.evaluate(inside, dataset).metrics["mAP"] == pytest.approx(0.5)


def test_no_prediction_scores_zero():
    dataset = make_dataset(3, lambda i: [(0, 0.5, 0.5, 0.2, 0.2, 0)])
    metrics = coco_metric.evaluate(no_detections(), dataset).metrics
    assert metrics["mAP"] == metrics["mAP50"] == metrics["AR100"] == 0.0
    assert "mAP_small" not in metrics  # nothing small is annotated
    assert "false_alarms" not in metrics  # no picture without objects


@pytest.mark.parametrize("guess", [False, True])
def test_no_ground_truth_is_no_score(guess):
    dataset = make_dataset(3, lambda i: [])
    some = Detections(np.array([1]), np.full((1, 4), 0.5), np.array([0.9]), np.array([0]))
    result = coco_metric.evaluate(some if guess else no_detections(), dataset)
    assert np.isnan(result.metrics["mAP"]) and "AR100" not in result.metrics
    assert result.metrics["false_alarms"] == pytest.approx(guess / 3)


def test_false_alarms_are_boxes_on_pictures_without_objects():
    dataset = make_dataset(4, lambda i: [(0, 0.5, 0.5, 0.2, 0.2, 0)] if i == 0 else [])
    images = np.array([0, 0, 1, 1, 2])
    scores = np.array([0.9, 0.9, 0.8, 0.5, 0.4])
    box = np.tile(np.float32([0.5, 0.5, 0.2, 0.2]), (5, 1))
    detections = Detections(images, box, scores, np.zeros(5, int))
    result = coco_metric.evaluate(detections, dataset)
    assert result.negatives == 3 and result.alarmed == 1
    assert result.metrics["false_alarms"] == pytest.approx(2 / 3)
