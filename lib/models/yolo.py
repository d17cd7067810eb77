"""One-stage anchor-free detector of the v8 family, written from its published architecture.

    image -> backbone -> three levels at strides 8, 16, 32 -> top-down and bottom-up neck -> heads

Split blocks:    a gradient path per bottleneck, all concatenated (CSPNet, Wang et al. 2020; ELAN)
Pooling:         three chained 5x5 max-pools, a cheap spatial pyramid (He et al. 2015)
Neck:            FPN down and PAN up again (Liu et al. 2018)
Head:            box and class branches apart (YOLOX, Ge et al. 2021); each box side is a
                 distribution over 16 distances (Generalized Focal Loss, Li et al. 2020)

Every cell of every level is one anchor, a point at the cell's center; there are no anchor boxes and
no objectness. Images come in as (B, 3, H, W) in [0, 1]; the first batch norm takes care of the
rest. H and W may differ but must be multiples of 32: `padded_size` says to what to pad.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms

from lib.models.boxes import cxcywh_to_xyxy, scale_boxes, xyxy_to_cxcywh

STRIDES = (8, 16, 32)
NUM_BINS = 16  # a side may be 0 to 15 strides away from its anchor
PRIOR_DECAY = math.log(3)  # each further distance starts three times less likely: half a stride
PRIOR_BOXES = 5  # boxes that each level expects in a 640 x 640 image, before any training
NUM_NMS_CANDIDATES = 3000  # best (anchor, class) pairs of an image that go into suppression

# variant: (width multiple, depth multiple, most channels before the width multiple)
VARIANTS = {
    "n": (0.25, 1 / 3, 1024),
    "s": (0.50, 1 / 3, 1024),
    "m": (0.75, 2 / 3, 768),
    "l": (1.00, 1.0, 512),
    "x": (1.25, 1.0, 512),
}


class YOLOOutputs(NamedTuple):
    """Raw predictions, all levels concatenated: A = HW / 8^2 + HW / 16^2 + HW / 32^2 anchors."""

    cls: Tensor  # (B, A, C) class logits
    box_dist: Tensor  # (B, A, 4 * 16) logits over distances: left, top, right, bottom
    anchors: Tensor  # (A, 2) anchor centers x, y in input pixels
    strides: Tensor  # (A,) input pixels per cell


def build(variant: str, num_classes: int, *, in_chans: int = 3) -> "YOLO":
    """The detector of size `variant` (n, s, m, l, x), randomly initialized."""
    if variant not in VARIANTS:
        raise ValueError(f"no YOLO variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    width, depth, max_channels = VARIANTS[variant]
    return YOLO(width, depth, max_channels, num_classes, in_chans)


def padded_size(size: tuple[int, int], stride: int = STRIDES[-1]) -> tuple[int, int]:
    """The smallest (height, width) that holds `size` and that the network accepts."""
    height, width = size
    return math.ceil(height / stride) * stride, math.ceil(width / stride) * stride


def class_prior_bias(strides: Tensor, num_classes: int) -> Tensor:
    """Class logit of an untrained network at anchors of these strides: (A,) -> (A,).

    Without it every anchor starts at p = 0.5 and the background drowns the loss (Focal Loss, Lin et
    al. 2017, section 3.3). A 640-pixel image has (640 / stride)^2 anchors a level, of which
    PRIOR_BOXES are expected to hold a box, of each class equally often.
    """
    prior = PRIOR_BOXES / (num_classes * (640 / strides) ** 2)
    return torch.logit(prior)


def distance_prior(device: torch.device | None = None) -> Tensor:
    """Logits of an untrained network over the distances of one side, (16,).

    Boxes start one stride wide. A uniform start is 15 strides wide: what it shares with a small
    object is next to nothing, and the assignment teaches a box in proportion to just that, so
    small objects would wait until all others are learnt.
    """
    return -PRIOR_DECAY * torch.arange(NUM_BINS, dtype=torch.float32, device=device)


class YOLO(nn.Module):
    def __init__(
        self, width: float, depth: float, max_channels: int, num_classes: int, in_chans: int
    ):
        super().__init__()

        def channels(base: int) -> int:
            return math.ceil(min(base, max_channels) * width / 8) * 8

        def repeats(base: int) -> int:
            return max(round(base * depth), 1)

        c2, c4, c8, c16, c32 = (channels(base) for base in (64, 128, 256, 512, 1024))
        self.num_classes = num_classes
        # Backbone; the name says the stride of what comes out.
        self.stem = nn.Sequential(
            ConvBlock(in_chans, c2, 3, stride=2),
            ConvBlock(c2, c4, 3, stride=2),
            SplitBlock(c4, c4, repeats(3), shortcut=True),
        )
        self.stage8 = nn.Sequential(
            ConvBlock(c4, c8, 3, stride=2), SplitBlock(c8, c8, repeats(6), shortcut=True)
        )
        self.stage16 = nn.Sequential(
            ConvBlock(c8, c16, 3, stride=2), SplitBlock(c16, c16, repeats(6), shortcut=True)
        )
        self.stage32 = nn.Sequential(
            ConvBlock(c16, c32, 3, stride=2),
            SplitBlock(c32, c32, repeats(3), shortcut=True),
            PyramidPooling(c32),
        )
        # Neck: coarse meaning down to the fine levels, then fine detail back up.
        self.down16 = SplitBlock(c32 + c16, c16, repeats(3))
        self.down8 = SplitBlock(c16 + c8, c8, repeats(3))
        self.shrink8 = ConvBlock(c8, c8, 3, stride=2)
        self.up16 = SplitBlock(c8 + c16, c16, repeats(3))
        self.shrink16 = ConvBlock(c16, c16, 3, stride=2)
        self.up32 = SplitBlock(c16 + c32, c32, repeats(3))
        # Heads; the hidden widths follow the finest level, for all three.
        box_channels = max(16, c8 // 4, 4 * NUM_BINS)
        cls_channels = max(c8, min(num_classes, 100))
        self.box_heads = nn.ModuleList(Head(c, box_channels, 4 * NUM_BINS) for c in (c8, c16, c32))
        self.cls_heads = nn.ModuleList(Head(c, cls_channels, num_classes) for c in (c8, c16, c32))
        self.init_heads()

    @torch.no_grad()
    def init_heads(self) -> None:
        """Start from known outputs, so that the first loss can be checked against arithmetic.

        Small last weights let the biases speak: each class logit is its prior, each side's
        distribution is `distance_prior`.
        """
        for stride, box_head, cls_head in zip(STRIDES, self.box_heads, self.cls_heads, strict=True):
            nn.init.normal_(box_head.predict.weight, std=0.01)
            box_head.predict.bias.copy_(distance_prior().repeat(4))
            nn.init.normal_(cls_head.predict.weight, std=0.01)
            cls_head.predict.bias.fill_(class_prior_bias(torch.tensor(stride), self.num_classes))

    def forward(self, images: Tensor) -> YOLOOutputs:
        """Images (B, 3, H, W) in [0, 1], H and W multiples of 32."""
        size = tuple(images.shape[-2:])
        if size != padded_size(size):
            raise ValueError(
                f"images of {size[0]} x {size[1]} (height x width) are not multiples of "
                f"{STRIDES[-1]}: pad them to {' x '.join(map(str, padded_size(size)))}"
            )
        stem = self.stem(images)  # (B, c4, H/4, W/4)
        x8 = self.stage8(stem)  # (B, c8, H/8, W/8)
        x16 = self.stage16(x8)  # (B, c16, H/16, W/16)
        x32 = self.stage32(x16)  # (B, c32, H/32, W/32)

        down16 = self.down16(torch.cat((upsample(x32), x16), dim=1))
        down8 = self.down8(torch.cat((upsample(down16), x8), dim=1))
        up16 = self.up16(torch.cat((self.shrink8(down8), down16), dim=1))
        up32 = self.up32(torch.cat((self.shrink16(up16), x32), dim=1))

        levels = (down8, up16, up32)
        cls = [head(x) for head, x in zip(self.cls_heads, levels, strict=True)]
        box_dist = [head(x) for head, x in zip(self.box_heads, levels, strict=True)]
        anchors, strides = make_anchors(size, images.device)
        return YOLOOutputs(flatten_levels(cls), flatten_levels(box_dist), anchors, strides)


class ConvBlock(nn.Module):
    """Convolution, batch norm, SiLU; padded so that only the stride changes the size."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False
        )
        self.norm = nn.BatchNorm2d(out_channels, eps=1e-3, momentum=0.03)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(self.conv(x)), inplace=True)


class Bottleneck(nn.Module):
    """Two 3x3 convolutions, with a residual where `shortcut`."""

    def __init__(self, channels: int, shortcut: bool):
        super().__init__()
        self.conv1 = ConvBlock(channels, channels, 3)
        self.conv2 = ConvBlock(channels, channels, 3)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x))
        return x + y if self.shortcut else y


class SplitBlock(nn.Module):
    """Half the channels run through a chain of bottlenecks; every link of it is kept."""

    def __init__(
        self, in_channels: int, out_channels: int, num_bottlenecks: int, shortcut: bool = False
    ):
        super().__init__()
        half = out_channels // 2
        self.expand = ConvBlock(in_channels, 2 * half, 1)
        self.bottlenecks = nn.ModuleList(Bottleneck(half, shortcut) for _ in range(num_bottlenecks))
        self.fuse = ConvBlock((2 + num_bottlenecks) * half, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        links = list(self.expand(x).chunk(2, dim=1))  # two of (B, half, H, W)
        for bottleneck in self.bottlenecks:
            links.append(bottleneck(links[-1]))
        return self.fuse(torch.cat(links, dim=1))


class PyramidPooling(nn.Module):
    """5x5 max-pools in a chain see 5, 9 and 13 cells; concatenated with their input."""

    def __init__(self, channels: int):
        super().__init__()
        self.reduce = ConvBlock(channels, channels // 2, 1)
        self.fuse = ConvBlock(4 * (channels // 2), channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pools = [self.reduce(x)]
        for _ in range(3):
            pools.append(F.max_pool2d(pools[-1], kernel_size=5, stride=1, padding=2))
        return self.fuse(torch.cat(pools, dim=1))


class Head(nn.Module):
    """One branch of one level: two 3x3 blocks, then a plain 1x1 convolution."""

    def __init__(self, in_channels: int, hidden_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = ConvBlock(in_channels, hidden_channels, 3)
        self.conv2 = ConvBlock(hidden_channels, hidden_channels, 3)
        self.predict = nn.Conv2d(hidden_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.predict(self.conv2(self.conv1(x)))


def upsample(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def flatten_levels(levels: list[Tensor]) -> Tensor:
    """Maps (B, C, h, w), finest first, to (B, A, C)."""
    return torch.cat([x.flatten(2).transpose(1, 2) for x in levels], dim=1)


def make_anchors(size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Cell centers (A, 2) as x, y in pixels, and strides (A,), in the order of `flatten_levels`."""
    anchors, strides = [], []
    for stride in STRIDES:
        y = (torch.arange(size[0] // stride, device=device) + 0.5) * stride
        x = (torch.arange(size[1] // stride, device=device) + 0.5) * stride
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        anchors.append(torch.stack((grid_x, grid_y), dim=-1).flatten(0, 1))  # (h * w, 2)
        strides.append(torch.full((len(y) * len(x),), float(stride), device=device))
    return torch.cat(anchors), torch.cat(strides)


def decode_distances(box_dist: Tensor, anchors: Tensor, strides: Tensor) -> Tensor:
    """Boxes xyxy in pixels: (..., 4 * 16), (..., 2), (...) -> (..., 4).

    Each side is the mean of its distribution, in strides from the anchor (GFL, equation 4).
    """
    bins = torch.arange(NUM_BINS, device=box_dist.device, dtype=torch.float32)
    probs = box_dist.float().unflatten(-1, (4, NUM_BINS)).softmax(-1)  # (..., 4, 16)
    distances = (probs * bins).sum(-1)  # (..., 4); a matmul would run in bf16 under autocast
    left_top, right_bottom = (distances * strides.unsqueeze(-1)).chunk(2, dim=-1)
    return torch.cat((anchors - left_top, anchors + right_bottom), dim=-1)


def decode(outputs: YOLOOutputs, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Scores (B, A, C) and boxes (B, A, 4), cxcywh normalized by the network input's (H, W)."""
    boxes = decode_distances(outputs.box_dist, outputs.anchors, outputs.strides)
    height, width = image_size
    boxes = scale_boxes(xyxy_to_cxcywh(boxes), 1 / height, 1 / width)
    return outputs.cls.float().sigmoid(), boxes


@torch.no_grad()
def postprocess(
    outputs: YOLOOutputs,
    image_size: tuple[int, int],
    score_threshold: float = 0.001,
    iou_threshold: float = 0.7,
    top_k: int = 300,
) -> list[dict[str, Tensor]]:
    """At most `top_k` boxes an image, best first, after per-class non-maximum suppression.

    The defaults suit the COCO metric, which wants the low scores too; for pictures raise
    `score_threshold`. An anchor may report several classes.

    Returns per image {"scores" (N,), "labels" (N,), "boxes" (N, 4)}: boxes are cxcywh normalized by
    the network input's (H, W) and cut to the image.
    """
    scores, boxes = decode(outputs, image_size)
    num_classes = scores.shape[-1]
    corners = cxcywh_to_xyxy(boxes).clamp(0, 1)  # (B, A, 4)
    flat_scores = scores.flatten(1)  # (B, A * C)
    num_candidates = min(NUM_NMS_CANDIDATES, flat_scores.shape[1])
    top_scores, top_pairs = flat_scores.topk(num_candidates, dim=1)  # (B, K)

    detections = []
    for image, (image_scores, pairs) in enumerate(zip(top_scores, top_pairs, strict=True)):
        above = image_scores > score_threshold
        image_scores, pairs = image_scores[above], pairs[above]
        labels = pairs % num_classes
        xyxy = corners[image, pairs // num_classes]
        keep = batched_nms(xyxy, image_scores, labels, iou_threshold)[:top_k]  # sorted by score
        detections.append(
            {
                "scores": image_scores[keep],
                "labels": labels[keep],
                "boxes": xyxy_to_cxcywh(xyxy[keep]),
            }
        )
    return detections
