"""What there is to say of a trained detector: hard classes, small objects, what it gets wrong."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit
from torch import nn

from lib.datasets.box_transforms import fit
from lib.datasets.detection import DetectionDataset, listed
from lib.tasks.classify_analysis import wilson_interval
from lib.tasks.coco_metric import AREAS, SHOWN_SCORE, CocoResult, Detections, evaluate, to_pixels
from lib.tasks.task import Analysis, View, spread
from lib.watch import plots

NUM_WORST, PICTURE_SIDE = 12, 800  # pictures shown of a kind, and their longer side, pixels
MATCH_IOU, TOUCH_IOU = 0.5, 0.1  # TIDE's foreground and background thresholds
SIDES = (0, 8, 16, 32, 64, 128, 256, np.inf)  # network pixels
KINDS = {
    "class": "box on an object of another class, IoU >= 0.5",
    "location": "box of the right class, IoU of 0.1 to 0.5 with its object",
    "both": "box of another class, IoU of 0.1 to 0.5",
    "duplicate": "box on an object that a box of higher score has found",
    "background": "box where no object is, IoU <= 0.1",
    "missed": "object without a right box, nor one of the wrong class or location",
}
"""The errors of TIDE (Bolya et al. 2020, ECCV)."""


class Matches(NamedTuple):
    """P boxes of score >= 0.5, beside N images with M annotated boxes."""

    shown: Detections  # P, by image and falling score
    kinds: np.ndarray  # (P,) "right", "ignored" (in a crowd region) or an error of KINDS
    found: np.ndarray  # (M,) bool: has a right box
    missed: np.ndarray  # (N,) objects without a right box
    false: np.ndarray  # (N,) boxes neither right nor ignored
    unexplained: int  # missed objects as TIDE counts them


def analyse(task, model: nn.Module) -> Analysis:
    """Judge `model` on all of validation and as many training images under the same transform."""
    data, train_data = task.val_data, task.train_data
    val = task.predict(model, task.eval_batches("val"))
    train = task.predict(model, task.eval_batches("train", most=task.num_val))
    result = evaluate(val, data)
    on_train = evaluate(train, train_data, spread(len(train_data), task.num_val))
    matches = match(val, data)
    return Analysis(
        metrics={f"val/{name}": value for name, value in result.metrics.items()}
        | {f"train/{name}": value for name, value in on_train.metrics.items()},
        intervals=intervals(val, data, result),
        views=[_per_class(data, result, matches), _precision_recall(result),
               _sizes(task, result, matches), _negatives(data, result, matches),
               _errors(data, matches)],
        samples=[{"split": "val", "image": str(data.paths[i]), "missed": int(matches.missed[i]),
                  "false": int(matches.false[i])} for i in _worst(matches.missed + matches.false)],
    )


def intervals(
    detections: Detections, data: DetectionDataset, result: CocoResult
) -> list[tuple[str, float, float, float, int]]:
    """95 % intervals of mAP50 and mAP over the choice of images, by the delete-half jackknife.

    Random halves of the images are judged by themselves; the variance between subsets of r of n
    images, times r / (n - r), estimates that of n images (Shao and Wu 1989, Annals of Statistics
    17: also where leaving out one image is too little, as for a metric made of maxima). 20 halves,
    10 of more than 1,000 images; Student's t makes up for so few. It says how the value scatters
    between sets of n images: AP is higher on few images than on many, and that is not in it, nor
    another training's seed. Where all halves agree, as on a perfect score, the width is 0.
    """
    num_images, names = len(data), ("mAP50", "mAP")
    if num_images < 2:
        return []
    rng, size = np.random.default_rng(0), num_images // 2
    draws = []
    for _ in range(20 if num_images <= 1000 else 10):
        half = rng.choice(num_images, size, replace=False)
        within = np.isin(detections.images, half)
        drawn = evaluate(Detections(*(column[within] for column in detections)), data, half)
        draws.append([drawn.metrics[name] for name in names])
    rows = []
    for name, values in zip(names, np.transpose(draws), strict=True):
        value, values = result.metrics[name], values[np.isfinite(values)]
        if np.isfinite(value) and len(values) > 1:
            error = values.std(ddof=1) * np.sqrt(size / (num_images - size))
            width = float(stdtrit(len(values) - 1, 0.975) * error)  # t quantile
            rows.append((f"val/{name}", value, max(0.0, value - width), min(1.0, value + width),
                         num_images))
    return rows


def match(detections: Detections, data: DetectionDataset) -> Matches:
    """By falling score, each box to the free object of its class with the best IoU >= 0.5."""
    from faster_coco_eval.core import mask  # a third of a second, paid when it is used

    rows = np.flatnonzero(detections.scores >= SHOWN_SCORE)
    rows = rows[np.lexsort((-detections.scores[rows], detections.images[rows]))]
    shown = Detections(*(column[rows] for column in detections))
    kinds = np.full(len(rows), "background", object)
    found, explained = np.zeros((2, len(data.labels)), bool)
    owner = np.repeat(np.arange(len(data)), np.diff(data.offsets))  # (M,) image of each object
    for image in np.intersect1d(shown.images, owner):
        rows = np.flatnonzero(shown.images == image)  # p boxes
        objects = np.arange(*data.offsets[image : image + 2])  # m
        is_crowd = data.is_crowd[objects]
        # With a crowd it is the share of the found box that lies in it: COCO's rule.
        iou = mask.iou(  # (p, m)
            to_pixels(shown.boxes[rows], data.sizes[[image]]),
            to_pixels(data.boxes[objects], data.sizes[[image]]), is_crowd.tolist(),
        )
        same = shown.labels[rows, None] == data.labels[objects]
        in_crowd = (iou * (same & is_crowd)).max(1) >= MATCH_IOU
        own, other = iou * (same & ~is_crowd), iou * (~same & ~is_crowd)
        for row, overlap in zip(rows, own, strict=True):
            free = overlap * ~found[objects]
            if free.max() >= MATCH_IOU:
                kinds[row], found[objects[free.argmax()]] = "right", True
        # The order of these questions is that of TIDE's own code.
        for i in np.flatnonzero(kinds[rows] != "right"):
            if in_crowd[i]:
                kinds[rows[i]] = "ignored"
            elif TOUCH_IOU <= own[i].max() < MATCH_IOU:
                kinds[rows[i]], explained[objects[own[i].argmax()]] = "location", True
            elif other[i].max() >= MATCH_IOU:
                kinds[rows[i]], explained[objects[other[i].argmax()]] = "class", True
            elif own[i].max() >= MATCH_IOU:
                kinds[rows[i]] = "duplicate"
            elif other[i].max() > TOUCH_IOU:
                kinds[rows[i]] = "both"
    lost = ~found & ~data.is_crowd
    return Matches(
        shown, kinds, found, np.bincount(owner[lost], minlength=len(data)),
        np.bincount(shown.images[np.isin(kinds, list(KINDS))], minlength=len(data)),
        int((lost & ~explained).sum()),
    )


def _per_class(data: DetectionDataset, result: CocoResult, matches: Matches) -> View:
    rows = []
    for label, (name, ap) in enumerate(result.per_class.items()):
        objects = (data.labels == label) & ~data.is_crowd
        if objects.any():
            share = float(matches.found[objects].mean())
            rows.append((name, int(objects.sum()), ap, result.per_class50[name], share))
    absent = [name for name in data.class_names if name not in {row[0] for row in rows}]
    if not rows:
        return View("Which classes are hard?", "No class has an object to judge by.")
    names, _, values, highs, _ = zip(*rows, strict=True)
    worst, best = rows[int(np.argmin(values))], rows[int(np.argmax(values))]
    return View(
        title="Which classes are hard?",
        says=f"The lowest AP is {worst[2]:.1%}, of class {worst[0]!r} ({_count(worst[1])}); the "
        f"highest {best[2]:.1%}, of {best[0]!r} ({_count(best[1])})."
        + (f" Without an object to judge by: {listed(absent)}." if absent else ""),
        draw=partial(plots.bars_with_intervals, names, values, values, highs,
                     "AP by class", "the bar ends at AP50"),
        alt="average precision of each class",
        headers=("class", "objects", "AP", "AP50", "found at score 0.5"),
        rows=rows + [(name, 0, "", "", "") for name in absent],
    )


def _precision_recall(result: CocoResult) -> View:
    title = "How precise at which recall?"
    if not np.isfinite(result.precision).any():
        return View(title, "No object to judge by.")
    judged = result.precision[..., np.isfinite(result.precision).all((0, 1))]  # (T, R, K)
    at50, at75, mean = judged[0].mean(1), judged[5].mean(1), judged.mean((0, 2))  # (R,)
    curves = {"IoU 0.50": at50, "IoU 0.75": at75, "mean of 0.50 to 0.95": mean}
    precise = result.recalls[at50 >= 0.9]
    reach = f"is 90 % or more up to a recall of {precise.max():.0%}" if len(precise) else \
        "reaches 90 % at no recall"
    return View(
        title=title,
        says=f"Precision at IoU 0.5, the mean of all classes, {reach}; it is {at50[50]:.1%} at a "
        f"recall of 50 % ({at75[50]:.1%} where an IoU of 0.75 is asked).",
        draw=partial(plots.precision_recall, result.recalls, curves,
                     judged[0].T if judged.shape[2] <= 20 else None),
        alt="precision over recall at IoU 0.5, 0.75 and on average from 0.5 to 0.95",
        headers=("recall", *curves),
        rows=[(f"{i} %", *(float(curve[i]) for curve in curves.values()))
              for i in range(10, 100, 20)],
    )


def _sizes(task, result: CocoResult, matches: Matches) -> View:
    """The side of an object is the root of its box's area."""
    data, params = task.val_data, task.params.data
    height, width = params.input_size
    views = [fit(tuple(size), (height, width), params.letterbox) for size in data.sizes.tolist()]
    grow = [view.scale_x * width * view.scale_y * height for view in views]  # (N,) square pixels
    boxes_of = np.diff(data.offsets)
    shares = data.boxes[:, 2:].astype(np.float64).prod(1)  # (M,) of the picture's area
    sides = np.sqrt(shares * np.repeat(data.sizes.prod(1), boxes_of))[~data.is_crowd]
    seen = np.sqrt(shares * np.repeat(grow, boxes_of))[~data.is_crowd]  # network pixels
    found, areas = matches.found[~data.is_crowd], data.areas[~data.is_crowd]
    if not len(seen):
        return View("Are small objects lost?", "No object to judge by.")
    rows = []
    for area, chosen in zip(AREAS[1:], np.digitize(areas, (32**2, 96**2)) == [[0], [1], [2]],
                            strict=True):
        if chosen.any():
            rows.append((area, int(chosen.sum()), result.metrics[f"mAP_{area}"],
                         *map(float, (np.median(sides[chosen]), np.median(seen[chosen]),
                                      seen[chosen].min()))))
    bars = []
    for low, high in zip(SIDES, SIDES[1:], strict=False):
        hits = found[(seen >= low) & (seen < high)]
        if len(hits):
            name = f"{low} to {high} px" if high < np.inf else f"from {low} px"
            bars.append((f"{name} ({len(hits):,})", hits.mean(),
                         *wilson_interval(hits.sum(), len(hits))))
    per_area = "; ".join(f"{row[2]:.1%} of {row[0]} ones ({row[1]:,})" for row in rows)
    return View(
        title="Are small objects lost?",
        says=f"AP by the object's size in its picture: {per_area}. Resizing makes sides "
        f"{np.median(seen / sides):.2f} times as long (median); the smallest object measures "
        f"{seen.min():.1f} pixels in the network's input.",
        draw=partial(plots.bars_with_intervals, *zip(*bars, strict=True),
                     "Share of the objects found, by size", "at score >= 0.5; the root of the "
                     "box's area in the network's input, with the number of objects"),
        alt="share of the objects found by their side in network pixels, with 95 % intervals",
        headers=("size", "objects", "AP", "side in the picture, px (median)",
                 "side in the input, px (median)", "smallest"),
        rows=rows,
    )


def _negatives(data: DetectionDataset, result: CocoResult, matches: Matches) -> View:
    title, total = "What does it see on pictures without objects?", result.negatives
    if not total:
        return View(title, "Every picture holds an object: false alarms cannot be measured.")
    alarms = np.where(np.diff(data.offsets) == 0, matches.false, 0)  # (N,)
    if not alarms.any():
        return View(title, f"No box of score >= {SHOWN_SCORE} on any of the {total:,} pictures "
                    "without objects.")
    low, high = wilson_interval(result.alarmed, total)
    return View(
        title=title,
        says=f"There are boxes of score >= {SHOWN_SCORE} on {result.alarmed:,} of the {total:,} "
        f"pictures without objects (95 % interval {low:.0%} to {high:.0%}): {alarms.sum():,} in "
        f"all, at most {alarms.max()} on one.",
        draw=_drawn(data, matches, _worst(alarms)),
        alt="pictures without objects, and the boxes found on them",
    )


def _errors(data: DetectionDataset, matches: Matches) -> View:
    title, objects = "Where does it fail?", int((~data.is_crowd).sum())
    missed, false, shown = matches.missed.sum(), matches.false.sum(), len(matches.kinds)
    if not missed + false:
        return View(title, f"At score >= {SHOWN_SCORE} it finds all {_count(objects)}, and no box "
                    "is false.")
    counts = {kind: int((matches.kinds == kind).sum()) for kind in KINDS}
    counts["missed"] = matches.unexplained
    errors = matches.missed + matches.false
    worst = _worst(errors)
    judged = f"No box reaches score {SHOWN_SCORE}: all {_count(objects)} are missed."
    if shown:
        judged = (f"At score >= {SHOWN_SCORE} and IoU {MATCH_IOU}, {missed:,} of {_count(objects)} "
                  f"are missed and {false:,} of {shown:,} boxes are false, {counts['class']:,} of "
                  "them on an object of another class.")
    return View(
        title=title,
        says=f"{judged} The pictures below hold {errors[worst].sum():,} of these "
        f"{errors.sum():,} errors; what is right is not labelled.",
        draw=_drawn(data, matches, worst),
        alt="the pictures with most errors: annotated boxes solid, found ones dashed",
        headers=("error", "count", "what it is"),
        rows=[(kind, counts[kind], words) for kind, words in KINDS.items()],
    )


def _worst(errors: np.ndarray) -> np.ndarray:
    """The pictures with most errors (N,), most first, none without."""
    return np.argsort(-errors, kind="stable")[: min(NUM_WORST, np.count_nonzero(errors))]


def _drawn(data: DetectionDataset, matches: Matches, chosen: np.ndarray) -> partial:
    """Draws these pictures with annotated and found boxes."""
    images, truths, founds, captions, crowds = [], [], [], [], []
    # Outputs of the head beyond the data's classes have no name.
    names = dict(enumerate(data.class_names))
    for i in chosen:
        image = data.pixels(data.open(i))
        image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        images.append(np.asarray(image).reshape(image.height, image.width, -1))
        objects = np.arange(*data.offsets[i : i + 2])
        crowds.append(data.boxes[objects[data.is_crowd[objects]]])
        objects = objects[~data.is_crowd[objects]]
        truths.append((data.boxes[objects], [
            "" if found else names[label] for found, label in
            zip(matches.found[objects], data.labels[objects], strict=True)
        ]))
        rows = np.flatnonzero(matches.shown.images == i)
        founds.append((matches.shown.boxes[rows], [
            "" if matches.kinds[row] not in KINDS else
            f"{names.get(label, f'output {label}')} {score:.2f}" for row, label, score in
            zip(rows, matches.shown.labels[rows].tolist(), matches.shown.scores[rows], strict=True)
        ]))
        captions.append(f"{matches.missed[i]} missed, {matches.false[i]} false\n"
                        f"{Path(data.paths[i]).name}")
    return partial(plots.box_grid, images, truths, founds, captions, crowds)


def _count(objects: int) -> str:
    return f"{objects:,} object{'s' * (objects != 1)}"
