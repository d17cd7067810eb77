"""`shakedown check`: what can be said before the data, the GPU or a training step is there."""

import torch

from lib.datasets import BOX_FORMATS, FORMATS
from lib.loops.schedule import Plan
from lib.params import Params, resolve_path
from lib.preflight.audit import census_checks
from lib.preflight.contracts import accepts_sizes, plan_checks, planned_machine
from lib.run import Check, shown
from lib.tasks import TASKS
from lib.tasks.task import head_width

GENERATED = ("demo", "scenes", "scenes_yolo")  # formats that write their data themselves
LAYOUTS = {
    "folder": "{root}/{train}/CLASS/IMAGE and {root}/{val}/CLASS/IMAGE",
    "coco": "{root}/annotations/instances_{train}.json and ..._{val}.json, pictures in "
    "{root}/{train} and {root}/{val}",
    "yolo": "{root}/images/{train} and {root}/labels/{train}, the same for {val}, or as a YAML in "
    "{root} says",
}


def check(params: Params) -> int:
    """Print the table of checks; returns the exit code: 0 all passed, 3 one failed.

    Raises BadInput for what no run could start with.
    """
    num_train, num_classes, checks = _data(params)
    checks += [_network(params, num_classes), accepts_sizes(params, num_classes)]
    if num_train:
        plan = Plan(params, num_train)
        lr = None if params.optim.lr == "auto" else params.effective_lr()
        checks += plan_checks(plan, lr)
    checks.append(planned_machine(params))
    for item in checks:
        mark = "ok" if item.passed else {"error": "FAILED"}.get(item.severity, item.severity)
        print(f"{mark:>8}  {item.title}: {shown(item.value)}")
        if not item.passed:
            print(f"{'':>8}  {item.advice}")
    failed = [item for item in checks if item.severity == "error" and not item.passed]
    noted = [item for item in checks if item.severity != "error" and not item.passed]
    print(f"{len(checks)} checks, {len(failed)} failed, {len(noted)} to note")
    return 3 if failed else 0


def _data(params: Params) -> tuple[int | None, int, list[Check]]:
    """Training images (None: not known yet), classes, and what the data says of itself."""
    data, root = params.data, resolve_path(params.data.root)
    stated = data.classes if isinstance(data.classes, int) else len(data.classes or ())
    if data.format not in GENERATED and not root.is_dir():
        number = f"{data.num_train_images:,} training images" if data.num_train_images else \
            "an unknown number of training images (state data.num_train_images to plan with it)"
        missing = Check(
            "data_there", "the data is there", f"missing: {root}", "there", False, "warning",
            f"Put it at {LAYOUTS[data.format].format(root=root, train=data.train, val=data.val)}, "
            f"or set data.root. Planned with {number}.",
        )
        return data.num_train_images, params.model.num_classes or stated or 1000, [missing]
    train, val = (FORMATS | BOX_FORMATS)[data.format](data, params.model.in_chans)
    census = [vars(train.census), vars(val.census)]
    there = Check("data_there", "the data is there",
                  f"{len(train):,} training and {len(val):,} validation images of "
                  f"{len(train.class_names)} classes in {root}", "there", True)
    return len(train), head_width(params, train.class_names), [there, *census_checks(census)]


def _network(params: Params, num_classes: int) -> Check:
    with torch.device("meta"):  # shapes only, no memory
        model = TASKS[params.task].network(params, num_classes, pretrained=False)
    if params.model.weights:  # BadInput for a file that is none
        found = TASKS[params.task].read_weights(params)
        fitting = [name for name, own in model.state_dict().items()
                   if name in found and found[name].shape == own.shape]
        source = f", {len(fitting)} of {len(model.state_dict())} tensors in {params.model.weights}"
    else:
        source = ""
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return Check("network", f"{params.model.name} for {num_classes} classes",
                 f"{num_parameters / 1e6:,.2f} M parameters{source}", "builds", num_parameters > 0)
