"""One RT-DETR R50 training step beside Hugging Face's, with the same weights, images and boxes.

    python benchmarks/detection_step.py [--size 320] [--batch 2] [--boxes 7] [--rounds 7]

Prints, for both: dispatched operators, waits of the host for the device, and the median time of
forward, loss with matching (forward and backward to the network's outputs) and the network's
backward. Rounds alternate between the two, and ratios are medians over rounds, so that a busy
machine slows both. The optimizer is left out: it is the same. Sizes from 128 px, or theirs has
fewer tokens than queries. A second table times loss and matching alone at growing batches.
"""

import argparse
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib.models import rtdetr, rtdetr_loss, weights  # noqa: E402

PHASES = ("forward", "loss + matching", "backward")
NUM_CLASSES = 80


class Counts(TorchDispatchMode):
    """Counts operators by phase, and those that make the host wait for a device.

    On the CPU nothing waits, so waits are recognized: reading a scalar, indexing by a mask, asking
    for the nonzero places, and (patched, since it dispatches nothing there) `.cpu()`.
    """

    def __init__(self):
        super().__init__()
        self.phase = PHASES[0]
        self.ops, self.waits = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        self.ops[self.phase] += 1
        by_mask = name in ("index", "index_put_", "index_put") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in ("_local_scalar_dense", "nonzero", "masked_select") or by_mask:
            self.waits[self.phase] += 1
        return func(*args, **kwargs)

    def __enter__(self):
        self.original_cpu = torch.Tensor.cpu

        def counted_cpu(tensor):
            self.waits[self.phase] += 1
            return self.original_cpu(tensor)

        torch.Tensor.cpu = counted_cpu
        return super().__enter__()

    def __exit__(self, *exc):
        torch.Tensor.cpu = self.original_cpu
        return super().__exit__(*exc)


def leaves(*tensors):
    """Copies of the network's outputs that collect the loss's gradient and end its graph."""
    return [t.detach().requires_grad_() for t in tensors]


def our_loss(outputs, targets, num_dn_groups):
    """The gradients of (logits, boxes, dn_logits, dn_boxes), and the loss."""
    cut = leaves(*outputs)
    loss = rtdetr_loss.losses(rtdetr.Outputs(*cut, num_dn_groups), targets)["loss"]
    loss.backward()
    return [t.grad for t in cut], loss.detach()


def their_loss(model, outputs, labels, denoising_meta):
    """The gradients of (logits, boxes, encoder's logits, encoder's boxes), and the loss."""
    cut = logits, boxes, enc_logits, enc_boxes = leaves(*outputs)
    loss, *_ = model.loss_function(
        logits[:, -1],
        labels,
        logits.device,
        boxes[:, -1],
        model.config,
        logits,
        boxes,
        enc_topk_logits=enc_logits,
        enc_topk_bboxes=enc_boxes,
        denoising_meta_values=denoising_meta,
    )
    loss.backward()
    return [t.grad for t in cut], loss.detach()


def our_step(model, images, targets, _labels, mark):
    network = model(images, targets, torch.Generator(images.device).manual_seed(0))
    mark(PHASES[1])
    gradients, loss = our_loss(network[:4], targets, network.num_dn_groups)
    mark(PHASES[2])
    torch.autograd.backward(network[:4], gradients)
    return loss


def their_step(model, images, _targets, labels, mark):
    network = model.model(images, labels=labels)
    outputs = (
        network.intermediate_logits,
        network.intermediate_reference_points,
        network.enc_topk_logits,
        network.enc_topk_bboxes,
    )
    mark(PHASES[1])
    gradients, loss = their_loss(model, outputs, labels, network.denoising_meta_values)
    mark(PHASES[2])
    torch.autograd.backward(outputs, gradients)
    return loss


def make_boxes(batch, num_boxes, device):
    """Our targets and their labels: the same boxes."""
    boxes = 0.1 + 0.3 * torch.rand(batch, num_boxes, 4, device=device)
    classes = torch.randint(NUM_CLASSES, (batch, num_boxes), device=device)
    labels = [{"boxes": b, "class_labels": c} for b, c in zip(boxes, classes, strict=True)]
    return rtdetr.Targets(boxes, classes), labels


def loss_alone(theirs, batch, num_boxes, rounds, device):
    """Median (our seconds, their seconds, ratio) of loss and matching on made-up outputs."""
    from transformers.models.rt_detr import modeling_rt_detr

    targets, labels = make_boxes(batch, num_boxes, device)
    config = theirs.config
    *_, meta = modeling_rt_detr.get_contrastive_denoising_training_group(
        labels, NUM_CLASSES, config.num_queries, theirs.model.denoising_class_embed
    )
    num_dn, num_queries = meta["dn_num_split"]
    size = (batch, config.decoder_layers, num_dn + num_queries)
    logits = torch.randn(*size, NUM_CLASSES, device=device) - 4
    boxes = 0.1 + 0.3 * torch.rand(*size, 4, device=device)
    their_outputs = (logits, boxes, logits[:, 0, num_dn:], boxes[:, 0, num_dn:])
    by_layer = logits.transpose(0, 1), boxes.transpose(0, 1)
    our_outputs = [torch.cat((x[:1], x))[:, :, num_dn:] for x in by_layer]
    our_outputs += [x[:, :, :num_dn] for x in by_layer]

    pairs = []
    for _ in range(rounds + 1):  # the first is the warm-up
        start = clock(device)
        _, ours = our_loss(our_outputs, targets, meta["dn_num_group"])
        middle = clock(device)
        _, wanted = their_loss(theirs, their_outputs, labels, meta)
        pairs.append((middle - start, clock(device) - middle))
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    medians = [statistics.median(column) for column in zip(*pairs[1:], strict=True)]
    return *medians, statistics.median(a / b for a, b in pairs[1:])


def clock(device):
    """Seconds: on the CPU those this process computed, not those it waited."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def timed(step, model, *batch):
    """Seconds of each phase of one step."""
    model.zero_grad()
    times = [clock(batch[0].device)]
    step(model, *batch, lambda _phase: times.append(clock(batch[0].device)))
    times.append(clock(batch[0].device))
    return [end - start for start, end in zip(times, times[1:], strict=False)]


def counted(step, model, *batch):
    model.zero_grad()
    with Counts() as counts:
        loss = step(model, *batch, lambda phase: setattr(counts, "phase", phase))
    return counts, loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--boxes", type=int, default=7, help="boxes an image")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    from transformers import RTDetrConfig, RTDetrForObjectDetection

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    theirs = RTDetrForObjectDetection(RTDetrConfig(num_labels=NUM_CLASSES))
    for name, parameter in theirs.named_parameters():  # their initial norms are nearly zero
        if "norm" in name and name.endswith("weight"):
            torch.nn.init.ones_(parameter)
    theirs.model.backbone.model.embedder.requires_grad_(False)  # the published recipe, as ours
    ours = rtdetr.build("r50", NUM_CLASSES)
    report = weights.fill(ours, rtdetr.own_names(theirs.state_dict()))
    assert report.share == 1, report
    ours.freeze_stem_and_norms()

    device = torch.device(options.device)
    images = torch.rand(options.batch, 3, options.size, options.size, device=device)
    targets, labels = make_boxes(options.batch, options.boxes, device)
    contestants = {
        "shakedown": (our_step, ours.to(device).train()),
        "transformers": (their_step, theirs.to(device).train()),
    }
    batch = (images, targets, labels)

    counts, times = {}, {name: [] for name in contestants}
    for name, (step, model) in contestants.items():
        counts[name], loss = counted(step, model, *batch)  # also the warm-up
        print(f"{name}: loss {loss:.3f} (denoising noise differs between the two)")
    for _ in range(options.rounds):
        for name, (step, model) in contestants.items():
            times[name].append(timed(step, model, *batch))

    names = list(contestants)
    setting = f"R50, {options.size} px, batch {options.batch}, {options.boxes} boxes an image"
    print(f"\n{setting}, {device}")
    print(f"{'':18}" + "".join(f"{name:>16}" for name in names) + f"{'ratio':>9}")

    def row(title, values, digits=0):
        ratio = values[0] / max(values[1], 1e-12)
        cells = "".join(f"{value:16,.{digits}f}" for value in values)
        print(f"{title:18}{cells}{ratio:9.3f}")

    for what in ("ops", "waits"):
        print(f"-- {'operators' if what == 'ops' else 'host waits'}")
        for phase in PHASES:
            row(phase, [getattr(counts[name], what)[phase] for name in names])
        row("whole step", [getattr(counts[name], what).total() for name in names])
    print("-- milliseconds (medians; ratio: median over rounds)")
    for title, pick in [(p, lambda t, i=i: t[i]) for i, p in enumerate(PHASES)] + [
        ("whole step", sum)
    ]:
        columns = [[pick(t) * 1e3 for t in times[name]] for name in names]
        ratio = statistics.median(a / b for a, b in zip(*columns, strict=True))
        cells = "".join(f"{statistics.median(column):16,.1f}" for column in columns)
        print(f"{title:18}{cells}{ratio:9.3f}")

    print("-- loss + matching alone, milliseconds")
    for size in (2, 8, 16):
        our_time, their_time, ratio = loss_alone(theirs, size, options.boxes, 5, device)
        title = f"batch {size}"
        print(f"{title:18}{our_time * 1e3:16,.1f}{their_time * 1e3:16,.1f}{ratio:9.3f}")


if __name__ == "__main__":
    main()
