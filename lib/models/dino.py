"""DINO with iBOT: a student ViT, the teacher that is its moving average, and their heads.

Caron et al. 2021 (DINO), Zhou et al. 2022 (iBOT), Oquab et al. 2024 (DINOv2). The backbone is any
timm vision transformer that pools by its class token; what is trained is timm's own module, so its
state dict is timm's as well.

Shapes: B images, C channels, h x w patches, D width of the backbone, K prototypes, M masked
patches. Crops of one resolution form a group, (crops x B, C, H, W) with the crop as the slow index.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention, PatchEmbed, VisionTransformer
from torch import Tensor, nn

from lib.errors import BadInput
from lib.params import Model


class Outputs(NamedTuple):
    """What a network says of its crops, N of them in the order of the groups."""

    features: Tensor
    """Class tokens after the last norm, (N, D): what probes and KoLeo see."""
    logits: Tensor
    """Cosines between projected class tokens and prototypes, (N, K)."""
    patch_logits: Tensor | None
    """The same of the masked patches of the first group, (M, K'), in the order of `masked`."""


def build(
    model: Model,
    image_size: int,
    *,
    num_prototypes: int = 65536,
    patch_head: Literal["none", "shared", "separate"] = "separate",
    num_patch_prototypes: int | None = None,
    hidden_dim: int = 2048,
    bottleneck_dim: int = 256,
    published_positions: bool = False,
    vit_args: Mapping[str, object] | None = None,
) -> "Dino":
    """Student and teacher, equal at first.

    image_size: side of a global crop, pixels; the positions are learnt for it.
    patch_head: the projection of masked patches (iBOT): none at all, the class token's, or one of
    its own with `num_patch_prototypes` (None: as many as the other has).
    published_positions: resample positions as the published DINO weights expect, see `positions`.
    vit_args: arguments of timm's VisionTransformer that replace those of the named model, such as
    {"patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}.

    Raises BadInput: an unknown name, no vision transformer with a class token, weights that cannot
    be fetched.
    """
    vit = _backbone(model, image_size, vit_args or {})
    head = Head(vit.embed_dim, num_prototypes, hidden_dim, bottleneck_dim)
    own_head = None
    if patch_head == "separate":
        num_prototypes = num_patch_prototypes or num_prototypes
        own_head = Head(vit.embed_dim, num_prototypes, hidden_dim, bottleneck_dim)
    return Dino(Network(vit, head, own_head, patch_head != "none", published_positions))


def _backbone(
    model: Model, image_size: int, vit_args: Mapping[str, object]
) -> VisionTransformer:
    import timm

    if not timm.is_model(model.name):
        raise BadInput(f"model.name: timm has no model {model.name!r}")
    try:
        vit = timm.create_model(
            model.name,
            pretrained=model.pretrained,
            num_classes=0,
            in_chans=model.in_chans,
            img_size=image_size,
            dynamic_img_size=True,
            drop_path_rate=model.drop_path_rate,
            **vit_args,
        )
    except (TypeError, AssertionError, OSError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(f"model: timm cannot build {model.name} for pretraining: {reason}") from None
    if (
        not isinstance(vit, VisionTransformer)
        or vit.global_pool != "token"
        or vit.pos_embed is None
        or type(vit.patch_embed) is not PatchEmbed
        or not isinstance(getattr(vit.blocks[-1], "attn", None), Attention)
    ):
        raise BadInput(
            f"model.name: {model.name} is no plain vision transformer with a class token and "
            "learnt positions, which pretraining needs; try vit_small_patch16_224"
        )
    return vit


class Head(nn.Module):
    """Three-layer MLP to a bottleneck, then cosines with K prototypes (DINO, appendix C).

    The last layer is weight-normalized without a magnitude: both sides have unit length.
    """

    def __init__(self, dim: int, num_prototypes: int, hidden_dim: int, bottleneck_dim: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        self.last_layer = nn.Linear(bottleneck_dim, num_prototypes, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, D) to cosines (N, K)."""
        # Lengths in fp32: in half precision 1e-6 and the squares of small values are lost.
        x = F.normalize(self.mlp(x).float(), dim=-1, eps=1e-6)
        prototypes = F.normalize(self.last_layer.weight.float(), dim=-1)
        return F.linear(x, prototypes)


class Network(nn.Module):
    """A timm ViT with projection heads: what the student is, and the teacher.

    To shard it with FSDP2: each of `backbone.blocks`, then the network (student and teacher each a
    root, `reshard_after_forward=True`, or the teacher stays gathered and cannot follow). Always
    call the network itself, never parts of it, or its weights are not gathered.
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        head: Head,
        patch_head: Head | None,
        masks: bool,
        published_positions: bool,
    ):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.patch_head = patch_head
        self.mask_token = nn.Parameter(torch.zeros(1, backbone.embed_dim)) if masks else None
        self.published_positions = published_positions

    def forward(
        self, groups: Sequence[Tensor], masked: Tensor | None = None, hide: bool = False
    ) -> Outputs:
        """One pass a group, (N, C, H, W) each, sides divisible by the patch.

        masked: (M,) int64, flat indices into the (N, h, w) patches of the first group: the patches
        to project. With `hide` the network sees its mask token in their place.
        """
        tokens = [self.tokens(images, masked if hide and i == 0 else None)
                  for i, images in enumerate(groups)]
        features = torch.cat([x[:, 0] for x in tokens])
        patch_logits = None
        if masked is not None:
            patches = tokens[0][:, self.backbone.num_prefix_tokens :].flatten(0, 1)
            head = self.head if self.patch_head is None else self.patch_head
            patch_logits = head(patches.index_select(0, masked))
        return Outputs(features, self.head(features), patch_logits)

    def tokens(self, images: Tensor, hidden: Tensor | None = None) -> Tensor:
        """All tokens after the last norm, (B, prefix + h x w, D): class token, registers, patches.

        hidden: flat indices into the (B, h, w) patches to replace by the mask token, before the
        positions are added (iBOT, section 3.2).
        """
        vit = self.backbone
        x = vit.patch_embed(images)
        B, h, w, D = x.shape
        if hidden is not None:
            mask_token = self.mask_token.to(x.dtype).expand(len(hidden), D)
            x = x.flatten(0, 2).index_copy(0, hidden, mask_token)
        prefix, grid = self.positions(h, w)
        x = torch.cat((prefix.expand(B, -1, -1), x.view(B, h * w, D) + grid), dim=1)
        x = vit.norm_pre(vit.pos_drop(x))
        return vit.norm(vit.blocks(x))

    def positions(self, h: int, w: int) -> tuple[Tensor, Tensor]:
        """Prefix tokens (1, prefix, D), their positions added, and patch positions (1, h x w, D).

        Off the size they were learnt for, patch positions are resampled by an antialiased bicubic
        filter, as timm does; `published_positions` does it as DINO's and DINOv2's published weights
        were made, without antialiasing and for a grid 0.1 patches larger (their guard against
        rounding). Features differ by 0.05 to 0.2 between the two.
        """
        vit = self.backbone
        prefix = torch.cat([t for t in (vit.cls_token, vit.reg_token) if t is not None], dim=1)
        num_embedded = 0 if vit.no_embed_class else vit.num_prefix_tokens
        if num_embedded:
            prefix = prefix + vit.pos_embed[:, :num_embedded]
        grid = vit.pos_embed[:, num_embedded:]
        learnt_h, learnt_w = vit.patch_embed.grid_size
        if (h, w) == (learnt_h, learnt_w):
            return prefix, grid
        grid = grid.float().unflatten(1, (learnt_h, learnt_w)).permute(0, 3, 1, 2)
        if self.published_positions:
            scale = (h + 0.1) / learnt_h, (w + 0.1) / learnt_w
            grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        else:
            grid = F.interpolate(grid, size=(h, w), mode="bicubic", antialias=True)
        return prefix, grid.flatten(2).transpose(1, 2)  # (1, D, h, w) to (1, h x w, D)


class Dino(nn.Module):
    """The student and the teacher that follows it: theta_t <- m theta_t + (1 - m) theta_s.

    The teacher never trains, drops nothing and sees the global crops only. The centers are the
    state of `dino_loss.losses` where it centers instead of running Sinkhorn-Knopp.
    """

    def __init__(self, student: Network):
        super().__init__()
        self.student = student
        self.teacher = copy.deepcopy(student).requires_grad_(False).eval()
        patch_head = student.head if student.patch_head is None else student.patch_head
        self.register_buffer("center", torch.zeros(student.head.last_layer.out_features))
        self.register_buffer("patch_center", torch.zeros(patch_head.last_layer.out_features))

    def train(self, mode: bool = True) -> "Dino":
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(
        self, groups: Sequence[Tensor], masked: Tensor | None = None
    ) -> tuple[Outputs, Outputs]:
        """The student's outputs of all groups and the teacher's of the first, the global crops.

        masked: see `Network.forward`; hidden from the student only.
        """
        with torch.no_grad():
            teacher = self.teacher(groups[:1], masked)
        return self.student(groups, masked, hide=True), teacher

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Move the teacher after an optimizer step; `momentum` is the old one's share."""
        teacher, student = (list(net.parameters()) for net in (self.teacher, self.student))
        torch._foreach_lerp_(teacher, student, 1 - momentum)


def freeze_last_layer(model: nn.Module) -> None:
    """Drop the gradient of the prototypes, between backward and clipping, in the first steps.

    DINO, appendix C: prototypes that stand still while the features are random make a stable start.
    Without a gradient an optimizer neither moves nor decays them.
    """
    for module in model.modules():
        if isinstance(module, Head):
            module.last_layer.weight.grad = None


def layer_shares(model: nn.Module, decay: float) -> dict[str, float]:
    """{name: share of the learning rate} of each trainable parameter, 1 at the top.

    Bao et al. 2022 (BEiT): block i of L gets decay^(L - i), patches, prefix tokens and positions
    decay^(L + 1), the last norm and all heads 1. `model` is or holds one trainable timm ViT; by the
    module that owns a parameter, never by its name.
    """
    vits = [m for m in model.modules() if isinstance(m, VisionTransformer)]
    layer: dict[int, int] = {}
    depth = 0
    for vit in vits:
        depth = len(vit.blocks)
        embedding = [vit.cls_token, vit.reg_token, vit.pos_embed]
        for module in (vit.patch_embed, vit.norm_pre):
            embedding += module.parameters()
        layer |= {id(p): 0 for p in embedding if p is not None}
        for i, block in enumerate(vit.blocks):
            layer |= {id(p): i + 1 for p in block.parameters()}
    layer |= {id(m.mask_token): 0 for m in model.modules() if isinstance(m, Network)}
    return {
        name: decay ** (depth + 1 - layer.get(id(p), depth + 1))
        for name, p in model.named_parameters()
        if p.requires_grad
    }


@torch.no_grad()
def attention_maps(model: nn.Module, images: Tensor) -> Tensor:
    """How the class token of the last block looks at the patches, a map a head: (B, heads, h, w).

    images: (B, C, H, W). Weights are the softmax over all tokens; those of the class token and the
    registers are left out, so that a map sums to less than 1. They are recomputed from q and k,
    caught while the network runs, so neither fused attention nor a wrapper hides them: `model` is a
    `Network` or whatever holds one (of several the first counts: give the teacher).
    """
    network = next(m for m in model.modules() if isinstance(m, Network))
    vit = network.backbone
    attention = vit.blocks[-1].attn
    maps: list[Tensor] = []

    def catch(module: nn.Module, inputs: object, qkv: Tensor) -> None:
        B, N, _ = qkv.shape
        q, k, _ = qkv.view(B, N, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        # Here, inside the block's own forward, sharded norms are gathered too.
        q, k = attention.q_norm(q[:, :, :1]), attention.k_norm(k)  # (B, heads, 1 or N, head_dim)
        weights = (attention.scale * q.float() @ k.float().transpose(-2, -1)).softmax(-1)
        maps.append(weights[:, :, 0, vit.num_prefix_tokens :])

    was_training = network.training
    handle = attention.qkv.register_forward_hook(catch)
    try:
        network.eval()([images])
    finally:
        handle.remove()
        network.train(was_training)
    patch_h, patch_w = vit.patch_embed.patch_size
    return maps[0].unflatten(2, (images.shape[2] // patch_h, images.shape[3] // patch_w))


def export(network: Network) -> dict[str, Tensor]:
    """The backbone as timm's state dict, on the CPU.

    Loads into `timm.create_model(name, num_classes=0, in_chans=C, img_size=image_size)`.
    """
    return {name: t.detach().cpu().clone() for name, t in network.backbone.state_dict().items()}
