"""Rules over records: what went wrong, by what evidence, from what cause, and what to do.

Each rule is a Check computed from records alone, so it runs on any run folder, live, dead or
remote. A rule that has nothing to judge yet returns None.
"""

import math
import statistics

from lib.params import Params
from lib.run import Check, duration

WARMUP_STEPS = 20
"""Most steps of warm-up; short runs leave out a tenth of theirs."""


def train_checks(records: list[dict], params: Params) -> list[Check]:
    """The verdict of the train stage, from its records."""
    rows = [row for row in records if row.get("stage") == "train"]
    steps = [row for row in rows if row["kind"] == "step"]
    evals = [row for row in rows if row["kind"] == "eval"]
    events = [row for row in rows if row["kind"] == "event"]
    rules = (
        _finite(events, evals, steps), _completed(events), _learned(evals, steps),
        _val_agrees(events, evals, steps), _ema_follows(evals, params.headline),
        _not_overfitting(evals, steps), _data_keeps_up(steps),
    )
    return [check for check in rules if check is not None]


def _number(value: object) -> float:
    """A recorded number; records write what JSON has no sign for as "nan" or "inf"."""
    return float(value)


def num_warmup(num_steps: int) -> int:
    """First steps left out of every rate: allocator, autotuning and caches settle in them."""
    return min(WARMUP_STEPS, num_steps // 10)


def _finite(events: list[dict], evals: list[dict], steps: list[dict]) -> Check:
    bad = next((row for row in events if row["event"] == "non-finite"), None)
    if bad is None:
        broken = [row["step"] for row in evals
                  if not math.isfinite(_number(row.get("val/loss", 0.0)))]
        return Check(
            "finite", "steps with a non-finite loss or gradient, evaluations with such a loss",
            f"0, {len(broken)}", "0, 0", not broken,
            advice=f"The validation loss is no number at step {(broken or [0])[0]} while the "
            "training loss is: running statistics of BatchNorm have overflowed, mostly by a "
            "learning rate that is too high.",
        )
    before = ", ".join(f"{row['loss']:.3g}" for row in steps[-3:]) or "none"
    return Check(
        "finite", "steps with a non-finite loss or gradient",
        f"step {bad['step']}: {', '.join(bad['terms'])} at learning rate {bad['lr']:.2e}", "0",
        False,
        advice=f"The losses before it were {before}. A learning rate that is too high is the "
        f"usual cause: lower optim.lr (it was {bad['lr']:.2e}), clip with optim.clip_norm, or "
        f"look at samples {bad['samples'][:8]} of that batch.",
    )


def _completed(events: list[dict]) -> Check | None:
    ended = next((row for row in reversed(events) if row["event"] == "train ended"), None)
    planned = next((row for row in reversed(events) if row["event"] == "train planned"), None)
    if planned is None:
        return Check("completed", "how the training ended", "it never began", "finished", False,
                     advice="There is no record of a training: run 03_train.")
    reason = ended["reason"] if ended else "did not end"
    return Check(
        "completed", "how the training ended",
        f"{reason} at step {ended['step'] if ended else '?'} of {planned['steps']}",
        "finished, target or patience", reason in ("finished", "target", "patience"),
        advice="The check of finite numbers says what to do." if reason == "non-finite" else
        "Run the same command again: it continues from the last checkpoint.",
    )


def _learned(evals: list[dict], steps: list[dict]) -> Check | None:
    if not steps:
        return None
    start = statistics.mean(row["loss"] for row in steps[:5])
    end = recent_loss(steps)
    return Check(
        "learned", "training loss, first steps to last", f"{start:.4g} to {end:.4g}",
        "falls by at least 5 %", end < 0.95 * start,
        advice=f"Nothing was learnt at a peak learning rate of "
        f"{max(row['lr'] for row in steps):.2e}. Compare it with the LR finder's curve: too high "
        "and too low both look like this.",
    )


def recent_loss(steps: list[dict]) -> float:
    """Mean training loss of the last tenth of the steps."""
    return statistics.mean(row["loss"] for row in steps[-max(5, len(steps) // 10):])


def _val_agrees(events: list[dict], evals: list[dict], steps: list[dict]) -> Check | None:
    """Worse than guessing on validation while training goes well: the labels disagree."""
    guessing = next((row["guessing"] for row in events if "guessing" in row), {})
    if not evals or not steps or "loss" not in guessing:
        return None
    last = evals[-1]
    return disagreement(
        recent_loss(steps), _number(last["val/loss"]), guessing["loss"], last["val/top1"],
        last["val/top1_relabelled"], guessing["top1"],
    )


def disagreement(
    train_loss: float, val_loss: float, uniform: float, top1: float, relabelled: float,
    chance: float,
) -> Check:
    """Do the validation labels mean what the training labels mean?

    Guessing costs `uniform` = ln K nats and is right in a share `chance` = 1 / K. A network that
    learnt (training loss below it) and is *worse than guessing* on validation was taught other
    labels than it is asked for; weak networks come out near ln K, not above it. One that is merely
    too sure of itself has such a loss too, but is right more often than by chance, and no renaming
    of the classes would make it much better.
    """
    permuted = relabelled > max(0.5, top1 + 0.2)
    disagrees = (
        val_loss > uniform and train_loss < 0.8 * uniform and (permuted or top1 < 1.5 * chance)
    )
    advice = "Validation labels disagree with training labels: the network learnt its own, and "\
        "is worse than guessing on these. "
    if permuted:
        advice += f"With the validation classes renamed in the best way top-1 would be " \
            f"{relabelled:.1%} instead of {top1:.1%}: the class folders are permuted. Compare " \
            "a few pictures of the same class name in both splits; `--stages analysis` draws " \
            "the confusion matrix, which shows which name became which."
    else:
        advice += "No renaming of classes mends it: compare the two splits' pictures, their " \
            "class names and their preprocessing; otherwise the network only memorised."
    return Check(
        "val_agrees", "validation labels agree with training labels",
        f"validation loss {val_loss:.3f}, guessing {uniform:.3f}, training loss {train_loss:.3f}",
        "not worse than guessing while training is better",
        not disagrees and math.isfinite(val_loss) and math.isfinite(train_loss), advice=advice,
    )


def _ema_follows(evals: list[dict], headline: str) -> Check | None:
    if not evals or f"{headline}_raw" not in evals[-1]:
        return None
    ema, raw = evals[-1][headline], evals[-1][f"{headline}_raw"]
    return Check(
        "ema_follows", f"{headline} of the moving average, and of the weights themselves",
        f"{ema:.4f}, {raw:.4f}", "average not 0.02 below", ema > raw - 0.02, "warning",
        "The average lags behind: its horizon is too long for this run. Lower train.ema.decay.",
    )


def _not_overfitting(evals: list[dict], steps: list[dict]) -> Check | None:
    if len(evals) < 3 or not steps:
        return None
    if not all(math.isfinite(_number(row["val/loss"])) for row in evals):
        return None  # the check of finite numbers says so
    best = min(evals, key=lambda row: row["val/loss"])
    last, train = evals[-1]["val/loss"], recent_loss(steps)
    before = [row["loss"] for row in steps if row["step"] <= best["step"]]
    fell = train < 0.9 * statistics.mean(before[-max(5, len(before) // 10):])
    risen = last > 1.15 * best["val/loss"] and fell
    return Check(
        "overfitting", "validation loss at its lowest, and at the end",
        f"{best['val/loss']:.4f} at step {best['step']}, {last:.4f}", "not 15 % above its lowest "
        "while the training loss falls on", not risen, "warning",
        "The network memorises: more augmentation, weight decay, or fewer epochs. "
        f"checkpoints/best keeps the best evaluation (it was near step {best['step']}).",
    )


def wait_share(steps: list[dict]) -> float:
    """Share of the step time spent waiting for data, after warm-up."""
    settled = steps[num_warmup(len(steps)):]
    total = sum(row["seconds"] for row in settled)
    return sum(row["wait"] for row in settled) / total if total else 0.0


def images_per_second(steps: list[dict]) -> float:
    """Median rate after warm-up; evaluations and saves are between steps and do not count."""
    settled = steps[num_warmup(len(steps)):]
    if not settled:
        return math.nan
    return statistics.median(row["images"] / row["seconds"] for row in settled)


def _data_keeps_up(steps: list[dict]) -> Check | None:
    if len(steps) < 4:
        return None
    share = wait_share(steps)
    return Check(
        "data_keeps_up", "share of the step time spent waiting for data", share, "<= 0.1",
        share <= 0.1, "warning",
        f"Data-bound: without waiting a step would take {1 - share:.0%} of its time. More "
        "data.num_workers, a local disk, or smaller files; a larger batch will not help.",
    )


def lr_checks(params: Params, suggestion: float | None, reason: str, diverged_at: float | None,
              peak_lr: float | None, trial: list[float]) -> list[Check]:
    """The verdict of the LR finder: the suggestion, the params' own LR, and a short trial of it.

    `peak_lr` is what the run will train with; None: optim.lr is auto and nothing was suggested.
    """
    automatic = params.optim.lr == "auto"
    checks = [Check(
        "suggestion", "suggested learning rate",
        "none" if suggestion is None else f"{suggestion:.2e}", "found" if automatic else "any",
        suggestion is not None or not automatic, "error" if automatic else "info",
        f"No suggestion ({reason}): set optim.lr by hand, or mend the cause.",
    )]
    if not automatic and diverged_at is not None:
        checks.append(Check(
            "below_divergence", "optim.lr, and the learning rate at which the loss blows up",
            f"{peak_lr:.2e}, {diverged_at:.2e}", "below it", peak_lr < diverged_at,
            advice=f"The learning rate {peak_lr:.2e} is too high: the loss already blows up at "
            f"{diverged_at:.2e}. " + (f"Set optim.lr to about {suggestion:.1e}, or to auto."
                                      if suggestion else "Set optim.lr far below that."),
        ))
    if not automatic and suggestion and peak_lr < (diverged_at or math.inf):
        ratio = peak_lr / suggestion
        checks.append(Check(
            "near_suggestion", "optim.lr over the suggestion", ratio, "0.03 to 30",
            0.03 <= ratio <= 30, "warning",
            f"The learning rate {peak_lr:.2e} is far from the suggested {suggestion:.2e}.",
        ))
    if peak_lr is not None and trial:
        size = max(1, len(trial) // 5)
        start, end = statistics.mean(trial[:size]), statistics.mean(trial[-size:])
        checks.append(Check(
            "trial", f"loss of {len(trial)} trial steps at {peak_lr:.2e}, start to end",
            f"{start:.4g} to {end:.4g}", "falls", math.isfinite(end) and end < start,
            advice=f"The learning rate {peak_lr:.2e} does not train: the loss does not fall in "
            "a short trial. Lower optim.lr, or use warm-up.",
        ))
    return checks


def analysis_checks(
    params: Params, headline: str, metrics: dict[str, float], guessing: dict[str, float],
    estimated_seconds: float | None, measured_seconds: float,
) -> list[Check]:
    """The verdict of the analysis: the promise of the params, and both splits side by side.

    `metrics` holds val/... and train/... of the delivered weights under the validation transform,
    `guessing` those of a network that has learnt nothing.
    """
    checks = []
    if params.train.target is not None:
        checks.append(Check(
            "target", f"{headline} of the delivered weights", metrics[headline],
            f">= {params.train.target:g}", metrics[headline] >= params.train.target,
            advice="The run misses its target (train.target): read the findings and the curves.",
        ))
    if "loss" in guessing:
        checks.append(disagreement(
            metrics["train/loss"], metrics["val/loss"], guessing["loss"],
            metrics["val/top1"], metrics["val/top1_relabelled"], guessing["top1"],
        ))
    name = headline.removeprefix("val/")
    gap = metrics[f"train/{name}"] - metrics[headline]
    checks.append(Check(
        "gap", f"{name} on training less on validation images, same transform", gap, "<= 0.2",
        gap <= 0.2, "warning",
        "The network knows its training images by heart: more augmentation or weight decay.",
    ))
    if estimated_seconds:
        ratio = measured_seconds / estimated_seconds
        checks.append(Check(
            "estimate", "measured over estimated time of training", ratio, "0.5 to 2",
            0.5 <= ratio <= 2, "warning",
            "Setup's estimate was off: another process on the machine, or data that got slower.",
        ))
    return checks


def train_seconds(setup: list[dict], train: list[dict]) -> tuple[float | None, float]:
    """Setup's estimate of the seconds of the steps that were done (None: not made), and what they
    took.
    """
    estimates = [row["seconds"] for row in setup if row.get("event") == "estimate"]
    planned = [row["steps"] for row in train if row.get("event") == "train planned"]
    ended = [row for row in train if row.get("event") == "train ended"]
    if not ended or not planned:
        return (estimates[-1] if estimates else None), math.nan
    share = ended[-1]["step"] / planned[-1]  # a target or patience may end a run early
    return (estimates[-1] * share if estimates else None), ended[-1]["seconds"]


def speed_facts(params: Params, setup: list[dict], train: list[dict]) -> dict[str, str]:
    """Rates, time and dollars of the training beside the estimate, for people."""
    steps = [row for row in train if row["kind"] == "step"]
    estimated, measured = train_seconds(setup, train)
    price = params.machine.dollars_per_hour / 3600
    settled = steps[num_warmup(len(steps)):]
    step_seconds = statistics.median(row["seconds"] for row in settled)
    found = {
        "images/s": f"{images_per_second(steps):,.4g} (median after warm-up)",
        "a step": f"{step_seconds:.4g} s",
        "waiting for data": f"{wait_share(steps):.1%} of the step time",
        "training took": duration(measured),
        "estimated by setup": duration(estimated) if estimated else "setup did not run",
    }
    if price:
        found["cost"] = f"${measured * price:,.2f}" + (
            f", estimated ${estimated * price:,.2f}" if estimated else "")
    return found
