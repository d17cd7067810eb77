"""Pictures per CPU-second: torchvision's ImageFolder and DataLoader beside ours, files and packed.

    python benchmarks/loaders.py                       # photographs made from scikit-learn's two
    python benchmarks/loaders.py --pictures FOLDER     # the *.jpg below it
    python benchmarks/loaders.py --workers 2           # processes for theirs, threads for ours

Every contestant makes the same training batches: random-resized-crop (bilinear, antialiased), flip,
uint8. CPU time is that of this process and its workers. Rounds take turns, so that a busy machine
slows all; times are medians, ratios are medians of the ratios of each round.
"""

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

import numpy as np
import PIL
import sklearn.datasets
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib.datasets import folder, loader, pack, transforms  # noqa: E402
from lib.datasets.decode import decode_region, read_header  # noqa: E402
from lib.params import Data  # noqa: E402

BATCH_SIZE = 32
WORDS = ("images", "ms CPU/image", "images/CPU-s", "images/s wall", "x theirs")


def write_photographs(root: Path, count: int) -> None:
    """Parts of two real photographs, enlarged to ImageNet's usual 500 x 375."""
    rng = np.random.default_rng(0)
    images = Path(sklearn.datasets.__file__).parent / "images"
    photos = [Image.open(images / name) for name in ("china.jpg", "flower.jpg")]
    for number in range(count):
        photo = photos[number % 2]
        share = rng.uniform(0.6, 0.85)
        width, height = round(share * photo.width), round(share * photo.width * 3 / 4)
        left, top = rng.integers((photo.width - width + 1, photo.height - height + 1)).tolist()
        part = photo.crop((left, top, left + width, top + height))
        part.resize((500, 375), Image.Resampling.BICUBIC).save(root / f"{number}.jpg", quality=95)


def theirs(root: Path, size: int, num_workers: int) -> Iterable:
    chain = v2.Compose([
        v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor(),
    ])
    dataset = ImageFolder(str(root), chain)
    batches = DataLoader(dataset, BATCH_SIZE, shuffle=True, num_workers=num_workers)
    yield from (images for images, _ in batches)


def ours(dataset, encoded: Callable, size: int, num_workers: int, epoch: int) -> Iterable:
    """`encoded(index)` gives the bytes of a picture."""
    augment = Data().augment

    def fill(request: loader.Request, i: int, slot: np.ndarray) -> None:
        index = int(request.indices[i])
        rng = transforms.crop_rng(0, epoch, index)
        data = encoded(index)
        header = read_header(data)
        box = transforms.random_crop_box(header.width, header.height, augment, rng)
        decode_region(data, header, box, slot, flip=bool(rng.random() < 0.5))

    order = transforms.epoch_order(0, epoch, len(dataset))
    requests = loader.eval_requests(order, BATCH_SIZE, (size, size))
    yield from (images for _, images in loader.load(requests, fill, 3, num_workers))


def cpu_seconds() -> float:
    """Of this process and of its workers that have ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def timed(batches: Iterable) -> tuple[float, float, int]:
    """CPU seconds, seconds, pictures of one epoch."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    count = sum(len(images) for images in batches)
    return cpu_seconds() - cpu, time.perf_counter() - wall, count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, help="a folder of JPEG files")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--max-side", type=int, default=400, help="of the pack")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        pictures = root / "train" / "all"
        pictures.mkdir(parents=True)
        if args.pictures:
            for number, path in enumerate(sorted(args.pictures.rglob("*.jpg"))[: args.images]):
                (pictures / f"{number}.jpg").symlink_to(path.resolve())
        else:
            write_photographs(pictures, args.images)
        data = Data(format="folder", root=str(root), val="train")
        files, _ = folder.open_splits(data, 3)
        pack.pack([files], root / "packed", args.max_side, show=lambda line: None)
        packed, _ = pack.open_splits(data.model_copy(update={"root": str(root / "packed")}), 3)
        contestants: dict[str, Callable[[int], Iterable]] = {
            "ImageFolder + PIL": lambda epoch: theirs(root / "train", args.size, args.workers),
            "ours, files": lambda epoch: ours(
                files, lambda i: files.paths[i].read_bytes(), args.size, args.workers, epoch),
            "ours, packed": lambda epoch: ours(
                packed, packed.data, args.size, args.workers, epoch),
        }
        results = {name: [] for name in contestants}
        for epoch in range(args.rounds + 1):  # the first is the warm-up
            for name, batches in contestants.items():
                results[name].append(timed(batches(epoch)))
        kilobytes = sum(path.stat().st_size for path in files.paths) / len(files) / 1e3
        record = sum(packed.reader.rows["length"].tolist()) / len(packed) / 1e3

    print(
        f"{len(files)} photographs of {kilobytes:.0f} KB, packed at {args.max_side} pixels: "
        f"{record:.0f} KB\nto {args.size} pixels, {args.workers} workers, "
        f"{os.cpu_count()} cores, median of {args.rounds} rounds, Pillow {PIL.__version__}, "
        f"torchvision {torchvision.__version__}"
    )
    print(f"{'':20}" + "".join(f"{word:>15}" for word in WORDS))
    baseline = results["ImageFolder + PIL"][1:]
    for name, rounds in results.items():
        rounds = rounds[1:]
        cpu = median(cpu / count for cpu, _, count in rounds)
        wall = median(wall / count for _, wall, count in rounds)
        ratio = median(b[0] / r[0] for b, r in zip(baseline, rounds, strict=True))
        print(f"{name:20}{rounds[0][2]:15}{cpu * 1e3:15.2f}{1 / cpu:15.0f}{1 / wall:15.0f}"
              f"{ratio:15.2f}")


if __name__ == "__main__":
    main()
