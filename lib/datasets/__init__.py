"""One file a format. A new format is one file and one line here."""

from lib.datasets import coco, demo, folder, scenes, yolo_txt

FORMATS = {"demo": demo.open_splits, "folder": folder.open_splits}
"""Images with one label each: open(data, num_channels) -> training and validation split."""

BOX_FORMATS = {
    "scenes": scenes.open_splits,
    "scenes_yolo": scenes.open_yolo_splits,
    "coco": coco.open_splits,
    "yolo": yolo_txt.open_splits,
}
"""Images with boxes: open(data, num_channels) -> training and validation split."""
