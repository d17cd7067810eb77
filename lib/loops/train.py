"""The training loop: one function, read from top to bottom."""

import hashlib
import math
import time
from contextlib import closing
from dataclasses import asdict, dataclass

import torch

from lib import params as params_module
from lib.errors import BadInput, BudgetReached, Interrupted
from lib.loops import checkpoint, optim
from lib.loops.device import autocast
from lib.loops.ema import Ema
from lib.loops.evaluate import evaluate
from lib.loops.interrupt import StopRequest
from lib.loops.schedule import Plan
from lib.params import Params
from lib.run import Run
from lib.tasks import Task


@dataclass
class Position:
    """How far the run is; saved in every checkpoint."""

    step: int = 0
    """Steps done: batches taken."""
    update: int = 0
    """Optimizer updates done: steps less those fp16 skipped. The schedule follows this."""
    best: float = -math.inf
    """Best headline metric so far."""
    best_step: int = 0
    evals_since_best: int = 0
    seconds: float = 0.0
    """Time trained, over all resumes."""
    ended: str = ""
    """Why the run is over: "finished", "target", "patience", "non-finite"; empty: it goes on."""


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
    network = torch.compile(model) if params.machine.compile else model
    at, top = Position(), []  # top: (metric, step) of the best evaluations, best first

    def save() -> None:
        state = {
            "position": asdict(at), "top": top, "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(), "params_digest": params_module.digest(params),
        }
        run.flush()  # a run killed from here on has the records of every step it resumes after
        checkpoint.save(run, at.step, model, ema.model if ema else None, state)
        if top:
            checkpoint.point(run, "best", top[0][1])
        checkpoint.prune(run, {step for _, step in top})
        run.record("event", event="saved", step=at.step)

    # 2. Resume: weights, average, optimizer, scaler and counters; order and augmentation are
    #    functions of the step, so there is no generator to restore.
    if saved := checkpoint.load(run, "last"):
        if saved.state["params_digest"] != params_module.digest(params):
            raise BadInput(f"{run.checkpoints}: saved by a run with other params; choose --name")
        model.load_state_dict(saved.model)
        if ema:
            ema.model.load_state_dict(saved.ema)
        optimizer.load_state_dict(saved.state["optimizer"])
        scaler.load_state_dict(saved.state["scaler"])
        at, top = Position(**saved.state["position"]), [tuple(x) for x in saved.state["top"]]
        run.rewind_records("train", at.step)
        run.record("event", event="resumed", step=at.step)
    else:
        run.rewind_records("train", step=0)  # an earlier try that saved nothing
    run.record("event", event="train planned", steps=plan.num_steps, epochs=plan.num_epochs,
               evals=plan.num_evals, lr=lr, guessing=task.guessing)

    # 3. Train.
    began = time.perf_counter() - at.seconds
    with closing(task.train_batches(plan.requests(at.step))) as batches, StopRequest() as stop:
        while not at.ended:
            started = time.perf_counter()
            wait = 0.0
            torch.manual_seed(step_seed(params.seed, at.step))
            optim.set_lr(optimizer, lr * plan.lr_factor(at.update))

            # Gradient of the global batch, one micro-batch after another.
            totals: dict[str, torch.Tensor] = {}
            for _ in range(config.accumulate):
                asked = time.perf_counter()
                batch = next(batches)
                wait += time.perf_counter() - asked
                batch = task.to_device(batch)
                with autocast(task.device, config.precision):
                    losses = task.losses(network, batch)
                scaler.scale(losses["loss"] / config.accumulate).backward()
                for term, value in losses.items():
                    totals[term] = totals.get(term, 0) + value.detach() / config.accumulate

            # Norm and clip; the one copy from the device a step. Stop before a bad update.
            scaler.unscale_(optimizer)
            max_norm = params.optim.clip_norm or math.inf
            norm = torch.nn.utils.clip_grad_norm_(weights, max_norm, foreach=True)
            *terms, grad_norm = torch.stack([*totals.values(), norm]).tolist()
            values = dict(zip(totals, terms, strict=True))
            bad = [term for term, value in values.items() if not math.isfinite(value)]
            if not scaler.is_enabled() and not math.isfinite(grad_norm):
                bad.append("grad_norm")
            if bad:
                run.record("event", event="non-finite", step=at.step + 1, terms=bad,
                           lr=optimizer.param_groups[0]["lr"], samples=batch["indices"].tolist())
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
            at.seconds = time.perf_counter() - began
            run.record(
                "step", step=at.step, epoch=at.step / plan.steps_per_epoch, **values,
                lr=optimizer.param_groups[0]["lr"], grad_norm=grad_norm, updated=updated,
                images=config.batch_size, seconds=time.perf_counter() - started, wait=wait,
            )
            if at.step % params.logging.every_steps == 0:
                run.flush()

            # Evaluate what will be delivered; best follows every evaluation.
            if at.step == plan.num_steps:
                at.ended = "finished"
            evaluated = at.step % plan.eval_steps == 0 or at.ended
            if evaluated:
                metrics = evaluate(task, ema.model if ema else model, "val")
                if ema:
                    raw = evaluate(task, model, "val")
                    metrics |= {f"{name}_raw": raw[name] for name in (task.headline, "val/loss")}
                    metrics["seconds"] += raw["seconds"]
                run.record("eval", step=at.step, **metrics)
                score = metrics[task.headline]
                at.evals_since_best += 1
                if score > at.best:
                    at.best, at.best_step, at.evals_since_best = score, at.step, 0
                top = sorted([*top, (score, at.step)], reverse=True)[: config.keep_best]
                if config.stop_at_target and score >= config.target:
                    at.ended = "target"
                elif config.patience_evals and at.evals_since_best >= config.patience_evals:
                    at.ended = "patience"

            # Save; stop where something asks for it.
            stopping = stop.requested or _over_budget(params, at.seconds)
            due = config.save_every_steps and at.step % config.save_every_steps == 0
            if evaluated or due or stopping:
                save()
            if stopping and not at.ended:
                run.record("event", event="stopped", step=at.step, reason=stopping)
                error = Interrupted if stop.requested else BudgetReached
                raise error(f"{stopping}: saved at step {at.step}; the same command continues")
    run.record("event", event="train ended", step=at.step, reason=at.ended,
               best=at.best, best_step=at.best_step, seconds=at.seconds)
    return at.ended


def _over_budget(params: Params, seconds: float) -> str | None:
    """What of the budget is used up, or None."""
    hours = seconds / 3600
    dollars = hours * params.machine.dollars_per_hour
    if params.budget.hours and hours >= params.budget.hours:
        return f"budget.hours {params.budget.hours:g} reached"
    if params.budget.dollars and dollars >= params.budget.dollars:
        return f"budget.dollars {params.budget.dollars:g} reached"
    return None
