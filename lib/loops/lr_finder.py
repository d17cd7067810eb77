"""The learning-rate range test (Smith 2017), with a suggestion only where there is one.

The network in the hand of the caller is never touched: the sweep and the trial run on copies.
"""

import copy
import hashlib
import math
import random
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch

from lib.loops import optim
from lib.loops.device import autocast
from lib.loops.schedule import Plan
from lib.loops.train import step_seed
from lib.params import Params
from lib.run import Check, Run
from lib.tasks import Batch, Task

HOPELESS = 4.0
"""The sweep ends where the smoothed loss exceeds this many times its lowest."""
MIN_FALL = 0.05
"""A smoothed loss that falls by less than this share of its start is flat."""


@dataclass(frozen=True)
class Sweep:
    """A range test's curve; arrays of one length, one entry a step that was finite."""

    lrs: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    diverged_at: float | None
    """Where the loss blew up: half of what was learnt was lost again, or it was no longer a number.
    None: neither happened within the range."""


@dataclass(frozen=True)
class Suggestion:
    """What a sweep advises. `lr` is None where the curve does not support any; `reason` says why.
    """

    lr: float | None
    reason: str
    valley: float | None = None
    """Two thirds down the longest fall (fastai's rule)."""
    steepest: float | None = None
    """Where the smoothed loss falls fastest per decade."""


def sweep(task: Task, params: Params, run: Run) -> Sweep:
    """Raise the learning rate from min_lr to max_lr, log-evenly, one step each, and watch the loss.

    With the run's own optimizer, batch, precision and augmentation.
    """
    config = params.lr_finder
    lrs = np.geomspace(config.min_lr, config.max_lr, config.steps)
    smoother, lowest = Smoother(config.smoothing), math.inf
    rows: list[tuple[float, float, float]] = []
    not_finite_at = None
    started = time.perf_counter()
    for step, loss in enumerate(_losses(task, params, lrs)):
        now = time.perf_counter()
        seconds, started = now - started, now
        if not math.isfinite(loss):
            not_finite_at = float(lrs[step])
            break
        smoothed = smoother(loss)
        rows.append((float(lrs[step]), loss, smoothed))
        run.record("step", step=step + 1, lr=float(lrs[step]), loss=loss, smoothed=smoothed,
                   seconds=seconds)
        lowest = min(lowest, smoothed)
        if step > 10 and smoothed > HOPELESS * lowest:
            break
    lrs, losses, smoothed = np.array(rows).reshape(-1, 3).T
    return Sweep(lrs, losses, smoothed, _divergence(lrs, losses, smoothed) or not_finite_at)


def _start(losses: np.ndarray) -> float:
    """The loss before the learning rate has any effect: the median of the first tenth."""
    return float(np.median(losses[: max(5, len(losses) // 10)]))


def _divergence(lrs: np.ndarray, losses: np.ndarray, smoothed: np.ndarray) -> float | None:
    """The first learning rate past the lowest loss at which half of the fall is lost again."""
    if not len(lrs):
        return None
    start, lowest = _start(losses), int(smoothed.argmin())
    margin = max((start - smoothed[lowest]) / 2, 0.1 * abs(start))
    risen = np.flatnonzero(smoothed[lowest:] > smoothed[lowest] + margin)
    return float(lrs[lowest + risen[0]]) if len(risen) else None


def trial(task: Task, params: Params, lr: float) -> list[float]:
    """The losses of a short training at a constant `lr`: does it really learn there?

    Empty where lr_finder.trial_steps is 0.
    """
    losses: list[float] = []
    if not params.lr_finder.trial_steps:
        return losses
    for loss in _losses(task, params, [lr] * params.lr_finder.trial_steps):
        losses.append(loss)
        if not math.isfinite(loss):
            break
    return losses


class Smoother:
    """Exponential smoothing without a bias to the start."""

    def __init__(self, decay: float):
        self.decay, self.total, self.weight = decay, 0.0, 0.0

    def __call__(self, value: float) -> float:
        self.total = self.decay * self.total + (1 - self.decay) * value
        self.weight = self.decay * self.weight + (1 - self.decay)
        return self.total / self.weight


def _losses(task: Task, params: Params, lrs) -> Iterator[float]:
    """Train a copy of the network, one optimizer step for each learning rate; yield the losses.

    All randomness is seeded by the step and the global generators are put back at the end.
    """
    model = copy.deepcopy(task.model).train()
    optimizer = optim.build(optim.param_groups(model, params.optim), params.optim, float(lrs[0]))
    scaler = torch.amp.GradScaler(task.device.type, enabled=params.train.precision == "fp16")
    devices = [task.device] if task.device.type == "cuda" else []
    with torch.random.fork_rng(devices), closing(_endless(task, params)) as batches:
        for step, lr in enumerate(lrs):
            torch.manual_seed(step_seed(params.seed, step))
            optim.set_lr(optimizer, float(lr))
            total = 0.0
            for _ in range(params.train.accumulate):
                batch = task.to_device(next(batches))
                with autocast(task.device, params.train.precision):
                    loss = task.losses(model, batch)["loss"]
                scaler.scale(loss / params.train.accumulate).backward()
                total += loss.item() / params.train.accumulate
            yield total
            if params.optim.clip_norm:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), params.optim.clip_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()


def _endless(task: Task, params: Params) -> Iterator[Batch]:
    """The run's batches, from the start, again where they end."""
    plan = Plan(params, task.num_train)
    while True:
        yield from task.train_batches(plan.requests())


def record_suggestion(run: Run, suggestion: Suggestion) -> None:
    """Write the suggestion where `optim.lr: auto` looks for it."""
    run.record("event", event="suggestion", lr=suggestion.lr, reason=suggestion.reason)


def suggest(found: Sweep) -> Suggestion:
    """The learning rate of a sweep, or none: flat, noisy or falling nowhere.

    The valley rule (fastai) looks for the longest stretch of falling loss and goes two thirds
    down it. It always gives some number; so the fall is first held against its own noise, and the
    number against the steepest point and against divergence.
    """
    num = len(found.lrs)
    if num < 10:
        return Suggestion(None, f"the loss blew up after {num} steps, at {found.diverged_at:.2e}; "
                          "lower lr_finder.min_lr or look at the loss itself")
    smoothed, log_lrs = found.smoothed, np.log10(found.lrs)
    lowest = int(smoothed.argmin())
    start = _start(found.losses)
    highest = float(smoothed[: lowest + 1].max())  # a loss that only rises has no fall before it
    fall = min(start, highest) - float(smoothed[lowest])
    # Noise of single steps about the smoothed curve, before anything blows up.
    residuals = (found.losses - smoothed)[: lowest + 1]
    noise = 1.4826 * float(np.median(np.abs(residuals - np.median(residuals)))) if lowest else 0.0
    if fall < MIN_FALL * abs(start):
        return Suggestion(None, f"flat: the loss falls by only {100 * fall / abs(start):.1f} % of "
                          "its start over the whole sweep")
    if fall < 3 * noise:
        return Suggestion(None, f"noisy: the loss falls by {fall:.3g}, single steps scatter by "
                          f"{noise:.3g}; raise train.batch_size or lr_finder.steps")
    slopes = np.gradient(smoothed, log_lrs)
    steepest = float(found.lrs[int(slopes[: lowest + 1].argmin())])
    first, last = _longest_fall(smoothed[: lowest + 1])
    valley = float(found.lrs[first + (last - first) * 2 // 3])
    ceiling = (found.diverged_at or math.inf) / 3
    chosen = min(valley, ceiling)
    if max(chosen, steepest) > 30 * min(chosen, steepest):
        return Suggestion(None, f"the valley ({valley:.2e}) and the steepest fall ({steepest:.2e}) "
                          "disagree by more than 30 times", valley, steepest)
    return Suggestion(chosen, "two thirds down the longest fall", valley, steepest)


def _longest_fall(values: np.ndarray) -> tuple[int, int]:
    """First and last position of the longest falling subsequence."""
    length, previous = np.ones(len(values), int), np.full(len(values), -1)
    for i in range(1, len(values)):
        earlier = np.flatnonzero(values[:i] > values[i])
        if len(earlier):
            previous[i] = earlier[length[earlier].argmax()]
            length[i] = length[previous[i]] + 1
    last = first = int(length.argmax())
    while previous[first] >= 0:
        first = int(previous[first])
    return first, last


def peak_lr(params: Params, suggestion: Suggestion) -> float | None:
    """What the run will train with; None where it is to be found and was not."""
    if params.optim.lr == "auto":
        return suggestion.lr
    return params.effective_lr()


def fingerprint(task: Task) -> str:
    """Digest of the network's weights and buffers and of the random generators."""
    digest = hashlib.sha256()
    for name, tensor in task.model.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    digest.update(torch.get_rng_state().numpy().tobytes())
    if task.device.type == "cuda":
        digest.update(torch.cuda.get_rng_state(task.device).numpy().tobytes())
    digest.update(repr((random.getstate(), np.random.get_state())).encode())
    return digest.hexdigest()[:16]


def untouched(before: str, after: str) -> Check:
    """Weights, buffers and generators are what they were."""
    return Check(
        "untouched", "digest of weights, BatchNorm buffers and generators, before and after",
        f"{before}, {after}", "equal", before == after,
        advice="The finder changed the network or a generator; the training would not start as "
        "without it.",
    )


def facts(found: Sweep, suggestion: Suggestion, used_lr: float | None) -> dict[str, str]:
    """The sweep in numbers, for people."""

    def shown(lr: float | None) -> str:
        return "none" if lr is None else f"{lr:.2e}"

    return {
        "suggestion": f"{shown(suggestion.lr)} ({suggestion.reason})",
        "valley": shown(suggestion.valley),
        "steepest fall": shown(suggestion.steepest),
        "loss blows up at": shown(found.diverged_at),
        "the run will use": shown(used_lr),
        "steps": str(len(found.lrs)),
    }


def shown_trial(losses: list[float]) -> str:
    """Every fifth or so loss of the trial, for people."""
    if not losses:
        return "not made: there is no learning rate to try"
    every = max(1, len(losses) // 8)
    return " > ".join(f"{loss:.3g}" for loss in [*losses[::every], losses[-1]])
