"""C2: no key of the params is read by nobody, and changing any of them changes something.

Twice, because each way alone can be fooled: the sources must read every field, and every field,
changed alone, must change what the program does.
"""

import ast
import contextlib
import io
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lib import params as params_module
from lib.errors import BadInput, BudgetReached
from lib.loops import distributed, lr_finder, optim
from lib.loops.device import pick_device
from lib.loops.ema import Ema
from lib.loops.overfit import overfit
from lib.loops.schedule import Plan
from lib.loops.train import train
from lib.params import KEYS, ROOT, Params, Section
from lib.preflight import static
from lib.run import Run, open_run
from lib.tasks import build_task
from lib.watch import diagnose, plots, sinks

LEAVES = list(params_module.flatten(Params()))
CPU = torch.device("cpu")


# --------------------------------------------------------------------------------------------
# The sources read every field
# --------------------------------------------------------------------------------------------

SECTIONS: dict[str, tuple[type[Section], str]] = {"Params": (Params, "")} | {
    entry.annotation.__name__: (entry.annotation, f"{key}.")
    for key, entry in KEYS.items()
    if isinstance(entry.annotation, type) and issubclass(entry.annotation, Section)
}
"""Class name of a section: the class, and its dotted prefix."""


class Reads(ast.NodeVisitor):
    """Collects the dotted keys that a source reads, by following names to the section they hold.

    A name holds a section where its annotation says so, or where it was assigned from one:
    `config = params.train`, `self.params`, `plan.params.optim`, `run.params()`.
    """

    def __init__(self, text: str):
        tree = ast.parse(text)
        self.found: set[str] = set()
        self.holds: list[dict[str, str]] = [{}]
        self.words = {node.value for node in ast.walk(tree)
                      if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        self.visit(tree)

    def section(self, node: ast.expr) -> str | None:
        """Name of the section class that an expression gives, or None."""
        if isinstance(node, ast.Name):
            for scope in reversed(self.holds):
                if node.id in scope:
                    return scope[node.id]
            return "Params" if node.id == "params" else None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            return "Params" if node.func.attr == "params" else None
        if isinstance(node, ast.Attribute):
            if owner := self.section(node.value):
                entry = SECTIONS[owner][0].model_fields.get(node.attr)
                name = getattr(entry and entry.annotation, "__name__", "")
                return name if name in SECTIONS else None
            return "Params" if node.attr in ("params", "_params") else None
        return None

    def assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, other in zip(target.elts, value.elts, strict=False):
                self.assign(one, other)
        elif isinstance(target, ast.Name):
            if found := self.section(value):
                self.holds[-1][target.id] = found
            else:
                self.holds[-1].pop(target.id, None)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self.assign(target, node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        annotated = {}
        for argument in [*node.args.args, *node.args.kwonlyargs]:
            name = ast.unparse(argument.annotation).split(".")[-1] if argument.annotation else ""
            if name in SECTIONS:
                annotated[argument.arg] = name
        self.holds.append(annotated)
        self.generic_visit(node)
        self.holds.pop()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = self.section(node.value)
        if owner and isinstance(node.ctx, ast.Load):
            self.found.add(SECTIONS[owner][1] + node.attr)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """`getattr(params.logging, name)` reads the fields whose names the file spells out."""
        if isinstance(node.func, ast.Name) and node.func.id == "getattr":
            if owner := self.section(node.args[0]):
                self.found |= {SECTIONS[owner][1] + word for word in self.words}
        self.generic_visit(node)


def sources() -> Iterator[str]:
    for path in sorted((ROOT / "lib").rglob("*.py")):
        if path.name != "params.py":
            yield path.read_text()
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        yield "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


READ = set().union(*(Reads(text).found for text in sources()))

READ_IN_PARAMS = {
    # `Params.effective_lr` is called by the training and by every plan; its three inputs are read
    # nowhere else by necessity.
    "optim.lr", "optim.lr_rule", "optim.lr_batch_size",
    # So is `Params.headline` by every task, and by the report of a run that never began.
    "detect.headline",
}


@pytest.mark.parametrize("key", LEAVES)
def test_c2_the_sources_read_it(key):
    assert key in READ | READ_IN_PARAMS, f"nothing outside params.py reads {key}"


@pytest.mark.parametrize(
    "text, found",
    [
        ("params.train.steps", {"train", "train.steps"}),
        ("self.params.data.augment.hflip", {"data", "data.augment", "data.augment.hflip"}),
        ("def f(optim: Optim): return optim.lr", {"optim.lr"}),
        ("def f(ema: params.Ema): self.x = ema.decay", {"train.ema.decay"}),
        ("a, config = 1, params.train\nconfig.steps", {"train", "train.steps"}),
        ("run.params().seed", {"seed"}),
        ("def f(machine: Other): machine.gpu", set()),
        ("config = params.train\nconfig = other\nconfig.steps", {"train"}),
        ("def f(optim: Optim): pass\noptim.lr", set()),
        ("getattr(params.logging, name)\nNAMES = {'csv': 1}", {"logging", "logging.csv"}),
    ],
)
def test_the_scan_follows_sections_and_takes_nothing_else_for_one(text, found):
    assert Reads(text).found & set(KEYS) == found


# --------------------------------------------------------------------------------------------
# Changing a field changes something
# --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A picture folder with two versions of each split: few, coloured, not square."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("train2", 7), ("val", 3), ("val2", 4)):
        for label in range(4):
            for i in range(count):
                path = root / split / f"class{label}" / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                low = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
                Image.fromarray(low).resize((48, 40), Image.Resampling.BICUBIC).save(path)
    return root


BASE = {
    "model.name": "test_resnet", "data.format": "folder", "data.image_size": 16,
    "data.num_workers": 0, "optim.lr": 0.05, "train.steps": 6, "train.epochs": None,
    "train.batch_size": 8, "machine.device": "cpu", "lr_finder.steps": 20,
    "lr_finder.trial_steps": 2, "overfit.num_batches": 1, "overfit.batch_size": 4,
    "overfit.steps": 3, "logging.csv": False, "logging.tensorboard": False,
    "data.augment.scale": [0.5, 1.0],
}


DETECT = {
    "task": "detect", "model.name": "yolo_n", "data.format": "scenes", "data.image_size": 64,
    "data.root": lambda world: str(world.scenes), "train.batch_size": 4,
    "data.augment.scale": list(Params().data.augment.scale),
}
"""The changes to BASE that make it a run of detection."""


def detect(**changes: Any) -> dict[str, Any]:
    return DETECT | {key.replace("__", "."): value for key, value in changes.items()}


@dataclass
class World:
    """What an observation may use besides the params."""

    folder: Path
    scenes: Path
    tmp_path: Path
    monkeypatch: pytest.MonkeyPatch
    runs: int = 0

    def params(self, **changes: Any) -> Params:
        file = self.tmp_path / "p.yaml"
        file.write_text("train: {epochs: 1}\n")
        return params_module.load(file, {"data.root": str(self.folder)} | BASE | changes)

    def run(self, params: Params) -> Run:
        self.runs += 1
        run = open_run(params, self.tmp_path / f"run{self.runs}", owner="test")
        run.start("train")
        return run

    def trained(self, params: Params) -> tuple[Run, str]:
        """A run folder after a real training, and why it ended."""
        run = self.run(params)
        try:
            why = distributed.launch(params, run)
        except BudgetReached as error:
            why = str(error)
        run.close_records()
        return run, why


def steps_of(run: Run, *names: str) -> list[tuple]:
    return [tuple(row[name] for name in names) for row in run.rows("train")
            if row["kind"] == "step"]


def events_of(run: Run, event: str) -> list[int]:
    return [row["step"] for row in run.rows("train") if row.get("event") == event]


def raised(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except (BadInput, KeyError) as error:
        return f"{type(error).__name__}: {error}"


# -- what can be observed; each returns something that can be compared -------------------------


def weights(params: Params, world: World) -> float:
    """The network before any training."""
    state = build_task(params, CPU).model.state_dict()
    return float(sum(tensor.double().abs().sum() for tensor in state.values()))


def structure(params: Params, world: World) -> list:
    state = build_task(params, CPU).model.state_dict()
    return [(name, tuple(tensor.shape)) for name, tensor in state.items()]


def training_output(params: Params, world: World) -> list:
    """What the network says in training mode, with its own randomness seeded."""
    model = build_task(params, CPU).model.train()
    torch.manual_seed(0)
    return model(torch.linspace(-1, 1, 4 * 3 * 32 * 32).view(4, 3, 32, 32)).tolist()


def memory_format(params: Params, world: World) -> tuple:
    weight = next(w for w in build_task(params, CPU).model.parameters()
                  if w.dim() == 4 and min(w.shape) > 1)
    return weight.stride()


def opened(params: Params, world: World) -> Any:
    """What the census finds, or why the data is refused."""
    return raised(lambda: build_task(params, CPU).census())


def train_images(params: Params, world: World) -> list:
    task = build_task(params, CPU)
    batch = next(task.train_batches(Plan(params, task.num_train).requests()))
    return task.to_device(batch)["images"].tolist()


def val_images(params: Params, world: World) -> list:
    task = build_task(params, CPU)
    return task.to_device(next(task.eval_batches("val")))["images"].tolist()


def decoding_threads(params: Params, world: World) -> int:
    task = build_task(params, CPU)
    batches = task.train_batches(Plan(params, task.num_train).requests())
    next(batches)
    found = sum(thread.name.startswith("decode") for thread in threading.enumerate())
    batches.close()
    return found


def learning_rates(params: Params, world: World) -> list[float]:
    plan = Plan(params, 24)
    return [plan.lr_factor(update) for update in range(plan.num_steps)]


def plan_facts(params: Params, world: World) -> tuple:
    plan = Plan(params, 24)
    requests = [(r.step, len(r.indices), r.size, r.positions, r.is_late) for r in plan.requests()]
    return plan.facts(), requests


def optimizer_state(params: Params, world: World) -> tuple:
    model = build_task(params, CPU).model
    built = optim.build(optim.param_groups(model, params.optim), params.optim, 0.1)
    optim.set_lr(built, 0.1)
    return type(built).__name__, [
        {name: value for name, value in group.items() if name != "params"}
        for group in built.param_groups
    ]


def lr_trained_with(params: Params, world: World) -> list:
    return steps_of(world.trained(params)[0], "lr")


def losses_trained(params: Params, world: World) -> list:
    return steps_of(world.trained(params)[0], "loss")


def how_training_ends(params: Params, world: World) -> tuple:
    run, why = world.trained(params)
    return why, len(steps_of(run, "step"))


def checkpoints(params: Params, world: World) -> list[str]:
    """Files and folders of the checkpoints that are left at the end."""
    run, _ = world.trained(params)
    return sorted(str(path.relative_to(run.checkpoints)) for path in run.checkpoints.rglob("*"))


def saves(params: Params, world: World) -> list[int]:
    return events_of(world.trained(params)[0], "saved")


def ema_decays(params: Params, world: World) -> list[float]:
    ema = Ema(torch.nn.Linear(1, 1), params.train.ema)
    return [ema.decay_at(update) for update in range(5)]


def analysis_checks(params: Params, world: World) -> list[str]:
    metrics = {f"{split}/{name}": 0.5 for split in ("val", "train")
               for name in ("loss", "top1", "top1_relabelled")}
    guessing = {"loss": 1.0, "top1": 0.1}
    found = diagnose.analysis_checks(params, "val/top1", metrics, guessing, None, 1.0)
    return [(check.id, check.limit) for check in found]


def notebook_cell(stage: str, containing: str, **names: Any) -> dict[str, Any]:
    """Run the one code cell of a notebook that contains a text; returns its names."""
    (path,) = (ROOT / "notebooks").glob(f"*_{stage}.ipynb")
    texts = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]
             if cell["cell_type"] == "code"]
    (text,) = [text for text in texts if containing in text]
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(text, str(path), "exec"), names)
    return names


def frozen_images(params: Params, world: World) -> list[int]:
    names = notebook_cell("overfit", "frozen_batches", params=params, device="cpu", plots=plots)
    return [len(batch["labels"]) for batch in names["frozen"]]


def overfit_steps(params: Params, world: World) -> list:
    task = build_task(params, CPU)
    run = world.run(params)
    overfit(task, params, run, task.frozen_batches(1, 8))
    return steps_of(run, "lr")


def sweep(params: Params, world: World) -> tuple:
    found = lr_finder.sweep(build_task(params, CPU), params, world.run(params))
    return found.lrs.tolist(), found.smoothed.tolist()


def trial(params: Params, world: World) -> int:
    return len(lr_finder.trial(build_task(params, CPU), params, 0.01))


def device(params: Params, world: World) -> str:
    return str(raised(lambda: pick_device(params.machine)))


def launched(params: Params, world: World) -> str:
    return raised(lambda: distributed.launch(params, world.run(params)))


def static_check(params: Params, world: World) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        static.check(params)
    return said.getvalue()


def dollars(params: Params, world: World) -> float:
    run = world.run(params)
    run.records_file.write_text("\n".join(
        json.dumps({"kind": "event", "stage": "train", "time": t, "event": e})
        for t, e in ((0.0, "stage started"), (3600.0, "x"))) + "\n")
    return run.write_summary()["dollars"]


def compilations(params: Params, world: World) -> int:
    """How often the training asks torch to compile; the compiler itself would take a minute."""
    calls = []
    world.monkeypatch.setattr(torch, "compile", lambda model, **_: calls.append(model) or model)
    world.trained(params)
    return len(calls)


def flushes(params: Params, world: World) -> int:
    """How often the records were handed to the readers."""
    run, seen = world.run(params), []
    flush = run.flush
    run.flush = lambda: (seen.append(1), flush())
    train(build_task(params, CPU), params, run, 0.05)
    return len(seen)


def copies(params: Params, world: World) -> list[str]:
    return sinks.wanted(params)


def wandb_project(params: Params, world: World) -> str:
    """The project a real offline W&B run gets."""
    world.monkeypatch.setattr(sinks, "wandb_key_present", lambda: False)
    sink = sinks.SINKS["wandb"](world.run(params), params)
    sink.close()
    return sink._run.project


def headline(params: Params, world: World) -> str:
    return build_task(params, CPU).headline


def first_losses(params: Params, world: World) -> dict[str, float]:
    task = build_task(params, CPU)
    losses = task.losses(task.model.train(), task.to_device(task.sample_batch("train", 4)))
    return {term: value.item() for term, value in losses.items()}


def what_trains(params: Params, world: World) -> tuple[set[str], set[str]]:
    """Parameters that get a gradient, and modules in training mode."""
    model = build_task(params, CPU).model.train()
    return ({name for name, weight in model.named_parameters() if weight.requires_grad},
            {name for name, module in model.named_modules() if module.training})


def saved_weights(world: World, **changes: Any) -> str:
    from safetensors.torch import save_file

    state = build_task(world.params(**changes), CPU).model.state_dict()
    path = world.tmp_path / "start.safetensors"
    zeros = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in state.items()}
    save_file(zeros, path)
    return str(path)


def saved_detector(world: World) -> str:
    changes = DETECT | {"model.name": "rtdetr_tiny", "data.root": str(world.scenes)}
    return saved_weights(world, **changes)


def no_hub(world: World) -> None:
    """No published weights in any cache and no network to fetch them."""
    import huggingface_hub.constants as constants

    world.monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    world.monkeypatch.setattr(constants, "HF_HUB_CACHE", str(world.tmp_path / "hub"))


def start_of_training(params: Params, world: World) -> Any:
    no_hub(world)
    return raised(lambda: weights(params, world))


# key: (its other value, what then changes[, what both sides are besides])
OBSERVED: dict[str, tuple] = {
    "task": ("detect", opened, {"data.augment.scale": DETECT["data.augment.scale"]},
             {"data.format": "scenes", "model.name": "yolo_n", "data.image_size": 64,
              "data.root": DETECT["data.root"]}),
    "seed": (1, weights),
    "model.name": ("test_efficientnet", structure),
    "model.pretrained": (True, start_of_training),
    "model.weights": (saved_weights, weights),
    "model.num_classes": (9, structure),
    "model.in_chans": (1, structure, {}, {"data.mean": [0.5], "data.std": [0.5]}),
    "model.drop_rate": (0.9, training_output),
    "model.drop_path_rate": (0.9, losses_trained),
    "data.format": ("demo", opened, {"data.root": lambda world: str(world.tmp_path / "none")}),
    "data.root": (lambda world: str(world.tmp_path), opened),
    "data.train": ("train2", opened),
    "data.val": ("val2", opened),
    "data.classes": (2, opened),
    "data.num_train_images": (25, opened),
    "data.num_val_images": (13, opened),
    "data.image_size": (24, val_images),
    "data.letterbox": (True, val_images, detect()),
    "data.single_class": (True, opened, detect()),
    "data.val_crop": (0.5, val_images),
    "data.interpolation": ("bicubic", val_images),
    "data.mean": ([0.1, 0.2, 0.3], val_images),
    "data.std": ([0.1, 0.2, 0.3], val_images),
    "data.augment.scale": ([0.1, 0.2], train_images),
    "data.augment.ratio": ([2.0, 2.1], train_images),
    "data.augment.hflip": (1.0, train_images, {"data.augment.hflip": 0.0}),
    "data.augment.color_jitter": (0.5, train_images),
    "data.augment.mixup": (1.0, train_images),
    "data.augment.cutmix": (1.0, train_images),
    "data.boxes.hflip": (1.0, train_images, detect()),
    "data.boxes.zoom_out": (1.0, train_images, detect()),
    "data.boxes.max_zoom_out": (1.5, train_images, detect(data__boxes__zoom_out=1.0)),
    "data.boxes.iou_crop": (1.0, train_images, detect()),
    "data.boxes.scale": ([0.5, 0.6], train_images, detect()),
    "data.boxes.translate": (0.2, train_images, detect()),
    "data.boxes.mosaic": (1.0, train_images, detect()),
    "data.boxes.mixup": (1.0, train_images, detect()),
    "data.boxes.plain_epochs": (1.0, train_images, detect(data__boxes__mosaic=1.0)),
    "data.boxes.multi_scale": (0.5, plan_facts, detect()),
    "data.boxes.hue": (0.2, train_images, detect()),
    "data.boxes.saturation": (0.5, train_images, detect()),
    "data.boxes.brightness": (0.5, train_images, detect()),
    "data.boxes.contrast": (0.5, train_images, detect()),
    "data.num_workers": (2, decoding_threads),
    "optim.name": ("adamw", optimizer_state),
    "optim.lr": (0.06, lr_trained_with),
    "optim.lr_batch_size": (4, lr_trained_with),
    "optim.lr_rule": ("sqrt", lr_trained_with, {"optim.lr_batch_size": 4}),
    "optim.backbone_lr": (0.1, optimizer_state, detect(model__name="rtdetr_tiny")),
    "optim.momentum": (0.5, optimizer_state),
    "optim.beta2": (0.9, optimizer_state, {"optim.name": "adamw"}),
    "optim.nesterov": (False, optimizer_state),
    "optim.weight_decay": (0.1, optimizer_state),
    "optim.norm_weight_decay": (0.1, optimizer_state),
    "optim.clip_norm": (1e-3, losses_trained),
    "optim.schedule": ("constant", learning_rates),
    "optim.warmup_epochs": (1.0, learning_rates),
    "optim.warmup_start": (0.5, learning_rates, {"optim.warmup_epochs": 1.0}),
    "optim.flat": (0.5, learning_rates),
    "optim.final_lr": (0.5, learning_rates),
    "optim.milestones_epochs": ([1.0], learning_rates, {"optim.schedule": "multistep"}),
    "optim.gamma": (0.5, learning_rates,
                    {"optim.schedule": "multistep", "optim.milestones_epochs": [1.0]}),
    "train.epochs": (2.0, plan_facts, {"train.steps": None, "train.epochs": 1.0}),
    "train.steps": (5, plan_facts),
    "train.batch_size": (4, plan_facts),
    "train.accumulate": (2, plan_facts),
    "train.precision": ("bf16", losses_trained),
    "train.label_smoothing": (0.5, losses_trained),
    "train.image_sizes": ([24, 32], plan_facts),
    "train.ema.decay": (0.9, checkpoints),
    "train.ema.warmup": (False, ema_decays, {"train.ema.decay": 0.9}),
    "train.eval_every_epochs": (0.5, plan_facts),
    "train.save_every_steps": (1, saves),
    "train.keep_best": (4, checkpoints, {"train.eval_every_epochs": 0.3}),
    "train.target": (0.9, analysis_checks),
    "train.stop_at_target": (True, how_training_ends,
                             {"train.target": 1e-9, "train.eval_every_epochs": 0.3,
                              "data.classes": 1, "train.batch_size": 2}),
    "train.patience_evals": (1, how_training_ends,
                             {"train.eval_every_epochs": 0.3, "data.classes": 1,
                              "train.batch_size": 2}),
    "detect.headline": ("mAP50", headline, detect()),
    "detect.freeze_norms": (True, what_trains, detect(
        model__name="rtdetr_tiny", model__weights=saved_detector)),
    "detect.box_gain": (1.0, first_losses, detect()),
    "detect.cls_gain": (1.0, first_losses, detect()),
    "detect.dfl_gain": (1.0, first_losses, detect()),
    "overfit.num_batches": (2, frozen_images),
    "overfit.batch_size": (5, frozen_images),
    "overfit.steps": (4, overfit_steps),
    "overfit.lr": (0.002, overfit_steps),
    "lr_finder.min_lr": (1e-5, sweep),
    "lr_finder.max_lr": (1.0, sweep),
    "lr_finder.steps": (21, sweep),
    "lr_finder.smoothing": (0.5, sweep),
    "lr_finder.trial_steps": (3, trial),
    "machine.device": ("cuda", device),
    "machine.gpu": ("A10G", static_check, {"machine.device": "auto"}),
    "machine.gpus": (64, device),
    "machine.nodes": (2, launched),
    "machine.dollars_per_hour": (2.0, dollars),
    "machine.channels_last": (False, memory_format),
    "machine.compile": (True, compilations),
    "budget.hours": (1e-9, how_training_ends),
    "budget.dollars": (1e-9, how_training_ends, {"machine.dollars_per_hour": 1.0}),
    "logging.every_steps": (1, flushes),
    "logging.csv": (True, copies),
    "logging.tensorboard": (True, copies),
    "logging.wandb": (True, copies),
    "logging.wandb_project": ("another", wandb_project),
}


BEFORE: dict[tuple, Any] = {}
"""Observations already made of unchanged params; many keys share them."""


def test_c2_every_field_has_an_observation():
    """A new field comes with what it changes; a removed one takes its entry along."""
    assert list(OBSERVED) == LEAVES


@pytest.mark.parametrize("key", OBSERVED)
def test_c2_changing_it_changes_something(key, folder, scenes, tmp_path, monkeypatch):
    value, observe, base, along = (*OBSERVED[key], {}, {})[:4]
    world = World(folder, scenes, tmp_path, monkeypatch)

    def real(given: Any) -> Any:
        return given(world) if callable(given) else given

    base, along = ({name: real(given) for name, given in part.items()} for part in (base, along))
    before = world.params(**base)
    after = world.params(**(base | {key: real(value)} | along))
    assert {name for name, _, _ in params_module.difference(before, after)} == {key, *along}
    known = observe, params_module.digest(before)
    if known not in BEFORE:
        BEFORE[known] = observe(before, world)
        assert observe(before, world) == BEFORE[known], "not the same twice: it shows nothing"
    assert observe(after, world) != BEFORE[known], f"changing {key} changes nothing observed"
