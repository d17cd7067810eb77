"""The plan of the long run: how many steps, which samples and size at each, which learning rate.

Everything is a pure function of (params, number of samples), so it can be simulated before the
run, drawn in setup, and resumed at any step.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from lib.datasets.box_transforms import step_size
from lib.datasets.loader import Request
from lib.datasets.transforms import epoch_order
from lib.errors import BadInput
from lib.params import Params, as_pair


@dataclass(frozen=True)
class Plan:
    """Steps, epochs and intervals of a run."""

    params: Params
    num_samples: int

    def __post_init__(self) -> None:
        batch_size = self.params.train.batch_size
        if self.num_samples < batch_size:
            raise BadInput(
                f"train.batch_size is {batch_size}, the training split has {self.num_samples} "
                "images: not one full batch; lower train.batch_size"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Full batches an epoch; another remainder is left out each epoch."""
        return self.num_samples // self.params.train.batch_size

    @property
    def num_steps(self) -> int:
        train = self.params.train
        if train.steps is not None:
            return train.steps
        return max(1, round(train.epochs * self.steps_per_epoch))

    @property
    def num_epochs(self) -> float:
        return self.num_steps / self.steps_per_epoch

    @property
    def warmup_steps(self) -> int:
        return round(self.params.optim.warmup_epochs * self.steps_per_epoch)

    @property
    def eval_steps(self) -> int:
        """Steps between evaluations."""
        return max(1, round(self.params.train.eval_every_epochs * self.steps_per_epoch))

    @property
    def num_evals(self) -> int:
        return math.ceil(self.num_steps / self.eval_steps)

    def facts(self) -> dict[str, str]:
        """The plan in numbers, for people."""
        spread = self.params.data.boxes.multi_scale
        return {
            "steps": f"{self.num_steps:,}",
            "epochs": f"{self.num_epochs:.4g} of {self.steps_per_epoch:,} steps",
            "evaluations": f"{self.num_evals}, every {self.eval_steps:,} steps",
            "warm-up": f"{self.warmup_steps:,} steps",
            "image sizes (height x width)": " then ".join(f"{h} x {w}" for h, w in self.sizes)
            + (f", each step by up to {spread:.0%} more or less" if spread else ""),
        }

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """The training (height, width) of equal parts of the run, pixels; without multi-scale."""
        sizes = self.params.train.image_sizes or (self.params.data.image_size,)
        return [as_pair(size) for size in sizes]

    def size(self, step: int) -> tuple[int, int]:
        """The input's (height, width) at `step`, pixels."""
        sizes = self.sizes
        size = sizes[min(len(sizes) * step // self.num_steps, len(sizes) - 1)]
        return step_size(self.params.seed, step, size, self.params.data.boxes.multi_scale)

    def requests(self, first_step: int = 0) -> Iterator[Request]:
        """The micro-batches of every step from `first_step` on."""
        train, seed = self.params.train, self.params.seed
        micro = train.batch_size // train.accumulate
        late = self.num_steps - self.params.data.boxes.plain_epochs * self.steps_per_epoch
        epoch, order = -1, None
        for step in range(first_step, self.num_steps):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = epoch_order(seed, epoch, self.num_samples)
            start = step % self.steps_per_epoch * train.batch_size
            for offset in range(0, train.batch_size, micro):
                indices = order[start + offset : start + offset + micro]
                yield Request(
                    step, epoch, indices, self.size(step), range(offset, offset + micro),
                    is_late=step >= late,
                )

    def lr_factor(self, update: int) -> float:
        """Share of the peak learning rate at optimizer update `update`, from 0.

        cosine: linear warm-up, the peak for `flat` of the run, then half a cosine down to final_lr
        at the very last step (Loshchilov and Hutter 2017). one_cycle: half a cosine up over the
        warm-up and half a cosine down (Smith and Topin 2018; momentum is not cycled). multistep:
        warm-up, then a factor gamma at each milestone. constant: warm-up, then 1.
        """
        optim, warmup = self.params.optim, self.warmup_steps
        last = self.num_steps - 1
        update = min(update, last)
        if update < warmup:
            progress = update / warmup
            if optim.schedule == "one_cycle":
                progress = (1 - math.cos(math.pi * progress)) / 2
            return optim.warmup_start + (1 - optim.warmup_start) * progress
        if optim.schedule in ("cosine", "one_cycle"):
            start = warmup
            if optim.schedule == "cosine":
                start = max(warmup, round(optim.flat * self.num_steps))
            progress = max(0, update - start) / max(1, last - start)
            return optim.final_lr + (1 - optim.final_lr) * (1 + math.cos(math.pi * progress)) / 2
        if optim.schedule == "multistep":
            epoch = update / self.steps_per_epoch
            return optim.gamma ** sum(epoch >= milestone for milestone in optim.milestones_epochs)
        return 1.0
