"""RT-DETR against Hugging Face's, built from a small configuration with random weights."""

import pytest
import torch
from torch import Tensor

from lib.models import rtdetr, rtdetr_loss, weights

transformers = pytest.importorskip("transformers")

NUM_CLASSES, NUM_QUERIES = 7, 20


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def make_pair(block: str, num_layers: int, freeze: bool = False):
    """(Hugging Face's model, ours with its weights), every weight random, so that none hides."""
    expansion = 4 if block == "bottleneck" else 1
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=16,
        hidden_sizes=[8 * expansion * 2**i for i in range(1, 5)],
        depths=[1, 2, 1, 1],
        layer_type=block,
        out_indices=[2, 3, 4],
    )
    hf_config = transformers.RTDetrConfig(
        backbone_config=backbone,
        freeze_backbone_batch_norms=freeze,
        encoder_in_channels=backbone.hidden_sizes[1:],
        encoder_hidden_dim=48,
        encoder_ffn_dim=64,
        encoder_attention_heads=4,
        hidden_expansion=0.5 if block == "basic" else 1.0,
        d_model=32,
        decoder_in_channels=[48, 48, 48],
        decoder_ffn_dim=64,
        decoder_attention_heads=4,
        decoder_layers=num_layers,
        num_queries=NUM_QUERIES,
        num_denoising=12,
        num_labels=NUM_CLASSES,
    )
    config = rtdetr.Config(
        "resnet50d" if block == "bottleneck" else "resnet18d",
        backbone_args={"layers": (1, 2, 1, 1), "channels": (16, 32, 64, 128), "stem_width": 8},
        encoder_dim=48,
        encoder_ffn_dim=64,
        csp_expansion=hf_config.hidden_expansion,
        d_model=32,
        decoder_ffn_dim=64,
        num_heads=4,
        num_decoder_layers=num_layers,
        num_queries=NUM_QUERIES,
        num_denoising=12,
    )
    rtdetr.VARIANTS["parity"] = config
    ours = rtdetr.build("parity", NUM_CLASSES)
    del rtdetr.VARIANTS["parity"]

    theirs = transformers.RTDetrForObjectDetection(hf_config)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in theirs.state_dict().items():
        if "running_var" in name or ("norm" in name and name.endswith("weight")):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        elif tensor.is_floating_point():
            # Convolutions gain a little, so that places still differ at the top of the network.
            gain = 3 if tensor.dim() == 4 else 1
            scale = (gain / tensor[0].numel()) ** 0.5 if tensor.dim() > 1 else 0.1
            tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))
    theirs.model.denoising_class_embed.weight.data[-1] = 0  # the padding row
    report = weights.fill(ours, rtdetr.own_names(theirs.state_dict()))
    assert report.share == 1 and not report.unused, report
    if freeze:
        ours.freeze_stem_and_norms()
    return theirs, ours


def batch(height: int, width: int, counts: list[int]) -> tuple[Tensor, rtdetr.Targets, list[dict]]:
    """Images, our targets, Hugging Face's labels: `counts` boxes an image."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(len(counts), 3, height // 16, width // 16, generator=generator)
    images = images.repeat_interleave(16, dim=2).repeat_interleave(16, dim=3)  # coarse contrasts
    center = 0.25 + 0.5 * torch.rand(len(counts), max(counts), 2, generator=generator)
    size = 0.05 + 0.4 * torch.rand(len(counts), max(counts), 2, generator=generator)
    boxes = torch.cat((center, size), dim=-1)
    labels = torch.randint(NUM_CLASSES, boxes.shape[:2], generator=generator)
    for i, count in enumerate(counts):
        boxes[i, count:], labels[i, count:] = 0, -1
    theirs = [
        {"boxes": boxes[i, :count], "class_labels": labels[i, :count]}
        for i, count in enumerate(counts)
    ]
    return images, rtdetr.Targets(boxes, labels), theirs


def step_both(theirs, ours, images, targets, labels, monkeypatch):
    """A training forward of both with the same denoising noise: (their output, ours, our terms)."""
    draws = []

    def recorded(function):
        def draw(*args, **kwargs):
            draws.append(function(*args, **kwargs))
            return draws[-1].clone()  # theirs is changed in place afterwards

        return draw

    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand_like", recorded(torch.rand_like))
        patch.setattr(torch, "randint_like", recorded(torch.randint_like))
        their_output = theirs(pixel_values=images, labels=labels)
    change, new_label, sign, distance = draws

    def replayed(size, device, generator):
        uniform_label = (new_label[..., None].float() + 0.5) / NUM_CLASSES
        uniform_sign = torch.where(sign == 1, 0.75, 0.25)
        noise = torch.cat((change[..., None], uniform_label, uniform_sign, distance), dim=-1)
        return noise.view(*size, 10)

    with monkeypatch.context() as patch:
        patch.setattr(rtdetr, "draw_noise", replayed)
        our_output = ours(images, targets)
    return their_output, our_output, rtdetr_loss.losses(our_output, targets)


def same_order(ours: Tensor, theirs: Tensor) -> Tensor:
    """(B, Q): where each of their encoder queries (B, Q, C) is among ours; near-ties may swap."""
    index = torch.cdist(theirs, ours).argmin(-1)
    everyone = torch.arange(ours.shape[1]).expand_as(index)
    assert torch.equal(index.sort(-1).values, everyone), "another set of queries was selected"
    return index


def reorder(x: Tensor, index: Tensor) -> Tensor:
    """(S, B, Q, C) by the (B, Q) order."""
    return x.gather(2, index[None, :, :, None].expand(x.shape[0], -1, -1, x.shape[-1]))


@pytest.mark.parametrize("block, freeze", [("basic", False), ("bottleneck", True)])
@pytest.mark.parametrize("size", [(64, 64), (96, 160), (32, 416)])  # 416: invalid anchors
def test_eval_outputs_agree(block, freeze, size):
    theirs, ours = make_pair(block, num_layers=3, freeze=freeze)
    images, *_ = batch(*size, [1, 1])
    with torch.no_grad():
        expected, outputs = theirs.eval()(images), ours.eval()(images)
    both = torch.cat((outputs.logits[-1], outputs.boxes[-1]), dim=-1)
    their_both = torch.cat((expected.logits, expected.pred_boxes), dim=-1)
    index = same_order(both, their_both)
    torch.testing.assert_close(reorder(both[None], index)[0], their_both, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("block, freeze", [("basic", False), ("bottleneck", True)])
@pytest.mark.parametrize("counts", [[3, 1], [4, 0]])
def test_training_outputs_and_every_loss_term_agree(block, freeze, counts, monkeypatch):
    theirs, ours = make_pair(block, num_layers=3, freeze=freeze)
    images, targets, labels = batch(96, 160, counts)
    expected, outputs, terms = step_both(
        theirs.train(), ours.train(), images, targets, labels, monkeypatch
    )

    num_dn = outputs.dn_logits.shape[2]
    their_logits = expected.intermediate_logits.transpose(0, 1)  # (B, L, D + Q, K) -> (L, B, ...)
    their_boxes = expected.intermediate_reference_points.transpose(0, 1)
    index = same_order(
        torch.cat((outputs.logits[0], outputs.boxes[0]), dim=-1),
        torch.cat((expected.enc_topk_logits, expected.enc_topk_bboxes), dim=-1),
    )
    pairs = [
        (reorder(outputs.logits[1:], index), their_logits[:, :, num_dn:]),
        (reorder(outputs.boxes[1:], index), their_boxes[:, :, num_dn:]),
        (outputs.dn_logits, their_logits[:, :, :num_dn]),
        (outputs.dn_boxes, their_boxes[:, :, :num_dn]),
    ]
    for actual, wanted in pairs:
        torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-4)

    # Theirs are named loss_{vfl,bbox,giou}[_aux_i | _dn_i], weighted; the encoder is the last aux.
    for term, name, weight in (("vfl", "vfl", 1), ("l1", "bbox", 5), ("giou", "giou", 2)):
        their_terms = {
            "": expected.loss_dict[f"loss_{name}"],
            "aux_": sum(expected.loss_dict[f"loss_{name}_aux_{i}"] for i in range(2)),
            "encoder_": expected.loss_dict[f"loss_{name}_aux_2"],
            "dn_": sum(expected.loss_dict[f"loss_{name}_dn_{i}"] for i in range(3)),
        }
        for prefix, wanted in their_terms.items():
            actual = terms[prefix + term] * weight
            torch.testing.assert_close(actual, wanted.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(terms["loss"], expected.loss, atol=1e-4, rtol=1e-4)


def test_gradients_agree_with_one_decoder_layer(monkeypatch):
    """With one layer nothing is looked at twice, so the gradients must be theirs, all of them."""
    theirs, ours = make_pair("basic", num_layers=1)
    images, targets, labels = batch(96, 160, [3, 1])
    expected, _, terms = step_both(
        theirs.train(), ours.train(), images, targets, labels, monkeypatch
    )
    expected.loss.backward()
    terms["loss"].backward()
    their_gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    their_gradients = rtdetr.from_official(rtdetr.from_hugging_face(their_gradients))
    for name, parameter in ours.named_parameters():
        wanted = their_gradients[name]
        scale = wanted.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(parameter.grad / scale, wanted / scale, atol=1e-3, rtol=0)


def test_anchors_agree_where_some_fall_outside():
    theirs, _ = make_pair("basic", num_layers=1)
    sizes = ((4, 52), (2, 26), (1, 13))  # x = 0.5 / 52 lies outside (0.01, 0.99)
    anchors, valid = rtdetr.anchor_logits(sizes, torch.device("cpu"))
    their_anchors, their_valid = theirs.model.generate_anchors(sizes)
    torch.testing.assert_close(anchors.sigmoid(), their_anchors[0].sigmoid())
    assert torch.equal(valid.bool(), their_valid[0]) and not valid.all()


def test_files_of_both_layouts_load_whole(tmp_path):
    theirs, ours = make_pair("bottleneck", num_layers=2, freeze=True)
    images, *_ = batch(64, 96, [1])
    wanted = ours.eval()(images)

    theirs.save_pretrained(tmp_path)  # transformers writes its names on disk itself
    official = rtdetr.from_hugging_face(theirs.state_dict())
    for name in (  # names copied from the official repository's modules
        "backbone.conv1.conv1_1.conv.weight",
        "backbone.res_layers.0.blocks.0.short.conv.weight",
        "backbone.res_layers.1.blocks.0.short.conv.norm.running_var",
        "backbone.res_layers.1.blocks.1.branch2c.norm.weight",
        "encoder.input_proj.2.1.running_mean",
        "encoder.encoder.0.layers.0.self_attn.in_proj_weight",
        "encoder.encoder.0.layers.0.linear1.bias",
        "encoder.encoder.0.layers.0.norm2.weight",
        "encoder.lateral_convs.0.norm.weight",
        "encoder.fpn_blocks.0.bottlenecks.0.conv1.conv.weight",
        "encoder.pan_blocks.1.conv2.norm.bias",
        "decoder.input_proj.0.conv.weight",
        "decoder.input_proj.0.norm.bias",
        "decoder.decoder.layers.0.self_attn.in_proj_bias",
        "decoder.decoder.layers.1.cross_attn.value_proj.weight",
        "decoder.decoder.layers.0.norm3.weight",
        "decoder.denoising_class_embed.weight",
        "decoder.query_pos_head.layers.1.weight",
        "decoder.enc_output.0.weight",
        "decoder.enc_bbox_head.layers.2.bias",
        "decoder.dec_score_head.1.weight",
        "decoder.dec_bbox_head.1.layers.0.weight",
    ):
        assert name in official, name
    torch.save({"ema": {"module": official}, "model": {}}, tmp_path / "ema.pth")
    torch.save({"model": official}, tmp_path / "model.pth")

    for file in ("model.safetensors", "ema.pth", "model.pth"):
        for parameter in ours.parameters():
            torch.nn.init.zeros_(parameter)
        state = weights.read_state_dict(tmp_path / file)
        report = weights.fill(ours, rtdetr.own_names(state))
        assert report.share == 1 and not report.unused, report
        torch.testing.assert_close(ours.eval()(images).boxes, wanted.boxes)
