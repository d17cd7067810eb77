"""What the data audit says: the census as checks, and whether every picture can be read."""

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from lib.datasets.pictures import BROKEN
from lib.errors import BadInput
from lib.run import Check
from lib.tasks import Task
from lib.tasks.task import spread

MOST_READ = 50_000
"""Pictures of a split that are decoded; of larger ones as many, spread evenly."""
MOST_SHARED = 0.01
"""Share of validation pictures that may be in training too before the gate fails."""


def census_checks(census: list[dict]) -> list[Check]:
    """Files and boxes that were left out, and how even the classes are."""
    checks = []
    for split in census:
        if "boxes_listed" in split:
            checks += _box_checks(split)
    if "mapping" in census[0]:
        checks.append(_mapping(census[0]["mapping"]))
    for split in census:
        dropped = sum(split["dropped"].values())
        why = ", ".join(f"{count} {reason}" for reason, count in split["dropped"].items())
        checks.append(Check(
            id=f"dropped_{split['split']}",
            title=f"files of {split['split']} left out",
            value=f"{dropped} of {split['listed']}" + (f" ({why})" if why else ""),
            limit="0",
            passed=dropped == 0,
            severity="warning",
            advice="Look at these files; what is no image belongs elsewhere."
            + _examples(split, split["dropped"]),
        ))
    counts = census[0]["per_class"]
    if "mapping" not in census[0]:  # a detector of one class still has the background to tell apart
        checks.append(Check(
            id="num_classes",
            title="classes to tell apart",
            value=len(counts),
            limit=">= 2",
            passed=len(counts) >= 2,
            advice="With one class every answer is right and nothing is learnt: see data.classes.",
        ))
    absent = [name for name, count in counts.items() if not count]
    if absent:
        checks.append(Check(
            "absent_classes", "classes without a training example",
            f"{len(absent)}: {', '.join(absent[:5])}", "0", False, "warning",
            "They cannot be learnt: add examples, or leave them out with data.classes.",
        ))
    counts = {name: count for name, count in counts.items() if count}
    smallest, largest = min(counts, key=counts.get), max(counts, key=counts.get)
    ratio = counts[largest] / counts[smallest]
    checks.append(Check(
        id="balance",
        title="largest over smallest training class",
        value=f"{ratio:.3g} ({largest!r}: {counts[largest]}, {smallest!r}: {counts[smallest]})",
        limit="<= 20",
        passed=ratio <= 20,
        severity="warning",
        advice="Read the per-class table of the analysis, not the headline alone.",
    ))
    return checks


def _mapping(mapping: dict[str, str]) -> Check:
    """The file's category ids, which may start anywhere and have gaps, beside the labels."""
    pairs = [f"{category} -> {label}" for category, label in mapping.items()]
    middle = [", ".join(pairs[:3]), "...", pairs[-1]] if len(pairs) > 4 else [", ".join(pairs)]
    return Check("mapping", f"category id and name -> label, {len(pairs)} in all",
                 " ".join(middle), "any", True, "info")


def _box_checks(split: dict) -> list[Check]:
    """What became of a split's boxes. Nothing is left out without a count, a reason and a file."""
    name, dropped = split["split"], sum(split["boxes_dropped"].values())
    why = ", ".join(f"{count:,} {reason}" for reason, count in split["boxes_dropped"].items())
    found = [
        Check(
            f"boxes_dropped_{name}", f"boxes of {name} left out",
            f"{dropped:,} of {split['boxes_listed']:,}" + (f" ({why})" if why else ""), "0",
            dropped == 0, "warning",
            "These boxes are never learnt or judged." + _examples(split, split["boxes_dropped"]),
        ),
        Check(
            f"boxes_{name}", f"boxes of {name}",
            f"{split['boxes_used'] - split['crowd']:,} in {split['used'] - split['negatives']:,} "
            f"images, up to {split['most_boxes']} in one; {split['negatives']:,} images without, "
            f"{split['crowd']:,} crowd regions (judged around, never learnt)", "any", True, "info",
        ),
    ]
    if split["boxes_clipped"]:
        found.append(Check(
            f"clipped_{name}", f"boxes of {name} that reached beyond the picture",
            f"{split['boxes_clipped']:,}, cut at its edge", "0", False, "warning",
            "Many of them mean that boxes and pictures do not belong together."
            + _examples(split, ["clipped at the edge"]),
        ))
    if split["emptied"]:
        found.append(Check(
            f"emptied_{name}", f"images of {name} whose boxes were all left out", split["emptied"],
            "0", False, "warning", "They now teach that nothing is there: mend their boxes or "
            "remove the pictures." + _examples(split, ["all boxes dropped"]),
        ))
    return found


def _examples(split: dict, reasons: Iterable[str]) -> str:
    """The first files of these reasons, where the format keeps them."""
    names = [name for reason in reasons for name in split.get("examples", {}).get(reason, ())]
    return f" Such as {', '.join(names[:5])}." if names else ""


# --------------------------------------------------------------------------------------------
# Every picture, read as the training reads it
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """What one file is like. `fault` says why it cannot be used."""

    path: str
    fault: str | None = None
    content: bytes = b""
    """Digest of the pixels' grey thumbnail and the picture's size: the same for the same picture,
    also where the files differ in their metadata."""


def picture_checks(task: Task, progress: Callable[[int, int], None]) -> list[Check]:
    """Decode the pictures of both splits; `progress(done, total)` is called as they are read.

    Names those that cannot be read, and those that stand in training and in validation.
    """
    chosen = [(dataset, spread(len(dataset), MOST_READ).tolist())
              for dataset in (task.train_data, task.val_data)]
    total = sum(len(indices) for _, indices in chosen)
    splits: list[list[Picture]] = []
    done = 0
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for dataset, indices in chosen:
            splits.append([])
            for picture in pool.map(lambda index: _read(dataset, index), indices):  # noqa: B023
                splits[-1].append(picture)
                done += 1
                progress(done, total)
    faults = [picture for pictures in splits for picture in pictures if picture.fault]
    trained = {picture.content: picture.path for picture in splits[0] if not picture.fault}
    shared = [(picture.path, trained[picture.content]) for picture in splits[1]
              if not picture.fault and picture.content in trained]
    num_val = max(1, len(splits[1]))
    return [
        Check(
            "readable", f"pictures that cannot be read, of {total:,} read",
            len(faults), "0", not faults,
            advice="Repair or remove these files, or fetch them again: "
            + "; ".join(picture.fault for picture in faults[:5]),
        ),
        Check(
            "shared", "validation pictures that training has too",
            f"{len(shared):,} of {num_val:,}", "0", not shared,
            "error" if len(shared) > MOST_SHARED * num_val else "warning",
            "What is learnt by heart scores too well: remove them from one split. "
            + "; ".join(f"{val} is {train}" for val, train in shared[:5]),
        ),
    ]


def _read(dataset, index: int) -> Picture:
    """Decode one picture, at an eighth of its size where JPEG allows it: all of it is still read.
    """
    path = str(dataset.file(index))
    try:
        image = dataset.open(index)
        size = image.size
        try:
            if image.format == "JPEG":
                image.draft(None, (max(1, size[0] // 8), max(1, size[1] // 8)))
            grey = dataset.pixels(image).convert("L")  # where need be, decodes only here
            thumbnail = np.asarray(grey.resize((32, 32), Image.Resampling.BOX))
        except BROKEN as error:
            raise dataset.unreadable(index, error) from None
    except BadInput as error:
        return Picture(path, str(error))
    return Picture(path, None, hashlib.sha256(repr(size).encode() + thumbnail.tobytes()).digest())
