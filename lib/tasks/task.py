"""What the loops need of a task: the one interface between them and a kind of learning."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from lib.datasets.loader import Request
from lib.errors import BadInput
from lib.params import Params
from lib.run import Check

Batch = dict[str, Tensor]
"""A batch on its way: "images" (B, C, H, W), "labels", "indices" (B,) and what the task adds.
Batches are made with uint8 images on the CPU; `losses` and `figure` take what `to_device` returns.
"""


def spread(total: int, most: int | None) -> np.ndarray:
    """Up to `most` positions spread evenly over `total`; None: all of them."""
    count = total if most is None else min(most, total)
    return np.linspace(0, total - 1, count).round().astype(np.int64)


def head_width(params: Params, class_names: Sequence[str]) -> int:
    """Classes the head tells apart; BadInput where a label would lie outside it."""
    wanted, found = params.model.num_classes or len(class_names), len(class_names)
    if wanted < found:
        raise BadInput(
            f"model.num_classes is {wanted}, the data has {found} classes: label {wanted} "
            f"({class_names[wanted]!r}) lies outside the head; set model.num_classes to null or "
            f"{found}"
        )
    return wanted


def needs_several_images(model: nn.Module, params: Params) -> None:
    """BadInput where a training BatchNorm would see one image a forward pass."""
    micro_batch = params.train.batch_size // params.train.accumulate
    has_batch_norm = any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()
    )
    if micro_batch == 1 and has_batch_norm:
        raise BadInput(
            f"train.batch_size {params.train.batch_size} / train.accumulate "
            f"{params.train.accumulate} leaves one image a forward pass, too few for the "
            f"BatchNorm of {params.model.name}; raise the batch or lower accumulate"
        )


@dataclass(frozen=True)
class View:
    """One question of an analysis with its answer: a sentence, a picture, a table."""

    title: str
    says: str
    """What the result says, computed."""
    draw: Callable[[], Figure] | None = None
    alt: str = ""
    headers: Sequence[str] = ()
    rows: Sequence[Sequence] = ()


@dataclass(frozen=True)
class Analysis:
    """What a task has to say of its trained network."""

    metrics: dict[str, float]
    """Named with their split: val/..., and train/... under the validation transform."""
    intervals: list[tuple[str, float, float, float, int]]
    """Metric, value, ends of its 95 % interval, images."""
    views: list[View]
    samples: list[dict] = field(default_factory=list)
    """Single images worth a record."""

    def bounds(self) -> dict[str, float]:
        """The intervals as val/top1_low and val/top1_high."""
        return {f"{name}_{end}": value
                for name, _, low, high, _ in self.intervals
                for end, value in (("low", low), ("high", high))}


class Dataset(Protocol):
    """One split on disk."""

    def __len__(self) -> int: ...

    def file(self, index: int) -> Path:
        """Where picture `index` is."""
        ...

    def open(self, index: int) -> Image.Image:
        """Picture `index`, header read. Raises BadInput for what cannot be opened."""
        ...

    def pixels(self, image: Image.Image) -> Image.Image:
        """The decoded picture, upright, with the channels the network reads."""
        ...

    def unreadable(self, index: int, error: Exception) -> BadInput:
        """The error that names the file."""
        ...


class Task(Protocol):
    """Ties a network, its data, its losses, its metric and its pictures together.

    The loops own backward, clipping, the optimizer's step, EMA and saving; a task never does.
    Losses and evaluation take the network as an argument, because the loops call them with the
    trained network, its moving average, and wrapped ones.
    """

    params: Params
    device: torch.device
    model: nn.Module
    headline: str
    """The metric that "best", the target and early stopping follow, such as val/top1."""
    guessing: dict[str, float]
    """Metrics of a network that has learnt nothing, without the split's name."""
    train_data: Dataset
    val_data: Dataset
    num_train: int
    """Training samples."""
    num_val: int
    """Validation samples."""

    def census(self) -> list[dict]:
        """Files listed, used and dropped, and the data's digest, one entry a split."""
        ...

    def train_batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """Augmented batches, in the order of the requests."""
        ...

    def eval_batches(self, split: str, most: int | None = None) -> Iterator[Batch]:
        """Every sample of "val" or "train" once, or `most` spread evenly, as validation sees it."""
        ...

    def sample_names(self, indices: list[int]) -> list[str]:
        """The files of training samples."""
        ...

    def frozen_batches(self, num_batches: int, batch_size: int) -> list[Batch]:
        """Fixed training samples as validation sees them, never augmented."""
        ...

    def sample_batch(self, split: str, count: int) -> Batch:
        """`count` samples spread evenly over a split, as validation sees them."""
        ...

    def to_device(self, batch: Batch) -> Batch:
        """Copy to the device and finish there: normalize, mix."""
        ...

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """{"loss": what is minimised, term: its parts}, scalars on the device."""
        ...

    def scores(self, model: nn.Module, images: Tensor) -> Tensor:
        """The network's raw outputs for images on the device, (B, ...)."""
        ...

    def evaluate(
        self, model: nn.Module, batches: Iterable[Batch], split: str
    ) -> dict[str, float]:
        """Metrics without the split's name. Batches as `eval_batches` yields them."""
        ...

    def expected_initial(self, batch: Batch) -> dict[str, tuple[float, float]]:
        """Range of loss terms on this batch before any training, from theory."""
        ...

    def initial_advice(self, term: str) -> str:
        """What a term out of that range means."""
        ...

    def target_checks(self, batches: list[Batch], split: str) -> list[Check]:
        """Whether the targets of unaugmented batches are what the losses take them for."""
        ...

    @staticmethod
    def read_weights(params: Params) -> dict[str, Tensor]:
        """The tensors of `model.weights` under the network's own names."""
        ...

    @staticmethod
    def network_size(params: Params, size: tuple[int, int]) -> tuple[int, int]:
        """The (H, W) that the network gets for an input of `size`: padded, or as it is."""
        ...

    def analyse(self, model: nn.Module) -> Analysis:
        """Judge the finished network."""
        ...

    def memorised(self, metrics: dict[str, float]) -> Check:
        """Whether metrics on the frozen training images show that they were learnt by heart."""
        ...

    def figure(self, batch: Batch) -> Figure:
        """The images and targets of a batch as the network sees them."""
        ...
