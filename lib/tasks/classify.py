"""Image classification: one label an image."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from lib.datasets import FORMATS, folder, loader, transforms
from lib.datasets.loader import Request
from lib.errors import BadInput
from lib.models import classifier, weights
from lib.params import Params, resolve_path
from lib.run import Check
from lib.tasks import classify_analysis
from lib.tasks.task import Analysis, Batch, head_width, needs_several_images, spread
from lib.watch import plots

NUM_PICTURES = 32


@dataclass(frozen=True)
class Predictions:
    """What a network says of a split. N samples, K classes, up to five guesses each."""

    indices: np.ndarray
    """(N,) positions in the data set."""
    labels: np.ndarray
    """(N,)"""
    guesses: np.ndarray
    """(N, 5) classes by falling probability; fewer columns with fewer classes."""
    probabilities: np.ndarray
    """(N, 5) of the guesses."""
    losses: np.ndarray
    """(N,) cross-entropy of the true label, nats."""

    def confusion(self, num_classes: int) -> np.ndarray:
        """(K, K) counts: row the true class, column the first guess."""
        flat = self.labels * num_classes + self.guesses[:, 0]
        return np.bincount(flat, minlength=num_classes**2).reshape(num_classes, num_classes)


class Classify:
    """Any timm model on a data set of labelled images."""

    def __init__(self, params: Params, device: torch.device):
        self.params, self.device = params, device
        self.headline = params.headline
        self.train_data, self.val_data = FORMATS[params.data.format](
            params.data, params.model.in_chans
        )
        self.class_names = self.train_data.class_names
        num_data_classes = len(self.class_names)
        self.num_classes = head_width(params, self.class_names)
        self.guessing = {"loss": math.log(num_data_classes), "top1": 1 / num_data_classes}
        self.num_train, self.num_val = len(self.train_data), len(self.val_data)
        model = self.network(params, self.num_classes, params.model.pretrained)
        self.weights_report: weights.LoadReport | None = None
        if params.model.weights:
            self.weights_report = weights.fill(model, self.read_weights(params))
        self._memory_format = (
            torch.channels_last if params.machine.channels_last else torch.contiguous_format
        )
        self.model = model.to(device, memory_format=self._memory_format)
        self._moments = transforms.moments(params.data, device)

    @staticmethod
    def network(params: Params, num_classes: int, pretrained: bool) -> nn.Module:
        """The network alone; raises BadInput where the batch does not suit it."""
        model = classifier.build(
            params.model, num_classes, pretrained, params.data.input_size
        )
        needs_several_images(model, params)
        micro_batch = params.train.batch_size // params.train.accumulate
        augment = params.data.augment
        if (augment.mixup or augment.cutmix) and params.train.accumulate > 1 and micro_batch % 2:
            raise BadInput(
                f"train.batch_size {params.train.batch_size} / train.accumulate "
                f"{params.train.accumulate} makes micro-batches of {micro_batch}; mixup and cutmix "
                "mix pairs and need an even number: change train.accumulate"
            )
        return model

    @staticmethod
    def read_weights(params: Params) -> dict[str, Tensor]:
        return weights.read_state_dict(resolve_path(params.model.weights))

    @staticmethod
    def network_size(params: Params, size: tuple[int, int]) -> tuple[int, int]:
        return size

    # -- data -----------------------------------------------------------------------------------

    def census(self) -> list[dict]:
        return [asdict(data.census) for data in (self.train_data, self.val_data)]

    def train_batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        data, seed = self.params.data, self.params.seed

        def fill(request: Request, i: int, slot: np.ndarray) -> None:
            index = int(request.indices[i])
            rng = transforms.crop_rng(seed, request.epoch, index)
            image = self.train_data.open(index)
            try:
                image, box, flip = transforms.train_view(image, request.size, data, rng)
                slot[:] = self._resized(self.train_data.pixels(image), box, request.size)
            except folder.BROKEN as error:
                raise self.train_data.unreadable(index, error) from None
            if flip:
                slot[:] = slot[:, ::-1].copy()

        augment, batch_size = data.augment, self.params.train.batch_size
        for request, images in self._load(requests, fill):
            batch = self._batch(request, images, self.train_data.labels)
            if augment.color_jitter:
                batch["jitter"] = transforms.jitter_factors(
                    augment.color_jitter, seed, request.step, request.positions, batch_size
                )
            if augment.mixup or augment.cutmix:
                batch["mix"] = transforms.mix_plan(
                    augment, seed, request.step, request.positions, batch_size, request.size
                )
            yield batch

    def eval_batches(self, split: str, most: int | None = None) -> Iterator[Batch]:
        dataset = self.train_data if split == "train" else self.val_data
        chosen = spread(len(dataset), most)
        micro_batch = self.params.train.batch_size // self.params.train.accumulate
        yield from self._plain_batches(
            dataset, loader.eval_requests(chosen, micro_batch, self.params.data.input_size)
        )

    def sample_names(self, indices: list[int]) -> list[str]:
        return [str(self.train_data.paths[index]) for index in indices]

    def sample_batch(self, split: str, count: int) -> Batch:
        total = self.num_train if split == "train" else self.num_val
        return self.pictures(split, spread(total, count))

    def frozen_batches(self, num_batches: int, batch_size: int) -> list[Batch]:
        order = transforms.epoch_order(self.params.seed, 0, self.num_train)
        chosen = order[: num_batches * batch_size]
        size = self.params.data.input_size
        requests = (
            Request(i, 0, part, size, range(len(part)))
            for i, part in enumerate(np.array_split(chosen, min(num_batches, len(chosen))))
        )
        return list(self._plain_batches(self.train_data, requests))

    def _plain_batches(self, dataset, requests: Iterable[Request]) -> Iterator[Batch]:
        def fill(request: Request, i: int, slot: np.ndarray) -> None:
            index = int(request.indices[i])
            try:
                image = dataset.pixels(dataset.open(index))
                box = transforms.val_box(*image.size, self.params.data)
                slot[:] = self._resized(image, box, request.size)
            except folder.BROKEN as error:
                raise dataset.unreadable(index, error) from None

        for request, images in self._load(requests, fill):
            yield self._batch(request, images, dataset.labels)

    def _load(self, requests: Iterable[Request], fill: loader.Fill):
        return loader.load(
            requests, fill, self.params.model.in_chans, self.params.data.num_workers,
            pin=self.device.type == "cuda",
        )

    def _resized(self, image: Image.Image, box: tuple, size: tuple[int, int]) -> np.ndarray:
        """The box of an image at `size`, (H, W, C)."""
        filter_ = transforms.resampling(self.params.data)
        return np.asarray(image.resize(size[::-1], filter_, box=box)).reshape(*size, -1)

    @staticmethod
    def _batch(request: Request, images: Tensor, labels: np.ndarray) -> Batch:
        return {
            "images": images,
            "labels": torch.from_numpy(labels[request.indices]),
            "indices": torch.from_numpy(request.indices),
        }

    def to_device(self, batch: Batch) -> Batch:
        batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        images = batch["images"]
        if "jitter" in batch:
            images = transforms.color_jitter(images.float(), batch.pop("jitter"))
        images = transforms.normalize(images, *self._moments)
        if "mix" in batch:
            images, batch["share"] = transforms.mix(images, batch.pop("mix"))
            batch["partner_labels"] = transforms.swap_pairs(batch["labels"])
        return batch | {"images": images.contiguous(memory_format=self._memory_format)}

    # -- learning -------------------------------------------------------------------------------

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        mixed = (batch["partner_labels"], batch["share"]) if "share" in batch else None
        logits = model(batch["images"])
        loss = classifier.cross_entropy(
            logits.float(), batch["labels"], self.params.train.label_smoothing, mixed
        )
        return {"loss": loss}

    def scores(self, model: nn.Module, images: Tensor) -> Tensor:
        return model(images)

    def expected_initial(self, batch: Batch) -> dict[str, tuple[float, float]]:
        """ln K for K equally likely classes, with room for a head that starts unevenly.

        Random logits of deviation s raise the mean cross-entropy by about s^2 / 2. A network that
        starts from weights may know the classes already, so nothing bounds it from below.
        """
        uniform = math.log(self.num_classes)
        starts_warm = self.params.model.pretrained or self.params.model.weights
        return {"loss": (0.0 if starts_warm else 0.9 * uniform, 1.1 * uniform + 0.5)}

    def initial_advice(self, term: str) -> str:
        return (
            "Far above: the head starts with extreme outputs, or inputs are not normalized. "
            "Far below: the labels leak into the input, or there are fewer classes than stated."
        )

    def target_checks(self, batches: list[Batch], split: str) -> list[Check]:
        labels = torch.cat([batch["labels"] for batch in batches])
        low, high = int(labels.min()), int(labels.max())
        return [Check(
            "labels_in_range", "smallest and largest label, outputs of the head",
            f"{low}, {high}, {self.num_classes}", "0 to outputs - 1",
            0 <= low and high < self.num_classes,
            advice="A label lies outside the head: classes must be numbered 0, 1, 2, ...",
        )]

    # -- judging --------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, model: nn.Module, batches: Iterable[Batch]) -> Predictions:
        """Guesses and losses for every sample of the batches."""
        keep = min(5, self.num_classes)
        rows: list[tuple[np.ndarray, ...]] = []
        for batch in batches:
            on_device = self.to_device(batch)
            logits = model(on_device["images"]).float()
            probabilities, guesses = logits.softmax(1).topk(keep)
            losses = F.cross_entropy(logits, on_device["labels"], reduction="none")
            rows.append((
                batch["indices"].numpy(), batch["labels"].numpy(),
                guesses.cpu().numpy(), probabilities.cpu().numpy(), losses.cpu().numpy(),
            ))
        return Predictions(*map(np.concatenate, zip(*rows, strict=True)))

    def evaluate(
        self, model: nn.Module, batches: Iterable[Batch], split: str
    ) -> dict[str, float]:
        return self.metrics(self.predict(model, batches))

    def metrics(self, predictions: Predictions) -> dict[str, float]:
        """loss (nats), top1, top5, and top1_relabelled: top-1 under the best renaming of classes.

        The renaming is the assignment of guesses to labels that makes most guesses right. Far
        above top1 it means that the labels of this split are permuted, not that the network is
        poor.
        """
        hits = predictions.guesses == predictions.labels[:, None]  # (N, 5)
        confusion = predictions.confusion(self.num_classes)
        rows, columns = linear_sum_assignment(confusion, maximize=True)
        return {
            "loss": float(predictions.losses.mean()),
            "top1": float(hits[:, 0].mean()),
            "top5": float(hits.any(1).mean()),
            "top1_relabelled": float(confusion[rows, columns].sum() / confusion.sum()),
        }

    def memorised(self, metrics: dict[str, float]) -> Check:
        return Check(
            id="memorised",
            title="top-1 on the frozen training images",
            value=metrics.get("top1", math.nan),
            limit="= 1",
            passed=metrics.get("top1") == 1.0,
            advice="The network cannot learn even these few images: look at the pictures and "
            "labels above, then at overfit.lr and overfit.steps.",
        )

    def analyse(self, model: nn.Module) -> Analysis:
        return classify_analysis.analyse(self, model)

    def pictures(self, split: str, indices: np.ndarray) -> Batch:
        """These images as validation sees them."""
        dataset = self.train_data if split == "train" else self.val_data
        size = self.params.data.input_size
        request = Request(0, 0, indices, size, range(len(indices)))
        (batch,) = self._plain_batches(dataset, [request])
        return batch

    def figure(self, batch: Batch) -> Figure:
        pictures = transforms.denormalize(batch["images"][:NUM_PICTURES], *self._moments)
        names = [self.class_names[label] for label in batch["labels"][:NUM_PICTURES].tolist()]
        if "share" in batch:
            partners = batch["partner_labels"].tolist()
            names = [
                name if share > 0.995 else f"{share:.0%} {name}\n{1 - share:.0%} "
                f"{self.class_names[partner]}"
                for name, share, partner in zip(
                    names, batch["share"].tolist(), partners, strict=False
                )
            ]
        return plots.image_grid(list(pictures), names)
