"""What there is to say of a trained classifier: per class, what is confused, what is wrong."""

from collections.abc import Callable
from functools import partial

import numpy as np
from matplotlib.figure import Figure
from torch import nn

from lib.tasks.task import Analysis, View
from lib.watch import plots

NUM_MISTAKES = 24


def wilson_interval(hits: float, total: float, z: float = 1.96) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927); sound also for few images and near 1."""
    if total == 0:
        return 0.0, 1.0
    share = hits / total
    middle = share + z**2 / (2 * total)
    half = z * np.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    low, high = ((middle + sign * half) / (1 + z**2 / total) for sign in (-1, 1))
    return float(max(0.0, low)), float(min(1.0, high))


def analyse(task, model: nn.Module) -> Analysis:
    """Judge `model` on all of validation and as many training images under the same transform."""
    val = task.predict(model, task.eval_batches("val"))
    train = task.predict(model, task.eval_batches("train", most=task.num_val))
    metrics = {f"val/{name}": value for name, value in task.metrics(val).items()}
    metrics |= {f"train/{name}": value for name, value in task.metrics(train).items()}
    intervals = []
    for name, found in (("val/top1", val), ("val/top5", val), ("train/top1", train)):
        value, num_images = metrics[name], len(found.labels)
        interval = wilson_interval(value * num_images, num_images)
        intervals.append((name, value, *interval, num_images))
    confusion = val.confusion(task.num_classes)
    return Analysis(
        metrics=metrics,
        intervals=intervals,
        views=[_per_class(confusion, task.class_names), _confused(confusion, task.class_names),
               _mistakes(task, val)],
        samples=_samples(task, val),
    )


def _per_class(confusion: np.ndarray, class_names: tuple[str, ...]) -> View:
    rows = []
    for label, name in enumerate(class_names):
        total, hits = int(confusion[label].sum()), int(confusion[label, label])
        others = confusion[label].copy()
        others[label] = 0
        taken_for = _name(int(others.argmax()), class_names)
        share = f"{others.max()} x {taken_for}" if others.any() else "-"
        rows.append((name, total, hits / max(1, total), *wilson_interval(hits, total), share))
    names, _, values, lows, highs, _ = zip(*rows, strict=True)
    worst = min(rows, key=lambda row: row[2])
    return View(
        title="Which classes are hard?",
        says=f"The lowest accuracy is {worst[2]:.1%}, of class {worst[0]!r} "
        f"(95 % interval {worst[3]:.1%} to {worst[4]:.1%}, {worst[1]} images).",
        draw=partial(plots.bars_with_intervals, names, values, lows, highs),
        alt="accuracy of each class with its 95 % interval",
        headers=("class", "images", "accuracy", "low", "high", "most often taken for"),
        rows=rows,
    )


def _confused(confusion: np.ndarray, class_names: tuple[str, ...]) -> View:
    wrong = confusion - np.diag(np.diag(confusion))
    label, guess = np.unravel_index(wrong.argmax(), wrong.shape)
    says = "No image is taken for another class."
    if wrong.any():
        says = (f"{int(wrong.sum())} of {int(confusion.sum())} images are wrong; the most frequent "
                f"confusion is {class_names[label]!r} taken for {_name(guess, class_names)!r} "
                f"({int(wrong[label, guess])} times).")
    names = [_name(label, class_names) for label in range(len(confusion))]
    return View(
        title="What is taken for what?", says=says, draw=partial(plots.confusion, confusion, names),
        alt="confusion matrix: rows are true classes, columns the first guess",
    )


def _mistakes(task, val) -> View:
    chosen = _confident_mistakes(val)
    title = "Where is it wrong and sure of it?"
    if not len(chosen):
        return View(title=title, says="The network makes no mistake on this split.")
    return View(
        title=title,
        says=f"The {len(chosen)} most confident mistakes: the true class, then the guess and its "
        "probability. Some may be wrong labels.",
        draw=_picture_grid(task, val, chosen),
        alt="the most confident mistakes with true class and guess",
    )


def _picture_grid(task, val, chosen: np.ndarray) -> Callable[[], Figure]:
    pictures = task.pictures("val", val.indices[chosen])["images"]  # (B, C, H, W)
    images = list(pictures.permute(0, 2, 3, 1).numpy())
    captions = [
        f"{task.class_names[val.labels[i]]}\n{_name(val.guesses[i, 0], task.class_names)} "
        f"{val.probabilities[i, 0]:.0%}" for i in chosen
    ]
    return partial(plots.image_grid, images, captions)


def _samples(task, val) -> list[dict]:
    return [
        {"split": "val", "image": str(task.val_data.paths[val.indices[i]]),
         "label": task.class_names[val.labels[i]],
         "predicted": _name(val.guesses[i, 0], task.class_names),
         "confidence": float(val.probabilities[i, 0])}
        for i in _confident_mistakes(val)
    ]


def _confident_mistakes(val) -> np.ndarray:
    """Rows of the wrong first guesses, most probable first."""
    wrong = np.flatnonzero(val.guesses[:, 0] != val.labels)
    return wrong[np.argsort(-val.probabilities[wrong, 0], kind="stable")][:NUM_MISTAKES]


def _name(label: int, class_names: tuple[str, ...]) -> str:
    """A class's name; outputs of the head beyond the data's classes have none."""
    return class_names[label] if label < len(class_names) else f"output {label}"
