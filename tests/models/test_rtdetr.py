"""RT-DETR on its own: sizes, empty batches, noise, gradients, loss contract, a small overfit."""

import math
import time

import pytest
import torch
from torch._subclasses import FakeTensorMode

from lib.models import rtdetr, rtdetr_loss, weights
from lib.models.boxes import cxcywh_to_xyxy, pairwise_iou, xyxy_to_cxcywh

NUM_CLASSES = 4
COLOURS = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])


@pytest.fixture(autouse=True)
def _one_thread_one_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def make_scenes(num_images: int, height: int, width: int, seed: int = 0):
    """Coloured rectangles on noise, the colour being the class; 0 to 4 boxes an image."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.rand(num_images, 3, height, width, generator=generator)
    boxes = torch.zeros(num_images, 4, 4)
    labels = torch.full((num_images, 4), -1)
    grid = torch.tensor((width, height, width, height))
    for i in range(num_images):
        for j in range(i % 5):
            size = 0.12 + 0.25 * torch.rand(2, generator=generator)
            center = size / 2 + (1 - size) * torch.rand(2, generator=generator)
            corners = (cxcywh_to_xyxy(torch.cat((center, size))) * grid).round().int()
            x0, y0, x1, y1 = corners.tolist()
            labels[i, j] = torch.randint(NUM_CLASSES, (), generator=generator)
            images[i, :, y0:y1, x0:x1] = COLOURS[labels[i, j]].view(3, 1, 1)
            boxes[i, j] = xyxy_to_cxcywh(corners / grid)
    return images, rtdetr.Targets(boxes, labels)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("height, width", [(64, 64), (96, 160), (135, 90)])
def test_output_shapes_at_any_size(height, width):
    model = rtdetr.build("tiny", NUM_CLASSES, num_queries=12)
    images, targets = make_scenes(5, height, width)
    outputs = model(images, targets, generator())
    num_dn = outputs.num_dn_groups * 2 * 4
    assert outputs.logits.shape == (4, 5, 12, NUM_CLASSES)  # the encoder and three layers
    assert outputs.boxes.shape == (4, 5, 12, 4)
    assert outputs.dn_logits.shape == (3, 5, num_dn, NUM_CLASSES)
    assert outputs.dn_boxes.shape == (3, 5, num_dn, 4)

    outputs = model.eval()(images)
    assert outputs.logits.shape == (1, 5, 12, NUM_CLASSES) and outputs.dn_logits is None
    detections = rtdetr.postprocess(outputs, top_k=9)
    assert detections.scores.shape == detections.labels.shape == (5, 9)
    assert (detections.scores.diff(dim=1) <= 0).all() and detections.boxes.shape == (5, 9, 4)


def test_fewer_tokens_than_queries():
    outputs = rtdetr.build("tiny", NUM_CLASSES, num_queries=30).eval()(torch.rand(1, 3, 32, 32))
    assert outputs.boxes.shape[2] == 4 * 4 + 2 * 2 + 1


@pytest.mark.parametrize(
    "variant, millions", [("r18", 20.2), ("r34", 31.4), ("r50", 42.9), ("r101", 76.7)]
)
def test_published_variants_have_their_published_sizes(variant, millions):
    with FakeTensorMode():
        model = rtdetr.build(variant, 80)
    num_parameters = sum(p.numel() for p in model.parameters())
    assert num_parameters == pytest.approx(millions * 1e6, rel=0.005)


def test_grayscale_input_and_queries_by_argument():
    model = rtdetr.build("tiny", NUM_CLASSES, num_queries=7, in_chans=1).eval()
    assert model(torch.rand(1, 1, 64, 64)).boxes.shape == (1, 1, 7, 4)


@pytest.mark.parametrize("num_slots", [0, 2], ids=["no slot", "only padding"])
def test_a_batch_without_boxes_trains_every_parameter(num_slots):
    model = rtdetr.build("tiny", NUM_CLASSES)
    targets = rtdetr.Targets(torch.zeros(2, num_slots, 4), torch.full((2, num_slots), -1))
    terms = rtdetr_loss.losses(model(torch.rand(2, 3, 64, 64), targets, generator()), targets)
    terms["loss"].backward()
    assert all(term.isfinite() for term in terms.values())
    assert terms["l1"] == terms["giou"] == terms["dn_l1"] == 0 and terms["vfl"] > 0
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert not without, without
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_padding_changes_no_loss():
    images, targets = make_scenes(5, 64, 96)
    outputs = rtdetr.build("tiny", NUM_CLASSES).eval()(images)
    terms = rtdetr_loss.losses(outputs, targets)
    boxes, labels = targets
    wider = rtdetr.Targets(
        torch.cat((torch.zeros(5, 3, 4), boxes), dim=1),  # padding may stand in front, too
        torch.cat((torch.full((5, 3), -1), labels), dim=1),
    )
    for name, term in rtdetr_loss.losses(outputs, wider).items():
        torch.testing.assert_close(term, terms[name])


def test_every_parameter_gets_a_gradient_that_is_not_zero_after_a_step():
    model = rtdetr.build("tiny", NUM_CLASSES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    images, targets = make_scenes(5, 64, 96)
    for step in range(2):  # box heads end in zeros, so what is before them moves from step 2 on
        optimizer.zero_grad()
        terms = rtdetr_loss.losses(model(images, targets, generator(step)), targets)
        terms["loss"].backward()
        optimizer.step()
    still = [name for name, p in model.named_parameters() if not p.grad.any()]
    assert not still, still


def test_a_step_is_a_function_of_its_generator():
    model = rtdetr.build("tiny", NUM_CLASSES)
    images, targets = make_scenes(5, 64, 96)
    first, again, other = (
        rtdetr_loss.losses(model(images, targets, generator(s)), targets) for s in (7, 7, 8)
    )
    assert first["loss"] == again["loss"] and first["dn_l1"] != other["dn_l1"]
    torch.testing.assert_close(first["l1"], other["l1"])  # ordinary queries never see the noise


def test_denoising_noise_stays_in_its_bounds():
    model = rtdetr.build("tiny", NUM_CLASSES)
    targets = rtdetr.Targets(torch.tensor([[[0.5, 0.5, 0.2, 0.1]]]), torch.tensor([[2]]))
    labels, boxes, num_groups = model.decoder.add_noise(targets, generator())
    corners = cxcywh_to_xyxy(boxes).view(num_groups, 2, 4)
    moved = (corners - cxcywh_to_xyxy(targets.boxes)).abs() / torch.tensor([0.1, 0.05] * 2)
    positive, negative = moved[:, 0], moved[:, 1]
    assert num_groups == 20 and positive.max() <= 1.001  # in half sizes of the box
    assert negative.min() >= 0.999 and negative.max() <= 2.001
    assert 0 < (labels != 2).float().mean() < 0.5


def test_denoising_mask_hides_the_answers():
    mask = rtdetr.denoising_mask(num_dn=8, num_groups=2, num_all=11, device=torch.device("cpu"))
    ordinary = torch.arange(11) >= 8
    assert not mask[ordinary][:, ~ordinary].any() and mask[:, ordinary].all()
    assert mask[:4, :4].all() and not mask[:4, 4:8].any() and not mask[4:8, :4].any()


def test_loss_is_the_weighted_sum_of_its_terms():
    images, targets = make_scenes(5, 64, 96)
    outputs = rtdetr.build("tiny", NUM_CLASSES)(images, targets, generator())
    terms = rtdetr_loss.losses(outputs, targets)
    total = sum(
        terms[g + "vfl"] + 5 * terms[g + "l1"] + 2 * terms[g + "giou"]
        for g in ("", "aux_", "encoder_", "dn_")
    )
    torch.testing.assert_close(terms["loss"].detach(), total)
    doubled = rtdetr_loss.losses(outputs, targets, reduce_num_boxes=lambda n: 2 * n)
    torch.testing.assert_close(doubled["loss"], terms["loss"] / 2)


def test_perfect_predictions_leave_only_the_negatives():
    _, targets = make_scenes(5, 64, 96)
    logits = torch.full((1, 5, 6, NUM_CLASSES), -20.0)
    exists = targets.labels >= 0
    own = torch.nn.functional.one_hot(targets.labels.clamp(min=0), NUM_CLASSES) * exists[..., None]
    logits[0, :, 2:] += 40.0 * own  # query m + 2 answers for target m
    boxes = torch.full((1, 5, 6, 4), 0.05)
    boxes[0, :, 2:] = targets.boxes
    outputs = rtdetr.Outputs(logits, boxes)
    query = rtdetr_loss.match(outputs, targets)[0]
    assert torch.equal(query, torch.where(exists, torch.arange(2, 6), -1))
    assert rtdetr_loss.losses(outputs, targets)["loss"] < 1e-4


def test_more_boxes_than_queries_and_diverged_logits_still_match():
    _, targets = make_scenes(5, 64, 96)
    outputs = rtdetr.Outputs(torch.zeros(1, 5, 2, NUM_CLASSES), torch.rand(1, 5, 2, 4))
    query = rtdetr_loss.match(outputs, targets)[0]
    assert ((query >= 0).sum(1) == (targets.labels >= 0).sum(1).clamp(max=2)).all()
    outputs.logits.fill_(torch.nan)
    assert rtdetr_loss.losses(outputs, targets)["loss"].isnan()  # seen, and by the loop


def test_look_forward_twice_reaches_one_layer_back_and_no_further():
    model = rtdetr.build("tiny", NUM_CLASSES)
    images, targets = make_scenes(5, 64, 96)
    outputs = model(images, targets, generator())
    head = model.decoder.dec_bbox_head[0].layers[-1].bias
    for layer, reaches in ((1, True), (2, True), (3, False)):
        (gradient,) = torch.autograd.grad(
            outputs.boxes[layer].sum(), head, retain_graph=True, allow_unused=True
        )
        assert (gradient is not None and gradient.any().item()) is reaches, layer


def initial_vfl(model) -> float:
    images, targets = make_scenes(10, 96, 128)
    with torch.no_grad():
        return rtdetr_loss.losses(model(images, targets, generator()), targets)["vfl"].item()


def test_initial_vfl_is_as_expected_and_not_without_the_prior():
    low, high = rtdetr_loss.expected_initial_vfl(30, NUM_CLASSES, num_boxes_per_image=2)
    model = rtdetr.build("tiny", NUM_CLASSES)
    assert low < initial_vfl(model) < high
    for head in model.decoder.dec_score_head:
        torch.nn.init.zeros_(head.bias)
    assert initial_vfl(model) > high


def test_the_first_shortcut_of_r18_starts_as_the_identity():
    block = rtdetr.build("tiny", NUM_CLASSES).backbone.layer1[0].eval()
    x = torch.rand(1, 16, 8, 8)
    torch.testing.assert_close(block.downsample(x), x, atol=1e-4, rtol=1e-4)


def test_frozen_norms_stay_frozen_in_training():
    model = rtdetr.build("tiny", NUM_CLASSES)
    model.freeze_stem_and_norms()
    images, targets = make_scenes(5, 64, 96)
    before = {k: v.clone() for k, v in model.backbone.state_dict().items() if "running" in k}
    rtdetr_loss.losses(model.train()(images, targets, generator()), targets)["loss"].backward()
    after = model.backbone.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert model.backbone.conv1[0].weight.grad is None
    assert model.backbone.layer2[0].conv1.weight.grad is not None


def test_another_number_of_classes_loads_all_but_the_class_heads(tmp_path):
    source, target = (rtdetr.build("tiny", n) for n in (80, 3))
    official = {  # our names are official ones where these rules do not touch them
        name: tensor for name, tensor in source.state_dict().items() if "attn" not in name
    }
    torch.save({"model": official}, tmp_path / "file.pth")
    state = weights.read_state_dict(tmp_path / "file.pth")
    report = weights.fill(target, rtdetr.own_names(state))
    heads = [f"decoder.dec_score_head.{i}.{kind}" for i in range(3) for kind in ("bias", "weight")]
    enc_head = ["decoder.enc_score_head.bias", "decoder.enc_score_head.weight"]
    embed = ["decoder.denoising_class_embed.weight"]
    assert sorted(report.mismatched) == sorted(embed + heads + enc_head)
    assert report.missing and all("attn" in name for name in report.missing)


def test_a_whole_step_rehearses_on_fake_tensors():
    with FakeTensorMode():
        model = rtdetr.build("tiny", NUM_CLASSES)
        targets = rtdetr.Targets(torch.rand(2, 3, 4), torch.zeros(2, 3, dtype=torch.long))
        outputs = model(torch.rand(2, 3, 96, 96), targets, generator())
        terms = rtdetr_loss.losses(outputs, targets, matcher=rtdetr_loss.fixed_match)
        terms["loss"].backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())


def average_precision_50(detections: rtdetr.Detections, targets: rtdetr.Targets) -> float:
    """Mean over classes of the area under precision and recall at IoU 0.5, every point used."""
    precisions = []
    for label in range(NUM_CLASSES):
        hits = []  # (score, true positive)
        for i, (boxes, labels) in enumerate(zip(*targets, strict=True)):
            chosen = detections.labels[i] == label
            iou = pairwise_iou(
                cxcywh_to_xyxy(detections.boxes[i][chosen]), cxcywh_to_xyxy(boxes[labels == label])
            )
            for score, row in zip(detections.scores[i][chosen].tolist(), iou, strict=True):
                hit = row.numel() > 0 and row.max() >= 0.5
                hits.append((score, float(hit)))
                if hit:
                    iou[:, row.argmax()] = -1  # each box is found once
        hits = torch.tensor([hit for _, hit in sorted(hits, reverse=True)]).cumsum(0)
        precision = hits / torch.arange(1, len(hits) + 1)
        precision = precision.flip(0).cummax(0).values.flip(0)
        recall = hits / (targets.labels == label).sum()
        precisions.append((recall.diff(prepend=torch.zeros(1)) * precision).sum().item())
    return sum(precisions) / len(precisions)


def overfit(num_images: int, num_steps: int, size: tuple[int, int], batch_size: int):
    """(terms of the first step, of the last, AP50 on the training images)."""
    images, targets = make_scenes(num_images, *size)
    model = rtdetr.build("tiny", NUM_CLASSES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, num_steps, pct_start=0.1)
    history = []
    for step in range(num_steps):
        chosen = torch.randperm(num_images, generator=generator(step))[:batch_size]
        batch = rtdetr.Targets(targets.boxes[chosen], targets.labels[chosen])
        terms = rtdetr_loss.losses(model(images[chosen], batch, generator(step)), batch)
        history.append({name: term.item() for name, term in terms.items()})
        optimizer.zero_grad()
        terms["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        detections = rtdetr.postprocess(model.eval()(images), 30)
    return history[0], history[-1], average_precision_50(detections, targets)


def test_a_few_steps_halve_the_box_loss():
    first, last, _ = overfit(num_images=4, num_steps=25, size=(64, 64), batch_size=4)
    assert last["l1"] < 0.5 * first["l1"] and last["loss"] < first["loss"]


@pytest.mark.slow
def test_sixteen_scenes_are_memorised():
    start = time.monotonic()
    first, last, precision = overfit(num_images=16, num_steps=250, size=(96, 128), batch_size=8)
    print(f"AP50 {precision:.3f} after {time.monotonic() - start:.0f} s")
    assert precision > 0.9 and last["l1"] < 0.2 * first["l1"]
    assert math.isfinite(last["loss"])
