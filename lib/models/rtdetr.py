"""RT-DETR: a real-time detection transformer without non-maximum suppression.

Zhao et al. 2023, "DETRs Beat YOLOs on Real-time Object Detection" (arXiv 2304.08069).

    images -> backbone (timm ResNet-D, strides 8/16/32) -> hybrid encoder (AIFI + CCFM)
           -> query selection -> deformable decoder with iterative box refinement -> boxes

Shapes: B images, N tokens of all three levels, Q queries, D denoising queries, C channels,
K classes, M box slots an image, L decoder layers. Boxes are normalized cxcywh float32; between
layers they live in logit space, where a refinement is a plain addition.
"""

import math
import re
from dataclasses import dataclass, field
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.models.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh

PRIOR = 0.01  # probability every class starts with (Lin et al. 2017, focal loss, section 4.1)
BOX_EPS = 1e-5  # boxes stay this far from 0 and 1, so that their logits stay finite
LOGIT_LIMIT = math.log((1 - BOX_EPS) / BOX_EPS)  # about 11.5
NUM_LEVELS = 3


@dataclass(frozen=True)
class Config:
    """Sizes of one RT-DETR variant (paper, table 5 and appendix; official configuration files)."""

    backbone: str  # a timm ResNet name; the "d" stem and shortcuts are the paper's "vd" backbones
    backbone_args: dict = field(default_factory=dict)  # changes to it, for the tiny variant
    encoder_dim: int = 256  # channels of AIFI and CCFM
    encoder_ffn_dim: int = 1024
    csp_expansion: float = 1.0  # hidden width of a CCFM fusion block over encoder_dim
    num_csp_blocks: int = 3
    d_model: int = 256  # channels of the decoder
    decoder_ffn_dim: int = 1024
    num_heads: int = 8
    num_points: int = 4  # sampling points a head takes on each level
    num_decoder_layers: int = 6
    num_queries: int = 300
    num_denoising: int = 100  # denoising groups hold about this many boxes in all
    label_noise: float = 0.5  # twice the fraction of denoising labels replaced at random
    box_noise: float = 1.0  # a corner moves by up to this many half sizes of its box


VARIANTS = {
    "tiny": Config(
        "resnet18d",
        backbone_args={"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128), "stem_width": 8},
        encoder_dim=64,
        encoder_ffn_dim=128,
        csp_expansion=0.5,
        num_csp_blocks=1,
        d_model=64,
        decoder_ffn_dim=128,
        num_heads=4,
        num_decoder_layers=3,
        num_queries=30,
        num_denoising=20,
    ),
    "r18": Config("resnet18d", csp_expansion=0.5, num_decoder_layers=3),
    "r34": Config("resnet34d", csp_expansion=0.5, num_decoder_layers=4),
    "r50": Config("resnet50d"),
    "r101": Config("resnet101d", encoder_dim=384, encoder_ffn_dim=2048),
}


class Targets(NamedTuple):
    """Ground truth of a batch, padded. M is best the largest count in the batch; 0 is allowed."""

    boxes: Tensor  # (B, M, 4) normalized cxcywh, float32
    labels: Tensor  # (B, M) int64, -1 where there is no box


class Outputs(NamedTuple):
    """What a forward pass returns; index -1 of the first dimension is always the last layer.

    Training stacks the encoder's proposals and the L decoder layers (S = L + 1); evaluation keeps
    only the last layer (S = 1) and has no denoising.
    """

    logits: Tensor  # (S, B, Q, K)
    boxes: Tensor  # (S, B, Q, 4)
    dn_logits: Tensor | None = None  # (L, B, D, K), D = num_dn_groups x (M positive + M negative)
    dn_boxes: Tensor | None = None  # (L, B, D, 4)
    num_dn_groups: int = 0


class Detections(NamedTuple):
    """The best (query, class) pairs of each image, by falling score."""

    scores: Tensor  # (B, top_k) in (0, 1)
    labels: Tensor  # (B, top_k) int64
    boxes: Tensor  # (B, top_k, 4) normalized cxcywh


def build(
    variant: str,
    num_classes: int,
    *,
    num_queries: int | None = None,
    pretrained_backbone: bool = False,
    in_chans: int = 3,
) -> "RTDETR":
    """An RT-DETR of `VARIANTS[variant]`; `num_queries` replaces the variant's own if given."""
    config = VARIANTS[variant]
    backbone = _backbone(config, in_chans, pretrained_backbone)
    return RTDETR(config, backbone, num_classes, num_queries or config.num_queries)


class RTDETR(nn.Module):
    """The whole detector. Train it with `rtdetr_loss.losses`."""

    def __init__(self, config: Config, backbone: nn.Module, num_classes: int, num_queries: int):
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.norms_frozen = False
        self.backbone = backbone
        self.encoder = HybridEncoder(config, backbone.feature_info.channels())
        self.decoder = Decoder(config, num_classes, num_queries)

    def forward(
        self,
        images: Tensor,
        targets: Targets | None = None,
        generator: torch.Generator | None = None,
    ) -> Outputs:
        """Detect in `images` (B, in_chans, H, W), any H and W from 32 up.

        In training, `targets` add denoising queries, whose noise comes from `generator` alone:
        seed it from (seed, step) and the step is repeatable. It lives on the images' device.
        """
        features = self.encoder(self.backbone(images))
        return self.decoder(features, targets if self.training else None, generator)

    def freeze_stem_and_norms(self) -> None:
        """Fix the stem and every batch norm of the backbone, as published for R50 and R101.

        Only sensible with pretrained weights. A frozen norm is an ordinary one kept in eval mode
        without gradients: one fused op, and its name in the state dict stays.
        """
        self.norms_frozen = True
        self.backbone.conv1.requires_grad_(False)
        for module in self.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "RTDETR":
        super().train(mode)
        if self.norms_frozen:
            for module in self.backbone.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self


def postprocess(outputs: Outputs, top_k: int = 300) -> Detections:
    """The `top_k` best (query, class) pairs an image; no non-maximum suppression is needed."""
    logits, boxes = outputs.logits[-1], outputs.boxes[-1]
    num_classes = logits.shape[-1]
    scores = logits.float().sigmoid().flatten(1)  # (B, Q, K) -> (B, Q * K)
    scores, index = scores.topk(min(top_k, scores.shape[1]), dim=1)
    query = (index // num_classes).unsqueeze(-1).expand(-1, -1, 4)
    return Detections(scores, index % num_classes, boxes.gather(1, query))


# ------------------------------------------------------------------------------------- backbone


def _backbone(config: Config, in_chans: int, pretrained: bool) -> nn.Module:
    backbone = timm.create_model(
        config.backbone,
        pretrained=pretrained,
        features_only=True,
        out_indices=(2, 3, 4),
        in_chans=in_chans,
        **config.backbone_args,
    )
    # The published R18 and R34 project the very first shortcut too, where timm has an identity.
    # Starting from the identity kernel keeps a pretrained backbone's function.
    block = backbone.layer1[0]
    if block.downsample is None:
        width = block.conv1.in_channels
        conv = nn.Conv2d(width, width, kernel_size=1, bias=False)
        nn.init.dirac_(conv.weight)
        block.downsample = nn.Sequential(nn.Identity(), conv, nn.BatchNorm2d(width))
    return backbone


# ------------------------------------------------------------------------------- hybrid encoder


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, and SiLU unless told otherwise."""

    def __init__(self, in_dim: int, out_dim: int, kernel_size: int, stride: int = 1, act=True):
        super().__init__()
        padding = (kernel_size - 1) // 2
        self.conv = nn.Conv2d(in_dim, out_dim, kernel_size, stride, padding, bias=False)
        self.norm = nn.BatchNorm2d(out_dim)
        self.act = nn.SiLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class RepVGGBlock(nn.Module):
    """A 3x3 and a 1x1 convolution side by side (Ding et al. 2021)."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv1 = ConvNorm(dim, dim, 3, act=False)
        self.conv2 = ConvNorm(dim, dim, 1, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.conv1(x) + self.conv2(x))


class FusionBlock(nn.Module):
    """CCFM's fusion of two levels, a cross-stage partial block (paper, figure 4)."""

    def __init__(self, config: Config):
        super().__init__()
        dim = config.encoder_dim
        hidden = int(dim * config.csp_expansion)
        self.conv1 = ConvNorm(2 * dim, hidden, 1)
        self.conv2 = ConvNorm(2 * dim, hidden, 1)
        blocks = (RepVGGBlock(hidden) for _ in range(config.num_csp_blocks))
        self.bottlenecks = nn.Sequential(*blocks)
        self.conv3 = ConvNorm(hidden, dim, 1) if hidden != dim else nn.Identity()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        x = torch.cat((a, b), dim=1)  # 2 x (B, C, H, W) -> (B, 2C, H, W)
        return self.conv3(self.bottlenecks(self.conv1(x)) + self.conv2(x))


class SelfAttention(nn.Module):
    """Multi-head self-attention; positions are added to queries and keys, not to values."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qk_proj = nn.Linear(dim, 2 * dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)
        bound = math.sqrt(6 / (4 * dim))  # as nn.MultiheadAttention's one (3C, C) projection
        for projection in (self.qk_proj, self.v_proj):
            nn.init.uniform_(projection.weight, -bound, bound)
            nn.init.zeros_(projection.bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, position: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, T, C), position broadcastable to it, mask (T, T) true where row may see column."""
        heads = (self.num_heads, -1)
        q, k = self.qk_proj(x + position).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, heads).transpose(1, 2) for t in (q, k, self.v_proj(x)))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, heads, T, C / heads)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class AIFI(nn.Module):
    """Attention-based intra-scale feature interaction: one post-norm layer on the top level."""

    def __init__(self, config: Config):
        super().__init__()
        dim = config.encoder_dim
        self.self_attn = SelfAttention(dim, config.num_heads)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, config.encoder_ffn_dim)
        self.linear2 = nn.Linear(config.encoder_ffn_dim, dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, feature: Tensor) -> Tensor:
        height, width = feature.shape[-2:]
        x = feature.flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, HW, C)
        position = sincos_position(height, width, x.shape[-1], x.device)
        x = self.norm1(x + self.self_attn(x, position))
        x = self.norm2(x + self.linear2(F.gelu(self.linear1(x))))
        return x.transpose(1, 2).unflatten(2, (height, width))


def sincos_position(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    """(H * W, dim) sines and cosines of the row, then of the column; row-major order."""
    frequency = 10_000 ** -(torch.arange(dim // 4, device=device) / (dim // 4))
    row = torch.arange(height, device=device)[:, None] * frequency  # (H, dim / 4)
    column = torch.arange(width, device=device)[:, None] * frequency  # (W, dim / 4)
    row = torch.cat((row.sin(), row.cos()), dim=1)[:, None].expand(-1, width, -1)
    column = torch.cat((column.sin(), column.cos()), dim=1)[None].expand(height, -1, -1)
    return torch.cat((row, column), dim=2).flatten(0, 1)  # (H, W, dim) -> (HW, dim)


class HybridEncoder(nn.Module):
    """AIFI on the top level, then CCFM: a top-down and a bottom-up path (paper, section 4.2)."""

    def __init__(self, config: Config, in_dims: list[int]):
        super().__init__()
        dim = config.encoder_dim
        steps = range(NUM_LEVELS - 1)
        self.input_proj = nn.ModuleList(_projection(in_dim, dim) for in_dim in in_dims)
        self.aifi = AIFI(config)
        self.lateral_convs = nn.ModuleList(ConvNorm(dim, dim, 1) for _ in steps)
        self.fpn_blocks = nn.ModuleList(FusionBlock(config) for _ in steps)
        self.downsample_convs = nn.ModuleList(ConvNorm(dim, dim, 3, stride=2) for _ in steps)
        self.pan_blocks = nn.ModuleList(FusionBlock(config) for _ in steps)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Three (B, C_i, H_i, W_i), finest first, to three (B, encoder_dim, H_i, W_i)."""
        low, middle, high = (proj(x) for proj, x in zip(self.input_proj, features, strict=True))

        # Top down. The target's size, not a factor of 2: odd sizes such as 1080 / 8 = 135 fit.
        top = self.lateral_convs[0](self.aifi(high))
        middle = self.fpn_blocks[0](F.interpolate(top, size=middle.shape[-2:]), middle)
        middle = self.lateral_convs[1](middle)
        low = self.fpn_blocks[1](F.interpolate(middle, size=low.shape[-2:]), low)

        # Bottom up.
        middle = self.pan_blocks[0](self.downsample_convs[0](low), middle)
        top = self.pan_blocks[1](self.downsample_convs[1](middle), top)
        return [low, middle, top]


def _projection(in_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_dim, out_dim, 1, bias=False), nn.BatchNorm2d(out_dim))


# -------------------------------------------------------------------------------------- decoder


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int):
        super().__init__()
        dims = [in_dim] + [hidden_dim] * (num_layers - 1) + [out_dim]
        self.layers = nn.ModuleList(map(nn.Linear, dims[:-1], dims[1:]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (Zhu et al. 2021, equation 3) around a reference box.

    Values come projected: `Decoder` does it for all layers in one product.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.num_heads = config.num_heads
        self.num_points = config.num_points
        num_samples = config.num_heads * NUM_LEVELS * config.num_points
        self.sampling_offsets = nn.Linear(config.d_model, 2 * num_samples)
        self.attention_weights = nn.Linear(config.d_model, num_samples)
        self.output_proj = nn.Linear(config.d_model, config.d_model)

        # Each head starts looking along its own direction, point p at p + 1 steps.
        angle = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        direction = torch.stack((angle.cos(), angle.sin()), dim=-1)
        direction = direction / direction.abs().amax(-1, keepdim=True)  # onto the unit square
        steps = torch.arange(1, self.num_points + 1)[:, None]
        offsets = (direction[:, None, None] * steps).expand(-1, NUM_LEVELS, -1, -1)
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias.data = offsets.flatten().clone()
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        nn.init.xavier_uniform_(self.output_proj.weight)
        nn.init.zeros_(self.output_proj.bias)

    def forward(self, x: Tensor, reference: Tensor, values: list[Tensor]) -> Tensor:
        """x (B, Q, C), reference boxes (B, Q, 4), a (B * heads, C / heads, H, W) for each level."""
        B, Q, _ = x.shape
        samples = (self.num_heads, NUM_LEVELS, self.num_points)
        offsets = self.sampling_offsets(x).unflatten(-1, (*samples, 2))
        weights = self.attention_weights(x).unflatten(-1, (self.num_heads, -1)).softmax(-1)

        # Points = center + offset / num_points * size / 2, then [0, 1] -> grid_sample's [-1, 1].
        reference = reference[:, :, None, None, None]  # (B, Q, 1, 1, 1, 4)
        center, step = 2 * reference[..., :2] - 1, reference[..., 2:] / self.num_points
        grid = torch.addcmul(center, offsets, step)  # (B, Q, heads, levels, points, 2)
        grid = grid.permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (levels, B * heads, Q, points, 2)

        sampled = [
            F.grid_sample(value, points, align_corners=False)
            for value, points in zip(values, grid.unbind(0), strict=True)
        ]
        sampled = torch.cat(sampled, dim=-1)  # (B * heads, C / heads, Q, levels * points)
        weights = weights.transpose(1, 2).flatten(0, 1).unsqueeze(1)
        out = (sampled * weights).sum(-1)  # (B * heads, C / heads, Q)
        return self.output_proj(out.view(B, -1, Q).transpose(1, 2))


class DecoderLayer(nn.Module):
    """Self-attention of queries, deformable attention to the image, feed-forward; post-norm."""

    def __init__(self, config: Config):
        super().__init__()
        dim = config.d_model
        self.self_attn = SelfAttention(dim, config.num_heads)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn = DeformableAttention(config)
        self.norm2 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, config.decoder_ffn_dim)
        self.linear2 = nn.Linear(config.decoder_ffn_dim, dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x, position, reference, values, mask):
        x = self.norm1(x + self.self_attn(x, position, mask))
        x = self.norm2(x + self.cross_attn(x + position, reference, values))
        return self.norm3(x + self.linear2(F.relu(self.linear1(x))))


class Decoder(nn.Module):
    """Query selection, denoising queries, and L layers that refine boxes step by step."""

    def __init__(self, config: Config, num_classes: int, num_queries: int):
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.num_queries = num_queries
        dim, layers = config.d_model, range(config.num_decoder_layers)

        self.input_proj = nn.ModuleList(
            _projection(config.encoder_dim, dim) for _ in range(NUM_LEVELS)
        )
        self.enc_output = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim))
        self.enc_score_head = nn.Linear(dim, num_classes)
        self.enc_bbox_head = MLP(dim, dim, 4, num_layers=3)
        # The class after the last stands for "no box" in padded slots: a zero, untrained row.
        self.denoising_class_embed = nn.Embedding(num_classes + 1, dim, padding_idx=num_classes)

        self.query_pos_head = MLP(4, 2 * dim, dim, num_layers=2)
        self.value_proj = nn.Linear(dim, len(layers) * dim)  # of every layer, in one product
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in layers)
        self.dec_score_head = nn.ModuleList(nn.Linear(dim, num_classes) for _ in layers)
        self.dec_bbox_head = nn.ModuleList(MLP(dim, dim, 4, num_layers=3) for _ in layers)

        for linear in (self.enc_output[0], *self.query_pos_head.layers):
            nn.init.xavier_uniform_(linear.weight)
        for weight in self.value_proj.weight.chunk(len(layers)):
            nn.init.xavier_uniform_(weight)
        nn.init.zeros_(self.value_proj.bias)
        for head in (self.enc_score_head, *self.dec_score_head):
            nn.init.constant_(head.bias, -math.log((1 - PRIOR) / PRIOR))
        for head in (self.enc_bbox_head, *self.dec_bbox_head):  # boxes start unrefined
            nn.init.zeros_(head.layers[-1].weight)
            nn.init.zeros_(head.layers[-1].bias)

    def forward(
        self,
        features: list[Tensor],
        targets: Targets | None,
        generator: torch.Generator | None,
    ) -> Outputs:
        """Three (B, encoder_dim, H_i, W_i) to outputs; `targets` bring denoising queries."""
        features = [proj(x) for proj, x in zip(self.input_proj, features, strict=True)]
        sizes = [(x.shape[-2], x.shape[-1]) for x in features]
        memory = torch.cat([x.flatten(2) for x in features], dim=2).transpose(1, 2).contiguous()
        queries, enc_logits, enc_box_logits = self.select_queries(memory, sizes)  # memory (B, N, C)

        # Neither contents nor positions of queries carry a gradient into the selection.
        queries = queries.detach()
        box_logits = enc_box_logits.detach().clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
        mask, num_dn_queries, num_groups = None, 0, 0
        if targets is not None:
            targets = at_least_one_slot(targets)
            noisy_labels, noisy_boxes, num_groups = self.add_noise(targets, generator)
            queries = torch.cat((self.denoising_class_embed(noisy_labels), queries), dim=1)
            box_logits = torch.cat((noisy_boxes.logit(BOX_EPS), box_logits), dim=1)
            num_dn_queries = noisy_labels.shape[1]
            mask = denoising_mask(num_dn_queries, num_groups, queries.shape[1], memory.device)

        all_logits, all_box_logits = [], []
        layer_values = self.project_values(memory, sizes)
        for i, (layer, values) in enumerate(zip(self.layers, layer_values, strict=True)):
            reference = box_logits.detach().sigmoid()
            queries = layer(queries, self.query_pos_head(reference), reference, values, mask)
            delta = self.dec_bbox_head[i](queries)
            if self.training or i == len(self.layers) - 1:
                all_logits.append(self.dec_score_head[i](queries))
                # Look forward twice (Zhang et al. 2023, DINO, section 3.5): this layer's loss also
                # reaches the layer before, whose undetached refinement `box_logits` is.
                all_box_logits.append(delta + box_logits)
            box_logits = (delta + box_logits.detach()).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)

        logits, boxes = torch.stack(all_logits), torch.stack(all_box_logits).sigmoid()
        if not self.training:
            return Outputs(logits, boxes)
        dn_logits, logits = logits.split((num_dn_queries, logits.shape[2] - num_dn_queries), dim=2)
        dn_boxes, boxes = boxes.split((num_dn_queries, boxes.shape[2] - num_dn_queries), dim=2)
        logits = torch.cat((enc_logits[None], logits))
        boxes = torch.cat((enc_box_logits.sigmoid()[None], boxes))
        if targets is None:
            return Outputs(logits, boxes)
        return Outputs(logits, boxes, dn_logits, dn_boxes, num_groups)

    def select_queries(self, memory: Tensor, sizes: list[tuple[int, int]]) -> tuple[Tensor, ...]:
        """The Q tokens with the surest class (paper, section 4.3): contents, logits, box logits.

        memory (B, N, C) -> (B, Q, C), (B, Q, K), (B, Q, 4). Scoring all N tokens needs no gradient;
        the few chosen are run again with one, which gives the same gradient for less work.
        """
        anchors, valid = anchor_logits(sizes, memory.device)  # (N, 4), (N, 1)
        memory = memory * valid
        with torch.no_grad():
            scores = self.enc_score_head(self.enc_output(memory)).amax(-1)  # (B, N)
            chosen = scores.topk(min(self.num_queries, scores.shape[1]), dim=1).indices
        rows = chosen.unsqueeze(-1).expand(-1, -1, memory.shape[-1])
        queries = self.enc_output(memory.gather(1, rows))
        box_logits = self.enc_bbox_head(queries) + anchors[chosen]
        return queries, self.enc_score_head(queries), box_logits

    def project_values(self, memory: Tensor, sizes: list[tuple[int, int]]) -> list[list[Tensor]]:
        """memory (B, N, C) to [layer][level] of (B * heads, C / heads, H, W)."""
        num_layers, num_heads = len(self.layers), self.config.num_heads
        values = self.value_proj(memory).unflatten(-1, (num_layers, num_heads, -1))
        values = values.permute(2, 0, 3, 4, 1).flatten(1, 2).contiguous()
        levels = values.split([height * width for height, width in sizes], dim=-1)
        levels = [level.unflatten(-1, size) for level, size in zip(levels, sizes, strict=True)]
        return list(zip(*(level.unbind(0) for level in levels), strict=True))

    def add_noise(
        self, targets: Targets, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, int]:
        """Contrastive denoising (Zhang et al. 2023, DINO, section 3.3): what the queries start as.

        Each group repeats all M slots twice: positives, whose corners move by less than half a
        box, and negatives, by half to a whole one. Returns labels (B, D), where K means no box,
        boxes (B, D, 4) cxcywh, and the number of groups; D = groups x (M positives + M negatives).
        """
        B, M = targets.labels.shape
        num_groups = max(1, self.config.num_denoising // M)
        noise = draw_noise((B, num_groups, 2, M), targets.boxes.device, generator)
        change, new_label, sign, distance = noise.split((1, 1, 4, 4), dim=-1)

        exists = (targets.labels >= 0)[:, None, None]  # (B, 1, 1, M)
        labels = targets.labels[:, None, None].where(exists, self.num_classes)
        new_label = (new_label[..., 0] * self.num_classes).long()
        changed = exists & (change[..., 0] < self.config.label_noise / 2)
        labels = torch.where(changed, new_label, labels)  # (B, groups, 2, M)

        boxes = targets.boxes[:, None, None]  # (B, 1, 1, M, 4)
        half_size = 0.5 * self.config.box_noise * boxes[..., 2:].repeat(1, 1, 1, 1, 2)
        is_negative = torch.arange(2, device=boxes.device).view(2, 1, 1)
        distance = (distance + is_negative) * torch.where(sign < 0.5, -1.0, 1.0)
        corners = (cxcywh_to_xyxy(boxes) + distance * half_size).clamp(0, 1)
        return labels.flatten(1), xyxy_to_cxcywh(corners).flatten(1, 3), num_groups


def draw_noise(
    size: tuple[int, ...], device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """(*size, 10) uniform in [0, 1): change the label?, to which, 4 signs, 4 distances."""
    return torch.rand(*size, 10, device=device, generator=generator)


def denoising_mask(num_dn: int, num_groups: int, num_all: int, device: torch.device) -> Tensor:
    """(num_all, num_all), true where the row's query may see the column's.

    All see the ordinary queries; a denoising query besides sees its own group. So no ordinary query
    can read the answer.
    """
    group = (torch.arange(num_all, device=device) // (num_dn // num_groups)).clamp(max=num_groups)
    return (group[:, None] == group) | (group == num_groups)


def at_least_one_slot(targets: Targets) -> Targets:
    """Targets with M >= 1. In a batch without boxes the denoising embedding still takes part, so
    that every process of a distributed run has a gradient for every parameter."""
    if targets.labels.shape[1] > 0:
        return targets
    boxes, labels = targets
    return Targets(F.pad(boxes, (0, 0, 0, 1)), F.pad(labels, (0, 1), value=-1))


def anchor_logits(sizes: list[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """One square anchor a token, 0.05 of the image at the finest level and doubling: logits (N, 4).

    Also (N, 1), 1 where the anchor lies within (0.01, 0.99). The others get infinite logits: a box
    at the corner, which a query may take but not move.
    """
    anchors = []
    for level, (height, width) in enumerate(sizes):
        y = (torch.arange(height, device=device) + 0.5) / height
        x = (torch.arange(width, device=device) + 0.5) / width
        side = torch.full((height, width), 0.05 * 2**level, device=device)
        center_x, center_y = x.expand(height, -1), y[:, None].expand(-1, width)
        anchors.append(torch.stack((center_x, center_y, side, side), dim=-1).flatten(0, 1))
    anchors = torch.cat(anchors)
    valid = ((anchors > 0.01) & (anchors < 0.99)).all(-1, keepdim=True)
    return anchors.logit().where(valid, torch.inf), valid.float()


# ------------------------------------------------------------------------ published checkpoints


def own_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an official or a Hugging Face file under this file's names; ours as they are.
    """
    if any(name.startswith("model.decoder") for name in state):
        return from_official(from_hugging_face(state))
    if any(name.startswith("decoder.decoder.") for name in state):
        return from_official(state)
    return state


# Hugging Face's names to the official ones. Its files keep older names than its modules have in
# memory (fc1 for mlp.fc1, out_proj for o_proj, encoder.encoder for encoder.aifi): both are read.
_HUGGING_FACE_NAMES = [
    (r"^model\.backbone\.model\.embedder\.embedder\.0\.", "backbone.conv1.conv1_1."),
    (r"^model\.backbone\.model\.embedder\.embedder\.1\.", "backbone.conv1.conv1_2."),
    (r"^model\.backbone\.model\.embedder\.embedder\.2\.", "backbone.conv1.conv1_3."),
    (r"^model\.backbone\.model\.encoder\.stages\.", "backbone.res_layers."),
    (r"^(backbone\.res_layers\.\d+)\.layers\.", r"\1.blocks."),
    (r"\.layer\.0\.(convolution|normalization)\.", r".branch2a.\1."),
    (r"\.layer\.1\.(convolution|normalization)\.", r".branch2b.\1."),
    (r"\.layer\.2\.(convolution|normalization)\.", r".branch2c.\1."),
    (r"\.shortcut\.1\.", ".short.conv."),
    (r"\.shortcut\.", ".short."),
    (r"\.convolution\.", ".conv."),
    (r"\.normalization\.", ".norm."),
    (r"^model\.encoder_input_proj\.", "encoder.input_proj."),
    (r"^model\.encoder\.(?:aifi|encoder)\.", "encoder.encoder."),
    (r"^model\.encoder\.", "encoder."),
    (r"^model\.decoder_input_proj\.(\d+)\.0\.", r"decoder.input_proj.\1.conv."),
    (r"^model\.decoder_input_proj\.(\d+)\.1\.", r"decoder.input_proj.\1.norm."),
    (r"^(?:model\.decoder\.)?class_embed\.", "decoder.dec_score_head."),
    (r"^(?:model\.decoder\.)?bbox_embed\.", "decoder.dec_bbox_head."),
    (r"^model\.decoder\.query_pos_head\.", "decoder.query_pos_head."),
    (r"^model\.decoder\.layers\.", "decoder.decoder.layers."),
    (r"^model\.(enc_|denoising_class_embed)", r"decoder.\1"),
    (r"^(decoder\.decoder\.layers\.\d+)\.encoder_attn_layer_norm\.", r"\1.norm2."),
    (r"^(decoder\.decoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm3."),
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"\.final_layer_norm\.", ".norm2."),
    (r"\.encoder_attn\.", ".cross_attn."),
    (r"\.(?:mlp\.)?fc([12])\.", r".linear\1."),
    (r"\.self_attn\.o_proj\.", ".self_attn.out_proj."),
]

# The official names to ours; the backbone's are timm's.
_OFFICIAL_NAMES = [
    (r"^backbone\.conv1\.conv1_1\.conv\.", "backbone.conv1.0."),
    (r"^backbone\.conv1\.conv1_1\.norm\.", "backbone.conv1.1."),
    (r"^backbone\.conv1\.conv1_2\.conv\.", "backbone.conv1.3."),
    (r"^backbone\.conv1\.conv1_2\.norm\.", "backbone.conv1.4."),
    (r"^backbone\.conv1\.conv1_3\.conv\.", "backbone.conv1.6."),
    (r"^backbone\.conv1\.conv1_3\.norm\.", "backbone.bn1."),
    (r"^backbone\.res_layers\.0\.blocks\.", "backbone.layer1."),
    (r"^backbone\.res_layers\.1\.blocks\.", "backbone.layer2."),
    (r"^backbone\.res_layers\.2\.blocks\.", "backbone.layer3."),
    (r"^backbone\.res_layers\.3\.blocks\.", "backbone.layer4."),
    (r"\.branch2a\.conv\.", ".conv1."),
    (r"\.branch2a\.norm\.", ".bn1."),
    (r"\.branch2b\.conv\.", ".conv2."),
    (r"\.branch2b\.norm\.", ".bn2."),
    (r"\.branch2c\.conv\.", ".conv3."),
    (r"\.branch2c\.norm\.", ".bn3."),
    (r"\.short(?:\.conv)?\.norm\.", ".downsample.2."),
    (r"\.short(?:\.conv)?\.conv\.", ".downsample.1."),
    (r"^encoder\.encoder\.0\.layers\.0\.", "encoder.aifi."),
    (r"^decoder\.input_proj\.(\d+)\.conv\.", r"decoder.input_proj.\1.0."),
    (r"^decoder\.input_proj\.(\d+)\.norm\.", r"decoder.input_proj.\1.1."),
    (r"^decoder\.decoder\.", "decoder."),
]


def from_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Hugging Face RT-DETR state dict, on disk or in memory, under the official names."""
    state = _rename(state, _HUGGING_FACE_NAMES)
    for name in [name for name in state if ".self_attn.q_proj." in name]:
        parts = [state.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        state[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return state


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An official RT-DETR state dict under this file's names."""
    state = _rename(state, _OFFICIAL_NAMES)
    for name in [name for name in state if ".self_attn.in_proj_" in name]:
        q, k, v = state.pop(name).chunk(3)
        state[name.replace("in_proj_", "qk_proj.")] = torch.cat((q, k))
        state[name.replace("in_proj_", "v_proj.")] = v
    for kind in ("weight", "bias"):  # one product for the values of all layers
        name = f"decoder.layers.{{}}.cross_attn.value_proj.{kind}"
        num_layers = sum(".cross_attn.value_proj." + kind in name for name in state)
        values = [state.pop(name.format(i)) for i in range(num_layers)]
        if values:
            state[f"decoder.value_proj.{kind}"] = torch.cat(values)
    return state


def _rename(state: dict[str, Tensor], rules: list[tuple[str, str]]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed
