import math

import pytest
import torch
from torchvision.ops import complete_box_iou_loss

from lib.models import yolo, yolo_loss
from lib.models.boxes import cxcywh_to_xyxy, elementwise_iou, scale_boxes, xyxy_to_cxcywh
from lib.models.yolo_loss import Gains, assign, expected_initial
from tests.models.test_yolo import certain_of

torch.set_num_threads(1)

SIZE = (64, 96)  # height, width: 96 + 24 + 6 = 126 anchors
NUM_CLASSES = 3


def random_targets(num_images: int, num_boxes: int, seed: int = 0):
    """Normalized boxes (B, M, 4) inside the image and labels (B, M), none missing."""
    generator = torch.Generator().manual_seed(seed)
    size = 0.1 + 0.4 * torch.rand(num_images, num_boxes, 2, generator=generator)
    center = size / 2 + (1 - size) * torch.rand(num_images, num_boxes, 2, generator=generator)
    labels = torch.randint(0, NUM_CLASSES, (num_images, num_boxes), generator=generator)
    return torch.cat((center, size), dim=-1), labels


def random_outputs(num_images: int, seed: int = 0, size=SIZE) -> yolo.YOLOOutputs:
    generator = torch.Generator().manual_seed(seed)
    anchors, strides = yolo.make_anchors(size, torch.device("cpu"))
    cls = torch.randn(num_images, len(anchors), NUM_CLASSES, generator=generator) - 2
    box_dist = torch.randn(num_images, len(anchors), 64, generator=generator)
    return yolo.YOLOOutputs(cls.requires_grad_(), box_dist.requires_grad_(), anchors, strides)


def outputs_that_say(boxes_px: torch.Tensor, logits: torch.Tensor, size=SIZE) -> yolo.YOLOOutputs:
    """Each anchor predicts its box (B, A, 4) xyxy in pixels, cut to its reach of 0 to 15."""
    anchors, strides = yolo.make_anchors(size, torch.device("cpu"))
    sides = torch.cat((anchors - boxes_px[..., :2], boxes_px[..., 2:] - anchors), dim=-1)
    distances = (sides / strides.unsqueeze(-1)).clamp(0, 15)
    return yolo.YOLOOutputs(logits, certain_of(distances), anchors, strides)


def dense_assign(outputs, targets, labels):
    """The same assignment, spelled out over images, boxes and anchors: target scores (B, A, C)."""
    predictions = yolo.decode_distances(outputs.box_dist, outputs.anchors, outputs.strides)
    scores = outputs.cls.sigmoid()
    num_images, num_anchors, num_classes = scores.shape
    target_scores = torch.zeros(num_images, num_anchors, num_classes)
    matched = torch.full((num_images, num_anchors), -1)
    for image in range(num_images):
        claims = {}  # anchor -> (IoU, -box, alignment): the greatest claim wins
        for box, (target, label) in enumerate(zip(targets[image], labels[image], strict=True)):
            if label < 0:
                continue
            iou = elementwise_iou(target, predictions[image])
            alignment = scores[image, :, label] ** 0.5 * iou**6
            center, reach = (target[:2] + target[2:]) / 2, ((target[2:] - target[:2]) / 2).clamp(4)
            inside = ((outputs.anchors - center).abs() <= reach).all(-1)
            candidates = (alignment * inside).topk(10).indices.tolist()
            for anchor in candidates:
                if inside[anchor] and iou[anchor] > 0:
                    claim = (iou[anchor].item(), -box, alignment[anchor].item())
                    claims[anchor] = max(claims.get(anchor, claim), claim)
        for box in {-claim[1] for claim in claims.values()}:
            mine = {anchor: claim for anchor, claim in claims.items() if claim[1] == -box}
            best_iou = max(claim[0] for claim in mine.values())
            best_alignment = max(claim[2] for claim in mine.values())
            for anchor, (_, _, alignment) in mine.items():
                label = labels[image, box]
                target_scores[image, anchor, label] = alignment / best_alignment * best_iou
                matched[image, anchor] = box
    return target_scores, matched


# --- assignment ---------------------------------------------------------------------------------


def test_assignment_agrees_with_the_one_spelled_out():
    outputs = random_outputs(4)
    boxes, labels = random_targets(4, 9)
    labels[1, 4:] = -1
    labels[2] = -1
    targets = cxcywh_to_xyxy(scale_boxes(boxes, *SIZE))
    anchors, weights = assign(outputs, targets, labels)
    expected, matched = dense_assign(outputs, targets, labels)

    found = torch.zeros_like(expected)
    for image, box, k in (weights > 0).nonzero().tolist():
        anchor = anchors[image, box, k]
        assert found[image, anchor].sum() == 0, "an anchor was given twice"
        assert matched[image, anchor] == box
        found[image, anchor, labels[image, box]] = weights[image, box, k]
    assert (expected > 0).sum() > 50
    torch.testing.assert_close(found, expected)


def test_a_box_takes_the_ten_best_aligned_anchors_inside_it():
    outputs = random_outputs(1)
    targets = torch.tensor([[[8.0, 8, 56, 56]]])
    anchors, weights = assign(outputs, targets, torch.tensor([[1]]))
    assert anchors.shape == weights.shape == (1, 1, 10)
    predictions = yolo.decode_distances(outputs.box_dist, outputs.anchors, outputs.strides)
    iou = elementwise_iou(targets[0], predictions[0])
    alignment = outputs.cls[0, :, 1].sigmoid() ** 0.5 * iou**6
    inside = ((outputs.anchors > 8) & (outputs.anchors < 56)).all(-1)
    assert inside.sum() > 10
    best = torch.where(inside, alignment, -1).topk(10).indices
    assert set(anchors.flatten().tolist()) == set(best.tolist())
    # The best aligned one is asked for the best IoU, the others for less, in proportion.
    torch.testing.assert_close(weights[0, 0, 0], iou[best].max())
    torch.testing.assert_close(
        weights[0, 0] / weights[0, 0, 0], alignment[best] / alignment[best[0]]
    )


def test_score_and_iou_both_count():
    """Of two anchors with the same box the surer wins; IoU weighs far more than score."""
    anchors, _ = yolo.make_anchors(SIZE, torch.device("cpu"))
    target = torch.tensor([8.0, 8, 40, 40])
    boxes = target.repeat(1, len(anchors), 1)
    logits = torch.full((1, len(anchors), 1), -3.0)
    logits[0, 26] = 3.0  # anchor 26 is at (20, 20), inside
    outputs = outputs_that_say(boxes, logits)
    assignment = assign(outputs, target.view(1, 1, 4), torch.tensor([[0]]))
    assert assignment.anchors[0, 0, 0] == 26
    torch.testing.assert_close(assignment.weights[0, 0, 0], torch.tensor(1.0))

    boxes[0, 26, 2:] = 30  # sure of itself, but the box is poor
    outputs = outputs_that_say(boxes, logits)
    assignment = assign(outputs, target.view(1, 1, 4), torch.tensor([[0]]))
    assert assignment.anchors[0, 0, 0] != 26


def test_contested_anchors_go_to_the_box_of_higher_iou():
    small, large = torch.tensor([16.0, 16, 40, 40]), torch.tensor([8.0, 8, 48, 48])
    targets, labels = torch.stack((small, large)).unsqueeze(0), torch.zeros(1, 2, dtype=torch.long)
    anchors, _ = yolo.make_anchors(SIZE, torch.device("cpu"))
    # Both want the same ten, those inside the small box, by falling score.
    inside_small = yolo_loss.anchors_inside(targets[:, :1], anchors).view(1, -1, 1)
    logits = torch.where(inside_small, 3.0, -8.0) - 0.01 * torch.arange(126).view(1, -1, 1)
    for winner, predicted in enumerate((small, large)):
        outputs = outputs_that_say(predicted.repeat(1, len(anchors), 1), logits)
        candidates, weights = assign(outputs, targets, labels)
        assert torch.equal(candidates[0, 0], candidates[0, 1])
        assert (weights[0, winner] > 0).all()
        assert (weights[0, 1 - winner] == 0).all()


def test_a_box_annotated_twice_teaches_each_anchor_once():
    outputs = random_outputs(1)
    targets = torch.tensor([[[8.0, 8, 56, 56], [8.0, 8, 56, 56]]])
    _, weights = assign(outputs, targets, torch.tensor([[1, 1]]))
    assert (weights[0, 0] > 0).all()
    assert (weights[0, 1] == 0).all()


@pytest.mark.parametrize("corner", [(0.0, 0.0), (30.0, 30.0), (7.0, 15.5), (93.0, 61.0)])
def test_tiny_boxes_between_the_anchors_still_teach(corner):
    x, y = corner
    targets = torch.tensor([[[x, y, x + 2, y + 2]]])
    anchors, strides = yolo.make_anchors(SIZE, torch.device("cpu"))
    untrained = yolo.YOLOOutputs(
        torch.zeros(1, len(anchors), 1), torch.zeros(1, len(anchors), 64), anchors, strides
    )
    _, weights = assign(untrained, targets, torch.tensor([[0]]))
    assert (weights > 0).any()


def test_splitting_the_batch_changes_nothing(monkeypatch):
    outputs = random_outputs(5)
    boxes, labels = random_targets(5, 4)
    targets = cxcywh_to_xyxy(scale_boxes(boxes, *SIZE))
    together = assign(outputs, targets, labels)
    monkeypatch.setattr(yolo_loss, "ELEMENTS_AT_ONCE", 2 * 126 * 64)  # two images at a time
    split = assign(outputs, targets, labels)
    assert torch.equal(together.anchors, split.anchors)
    assert torch.equal(together.weights, split.weights)


# --- terms --------------------------------------------------------------------------------------


def test_loss_agrees_with_the_dense_one():
    """Sparse targets and gathered candidates give the value and gradients of dense targets."""
    boxes, labels = random_targets(3, 6)
    labels[0, 2:] = -1
    targets = cxcywh_to_xyxy(scale_boxes(boxes, *SIZE))
    outputs, reference = random_outputs(3), random_outputs(3)
    terms = yolo_loss.yolo_loss(outputs, boxes, labels, SIZE)
    terms["loss"].backward()

    target_scores, matched = dense_assign(reference, targets, labels)
    total = target_scores.sum().clamp(min=1)
    cls = torch.nn.functional.binary_cross_entropy_with_logits(
        reference.cls, target_scores, reduction="sum"
    )
    positive = matched >= 0
    weights = target_scores.sum(-1)[positive]
    predictions = yolo.decode_distances(reference.box_dist, reference.anchors, reference.strides)
    images = torch.arange(3).unsqueeze(-1).expand_as(matched)[positive]
    matched_targets = targets[images, matched[positive]]
    box = (weights * complete_box_iou_loss(predictions[positive], matched_targets)).sum()
    points = reference.anchors.expand(3, -1, -1)[positive]
    strides = reference.strides.expand(3, -1)[positive]
    sides = torch.cat((points - matched_targets[:, :2], matched_targets[:, 2:] - points), dim=-1)
    distances = (sides / strides.unsqueeze(-1)).clamp(0, 15 - 1e-3)
    left = distances.floor().long()
    logits = reference.box_dist[positive].view(-1, 4, 16)
    dfl = torch.zeros(len(weights))
    for side in range(4):
        for bins, share in (
            (left[:, side], left[:, side] + 1 - distances[:, side]),
            (left[:, side] + 1, distances[:, side] - left[:, side]),
        ):
            nll = torch.nn.functional.cross_entropy(logits[:, side], bins, reduction="none")
            dfl = dfl + share * nll / 4
    dfl = (weights * dfl).sum()
    (7.5 * box / total + 0.5 * cls / total + 1.5 * dfl / total).backward()

    torch.testing.assert_close(terms["cls"], cls / total)
    torch.testing.assert_close(terms["box"], box / total)
    torch.testing.assert_close(terms["dfl"], dfl / total)
    torch.testing.assert_close(outputs.cls.grad, reference.cls.grad)
    torch.testing.assert_close(outputs.box_dist.grad, reference.box_dist.grad)


def test_complete_iou_agrees_with_torchvision():
    generator = torch.Generator().manual_seed(0)
    low = 50 * torch.rand(2, 200, 2, generator=generator)
    a, b = torch.cat((low, low + 1 + 50 * torch.rand(2, 200, 2, generator=generator)), dim=-1)
    mine, theirs = a.clone().requires_grad_(), a.clone().requires_grad_()
    value = 1 - yolo_loss.complete_iou(mine, b)
    expected = complete_box_iou_loss(theirs, b)
    torch.testing.assert_close(value, expected)
    value.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)


def test_complete_iou_of_empty_boxes_is_finite():
    empty = torch.zeros(1, 4, requires_grad=True)
    value = yolo_loss.complete_iou(empty, torch.zeros(1, 4))
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(empty.grad).all()


def test_gains_weigh_the_terms():
    outputs = random_outputs(2)
    terms = yolo_loss.yolo_loss(outputs, *random_targets(2, 3), SIZE, Gains(box=2, cls=3, dfl=0))
    assert set(terms) == {
        "loss", "box", "cls", "dfl", "box_weighted", "cls_weighted", "dfl_weighted"
    }  # fmt: skip
    torch.testing.assert_close(terms["box_weighted"], 2 * terms["box"])
    torch.testing.assert_close(terms["cls_weighted"], 3 * terms["cls"])
    assert terms["dfl"] > 0 and terms["dfl_weighted"] == 0
    torch.testing.assert_close(terms["loss"], 2 * terms["box"] + 3 * terms["cls"])


def test_ground_truth_as_predictions_has_no_box_loss():
    boxes = torch.tensor([[[0.3, 0.4, 0.2, 0.3], [0.75, 0.6, 0.3, 0.5]]])
    labels = torch.tensor([[0, 2]])
    targets = cxcywh_to_xyxy(scale_boxes(boxes, *SIZE))[0]
    anchors, _ = yolo.make_anchors(SIZE, torch.device("cpu"))
    is_second = anchors[:, 0] > 48  # the boxes lie left and right of the middle
    says = torch.where(is_second.unsqueeze(-1), targets[1], targets[0]).unsqueeze(0)
    logits = torch.full((1, len(anchors), NUM_CLASSES), -15.0)
    inside = yolo_loss.anchors_inside(targets, anchors)  # (2, A)
    logits[0, inside[0], 0] = logits[0, inside[1], 2] = 15.0
    outputs = outputs_that_say(says, logits)
    terms = yolo_loss.yolo_loss(outputs, boxes, labels, SIZE)
    assert terms["box"] < 1e-4

    # And back through the decoding: the best detections are the ground truth.
    (found,) = yolo.postprocess(outputs, SIZE, score_threshold=0.5, iou_threshold=0.7, top_k=2)
    order = found["labels"].argsort()
    assert found["labels"][order].tolist() == labels[0].tolist()
    torch.testing.assert_close(found["boxes"][order], boxes[0], atol=1e-5, rtol=0)


def test_distribution_focal_loss_is_smallest_at_the_exact_distribution():
    anchors, strides = torch.tensor([[40.0, 40.0]]), torch.tensor([8.0])
    distances = torch.tensor([[2.0, 3.5, 0.25, 4.0]])
    targets = torch.cat((anchors - 8 * distances[:, :2], anchors + 8 * distances[:, 2:]), dim=-1)
    exact = yolo_loss.distribution_focal_loss(certain_of(distances), targets, anchors, strides)
    entropy = (math.log(2) - 0.25 * math.log(0.25) - 0.75 * math.log(0.75)) / 4
    torch.testing.assert_close(exact, torch.tensor([entropy]))
    uniform = yolo_loss.distribution_focal_loss(torch.zeros(1, 64), targets, anchors, strides)
    torch.testing.assert_close(uniform, torch.tensor([math.log(16)]))


def test_sides_out_of_reach_are_finite():
    anchors, strides = torch.tensor([[40.0, 40.0]]), torch.tensor([8.0])
    targets = torch.tensor([[-500.0, 35, 900, 900]])
    loss = yolo_loss.distribution_focal_loss(torch.zeros(1, 64), targets, anchors, strides)
    assert torch.isfinite(loss).all()


# --- empty batches, padding, precision ----------------------------------------------------------


@pytest.mark.parametrize("num_boxes", [0, 3])
def test_no_box_in_the_whole_batch(num_boxes):
    torch.manual_seed(0)
    model = yolo.build("n", NUM_CLASSES)
    boxes, labels = torch.zeros(2, num_boxes, 4), torch.full((2, num_boxes), -1)
    terms = yolo_loss.yolo_loss(model(torch.rand(2, 3, *SIZE)), boxes, labels, SIZE)
    terms["loss"].backward()
    assert terms["box"] == 0 and terms["dfl"] == 0
    torch.testing.assert_close(
        terms["cls"], expected_initial(boxes, labels, SIZE, NUM_CLASSES)["cls"], rtol=0.1, atol=0
    )
    # No parameter is left without a gradient, which distributed training would wait for.
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_padding_changes_nothing():
    boxes, labels = random_targets(2, 3)
    padded_boxes = torch.cat((boxes, torch.zeros(2, 5, 4)), dim=1)
    padded_labels = torch.cat((labels, torch.full((2, 5), -1)), dim=1)
    outputs, padded_outputs = random_outputs(2), random_outputs(2)
    plain = yolo_loss.yolo_loss(outputs, boxes, labels, SIZE)
    padded = yolo_loss.yolo_loss(padded_outputs, padded_boxes, padded_labels, SIZE)
    plain["loss"].backward()
    padded["loss"].backward()
    torch.testing.assert_close(plain["loss"], padded["loss"])
    torch.testing.assert_close(outputs.box_dist.grad, padded_outputs.box_dist.grad)


def test_fewer_anchors_than_candidates():
    outputs = random_outputs(1, size=(32, 32))
    outputs = outputs._replace(
        cls=outputs.cls[:, -5:],
        box_dist=outputs.box_dist[:, -5:],
        anchors=outputs.anchors[-5:],
        strides=outputs.strides[-5:],
    )
    terms = yolo_loss.yolo_loss(outputs, *random_targets(1, 2), (32, 32))
    assert torch.isfinite(terms["loss"])


def test_losses_are_fp32_under_autocast():
    outputs = random_outputs(2)
    boxes, labels = random_targets(2, 4)
    exact = yolo_loss.yolo_loss(outputs, boxes, labels, SIZE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = yolo_loss.yolo_loss(outputs, boxes, labels, SIZE)
    for name, value in exact.items():
        assert mixed[name].dtype == torch.float32
        torch.testing.assert_close(mixed[name], value)


class HostSyncs(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the ops that would wait for a device, and all ops."""

    def __init__(self):
        super().__init__()
        self.num_ops, self.syncs = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_ops += 1
        name = func.overloadpacket.__name__
        indexes_by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "nms") or indexes_by_mask:
            self.syncs.append(name)
        return func(*args, **(kwargs or {}))


def test_loss_never_waits_for_the_device_and_ops_do_not_grow_with_the_batch():
    num_ops = []
    for num_images in (1, 8):
        outputs = random_outputs(num_images)
        targets = random_targets(num_images, 5)
        with HostSyncs() as counts:
            yolo_loss.yolo_loss(outputs, *targets, SIZE)["loss"].backward()
        assert counts.syncs == []
        num_ops.append(counts.num_ops)
    assert num_ops[0] == num_ops[1]


# --- the first loss -----------------------------------------------------------------------------


def first_terms(seed: int, size=SIZE, without_prior: bool = False):
    torch.manual_seed(seed)
    model = yolo.build("n", NUM_CLASSES)
    if without_prior:
        for head in model.cls_heads:
            torch.nn.init.zeros_(head.predict.bias)
    boxes, labels = random_targets(4, 5, seed)
    labels[0, 2:] = -1
    with torch.no_grad():
        terms = yolo_loss.yolo_loss(model(torch.rand(4, 3, *size)), boxes, labels, size)
    return terms, expected_initial(boxes, labels, size, NUM_CLASSES)


@pytest.mark.parametrize("size", [SIZE, (128, 128)])
@pytest.mark.parametrize("seed", [0, 1])
def test_initial_losses_are_the_analytic_ones(seed, size):
    terms, expected = first_terms(seed, size)
    torch.testing.assert_close(terms["cls"], expected["cls"], rtol=0.02, atol=0)
    torch.testing.assert_close(terms["dfl"], expected["dfl"], rtol=0.02, atol=0)


def test_missing_prior_bias_shows():
    terms, expected = first_terms(0, without_prior=True)
    assert terms["cls"] > 5 * expected["cls"]


# --- learning -----------------------------------------------------------------------------------


def scenes(num_images: int):
    """Bright squares of one color a class on noise: images (B, 3, 96, 96), boxes and labels."""
    generator = torch.Generator().manual_seed(0)
    images = 0.2 * torch.rand(num_images, 3, 96, 96, generator=generator)
    corners = torch.zeros(num_images, 2, 4)
    labels = torch.randint(0, NUM_CLASSES, (num_images, 2), generator=generator)
    for image in range(num_images):
        for box in range(2):  # one in the left half, one in the right half
            side, x, y = (torch.rand(3, generator=generator) * 20).int().tolist()
            x, y, side = x + 48 * box, y + 10, side + 16
            images[image, labels[image, box], y : y + side, x : min(x + side, 48 * box + 46)] = 1.0
            corners[image, box] = torch.tensor([x, y, min(x + side, 48 * box + 46), y + side])
    return images, xyxy_to_cxcywh(corners) / 96, labels


def fit(num_steps: int, num_images: int):
    """Train on the same few scenes; returns first and last terms and detections in eval."""
    torch.manual_seed(0)
    model = yolo.build("n", NUM_CLASSES)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.1  # a short run: the statistics must not lag
    images, boxes, labels = scenes(num_images)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, num_steps, pct_start=0.2)
    first = None
    for _ in range(num_steps):
        terms = yolo_loss.yolo_loss(model(images), boxes, labels, (96, 96))
        first = first or {name: value.item() for name, value in terms.items()}
        optimizer.zero_grad()
        terms["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        detections = yolo.postprocess(model(images), (96, 96), score_threshold=0.3)
    return first, terms, detections, boxes, labels


def test_every_term_falls_on_a_tiny_batch():
    first, last, *_ = fit(num_steps=20, num_images=2)
    assert last["box"] < 0.6 * first["box"]
    assert last["cls"] < 0.7 * first["cls"]
    assert last["dfl"] < 0.7 * first["dfl"]


@pytest.mark.slow
def test_a_few_scenes_are_memorized():
    _, last, detections, boxes, labels = fit(num_steps=150, num_images=4)
    assert last["box"] < 0.1
    for found, image_boxes, image_labels in zip(detections, boxes, labels, strict=True):
        assert sorted(found["labels"].tolist()) == sorted(image_labels.tolist())
        for box, label in zip(image_boxes, image_labels, strict=True):
            of_label = found["boxes"][found["labels"] == label]
            iou = elementwise_iou(cxcywh_to_xyxy(box), cxcywh_to_xyxy(of_label))
            assert iou.max() > 0.8
