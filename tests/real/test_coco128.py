"""Real photographs with COCO's own annotations, where a checkout has them beside it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lib.datasets import coco, yolo_txt
from lib.params import ROOT, Data

COCO128 = Path(__file__).resolve().parents[3] / "shared" / "data" / "coco128"
pytestmark = pytest.mark.skipif(not COCO128.is_dir(), reason="the photographs are not here")

DATA = Data(root=str(COCO128), train="train2017", val="val2017")


def test_both_formats_hold_the_same_boxes():
    """80 categories with ids from 1 to 90; the text files give six decimals."""
    for as_coco, as_yolo in zip(
        coco.open_splits(DATA, 3), yolo_txt.open_splits(DATA, 3), strict=True
    ):
        assert as_coco.paths == as_yolo.paths and len(as_coco) == 64
        assert as_coco.category_ids[0] == 1 and as_coco.category_ids[-1] == 90
        assert len(as_coco.class_names) == 80
        for index in range(64):
            boxes, labels = as_coco.targets(index)
            other_boxes, other_labels = as_yolo.targets(index)
            assert sorted(labels.tolist()) == sorted(other_labels.tolist())
            assert abs(boxes.sum(0) - other_boxes.sum(0)).max(initial=0) < 1e-5 * (1 + len(boxes))


@pytest.mark.slow
@pytest.mark.parametrize("demo", ["demo_rtdetr", "demo_yolo"])
def test_two_batches_are_memorised_by_another_data_root_alone(demo: str, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "lib.cli", "run", f"params/{demo}.yaml", "--stages", "overfit",
         "--set", f"data.root={COCO128}", "--outputs", str(tmp_path), "--name", demo],
        cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    verdict = json.loads((tmp_path / demo / "verdicts" / "overfit.json").read_text())
    checks = {check["id"]: check for check in verdict["checks"]}
    assert verdict["passed"] and checks["memorised"]["value"] >= 0.9
