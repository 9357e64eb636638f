"""The data before the first step: scan of a folder, decoding, a million images in tars, and going on at a late step.

    python benchmarks/data.py [FOLDER] [--full]

Prints one table. FOLDER (out/bench_data) takes what is made for it: small JPEGs of noise, which are then in the disk's
cache; photographs by synthesis; tars of tiny JPEGs with a .json each. Without --full all of it is a tenth as large. What is
timed from the start of a process runs in one of its own. With simplejpeg and opencv-python-headless installed, --wheels
also compares them with Pillow. Nothing is downloaded.
"""

import argparse
import importlib
import io
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from measured import HERE
from million_rows import most_megabytes
from PIL import Image

sys.path.insert(0, str(HERE.parent))
STEP, TURNS, ROWS_A_TAR = 1_000_000, 5, 1000


# what it runs on

def jpeg(image: Image.Image, quality: int) -> bytes:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    return data.getvalue()


def make_small(folder: Path, count: int) -> None:
    """Of 160 to 320 pixels a side, some 10 KB; no two have the same content. A thousand to a folder."""
    draw = np.random.default_rng(0)
    kinds = [jpeg(Image.fromarray(draw.integers(0, 256, (height // 8, width // 8, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC), 80) for width, height in draw.integers(160, 321, (64, 2)).tolist()]
    for number in range(count):
        data, remark = kinds[number % 64], b"image %d" % number
        (folder / f"{number // 1000:03d}").mkdir(parents=True, exist_ok=True)
        (folder / f"{number // 1000:03d}" / f"image_{number:06d}.jpg").write_bytes(
            data[:2] + b"\xff\xfe" + struct.pack(">H", len(remark) + 2) + remark + data[2:])


def make_photo(number: int) -> Image.Image:
    """Some 1500 pixels a side: 1/f noise, as photographs have it, and forty discs with sharp edges."""
    draw = np.random.default_rng(number)
    width, height = ((1500, 1500), (1600, 1200), (1333, 2000), (1536, 1536))[number % 4]
    rate = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    rate[0, 0] = 1
    grey, *colours = (np.fft.irfft2(np.fft.rfft2(draw.standard_normal((height, width))) / rate**1.3, (height, width))
                      for _ in range(4))
    pixels = np.stack([grey + 0.3 * colour for colour in colours], 2)
    pixels = pixels / pixels.std() * 50 + 128
    down, across = np.mgrid[:height, :width]
    for x, y, radius in draw.uniform((0, 0, 10), (width, height, 150), (40, 3)):
        pixels[(across - x) ** 2 + (down - y) ** 2 < radius**2] += draw.uniform(-70, 70, 3)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def make_tars(folder: Path, count: int) -> None:
    """`ROWS_A_TAR` samples a tar, as img2dataset writes them: a JPEG and a .json with its caption."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    kinds = [jpeg(Image.fromarray(draw.integers(0, 256, (2, 2, 3), np.uint8)).resize((width, height)), 30)
             for width, height in draw.integers(4, 33, (32, 2)).tolist()]
    for tar in range(count):
        with (folder / f"{tar:05d}.tar").open("wb") as file:
            for row in range(ROWS_A_TAR):
                key, number = f"{tar:05d}{row:04d}", tar * ROWS_A_TAR + row
                text = json.dumps({"caption": f"a photograph of thing number {number}"}).encode()
                for name, data in ((f"{key}.jpg", kinds[row % 32]), (f"{key}.json", text)):
                    about = tarfile.TarInfo(name)
                    about.size = len(data)
                    file.write(about.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512))
            file.write(bytes(1024))


# what is measured

def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def child(folder: Path, part: str, *arguments: str) -> dict:
    """What a fresh process measures. It is told when it was started."""
    command = [sys.executable, __file__, str(folder), "--part", part, "--started", repr(time.time()), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def scan_folder(folder: Path) -> dict:
    """Images a second of a first and of a second scan: alone, and with the listing of the folder."""
    from library.data.scan import scan
    from library.data.sources.opening import open_source
    from library.data.specs import Fixed, Origin, Spec
    shutil.rmtree(folder / "index", ignore_errors=True)
    spec, found = Spec("set", Origin("folder", str(folder / "small"), captions="filename"), Fixed((1024, 1024))), {}
    for name in ("first", "second"):
        begin = time.perf_counter()
        source = open_source(spec, folder / "index", False)
        listed = time.perf_counter()
        records, faults = scan(source, folder / "index", False)
        end, rows = time.perf_counter(), len(source.names)
        assert not faults and (records["width"] >= 160).all()
        found |= {name: rows / (end - listed), f"{name} with listing": rows / (end - begin)}
    return found


def rows_of_tars(folder: Path, started: float) -> dict:
    """From the start of the process to the rows of step `STEP`: seconds of each part, and the most memory."""
    from library.data.sampler import Sampler
    from library.data.scan import scan
    from library.data.sources.opening import open_source
    from library.data.specs import Buckets, Origin, Spec
    from library.data.table import build
    imported, before = time.time() - started, cpu()
    origin = Origin("shards", str(folder / "tars"), captions="column", caption_column="caption")
    spec = Spec("set", origin, Buckets((1024, 1024), 512, 2048))
    source = open_source(spec, folder / "index", False)
    opened, opened_cpu = time.time() - started, cpu() - before
    records, faults = scan(source, folder / "index", False)
    scanned = time.time() - started
    assert not faults
    table, _ = build(spec, records, source.names, source.texts, source.text_start)
    del records
    _, rows, visits = Sampler(table.bucket_of, 0, 16).batch(STEP)
    end = time.time() - started
    return {"rows": len(table), "import": imported, "open": opened - imported, "open_cpu": opened_cpu,
            "scan": scanned - opened, "order": end - scanned, "all": end, "cpu": cpu(),
            "peak": most_megabytes(), "batch": rows.tolist(), "visits": visits.tolist()}


def target(width: int, height: int) -> tuple[int, int]:
    return round(width * 1024 / min(width, height)), round(height * 1024 / min(width, height))


def with_pillow(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """Pillow alone: decoded at a smaller scale where it can be, and resized."""
    with Image.open(io.BytesIO(data)) as image:
        drafted = image.draft(None, size)
        return np.asarray(image.resize(size, Image.Resampling.LANCZOS, box=drafted[1] if drafted else None))


def with_ours(data: bytes, size: tuple[int, int]) -> np.ndarray:
    from library.data import images
    return np.asarray(images.read_pixels(data, size, "lanczos"))


def rates(ways: dict, photos: list[bytes], workers: int) -> dict[str, list[float]]:
    """Images a second of each way, with `workers` threads, in turns."""
    sizes = [target(*Image.open(io.BytesIO(photo)).size) for photo in photos]
    found = {name: [] for name in ways}
    with ThreadPoolExecutor(workers) as pool:
        for turn in range(TURNS + 1):
            for name in sorted(ways, reverse=turn % 2 == 1):
                begin = time.perf_counter()
                list(pool.map(ways[name], photos, sizes))
                if turn:    # the first is to warm up
                    found[name].append(len(photos) / (time.perf_counter() - begin))
    return found


def reference(image: np.ndarray, size: tuple[int, int], kind: str) -> np.ndarray:
    """[H, W, 3] resized in float64: "lanczos" (of three lobes, widened) or "area" (the mean of what a pixel covers)."""
    for axis, most in enumerate(size[::-1]):
        scale = image.shape[axis] / most
        centres, places = (np.arange(most)[:, None] + 0.5) * scale, np.arange(image.shape[axis])[None]
        if kind == "area":
            weights = np.clip(np.minimum(centres + scale / 2, places + 1) - np.maximum(centres - scale / 2, places), 0, None)
        else:
            away = (places + 0.5 - centres) / max(scale, 1)
            weights = np.where(np.abs(away) < 3, np.sinc(away) * np.sinc(away / 3), 0)
        image = np.moveaxis(np.tensordot(weights / weights.sum(1, keepdims=True), image, (1, axis)), 0, axis)
    return np.clip(image, 0, 255)


def wheels(photos: list[bytes]) -> None:
    """Rates of one thread, and PSNR in dB against both references."""
    cv2, simplejpeg = importlib.import_module("cv2"), importlib.import_module("simplejpeg")
    cv2.setNumThreads(1)

    def area(pixels, size):
        return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)

    ways = {
        "Pillow, Lanczos": with_pillow,
        "simplejpeg, Pillow's Lanczos": lambda data, size: np.asarray(
            Image.fromarray(simplejpeg.decode_jpeg(data)).resize(size, Image.Resampling.LANCZOS)),
        "simplejpeg, INTER_AREA": lambda data, size: area(simplejpeg.decode_jpeg(data), size),
        "simplejpeg at n/8, INTER_AREA": lambda data, size: area(
            simplejpeg.decode_jpeg(data, min_width=size[0], min_height=size[1], min_factor=1), size),
        "OpenCV, INTER_AREA": lambda data, size: area(
            cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB), size)}
    errors = {name: {"lanczos": [], "area": []} for name in ways}
    for photo in photos[:4]:
        whole = np.asarray(Image.open(io.BytesIO(photo)), np.float64)
        size = target(*whole.shape[1::-1])
        for kind in ("lanczos", "area"):
            ideal = reference(whole, size, kind)
            for name, way in ways.items():
                errors[name][kind].append(10 * np.log10(255**2 / np.square(way(photo, size) - ideal).mean()))
    for name, found in rates(ways, photos, 1).items():
        print(f"| {name} | {max(found):.1f} images/s | {np.mean(errors[name]['lanczos']):.1f} dB of Lanczos, "
              f"{np.mean(errors[name]['area']):.1f} dB of areas |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("out/bench_data"))
    parser.add_argument("--full", action="store_true", help="100,000 files and 1,000 tars (1.4 and 2.4 GB)")
    parser.add_argument("--wheels", action="store_true", help="compare decoders, and nothing else")
    parser.add_argument("--workers", type=int, default=2, help="threads that decode")
    for name in ("part", "started"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.folder / ("full" if args.full else "tenth") if not args.part else args.folder
    if args.part:
        print(json.dumps(scan_folder(folder) if args.part == "scan" else rows_of_tars(folder, float(args.started))))
        return
    photos = [jpeg(make_photo(number), 90) for number in range(8)]
    print(f"{len(photos)} photographs of {sum(map(len, photos)) // len(photos) // 1000} KB", file=sys.stderr)
    if args.wheels:
        wheels(photos)
        return
    tenth = 1 if args.full else 10
    if not (folder / "tars").exists():
        shutil.rmtree(folder, ignore_errors=True)
        print("making small JPEGs and tars ...", file=sys.stderr)
        make_small(folder / "small", 100_000 // tenth)
        make_tars(folder / "new", 1000 // tenth)
        (folder / "new").rename(folder / "tars")
    report(folder, photos, args.workers, 100_000 // tenth)


def report(folder: Path, photos: list[bytes], workers: int, small: int) -> None:
    line = "| {} | {} | **{}**{} |".format
    print("| what | target | figure |\n|---|---|---|")
    found = child(folder, "scan")
    print(line(f"scan of {small:,} small JPEGs, first", "5,000 images/s", f"{found['first']:,.0f} images/s",
               f"; {found['first with listing']:,.0f} with the listing of the folder"))
    print(line("second scan, over the first", "10", f"{found['second'] / found['first']:.1f}",
               f"; {found['second with listing'] / found['first with listing']:.1f} with the listing of the folder"))
    speed = rates({"ours": with_ours, "pillow": with_pillow}, photos, workers)
    shares = sorted(one / other for one, other in zip(speed["ours"], speed["pillow"], strict=True))
    best = max(speed["ours"]), max(speed["pillow"])
    print(line(f"photographs decoded and resized to 1024 by {workers} workers, over Pillow with draft", "1",
               f"{best[0] / best[1]:.2f}", f" best of {TURNS} turns, {shares[TURNS // 2]:.2f} median; {best[0]:.1f} images/s"))
    shutil.rmtree(folder / "index", ignore_errors=True)
    first, again = child(folder, "tars"), child(folder, "tars")
    assert first["batch"] == again["batch"] and first["visits"] == again["visits"]
    rows = first["rows"]
    print(line(f"index of {rows:,} images and captions in {rows // ROWS_A_TAR:,} tars", "20,000 members/s a core",
               f"{2 * rows / first['open_cpu']:,.0f}", f"; {first['open']:.1f} s"))
    print(line("first scan of them", "", f"{rows / first['scan']:,.0f} images/s", f"; {first['scan']:.1f} s"))
    print(line("most memory: first start, later start", "1,000 MB", f"{first['peak']:.0f} MB", f", {again['peak']:.0f} MB"))
    parts = ", ".join(f"{name} {again[name]:.1f}" for name in ("import", "open", "scan", "order"))
    print(line(f"from the start of the process to the rows of step {STEP:,}", "5 s", f"{again['all']:.1f} s",
               f": {parts}; {again['cpu']:.1f} CPU-s"))


if __name__ == "__main__":
    main()
