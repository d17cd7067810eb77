"""How long a run will take and what it will cost, from measured step and evaluation times."""

from dataclasses import dataclass

from lib.loops.schedule import Plan
from lib.params import Params
from lib.run import Check, duration


@dataclass(frozen=True)
class Estimate:
    """Seconds and dollars of the train stage."""

    train_seconds: float
    eval_seconds: float
    dollars: float

    @property
    def seconds(self) -> float:
        return self.train_seconds + self.eval_seconds


def from_measured(plan: Plan, step_seconds: float, eval_seconds: float) -> Estimate:
    """The train stage at `step_seconds` a step and `eval_seconds` a whole evaluation."""
    num_networks = 2 if plan.params.train.ema.decay else 1  # the average and the raw network
    train = step_seconds * plan.num_steps
    evaluate = eval_seconds * plan.num_evals * num_networks
    dollars = (train + evaluate) / 3600 * plan.params.machine.dollars_per_hour
    return Estimate(train, evaluate, dollars)


def checks(estimate: Estimate, params: Params) -> list[Check]:
    """The estimate against the budget."""
    found = []
    for key, limit, value, shown in (
        ("hours", params.budget.hours, estimate.seconds / 3600, f"{estimate.seconds / 3600:.3g} h"),
        ("dollars", params.budget.dollars, estimate.dollars, f"${estimate.dollars:,.2f}"),
    ):
        if limit is not None:
            found.append(Check(
                f"budget_{key}", f"estimated {key} of training", shown, f"<= {limit:g}",
                value <= limit,
                advice=f"The run would stop at budget.{key} before its end: raise it, train "
                "shorter, or make the step faster.",
            ))
    return found


def facts(
    estimate: Estimate, plan: Plan, step_seconds: float, checkpoint_bytes: int
) -> dict[str, object]:
    """The estimate and what it is made of, for people."""
    price = plan.params.machine.dollars_per_hour
    return {
        "a step": f"{step_seconds:.4g} s ({plan.params.train.batch_size / step_seconds:.4g} "
        "images/s)",
        "training": f"{duration(estimate.train_seconds)} for {plan.num_steps:,} steps",
        "evaluation": f"{duration(estimate.eval_seconds)} for {plan.num_evals:,} evaluations",
        "in all": duration(estimate.seconds),
        "cost": f"${estimate.dollars:,.2f} at ${price:g} an hour" if price else
        "unknown: machine.dollars_per_hour is 0",
        "a checkpoint": f"{checkpoint_bytes / 2**20:,.1f} MiB",
    }
