"""The families of detectors: what the Detect task needs of each network.

A new detector is one class here and one line in FAMILIES; its network and losses are files in
`lib/models`.
"""

from typing import NamedTuple, Protocol

from torch import Tensor, nn

from lib.errors import BadInput
from lib.models import rtdetr, rtdetr_loss, yolo, yolo_loss
from lib.params import Params
from lib.tasks.task import Batch

MOST_DETECTIONS = 100  # an image: as many as the COCO metric looks at


class Found(NamedTuple):
    """The detections of one image, best first."""

    scores: Tensor  # (n,) in (0, 1)
    labels: Tensor  # (n,)
    boxes: Tensor  # (n, 4) cxcywh normalized by the network's input


class Family(Protocol):
    """One kind of detector. A batch has "images" (B, C, H, W), "boxes" (B, M, 4), "labels" (B, M).
    """

    @staticmethod
    def build(variant: str, num_classes: int, params: Params, pretrained: bool) -> nn.Module:
        """The network with random heads."""
        ...

    @staticmethod
    def own_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors under the network's names, where others publish it under theirs."""
        ...

    @staticmethod
    def network_size(size: tuple[int, int]) -> tuple[int, int]:
        """The (H, W) that an input of `size` is padded to."""
        ...

    @staticmethod
    def forward(model: nn.Module, batch: Batch) -> tuple:
        """The network's outputs."""
        ...

    @staticmethod
    def losses(outputs: tuple, batch: Batch, params: Params) -> dict[str, Tensor]:
        """{"loss": what is minimised, term: its parts}."""
        ...

    @staticmethod
    def scores(outputs: tuple) -> Tensor:
        """All class logits, (B, ...)."""
        ...

    @staticmethod
    def found(outputs: tuple, size: tuple[int, int]) -> list[Found]:
        """At most MOST_DETECTIONS an image of `size` (H, W)."""
        ...

    @staticmethod
    def expected_initial(model: nn.Module, batch: Batch) -> dict[str, tuple[float, float]]:
        """Range of loss terms of the untrained network on this batch, from theory."""
        ...


class RTDETR:
    """RT-DETR: as many boxes as queries, no suppression."""

    @staticmethod
    def build(variant: str, num_classes: int, params: Params, pretrained: bool) -> nn.Module:
        model = rtdetr.build(
            variant, num_classes, pretrained_backbone=pretrained, in_chans=params.model.in_chans
        )
        if params.detect.freeze_norms:
            model.freeze_stem_and_norms()
        return model

    @staticmethod
    def own_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return rtdetr.own_names(state)

    @staticmethod
    def network_size(size: tuple[int, int]) -> tuple[int, int]:
        return size

    @staticmethod
    def forward(model: nn.Module, batch: Batch) -> rtdetr.Outputs:
        return model(batch["images"], rtdetr.Targets(batch["boxes"], batch["labels"]))

    @staticmethod
    def losses(outputs: rtdetr.Outputs, batch: Batch, params: Params) -> dict[str, Tensor]:
        return rtdetr_loss.losses(outputs, rtdetr.Targets(batch["boxes"], batch["labels"]))

    @staticmethod
    def scores(outputs: rtdetr.Outputs) -> Tensor:
        return outputs.logits[-1]

    @staticmethod
    def found(outputs: rtdetr.Outputs, size: tuple[int, int]) -> list[Found]:
        best = rtdetr.postprocess(outputs, MOST_DETECTIONS)
        together = (best.scores.cpu(), best.labels.cpu(), best.boxes.float().cpu())
        return [Found(*one) for one in zip(*together, strict=True)]

    @staticmethod
    def expected_initial(model: nn.Module, batch: Batch) -> dict[str, tuple[float, float]]:
        labels = batch["labels"]
        boxes_per_image = max(float((labels >= 0).sum()), 1.0) / len(labels)
        num_queries, num_layers = model.decoder.num_queries, model.config.num_decoder_layers
        low, high = rtdetr_loss.expected_initial_vfl(
            num_queries, model.num_classes, boxes_per_image
        )
        return {
            "vfl": (low, high),
            "aux_vfl": ((num_layers - 1) * low, (num_layers - 1) * high),
            "l1": (0.0, 4.0),  # four differences of numbers between 0 and 1
            "giou": (0.0, 2.0),
        }


class YOLO:
    """The one-stage anchor-free detector: dense predictions, then suppression."""

    @staticmethod
    def build(variant: str, num_classes: int, params: Params, pretrained: bool) -> nn.Module:
        if pretrained:
            raise BadInput(
                f"model.pretrained: {params.model.name} has no published weights to start from; "
                "set it to false, or give a file or a run's checkpoint as model.weights"
            )
        if params.detect.freeze_norms:
            raise BadInput(
                f"detect.freeze_norms: {params.model.name} has no pretrained backbone to freeze; "
                "remove the key"
            )
        return yolo.build(variant, num_classes, in_chans=params.model.in_chans)

    @staticmethod
    def own_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state

    @staticmethod
    def network_size(size: tuple[int, int]) -> tuple[int, int]:
        return yolo.padded_size(size)

    @staticmethod
    def forward(model: nn.Module, batch: Batch) -> yolo.YOLOOutputs:
        return model(batch["images"])

    @staticmethod
    def losses(outputs: yolo.YOLOOutputs, batch: Batch, params: Params) -> dict[str, Tensor]:
        gains = yolo_loss.Gains(
            params.detect.box_gain, params.detect.cls_gain, params.detect.dfl_gain
        )
        size = tuple(batch["images"].shape[-2:])
        terms = yolo_loss.yolo_loss(outputs, batch["boxes"], batch["labels"], size, gains)
        # The published learning rates of this family are for a loss summed over the images.
        summed = {name: term * params.train.batch_size for name, term in terms.items()
                  if name == "loss" or name.endswith("_weighted")}
        return terms | summed

    @staticmethod
    def scores(outputs: yolo.YOLOOutputs) -> Tensor:
        return outputs.cls

    @staticmethod
    def found(outputs: yolo.YOLOOutputs, size: tuple[int, int]) -> list[Found]:
        images = yolo.postprocess(outputs, size, top_k=MOST_DETECTIONS)
        return [
            Found(image["scores"].cpu(), image["labels"].cpu(), image["boxes"].cpu())
            for image in images
        ]

    @staticmethod
    def expected_initial(model: nn.Module, batch: Batch) -> dict[str, tuple[float, float]]:
        size = tuple(batch["images"].shape[-2:])
        expected = yolo_loss.expected_initial(
            batch["boxes"], batch["labels"], size, model.num_classes
        )
        # Never from 0: a term is 0 where no target reaches an anchor, as boxes in pixels do not.
        return {name: (max(0.8 * float(value), 0.05), 1.25 * float(value))
                for name, value in expected.items()}


FAMILIES: dict[str, tuple[type[Family], tuple[str, ...]]] = {
    "rtdetr": (RTDETR, tuple(rtdetr.VARIANTS)),
    "yolo": (YOLO, tuple(yolo.VARIANTS)),
}
"""Family and its variants; a network's name is FAMILY_VARIANT."""


def family_of(name: str) -> tuple[type[Family], str]:
    """The family and the variant of `model.name`. Raises BadInput listing what there is."""
    family, _, variant = name.partition("_")
    if family in FAMILIES and variant in FAMILIES[family][1]:
        return FAMILIES[family][0], variant
    known = "; ".join(
        ", ".join(f"{name}_{variant}" for variant in variants)
        for name, (_, variants) in FAMILIES.items()
    )
    raise BadInput(f"model.name: no detector {name!r}; there are {known}")
