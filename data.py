"""Clips for Audiovisual Masked Autoencoders: video files with sound, or generated ones.

    files, annotations -> Index -> Clips[(epoch, i)] -> {"audio": (T, F), "video": (T, H, W, 3)}

A clip is cut by time: frames and sound of the same moments, whatever the file's own rates (paper
Sec. 4.1). All randomness comes from (seed, epoch, i), and batch k from (seed, k): order, crops and
masks depend neither on the number of processes nor on where a run was resumed.

    python data.py check clips/            # what is unreadable, silent, too short, and why
    python data.py prepare clips/ small/   # re-encodes once, for fast reading
"""

import argparse
import contextlib
import csv
import functools
import gc
import hashlib
import io
import math
import os
import pathlib
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction

import av
import numpy as np
import torch
import torchaudio
from av.video.reformatter import VideoReformatter
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

MODALITIES = ("video", "audio")
# Containers with pictures and sound of their own: a playlist named .mp4 could point anywhere.
CONTAINERS = "mov,mp4,m4a,3gp,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf"
SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi")
SAMPLE_RATE = 16_000  # Hz
HOP = 160  # samples: 10 ms
MEL_WINDOW = 400  # samples: 25 ms
N_FFT = 1024
MEL_OFFSET = 0.01  # in log(mel + offset)
PREROLL = 0.25  # s of sound decoded ahead: codecs need some time to settle after a seek
SLACK = 0.25  # s by which stamps and samples of a track may disagree
TIME_LIMIT = 60.0  # s to read a clip; a file that takes longer is a bad file
av.logging.set_level(av.logging.PANIC)  # a damaged file is told by name, once
AV_ERRORS = (av.error.FFmpegError, OSError, ValueError, IndexError, EOFError)


class UserError(ValueError):
    """A mistake of the user's, told in a sentence that says what to do."""

    def __init__(self, sentence):  # a data worker passes it on at the end of a traceback
        super().__init__(str(sentence).rsplit("UserError: ", 1)[-1].strip())


def one_sentence(kind, error, trace):
    """For sys.excepthook: what a user or a disk causes is told in a sentence, without a trace."""
    if issubclass(kind, (ValueError, OSError)):
        print(f"error: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


class ClipError(Exception):
    """Why a clip cannot be used."""


@dataclass(frozen=True)
class Window:
    """What is cut out of a clip. The defaults are the paper's pretraining."""

    frames: int = 16
    step: float = 0.16  # s between frames: stride 4 at 25 frames/s
    size: int = 224  # height and width of the crop, pixels
    seconds: float = 8.0  # of audio: 100 log-mel frames each
    mels: int = 128

    @property
    def video_seconds(self):
        return self.frames * self.step


@dataclass(frozen=True)
class Augment:
    """Randomness of training. The defaults are the pretraining recipe: random crop and flip."""

    flip: bool = True  # with probability 0.5
    jitter: tuple = (1.0, 1.0)  # scale of height and of width, before the crop
    colour: bool = False
    time_shift: bool = False  # circular, uniform, of the spectrogram
    frequency_masks: tuple = (0, 0)  # SpecAugment: how many, up to how many bins
    time_masks: tuple = (0, 0)  # how many, up to how many frames


# ---------------------------------------------------------------------------------------------
# Sound


@functools.cache
def _mel_transform(mels):
    return torchaudio.transforms.MelSpectrogram(
        SAMPLE_RATE, n_fft=N_FFT, win_length=MEL_WINDOW, hop_length=HOP, f_min=0.0, f_max=8000.0,
        n_mels=mels, window_fn=torch.hamming_window, power=1.0)


def log_mel(waveform, mels=128):
    """Log-mel spectrogram of a 16 kHz mono waveform in [-1, 1]: (S,) -> (S // 160, mels).

    25 ms Hamming window, 10 ms hop (Sec. 4.1). The paper leaves the rest open; here: FFT of 1024,
    mel bins from 0 to 8000 Hz (HTK scale), magnitudes, log(mel + 0.01), no normalisation.
    """
    return (_mel_transform(mels)(waveform)[:, : len(waveform) // HOP].T + MEL_OFFSET).log()


# ---------------------------------------------------------------------------------------------
# Reading a file: frames and samples by time


class Media:
    """An open video file. Times are in seconds from the earliest stream's start.

    ClipError if it cannot be opened, lacks a stream of `modalities`, or is too slow.
    """

    def __init__(self, path, modalities=MODALITIES):
        self.deadline = time.monotonic() + TIME_LIMIT
        if not os.path.isfile(path):  # a directory or a pipe, which would block
            raise ClipError("not a file")
        try:
            self.container = av.open(
                os.fspath(path), timeout=TIME_LIMIT, metadata_errors="replace",
                options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"})
        except AV_ERRORS as error:
            raise ClipError(f"cannot be opened ({type(error).__name__})") from None
        streams = self.container.streams
        found = ([s for s in kind if s.codec_context] for kind in (streams.video, streams.audio))
        self.video, self.audio = (usable[0] if usable else None for usable in found)
        if "video" in modalities and self.video is None:
            self.close()
            raise ClipError("no picture")
        if "audio" in modalities and self.audio is None:
            self.close()
            raise ClipError("no audio track")
        used = [s for s in (self.video, self.audio) if s is not None]
        self.origin = min(
            float(s.start_time * s.time_base) if s.start_time is not None else 0.0 for s in used)
        if self.video is not None:
            self.video.codec_context.thread_count = 1  # workers share the cores
        self.scaler = VideoReformatter()

    def close(self):
        self.container.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        self.close()
        if kind and issubclass(kind, AV_ERRORS):  # whatever went wrong while reading
            raise ClipError(f"cannot be decoded ({kind.__name__})") from error

    def length(self, stream):
        """End of a stream, s; by its header, else its container's, else its last packet."""
        if stream.duration is not None:
            begin = stream.start_time or 0
            return float((begin + stream.duration) * stream.time_base) - self.origin
        if self.container.duration is not None:
            return self.container.duration / av.time_base
        times = [
            p.pts + (p.duration or 0) for p in self.container.demux(stream) if p.pts is not None]
        return float(max(times, default=0) * stream.time_base) - self.origin

    def decode(self, stream, start):
        """(time, frame) of a stream from the last keyframe before `start`."""

        def seek(to):
            self.container.seek(
                math.floor((to + self.origin) / stream.time_base), stream=stream, backward=True)

        def frames():
            last = start
            # where every packet is a picture of its own, only those that are shown get decoded
            intra = stream.type == "video" and stream.codec_context.codec.intra_only
            for frame in self.container.demux(stream) if intra else self.container.decode(stream):
                if time.monotonic() > self.deadline:
                    raise ClipError(f"takes longer than {TIME_LIMIT:g} s to read")
                if intra and not frame.size:  # the packet that flushes a decoder
                    continue
                if frame.pts is not None:
                    last = float(frame.pts * frame.time_base) - self.origin
                yield last, frame

        seek(start)
        first = next(found := frames(), None)
        if first is None or first[0] > start + 1e-3:  # an index that lies: decode it all
            seek(-1.0)
            yield from frames()
        else:
            yield first
            yield from found

    def frames(self, times, resize):
        """Yields the pictures shown at increasing `times`: (H, W, 3) uint8 arrays.

        resize: (height, width) of a picture -> of the result. The last frame with pts <= t is t's.
        """
        shown, at, k = None, 0.0, 0
        for at, frame in self.decode(self.video, times[0]):
            while k < len(times) and at > times[k] + 1e-3:
                shown = self.picture(frame if shown is None else shown, resize)
                yield shown
                k += 1
            if k == len(times):
                return
            shown = frame
        if shown is None:
            raise ClipError("no picture can be decoded")
        if times[-1] > at + max(1.0, 2 / (self.video.average_rate or 2)):
            raise ClipError(f"the picture ends at {at:.2f} s, before its stated end")
        for _ in times[k:]:
            shown = self.picture(shown, resize)
            yield shown

    def samples(self, start, stop):
        """Sound from `start` to `stop`: (S,) float32, mono, 16 kHz, NaN where there is none."""
        resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
        parts, begin, heard = [], None, 0.0
        for at, frame in self.decode(self.audio, start - PREROLL):
            if at >= stop:
                break
            begin = at if begin is None else begin
            if abs(at - begin - heard) > SLACK:
                raise ClipError(f"a gap in the sound at {at:.2f} s")
            heard += frame.samples / frame.sample_rate
            frame.pts = None  # samples are counted from the first
            parts += [f.to_ndarray()[0] for f in resampler.resample(frame)]
        sound = np.full(round((stop - start) * SAMPLE_RATE), np.nan, np.float32)
        if begin is not None:
            parts = np.concatenate(parts + [f.to_ndarray()[0] for f in resampler.resample(None)])
            first = round((begin - start) * SAMPLE_RATE)
            parts = parts[max(0, -first) :][: max(0, len(sound) - max(0, first))]
            sound[max(0, first) : max(0, first) + len(parts)] = parts
        return sound

    def picture(self, frame, resize):
        """A frame, or a packet that holds one, as upright (H, W, 3) uint8, resized; an array is one
        already."""
        if isinstance(frame, np.ndarray):
            return frame
        if isinstance(frame, av.Packet):
            frame = frame.decode()[0]
        if frame.is_corrupt:
            raise ClipError("a damaged picture")
        turns = _quarter_turns(frame)
        height, width = frame.height, frame.width
        height, width = resize(height, width) if turns % 2 == 0 else resize(width, height)[::-1]
        frame = self.scaler.reformat(frame, width, height, "rgb24", interpolation="BILINEAR")
        return np.rot90(frame.to_ndarray(), turns)


def _quarter_turns(frame):
    """Quarter turns anticlockwise that put a frame upright, from its display matrix."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 0
    a, b = np.frombuffer(bytes(matrix), np.int32)[:2]
    return -round(math.atan2(b, a) / (math.pi / 2)) % 4


def segment_of(media, start, end):
    """The part (start, end) of a file that a row means; all of it if they are NaN. A file is as
    long as its picture.

    A segment that reaches beyond a file of about its own length means that the file is already cut.
    """
    length = media.length(media.audio if media.video is None else media.video)
    if not 0 < length < 1e6:
        raise ClipError(f"its stated length is {length:g} s")
    if math.isnan(start) or (end > length + 0.5 and length <= end - start + 1):
        return 0.0, length
    if start >= length:
        raise ClipError(f"its segment starts at {start:.2f} s, the file ends at {length:.2f} s")
    return start, min(end, length)


def wrapped(start, begin, end, seconds):
    """The window [start, start + seconds), which wraps round the segment [begin, end), as intervals
    inside it; one turn at most."""
    seconds = min(seconds, end - begin)
    turn = min(start + seconds, end)
    rest = start + seconds - turn
    return [(start, turn)] + ([(begin, begin + rest)] if rest > 1e-6 else [])


def read_video(media, start, begin, end, window, resize):
    """Frames from `start` on, wrapping round the segment's end: (T, H, W, 3) uint8."""
    end = max(begin + 1e-3, min(end, media.length(media.video)))
    times = begin + (start - begin + np.arange(window.frames) * window.step) % (end - begin)
    runs = np.split(times, np.flatnonzero(np.diff(times) < 0) + 1)
    return np.stack([picture for run in runs for picture in media.frames(run, resize)])


def read_audio(media, start, begin, end, seconds):
    """Samples from `start` on, wrapping round the segment's end: (S,) float32. Where the track has
    none, what it has repeats; nothing is filled with silence."""
    parts = [media.samples(*interval) for interval in wrapped(start, begin, end, seconds)]
    if all(np.isnan(p).all() for p in parts):
        parts = [media.samples(begin, min(end, begin + 60.0))]
    sound = np.concatenate(parts)
    missing = np.isnan(sound)
    if missing.all():
        raise ClipError("no sound can be decoded")
    sound[missing] = np.resize(sound[~missing], missing.sum())
    return np.resize(sound, round(seconds * SAMPLE_RATE))


# ---------------------------------------------------------------------------------------------
# Transforms: pure functions of a clip and a random generator


def resizing(size, short, jitter=(1.0, 1.0)):
    """(height, width) -> the size at which the short side is `short`, each side times its jitter,
    and none less than the crop `size`."""

    def resize(height, width):
        scale = short / min(height, width)
        sides = (2 * round(s * scale * j / 2) for s, j in zip((height, width), jitter))
        return tuple(max(size, side) for side in sides)  # even, as the frames of prepared files are

    return resize


def crop(video, size, rng=None):
    """(T, H, W, 3) -> (T, size, size, 3): at random, or the centre without a generator."""
    room = video.shape[1] - size, video.shape[2] - size
    y, x = (int(rng.integers(r + 1)) if rng else r // 2 for r in room)
    return video[:, y : y + size, x : x + size]


def colour_jitter(video, rng):
    """With probability 0.8 brightness, saturation, contrast and hue, then with probability 0.1
    grayscale (finetuning recipe); one draw for all frames. (T, H, W, 3) uint8 -> same."""
    x = torch.from_numpy(np.ascontiguousarray(video)).permute(0, 3, 1, 2).float() / 255
    jittered, gray = rng.random() < 0.8, rng.random() < 0.1
    brightness, hue = rng.uniform(-32 / 255, 32 / 255), rng.uniform(-0.2, 0.2)
    saturation, contrast = rng.uniform(0.6, 1.4, 2)
    if jittered:
        x = transforms.adjust_saturation((x + brightness).clamp(0, 1), saturation)
        x = transforms.adjust_hue(transforms.adjust_contrast(x, contrast), hue).clamp(0, 1)
    if gray:
        x = transforms.rgb_to_grayscale(x, num_output_channels=3)
    return (x * 255).round().byte().permute(0, 2, 3, 1).numpy()


def spec_augment(mel, augment, rng):
    """Circular shift, then frequency and time masks of value 0. (T, F) -> (T, F)."""
    if augment.time_shift:
        mel = mel.roll(int(rng.integers(len(mel))), 0)
    mel = mel.clone()
    for axis, (count, widest) in (1, augment.frequency_masks), (0, augment.time_masks):
        for _ in range(count):
            width = int(rng.integers(min(widest, mel.shape[axis]) + 1))
            mel.narrow(axis, int(rng.integers(mel.shape[axis] - width + 1)), width).zero_()
    return mel


# ---------------------------------------------------------------------------------------------
# The data set


class Clips(torch.utils.data.Dataset):
    """Clips of an Index, addressed by (epoch, i).

    augment None is evaluation: `views` windows at evenly spaced starts (audio on its own), centre
    crop, and an unreadable clip has no tensors. In training, the next readable one replaces it.
    """

    def __init__(self, index, window, modalities=MODALITIES, augment=None, seed=0, views=1):
        self.index, self.window, self.modalities = index, window, modalities
        self.augment, self.seed, self.views = augment, seed, views

    def __len__(self):
        return len(self.index)

    def name(self, i):
        return self.index.name(i)

    def __getitem__(self, key):
        """-> {"audio": (T, F) float32, "video": (T, H, W, 3) uint8, "label": (K,) int64,
        "index": i, "bad": [(name, reason)]}; several views are the first axis of both."""
        epoch, wanted = key
        bad = []
        for i in range(wanted, wanted + (len(self) if self.augment else 1)):
            i %= len(self)
            try:
                clip = self.read(i, np.random.default_rng([self.seed, epoch, i]))
                return {**clip, "label": self.index.label(i), "index": i, "bad": bad}
            except ClipError as error:
                bad.append((self.name(i), str(error)))
            if len(bad) >= 1000 or (self.augment and len(bad) == len(self)):
                raise UserError(
                    f"none of {len(bad)} clips can be read; the first: {bad[0][0]}: {bad[0][1]}. "
                    "Run python data.py check on the folder")
        return {"index": wanted, "bad": bad}

    def read(self, i, rng):
        with Media(self.index.path(i), self.modalities) as media:
            begin, end = segment_of(media, *self.index.segment(i))
            if self.augment:
                start = begin + rng.random() * max(0.0, end - begin - self.window.video_seconds)
                return self.cut(media, start, start, begin, end, rng)
            views = [self.cut(media, *starts, begin, end) for starts in self.starts(begin, end)]
        return {
            m: torch.stack([v[m] for v in views]) if self.views > 1 else views[0][m]
            for m in views[0]}

    def starts(self, begin, end):
        """Evenly spaced starts of the video and the audio windows, from the first to the last."""
        room = (max(0.0, end - begin - s) for s in (self.window.video_seconds, self.window.seconds))
        return zip(*(begin + np.linspace(0, r, self.views) for r in room))

    def cut(self, media, video_start, audio_start, begin, end, rng=None):
        """A window as tensors {m: ...}."""
        w, clip = self.window, {}
        if "video" in self.modalities:
            jitter = rng.uniform(*self.augment.jitter, 2) if rng else (1.0, 1.0)
            short = round(w.size * 256 / 224) if rng else w.size
            video = read_video(media, video_start, begin, end, w, resizing(w.size, short, jitter))
            video = crop(video, w.size, rng)
            if rng and self.augment.flip and rng.random() < 0.5:
                video = video[:, :, ::-1]
            if rng and self.augment.colour:
                video = colour_jitter(video, rng)
            clip["video"] = torch.from_numpy(np.ascontiguousarray(video))
        if "audio" in self.modalities:
            sound = read_audio(media, audio_start, begin, end, w.seconds)
            clip["audio"] = log_mel(torch.from_numpy(sound), w.mels)
            if rng:
                clip["audio"] = spec_augment(clip["audio"], self.augment, rng)
        return clip


def to_device(batch, device):
    """The clips {m: (B, ...)} of a batch on a device; bytes stay bytes."""
    return {m: batch[m].to(device, non_blocking=True) for m in MODALITIES if m in batch}


def collate(samples):
    """Samples -> a batch: tensors stacked, "index" (B,), "bad" one list. Samples without tensors
    (unreadable, in evaluation) are left out."""
    good = [s for s in samples if "label" in s]
    batch = {
        k: torch.stack([s[k] for s in good])
        for k in (*MODALITIES, "label")
        if good and k in good[0]}
    return batch | {
        "index": torch.tensor([s["index"] for s in good]),
        "bad": sum((s["bad"] for s in samples), [])}


class Batches:
    """Batch sampler that computes batch k from (seed, k).

    Clips come as a stream of epochs, each a permutation made from (seed, epoch); batch k is the
    stream's clips k*batch to (k+1)*batch. Each epoch has each clip once, whatever the number of
    processes, and a batch may span epochs. Yields the keys (epoch, i) of this process's rows.
    """

    def __init__(self, count, batch, seed, start, stop, rank=0, world=1):
        self.count, self.batch, self.seed, self.steps = count, batch, seed, range(start, stop)
        self.rows = range(rank * batch // world, (rank + 1) * batch // world)

    def __len__(self):
        return len(self.steps)

    def __iter__(self):
        @functools.lru_cache(maxsize=2)
        def order(epoch):
            return np.random.default_rng([self.seed, epoch]).permutation(self.count)

        for step in self.steps:
            places = (divmod(step * self.batch + row, self.count) for row in self.rows)
            yield [(epoch, int(order(epoch)[i])) for epoch, i in places]


# ---------------------------------------------------------------------------------------------
# Which clips there are: folders and annotation files


@dataclass(frozen=True)
class Index:
    """Clips as numpy arrays, which worker processes share; Python objects they would copy.

    names (N,) bytes, paths inside `folder`; start, end (N,) s, NaN for the whole file;
    labels (N, K) int, -1 where a clip has fewer; classes: names of the labels (of verbs, then of
    nouns, for Epic Kitchens).
    """

    folder: str
    names: np.ndarray
    start: np.ndarray
    end: np.ndarray
    labels: np.ndarray
    classes: tuple = ()
    task: str = "single"  # how labels are meant: single, many, epic, ave

    def __len__(self):
        return len(self.names)

    def name(self, i):
        """Path in the folder, and the segment if there is one."""
        cut = "" if np.isnan(self.start[i]) else f" [{self.start[i]:.2f}-{self.end[i]:.2f} s]"
        return os.fsdecode(self.names[i]) + cut

    def path(self, i):
        return os.path.join(self.folder, os.fsdecode(self.names[i]))

    def segment(self, i):
        return float(self.start[i]), float(self.end[i])

    def label(self, i):
        return torch.from_numpy(self.labels[i].astype(np.int64))

    def subset(self, which):
        """The clips of a mask (N,) or of ids."""
        return replace(
            self, **{k: getattr(self, k)[which] for k in ("names", "start", "end", "labels")})


def _index(folder, rows, classes=(), task="single"):
    """rows [(name, start, end, labels)] -> Index."""
    width = max((len(r[3]) for r in rows), default=1) or 1
    labels = np.full((len(rows), width), -1, np.int16)
    for i, row in enumerate(rows):
        labels[i, : len(row[3])] = row[3]
    start, end = (np.array([r[k] for r in rows], np.float64) for k in (1, 2))
    return Index(
        str(folder), np.array([os.fsencode(r[0]) for r in rows], dtype=bytes), start, end, labels,
        classes, task)


def _files(folder):
    """Paths of the video files below a folder, sorted."""
    if not os.path.isdir(folder):
        raise UserError(f"there is no folder {folder}")
    found = [
        os.path.relpath(os.path.join(at, name), folder)
        for at, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
    if not found:
        raise UserError(f"no video files ({', '.join(SUFFIXES)}) below {folder}")
    return sorted(found)


def find_clips(folder):
    """All video files below a folder; those in clips/LABEL/ have that label. -> Index"""
    files = _files(folder)
    parents = [pathlib.PurePath(f).parent.name for f in files]
    classes = tuple(sorted(set(parents) - {""}))
    number = {c: i for i, c in enumerate(classes)}
    return _index(
        folder, [(f, math.nan, math.nan, [number.get(p, -1)]) for f, p in zip(files, parents)],
        classes)


def single_clip(path):
    """An Index of one file."""
    path = pathlib.Path(path)
    if not path.exists():
        raise UserError(f"there is no file {path}")
    return _index(path.parent, [(path.name, math.nan, math.nan, [])])


def held_out(index, share=0.02, salt=b"held out"):
    """A mask (N,) of about this share of the clips, by hash of the file's stem: stable when clips
    are added, and two segments of a file stay together."""
    stems = (pathlib.PurePath(os.fsdecode(n)).stem.encode() for n in index.names)
    hashes = (hashlib.blake2b(s, digest_size=4, salt=salt).digest() for s in stems)
    hashes = np.array([int.from_bytes(h, "big") for h in hashes])
    # of a few clips, too, one is held out
    return (hashes < share * 2**32) | ((hashes == hashes.min()) & (len(hashes) > 1))


def fraction_of(index, share):
    """A part of the clips, by another hash; a smaller part lies inside a larger one (Table 17)."""
    return index if share >= 1 else index.subset(held_out(index, share, b"fraction"))


def _table(file):
    """The cells of an annotation file, row by row."""
    try:
        text = pathlib.Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read annotations {file}: {error}") from None
    if "&" in text.split("\n", 1)[0]:
        return [line.split("&") for line in text.splitlines() if line.strip()]
    rows = csv.reader(io.StringIO(text), skipinitialspace=True)
    return [row for row in rows if row and not row[0].startswith("#")]


def _is_number(text):
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _seconds(text):
    """HH:MM:SS.ss -> s"""
    return sum(float(part) * unit for part, unit in zip(reversed(text.split(":")), (1, 60, 3600)))


def _vggsound(rows, file):
    classes = tuple(sorted({r[2] for r in rows}))
    number = {c: i for i, c in enumerate(classes)}
    return (
        [(r[0], float(r[1]), float(r[1]) + 10, [number[r[2]]], r[3]) for r in rows], classes,
        "single")


def _audioset(rows, file):
    path = pathlib.Path(file).parent / "class_labels_indices.csv"
    if not path.exists():
        raise UserError(f"AudioSet's class_labels_indices.csv must lie beside {file}")
    names = {r[1]: (int(r[0]), r[2]) for r in _table(path)[1:]}
    unknown = sorted({mid for r in rows for mid in r[3].split(",")} - set(names))
    if unknown:
        raise UserError(
            f"{file} has labels that class_labels_indices.csv lacks: {', '.join(unknown[:3])}")
    classes = tuple(name for _, name in sorted(names.values()))
    return (
        [
            (r[0], float(r[1]), float(r[2]), [names[mid][0] for mid in r[3].split(",")], None)
            for r in rows],
        classes, "many")


def _epic(rows, file):
    at = {
        name: rows[0].index(name)
        for name in ("video_id", "start_timestamp", "stop_timestamp", "verb_class", "noun_class")}
    classes = []
    for kind, count in ("verb", 97), ("noun", 300):
        path = pathlib.Path(file).parent / f"EPIC_100_{kind}_classes.csv"
        known = {int(r[0]): r[1] for r in _table(path)[1:]} if path.exists() else {}
        classes.append(tuple(known.get(i, f"{kind} {i}") for i in range(count)))
    found = [
        (
            r[at["video_id"]], _seconds(r[at["start_timestamp"]]),
            _seconds(r[at["stop_timestamp"]]), [int(r[at["verb_class"]]), int(r[at["noun_class"]])],
            None)
        for r in rows[1:]]
    wrong = [r for r in found if not (0 <= r[3][0] < 97 and 0 <= r[3][1] < 300)]
    if wrong:
        raise UserError(f"{file} has verb or noun classes beyond 97 and 300: {wrong[0][3]}")
    return found, tuple(classes), "epic"


def _ave(rows, file):
    rows = rows[1:] if rows[0][0] == "Category" else rows
    every = pathlib.Path(file).parent / "Annotations.txt"
    listed = _table(every)[1:] if every.exists() else rows
    names = sorted({r[0] for r in listed} | {r[0] for r in rows})
    found = []
    for category, video, _, start, end in rows:
        labels = np.full(10, len(names))  # background
        labels[int(float(start)) : int(float(end))] = names.index(category)
        found.append((video, math.nan, math.nan, labels.tolist(), None))
    return found, (*names, "background"), "ave"


def _plain(rows, file):
    header = rows[0] if rows[0][0].lower() == "path" else None
    rows = rows[1:] if header else rows
    timed = all(len(r) >= 3 and _is_number(r[1]) and _is_number(r[2]) for r in rows)
    split = header.index("split") if header and "split" in header else None
    labels = [
        [c for k, c in enumerate(r) if k >= (3 if timed else 1) and k != split and c] for r in rows]
    classes = tuple(sorted({name for r in labels for name in r}))
    number = {c: i for i, c in enumerate(classes)}
    found = [
        (
            r[0], float(r[1]) if timed else math.nan, float(r[2]) if timed else math.nan,
            [number[c] for c in names], r[split] if split else None)
        for r, names in zip(rows, labels)]
    return found, classes, "many" if any(len(r[3]) > 1 for r in found) else "single"


FORMATS = {  # name: (does the second row look like it, its parser)
    "EPIC-Kitchens": (lambda first, row: "narration_id" in first and "verb_class" in first, _epic),
    "AVE": (lambda first, row: len(row) == 5 and _is_number(row[3]) and _is_number(row[4]), _ave),
    "VGGSound": (
        lambda first, row: len(row) == 4 and _is_number(row[1]) and row[3] in ("train", "test"),
        _vggsound),
    "AudioSet": (lambda first, row: len(row) == 4 and row[3].startswith("/"), _audioset),
    "plain": (lambda first, row: row[0].lower().endswith(SUFFIXES), _plain),
}


def _parsed(file):
    """The rows [(name, start, end, labels, split)] of an annotation file, its classes and its task,
    and whether names are paths."""
    rows = _table(file)
    if not rows:
        raise UserError(f"{file} has no rows")
    row = rows[min(1, len(rows) - 1)]
    parser = next((parse for fits, parse in FORMATS.values() if fits(rows[0], row)), None)
    if parser is None:
        raise UserError(
            f"{file} is of no known format: {', '.join(FORMATS)} (path[,start,end][,label...])")
    try:
        return *parser(rows, file), parser is _plain
    except (IndexError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} has a row that is not of its format: {error}") from None


@contextlib.contextmanager
def _no_gc():
    """Millions of rows are made, none of them garbage: not to search takes half the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@_no_gc()
def read_annotations(file, folder, split=None, allow_outside=False):
    """The clips that an annotation file lists and a folder has. -> Index

    The format is recognised from the content: VGGSound's csv, AudioSet's *_segments.csv,
    EPIC-Kitchens-100's csv, AVE's text files, or `path[,start,end][,label...]`, whose paths must
    not lead out of the folder unless that is allowed. Only rows of `split` ("train" or "test") if
    the file has splits. Says how many rows found their file.
    """
    listed, classes, task, paths = _parsed(file)
    if split:
        listed = [r for r in listed if r[4] in (None, split)]
    if paths:
        names = {r[0] for r in listed}
        if not allow_outside:
            _refuse_outside(folder, names)
        at = {name: name for name in names if os.path.isfile(os.path.join(folder, name))}
    else:
        at = {os.path.splitext(os.path.basename(f))[0]: f for f in reversed(_files(folder))}
    found, missing = [], []
    for name, start, end, labels, _ in listed:
        stem = next((s for s in ([name] if paths else _stems(name, start, end)) if s in at), None)
        if stem is None:
            missing.append(name)
            continue
        whole = stem not in (name, "Y" + name)  # a name with its times is of a file cut at them
        found.append((at[stem], math.nan if whole else start, math.nan if whole else end, labels))
    print(
        f"{file}: {len(found)} of {len(listed)} rows found their file below {folder}"
        + (f"; the first that did not: {missing[0]}" if missing else ""))
    if not found:
        raise UserError(
            f"no row of {file} found its file below {folder}: files are looked for by names like "
            f"{', '.join(list(_stems(*listed[0][:3]))[:4]) if listed else 'ID'}")
    return _index(folder, found, classes, task)


def _stems(name, start, end):
    """How people name the file of a row, most particular first."""
    if not math.isnan(start):
        for prefix in "", "Y":
            yield f"{prefix}{name}_{round(start * 1000)}_{round(end * 1000)}"
            yield f"{prefix}{name}_{int(start):06d}"
            yield f"{prefix}{name}_{int(start)}"
    yield from (name, "Y" + name)


def _refuse_outside(folder, names):
    root = os.path.realpath(folder)
    for name in sorted(names):
        if not os.path.realpath(os.path.join(root, name)).startswith(root + os.sep):
            raise UserError(f"{name!r} leads out of {folder}: refused without --allow-outside")


def labelled_clips(folder, annotations="", test_annotations="", allow_outside=False):
    """{"train": Index, "test": Index} with the same classes.

    From annotation files (one with splits, or two), or from folder names: clips/train/LABEL/ and
    clips/test/LABEL/, else clips/LABEL/ with a tenth for testing, by hash.
    """
    if annotations:
        train = read_annotations(annotations, folder, "train", allow_outside)
        test = read_annotations(test_annotations or annotations, folder, "test", allow_outside)
        if not test_annotations and len(test) == len(train) and (test.names == train.names).all():
            train, test = _split(train)
    elif os.path.isdir(os.path.join(folder, "train")) and os.path.isdir(
        os.path.join(folder, "test")):
        train, test = (find_clips(os.path.join(folder, part)) for part in ("train", "test"))
    else:
        train, test = _split(find_clips(folder))
    if not train.classes:
        raise UserError(
            f"the clips of {folder} have no labels: give --annotations, or folders named by label")
    return {"train": train, "test": _renumbered(test, train.classes)}


def _renumbered(index, classes):
    """The clips with labels numbered as in `classes`."""
    if index.classes == classes:
        return index
    unknown = sorted(set(map(str, index.classes)) - set(map(str, classes)))
    if unknown:
        raise UserError(
            f"the test clips have labels that the training clips lack: {', '.join(unknown[:3])}")
    number = np.array([*map(classes.index, index.classes), -1], np.int16)  # -1 stays -1
    return replace(index, labels=number[index.labels], classes=classes)


def _split(index):
    test = held_out(index, 0.1)
    return index.subset(~test), index.subset(test)


# ---------------------------------------------------------------------------------------------
# Built-in clips: generated, deterministic by (seed, index)

SHAPES = ("disc", "square", "triangle", "cross")
VOICES = {  # relative loudness of the partials 1, 2, 3, ... of a tone
    "flute": (1.0, 0.1, 0.02),
    "organ": (1.0, 0.7, 0.0, 0.5, 0.0, 0.0, 0.0, 0.4),
    "clarinet": (1.0, 0.0, 0.6, 0.0, 0.4, 0.0, 0.3),
    "bell": (0.4, 0.0, 0.0, 1.0, 0.0, 0.8),
}


@dataclass(frozen=True)
class Scene:
    """What happens in a generated clip; lengths are shares of the frame's side."""

    shape: int
    voice: int
    radius: float
    turn: float  # radians
    loudness: float
    phase: np.ndarray  # (2,) x, y: where the path starts, in travel-lengths
    speed: np.ndarray  # (2,) travel-lengths a second
    colour: np.ndarray  # (3,) of the shape
    ground: np.ndarray  # (3, 3): each channel's level, and its slope to the right and down
    noise: int  # seed of the hits' and the floor's noise

    def position(self, times):
        """Centre (T, 2) at the times (T,) in s; a triangle wave: it bounces between the walls."""
        where = (self.phase + self.speed * np.asarray(times)[:, None]) % 2
        return self.radius + (1 - 2 * self.radius) * np.minimum(where, 2 - where)

    def bounces(self, seconds):
        """Times of contact with a wall, s, sorted."""
        times = []
        for phase, speed in zip(self.phase, self.speed):
            ends = sorted((phase, phase + speed * seconds))
            times += [
                (k - phase) / speed for k in range(math.ceil(ends[0]), math.floor(ends[1]) + 1)]
        return np.sort(times)


def scene(seed, index):
    """The scene of a clip. Every 16 clips have each pair of shape and voice once: the two are
    independent, and no modality alone tells the class."""
    rng = np.random.default_rng([seed, index])
    colour = rng.uniform(0.1, 1.0, 3)
    colour[rng.permutation(3)[:2]] = 0.95, rng.uniform(0.0, 0.3)  # bright and saturated
    return Scene(
        shape=index % 16 // 4, voice=index % 4, radius=rng.uniform(0.24, 0.34),
        turn=rng.uniform(-0.3, 0.3), loudness=rng.uniform(0.6, 1.0), phase=rng.uniform(0, 2, 2),
        speed=rng.uniform(0.15, 0.5, 2) * rng.choice([-1, 1], 2), colour=colour,
        ground=np.stack([rng.uniform(0.0, 0.4, 3), *rng.uniform(-0.15, 0.15, (2, 3))]),
        noise=int(rng.integers(2**31)))


def render(scene, times, size):
    """The pictures at the times (T,) in s: (T, size, size, 3) uint8."""
    axis = ((np.arange(size) + 0.5) / size).astype(np.float32)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    centre = scene.position(times).astype(np.float32)[:, :, None, None]
    dx, dy = (x - centre[:, 0]) / scene.radius, (y - centre[:, 1]) / scene.radius
    c, s = math.cos(scene.turn), math.sin(scene.turn)
    dx, dy = np.abs(c * dx + s * dy), c * dy - s * dx
    ay = np.abs(dy)
    outside = (  # how far outside the shape, in radii
        lambda: np.sqrt(dx * dx + dy * dy) - 1,
        lambda: np.maximum(dx, ay) - 0.85,
        lambda: np.maximum(dy - 0.75, 0.87 * dx - 0.5 * dy - 0.55),
        lambda: np.maximum(np.minimum(dx, ay) - 0.3, np.maximum(dx, ay) - 1),
    )[scene.shape]()
    soft = 1 / (scene.radius * size)  # the edge is about a pixel wide
    cover = np.clip(0.5 - outside / soft, 0, 1)[..., None]
    level, right, down = scene.ground.astype(np.float32)
    ground = level + right * (x - 0.5)[..., None] + down * (y - 0.5)[..., None]
    picture = ground + cover * (scene.colour.astype(np.float32) - ground)
    return (picture.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def sound(scene, seconds):
    """The waveform (S,) float32 at 16 kHz: height is pitch, each bounce a hit."""
    count = round(seconds * SAMPLE_RATE)
    rng = np.random.default_rng(scene.noise)
    times = np.arange(count // HOP + 2) * (HOP / SAMPLE_RATE)  # 100 points/s: pitch changes slowly
    low, high = (2595 * math.log10(1 + f / 700) for f in (180, 1600))
    mel = low + (high - low) * (1 - scene.position(times)[:, 1])
    pitch = np.interp(np.arange(count), times * SAMPLE_RATE, 700 * (10 ** (mel / 2595) - 1))
    phase = np.cumsum(pitch * (2 * math.pi / SAMPLE_RATE)).astype(np.float32)
    wave = 0.003 * rng.standard_normal(count, dtype=np.float32)
    for k, loud in enumerate(list(VOICES.values())[scene.voice], start=1):
        if loud:
            wave += 0.15 * scene.loudness * loud * np.sin(k * phase)
    hit = rng.standard_normal(SAMPLE_RATE // 10, dtype=np.float32)
    decay = np.exp(-np.arange(len(hit)) / (0.02 * SAMPLE_RATE), dtype=np.float32)
    hit *= 0.5 * scene.loudness * decay
    for start in (scene.bounces(seconds) * SAMPLE_RATE).astype(int):
        wave[start : start + len(hit)] += hit[: count - start]
    return wave


class Builtin(torch.utils.data.Dataset):
    """Generated clips: a shape bounces in a box; its height is heard as pitch, a bounce as a hit.

    The class is the pair of shape and voice (16 classes). Items are as those of `Clips`; each is
    made once and kept.
    """

    classes = [f"{shape} {voice}" for shape in SHAPES for voice in VOICES]

    def __init__(self, count, window, seed=0, modalities=MODALITIES):
        self.count, self.window, self.seed, self.modalities, self.made = (
            count, window, seed, modalities, {})

    def __len__(self):
        return self.count

    def name(self, i):
        return f"built-in clip {i} of seed {self.seed}"

    def __getitem__(self, key):
        _, i = key
        if i not in self.made:
            self.made[i] = self.make(i)
        return {**self.made[i], "index": i, "bad": []}

    def make(self, i):
        world, window = scene(self.seed, i), self.window
        clip = {"label": torch.tensor([world.shape * len(VOICES) + world.voice])}
        if "video" in self.modalities:
            times = (np.arange(window.frames) + 0.5) * window.step
            clip["video"] = torch.from_numpy(render(world, times, window.size))
        if "audio" in self.modalities:
            clip["audio"] = log_mel(torch.from_numpy(sound(world, window.seconds)), window.mels)
        return clip


# ---------------------------------------------------------------------------------------------
# python data.py check, python data.py prepare


def examine(i, clips):
    """(verdict, reason) of clip i: "bad" as training says, "warning" if it is used all the same."""
    try:
        clip = clips.read(i, None)
        with Media(clips.index.path(i), clips.modalities) as media:
            media.deadline = math.inf
            begin, end = segment_of(media, *clips.index.segment(i))
            longest = max(clips.window.video_seconds, clips.window.seconds)
            warnings = (
                [f"shorter than a window ({end - begin:.2f} s)"]
                if end - begin < longest - 1e-3
                else [])
            if (clip["audio"] <= math.log(2 * MEL_OFFSET)).all():
                warnings.append("silent")
            if (clip["video"] == clip["video"][:1]).all():
                warnings.append("still picture")
            try:
                for stream in media.video, media.audio:
                    for at, _ in media.decode(stream, begin):
                        if at > end:
                            break
            except (ClipError, *AV_ERRORS) as error:
                warnings.append(f"damaged outside the first window: {error}")
        return "warning" if warnings else "", ", ".join(warnings)
    except ClipError as error:
        return "bad", str(error)


def check(index, window, workers):
    """Prints the clips that are bad or odd, and a summary; returns how many are bad."""
    verdicts = {"": 0, "warning": 0, "bad": 0}
    job = functools.partial(examine, clips=Clips(index, window))
    for i, (verdict, reason) in enumerate(_in_parallel(job, len(index), workers)):
        verdicts[verdict] += 1
        if verdict:
            tqdm.write(f"{verdict}: {index.name(i)}: {reason}")
    print(
        f"{len(index)} clips: {verdicts['']} fine, {verdicts['warning']} used with a warning, "
        f"{verdicts['bad']} bad")
    return verdicts["bad"]


def _in_parallel(job, count, workers):
    with ProcessPoolExecutor(workers) as pool:
        yield from tqdm(pool.map(job, range(count), chunksize=4), total=count, disable=None)


# frames/s: every sampling step of the paper is a multiple of 0.08 s
PREPARED_RATE = Fraction(25, 2)
PREPARED_SIDE = 256  # short side, pixels
QUALITY = 5  # JPEG quantiser, 2 (best) to 31: what one core still reads 50 clips/s of


def prepare_one(i, index, target, quality):
    """Re-encodes clip i: frames as JPEG, sound as 16 kHz PCM. -> (bytes, reason if bad)"""
    start, end = index.segment(i)
    path = pathlib.PurePath(os.fsdecode(index.names[i]))
    cut = "" if math.isnan(start) else f"_{round(start * 1000)}_{round(end * 1000)}"
    path = pathlib.Path(target) / path.with_name(path.stem + cut + ".mkv")
    if path.exists():
        return path.stat().st_size, None
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        with Media(index.path(i), ()) as media:
            media.deadline = math.inf
            begin, end = segment_of(media, start, end)
            with av.open(str(partial), "w", format="matroska") as container:
                _encode(media, container, begin, end, quality)
    except (ClipError, *AV_ERRORS) as error:
        partial.unlink(missing_ok=True)
        return 0, str(error)
    os.replace(partial, path)
    return path.stat().st_size, None


def _encode(media, container, begin, end, quality):
    picture = media.video and container.add_stream("mjpeg", rate=PREPARED_RATE)
    sound = media.audio and container.add_stream("pcm_s16le", rate=SAMPLE_RATE, layout="mono")
    if picture:
        size = resizing(0, PREPARED_SIDE)
        height, width, _ = next(media.frames(np.array([begin]), size)).shape  # upright
        picture.width, picture.height, picture.pix_fmt = width, height, "yuvj420p"
        picture.options = {"qmin": str(quality), "qmax": str(quality)}
        last = min(end, media.length(media.video))
        times = begin + np.arange(max(1, math.ceil((last - begin) * PREPARED_RATE - 1e-6))) / float(
            PREPARED_RATE)
        for k, image in enumerate(media.frames(times, size)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = k, 1 / PREPARED_RATE
            container.mux(picture.encode(frame))
        container.mux(picture.encode(None))
    if sound:
        samples = media.samples(begin, end)
        there = np.flatnonzero(~np.isnan(samples))
        if len(there):
            samples = (samples[there[0] : there[-1] + 1].clip(-1, 1) * 32767).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = (
                SAMPLE_RATE, int(there[0]), Fraction(1, SAMPLE_RATE))
            container.mux(sound.encode(frame))
        container.mux(sound.encode(None))


def prepare(index, target, quality, workers):
    """Re-encodes all clips of an Index to `target`; returns how many are bad."""
    job = functools.partial(prepare_one, index=index, target=target, quality=quality)
    written, bad = 0, 0
    for i, (size, reason) in enumerate(_in_parallel(job, len(index), workers)):
        written, bad = written + size, bad + bool(reason)
        if reason:
            tqdm.write(f"bad: {index.name(i)}: {reason}")
        if i in (9, 99, 999):
            tqdm.write(f"about {written / (i + 1) * len(index) / 1e9:.2f} GB in all")
    print(
        f"{len(index) - bad} of {len(index)} clips in {target}, {written / 1e9:.3f} GB; {bad} bad")
    return bad


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("check", "prepare"))
    parser.add_argument("source", help="folder of video files")
    parser.add_argument("target", nargs="?", help="prepare: folder to write to")
    parser.add_argument("--annotations", default="", help="annotation file that lists the clips")
    parser.add_argument(
        "--quality", type=int, default=QUALITY, help="prepare: JPEG quantiser, 2 (best) to 31")
    parser.add_argument("--seconds", type=float, default=8.0, help="check: audio of a window")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args()
    index = (
        read_annotations(args.annotations, args.source)
        if args.annotations
        else find_clips(args.source))
    if args.command == "check":
        return int(check(index, Window(seconds=args.seconds), args.workers) > 0)
    if not args.target:
        raise UserError("say where to: python data.py prepare SOURCE TARGET")
    return int(prepare(index, args.target, args.quality, args.workers) > 0)


if __name__ == "__main__":
    sys.excepthook = one_sentence
    sys.exit(main())
