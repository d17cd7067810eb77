"""What the data audit says: the census as checks."""

from lib.run import Check


def census_checks(census: list[dict]) -> list[Check]:
    """Files that were left out, and how even the classes are."""
    checks = []
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
            advice="Look at these files; what is no image belongs elsewhere.",
        ))
    counts = census[0]["per_class"]
    checks.append(Check(
        id="num_classes",
        title="classes to tell apart",
        value=len(counts),
        limit=">= 2",
        passed=len(counts) >= 2,
        advice="With one class every answer is right and nothing is learnt: see data.classes.",
    ))
    smallest, largest = min(counts, key=counts.get), max(counts, key=counts.get)
    ratio = counts[largest] / counts[smallest]
    checks.append(Check(
        id="balance",
        title="largest over smallest training class",
        value=f"{ratio:.3g} ({largest!r}: {counts[largest]}, {smallest!r}: {counts[smallest]})",
        limit="<= 20",
        passed=ratio <= 20,
        severity="warning",
        advice="Read the per-class table of the analysis, not top-1 alone.",
    ))
    return checks
