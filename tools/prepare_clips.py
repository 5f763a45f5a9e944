"""Re-encode clips once, for fast reading: python tools/prepare_clips.py clips/ small/

Each clip becomes an mkv file of the same name: short side 256, 12.5 frames/s, every frame a JPEG,
16 kHz mono PCM. A segment of a file becomes a file of its own. With --clips, small/clips.csv lists
the copies with the same labels. Copies that exist are kept, so the same command continues after a
stop. The exit status is 1 if a clip is bad.
"""

import argparse
import csv
import errno
import math
import os
import pathlib
import shutil
import sys
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data  # noqa: E402

RATE = Fraction(25, 2)  # frames/s: every sampling step of the paper is a multiple of 0.08 s
SIDE = 256  # short side, pixels
BLOCK = data.SAMPLE_RATE // 10  # samples of a packet: whole ms, to which mkv rounds its times
BY_TIME = {"max_interleave_delta": "0"}  # keep sound back until pictures of its time are written


@dataclass
class Prepare:
    """Maps i to (reason, 0) of a bad clip, or else to ("", bytes of its copy)."""

    index: data.Index
    target: str
    quality: int = 5  # JPEG quantizer, 2 (best) to 31; one core still reads 50 clips/s

    def __getitem__(self, i):
        path = pathlib.Path(self.target, copy_name(self.index, i))
        partial = path.with_suffix(".tmp")
        try:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                with av.open(str(partial), "w", "matroska", container_options=BY_TIME) as copy:
                    source = self.index.path(i), (), self.index.segment(i), math.inf
                    with data.open_media(*source) as media:
                        encode(media, copy, self.quality)
                os.replace(partial, path)
            return "", path.stat().st_size

        except data.ClipError as error:
            return str(error), 0
        except (OSError, RuntimeError) as error:
            if getattr(error, "errno", 0) == errno.ENAMETOOLONG:
                return "the name of its copy would be too long", 0
            raise data.UserError(f"{partial} cannot be written: {error}") from None
        finally:
            if os.path.exists(partial):
                partial.unlink()


def copy_name(index, i):
    """Return the name of the copy of clip i, with the times in ms if it is a segment."""
    stem, (start, end, _) = os.path.splitext(os.fsdecode(index.names[i]))[0], index.segment(i)
    return stem + ("" if math.isnan(start) else f"_{start * 1000:.0f}_{end * 1000:.0f}") + ".mkv"


def encode(media, copy, quality):
    """Write the picture and the sound of `media` to an open container."""

    def write(stream, frame):
        try:
            copy.mux(stream.encode(frame))
        except OSError as error:
            raise RuntimeError(error) from None  # `open_media` takes an OSError for a bad clip

    # All streams must exist, and the picture's size be known, before anything is written.
    sound = media.audio and copy.add_stream("pcm_s16le", data.SAMPLE_RATE, layout="mono")
    if media.video:
        start, end = np.clip(media.spans[media.video.index], media.begin, media.end) - media.begin
        first = math.floor(start * RATE + 1e-6)
        count = np.arange(first, max(first + 1, math.ceil(end * RATE - 1e-6)))
        times, resize = media.begin + count / float(RATE), data.resizing(0, SIDE)

        quantizer = dict.fromkeys(("qmin", "qmax"), str(quality))
        picture = copy.add_stream("mjpeg", RATE, options=quantizer, pix_fmt="yuvj420p")
        picture.height, picture.width, _ = next(media.frames(times[:1], resize)).shape

    for frame in audio_frames(media.decode_audio(media.begin, media.end)) if sound else ():
        write(sound, frame)
    if media.video:
        for k, image in zip(count.tolist(), media.frames(times, resize)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = k, 1 / RATE
            write(picture, frame)
        write(picture, None)


def audio_frames(samples):
    """Yield samples (S,) in [-1, 1] as frames at their times, and none where they are NaN."""
    edges = np.flatnonzero(np.diff(~np.isnan(samples), prepend=False, append=False))
    pcm = (np.nan_to_num(samples) * 32768).round().clip(-32768, 32767).astype(np.int16)
    for first, last in edges.reshape(-1, 2).tolist():
        for k in range(first, last, BLOCK):
            block = pcm[None, k : min(k + BLOCK, last)]
            frame = av.AudioFrame.from_ndarray(block, format="s16", layout="mono")
            frame.pts, frame.sample_rate = k, data.SAMPLE_RATE
            frame.time_base = Fraction(1, data.SAMPLE_RATE)
            yield frame


def distinct(index):
    """Return the clips without repetitions; raise UserError if two files would become one."""
    first = {}
    for i in range(len(index)):
        k = first.setdefault(copy_name(index, i), i)
        if index.names[k] != index.names[i]:
            names = " and ".join(sorted(os.fsdecode(index.names[j]) for j in (i, k)))
            raise data.UserError(f"{names} would become one file: rename one of them")
    return index.subset(list(first.values()))


def write_list(clips, index, target):
    """Write the rows of a csv whose copies exist, and its list of classes, for the copies."""
    new = os.path.join(target, "clips.csv")
    if os.path.exists(data.classes_path(clips)):
        shutil.copyfile(data.classes_path(clips), data.classes_path(new))

    how = {"errors": "surrogateescape", "newline": ""}
    with (open(clips, encoding="utf-8-sig", **how) as old,
          open(new + ".tmp", "w", encoding="utf-8", **how) as file):
        rows = csv.DictReader(old)
        writer = csv.DictWriter(file, rows.fieldnames)
        writer.writeheader()
        for i, row in enumerate(rows):  # the rows of the Index
            if os.path.exists(os.path.join(target, copy_name(index, i))):
                whole = {column: "" for column in ("start", "end") if column in row}
                writer.writerow(row | whole | {"path": copy_name(index, i)})
    os.replace(new + ".tmp", new)


def prepare(index, target, quality, workers):
    """Re-encode all clips, print the bad ones and a summary, and return the number of bad ones."""
    index, bad, size = distinct(index), 0, 0
    results = DataLoader(
        Prepare(index, target, quality), None, sampler=range(len(index)), num_workers=workers)
    for i, (reason, more) in enumerate(tqdm(results, unit="clip", disable=None)):
        bad, size = bad + bool(reason), size + more
        if reason:
            tqdm.write(f"bad: {index.name(i)}: {reason}")
        if size and i in (9, 99, 999):
            tqdm.write(f"about {size / (i + 1) * len(index) / 1e9:.2f} GB in all")

    print(f"{len(index) - bad} of {len(index)} clips in {target}, {size / 1e9:.3f} GB; {bad} bad",
          flush=True)
    return bad


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", help="folder of video files, or one file")
    add("target", help="folder to write to, outside of the first")
    add("--clips", default="", help="csv that lists the clips of the folder to prepare")
    add("--quality", type=int, choices=range(2, 32), default=Prepare.quality, metavar="Q",
        help="JPEG quantizer, 2 (best) to 31 [5]")
    add("--workers", type=int, default=data.cpu_count(), help="processes [one per CPU]")

    args = parser.parse_args()
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # for any file name
    source, target = (pathlib.Path(os.path.realpath(x)) for x in (args.folder, args.target))
    if source.is_relative_to(target) or target.is_relative_to(source):
        raise data.UserError(f"{target} and {source} overlap: choose a target outside the folder")

    index = (
        data.read_clips(args.clips, args.folder) if args.clips else data.find_clips(args.folder))
    bad = prepare(index, args.target, args.quality, args.workers)
    if args.clips:
        write_list(args.clips, index, args.target)
    return int(bad > 0)


if __name__ == "__main__":
    sys.excepthook = data.excepthook
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped")
