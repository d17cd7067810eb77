"""One training step of the one-stage detector, part by part, beside torchvision's FCOS.

    python benchmarks/one_stage_step.py
    python benchmarks/one_stage_step.py --variant m --peer resnet50 --batch-size 2

FCOS is torchvision's anchor-free one-stage detector; with a mobile backbone it is its smallest,
with ResNet-50 about the size of m. The two take turns, step by step, so that whatever else the
machine does hits both: times are medians, ratios are medians of the ratios of each turn.
"""

import argparse
import time
from statistics import median

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection import FCOS, fcos_resnet50_fpn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import mobilenet_backbone
from torchvision.models.detection.image_list import ImageList

from lib.models import yolo
from lib.models.boxes import cxcywh_to_xyxy, scale_boxes
from lib.models.yolo_loss import yolo_loss

PARTS = ("forward", "loss", "backward")


class OursStep:
    def __init__(self, variant: str, images: Tensor, boxes: Tensor, labels: Tensor, classes: int):
        self.name = f"ours, {variant}"
        self.model = yolo.build(variant, classes).train()
        self.images, self.boxes, self.labels = images, boxes, labels

    def forward(self) -> yolo.YOLOOutputs:
        return self.model(self.images)

    def loss(self, outputs: yolo.YOLOOutputs) -> Tensor:
        return yolo_loss(outputs, self.boxes, self.labels, tuple(self.images.shape[-2:]))["loss"]


class FCOSStep:
    """Without its resizing and normalizing of images, which ours leaves to the data side too."""

    def __init__(self, backbone: str, images: Tensor, boxes: Tensor, labels: Tensor, classes: int):
        self.name = f"FCOS, {backbone}"
        if backbone == "resnet50":
            self.model = fcos_resnet50_fpn(
                weights=None, weights_backbone=None, num_classes=classes
            ).train()
        else:
            features = mobilenet_backbone(
                backbone_name="mobilenet_v3_large",
                weights=None,
                fpn=True,
                norm_layer=nn.BatchNorm2d,
                trainable_layers=6,
                returned_layers=[2, 3, 4],  # strides 8, 16, 32; the FPN adds 64
            )
            anchors = AnchorGenerator(((8,), (16,), (32,), (64,)), ((1.0,),) * 4)
            self.model = FCOS(features, classes, anchor_generator=anchors).train()
        height, width = images.shape[-2:]
        self.images = ImageList(images, [(height, width)] * len(images))
        self.targets = [
            {"boxes": scale_boxes(cxcywh_to_xyxy(b), height, width), "labels": image_labels}
            for b, image_labels in zip(boxes, labels, strict=True)
        ]

    def forward(self) -> tuple:
        features = list(self.model.backbone(self.images.tensors).values())
        anchors = self.model.anchor_generator(self.images, features)
        num_anchors_per_level = [x.shape[2] * x.shape[3] for x in features]
        return self.model.head(features), anchors, num_anchors_per_level

    def loss(self, outputs: tuple) -> Tensor:
        return sum(self.model.compute_loss(self.targets, *outputs).values())


class OpCounter(TorchDispatchMode):
    """Dispatched ops, and those among them that make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.num_ops = self.num_syncs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        self.num_ops += 1
        self.num_syncs += by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select")
        return func(*args, **(kwargs or {}))


def timed_step(step: OursStep | FCOSStep) -> dict[str, float]:
    """Milliseconds of each part; the backward includes that of the loss."""
    step.model.zero_grad()
    times = [time.perf_counter()]
    outputs = step.forward()
    times.append(time.perf_counter())
    loss = step.loss(outputs)
    times.append(time.perf_counter())
    loss.backward()
    times.append(time.perf_counter())
    return {part: 1e3 * (times[i + 1] - times[i]) for i, part in enumerate(PARTS)}


def timed_loss_backward(step: OursStep) -> float:
    """Milliseconds from the loss back to the network's outputs alone."""
    outputs = step.forward()
    outputs = outputs._replace(
        cls=outputs.cls.detach().requires_grad_(),
        box_dist=outputs.box_dist.detach().requires_grad_(),
    )
    loss = step.loss(outputs)
    start = time.perf_counter()
    loss.backward()
    return 1e3 * (time.perf_counter() - start)


def counted_step(step: OursStep | FCOSStep) -> dict[str, int]:
    with OpCounter() as whole:
        outputs = step.forward()
        before = whole.num_ops
        loss = step.loss(outputs)
        num_loss_ops = whole.num_ops - before
        loss.backward()
    return {"ops": whole.num_ops, "loss_ops": num_loss_ops, "syncs": whole.num_syncs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="n", choices=yolo.VARIANTS)
    parser.add_argument("--peer", default="mobilenet", choices=("mobilenet", "resnet50"))
    parser.add_argument("--height", type=int, default=320)
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--boxes", type=int, default=8, help="per image")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    images = torch.rand(args.batch_size, 3, args.height, args.width)
    size = 0.1 + 0.3 * torch.rand(args.batch_size, args.boxes, 2)
    center = size / 2 + (1 - size) * torch.rand(args.batch_size, args.boxes, 2)
    boxes = torch.cat((center, size), dim=-1)
    labels = torch.randint(1, args.classes, (args.batch_size, args.boxes))
    batch = (images, boxes, labels, args.classes)
    ours, peer = OursStep(args.variant, *batch), FCOSStep(args.peer, *batch)

    counts = {step.name: counted_step(step) for step in (ours, peer)}  # warms up, too
    times = {step.name: [] for step in (ours, peer)}
    loss_backward = []
    for _ in range(args.turns):
        for step in (ours, peer):
            times[step.name].append(timed_step(step))
        loss_backward.append(timed_loss_backward(ours))

    print(
        f"batch {args.batch_size} at {args.height} x {args.width}, {args.boxes} boxes an image, "
        f"{args.threads} threads, torch {torch.__version__}, median of {args.turns} turns"
    )
    columns = (*PARTS, "step", "ops", "loss_ops", "syncs")
    print(f"{'':>16}{'M params':>10}" + "".join(f"{column:>10}" for column in columns))
    for step in (ours, peer):
        millions = sum(p.numel() for p in step.model.parameters()) / 1e6
        parts = [median(turn[part] for turn in times[step.name]) for part in PARTS]
        step_ms = median(sum(turn.values()) for turn in times[step.name])
        row = "".join(f"{ms:>10.1f}" for ms in (*parts, step_ms))
        row += "".join(f"{count:>10}" for count in counts[step.name].values())
        print(f"{step.name:>16}{millions:>10.1f}{row}")

    pairs = list(zip(times[ours.name], times[peer.name], strict=True))
    ratios = [median(a[part] / b[part] for a, b in pairs) for part in PARTS]
    ratios.append(median(sum(a.values()) / sum(b.values()) for a, b in pairs))
    print(f"{'ours / FCOS':>16}{'':>10}" + "".join(f"{ratio:>10.2f}" for ratio in ratios))
    shares = [
        (turn["loss"] + backward) / sum(turn.values())
        for turn, backward in zip(times[ours.name], loss_backward, strict=True)
    ]
    share = median(shares)
    verdict = "within" if share < 0.10 else "OVER"
    print(f"our loss, forward and backward: {share:.1%} of our step, {verdict} the 10 % aimed at")


if __name__ == "__main__":
    main()
