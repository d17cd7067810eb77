"""The params file: what it says is what runs, and what it cannot mean is refused by name."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from pydantic import ValidationError

from lib import params as params_module
from lib import strict_yaml
from lib.errors import BadInput
from lib.params import KEYS, ROOT, Params, load, nearest_key, parse_override

PARAMS_FILES = sorted((ROOT / "params").glob("*.yaml"))
LEAVES = list(params_module.flatten(Params()))
SIZE = "a whole number >= 8 or a list (2 of a whole number >= 8)"
DETECT = {"task": "detect", "data.format": "coco"}


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def refusal(tmp_path: Path, text: str, **overrides: Any) -> str:
    """What `load` says of a file it refuses; it must be one line a problem, never a traceback."""
    with pytest.raises(BadInput) as caught:
        load(write(tmp_path, text), {key.replace("__", "."): v for key, v in overrides.items()})
    return str(caught.value)


def changed_value(key: str, value: Any) -> Any:
    """Another valid value of a leaf, by its type; None where there is none."""
    special = {"train.epochs": None, "train.steps": None, "data.classes": 3, "optim.lr": 0.1,
               "data.mean": [0.1, 0.2, 0.3], "data.std": [0.1, 0.2, 0.3],
               "train.image_sizes": [16, 32], "optim.milestones_epochs": [1.0],
               "data.augment.scale": [0.5, 0.6], "data.augment.ratio": [0.5, 0.6],
               "data.boxes.scale": [0.5, 0.6],
               "model.weights": "w.pth", "machine.gpu": "A10G", "model.in_chans": None,
               "train.batch_size": 512, "train.accumulate": 2}
    if key in special:
        return special[key]
    annotation = KEYS[key].annotation
    literals = [choice for part in (annotation, *get_args(annotation))
                if get_origin(part) is not None and "Literal" in str(get_origin(part))
                for choice in get_args(part)]
    if literals:
        return next((choice for choice in literals if choice != value), None)
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, int):
        return value + 1
    if value is None:
        return 0.5 if "float" in str(annotation) else 7
    return value / 2 if value else 0.25


# -- C1: keys that do not exist ---------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, right",
    [
        ("optim.learning_rate", "optim.lr"),
        ("optim.lrr", "optim.lr"),
        ("optim.momentun", "optim.momentum"),
        ("optim.wd", "optim.weight_decay"),
        ("optim.warmup_epoch", "optim.warmup_epochs"),
        ("train.batchsize", "train.batch_size"),
        ("train.bs", "train.batch_size"),
        ("data.augment.h_flip", "data.augment.hflip"),
        ("data.imagesize", "data.image_size"),
        ("model.backbone_name", "model.name"),
        ("sed", "seed"),
        ("optimizer", "optim"),
        ("lr", "optim.lr"),
        ("batch_size", "train.batch_size"),
    ],
)
def test_c1_an_unknown_key_is_refused_with_line_key_and_nearest(tmp_path, wrong, right):
    tree: Any = 1
    for part in reversed(wrong.split(".")):
        tree = {part: tree}
    text = "# a comment line\nmachine: {device: cpu}\n" + yaml.safe_dump(tree)
    line = text.splitlines().index(next(
        row for row in text.splitlines() if row.strip().startswith(wrong.split(".")[-1] + ":")
    )) + 1
    message = refusal(tmp_path, text)
    assert message == (
        f"{tmp_path}/run.yaml:{line}: {wrong}: unknown key; did you mean {right}?"
    )


def test_c1_an_unknown_key_like_nothing_gets_no_guess(tmp_path):
    message = refusal(tmp_path, "zzzqqq: 1\n")
    assert message.endswith("run.yaml:1: zzzqqq: unknown key")


def test_c1_a_misspelt_override_is_refused_like_a_key_of_the_file(tmp_path):
    message = refusal(tmp_path, "seed: 1\n", optim__learning_rate=0.1)
    assert message == "override: optim.learning_rate: unknown key; did you mean optim.lr?"
    message = refusal(tmp_path, "seed: 1\n", optim={"lrr": 0.1})
    assert message == "override: optim.lrr: unknown key; did you mean optim.lr?"


def test_c1_every_problem_of_a_file_is_named_at_once(tmp_path):
    message = refusal(tmp_path, "sed: 1\noptim:\n  lr: high\n  momentun: 0.9\n")
    lines = message.splitlines()
    assert sorted(re.search(r"yaml:(\d+): ([\w.]+):", line).groups() for line in lines) == [
        ("1", "sed"), ("3", "optim.lr"), ("4", "optim.momentun"),
    ]


@pytest.mark.parametrize("key", [key for key in LEAVES if len(key.split(".")[-1]) >= 5])
def test_c1_a_valid_key_with_one_letter_dropped_leads_back_to_itself(key):
    section, _, leaf = key.rpartition(".")
    misspelt = f"{section}.{leaf[:2]}{leaf[3:]}".strip(".")
    assert misspelt not in KEYS
    assert nearest_key(misspelt) == key


# -- C3: keys given twice ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, line, key, first",
    [
        ("seed: 3\nseed: 1\n", 2, "seed", 1),
        ("optim:\n  lr: 3.0\n  momentum: 0.9\n  lr: 1.0\n", 4, "optim.lr", 2),
        ("optim: {lr: 1.0}\n\noptim: {momentum: 0.9}\n", 3, "optim", 1),
        ("data:\n  augment: {hflip: 0.1, hflip: 0.1}\n", 2, "data.augment.hflip", 2),
    ],
)
def test_c3_a_duplicate_key_is_refused_with_both_lines(tmp_path, text, line, key, first):
    assert refusal(tmp_path, text) == (
        f"{tmp_path}/run.yaml:{line}: {key}: duplicate key, first given on line {first}; keep one"
    )


# -- C4: values of the wrong kind -------------------------------------------------------------


@pytest.mark.parametrize(
    "key, value, wanted",
    [
        ("data.image_size", "{height: 32, width: 32}", SIZE),
        ("data.image_size", "[1440, 808, 3]", SIZE),
        ("data.image_size", "[1440]", SIZE),
        ("data.image_size", "[7, 808]", SIZE),
        ("data.image_size", "[32.0, 32]", SIZE),
        ("data.image_size", "7", SIZE),
        ("train.image_sizes", "[[32, 7]]", f"a list ({SIZE})"),
        ("train.image_sizes", "32", f"a list ({SIZE})"),
        ("data.boxes.max_zoom_out", "0.5", "a number >= 1"),
        ("optim.backbone_lr", "0", "a number > 0"),
        ("detect.headline", "mAP75", "'mAP' or 'mAP50'"),
        ("optim.lr", "{value: 0.1}", "a number > 0 or 'auto'"),
        ("optim.lr", "'0.1'", "a number > 0 or 'auto'"),
        ("optim.lr", "0", "a number > 0 or 'auto'"),
        ("optim.lr", "-0.1", "a number > 0 or 'auto'"),
        ("optim.lr", "0,1", "a number > 0 or 'auto'"),
        ("overfit.steps", "1.5", "a whole number >= 1"),
        ("overfit.batch_size", "64.0", "a whole number >= 2"),
        ("model.pretrained", "'true'", "true or false"),
        ("model.pretrained", "1", "true or false"),
        ("model.name", "50", "a text"),
        ("data.classes", "[1, 2]", "a whole number >= 1 or a list (a text) or null"),
        ("data.classes", "[]", "a whole number >= 1 or a list (a text) or null"),
        ("data.augment.scale", "[0.1]", "a list (2 of a number > 0)"),
        ("data.augment.hflip", "1.5", "a number >= 0 <= 1"),
        ("data.augment.hflip", "true", "a number >= 0 <= 1"),
        ("machine.device", "gpu", "'auto' or 'cpu' or 'cuda' or 'mps'"),
        ("optim", "3", "a section"),
        ("data.augment", "[mixup]", "a section"),
        ("budget.hours", "soon", "a number > 0 or null"),
        ("seed", "99999999999999999999", "a whole number >= 0 < 9.22337e+18"),
    ],
)
def test_c4_a_value_of_the_wrong_kind_is_refused_with_what_it_must_be(
    tmp_path, key, value, wanted
):
    *sections, leaf = key.split(".")
    text = "".join(f"{'  ' * i}{name}:\n" for i, name in enumerate(sections))
    text += f"{'  ' * len(sections)}{leaf}: {value}\n"
    read = strict_yaml.read_value(value)
    assert refusal(tmp_path, text) == (
        f"{tmp_path}/run.yaml:{len(sections) + 1}: {key}: {read!r} is not {wanted}"
    )


@pytest.mark.parametrize("key", [key for key in LEAVES if "float" in str(KEYS[key].annotation)])
def test_c4_no_number_may_be_nan_or_infinite(tmp_path, key):
    file, default = write(tmp_path, ""), params_module.flatten(Params())[key]
    for value in (math.nan, math.inf, -math.inf):
        if isinstance(default, list):
            value = [value] * max(1, len(default))
        with pytest.raises(BadInput, match=f"^override: {re.escape(key)}: "):
            load(file, {key: value})


def test_c4_channels_and_statistics_must_agree(tmp_path):
    message = refusal(tmp_path, "model: {in_chans: 1}\n")
    assert "data.mean has 3 values, model.in_chans is 1" in message
    fitting = "model: {in_chans: 1}\ndata: {mean: [0.5], std: [0.5]}\n"
    assert load(write(tmp_path, fitting)).model.in_chans == 1


def test_c4_a_batch_that_does_not_split_evenly_is_refused(tmp_path):
    message = refusal(tmp_path, "\ntrain: {epochs: 1, batch_size: 10, accumulate: 4}\n")
    assert message == (
        f"{tmp_path}/run.yaml:2: train: batch_size 10 does not split into accumulate 4 equal "
        "micro-batches"
    )


def test_c4_a_sweep_must_rise(tmp_path):
    message = refusal(tmp_path, "lr_finder: {min_lr: 1.0, max_lr: 1e-3}\n")
    assert message.endswith(":1: lr_finder: min_lr 1 must be below max_lr 0.001")


# -- the task and what it reads ---------------------------------------------------------------


@pytest.mark.parametrize("task, wrong, right", [
    ("classify", ["scenes", "scenes_yolo", "coco", "yolo"], ["demo", "folder"]),
    ("detect", ["demo", "folder"], ["scenes", "scenes_yolo", "coco", "yolo"]),
])
def test_a_format_that_the_task_cannot_read_is_refused_with_those_it_can(tmp_path, task, wrong,
                                                                         right):
    for name in wrong:
        message = refusal(tmp_path, f"task: {task}\n", data__format=name)
        assert message.endswith(f"task {task} cannot learn from data.format {name!r}; it reads "
                                + ", ".join(right))
    for name in right:
        file = write(tmp_path, f"task: {task}\n")
        assert load(file, {"data.format": name}).data.format == name
    assert sorted(wrong + right) == sorted(get_args(KEYS["data.format"].annotation))


OF_ONE_TASK = {
    "classify": {
        "model.drop_rate": 0.1, "model.drop_path_rate": 0.1, "data.val_crop": 0.5,
        "data.augment.hflip": 0.0, "data.augment.mixup": 0.2, "train.label_smoothing": 0.1,
    },
    "detect": {
        "data.letterbox": True, "data.single_class": True, "data.boxes.mosaic": 1.0,
        "data.boxes.hue": 0.1, "optim.backbone_lr": 0.1, "detect.headline": "mAP50",
        "detect.box_gain": 1.0,
    },
}


@pytest.mark.parametrize("task, key", [(t, k) for t, keys in OF_ONE_TASK.items() for k in keys])
def test_a_key_that_only_another_task_reads_is_refused_by_name(tmp_path, task, key):
    """C2: in a run of the other task it would change nothing, and nobody would notice."""
    value = OF_ONE_TASK[task][key]
    of_task = {"classify": {"train.epochs": 1}, "detect": DETECT | {"train.epochs": 1}}
    other = "detect" if task == "classify" else "classify"
    assert params_module.flatten(
        load(write(tmp_path, ""), of_task[task] | {key: value}))[key] == value
    with pytest.raises(BadInput) as caught:
        load(write(tmp_path, ""), of_task[other] | {key: value})
    (named,) = [k for k in params_module.KEYS_OF_TASK[task] if (key + ".").startswith(k + ".")]
    assert str(caught.value).endswith(
        f"{named} is set, and only task {task} reads it (task is {other}); remove it")


def test_a_key_of_another_task_at_its_default_is_let_be(tmp_path):
    """The frozen copy of a run names every key."""
    loaded = load(write(tmp_path, ""), DETECT)
    assert load(write(tmp_path, params_module.to_yaml(loaded))) == loaded
    assert load(write(tmp_path, "data: {letterbox: false, boxes: {mosaic: 0.0}}\n")) == Params()


def test_every_key_of_one_task_exists_and_belongs_to_no_other():
    named = [key for keys in params_module.KEYS_OF_TASK.values() for key in keys]
    assert set(named) <= set(KEYS) and len(named) == len(set(named))


@pytest.mark.parametrize("start", [{"model.pretrained": True}, {"model.weights": "w.pth"}])
def test_norms_are_frozen_only_where_there_are_weights_to_keep(tmp_path, start):
    frozen = DETECT | {"detect.freeze_norms": True}
    assert load(write(tmp_path, ""), frozen | start).detect.freeze_norms
    with pytest.raises(BadInput, match="would freeze random weights; set model.pretrained or "
                                       "model.weights$"):
        load(write(tmp_path, ""), frozen)


def test_d12_a_size_is_a_side_or_height_and_width(tmp_path):
    """D12 of the failures: [1440, 808] became 1440 square."""
    loaded = load(write(tmp_path, "data: {image_size: [1440, 808]}\n"),
                  {"train.epochs": 1, "train.image_sizes": [64, [96, 128]]})
    assert loaded.data.image_size == loaded.data.input_size == (1440, 808)
    assert loaded.train.image_sizes == (64, (96, 128))
    assert load(write(tmp_path, params_module.to_yaml(loaded))) == loaded
    assert load(write(tmp_path, "data: {image_size: 96}\n")).data.input_size == (96, 96)


@pytest.mark.parametrize(
    "text, says",
    [
        ("train: {epochs: 1, steps: 2}", "(has epochs and steps); set the other to null"),
        ("train: {batch_size: 8}", "(has neither); set one"),
    ],
)
def test_exactly_one_of_epochs_and_steps(tmp_path, text, says):
    message = refusal(tmp_path, text)
    assert message.endswith(f"yaml:1: train: needs exactly one of epochs, steps {says}")


def test_an_override_that_adds_a_second_length_says_what_to_do(tmp_path):
    text = "train: {epochs: 1}"
    assert "set the other to null" in refusal(tmp_path, text, train__steps=5)
    loaded = load(write(tmp_path, text), {"train.steps": 5, "train.epochs": None})
    assert (loaded.train.steps, loaded.train.epochs) == (5, None)


# -- YAML's traps -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-3", 1e-3), ("1E3", 1e3), ("5e-4", 5e-4), (".5", 0.5), ("1.", 1.0), ("-1", -1),
        ("+2", 2), ("010", 10), ("08", 8), ("1_000", 1000), ("1.5e+2", 150.0),
        ("on", "on"), ("off", "off"), ("yes", "yes"), ("no", "no"), ("y", "y"), ("N", "N"),
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("0x10", "0x10"), ("0o7", "0o7"), ("1:30", "1:30"), ("2026-01-31", "2026-01-31"),
        ("1.2.3", "1.2.3"), ("'1e-3'", "1e-3"), ("inf", "inf"), ("nan", "nan"), ("e3", "e3"),
    ],
)
def test_a_value_means_what_a_researcher_means(text, value):
    """YAML 1.1 reads 1e-3 as a text, `on` as true, 010 as eight and 1:30 as ninety."""
    found = strict_yaml.read_value(text)
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize(
    "text, problem",
    [
        ("seed: [1", ":1: not valid YAML: "),
        ("seed: 1\n\toptim: {}\n", ":2: not valid YAML: "),
        ("seed: 1\n---\nseed: 2\n", ":2: not valid YAML: "),
        ("seed: 1\x00\n", ": not valid YAML: "),
        ("\nseed: !!python/name:os.system\n", ":2: not valid YAML: a tag"),
        ("seed: !include base.yaml\n", ":1: not valid YAML: a tag"),
        ("seed: !!int abc\n", ":1: not valid YAML: 'abc' is no int"),
        ("seed: !!timestamp 2026-01-31\n", ":1: not valid YAML: a tag"),
        ("? [a, b]\n: 1\n", ":1: not valid YAML: a list or mapping as a key"),
        ("optim: &x {lr: *x}\n", ": not valid YAML: nested without end"),
        ("hello\n", ": a params file is a mapping of keys to values, not 'hello"),
        ("- seed: 1\n", ": a params file is a mapping of keys to values, not '- seed"),
        ("3\n", ": a params file is a mapping of keys to values, not '3"),
    ],
)
def test_what_is_not_a_yaml_mapping_is_refused_in_one_line(tmp_path, text, problem):
    message = refusal(tmp_path, text)
    assert message.startswith(f"{tmp_path}/run.yaml{problem}")
    assert "\n" not in message


def test_a_file_that_says_nothing_is_the_defaults(tmp_path):
    assert load(write(tmp_path, "")) == Params()
    assert load(write(tmp_path, "# only a comment\n")) == Params()


def test_a_folder_a_missing_and_a_binary_file_are_refused_in_one_line(tmp_path):
    with pytest.raises(BadInput, match="is a folder; give the params file in it$"):
        load(tmp_path)
    with pytest.raises(BadInput, match="no-such.yaml: no such params file$"):
        load(tmp_path / "no-such.yaml")
    picture = tmp_path / "picture.yaml"
    picture.write_bytes(b"\xff\xd8\xff\xe0 JFIF \x80\x81")
    with pytest.raises(BadInput, match="picture.yaml: cannot be read as a params file: .*utf-8"):
        load(picture)


def test_a_file_is_found_from_any_folder_by_its_path_in_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load("params/demo_classify.yaml").model.name == "test_resnet"


# -- C5: one file is one run ------------------------------------------------------------------


def test_c5_loading_one_file_leaves_nothing_in_the_next(tmp_path):
    first = load(write(tmp_path, "seed: 5\noptim: {lr: 0.3}\n"), {"data.augment.mixup": 0.2})
    assert (first.seed, first.optim.lr, first.data.augment.mixup) == (5, 0.3, 0.2)
    assert load(write(tmp_path, "")) == Params()


def test_c5_overrides_are_not_kept_by_the_caller_s_dict_or_the_file(tmp_path):
    file, overrides = write(tmp_path, "optim: {lr: 0.3}\n"), {"optim.momentum": 0.5}
    load(file, overrides)
    assert overrides == {"optim.momentum": 0.5}
    assert file.read_text() == "optim: {lr: 0.3}\n"
    assert load(file).optim.momentum == 0.9


@pytest.mark.parametrize("section", ["", *sorted({k.rpartition(".")[0] for k in LEAVES} - {""})])
def test_c5_no_part_of_the_tree_can_be_changed(section):
    part = Params()
    for name in filter(None, section.split(".")):
        part = getattr(part, name)
    for name in type(part).model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, name, 1)
    for value in part.model_dump(mode="python").values():
        assert not isinstance(value, list | set), "a mutable default could be changed in place"


# -- overrides --------------------------------------------------------------------------------


def test_overrides_win_over_the_file_and_make_sections_it_lacks(tmp_path):
    text = "seed: 1\noptim: {lr: 0.3}\n"
    loaded = load(
        write(tmp_path, text),
        {"seed": 2, "optim.lr": 0.5, "data.augment.hflip": 0.0, "machine.gpu": "A10G"},
    )
    assert params_module.difference(Params(), loaded) == [
        ("seed", 0, 2), ("data.augment.hflip", 0.5, 0.0), ("optim.lr", "auto", 0.5),
        ("machine.gpu", None, "A10G"),
    ]


def test_an_override_below_a_value_is_refused(tmp_path):
    assert refusal(tmp_path, "seed: 1\n", seed__a=1) == "override seed.a: seed is not a section"


@pytest.mark.parametrize(
    "text, key, value",
    [
        ("optim.lr=1e-3", "optim.lr", 1e-3),
        ("optim.lr=auto", "optim.lr", "auto"),
        ("optim.clip_norm=null", "optim.clip_norm", None),
        ("optim.clip_norm=", "optim.clip_norm", None),
        ("data.classes=[a, b]", "data.classes", ["a", "b"]),
        ("data.root=/x/a=b", "data.root", "/x/a=b"),
        ("data.root=on", "data.root", "on"),
        ("model.pretrained=true", "model.pretrained", True),
        ("seed=08", "seed", 8),
    ],
)
def test_parse_override_reads_the_value_as_the_file_would(text, key, value):
    found_key, found = parse_override(text)
    assert (found_key, type(found), found) == (key, type(value), value)


@pytest.mark.parametrize("text", ["seed", "=1", "seed=[1", "a=!foo 1", "a=b: c: d", "a=? [b]"])
def test_parse_override_refuses_what_it_cannot_read(text):
    with pytest.raises(BadInput):
        parse_override(text)


# -- writing, comparing -----------------------------------------------------------------------


@pytest.mark.parametrize("file", PARAMS_FILES, ids=lambda file: file.stem)
def test_every_params_file_of_the_project_loads_and_comes_back_equal(tmp_path, file):
    loaded = load(file)
    assert load(write(tmp_path, params_module.to_yaml(loaded))) == loaded


@pytest.mark.parametrize("key", LEAVES)
def test_every_leaf_can_be_set_and_survives_the_round_trip_and_changes_the_digest(tmp_path, key):
    base = {"train.epochs": 10}
    if key.startswith(params_module.KEYS_OF_TASK["detect"]):
        base |= DETECT
    if key == "detect.freeze_norms":
        base["model.pretrained"] = True
    before = load(write(tmp_path, ""), base)
    default = params_module.flatten(before)[key]
    value = changed_value(key, default)
    overrides = base | {
        "task": DETECT,
        "train.epochs": {key: None, "train.steps": 5},
        "train.steps": {key: 7, "train.epochs": None},
        "train.stop_at_target": {key: True, "train.target": 0.5},
        "model.in_chans": {key: 1, "data.mean": [0.5], "data.std": [0.5]},
    }.get(key, {key: value})
    if overrides[key] is None and key != "train.epochs":
        assert len(get_args(KEYS[key].annotation)) == 1, f"give {key} another value here"
        return
    after = load(write(tmp_path, ""), overrides)
    assert params_module.flatten(after)[key] == overrides[key] != default
    assert load(write(tmp_path, params_module.to_yaml(after))) == after
    changeable = key.startswith(params_module.CHANGEABLE)  # a resume may bring a larger budget
    assert (params_module.digest(after) == params_module.digest(before)) is changeable
    assert key in [changed for changed, _, _ in params_module.difference(before, after)]


@pytest.mark.parametrize(
    "text",
    ["08", "010", "1e3", "1e-5", ".5", "1.", "+1", "1_000", "0x10", "1:30", "on", "off", "yes",
     "null", "~", "true", "2026-01-31", ".nan", "nan", "", " lead", "a: b", "#x", "- a", "é", "<<",
     "=", "*a", "!x"],
)
def test_a_text_that_looks_like_something_else_comes_back_as_the_same_text(tmp_path, text):
    """Class folders are called 08 and 1e3; the frozen copy must not make numbers of them."""
    loaded = load(write(tmp_path, ""), {"data.root": text, "data.classes": [text, "b"]})
    again = load(write(tmp_path, params_module.to_yaml(loaded)))
    assert (again.data.root, again.data.classes) == (text, (text, "b"))


def test_the_digest_is_the_same_in_every_process(tmp_path):
    """Python salts its own hash() anew in each process; the digest must not depend on it."""
    file = write(tmp_path, "seed: 5\noptim: {lr: 0.3}\n")
    code = f"from lib import params as p; print(p.digest(p.load({str(file)!r})))"
    found = {
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert found == {params_module.digest(load(file))}
    assert re.fullmatch(r"[0-9a-f]{16}", found.pop())


def test_the_digest_follows_the_meaning_not_the_spelling(tmp_path):
    one = load(write(tmp_path, "optim: {lr: 1e-1, momentum: 0.9}\nseed: 0\n"))
    other = load(write(tmp_path, "# the same\noptim:\n  lr: 0.10\n"))
    assert params_module.digest(one) == params_module.digest(other)


def test_difference_lists_every_leaf_that_differs_and_nothing_else(tmp_path):
    old = load(write(tmp_path, "optim: {lr: 0.3}\n"))
    new = load(write(tmp_path, "optim: {lr: 0.4}\ntrain: {epochs: 3}\n"))
    assert params_module.difference(old, old) == []
    assert params_module.difference(old, new) == [
        ("optim.lr", 0.3, 0.4), ("train.epochs", 10.0, 3.0),
    ]


def test_every_section_and_leaf_has_a_docstring_of_one_line():
    missing = {key: field.description for key, field in KEYS.items()
               if not field.description or "\n" in field.description.strip()}
    assert missing == {}


def test_the_table_has_every_leaf_with_value_default_and_docstring(tmp_path):
    loaded = load(write(tmp_path, "optim: {lr: 0.3}\n"))
    rows = {key: rest for key, *rest in params_module.table(loaded)}
    assert list(rows) == LEAVES
    assert rows["optim.lr"] == [0.3, "auto", KEYS["optim.lr"].description]
    assert {key for key, (value, default, _) in rows.items() if value != default} == {"optim.lr"}
    assert all(doc for _, _, doc in rows.values())


def test_flatten_gives_plain_values_of_exactly_the_leaves():
    flat = params_module.flatten(Params())
    sections = {key.rpartition(".")[0] for key in KEYS} - {""}
    assert set(flat) == set(KEYS) - sections
    assert json.loads(json.dumps(flat)) == flat


# -- the learning rate ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides, suggestion, expected",
    [
        ({"optim.lr": 0.1}, None, 0.1),
        ({"optim.lr": 0.1}, 0.7, 0.1),
        ({"optim.lr": 0.1, "optim.lr_batch_size": 256, "train.batch_size": 2048}, None, 0.8),
        ({"optim.lr": 0.1, "optim.lr_batch_size": 256, "train.batch_size": 1024,
          "optim.lr_rule": "sqrt"}, None, 0.2),
        ({"optim.lr": "auto"}, 0.7, 0.7),
        ({"optim.lr": "auto", "optim.lr_batch_size": 256, "train.batch_size": 2048}, 0.7, 0.7),
    ],
)
def test_c6_the_effective_learning_rate(tmp_path, overrides, suggestion, expected):
    """0.1 at 256 is 0.8 at 2048 by the linear rule; a found LR was found at the real batch."""
    loaded = load(write(tmp_path, "train: {epochs: 10}"), overrides)
    assert loaded.effective_lr(suggestion) == pytest.approx(expected, rel=1e-12)


def test_c6_an_lr_to_be_found_that_was_not_found_is_refused():
    with pytest.raises(BadInput, match="optim.lr is auto.*run 02_lr_finder first or set optim.lr"):
        Params().effective_lr()


# -- the import -------------------------------------------------------------------------------


def test_importing_params_and_run_loads_nothing_heavy():
    """Every command starts with it; torch alone would cost seconds."""
    code = "import sys, lib.params, lib.run; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "pydantic" in loaded
    heavy = {"torch", "torchvision", "timm", "numpy", "PIL", "matplotlib", "IPython", "papermill",
             "nbformat", "wandb", "sklearn", "scipy"}
    assert loaded & heavy == set()
