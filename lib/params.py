"""The typed, frozen tree of a params file: load it, override it, compare it, digest it.

One YAML file is one whole run. There are no includes: what a file does not say is the default
written here, and the run folder keeps the resolved copy. Torch is never imported here.
"""

import difflib
import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lib import strict_yaml
from lib.errors import BadInput

ROOT = Path(__file__).resolve().parent.parent


# --------------------------------------------------------------------------------------------
# The tree
# --------------------------------------------------------------------------------------------

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Pixels = Annotated[int, Field(ge=8)]
Size = Pixels | tuple[Pixels, Pixels]
"""Side of a square, or [height, width]."""


def as_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """A Size as (height, width)."""
    return (size, size) if isinstance(size, int) else size


class Section(BaseModel):
    """A frozen group of keys; an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


class Model(Section):
    """The network."""

    name: str = "resnet50"
    """classify: any timm model; detect: rtdetr_{tiny,r18,r34,r50,r101} or yolo_{n,s,m,l,x}."""
    pretrained: bool = False
    """Start from timm's published weights (needs the network once); detect: the backbone does."""
    weights: str | None = None
    """Start from this file (.safetensors, .pth) or outputs/RUN/checkpoints/best instead."""
    num_classes: Count | None = None
    """Width of the head; null: as many as the data has."""
    in_chans: Count = 3
    """Input channels: 3 reads colour, 1 reads grey."""
    drop_rate: Fraction = 0.0
    """Dropout before the head."""
    drop_path_rate: Fraction = 0.0
    """Stochastic depth, for the models that have it."""


class Augment(Section):
    """Training-time augmentation, a pure function of (seed, epoch, sample)."""

    scale: tuple[Positive, Positive] = (0.08, 1.0)
    """Range of the random-resized-crop's share of the image area."""
    ratio: tuple[Positive, Positive] = (0.75, 4 / 3)
    """Range of the random-resized-crop's aspect ratio (width / height)."""
    hflip: Fraction = 0.5
    """Probability of a horizontal flip."""
    color_jitter: NonNegative = 0.0
    """Brightness, contrast and saturation each change by up to this factor."""
    mixup: NonNegative = 0.0
    """Alpha of mixup's Beta distribution (Zhang et al. 2018); 0 is off."""
    cutmix: NonNegative = 0.0
    """Alpha of cutmix's Beta distribution (Yun et al. 2019); 0 is off."""


class BoxAugment(Section):
    """Training-time augmentation of pictures with boxes. The defaults change nothing."""

    hflip: Fraction = 0.0
    """Probability of a horizontal flip."""
    zoom_out: Fraction = 0.0
    """Probability of placing the picture on a larger grey canvas (SSD, RT-DETR)."""
    max_zoom_out: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 4.0
    """Largest side of that canvas, in sides of the picture."""
    iou_crop: Fraction = 0.0
    """Probability of a crop that keeps a box by a minimum IoU (SSD, RT-DETR)."""
    scale: tuple[Positive, Positive] = (1.0, 1.0)
    """Range of the zoom about the centre."""
    translate: Fraction = 0.0
    """Largest shift, a share of the network's input."""
    mosaic: Fraction = 0.0
    """Probability of joining four pictures around a random point."""
    mixup: Fraction = 0.0
    """Probability of blending in a second sample, boxes and all."""
    plain_epochs: NonNegative = 0.0
    """The last epochs of the run go without mosaic and mixup."""
    multi_scale: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Each step's input is scaled by up to this share, in whole strides of 32 pixels."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Largest turn of the colour circle, a share of it."""
    saturation: NonNegative = 0.0
    """Saturation changes by up to this factor."""
    brightness: NonNegative = 0.0
    """Brightness changes by up to this factor."""
    contrast: NonNegative = 0.0
    """Contrast changes by up to this factor."""

    @property
    def changes_colour(self) -> bool:
        return any((self.hue, self.saturation, self.brightness, self.contrast))


class Data(Section):
    """Where the images are and how they become tensors."""

    format: Literal["demo", "folder", "scenes", "scenes_yolo", "coco", "yolo"] = "demo"
    """classify: demo or folder (ROOT/SPLIT/CLASS/IMAGE); detect: coco, yolo, or demo scenes."""
    root: str = "data/digits"
    """Folder of the data set; relative to the project."""
    train: str = "train"
    """Sub-folder with the training split."""
    val: str = "val"
    """Sub-folder with the validation split."""
    classes: Count | Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Keep this many classes (chosen by a stable digest) or these; null: all."""
    num_train_images: Count | None = None
    """Training images the census must find; lets `check` plan before the data is there."""
    num_val_images: Count | None = None
    """Validation images the census must find."""
    image_size: Size = 224
    """What the network sees, pixels: the side of a square, or [height, width]."""
    letterbox: bool = False
    """Keep the picture's aspect ratio on a grey ground; false stretches it to image_size."""
    single_class: bool = False
    """Make every class one, named "object"."""
    val_crop: Annotated[float, Field(gt=0, le=1)] = 0.875
    """Share of the resized image kept by the centre crop in validation."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Resampling filter, antialiased."""
    mean: tuple[Finite, ...] = (0.485, 0.456, 0.406)
    """Channel means subtracted, of values in [0, 1]."""
    std: tuple[Positive, ...] = (0.229, 0.224, 0.225)
    """Channel standard deviations divided by, of values in [0, 1]."""
    augment: Augment = Augment()
    """Training-time augmentation of classify."""
    boxes: BoxAugment = BoxAugment()
    """Training-time augmentation of detect."""
    num_workers: Annotated[int, Field(ge=0)] = 4
    """Decoding threads; 0 decodes in the training thread. The batches are the same."""

    @property
    def input_size(self) -> tuple[int, int]:
        """image_size as (height, width)."""
        return as_pair(self.image_size)


class Optim(Section):
    """Optimizer and learning-rate schedule."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Optimizer."""
    lr: Positive | Literal["auto"] = "auto"
    """Peak learning rate; auto takes the LR finder's suggestion."""
    lr_batch_size: Count | None = None
    """Global batch the LR is quoted at; null: use the LR as it stands."""
    lr_rule: Literal["linear", "sqrt"] = "linear"
    """How the LR scales from lr_batch_size to train.batch_size (Goyal et al. 2017)."""
    backbone_lr: Positive = 1.0
    """Share of the LR that a detector's backbone trains with."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """SGD's momentum, AdamW's beta1."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """AdamW's second-moment decay; SGD ignores it."""
    nesterov: bool = True
    """Nesterov momentum; SGD only."""
    weight_decay: NonNegative = 1e-4
    """Weight decay of convolution and linear weights."""
    norm_weight_decay: NonNegative = 0.0
    """Weight decay of norm layers, biases and other parameters."""
    clip_norm: Positive | None = None
    """Clip the gradient's global L2 norm to this; null: no clipping."""
    schedule: Literal["constant", "cosine", "one_cycle", "multistep"] = "cosine"
    """Shape of the learning rate over the run."""
    warmup_epochs: NonNegative = 0.0
    """Epochs from warmup_start x LR up to LR."""
    warmup_start: Annotated[float, Field(gt=0, le=1)] = 0.04
    """Share of the peak LR that warm-up (and one_cycle) starts from."""
    flat: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the run, warm-up included, that cosine stays at its peak (flat-cosine)."""
    final_lr: Fraction = 0.0
    """Share of the peak LR at the last step of cosine and one_cycle."""
    milestones_epochs: tuple[Positive, ...] = ()
    """Epochs at which multistep multiplies the LR by gamma."""
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """multistep's factor."""


class Ema(Section):
    """Exponential moving average of weights and buffers."""

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay per step at the end of warm-up; 0 is off."""
    warmup: bool = True
    """Start with a short horizon: decay(n) = min(decay, (1 + n) / (10 + n))."""


class Train(Section):
    """The long run."""

    epochs: Positive | None = None
    """Length in epochs. Exactly one of epochs, steps."""
    steps: Count | None = None
    """Length in optimizer steps. Exactly one of epochs, steps."""
    batch_size: Count = 256
    """Global batch: images a step over all devices and accumulation."""
    accumulate: Count = 1
    """Micro-batches a step; the global batch stays the same."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast precision of forward and loss; weights stay fp32."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target spread over all classes (Szegedy et al. 2016)."""
    image_sizes: tuple[Size, ...] = ()
    """Progressive resize: training sizes of equal parts of the run; empty: image_size."""
    ema: Ema = Ema()
    """Moving average that is evaluated and delivered."""
    eval_every_epochs: Positive = 1.0
    """Epochs between evaluations; the last step is always evaluated."""
    save_every_steps: Count | None = None
    """Steps between saves of `last`, besides the save at each evaluation."""
    keep_best: Count = 1
    """Checkpoints of the best evaluations that are kept."""
    target: Fraction | None = None
    """Headline validation metric the run must reach to pass (top-1; detect.headline)."""
    stop_at_target: bool = False
    """End the run as soon as the target is reached."""
    patience_evals: Count | None = None
    """End the run after this many evaluations without a better one; null: never."""

    @model_validator(mode="after")
    def _one_length(self) -> "Train":
        given = [name for name in ("epochs", "steps") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"needs exactly one of epochs, steps (has {' and '.join(given) or 'neither'}); "
                + ("set the other to null" if given else "set one")
            )
        return self

    @model_validator(mode="after")
    def _target_to_stop_at(self) -> "Train":
        if self.stop_at_target and self.target is None:
            raise ValueError("stop_at_target needs a target; set train.target")
        return self

    @model_validator(mode="after")
    def _even_micro_batches(self) -> "Train":
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} does not split into accumulate {self.accumulate} "
                "equal micro-batches"
            )
        return self


class Detect(Section):
    """What only detection has."""

    headline: Literal["mAP", "mAP50"] = "mAP"
    """The metric that best, target and patience follow: COCO's AP, or AP at IoU 0.5."""
    freeze_norms: bool = False
    """Keep stem and batch norms of RT-DETR's pretrained backbone fixed, as published for R50."""
    box_gain: NonNegative = 7.5
    """Weight of the one-stage detector's box term (CIoU). RT-DETR's weights are the paper's."""
    cls_gain: NonNegative = 0.5
    """Weight of the one-stage detector's class term."""
    dfl_gain: NonNegative = 1.5
    """Weight of the one-stage detector's distribution focal term."""


class Overfit(Section):
    """Gate 2: memorise a few frozen batches."""

    num_batches: Count = 2
    """Frozen batches, without augmentation."""
    batch_size: Annotated[int, Field(ge=2)] = 32
    """Images a frozen batch."""
    steps: Count = 150
    """Most optimizer steps; ends early once everything is memorised."""
    lr: Positive = 1e-3
    """AdamW learning rate, decayed by a cosine; the run's own optimizer is not used here."""


class LrFinder(Section):
    """Gate 3: sweep the learning rate (Smith 2017)."""

    min_lr: Positive = 1e-6
    """First learning rate of the sweep."""
    max_lr: Positive = 10.0
    """Last learning rate of the sweep."""
    steps: Annotated[int, Field(ge=20)] = 100
    """Steps of the sweep."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the loss's exponential smoothing."""
    trial_steps: Annotated[int, Field(ge=0)] = 40
    """Steps of the short training that tests the suggestion; 0: no trial."""

    @model_validator(mode="after")
    def _ordered(self) -> "LrFinder":
        if self.min_lr >= self.max_lr:
            raise ValueError(f"min_lr {self.min_lr:g} must be below max_lr {self.max_lr:g}")
        return self


class Machine(Section):
    """What the run computes on and what that costs."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA where there is one, else Apple's MPS, else the CPU."""
    gpu: str | None = None
    """Accelerator the run is planned for, such as A10G; setup compares it."""
    gpus: Count = 1
    """Devices a node."""
    nodes: Count = 1
    """Nodes."""
    dollars_per_hour: NonNegative = 0.0
    """Price of all nodes together."""
    channels_last: bool = True
    """NHWC memory format, which tensor cores and the CPU's convolutions prefer."""
    compile: bool = False
    """torch.compile the network."""


class Budget(Section):
    """Where the run stops by itself: it saves, reports and exits 4."""

    hours: Positive | None = None
    """Most hours of training."""
    dollars: Positive | None = None
    """Most dollars of training, by machine.dollars_per_hour."""


class Logging(Section):
    """Copies of records.jsonl; none of them can stop or slow the run."""

    every_steps: Count = 10
    """Steps between flushes of the records to disk."""
    csv: bool = True
    """records.csv beside records.jsonl."""
    tensorboard: bool = True
    """TensorBoard event files."""
    wandb: bool = False
    """Weights & Biases: online where a key and the network are there, else offline."""
    wandb_project: str = "shakedown"
    """W&B project."""


FORMATS_OF_TASK = {
    "classify": ("demo", "folder"),
    "detect": ("scenes", "scenes_yolo", "coco", "yolo"),
}
KEYS_OF_TASK = {
    "classify": (
        "model.drop_rate", "model.drop_path_rate", "data.val_crop", "data.augment",
        "train.label_smoothing",
    ),
    "detect": ("data.letterbox", "data.single_class", "data.boxes", "optim.backbone_lr", "detect"),
}
"""Keys and sections that one task alone reads; in a run of another they would change nothing."""


class Params(Section):
    """One whole run."""

    task: Literal["classify", "detect"] = "classify"
    """What is learnt."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the weights, the data order and every augmentation."""
    model: Model = Model()
    """The network."""
    data: Data = Data()
    """Where the images are and how they become tensors."""
    optim: Optim = Optim()
    """Optimizer and learning-rate schedule."""
    train: Train = Train(epochs=10)
    """The long run."""
    detect: Detect = Detect()
    """What only detection has."""
    overfit: Overfit = Overfit()
    """Gate 2."""
    lr_finder: LrFinder = LrFinder()
    """Gate 3."""
    machine: Machine = Machine()
    """What the run computes on and what that costs."""
    budget: Budget = Budget()
    """Where the run stops by itself."""
    logging: Logging = Logging()
    """Copies of the records."""

    @model_validator(mode="after")
    def _channels_agree(self) -> "Params":
        for name in ("mean", "std"):
            if len(getattr(self.data, name)) != self.model.in_chans:
                raise ValueError(
                    f"data.{name} has {len(getattr(self.data, name))} values, "
                    f"model.in_chans is {self.model.in_chans}"
                )
        return self

    @model_validator(mode="after")
    def _task_fits(self) -> "Params":
        if self.data.format not in FORMATS_OF_TASK[self.task]:
            raise ValueError(
                f"task {self.task} cannot learn from data.format {self.data.format!r}; "
                f"it reads {', '.join(FORMATS_OF_TASK[self.task])}"
            )
        if self.detect.freeze_norms and not (self.model.pretrained or self.model.weights):
            raise ValueError(
                "detect.freeze_norms would freeze random weights; set model.pretrained or "
                "model.weights"
            )
        default = Params.model_construct()
        for task, keys in KEYS_OF_TASK.items():
            for key in keys if task != self.task else ():
                value, untouched = self, default
                for name in key.split("."):
                    value, untouched = getattr(value, name), getattr(untouched, name)
                if value != untouched:
                    raise ValueError(
                        f"{key} is set, and only task {task} reads it (task is {self.task}); "
                        "remove it"
                    )
        return self

    @property
    def headline(self) -> str:
        """The metric that best, the target and patience follow."""
        return "val/top1" if self.task == "classify" else f"val/{self.detect.headline}"

    def effective_lr(self, suggestion: float | None = None) -> float:
        """The peak learning rate at `train.batch_size`.

        `suggestion` is the LR finder's; it was found at that batch, so no rule scales it.
        """
        if self.optim.lr == "auto":
            if suggestion is None:
                raise BadInput(
                    "optim.lr is auto and the LR finder has no suggestion; "
                    "run 02_lr_finder first or set optim.lr"
                )
            return suggestion
        if self.optim.lr_batch_size is None:
            return self.optim.lr
        ratio = self.train.batch_size / self.optim.lr_batch_size
        return self.optim.lr * (ratio if self.optim.lr_rule == "linear" else ratio**0.5)


# --------------------------------------------------------------------------------------------
# Reading a file
# --------------------------------------------------------------------------------------------


def resolve_path(path: str | Path) -> Path:
    """A path as given, or relative to the project where it is not found as given."""
    path = Path(path).expanduser()
    return path if path.is_absolute() or path.exists() else ROOT / path


def load(path: str | Path, overrides: dict[str, Any] | None = None) -> Params:
    """Read a params file, apply dotted `overrides`, check every key and value.

    Raises BadInput naming file, line, key and the nearest valid key.
    """
    file = resolve_path(path)
    if file.is_dir():
        raise BadInput(f"{path}: is a folder; give the params file in it")
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInput(f"{path}: no such params file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read as a params file: {error}") from None
    tree, lines = strict_yaml.read(text, str(path))
    for dotted, value in (overrides or {}).items():
        _override(tree, dotted, value)
    return _validate(tree, lines, str(path), overrides or {})


def _override(tree: dict, dotted: str, value: Any) -> None:
    *sections, leaf = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise BadInput(f"override {dotted}: {section} is not a section")
    tree[leaf] = value


def _validate(tree: dict, lines: dict[tuple, int], where: str, overrides: dict) -> Params:
    try:
        # By way of JSON, where strict mode reads a list as a tuple and nothing else is coerced.
        return Params.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        problems = [_problem(item, tree, lines, where, overrides) for item in error.errors()]
        raise BadInput("\n".join(dict.fromkeys(problems))) from None
    except (TypeError, ValueError) as error:
        raise BadInput(f"{where}: {error}") from None


def _problem(item: dict, tree: dict, lines: dict, where: str, overrides: dict) -> str:
    """One pydantic error as `file:line: key: what; what to do`."""
    path = tuple(item["loc"])
    unknown = item["type"] == "extra_forbidden"
    if not unknown:  # pydantic appends the branch of a union: cut to what the tree knows
        while path and ".".join(map(str, path)) not in KEYS:
            path = path[:-1]
    dotted = ".".join(map(str, path))
    if any(dotted == key or dotted.startswith(f"{key}.") for key in overrides):
        place = "override"
    else:
        line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), 1)
        place = f"{where}:{line}"
    if unknown:
        suggestion = nearest_key(dotted)
        hint = f"; did you mean {suggestion}?" if suggestion else ""
        return f"{place}: {dotted}: unknown key{hint}"
    if item["type"] == "value_error":
        return f"{place}: {dotted or 'params'}: {item['ctx']['error']}"
    value = tree
    for key in path:
        value = value[key]
    field = KEYS[dotted]
    return f"{place}: {dotted}: {value!r} is not {describe_type(field.annotation, field.metadata)}"


def describe_type(annotation: Any, metadata: Any = ()) -> str:
    """A field's type as a person writes it: `number > 0 or 'auto'`."""
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false",
             type(None): "null"}
    if annotation in names:
        bounds = [
            f"{sign} {getattr(m, name):g}"
            for entry in metadata
            for m in (getattr(entry, "metadata", None) or [entry])
            for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
            if getattr(m, name, None) is not None
        ]
        return " ".join([names[annotation], *bounds])
    origin = getattr(annotation, "__origin__", None)
    if origin is Literal:
        return " or ".join(map(repr, get_args(annotation)))
    if getattr(annotation, "__metadata__", None):
        return describe_type(annotation.__origin__, annotation.__metadata__)
    if origin is tuple:
        first, *rest = get_args(annotation)
        size = "" if rest[-1] is ... else f"{1 + len(rest)} of "
        return f"a list ({size}{describe_type(first)})"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "a section"
    return " or ".join(describe_type(branch) for branch in get_args(annotation))


def _keys(section: type[Section], prefix: str = "") -> dict[str, Any]:
    keys = {}
    for name, field in section.model_fields.items():
        keys[prefix + name] = field
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys |= _keys(field.annotation, f"{prefix}{name}.")
    return keys


KEYS: dict[str, Any] = _keys(Params)
"""Every dotted key of the tree and its pydantic field."""


def nearest_key(dotted: str) -> str | None:
    """The valid key most like `dotted`: by letters, or by initials (learning_rate: lr; and wd)."""
    section, _, leaf = dotted.rpartition(".")

    def initials(name: str) -> str:
        return "".join(word[0] for word in re.split(r"[_\-]+", name) if word)

    def likeness(key: str) -> float:
        key_section, _, key_leaf = key.rpartition(".")
        same = max(
            difflib.SequenceMatcher(None, leaf, key_leaf).ratio(),
            difflib.SequenceMatcher(None, dotted, key).ratio(),
            0.9 if initials(leaf) == key_leaf or leaf == initials(key_leaf) else 0.0,
        )
        return same + (0.1 if key_section == section else 0.0)

    best = max(KEYS, key=likeness)
    return best if likeness(best) > 0.6 else None


def parse_override(text: str) -> tuple[str, Any]:
    """`a.b=value` as typed on the command line; the value is read as YAML reads it."""
    dotted, equals, value = text.partition("=")
    if not equals or not dotted:
        raise BadInput(f"--set {text}: write key=value, such as optim.lr=0.1")
    try:
        return dotted, strict_yaml.read_value(value)
    except yaml.YAMLError:
        raise BadInput(f"--set {text}: the value is not valid YAML") from None


# --------------------------------------------------------------------------------------------
# Writing, comparing
# --------------------------------------------------------------------------------------------


def flatten(params: Params) -> dict[str, Any]:
    """Every leaf as {dotted key: plain value}."""

    def walk(tree: dict, prefix: str) -> dict[str, Any]:
        flat = {}
        for key, value in tree.items():
            flat |= walk(value, f"{prefix}{key}.") if isinstance(value, dict) else {
                prefix + key: value
            }
        return flat

    return walk(params.model_dump(mode="json"), "")


def to_yaml(params: Params) -> str:
    """The whole resolved tree as YAML that `load` reads back to an equal tree."""
    return yaml.dump(
        params.model_dump(mode="json"), Dumper=strict_yaml.StrictDumper, sort_keys=False,
        allow_unicode=True,
    )


CHANGEABLE = ("budget.", "logging.")
"""Sections a run may change between a stop and its resume: they do not touch what is computed."""


def digest(params: Params) -> str:
    """SHA-256 of every key that decides what is computed, 16 hex digits."""
    deciding = {key: value for key, value in flatten(params).items()
                if not key.startswith(CHANGEABLE)}
    canonical = json.dumps(deciding, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def difference(old: Params, new: Params) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of every leaf that differs."""
    before, after = flatten(old), flatten(new)
    return [(key, before[key], after[key]) for key in before if before[key] != after[key]]


def table(params: Params) -> list[tuple[str, Any, Any, str]]:
    """(key, value, default, docstring) of every leaf, in the tree's order."""
    defaults = flatten(Params())
    return [
        (key, value, defaults[key], KEYS[key].description or "")
        for key, value in flatten(params).items()
    ]
