"""The training loop: one function, read from top to bottom."""

import hashlib
import math
import time
from contextlib import closing
from dataclasses import asdict, dataclass

import torch
from torch import nn

from lib import params as params_module
from lib.errors import BadInput, BudgetReached, Interrupted
from lib.loops import checkpoint, optim
from lib.loops.device import autocast
from lib.loops.ema import Ema
from lib.loops.evaluate import Stopped, evaluate
from lib.loops.interrupt import StopRequest
from lib.loops.schedule import Plan
from lib.params import Params, Train
from lib.run import Run
from lib.tasks import Task


@dataclass
class Position:
    """How far the run is; saved in every checkpoint."""

    step: int = 0
    """Steps done: batches taken."""
    update: int = 0
    """Optimizer updates done: steps less those fp16 skipped. The schedule follows this."""
    last_eval: int = 0
    """The step last evaluated."""
    best: float = -math.inf
    """Best headline metric so far; of equal ones the earliest."""
    best_step: int = 0
    evals_since_best: int = 0
    seconds: float = 0.0
    """Time trained, over all resumes."""
    ended: str = ""
    """Why the run is over: "finished", "target", "patience", "non-finite"; empty: it goes on."""

    def judge(self, score: float, config: Train, last: bool) -> None:
        """Take in the headline metric of this step; end the run where the params say so."""
        self.last_eval = self.step
        self.evals_since_best += 1
        if score > self.best:
            self.best, self.best_step, self.evals_since_best = score, self.step, 0
        if config.stop_at_target and score >= config.target:
            self.ended = "target"
        elif last:
            self.ended = "finished"
        elif config.patience_evals and self.evals_since_best >= config.patience_evals:
            self.ended = "patience"


def step_seed(seed: int, step: int) -> int:
    """Seed of the network's own randomness (dropout, stochastic depth) in one step."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step}".encode()).digest()[:7], "big")


def train(task: Task, params: Params, run: Run, lr: float) -> str:
    """Train to the end of the plan; resume from `last` where there is one.

    `lr` is the peak learning rate. Returns why the run ended: "finished", "target", "patience" or
    "non-finite". Raises Interrupted or BudgetReached after saving.
    """
    # 1. Build what the params describe.
    plan = Plan(params, task.num_train)
    model, config = task.model.train(), params.train
    groups = optim.param_groups(model, params.optim)
    optimizer = optim.build(groups, params.optim, lr)
    weights = [parameter for group in groups for parameter in group["params"]]
    scaler = torch.amp.GradScaler(task.device.type, enabled=config.precision == "fp16")
    ema = Ema(model, config.ema) if config.ema.decay else None
    network = torch.compile(model, dynamic=False) if params.machine.compile else model
    at, top = Position(), []  # top: (metric, step) of the best evaluations, best first

    def save() -> None:
        state = {
            "position": asdict(at), "top": top, "lr": lr, "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(), "params_digest": params_module.digest(params),
        }
        run.flush()  # a run killed from here on has the records of every step it resumes after
        checkpoint.save(run, at.step, model, ema.model if ema else None, state)
        if top:
            checkpoint.point(run, "best", top[0][1])
        checkpoint.prune(run, {step for _, step in top})
        run.record("event", event="saved", step=at.step)

    # 2. Resume; order and augmentation are functions of the step: no generator to restore.
    if state := _restore(run, params, model, ema, optimizer, scaler):
        at, top = Position(**state["position"]), [tuple(entry) for entry in state["top"]]
        lr = state["lr"]
    run.record("event", event="train planned", steps=plan.num_steps, epochs=plan.num_epochs,
               evals=plan.num_evals, lr=lr, headline=task.headline, guessing=task.guessing)

    # 3. Train: each turn of the loop is an evaluation where one is due, else a step.
    began = time.perf_counter() - at.seconds
    with closing(task.train_batches(plan.requests(at.step))) as batches, StopRequest() as stop:
        while not at.ended:
            started = time.perf_counter()
            last = at.step == plan.num_steps
            evaluates = at.step > at.last_eval and (last or at.step % plan.eval_steps == 0)
            if evaluates:  # what will be delivered; best follows every evaluation
                metrics = _evaluate(task, model, ema, stop)
                if metrics:  # else asked to stop meanwhile: the resumed run evaluates first
                    run.record("eval", step=at.step, **metrics)
                    score = metrics[task.headline]
                    at.judge(score, config, last)
                    top = sorted([*top, (score, at.step)], key=_best_first)[: config.keep_best]
            else:
                # Gradient of the global batch, one micro-batch after another.
                torch.manual_seed(step_seed(params.seed, at.step))
                step_lr = lr * plan.lr_factor(at.update)
                optim.set_lr(optimizer, step_lr)
                totals, samples, wait = {}, [], 0.0
                for _ in range(config.accumulate):
                    asked = time.perf_counter()
                    try:
                        batch = next(batches)
                    except BadInput:  # an unreadable sample: nothing done so far is lost
                        if at.step:
                            save()
                        raise
                    wait += time.perf_counter() - asked
                    samples.append(batch["indices"])
                    batch = task.to_device(batch)
                    with autocast(task.device, config.precision):
                        losses = task.losses(network, batch)
                    scaler.scale(losses["loss"] / config.accumulate).backward()
                    for term, value in losses.items():
                        totals[term] = totals.get(term, 0) + value.detach() / config.accumulate

                # Norm and clip; the one copy from the device a step. Stop before a bad update.
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(weights, params.optim.clip_norm or math.inf)
                *terms, grad_norm = torch.stack([*totals.values(), norm]).tolist()
                values = dict(zip(totals, terms, strict=True))
                bad = [term for term, value in values.items() if not math.isfinite(value)]
                if not scaler.is_enabled() and not math.isfinite(grad_norm):
                    bad.append("grad_norm")
                if bad:
                    run.record("event", event="non-finite", step=at.step + 1, terms=bad, lr=step_lr,
                               samples=task.sample_names(torch.cat(samples).tolist()))
                    at.ended = "non-finite"
                    break

                # Update; with fp16 an overflowed step is skipped and nothing advances.
                scale = scaler.get_scale()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                if updated := scaler.get_scale() >= scale:
                    if ema:
                        ema.update(at.update)
                    at.update += 1
                at.step += 1
                run.record(
                    "step", step=at.step, epoch=at.step / plan.steps_per_epoch, **values,
                    lr=step_lr, grad_norm=grad_norm, updated=updated, images=config.batch_size,
                    seconds=time.perf_counter() - started, wait=wait,
                )
                if at.step % params.logging.every_steps == 0:
                    run.flush()

            # Save; stop where something asks for it.
            at.seconds = time.perf_counter() - began
            stopping = stop.requested or _over_budget(params, at.seconds)
            every = config.save_every_steps
            if evaluates or stopping or (every and at.step % every == 0):
                save()
            if stopping and not at.ended:
                run.record("event", event="stopped", step=at.step, reason=stopping)
                raise (Interrupted if stop.requested else BudgetReached)(
                    f"{stopping}: saved at step {at.step}; the same command continues"
                )
    run.record("event", event="train ended", step=at.step, reason=at.ended,
               best=at.best, best_step=at.best_step, seconds=at.seconds)
    return at.ended


def _restore(
    run: Run, params: Params, model: nn.Module, ema: Ema | None,
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
) -> dict | None:
    """Put the newest whole checkpoint in place and take the records back to it; None: none there.

    Returns the loop's own part of it. Raises BadInput for a checkpoint of other params.
    """
    saved, damaged = checkpoint.load_newest(run)
    if saved is None:
        run.rewind_records("train", step=0)  # an earlier try that saved nothing
        return None
    state = saved.state
    if state["params_digest"] != params_module.digest(params):
        raise BadInput(f"{run.checkpoints}: saved by a run with other params; choose --name")
    model.load_state_dict(saved.model)
    if ema:
        ema.model.load_state_dict(saved.ema)
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    if state["top"]:  # a kill between the two links may have left `best` behind
        checkpoint.point(run, "best", state["top"][0][1])
    step = state["position"]["step"]
    run.rewind_records("train", step)
    run.record("event", event="resumed", step=step, damaged=damaged)
    return state


def _evaluate(
    task: Task, model: nn.Module, ema: Ema | None, stop: StopRequest
) -> dict[str, float] | None:
    """Metrics of what will be delivered, beside those of the raw weights; None: asked to stop."""
    try:
        if ema is None:
            return evaluate(task, model, "val", stop.is_requested)
        metrics = evaluate(task, ema.model, "val", stop.is_requested)
        raw = evaluate(task, model, "val", stop.is_requested)
    except Stopped:
        return None
    metrics |= {f"{name}_raw": raw[name] for name in (task.headline, "val/loss")}
    return metrics | {"seconds": metrics["seconds"] + raw["seconds"]}


def _best_first(evaluated: tuple[float, int]) -> tuple[float, int]:
    """Sort key of (metric, step): NaN last, of equals the earlier first."""
    score, step = evaluated
    return (math.inf if math.isnan(score) else -score), step


def _over_budget(params: Params, seconds: float) -> str | None:
    """What of the budget is used up, or None."""
    hours = seconds / 3600
    dollars = hours * params.machine.dollars_per_hour
    if params.budget.hours and hours >= params.budget.hours:
        return f"budget.hours {params.budget.hours:g} reached (raise it to go on)"
    if params.budget.dollars and dollars >= params.budget.dollars:
        return f"budget.dollars {params.budget.dollars:g} reached (raise it to go on)"
    return None
