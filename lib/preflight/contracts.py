"""What must hold before a long run: computed checks, from theory where theory has a number."""

import math

import torch
from torch import nn

from lib.errors import BadInput
from lib.loops.ema import Ema
from lib.loops.overfit import OverfitResult
from lib.loops.schedule import Plan
from lib.models.weights import LoadReport
from lib.params import Params, as_pair
from lib.run import Check
from lib.tasks import TASKS, Batch, Task


def initial_losses(task: Task, result: OverfitResult, batch: Batch) -> list[Check]:
    """Each loss term of the untrained network on the first frozen batch against its analytic range.

    Outside it fails the gate, except that up to three times its upper end only warns: some sound
    networks start with uneven outputs (timm's mobilenetv2 at twice ln K).
    """
    return [
        Check(
            id=f"initial_{term}",
            title=f"{term} of the untrained network",
            value=result.initial[term],
            limit=f"{low:.3f} to {high:.3f}",
            passed=low <= result.initial[term] <= high,
            severity="warning" if high < result.initial[term] <= 3 * high else "error",
            advice=task.initial_advice(term),
        )
        for term, (low, high) in task.expected_initial(batch).items()
    ]


def gradients_reach(result: OverfitResult) -> Check:
    """No parameter without a gradient: such a one is not wired to the loss."""
    dead = result.dead_parameters
    return Check(
        id="gradients",
        title="parameters without a gradient in the first steps",
        value=f"{len(dead)}: {', '.join(dead[:5])}" if dead else 0,
        limit="0",
        passed=not dead,
        advice="These are not wired to the loss, or multiplied by zero: check the forward pass.",
    )


def stayed_finite(result: OverfitResult) -> Check:
    """The loss stayed a number to the end."""
    return Check(
        id="finite",
        title="steps before the loss was no longer a number",
        value=result.num_steps if not result.finite else "all",
        limit="all",
        passed=result.finite,
        advice="Lower overfit.lr; with fp16 try bf16; look for a division by zero in the loss.",
    )


def weights_loaded(report: LoadReport | None) -> list[Check]:
    """Nearly all of the network starts from the file that the params name."""
    if report is None:
        return []
    return [Check(
        id="weights_loaded",
        title="share of the network's tensors found in model.weights",
        value=report.share,
        limit=">= 0.9",
        passed=report.share >= 0.9,
        advice="The file is of another network, or its names have a prefix; without it the run "
        "starts from random weights.",
    )]


def weights_facts(params: Params, report: LoadReport | None) -> dict[str, object]:
    """Where the initial weights come from, for people."""
    if report is None:
        source = "timm's published weights" if params.model.pretrained else "random"
        return {"initial weights": f"{source}, seed {params.seed}"}
    listed = {"missing": report.missing, "other shape": report.mismatched, "unused": report.unused}
    return {
        "initial weights": params.model.weights,
        "loaded": f"{report.num_loaded} of {report.num_expected} tensors ({report.share:.1%})",
        **{name: ", ".join(names[:8]) or "none" for name, names in listed.items()},
    }


def no_leakage(task: Task, batch: Batch) -> Check:
    """In evaluation, one sample's output must not depend on another sample of the batch."""
    model = task.model
    was_training = model.training
    model.eval()
    images = task.to_device(batch)["images"][:4].requires_grad_()
    output = task.scores(model, images)[0].float()
    (gradient,) = torch.autograd.grad(output.square().sum(), images)
    model.train(was_training)
    leaked = float(gradient[1:].abs().max())
    return Check(
        id="leakage",
        title="gradient of one image's output in its neighbours' pixels",
        value=leaked,
        limit="= 0",
        passed=leaked == 0.0,
        advice="Something mixes samples across the batch: a wrong reshape or transpose.",
    )


def all_grouped(model: nn.Module, groups: list[dict]) -> Check:
    """Each trainable parameter is in exactly one parameter group."""
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for key, name in trainable.items() if key not in grouped]
    twice = len(grouped) - len(set(grouped))
    return Check(
        id="parameter_groups",
        title="trainable parameters in exactly one group",
        value=f"{len(missing)} in none, {twice} in several" if missing or twice
        else f"all {len(trainable)}",
        limit=f"all {len(trainable)}",
        passed=not missing and not twice,
        advice=f"Not optimized: {', '.join(missing[:5])}" if missing else "",
    )


def accepts_sizes(params: Params, num_classes: int) -> Check:
    """The network takes every size of the run, in training and evaluation: shapes only, no memory.

    Raises BadInput naming the size it does not take.
    """
    task = TASKS[params.task]
    asked = sorted({as_pair(size) for size in (*params.train.image_sizes, params.data.image_size)})
    shown = []
    with torch.device("meta"):
        model = task.network(params, num_classes, pretrained=False)
        for size in asked:
            padded = task.network_size(params, size)
            shown.append("{} x {}".format(*size))
            if padded != size:
                shown[-1] += " (padded to {} x {})".format(*padded)
            try:
                model(torch.empty(2, params.model.in_chans, *padded))
            except (AssertionError, RuntimeError, ValueError) as error:
                reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason"
                raise BadInput(
                    f"data.image_size / train.image_sizes: {params.model.name} does not take "
                    f"{size[0]} x {size[1]} pixels ({reason}); choose a size it was made for"
                ) from None
    return Check("sizes", f"sizes (height x width) that {params.model.name} takes",
                 ", ".join(shown), "every size of the run", True)


def planned_machine(params: Params) -> Check:
    """Whether this machine is the one the run is planned for."""
    machine = params.machine
    planned = f"{machine.nodes} x {machine.gpus} x {machine.gpu or machine.device}"
    if machine.device not in ("cuda", "auto") or not machine.gpu:
        return Check("machine", "planned machine", planned, "any", True, "info")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = ", ".join(sorted(set(names))) or "no GPU"
    fits = len(names) >= machine.gpus and all(machine.gpu in name for name in names)
    return Check("machine", f"planned for {planned}; here", found, planned, fits, "info",
                 "This check needs no GPU; the run does.")


def plan_checks(plan: Plan, peak_lr: float | None) -> list[Check]:
    """The schedule, the moving average and every interval, simulated over the whole run.

    `peak_lr` is None while it is still to be found.
    """
    params = plan.params
    factors = [plan.lr_factor(update) for update in range(plan.num_steps)]
    lr = peak_lr or 1.0
    unit = "" if peak_lr else " x the LR to be found"
    checks = [
        Check(
            id="schedule",
            title="learning rate at the first step, its peak and the last step",
            value=f"{lr * factors[0]:.2e}, {lr * max(factors):.2e}, {lr * factors[-1]:.2e}{unit}",
            limit="peak = the LR of the params",
            passed=math.isclose(max(factors), 1.0, rel_tol=1e-2),
            advice=f"The schedule never reaches the peak within {plan.num_steps} steps: shorten "
            "optim.warmup_epochs or train longer.",
        ),
        _intervals(plan),
    ]
    if params.optim.lr_batch_size and peak_lr:
        checks.append(_lr_rule(params))
    if params.train.ema.decay:
        share = Ema(nn.Identity(), params.train.ema).initial_share(plan.num_steps)
        checks.append(Check(
            id="ema_horizon",
            title="share of the initial weights left in the moving average at the end",
            value=share,
            limit="<= 0.01",
            passed=share <= 0.01,
            severity="warning",
            advice=f"The average is too slow for {plan.num_steps} steps: lower train.ema.decay "
            f"to {1 - 10 / plan.num_steps:.4f}, or switch train.ema.warmup on.",
        ))
    return checks


def _intervals(plan: Plan) -> Check:
    """Everything periodic happens within the run at least once."""
    train, optim = plan.params.train, plan.params.optim
    late = []
    if train.eval_every_epochs > plan.num_epochs:
        late.append(f"train.eval_every_epochs {train.eval_every_epochs:g}")
    if train.save_every_steps and train.save_every_steps > plan.num_steps:
        late.append(f"train.save_every_steps {train.save_every_steps}")
    if optim.warmup_epochs >= plan.num_epochs:
        late.append(f"optim.warmup_epochs {optim.warmup_epochs:g}")
    if optim.schedule == "multistep":
        late += [f"optim.milestones_epochs {milestone:g}"
                 for milestone in optim.milestones_epochs if milestone >= plan.num_epochs]
    if train.patience_evals and train.patience_evals >= plan.num_evals:
        late.append(f"train.patience_evals {train.patience_evals}")
    return Check(
        id="intervals",
        title="intervals longer than the run",
        value=", ".join(late) or "none",
        limit=f"within {plan.num_steps:,} steps = {plan.num_epochs:.4g} epochs",
        passed=not late,
        severity="warning",
        advice="These never happen in a run this short: shorten them or train longer.",
    )


def _lr_rule(params: Params) -> Check:
    optim, batch_size = params.optim, params.train.batch_size
    ratio = batch_size / optim.lr_batch_size
    linear, sqrt = optim.lr * ratio, optim.lr * ratio**0.5
    return Check(
        id="lr_rule",
        title=f"learning rate at batch {batch_size} by the {optim.lr_rule} rule from "
        f"{optim.lr:.2e} at {optim.lr_batch_size}",
        value=f"{params.effective_lr():.2e}",
        limit=f"linear {linear:.2e}, sqrt {sqrt:.2e}",
        passed=ratio <= 32,
        severity="warning",
        advice=f"The batch is {ratio:.3g} times the reference: the rules are known to fail "
        "that far out; let the LR finder decide (optim.lr: auto).",
    )
