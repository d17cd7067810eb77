"""How long a run will take and what it will cost, from measured step and evaluation times."""

from dataclasses import dataclass

from lib.loops.schedule import Plan


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
