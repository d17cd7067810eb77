"""The COCO metric: average precision and recall of boxes, as pycocotools defines them.

faster-coco-eval does the counting (the same numbers to the last digit, in a fraction of the time).
Boxes come in normalized by their picture and become pixels here, in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lib.datasets.detection import DetectionDataset

MAX_DETECTIONS = (1, 10, 100)
AREAS = ("all", "small", "medium", "large")
"""Of the ground truth: small up to 32 x 32 pixels of the picture, large from 96 x 96."""
SHOWN_SCORE = 0.5  # score from which a box on a picture without objects counts as a false alarm


class Detections(NamedTuple):
    """P predicted boxes, in any order."""

    images: np.ndarray  # (P,) positions in the data set
    boxes: np.ndarray  # (P, 4) cxcywh normalized by the picture
    scores: np.ndarray  # (P,) in [0, 1]
    labels: np.ndarray  # (P,)


@dataclass(frozen=True)
class CocoResult:
    """Numbers without ground truth to measure them on are NaN. K classes."""

    metrics: dict[str, float]
    """mAP, mAP50, mAP75, mAP_small, mAP_medium, mAP_large, AR1, AR10, AR100, and, where there are
    pictures without objects, false_alarms: boxes of score >= 0.5 on such a picture, on average.
    Those that cannot be measured on this data are left out, except the first three."""
    per_class: dict[str, float]
    """AP by class name."""
    per_class50: dict[str, float]
    """AP at IoU 0.5 by class name."""
    iou_thresholds: np.ndarray
    """(T,) 0.50 to 0.95."""
    recalls: np.ndarray
    """(R,) 0 to 1."""
    precision: np.ndarray
    """(T, R, K) interpolated precision at each recall, NaN for classes without ground truth."""
    scores: np.ndarray
    """(T, R, K) the score at which that recall is reached; 0: it is not."""
    negatives: int
    """Pictures judged that hold no object."""
    alarmed: int
    """Those with at least one box of score >= 0.5."""


def evaluate(
    detections: Detections, dataset: DetectionDataset, images: Sequence[int] | None = None
) -> CocoResult:
    """Judge predictions on a data set, or on some `images` (positions) of it."""
    from faster_coco_eval import COCO, COCOeval_faster  # a third of a second, paid when it is used

    images = np.unique(np.arange(len(dataset)) if images is None else np.asarray(images))
    names = dataset.class_names
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i} for i in images.tolist()],
        "annotations": _true_rows(dataset, images),
        "categories": [{"id": label, "name": name} for label, name in enumerate(names)],
    }
    truth.createIndex()
    predicted = COCO()
    predicted.dataset = truth.dataset | {"annotations": _predicted_rows(detections, dataset)}
    predicted.createIndex()
    evaluator = COCOeval_faster(truth, predicted, "bbox")
    evaluator.params.maxDets = list(MAX_DETECTIONS)
    evaluator.evaluate()
    evaluator.accumulate()

    # (T, R, K, A, D) thresholds, recalls, classes, areas, most detections; -1 where nothing is true
    shape = (
        len(evaluator.params.iouThrs), len(evaluator.params.recThrs), len(names), len(AREAS),
        len(MAX_DETECTIONS),
    )
    precision = _nan_for_none(evaluator.eval["precision"], shape)
    recall = _nan_for_none(evaluator.eval["recall"], (shape[0], *shape[2:]))  # (T, K, A, D)
    average = {
        "mAP": precision[..., 0, -1],
        "mAP50": precision[0, ..., 0, -1],
        "mAP75": precision[5, ..., 0, -1],
        **{f"mAP_{area}": precision[..., a, -1] for a, area in enumerate(AREAS) if a},
        **{f"AR{most}": recall[..., 0, d] for d, most in enumerate(MAX_DETECTIONS)},
    }
    metrics = {name: _mean(values) for name, values in average.items()}
    metrics = {
        name: value for name, value in metrics.items()
        if np.isfinite(value) or name in ("mAP", "mAP50", "mAP75")
    }

    negative = images[np.diff(dataset.offsets)[images] == 0]
    alarms = detections.images[
        np.isin(detections.images, negative) & (detections.scores >= SHOWN_SCORE)
    ]
    if len(negative):
        metrics["false_alarms"] = len(alarms) / len(negative)
    all_sizes = precision[..., 0, -1]  # (T, R, K)
    return CocoResult(
        metrics=metrics,
        per_class={name: _mean(all_sizes[..., k]) for k, name in enumerate(names)},
        per_class50={name: _mean(all_sizes[0, :, k]) for k, name in enumerate(names)},
        iou_thresholds=evaluator.params.iouThrs,
        recalls=evaluator.params.recThrs,
        precision=all_sizes,
        scores=np.asarray(evaluator.eval["scores"]).reshape(shape)[..., 0, -1],
        negatives=len(negative),
        alarmed=len(np.unique(alarms)),
    )


def to_pixels(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Normalized cxcywh (P, 4) to x, y, width, height in pixels, float64. sizes: (P, 2) W, H."""
    boxes = boxes.astype(np.float64) * np.tile(sizes, 2)
    return np.concatenate((boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, 2:]), 1)


def _true_rows(dataset: DetectionDataset, images: np.ndarray) -> list[dict]:
    counts = np.diff(dataset.offsets)
    image_of_box = np.repeat(np.arange(len(dataset)), counts)  # (M,)
    chosen = np.flatnonzero(np.isin(image_of_box, images))
    image_of_box = image_of_box[chosen]
    boxes = to_pixels(dataset.boxes[chosen], dataset.sizes[image_of_box])
    columns = (
        image_of_box, dataset.labels[chosen], boxes, dataset.areas[chosen],
        dataset.is_crowd[chosen].astype(int),
    )
    return [
        {"id": number, "image_id": image, "category_id": label, "bbox": box, "area": area,
         "iscrowd": is_crowd}
        for number, (image, label, box, area, is_crowd) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True), 1
        )
    ]


def _predicted_rows(detections: Detections, dataset: DetectionDataset) -> list[dict]:
    boxes = to_pixels(detections.boxes, dataset.sizes[detections.images])
    columns = (
        detections.images, detections.labels, boxes, boxes[:, 2] * boxes[:, 3],
        detections.scores.astype(np.float64),
    )
    return [
        {"id": number, "image_id": image, "category_id": label, "bbox": box, "area": area,
         "score": score, "iscrowd": 0}
        for number, (image, label, box, area, score) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True), 1
        )
    ]


def _nan_for_none(values, shape: tuple[int, ...]) -> np.ndarray:
    values = np.asarray(values, np.float64).reshape(shape)
    return np.where(values == -1, np.nan, values)


def _mean(values: np.ndarray) -> float:
    """The mean of what is measured; NaN: nothing is."""
    measured = values[np.isfinite(values)]
    return float(measured.mean()) if len(measured) else float("nan")
