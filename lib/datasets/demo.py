"""The embedded data set: the handwritten digits that ship with scikit-learn, as JPEG files.

1,797 real scans of 8x8 pixels (Alpaydin and Kaynak 1998), enlarged to 32x32 and written once as
an ImageFolder. Every fifth image of a class goes to validation.
"""

import os
import shutil
from pathlib import Path

from PIL import Image

from lib.datasets import folder
from lib.params import Data, resolve_path

SIDE = 32


def open_splits(data: Data, num_channels: int) -> tuple[folder.FolderDataset, folder.FolderDataset]:
    """The digits' training and validation split; writes the files where they are not there yet."""
    root = resolve_path(data.root)
    if not root.exists():
        write_digits(root, data.train, data.val)
    return folder.open_splits(data, num_channels)


def write_digits(root: Path, train: str = "train", val: str = "val") -> None:
    """Write the digits below `root`, whole or not at all."""
    from sklearn.datasets import load_digits  # a second of import that only the first run pays

    digits = load_digits()
    temporary = root.with_name(f".{root.name}.{os.getpid()}")
    seen = dict.fromkeys(range(10), 0)
    for pixels, label in zip(digits.images, digits.target.tolist(), strict=True):
        split = val if seen[label] % 5 == 4 else train
        seen[label] += 1
        path = temporary / split / str(label) / f"digit_{label}_{seen[label]:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray((pixels * (255 / 16)).astype("uint8"))
        grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path, quality=95)
    try:
        temporary.rename(root)
    except OSError:  # another process wrote the same files first
        shutil.rmtree(temporary)
        if not root.exists():
            raise
