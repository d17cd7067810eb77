import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from lib.errors import BadInput
from lib.models import dino
from lib.params import Model

torch.set_num_threads(1)

TINY = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}
REGISTERS = TINY | {"reg_tokens": 2, "no_embed_class": True, "init_values": 0.1, "pre_norm": True}
SIZE, CHANNELS = 32, 5  # 4 x 4 patches


def make(vit_args=TINY, model: dict | None = None, seed: int = 0, **options) -> dino.Dino:
    torch.manual_seed(seed)
    options = {"num_prototypes": 48, "hidden_dim": 64, "bottleneck_dim": 16} | options
    model = Model(**{"name": "vit_tiny_patch16_224", "in_chans": CHANNELS} | (model or {}))
    return dino.build(model, SIZE, vit_args=vit_args, **options)


def crops(num: int, size: int = SIZE, seed: int = 1) -> torch.Tensor:
    return torch.randn(num, CHANNELS, size, size, generator=torch.Generator().manual_seed(seed))


def timm_twin(network: dino.Network, vit_args) -> nn.Module:
    """timm's own network with the exported weights."""
    twin = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, in_chans=CHANNELS, img_size=SIZE,
        dynamic_img_size=True, **vit_args,
    )
    twin.load_state_dict(dino.export(network))
    return twin.eval()


@pytest.mark.parametrize("vit_args", [TINY, REGISTERS], ids=["plain", "registers"])
@pytest.mark.parametrize("size", [SIZE, 16, 48])
def test_the_exported_teacher_is_timms_network_at_every_size(vit_args, size):
    model = make(vit_args)
    for p in model.teacher.parameters():  # class token and registers start near 0: they would hide
        nn.init.normal_(p, std=0.3)
    images = crops(2, size)
    ours = model.teacher([images]).features
    torch.testing.assert_close(ours, timm_twin(model.teacher, vit_args)(images))


@pytest.mark.parametrize(
    "name, size, prefix",
    [("vit_small_patch8_224", 32, 1), ("vit_small_patch14_reg4_dinov2", 28, 5)],
)
def test_named_backbones_take_any_channels(name, size, prefix):
    model = dino.build(Model(name=name, in_chans=2), size, num_prototypes=8, hidden_dim=16,
                       bottleneck_dim=8, vit_args={"depth": 1})
    patch = model.student.backbone.patch_embed.patch_size[0]
    tokens = model.student.tokens(torch.randn(1, 2, size, size))
    assert tokens.shape == (1, prefix + (size // patch) ** 2, 384)


@pytest.mark.parametrize("name", ["vit_smal_patch16_224", "test_resnet", "test_vit2", "test_vit3"])
def test_what_is_no_vision_transformer_with_a_class_token_is_refused(name):
    with pytest.raises(BadInput, match="model"):
        dino.build(Model(name=name), 224, num_prototypes=8, hidden_dim=8)


def test_published_positions_are_the_published_formula():
    """interpolate_pos_encoding of the DINO repository: grid + 0.1, no antialiasing."""
    net, plain = make(published_positions=True).student, make().student
    learnt = net.backbone.pos_embed[:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    scale = (2 + 0.1) / math.sqrt(16), (6 + 0.1) / math.sqrt(16)
    expected = F.interpolate(learnt, scale_factor=scale, mode="bicubic")
    assert expected.shape[2:] == (2, 6)
    _, grid = net.positions(2, 6)
    torch.testing.assert_close(grid, expected.permute(0, 2, 3, 1).reshape(1, 12, 32))
    assert (grid - plain.positions(2, 6)[1]).abs().max() > 1e-3
    assert torch.equal(net.positions(4, 4)[1], net.backbone.pos_embed[:, 1:])


def test_the_head_gives_cosines():
    head = dino.Head(8, 10, 16, 4)
    x = torch.randn(5, 8)
    z, w = head.mlp(x), head.last_layer.weight
    torch.testing.assert_close(head(x), F.cosine_similarity(z[:, None], w[None], dim=-1))
    with torch.no_grad():
        before = head(x).clone()
        w *= torch.rand(10, 1) + 0.5  # lengths do not matter
        torch.testing.assert_close(head(x), before)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(head(x).float(), before, atol=0.02, rtol=0)


def test_groups_are_independent_and_in_order():
    model = make().eval()
    large, small = crops(4), crops(6, 16)
    together = model.student([large, small])
    apart = [model.student([x]) for x in (large, small)]
    torch.testing.assert_close(together.features, torch.cat([x.features for x in apart]))
    torch.testing.assert_close(together.logits, torch.cat([x.logits for x in apart]))
    assert together.logits.shape == (10, 48) and together.patch_logits is None


def test_masked_patches_are_replaced_and_nothing_of_them_is_seen():
    model = make().eval()
    nn.init.normal_(model.student.mask_token)
    images = crops(2)
    masked = torch.tensor([3, 5, 16 + 10])  # of 16 patches an image
    other = images.clone()
    other[0, :, 0:8, 24:32] += 5  # patch 3 of image 0
    other[0, :, 8:16, 8:16] -= 5  # patch 5
    other[1, :, 16:24, 16:24] *= 2  # patch 10 of image 1
    a, b = (model.student([x], masked, hide=True) for x in (images, other))
    torch.testing.assert_close(a.features, b.features)
    torch.testing.assert_close(a.patch_logits, b.patch_logits)
    seen = model.student([images], masked)  # not hidden
    assert (seen.features - a.features).abs().max() > 1e-3
    assert (seen.patch_logits - model.student([other], masked).patch_logits).abs().max() > 1e-3

    nn.init.normal_(model.student.mask_token)  # the token itself is what stands there
    changed = model.student([images], masked, hide=True)
    assert (changed.features - a.features).abs().max() > 1e-3


def test_patch_logits_are_those_of_the_named_patches():
    model = make(REGISTERS).eval()
    images, masked = crops(2), torch.tensor([1, 16 + 7])
    tokens = model.student.tokens(images)[:, 3:]  # class token, two registers
    expected = model.student.patch_head(torch.stack((tokens[0, 1], tokens[1, 7])))
    torch.testing.assert_close(model.student([images], masked).patch_logits, expected)


@pytest.mark.parametrize("patch_head", ["none", "shared", "separate"])
def test_every_student_parameter_gets_a_gradient_and_no_teacher_parameter(patch_head):
    model = make(patch_head=patch_head, num_patch_prototypes=24).train()
    masked = None if patch_head == "none" else torch.tensor([0, 4, 20])
    student, teacher = model([crops(4), crops(4, 16)], masked)
    widths = {"none": 48, "shared": 48, "separate": 24}
    assert model.patch_center.shape == (widths[patch_head],)
    loss = sum(x.square().sum() for x in student if x is not None)
    loss.backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())
    assert not any(x.requires_grad for x in teacher if x is not None)
    assert len(teacher.logits) == 4 and len(student.logits) == 8  # global crops only
    if masked is not None:
        assert student.patch_logits.shape == teacher.patch_logits.shape == (3, widths[patch_head])


def test_the_teacher_never_drops_paths_and_sees_through_masks():
    model = make(model={"drop_path_rate": 0.5}).train()
    assert model.student.training and not model.teacher.training
    masked = torch.tensor([0, 4])
    images = crops(4)
    (first, teacher), (second, again) = model([images], masked), model([images], masked)
    assert torch.equal(teacher.logits, again.logits)
    assert not torch.equal(first.logits, second.logits)
    torch.testing.assert_close(teacher.patch_logits, model.eval().student([images], masked)[2])


def test_the_teacher_follows_the_student():
    model = make()
    with torch.no_grad():
        for p in model.student.parameters():
            p += torch.randn_like(p)
    before = {n: p.clone() for n, p in model.teacher.named_parameters()}
    model.update_teacher(0.9)
    for name, p in model.student.named_parameters():
        expected = 0.9 * before[name] + 0.1 * p
        torch.testing.assert_close(model.teacher.get_parameter(name), expected)
    model.update_teacher(1.0)
    torch.testing.assert_close(model.teacher.get_parameter(name), expected)


def test_state_has_one_name_a_tensor():
    state = make(patch_head="shared").state_dict()
    assert len({t.data_ptr() for t in state.values()}) == len(state)


def test_freezing_leaves_the_prototypes_alone():
    model = make()
    heads = (model.student.head, model.student.patch_head)
    before = [h.last_layer.weight.clone() for h in heads]
    first = heads[0].mlp[0].weight.clone()
    optimizer = torch.optim.AdamW(model.student.parameters(), 0.1, weight_decay=0.5)
    student, _ = model([crops(2)], torch.tensor([1]))
    (student.logits.sum() + student.patch_logits.sum()).backward()
    dino.freeze_last_layer(model)
    optimizer.step()
    for head, weight in zip(heads, before, strict=True):
        assert torch.equal(head.last_layer.weight, weight)
    assert not torch.equal(heads[0].mlp[0].weight, first)


def test_layer_shares_rise_from_the_patches_to_the_heads():
    model = make(REGISTERS)
    shares = dino.layer_shares(model, 0.5)
    assert shares.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    by_depth = [
        {shares[f"student.{name}"] for name, _ in model.student.named_parameters()
         if name.startswith(prefixes)}
        for prefixes in (
            ("mask_token", "backbone.cls_token", "backbone.reg_token", "backbone.pos_embed",
             "backbone.patch_embed."),
            "backbone.blocks.0.", "backbone.blocks.1.", "backbone.blocks.2.",
            ("backbone.norm.", "head.", "patch_head."),
        )
    ]
    assert by_depth == [{0.5**4}, {0.5**3}, {0.5**2}, {0.5}, {1.0}]
    assert set(dino.layer_shares(model, 1.0).values()) == {1.0}
    vit = timm.create_model("test_vit", num_classes=3)  # for fine-tuning, too
    shares = dino.layer_shares(vit, 0.5)
    assert shares["head.weight"] == 1 and shares["cls_token"] == min(shares.values()) < 0.5


def eager_attention(vit, images):
    """The last block's attention, all of it, from the tokens that enter it."""
    entering = []
    handle = vit.blocks[-1].attn.register_forward_pre_hook(lambda m, args: entering.append(args[0]))
    vit.forward_features(images)
    handle.remove()
    attn, x = vit.blocks[-1].attn, entering[0]
    B, N, D = x.shape
    q, k, _ = F.linear(x, attn.qkv.weight, attn.qkv.bias).split(D, dim=-1)
    q, k = (t.reshape(B, N, 4, D // 4).transpose(1, 2) for t in (q, k))
    q, k = attn.q_norm(q), attn.k_norm(k)
    return (q @ k.transpose(-2, -1) / math.sqrt(D // 4)).softmax(-1)


@pytest.mark.parametrize(
    "vit_args", [TINY, REGISTERS | {"qk_norm": True}], ids=["plain", "registers and qk norm"]
)
@pytest.mark.parametrize("fused", [False, True])
def test_attention_maps_are_the_eager_softmax_of_the_class_token(vit_args, fused):
    model = make(vit_args, model={"drop_path_rate": 0.9}).train()
    for name, p in model.student.named_parameters():
        nn.init.normal_(p, std=5 if "q_norm" in name else 0.5)  # attention far from even
    for block in model.student.backbone.blocks:
        block.attn.fused_attn = fused
    images = crops(2)[..., :16]  # 4 x 2 patches
    prefix = model.student.backbone.num_prefix_tokens
    maps = dino.attention_maps(model.student, images)
    assert model.student.training and not model.student.backbone.blocks[-1].attn.qkv._forward_hooks
    expected = eager_attention(model.student.eval().backbone, images)[:, :, 0, prefix:]
    assert maps.shape == (2, 4, 4, 2)
    assert expected.std() > 0.01
    torch.testing.assert_close(maps, expected.reshape(2, 4, 4, 2))


def test_attention_maps_see_through_a_wrapper():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = make()
    images = crops(2)
    expected = dino.attention_maps(model.teacher, images)
    assert torch.equal(dino.attention_maps(Wrapper(model.teacher), images), expected)
