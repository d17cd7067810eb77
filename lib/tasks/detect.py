"""Object detection: any number of boxes an image, each with a class."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from lib.datasets import BOX_FORMATS, box_transforms, loader, transforms
from lib.datasets.box_transforms import Sample
from lib.datasets.detection import DetectionDataset
from lib.datasets.loader import Request
from lib.errors import BadInput
from lib.models import weights
from lib.params import Params, resolve_path
from lib.run import Check
from lib.tasks import coco_metric, detect_analysis
from lib.tasks.coco_metric import Detections
from lib.tasks.detectors import MOST_DETECTIONS, Found, family_of
from lib.tasks.task import Analysis, Batch, head_width, needs_several_images, spread
from lib.watch import plots

NUM_PICTURES = 12
ROUNDING = 1e-5  # of a normalized coordinate, in float32


class Detect:
    """RT-DETR or the one-stage detector on a data set of boxes."""

    def __init__(self, params: Params, device: torch.device):
        self.params, self.device = params, device
        self.train_data, self.val_data = BOX_FORMATS[params.data.format](
            params.data, params.model.in_chans
        )
        self.class_names = self.train_data.class_names
        self.num_classes = head_width(params, self.class_names)
        self.num_train, self.num_val = len(self.train_data), len(self.val_data)
        self.headline = params.headline
        self.guessing: dict[str, float] = {}
        self.family, _ = family_of(params.model.name)
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
        """The network alone; raises BadInput where the params do not suit it."""
        family, variant = family_of(params.model.name)
        model = family.build(variant, num_classes, params, pretrained)
        needs_several_images(model, params)
        if params.optim.backbone_lr != 1 and not hasattr(model, "backbone"):
            raise BadInput(
                f"optim.backbone_lr: {params.model.name} has no separate backbone; remove the key"
            )
        return model

    @staticmethod
    def read_weights(params: Params) -> dict[str, Tensor]:
        state = weights.read_state_dict(resolve_path(params.model.weights))
        return family_of(params.model.name)[0].own_names(state)

    @staticmethod
    def network_size(params: Params, size: tuple[int, int]) -> tuple[int, int]:
        return family_of(params.model.name)[0].network_size(size)

    # -- data -----------------------------------------------------------------------------------

    def census(self) -> list[dict]:
        return [asdict(data.census) for data in (self.train_data, self.val_data)]

    def train_batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        seed, data = self.params.seed, self.params.data

        def plan(request: Request, index: int) -> Sample:
            return box_transforms.plan(
                self.train_data, index, request.size, data.letterbox, data.boxes,
                transforms.crop_rng(seed, request.epoch, index), join=not request.is_late,
            )

        for request, batch in self._batches(self.train_data, requests, plan):
            if data.boxes.changes_colour:
                batch["recolour"] = box_transforms.colour_matrices(
                    data.boxes, seed, request.epoch, request.indices, self.params.model.in_chans
                )
            yield batch

    def eval_batches(self, split: str, most: int | None = None) -> Iterator[Batch]:
        dataset = self._split(split)
        chosen = spread(len(dataset), most)
        micro_batch = self.params.train.batch_size // self.params.train.accumulate
        yield from self._plain_batches(
            dataset, loader.eval_requests(chosen, micro_batch, self.params.data.input_size)
        )

    def sample_names(self, indices: list[int]) -> list[str]:
        return [str(self.train_data.paths[index]) for index in indices]

    def sample_batch(self, split: str, count: int) -> Batch:
        return self.pictures(split, spread(len(self._split(split)), count))

    def pictures(self, split: str, indices: np.ndarray) -> Batch:
        """These images as validation sees them."""
        request = Request(0, 0, indices, self.params.data.input_size, range(len(indices)))
        (batch,) = self._plain_batches(self._split(split), [request])
        return batch

    def frozen_batches(self, num_batches: int, batch_size: int) -> list[Batch]:
        """Images with objects first: one without teaches nothing that could be memorised."""
        order = transforms.epoch_order(self.params.seed, 0, self.num_train)
        has_object = np.array([len(self.train_data.targets(index)[1]) > 0 for index in order])
        chosen = np.concatenate((order[has_object], order[~has_object]))[: num_batches * batch_size]
        parts = np.array_split(chosen, min(num_batches, len(chosen)))
        size = self.params.data.input_size
        requests = [Request(i, 0, part, size, range(len(part))) for i, part in enumerate(parts)]
        return list(self._plain_batches(self.train_data, requests))

    def _split(self, split: str) -> DetectionDataset:
        return self.train_data if split == "train" else self.val_data

    def _plain_batches(
        self, dataset: DetectionDataset, requests: Iterable[Request]
    ) -> Iterator[Batch]:
        def plan(request: Request, index: int) -> Sample:
            return box_transforms.plain(dataset, index, request.size, self.params.data.letterbox)

        for _, batch in self._batches(dataset, requests, plan):
            yield batch

    def _batches(
        self, dataset: DetectionDataset, requests: Iterable[Request],
        plan: Callable[[Request, int], Sample],
    ) -> Iterator[tuple[Request, Batch]]:
        """Boxes are planned with the request; the decoding threads then only paint pixels."""
        planned: dict[int, list[Sample]] = {}  # by id of a request that is on its way
        resampling = transforms.resampling(self.params.data)

        def remember() -> Iterator[Request]:
            for request in requests:
                planned[id(request)] = [plan(request, index) for index in request.indices.tolist()]
                yield request

        def fill(request: Request, i: int, slot: np.ndarray) -> None:
            box_transforms.render(planned[id(request)][i], dataset, slot, resampling)

        for request, images in loader.load(
            remember(), fill, self.params.model.in_chans, self.params.data.num_workers,
            pin=self.device.type == "cuda",
        ):
            boxes, labels = box_transforms.pad_targets(planned.pop(id(request)))
            yield request, {
                "images": images, "boxes": boxes, "labels": labels,
                "indices": torch.from_numpy(request.indices),
                "sizes": torch.from_numpy(dataset.sizes[request.indices]),  # (B, 2) W, H as stored
            }

    def to_device(self, batch: Batch) -> Batch:
        batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        images = batch["images"]
        if "recolour" in batch:
            images = box_transforms.recolour(images.float(), batch.pop("recolour"))
        height, width = images.shape[-2:]
        padded_height, padded_width = self.family.network_size((height, width))
        if (padded_height, padded_width) != (height, width):  # on the right and at the bottom
            padding = (0, padded_width - width, 0, padded_height - height)
            images = F.pad(images, padding, value=box_transforms.FILL)
            share = batch["boxes"].new_tensor((width / padded_width, height / padded_height))
            batch["boxes"] = batch["boxes"] * share.repeat(2)
        images = transforms.normalize(images, *self._moments)
        return batch | {"images": images.contiguous(memory_format=self._memory_format)}

    # -- learning -------------------------------------------------------------------------------

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return self.family.losses(self.family.forward(model, batch), batch, self.params)

    def scores(self, model: nn.Module, images: Tensor) -> Tensor:
        empty = {"images": images, "boxes": images.new_zeros(len(images), 0, 4),
                 "labels": images.new_zeros((len(images), 0), dtype=torch.long)}
        return self.family.scores(self.family.forward(model, empty))

    def expected_initial(self, batch: Batch) -> dict[str, tuple[float, float]]:
        expected = self.family.expected_initial(self.model, self.to_device(batch))
        if self.params.model.weights:  # it may know the classes already
            return {term: (0.0, high) for term, (_, high) in expected.items()}
        return expected

    def initial_advice(self, term: str) -> str:
        if term in ("l1", "giou", "box"):
            return (
                "Boxes reach the loss in another unit than the network's: they must be normalized "
                "by the picture's width and height, center x, center y, width, height in [0, 1]."
            )
        if term == "dfl":
            return (
                "The sides of an untrained head start at their prior, boxes of one stride: this "
                "head's do not, or the boxes are not normalized by the picture's width and height."
            )
        return (
            "Far above: the class head has no prior bias, so that every query or anchor starts "
            "at probability 0.5 instead of about 0.01 and the background drowns the loss "
            "(initialize the head's bias with log(p / (1 - p))); or the boxes are not normalized. "
            "Far below: objects are missing from the targets."
        )

    def target_checks(self, batches: list[Batch], split: str) -> list[Check]:
        """Targets are what the loss takes them for, and survive the way to the metric."""
        corners, labels = [], []
        for batch in map(self.to_device, batches):
            real = batch["labels"] >= 0
            center, size = batch["boxes"][real].split(2, -1)
            corners += [center - size / 2, center + size / 2]
            labels.append(batch["labels"][real])
        corners, labels = torch.cat(corners).flatten().cpu(), torch.cat(labels).cpu()
        if not len(labels):
            return [Check("targets", "boxes in these batches", 0, "> 0", False,
                          advice="There is nothing to learn from: choose images with objects.")]
        low, high = float(corners.min()), float(corners.max())
        truth = self._judge(self._true_boxes(batches), split, batches)
        return [
            Check(
                "boxes_normalized", "smallest and largest corner of a target box",
                f"{low:.4g}, {high:.4g}", "0 to 1",
                -ROUNDING <= low and high <= 1 + ROUNDING,
                advice="Boxes reach the loss that are not normalized (in pixels, it seems): divide "
                "x and width by the picture's width, y and height by its height, in the reader.",
            ),
            Check(
                "labels_in_range", "smallest and largest label, classes of the head",
                f"{int(labels.min())}, {int(labels.max())}, {self.num_classes}",
                "0 to classes - 1", 0 <= labels.min() and labels.max() < self.num_classes,
                advice="A label lies outside the head: category ids must be mapped to 0, 1, 2, ...",
            ),
            Check(
                "truth_scores_one", "mAP of the ground truth fed back as predictions",
                truth["mAP"], "= 1", truth["mAP"] > 0.9999,
                advice="Boxes change on their way to the network and back: look at the "
                "normalization of boxes, the resizing and the padding.",
            ),
        ]

    # -- judging --------------------------------------------------------------------------------

    def predict(self, model: nn.Module, batches: Iterable[Batch]) -> Detections:
        """What the network finds, in the pictures as they are on disk."""
        return self._found(model, batches)[0]

    def evaluate(
        self, model: nn.Module, batches: Iterable[Batch], split: str
    ) -> dict[str, float]:
        detections, loss, indices = self._found(model, batches)
        result = coco_metric.evaluate(detections, self._split(split), indices)
        return {"loss": loss, **result.metrics}

    @torch.no_grad()
    def _found(
        self, model: nn.Module, batches: Iterable[Batch]
    ) -> tuple[Detections, float, np.ndarray]:
        """Detections, the mean loss an image, and the images (positions) judged."""
        parts, losses, indices = [], [], []
        for batch in batches:
            on_device = self.to_device(batch)
            outputs = self.family.forward(model, on_device)
            loss = self.family.losses(outputs, on_device, self.params)["loss"]
            losses.append(loss.float() * len(batch["indices"]))
            found = self.family.found(outputs, tuple(on_device["images"].shape[-2:]))
            parts.append(self._to_pictures(batch, found))
            indices.append(batch["indices"].numpy())
        detections = Detections(*map(np.concatenate, zip(*parts, strict=True)))
        indices = np.concatenate(indices)
        return detections, float(torch.stack(losses).sum()) / len(indices), indices

    def _to_pictures(self, batch: Batch, found: list[Found]) -> Detections:
        """From boxes normalized by the network's input to boxes normalized by the picture."""
        height, width = batch["images"].shape[-2:]
        padded_height, padded_width = self.family.network_size((height, width))
        padding = np.array((padded_width / width, padded_height / height) * 2)
        images, boxes = [], []
        for index, size, one in zip(
            batch["indices"].tolist(), batch["sizes"].tolist(), found, strict=True
        ):
            view = box_transforms.fit(tuple(size), (height, width), self.params.data.letterbox)
            boxes.append(box_transforms.to_image(one.boxes.numpy() * padding, view.array()))
            images.append(np.full(len(one.scores), index))
        return Detections(
            np.concatenate(images), np.concatenate(boxes),
            *(torch.cat(column).numpy() for column in ([one.scores.float() for one in found],
                                                       [one.labels for one in found])),
        )

    def _true_boxes(self, batches: list[Batch]) -> Detections:
        """The targets as the loss gets them, as if the network had found them."""
        parts = []
        for batch in batches:
            boxes, labels = self.to_device(batch)["boxes"].cpu(), batch["labels"]
            found = [Found(torch.ones(int(real.sum())), labels[i][real], boxes[i][real])
                     for i, real in enumerate(labels >= 0)]
            parts.append(self._to_pictures(batch, found))
        return Detections(*map(np.concatenate, zip(*parts, strict=True)))

    def _judge(self, detections: Detections, split: str, batches: list[Batch]) -> dict[str, float]:
        """The metric on these images; it takes no more than MOST_DETECTIONS of one."""
        indices = [batch["indices"][(batch["labels"] >= 0).sum(1) <= MOST_DETECTIONS].numpy()
                   for batch in batches]
        indices = np.concatenate(indices)
        return coco_metric.evaluate(detections, self._split(split), indices).metrics

    def memorised(self, metrics: dict[str, float]) -> Check:
        value = metrics.get("mAP50", math.nan)
        return Check(
            "memorised", "mAP50 on the frozen training images", value, ">= 0.9", value >= 0.9,
            advice="The network cannot learn even these few images: look at the boxes drawn above, "
            "then at overfit.lr and overfit.steps.",
        )

    def analyse(self, model: nn.Module) -> Analysis:
        return detect_analysis.analyse(self, model)

    def figure(self, batch: Batch) -> Figure:
        pictures = transforms.denormalize(batch["images"][:NUM_PICTURES], *self._moments)
        truths = []
        for boxes, labels in zip(batch["boxes"].cpu(), batch["labels"].cpu(), strict=True):
            real = labels >= 0
            names = [self.class_names[label] for label in labels[real].tolist()]
            truths.append((boxes[real].numpy(), names))
        return plots.box_grid(list(pictures), truths[:NUM_PICTURES])
