"""Times the data pipeline: pictures/s beside bare Pillow and a torch DataLoader, and opening a large index.

python benchmarks/data.py                       # every part; needs the [test] extra
python benchmarks/data.py --parts core,loader --workers 8
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SIDE = 336
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
BATCH = 16
MODES = ("resize", "crop", "pad")  # SigLIP's, LLaVA's first stage, LLaVA's second
ANSWER = "A street with two parked cars, and a man who walks his dog past a row of shops."


def photograph(rng: np.random.Generator, width: int, height: int) -> bytes:
    """A JPEG that costs what a photograph of COCO does: smooth colour fields of five scales, and grain."""
    pixels = np.full((height, width, 3), 128.0)
    for cells, strength in ((3, 48), (8, 28), (24, 18), (80, 11), (200, 6)):
        field = rng.standard_normal((max(2, cells * height // width), cells, 3)).astype(np.float32)
        for channel in range(3):
            wide = Image.fromarray(field[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            pixels[..., channel] += strength * np.asarray(wide)
    pixels += 6 * rng.standard_normal((height, width, 1)) + 2.4 * rng.standard_normal(pixels.shape)
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=92)
    return file.getvalue()


def make_files(folder: Path, count: int) -> list[Path]:
    """Photographs of 640 x 480 pixels, a quarter of them upright."""
    rng, paths = np.random.default_rng(0), []
    for number in range(count):
        path = folder / f"{number:06d}.jpg"
        path.write_bytes(photograph(rng, *((480, 640) if number % 4 == 3 else (640, 480))))
        paths.append(path)
    return paths


def prepare(folder: Path, files: list[Path]) -> Path:
    """The same files as a prepared data set: a question and an answer to each."""
    from vlmscale.data.prepare import prepare_dataset

    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": ANSWER}]
    records = [{"id": path.stem, "image": path.name, "conversations": turns} for path in files]
    (folder / "records.json").write_text(json.dumps(records))
    prepare_dataset([folder / "records.json"], files[0].parent, folder / "prepared")
    return folder / "prepared"


def ours(prepared: Path, mode: str, workers: int) -> Any:
    """Endless batches of one conversation a row, with uint8 pixels."""
    from vlmscale.data.conversation import make_template
    from vlmscale.data.dataset import open_dataset
    from vlmscale.data.lengths import Limits, measure
    from vlmscale.data.packing import one_per_row
    from vlmscale.data.pipeline import Layout, batches
    from vlmscale.data.sources import DatasetSource, Pixels
    from vlmscale.data.tokenizer import image_id, padding_id, train_tokenizer

    dataset = open_dataset(prepared)
    tokenizer = train_tokenizer(["What is this?", ANSWER] * 50, 300)
    template = make_template("toy", tokenizer)
    lengths = measure(dataset, template, 256, workers=0)
    layout = Layout.one_per_row(lengths, 144, pad_id=padding_id(tokenizer), image_id=image_id(tokenizer))
    source = DatasetSource(dataset, template, Pixels(SIDE, MEAN, STD, mode), Limits(256))
    return batches(source, layout, partial(one_per_row, len(dataset), 0), BATCH, workers=workers)


def bare(path: Path, mode: str) -> Image.Image:
    """The limit: what Pillow needs for the same picture, with nothing around it."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    if mode == "pad":
        image = expand2square(image, tuple(int(255 * mean) for mean in MEAN))
    if mode != "crop":
        return image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    width, height = (int(SIDE * side / min(image.size)) for side in image.size)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + SIDE, top + SIDE))


class LLaVAPictures:
    """A torch data set of pictures alone, as llava/train/train.py makes them (`LazySupervisedDataset`)."""

    def __init__(self, files: list[Path], mode: str) -> None:
        from transformers import CLIPImageProcessorPil

        sides = {"height": SIDE, "width": SIDE}
        self.files, self.mode = files, mode
        self.processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=sides)

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> Any:
        image = Image.open(self.files[index % len(self.files)]).convert("RGB")
        if self.mode == "pad":
            image = expand2square(image, tuple(int(255 * mean) for mean in self.processor.image_mean))
        return self.processor.preprocess(image, return_tensors="pt")["pixel_values"][0]


def expand2square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """LLaVA's padding (llava/mm_utils.py)."""
    width, height = image.size
    if width == height:
        return image
    square = Image.new(image.mode, (max(width, height),) * 2, colour)
    wide = width > height
    square.paste(image, (0, (width - height) // 2) if wide else ((height - width) // 2, 0))
    return square


def check_same(files: list[Path]) -> None:
    """Both sides make the same numbers of the same files."""
    from vlmscale.data.images import decode_image, preprocess

    for mode in ("crop", "pad"):
        theirs = LLaVAPictures(files, mode)
        for index in (0, 3):
            mine = preprocess(decode_image(files[index], target=SIDE), SIDE, MEAN, STD, mode)
            np.testing.assert_allclose(theirs[index].permute(1, 2, 0).numpy(), mine, rtol=0, atol=1e-6)


def core(prepared: Path, files: list[Path], rounds: int) -> Iterator[dict[str, Any]]:
    """Pictures for each second of one core (CPU time), ours with everything that makes a batch."""
    steps = -(-len(files) // BATCH)
    times: dict[str, list[float]] = {f"{side} {mode}": [] for mode in MODES for side in ("bare", "ours")}
    for number in range(rounds + 1):
        for name in times:
            side, mode = name.split()
            _settle()
            if side == "bare":
                start = time.process_time()
                for path in islice(cycle(files), steps * BATCH):
                    bare(path, mode)
                used = time.process_time() - start
            else:
                with ours(prepared, mode, workers=0) as stream:
                    next(stream)
                    start = time.process_time()
                    for _ in range(steps):
                        next(stream)
                    used = time.process_time() - start
            if number:
                times[name].append(used / (steps * BATCH))
    seconds = {name: statistics.median(values) for name, values in times.items()}
    for mode in MODES:
        ratio = seconds[f"bare {mode}"] / seconds[f"ours {mode}"]
        yield {
            "part": "core",
            "mode": mode,
            "pictures/s": 1 / seconds[f"ours {mode}"],
            "bare Pillow": 1 / seconds[f"bare {mode}"],
            "ratio": ratio,
            "least": 0.85,
            "ok": ratio >= 0.85,
            "of decode and resize alone": seconds["bare resize"] / seconds[f"ours {mode}"],
        }


def _settle() -> None:
    """Wait until threads of what was timed before have ended: their time would count as well."""
    used = -1.0
    while time.process_time() - used > 0.002:
        used = time.process_time()
        time.sleep(0.1)


def loader(prepared: Path, files: list[Path], workers: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Pictures/s of so many workers, by the clock: ours with tokens and labels, theirs without."""
    check_same(files)
    for mode in ("crop", "pad"):
        rates: dict[str, list[float]] = {"ours": [], "theirs": []}
        with ours(prepared, mode, workers) as stream:
            theirs = _theirs(files, mode, workers)
            for side in (stream, theirs):  # starting workers would take time from the other side
                next(side)
            for _ in range(rounds):  # in turn; the workers of the other side wait with full buffers
                rates["ours"].append(_rate(stream, workers))
                rates["theirs"].append(_rate(theirs, workers))
            del theirs  # ends its workers
        ratio = statistics.median(rates["ours"]) / statistics.median(rates["theirs"])
        yield {
            "part": "loader",
            "mode": mode,
            "workers": workers,
            "pictures/s": statistics.median(rates["ours"]),
            "torch DataLoader": statistics.median(rates["theirs"]),
            "ratio": ratio,
            "least": 1.3,
            "ok": ratio >= 1.3,
        }


def _theirs(files: list[Path], mode: str, workers: int) -> Any:
    from torch.utils.data import DataLoader

    pictures: Any = LLaVAPictures(files, mode)
    return iter(DataLoader(pictures, BATCH, num_workers=workers, multiprocessing_context="spawn"))


def _rate(stream: Iterator[Any], workers: int) -> float:
    for _ in range(8 * workers):  # until what was in store is taken, and the other side's workers wait
        next(stream)
    steps, start = 20 * workers, time.perf_counter()
    for _ in range(steps):
        next(stream)
    return steps * BATCH / (time.perf_counter() - start)


def index(folder: Path, count: int) -> Iterator[dict[str, Any]]:
    """A fresh process opens a data set of so many records, each with a picture of its own."""
    from vlmscale.data.prepare import write_dataset
    from vlmscale.data.records import Record, Turn

    file = io.BytesIO()
    Image.new("L", (4, 4)).save(file, "PNG")
    turns = (Turn("<image>\nWhat is this?", ANSWER),)
    # Bytes behind the end of a PNG are not read, and make it another picture.
    records = (
        (Record(str(number), (f"{number}.png",), turns), [file.getvalue() + number.to_bytes(4, "big")])
        for number in range(count)
    )
    write_dataset(folder / "large", {"train": records})
    words = [sys.executable, str(Path(__file__).resolve()), "--open", str(folder / "large")]
    runs = [json.loads(subprocess.run(words, check=True, capture_output=True).stdout) for _ in range(3)]
    seconds, mib = (statistics.median(run[key] for run in runs) for key in ("seconds", "MiB"))
    yield {
        "part": "index",
        "records": count,
        "seconds": seconds,
        "MiB": mib,
        "most": "2 s, 200 MiB",
        "ok": seconds < 2 and mib < 200,
    }


def open_index(path: Path) -> dict[str, float]:
    """Seconds, and what the process grows by, until the last record and picture were read."""
    from vlmscale.data.dataset import open_dataset

    before, start = _resident(), time.perf_counter()
    dataset = open_dataset(path)
    dataset.record(len(dataset) - 1)
    dataset.picture(len(dataset.index.picture_bytes) - 1)
    return {"seconds": time.perf_counter() - start, "MiB": (_resident() - before) / 2**20}


def _resident() -> int:
    """Bytes of this process in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> int:
    """Print a row for each measurement; 1 where one missed its limit."""
    parser = argparse.ArgumentParser(description="pictures/s of the pipeline beside Pillow and torch")
    parser.add_argument("--parts", default="core,loader,index", help="of core, loader, index")
    parser.add_argument("--pictures", type=int, default=128, help="how many are drawn (default 128)")
    parser.add_argument("--records", type=int, default=300_000, help="of the large index (default 300000)")
    parser.add_argument("--workers", type=int, default=2, help="processes of either loader (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="each side's measurements (default 3)")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)  # the process that `index` starts
    arguments = parser.parse_args()
    if arguments.open is not None:
        print(json.dumps(open_index(arguments.open)))
        return 0
    parts, good = arguments.parts.split(","), True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows: list[Iterator[dict[str, Any]]] = []
        if {"core", "loader"} & set(parts):
            (folder / "images").mkdir()
            files = make_files(folder / "images", arguments.pictures)
            size = statistics.mean(os.path.getsize(path) for path in files)
            print(f"{len(files)} JPEGs, {size / 1e3:.0f} kB each; {len(os.sched_getaffinity(0))} cores")
            prepared = prepare(folder, files)
            rows += [core(prepared, files, arguments.rounds)] * ("core" in parts)
            rows += [loader(prepared, files, arguments.workers, arguments.rounds)] * ("loader" in parts)
        rows += [index(folder, arguments.records)] * ("index" in parts)
        for row in (row for part in rows for row in part):
            values = (f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
            print("  ".join(values), flush=True)
            good &= row["ok"]
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
