"""Clips for Audiovisual Masked Autoencoders: video files with sound, or generated ones.

    files, annotations -> Index -> Clips[epoch, i, draw] -> {"audio": (T, F), "video": (T, H, W, 3)}

A clip is cut by time: frames and sound of the same moments, whatever the file's own rates (paper
Sec. 4.1). All randomness comes from (seed, epoch, i, draw), and batch k from (seed, k): order and
crops depend neither on the number of processes or workers nor on where a run was resumed.

    python data.py check clips/            # what is unreadable, silent, too short, and why
    python data.py prepare clips/ small/   # re-encodes once, for fast reading
"""

import argparse
import collections
import contextlib
import csv
import errno
import functools
import gc
import hashlib
import itertools
import math
import os
import pathlib
import re
import sys
import time
import warnings
from array import array
from dataclasses import dataclass, replace
from fractions import Fraction

import av
import numpy as np
import torch
import torchaudio
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

MODALITIES = ("video", "audio")
SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi")
SOUND_SUFFIXES = (".wav", ".flac", ".m4a", ".mp3", ".ogg")  # found where no picture is asked for
# Containers with pictures and sound of their own: a playlist named .mp4 could point anywhere.
CONTAINERS = "mov,mp4,m4a,3gp,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,wav,flac,mp3"

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
# A title in a foreign encoding must not make a file unreadable: PyAV 19 escapes it by itself.
FOREIGN_TITLES = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}


class UserError(ValueError):
    """A mistake of the user's, told in a sentence that says what to do."""

    def __init__(self, sentence):  # a data worker passes it on at the end of a traceback
        super().__init__(str(sentence).rsplit("UserError: ", 1)[-1].strip())


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
    color: bool = False
    time_shift: bool = False  # circular, uniform, of the spectrogram
    frequency_masks: tuple = (0, 0)  # SpecAugment: how many, up to how many bins
    time_masks: tuple = (0, 0)  # how many, up to how many frames


def cpu_count():
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------------------------------------
# Sound


_mel_spectrogram = functools.cache(torchaudio.transforms.MelSpectrogram)


def log_mel(waveform, mels=128):
    """Log-mel spectrogram of a 16 kHz mono waveform in [-1, 1]: (S,) -> (S // 160, mels).

    25 ms Hamming window, 10 ms hop (Sec. 4.1). The paper leaves the rest open; here: FFT of 1024,
    mel bins from 0 to 8000 Hz (HTK scale), magnitudes, log(mel + 0.01), no normalization.
    """
    transform = _mel_spectrogram(
        SAMPLE_RATE, n_fft=N_FFT, win_length=MEL_WINDOW, hop_length=HOP, f_min=0.0, f_max=8000.0,
        n_mels=mels, window_fn=torch.hamming_window, power=1.0)
    return (transform(waveform)[:, : len(waveform) // HOP].T + MEL_OFFSET).log()


# ---------------------------------------------------------------------------------------------
# Reading a file: frames and samples by time


@contextlib.contextmanager
def opened(path, modalities=MODALITIES, segment=(math.nan, math.nan), limit=None):
    """A file, or a part of it, as `Media`, in a `with`. Whatever goes wrong, on entering or inside,
    is a ClipError: a file that cannot be opened or decoded, that lacks a stream of `modalities`, or
    takes longer than `limit`, s."""
    deadline, container = time.monotonic() + (limit or TIME_LIMIT), None
    try:
        if not os.path.isfile(path):  # a directory or a pipe, which would block
            raise ClipError("not a file")

        container = av.open(
            os.fspath(path), timeout=TIME_LIMIT, **FOREIGN_TITLES,
            options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"})
        with container:
            media = Media(container, modalities, deadline)
            media.begin, media.end = media.part(*segment)
            yield media

    except AV_ERRORS as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        what = "decoded" if container else "opened"
        raise ClipError(f"cannot be {what} ({type(error).__name__})") from error


class Media:
    """Pictures and sound of an open file. Times are in s from its earliest stream's start."""

    def __init__(self, container, modalities, deadline):
        self.container, self.deadline, self.scaler = container, deadline, VideoReformatter()
        streams = [
            s for s in (*container.streams.video, *container.streams.audio)
            if s.codec_context and not s.disposition & Disposition.attached_pic]
        self.video, self.audio = (
            next((s for s in streams if s.type == kind), None) for kind in ("video", "audio"))
        self.streams = [s for s in (self.video, self.audio) if s]

        if not self.video and ("video" in modalities or not self.audio):
            raise ClipError("no picture")
        if not self.audio and "audio" in modalities:
            raise ClipError("no audio track")

        starts = [s.start_time * s.time_base for s in self.streams if s.start_time is not None]
        self.origin = float(min(starts, default=0))
        if self.video:
            codec = self.video.codec_context
            codec.thread_count = 1  # workers share the cores
            # Else the part of a JPEG that cannot be decoded shows what was decoded before it.
            # (Codecs that predict do say `is_corrupt`.)
            codec.options = {"err_detect": "explode"} if codec.name == "mjpeg" else {}

    def length(self, stream):
        """End of a stream, s; by its header, else its container's, else its last packet."""
        if stream.duration is None and self.container.duration is not None:
            return self.container.duration / av.time_base

        end = (stream.start_time or 0) + (stream.duration or 0)
        if stream.duration is None:
            packets = (p for p in self.container.demux(stream) if p.pts is not None)
            end = max((p.pts + (p.duration or 0) for p in packets), default=0)
        return float(end * stream.time_base) - self.origin

    def part(self, start, end, shared=False):
        """The part (begin, end) that a row means; all of the file if its times are NaN. A file is
        as long as its picture.

        A segment that reaches beyond a file of about its own length means that the file is already
        cut, unless other rows share it: nobody knows for which of them.
        """
        length = self.length(self.streams[0])
        if not 0 < length < 1e6:
            raise ClipError(f"its stated length is {length:g} s")

        already_cut = not shared and end > length + 0.5 and length <= end - start + 1
        if math.isnan(start) or already_cut:
            return 0.0, length
        if start >= length:
            raise ClipError(f"its segment starts at {start:.2f} s, the file ends at {length:.2f} s")
        return start, min(end, length)

    def decode(self, stream, start):
        """(time, frame) of a stream from the last keyframe before `start`."""
        found = self.decode_from(stream, start, start)
        first = next(found, (math.inf, None))
        if first[0] > start + 1e-3:  # an index that lies: decode it all
            return self.decode_from(stream, -1.0, start)
        return itertools.chain([first], found)

    def decode_from(self, stream, start, last):
        """(time, frame) from a keyframe on. Where every packet is a picture of its own, it is the
        packet, so that only those that are shown get decoded."""
        to = math.floor((start + self.origin) / stream.time_base)
        if stream.start_time is not None:  # AVI and MP3 refuse to seek before it
            to = max(to, stream.start_time)
        self.container.seek(to, stream=stream, backward=True)

        intra = stream.type == "video" and stream.codec_context.codec.intra_only
        for frame in self.container.demux(stream) if intra else self.container.decode(stream):
            if time.monotonic() > self.deadline:
                raise ClipError(f"takes longer than {TIME_LIMIT:g} s to read")

            if intra and not frame.size:  # the packet that flushes a decoder
                continue
            if frame.pts is not None:
                last = float(frame.pts * frame.time_base) - self.origin
            yield last, frame

    def frames(self, times, resize):
        """Yields the pictures shown at increasing `times`: (H, W, 3) uint8 arrays.

        resize: (height, width) of a picture -> of the result. A picture is shown from its own time
        to that of the next; the first also before, the last for another second or two frames.
        """
        tail = max(1.0, 2 / (self.video.average_rate or 2))
        decoded = itertools.chain(self.decode(self.video, times[0]), [(math.inf, None)])
        done = 0

        for (at, frame), (until, _) in itertools.pairwise(decoded):
            due = times[done:][times[done:] + 1e-3 < until]
            if len(due):
                if until == math.inf and due[-1] > at + tail:
                    raise ClipError(f"the picture ends at {at:.2f} s, before its stated end")
                yield from [self.picture(frame, resize)] * len(due)

            done += len(due)
            if done == len(times):
                return
        raise ClipError("no picture can be decoded")

    def picture(self, frame, resize):
        """A frame, or a packet that holds one, as upright (H, W, 3) uint8, resized."""
        if isinstance(frame, av.Packet):
            frame = frame.decode()[0]
        if frame.is_corrupt:
            raise ClipError("a damaged picture")

        turns = round(frame.rotation / 90) % 4  # anticlockwise
        height, width = frame.height, frame.width
        height, width = resize(height, width) if turns % 2 == 0 else resize(width, height)[::-1]
        frame = self.scaler.reformat(frame, width, height, "rgb24", interpolation="BILINEAR")
        return np.rot90(frame.to_ndarray(), turns)

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


def read_video(media, start, window, resize):
    """Frames from `start` on, wrapping round the part's end: (T, H, W, 3) uint8."""
    begin = media.begin
    end = max(begin + 1e-3, min(media.end, media.length(media.video)))
    times = begin + (start - begin + np.arange(window.frames) * window.step) % (end - begin)
    runs = np.split(times, np.flatnonzero(np.diff(times) < 0) + 1)
    return np.stack([picture for run in runs for picture in media.frames(run, resize)])


def read_audio(media, start, seconds):
    """Samples from `start` on, wrapping round the part's end: (S,) float32. Where the track has
    none, what it has repeats; nothing is filled with silence."""
    begin, end = media.begin, media.end
    stop = start + min(seconds, end - begin)  # one turn at most
    sound = media.samples(start, min(stop, end))
    if stop - end > 1e-6:
        sound = np.concatenate([sound, media.samples(begin, begin + (stop - end))])

    if np.isnan(sound).all():
        sound = media.samples(begin, min(end, begin + 60.0))
    missing = np.isnan(sound)
    if missing.all():
        raise ClipError("no sound can be decoded")
    sound[missing] = np.resize(sound[~missing], missing.sum())
    return np.resize(sound, round(seconds * SAMPLE_RATE))


# ---------------------------------------------------------------------------------------------
# Augmentation: torch's random numbers, which `seeded` makes a function of what it is given


@contextlib.contextmanager
def seeded(*numbers):
    """Inside, torch's random numbers on the CPU depend on `numbers` alone; outside, nothing of it
    is felt."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int.from_bytes(digest, "big"))
        yield


def resizing(size, short):
    """(height, width) -> the size at which the short side is `short`, and none less than `size`."""

    def resize(height, width):
        scale = short / min(height, width)
        # even, as the frames of prepared files are
        return tuple(max(size, 2 * round(side * scale / 2)) for side in (height, width))

    return resize


def center_crop(video, size):
    """(T, H, W, 3) -> (T, size, size, 3)"""
    return F.center_crop(video.permute(0, 3, 1, 2), [size, size]).permute(0, 2, 3, 1).contiguous()


def random_crop(video, size, augment):
    """(T, H, W, 3) uint8 -> (T, size, size, 3): a box, scaled to `size`, and perhaps a flip.

    To scale the picture's height by j before a crop is to take a box of height size / j.
    """
    video = video.permute(0, 3, 1, 2)                                      # (T, 3, H, W)
    scales = torch.empty(2).uniform_(*augment.jitter).tolist()
    box = [min(side, round(size / j)) for side, j in zip(video.shape[2:], scales)]
    video = v2.RandomCrop(box)(video)

    if box != [size, size]:
        video = F.resize(video, [size, size], antialias=True)
    if augment.flip:
        video = v2.RandomHorizontalFlip()(video)
    return video.permute(0, 2, 3, 1).contiguous()                          # (T, size, size, 3)


COLOR = torch.tensor([  # from, to: whether at all, four changes, whether gray
    (0, 1), (-32 / 255, 32 / 255), (0.6, 1.4), (0.6, 1.4), (-0.2, 0.2), (0, 1)])


def draw_color():
    """The numbers of a clip's color jitter (finetuning recipe): (6,) float32: 1 with probability
    0.8, brightness, saturation, contrast, hue in turns, and 1 (for gray) with probability 0.1."""
    low, high = COLOR.T
    color = low + (high - low) * torch.rand(6)
    color[0], color[5] = color[0] < 0.8, color[5] < 0.1
    return color


def color_jitter(video, color):
    """Changes colors by the numbers of `draw_color`, one draw for all frames of a clip.

    (B, T, H, W, 3) uint8 on any device, (B, 6) on the CPU -> (B, T, H, W, 3) uint8. A device is not
    waited for.
    """
    result = torch.empty_like(video)
    for clip, out, numbers in zip(video, result, color.tolist()):
        jittered, brightness, saturation, contrast, hue, gray = numbers
        x = clip.permute(0, 3, 1, 2).float() / 255                         # (T, 3, H, W)

        if jittered:
            x = F.adjust_saturation((x + brightness).clamp(0, 1), saturation)
            x = F.adjust_hue(F.adjust_contrast(x, contrast), hue).clamp(0, 1)
        if gray:
            x = F.rgb_to_grayscale(x, num_output_channels=3)
        out.copy_((x * 255).round().permute(0, 2, 3, 1))
    return result


def spec_augment(mel, augment):
    """Circular shift, then time and frequency masks of value 0 (which is not silence: that is
    log 0.01), as the official recipes have them. (T, F) -> (T, F)."""
    if augment.time_shift:
        mel = mel.roll(int(torch.randint(len(mel), ())), 0)

    for axis, (count, widest) in enumerate((augment.time_masks, augment.frequency_masks)):
        widest = min(widest, mel.shape[axis] - 1)
        for _ in range(count):  # torchaudio's masks are narrower than the number it is given
            mel = torchaudio.functional.mask_along_axis(mel, widest + 1, 0.0, axis)
    return mel


# ---------------------------------------------------------------------------------------------
# Which clips there are: folders and annotation files


@dataclass(frozen=True)
class Index:
    """Clips as numpy arrays, which worker processes share; Python objects they would copy.

    names (N,) bytes, paths inside `folder`; start, end (N,) s, NaN for the whole file;
    labels (N, K) int, -1 where a clip has fewer; shared (N,) bool: other segments of the same file
    are clips, too; classes: names of the labels (of verbs, then of nouns, for Epic Kitchens).
    """

    folder: str
    names: np.ndarray
    start: np.ndarray
    end: np.ndarray
    labels: np.ndarray
    shared: np.ndarray
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
        """Start, end, shared: see `Media.part`."""
        return float(self.start[i]), float(self.end[i]), bool(self.shared[i])

    def label(self, i):
        return torch.from_numpy(self.labels[i].astype(np.int64))

    def subset(self, which):
        """The clips of a mask (N,) or of ids."""
        columns = {k: x[which] for k, x in vars(self).items() if isinstance(x, np.ndarray)}
        return replace(self, **columns)


def _files(folder, modalities=MODALITIES):
    """Paths of the video files below a folder, sorted; of sound files, too, where no picture is
    asked for. Links are followed, to each folder once."""
    if not os.path.isdir(folder):
        raise UserError(f"there is no folder {folder}")
    suffixes = SUFFIXES + (SOUND_SUFFIXES if tuple(modalities) == ("audio",) else ())

    found, seen = [], set()
    for at, folders, names in os.walk(folder, followlinks=True):
        where = os.path.realpath(at)
        if where in seen:
            folders.clear()
            continue
        seen.add(where)
        folders.sort(key=lambda name: (os.path.islink(os.path.join(at, name)), name))

        found += [
            os.path.join(at, name) for name in names
            if name.lower().endswith(suffixes) and not name.startswith(".")]

    if not found:
        raise UserError(f"no video files ({', '.join(suffixes)}) below {folder}")
    return sorted(path[len(os.path.join(folder, "")) :] for path in found)


def find_clips(path, modalities=MODALITIES):
    """All video files below a folder; those in clips/LABEL/ have that label. Or one file. -> Index

    Where modalities are ("audio",), files of sound alone are clips, too.
    """
    path = pathlib.Path(path)
    folder, files = (
        (path.parent, [path.name]) if path.is_file() else (path, _files(path, modalities)))
    parents = [os.path.basename(os.path.dirname(f)) for f in files]
    classes = tuple(sorted(set(parents) - {""}))

    number = {c: i for i, c in enumerate(classes)}
    labels = np.array([[number.get(p, -1)] for p in parents], np.int16)
    whole, shared = np.full(len(files), np.nan), np.zeros(len(files), bool)
    names = np.array([*map(os.fsencode, files)], bytes)
    return Index(str(folder), names, whole, whole, labels, shared, classes)


def held_out(index, share=0.02, salt=b"held out"):
    """A mask (N,) of about this share of the clips, by hash of the file's stem: stable when clips
    are added, and two segments of a file stay together."""
    stems = (os.path.splitext(os.path.basename(name))[0] for name in index.names.tolist())
    hashes = (hashlib.blake2b(s, digest_size=4, salt=salt).digest() for s in stems)
    hashes = np.array([int.from_bytes(h, "big") for h in hashes])
    # of a few clips, too, one is held out
    return (hashes < share * 2**32) | ((hashes == hashes.min()) & (len(hashes) > 1))


def fraction_of(index, share):
    """A part of the clips, by another hash; a smaller part lies inside a larger one (Table 17)."""
    return index if share >= 1 else index.subset(held_out(index, share, b"fraction"))


# ---------------------------------------------------------------------------------------------
# Annotation files: a table of formats and of what their columns mean, which one class interprets

WORDS = {  # what a column means: words of headers, in lower case and without spaces, "_", "/"
    "path": "path file filename fname video", "id": "ytid youtubeid videoid",
    "narration": "narrationid", "start": "start startseconds starttimestamp starttime",
    "end": "end endseconds stoptimestamp endtime", "label": "label class category",
    "labels": "labels", "mids": "positivelabels", "verb": "verbclass", "noun": "nounclass",
    "quality": "quality", "split": "split traintestsplit"}
ROLES = {word: role for role, words in WORDS.items() for word in words.split()}


@dataclass(frozen=True)
class Format:
    """How an annotation file is recognized, and what its columns mean."""

    task: str  # how labels are meant
    columns: str  # in this order without a header; one must have them in any (but "split")
    row: str = ""  # pattern of a row's cells, if there are files without a header
    labels: tuple = ("label",)  # columns that a row's labels are made of
    lists: tuple = ()  # of classes, published beside it: file, a row's label and name, how many
    seconds: bool = False  # whether a file NAME_30 may be the part from second 30 on
    files: str = "ID, ID_000030, ID_30, ID_30_40, ID_30.0-40.0 (s), ID_30000_40000 (ms), YID..."


ID, NUMBER = r"([\w-]+|#NAME\?)", r"\d+(\.\d*)?"
TIMES = f"{NUMBER}\n{NUMBER}"
MEDIA_END = "(" + "|".join(map(re.escape, SUFFIXES + SOUND_SUFFIXES)) + ")"
PLAIN = "path[,start,end][,label...]"
FORMATS = {
    "EPIC-Kitchens": Format(
        "epic", "narration id start end", labels=("verb", "noun"),
        lists=(("EPIC_100_verb_classes.csv", "verb {id}", "key", 97),
               ("EPIC_100_noun_classes.csv", "noun {id}", "key", 300)),
        files="NARRATION_ID, VIDEO_ID_30000_40000 (ms), VIDEO_ID"),
    "AVE": Format(
        "ave", "label id quality start end", f".+\n{ID}\n.*\n{TIMES}", ("label", "start", "end"),
        files="ID, YID"),
    "AudioSet": Format(
        "many", "id start end mids", f"{ID}\n{TIMES}\n/.*", ("mids",),
        (("class_labels_indices.csv", "{mid}", "display_name", 0),), seconds=True),
    "VGGSound": Format(
        "single", "id start label split", f"{ID}\n{NUMBER}\n.+\n(train|test|val.*)", seconds=True),
    PLAIN: Format(
        "single", "path", f".*{MEDIA_END}(\n.*)*", ("label", "labels"),
        files="the paths of its rows, with any suffix")}


def _rows(file):
    """(line number, cells) of each row of an annotation file but comments."""
    last = 0
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            first = lines.readline().strip()
            ave = re.fullmatch(f"[^&]+&[^&]+&[^&]*&({NUMBER}&{NUMBER}|StartTime&EndTime)", first)
            how = {"delimiter": "&", "quoting": csv.QUOTE_NONE} if ave else {"strict": True}
            lines.seek(0)

            reader = csv.reader(lines, skipinitialspace=True, **how)
            for row in reader:
                if reader.line_num > last + 1:
                    raise csv.Error("it ends in a later line")
                last = reader.line_num
                if row and (row[0] == "#NAME?" or not row[0].startswith("#")):
                    yield last, row

    except csv.Error as error:
        raise UserError(f"{file}, line {last + 1}: a quote that is not closed: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read annotations {file}: {error}") from None


def _seconds(text):
    """Seconds, or HH:MM:SS.ss -> s"""
    if ":" not in text:
        return float(text)
    return sum(float(part) * 60**k for k, part in enumerate(reversed(text.split(":"))))


def _ms(seconds):
    return None if math.isnan(seconds) else round(seconds * 1000)


class Listing:
    """The rows of an annotation file: numbers of their name and label, start and end (N,) in s.

    names: how a file may be called just so, and how with times or without: (narration, id), or
    (path, path without its suffix). keys: cells of labels. unused: {reason: (count, first)}.
    """

    def __init__(self, file, split=None):
        self.file, self.count, self.unused = file, 0, {}
        self.names, self.keys, columns = {}, {}, array("d")
        rows = _rows(file)
        first = next(rows, None)
        if first is None:
            raise UserError(f"{file} has no rows")
        if not self.understand(*first):
            rows = itertools.chain([first], rows)

        for self.count, (line, row) in enumerate(rows, start=1):
            try:
                columns.extend(self.read(line, row, split))
            except ClipError as error:
                count, first = self.unused.get(str(error), (0, f"line {line}: {','.join(row)}"))
                self.unused[str(error)] = count + 1, first

        *numbers, self.start, self.end = np.array(columns).reshape(-1, 4).T
        self.name, self.label = np.int32(numbers)
        self.names = [
            (name, re.sub(f"(?i){MEDIA_END}$", "", name)) if self.plain else (narration, name)
            for narration, name in self.names]

    def understand(self, line, row):
        """Sets the format and what the columns mean. -> whether the first row is a header"""
        where, cells = f"{self.file}, line {line}", "\n".join(row)
        roles = [ROLES.get(re.sub(r"[\W_]", "", cell.lower()), "") for cell in row]

        of_row = [k for k, f in FORMATS.items() if re.fullmatch(f.row, cells, re.IGNORECASE)]
        of_header = [k for k, f in FORMATS.items() if {*f.columns.split()} - {"split"} <= {*roles}]
        if not of_row + of_header:
            raise UserError(
                f"{where} is of no known format ({', '.join(FORMATS)}), nor a header with words "
                f"like path, start, end, label, split: {','.join(row)}")

        self.kind = (of_row + of_header)[0]
        self.format, self.plain = FORMATS[self.kind], self.kind == PLAIN
        self.open_end = self.plain and bool(of_row)  # any number of labels may follow
        if of_row:
            timed = self.plain and re.fullmatch(TIMES, "\n".join(row[1:3]))
            roles = self.format.columns.split() + (["start", "end"] if timed else [])

        once = [role for role in roles if role and role != "label"]
        half = self.plain and ("start" in roles) != ("end" in roles)
        if len(once) > len(set(once)) or {"path", "id"} <= set(roles) or half:
            raise UserError(f"{where}: a header of more than one meaning: {','.join(row)}")

        self.roles, self.at = roles, {role: column for column, role in enumerate(roles)}
        self.labels = [c for c, role in enumerate(roles) if role in self.format.labels]
        # other formats have columns that nobody needs
        self.ignored = [word for word, role in zip(row, roles) if self.plain and not role]
        return not of_row

    def read(self, line, row, split):
        """A row of the split as numbers, or ClipError. Labels of all splits are classes."""
        at, width, start, end = self.at, len(self.roles), math.nan, math.nan
        if len(row) < width or (len(row) > width and not self.open_end):
            raise ClipError(f"with {len(row)} columns, not {width}")
        name = row[at.get("id", at.get("path"))].removeprefix("./")
        if name in ("", "#NAME?"):
            raise ClipError("without a name")

        if "start" in at:
            try:
                start = _seconds(row[at["start"]])
                end = _seconds(row[at["end"]]) if "end" in at else start + 10  # VGGSound's
            except ValueError:
                raise ClipError("without a start and an end in seconds") from None
            if not 0 <= start <= end < math.inf or (start == end and self.format.task != "ave"):
                raise ClipError("with an end before its start")

        elif self.open_end and re.fullmatch(TIMES, "\n".join(row[1:3])):
            raise UserError(f"{self.file}, line {line}: times or labels? The first row has no "
                            f"times, this one may have: {','.join(row)}")

        key = (*[row[c] for c in self.labels], *row[width:])
        label = self.keys.setdefault(key, len(self.keys))
        part = row[at["split"]].lower() if "split" in at else split
        if split and part != split:
            raise ClipError(f"of split {part!r}")

        key = row[at["narration"]] if "narration" in at else "", name
        return self.names.setdefault(key, len(self.names)), label, start, end

    def labels_of(self, cells):
        """Labels by cells: several in one of "labels" or "mids"; of AVE, that of each second."""
        if self.format.task == "ave":
            label, start, end = cells
            return [label if float(start) <= s < float(end) else "background" for s in range(10)]

        names, roles = [], (self.roles[c] for c in self.labels)
        for cell, role in itertools.zip_longest(cells, roles, fillvalue="label"):
            parts = cell.split(",") if role in ("labels", "mids") else [cell]
            before = f"{role} " if role in ("verb", "noun") else ""
            names += [before + part.strip() for part in parts if part.strip()]
        return names

    def classes(self, seen):
        """[{label: name of the class}], in two parts for verbs and nouns: as published beside the
        file, or as seen."""
        file, parts = pathlib.Path(self.file), []
        for name, label, title, count in self.format.lists if seen else ():  # a test file has none
            rows = [{"id": i, "key": label.format(id=i)} for i in range(count)]
            if file.with_name(name).exists():
                with open(file.with_name(name), encoding="utf-8-sig", newline="") as lines:
                    rows = list(csv.DictReader(lines))

            if not rows:
                raise UserError(f"{name} must lie beside {file}")
            parts.append({label.format(**row): row[title] for row in rows})

        last = ["background"] if self.format.task == "ave" else []
        seen = sorted(seen.difference(last)) + last
        return parts or [dict(zip(seen, seen))]

    def table(self):
        """Labels (U, K) int16 of each distinct key, -1 where there are fewer; the classes."""
        given = [self.labels_of(key) for key in self.keys]
        seen = set(itertools.chain.from_iterable(given))
        parts = self.classes(seen)
        number = {label: i for part in parts for i, label in enumerate(part)}

        unknown = ", ".join(sorted(seen - set(number))[:3])
        if unknown:
            raise UserError(f"{self.file} has labels that are no classes of {self.kind}: {unknown}")

        table = np.full((len(given), max([1, *map(len, given)])), -1, np.int16)
        for row, labels in zip(table, given):
            row[: len(labels)] = [number[label] for label in labels]
        classes = [tuple(part.values()) for part in parts]
        return table, classes[0] if len(classes) == 1 else tuple(classes)


TIME = r"_(\d+(?:\.\d+)?)"
START, SPAN = re.compile(f"(.+){TIME}"), re.compile(f"(.+){TIME}[_-]{TIME[1:]}")


def _meanings(stem, seconds):
    """What a file's name may mean: (name, start, end) in ms, None where it does not say.

    NAME_30000_40000 is in milliseconds, as `prepare` writes it; where `seconds` are meant, too,
    NAME_30_40, NAME_30.0-40.0 or NAME_000030.
    """
    yield stem, None, None
    span, start = SPAN.fullmatch(stem), START.fullmatch(stem)
    if span and "." not in span[2] + span[3]:
        yield span[1], int(span[2]), int(span[3])

    if seconds and span:
        yield span[1], _ms(float(span[2])), _ms(float(span[3]))
    if seconds and start:
        yield start[1], _ms(float(start[2])), None


def _refuse_outside(folder, paths):
    root = pathlib.Path(os.path.realpath(folder))
    links = {path for path in paths if os.path.islink(root / path)}
    for name in sorted(links | {os.path.join(os.path.dirname(path), "") for path in paths}):
        if not pathlib.Path(os.path.realpath(root / name)).is_relative_to(root):
            raise UserError(
                f"a path of the annotations, {name!r}, leads out of {folder}: refused without "
                "--allow-outside")


NO_FILE, SEVERAL_FILES, SEVERAL_ROWS = -1, -2, -3  # instead of a file's number
REASONS = {
    NO_FILE: "without a file", SEVERAL_FILES: "with several files of their name",
    SEVERAL_ROWS: "with a file that is another row's, too"}


def _find_files(listing, folder, allow_outside, modalities):
    """Files that rows may mean, and {(name, start, end): number of the file}, negative where
    several files of a plain path's name, in several folders, may be meant."""
    plain, paths = listing.plain, [path for path, _ in listing.names if listing.plain]
    if not allow_outside:
        _refuse_outside(folder, paths)
    files = [path for path in paths if os.path.isfile(os.path.join(folder, path))]
    exact = {(path, None, None): n for n, path in enumerate(files)}

    if not plain or len(files) < len(paths):
        files += sorted(set(_files(folder, modalities)).difference(files))
    asked, found = set(itertools.chain.from_iterable(listing.names)) - {""}, {}

    for n, file in enumerate(files[len(exact) :], start=len(exact)):
        whole, base = os.path.splitext(file)[0], os.path.basename(file)
        stem = os.path.basename(whole)
        # of plain paths, with its folder or without
        stems = {base, whole, stem} if plain else {stem, stem.removeprefix("Y")}
        for key in (m for s in stems for m in _meanings(s, listing.format.seconds)):
            if key[0] in asked and found.setdefault(key, n) != n and plain:
                found[key] = SEVERAL_FILES
    return files, found | exact


def _assign(listing, found):
    """-> number of each row's file (N,), negative if it has none; whether rows mean several parts
    of it (N,). A file cut for one row is no other's, and all of it is that row's.

    A file called just as the row says (narration, path) comes first, then one of the row's times,
    of its start, and the whole.
    """
    plain, ave = listing.plain, listing.format.task == "ave"
    files, claims, shared, disputed = np.full(len(listing.name), NO_FILE), {}, set(), set()

    columns = (column.tolist() for column in (listing.name, listing.start, listing.end))
    for k, (number, start, end) in enumerate(zip(*columns)):
        so, name = listing.names[number]
        start, end = _ms(start), _ms(end)
        keys = (so, None, None), (name, start, end), (name, start, None), (name, None, None)
        key = next((key for key in keys if key in found), None)
        if key is None:
            continue

        file = files[k] = found[key]
        cut = key[1] is not None or (key is keys[0] and not plain)
        claim = so if plain else name, start, end
        if file >= 0 and (first := claims.setdefault(file, claim)) != claim:
            (disputed if cut or first[0] != claim[0] else shared).add(file)
        if cut or ave:  # AVE's times are of the event, not of the clip
            listing.start[k] = listing.end[k] = np.nan

    several = np.isin(files, list(shared))
    files[np.isin(files, list(disputed))] = SEVERAL_ROWS
    return files, several


def read_annotations(file, folder, split=None, allow_outside=False, modalities=MODALITIES):
    """The clips that an annotation file lists and a folder has. -> Index

    The format, one of FORMATS, is recognized from the content. Paths must not lead out of the
    folder unless that is allowed. Only rows of `split` ("train" or "test") if the file has splits.
    Says how many rows found their file, and why others are not used.
    """
    listing = Listing(file, split)
    table, classes = listing.table()
    files, found = _find_files(listing, folder, allow_outside, modalities)
    number, shared = _assign(listing, found)
    used = number >= 0

    for code, reason in REASONS.items():
        rows = np.flatnonzero(number == code)
        if len(rows):
            path, name = listing.names[listing.name[rows[0]]]
            listing.unused[reason] = len(rows), path if listing.plain else name

    said = f"{file}: {used.sum()} of {listing.count} rows found their file below {folder}"
    said += "".join(f"; {n} {why} (first: {row})" for why, (n, row) in listing.unused.items())
    if listing.ignored:
        said += f"; columns that mean nothing here: {', '.join(listing.ignored)}"
    if not used.any():
        raise UserError(f"{said}. Files are looked for by names like {listing.format.files}")
    print(said)

    labels, task = table[listing.label[used]], listing.format.task
    task = "many" if task == "single" and table.shape[1] > 1 else task
    names = np.array([*map(os.fsencode, files)], bytes)[number[used]]
    start, end = listing.start[used], listing.end[used]
    return Index(str(folder), names, start, end, labels, shared[used], classes, task)


def labeled_clips(
    folder, annotations="", test_annotations="", allow_outside=False, modalities=MODALITIES):
    """{"train": Index, "test": Index} with the same classes.

    From annotation files (one with splits, or two), or from folder names: clips/train/LABEL/ and
    clips/test/LABEL/, else clips/LABEL/; a tenth, by hash, for testing where nothing else says so.
    """
    files = {"train": annotations, "test": test_annotations or annotations}
    parts = [os.path.join(folder, part) for part in files]

    if annotations:
        train, test = (
            read_annotations(file, folder, split, allow_outside, modalities)
            for split, file in files.items())
    elif all(map(os.path.isdir, parts)):
        train, test = (find_clips(part, modalities) for part in parts)
    else:
        train = test = find_clips(folder, modalities)

    two_lists = annotations and test_annotations
    if not two_lists and train.folder == test.folder and np.array_equal(train.names, test.names):
        tenth = held_out(train, 0.1)
        train, test = train.subset(~tenth), train.subset(tenth)
    if not train.classes:
        raise UserError(
            f"the clips of {folder} have no labels: give --annotations, or folders named by label")

    if test.classes != train.classes:  # number them as in training
        unknown = sorted(set(map(str, test.classes)) - set(map(str, train.classes)))[:3]
        if unknown:
            raise UserError(
                f"the test clips have labels that the training clips lack: {', '.join(unknown)}")
        number = np.array([*map(train.classes.index, test.classes), -1], np.int16)  # -1 stays -1
        test = replace(test, labels=number[test.labels], classes=train.classes)
    return {"train": train, "test": test}


# ---------------------------------------------------------------------------------------------
# The data set: clips by (epoch, i, draw), and which of them a batch has


class Clips:
    """Clips of an Index, addressed by (epoch, i, draw).

    The window of a clip is that of (epoch, i); its crop, flip, colors and masks also depend on the
    draw. augment None is evaluation: `views` windows at evenly spaced starts (audio on its own),
    center crop, and an unreadable clip has no tensors. In training, the next readable one replaces
    it.
    """

    def __init__(self, index, window, modalities=MODALITIES, augment=None, seed=0, views=1):
        self.index, self.window, self.modalities = index, window, tuple(modalities)
        self.augment, self.seed, self.views = augment, seed, views

    def __len__(self):
        return len(self.index)

    def name(self, i):
        return self.index.name(i)

    def __getitem__(self, key):
        """-> {"audio": (T, F) float32, "video": (T, H, W, 3) uint8, "label": (K,) int64,
        "index": i, "bad": [(name, reason)]}, and "color" (6,) if colors are to be changed, see
        `color_jitter`; several views are the first axis of both."""
        return self.__getitems__([key])[0]

    def __getitems__(self, keys):
        """Items of several keys. Neighbors that differ in their draw only share what is decoded."""
        items = []
        for (epoch, i), group in itertools.groupby(keys, key=lambda key: tuple(key[:2])):
            clip = self.readable(epoch, i)
            items += [self.augmented(clip, epoch, draw) for _, _, draw in group]
        return items

    def readable(self, epoch, wanted):
        """The window of a clip, or in training of the next that can be read; names the bad ones."""
        bad, tries = [], min(1000, len(self)) if self.augment else 1

        for i in range(wanted, wanted + tries):
            i %= len(self)
            try:
                clip = self.read(i, epoch)
                return clip | {"label": self.index.label(i), "index": i, "bad": bad}
            except ClipError as error:
                bad.append((self.name(i), str(error)))

        if self.augment:
            raise UserError(
                f"none of the {tries} clips tried can be read; the first: {': '.join(bad[0])}. "
                "Run python data.py check on the folder")
        return {"index": wanted, "bad": bad}

    def read(self, i, epoch=0):
        """The windows of clip i as tensors {m: ...}, before any augmentation."""
        with opened(self.index.path(i), self.modalities, self.index.segment(i)) as media:
            views = [self.cut(media, *pair) for pair in self.starts(media, i, epoch)]
        return {
            m: torch.stack([view[m] for view in views]) if self.views > 1 else views[0][m]
            for m in views[0]}

    def starts(self, media, i, epoch):
        """(start of the video window, start of the audio window) of each view, s: together at
        random in training, else each evenly spaced from the first to the last."""
        seconds = self.window.video_seconds, self.window.seconds
        room = [max(0.0, media.end - media.begin - s) for s in seconds]

        if self.augment:
            with seeded(self.seed, epoch, i):
                start = media.begin + room[0] * torch.rand((), dtype=torch.float64).item()
            return [(start, start)]
        return zip(*(media.begin + np.linspace(0, r, self.views) for r in room))

    def cut(self, media, video_start, audio_start):
        """A window as tensors {m: ...}; of the picture all that a random crop may take."""
        window, clip = self.window, {}
        if "video" in self.modalities:
            short = round(window.size * 256 / 224) if self.augment else window.size
            resize = resizing(window.size, short)
            video = torch.from_numpy(read_video(media, video_start, window, resize))
            clip["video"] = video if self.augment else center_crop(video, window.size)

        if "audio" in self.modalities:
            sound = read_audio(media, audio_start, window.seconds)                # (S,)
            clip["audio"] = log_mel(torch.from_numpy(sound), window.mels)         # (T, F)
        return clip

    def augmented(self, clip, epoch, draw):
        """An item of its own of what `readable` gives."""
        clip = dict(clip)
        if self.augment is None:
            return clip

        with seeded(self.seed, epoch, clip["index"], draw):
            if "video" in clip:
                clip["video"] = random_crop(clip["video"], self.window.size, self.augment)
                clip |= {"color": draw_color()} if self.augment.color else {}
            if "audio" in clip:
                clip["audio"] = spec_augment(clip["audio"], self.augment)
        return clip


class Batches:
    """Batch sampler that computes batch k from (seed, k).

    Clips come as a stream of epochs, each a permutation made from (seed, epoch); row k of all rows
    is draw k % repeat of the stream's clip k // repeat, and batch k the rows k*batch to
    (k+1)*batch. So each pass has each clip once, whatever the number of processes, and a batch may
    span passes. An epoch counts rows: with repeat R, one pass over all clips takes R epochs.

    Yields lists of keys (pass, i, draw), `micro` at a time: the `rows` of each of the `steps`, both
    ranges. Without `rows` all of a batch; a process of several is given its part.
    """

    def __init__(self, count, batch, seed, steps, rows=None, micro=0, repeat=1):
        self.count, self.batch, self.seed, self.steps = count, batch, seed, steps
        self.rows = range(batch) if rows is None else rows
        self.micro, self.repeat = micro or len(self.rows), repeat

    def __len__(self):
        return len(self.steps) * math.ceil(len(self.rows) / self.micro)

    def __iter__(self):
        @functools.lru_cache(maxsize=2)
        def order(epoch):
            return np.random.default_rng([self.seed, epoch]).permutation(self.count)

        for step in self.steps:
            keys = []
            for row in self.rows:
                place, draw = divmod(step * self.batch + row, self.repeat)
                epoch, i = divmod(place, self.count)
                keys.append((epoch, int(order(epoch)[i]), draw))

            for first in range(0, len(keys), self.micro):
                yield keys[first : first + self.micro]


def in_order(count, batch, rank=0, world=1):
    """All clips once, for evaluation: this process's lists of keys (0, i, 0).

    Batches are nearly equal, and none is of one clip (which has no other to be compared with)
    unless there is one clip only: of few clips, one may be larger than asked for.
    """
    batches = max(1, min(math.ceil(count / batch), count // 2))
    parts = np.array_split(np.arange(count), batches)[rank::world] if count else []
    return [[(0, int(i), 0) for i in part] for part in parts]


def collate(items):
    """Items -> a batch: tensors stacked (by a worker, straight into shared memory), "index" (B,),
    "bad" one list. Items without tensors (unreadable, in evaluation) are left out."""
    good = [{k: x for k, x in item.items() if k != "bad"} for item in items if "label" in item]
    batch = default_collate(good) if good else {"index": torch.zeros(0, dtype=torch.int64)}
    return batch | {"bad": [pair for item in items for pair in item["bad"]]}


# ---------------------------------------------------------------------------------------------
# Loading


class Workers(DataLoader):
    """A DataLoader with worker processes. On Linux they are forks, which share an index of millions
    of clips with their parent; Python 3.14's default would copy it to each."""

    def __init__(self, dataset, count, **how):
        fork = "fork" if count > 0 and sys.platform == "linux" else None
        super().__init__(dataset, num_workers=count, multiprocessing_context=fork, **how)

    def __iter__(self):
        # What is garbage is removed before a fork: a codec that waits for its threads when it is
        # freed would wait forever in a worker, which has not inherited them.
        gc.collect()
        with warnings.catch_warnings():  # of threads that are left, which a worker does not use
            warnings.filterwarnings("ignore", ".*use of fork", DeprecationWarning)
            return super().__iter__()


class Loader(Workers):
    """Yields batches on a device: {"video": (B, T, H, W, 3) uint8, "audio": (B, T, F) float32,
    "label": (B, K) int64}, and "index" (B,) int64, on the CPU.

    sampler: lists of keys. On a GPU, the next batch is copied, and its colors are changed, while
    this one is used. A clip that cannot be read is told once, a batch of none but such left out.

    Attributes: drawn, unreadable (counts), bad {name: reason}, waited (s spent waiting for data).
    """

    def __init__(self, clips, sampler, device="cpu", workers=0, tell=print):
        self.device, self.tell = torch.device(device), tell
        super().__init__(
            clips, workers, batch_sampler=sampler, collate_fn=collate,
            pin_memory=self.device.type == "cuda")
        self.fate = "replaced" if getattr(clips, "augment", None) else "left out"
        self.drawn, self.unreadable, self.bad, self.waited = 0, 0, {}, 0.0

    def __iter__(self):
        if self.device.type != "cuda":
            yield from map(self.to_device, self.batches())
            return

        here, side = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        ready = None
        for batch in itertools.chain(self.batches(), [None]):
            here.wait_stream(side)  # for the batch that is ready; the next is not yet begun
            with torch.cuda.stream(side):
                following = batch and self.to_device(batch)

            if ready:
                for name in ready.keys() - {"index"}:
                    ready[name].record_stream(here)
                yield ready
            ready = following

    def batches(self):
        """Batches on the CPU, with what could not be read counted, and told once."""
        batches = super().__iter__()
        while True:
            since = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - since
            if batch is None:
                return

            bad = batch.pop("bad")
            self.unreadable += len(bad)
            self.drawn += len(batch["index"])

            for name, reason in bad:
                if name not in self.bad:
                    self.bad[name] = reason
                    self.tell(f"unreadable, {self.fate}: {name}: {reason}")
            if len(batch["index"]):
                yield batch

    def to_device(self, batch):
        """A batch with all but its index on the device, and its colors changed."""
        color = batch.pop("color", None)
        batch = {
            k: x if k == "index" else x.to(self.device, non_blocking=True)
            for k, x in batch.items()}
        return batch if color is None else batch | {"video": color_jitter(batch["video"], color)}


# ---------------------------------------------------------------------------------------------
# Built-in clips: a generated world of things that are seen and heard

SHAPES = {"star": 0.6, "diamond": 1.0, "disc": 2.0, "square": 8.0}  # p of |x|^p + |y|^p = 1
THINGS = tuple(f"{pattern} {shape}" for pattern in ("plain", "striped") for shape in SHAPES)
STRIPES = 0.6  # from one stripe to the next, in radii
SOFT = 0.6  # the soft partials of a voice; the loud ones are 1
UNSEEN = UNHEARD = 0.3  # shares of the clips
LOWEST, HIGHEST = (2595 * math.log10(1 + hertz / 700) for hertz in (180, 1600))  # pitch, mel


class Scene:
    """A thing flies about in a box and bounces off its walls; a function of (seed, index).

    Its look (shape, stripes) and its voice (which of the partials 2, 3, 4 are loud) tell which of
    the THINGS it is. Height is heard as pitch, a bounce as a hit. In some clips it is out of the
    picture, in some, independently, there is noise instead of its voice: with perfect eyes or ears
    one is right in 0.7 + 0.3 / 8 = 74 % of the clips, with both in 1 - 0.3^2 * 7 / 8 = 92 %.
    """

    def __init__(self, seed, index):
        rng = np.random.default_rng([seed, index])
        self.seed, self.thing = (seed, index), index % len(THINGS)
        self.seen, self.heard = rng.random(2) >= (UNSEEN, UNHEARD)  # what follows, things share

        self.radius = rng.uniform(0.28, 0.38)  # lengths are shares of the frame's side
        self.turn = rng.uniform(-0.3, 0.3)  # radians
        self.start = rng.uniform(0, 2, 2)  # x, y, in lengths of the way from wall to wall
        self.speed = rng.uniform(0.15, 0.5, 2) * rng.choice((-1, 1), 2)  # such lengths a second
        self.loudness = rng.uniform(0.6, 1.0)

        self.color = rng.permutation([0.95, rng.uniform(0.1, 1.0), rng.uniform(0.0, 0.3)])
        self.ground = rng.uniform(0.0, 0.4, 3)  # a color, and its slope to the right and down
        self.slope = rng.uniform(-0.15, 0.15, (2, 3))
        self.stripes = rng.uniform(0, 2 * math.pi)  # where they start: a phase

    def position(self, times):
        """Center (T, 2) of the thing at the times (T,) in s: x to the right, y down."""
        way = (self.start + self.speed * np.asarray(times)[:, None]) % 2
        return self.radius + (1 - 2 * self.radius) * np.minimum(way, 2 - way)

    def pictures(self, times, size):
        """What is seen at the times (T,) in s: (T, size, size, 3) uint8."""
        y, x = (np.mgrid[:size, :size].astype(np.float32) + 0.5) / size  # (H, W)
        right, down = self.slope.astype(np.float32)
        ground = self.ground + right * (x - 0.5)[..., None] + down * (y - 0.5)[..., None]

        center = self.position(times).astype(np.float32)[:, :, None, None]
        x, y = x - center[:, 0], y - center[:, 1]  # (T, H, W)
        cos, sin = math.cos(self.turn) / self.radius, math.sin(self.turn) / self.radius
        x, y = cos * x + sin * y, cos * y - sin * x

        p = list(SHAPES.values())[self.thing % 4]
        outside = (np.abs(x) ** p + np.abs(y) ** p) ** (1 / p) - 1  # in radii
        cover = self.seen * np.clip(0.5 - outside * self.radius * size, 0, 1)  # a soft edge
        light = np.sin(2 * math.pi / STRIPES * x + self.stripes) if self.thing >= 4 else 1.0
        paint = (0.65 + 0.35 * light * np.ones_like(x))[..., None] * self.color

        picture = ground + cover[..., None] * (paint - ground)  # (T, H, W, 3)
        return (picture.clip(0, 1) * 255 + 0.5).astype(np.uint8)

    def sound(self, seconds):
        """What is heard: (S,) float32 at 16 kHz."""
        count, tail = round(seconds * SAMPLE_RATE), SAMPLE_RATE // 10
        noise = np.random.default_rng([*self.seed, 1]).standard_normal(count + tail)

        points = np.arange(0, count + 2 * HOP, HOP)  # 100 a second
        path = self.position(points / SAMPLE_RATE)
        mel = LOWEST + (HIGHEST - LOWEST) * (1 - path[:, 1])
        hertz = np.interp(np.arange(count), points, 700 * (10 ** (mel / 2595) - 1))
        phase = np.cumsum(2 * math.pi / SAMPLE_RATE * hertz).astype(np.float32)

        partials = 1.0, *(1.0 if self.thing >> bit & 1 else SOFT for bit in range(3))
        voice = sum(loud * np.sin(k * phase) for k, loud in enumerate(partials, start=1))
        wave = 0.15 * self.loudness * voice if self.heard else np.zeros_like(phase)
        wave = wave + (0.01 if self.heard else 0.1 * self.loudness) * noise[:count]

        hit = 0.5 * self.loudness * noise[count:] * np.exp(-50 / SAMPLE_RATE * np.arange(tail))
        turned = np.diff(np.sign(np.diff(path, axis=0)), axis=0).any(1)  # in x or in y
        for start in points[1:-1][turned]:
            wave[start : start + tail] += hit[: count - start]
        return wave.astype(np.float32)


@functools.cache
def generated(seed, i, window, modalities):
    """A clip of the world as tensors, with its label; each is made once and kept."""
    scene = Scene(seed, i)
    clip = {"label": torch.tensor([scene.thing])}

    if "video" in modalities:
        times = (np.arange(window.frames) + 0.5) * window.step
        clip["video"] = torch.from_numpy(scene.pictures(times, window.size))
    if "audio" in modalities:
        clip["audio"] = log_mel(torch.from_numpy(scene.sound(window.seconds)), window.mels)
    return clip


class Builtin:
    """Generated clips with items as those of `Clips`: (epoch, i, draw) is the same in all epochs
    and draws."""

    classes = THINGS

    def __init__(self, count, window, seed=0, modalities=MODALITIES):
        self.count, self.window, self.seed, self.modalities = count, window, seed, modalities

    def __len__(self):
        return self.count

    def name(self, i):
        return f"built-in clip {i} of seed {self.seed}"

    def __getitem__(self, key):
        _, i, _ = key
        clip = generated(self.seed, i, self.window, tuple(self.modalities))
        return clip | {"index": i, "bad": []}


# ---------------------------------------------------------------------------------------------
# python data.py check, python data.py prepare


@dataclass
class Check:
    """(verdict, reason, 0) of each clip: "bad" as training says, "warning" if it is used all the
    same."""

    clips: Clips

    def __getitem__(self, i):
        try:
            warnings = ", ".join(self.warnings(i))
        except ClipError as error:
            return "bad", str(error), 0
        return "warning" if warnings else "", warnings, 0

    def warnings(self, i):
        clip, window, index = self.clips.read(i), self.clips.window, self.clips.index
        with opened(index.path(i), self.clips.modalities, index.segment(i), math.inf) as media:
            length = media.end - media.begin
            if length < max(window.video_seconds, window.seconds) - 1e-3:
                yield f"shorter than a window ({length:.2f} s)"

            if "audio" in clip and (clip["audio"] <= math.log(2 * MEL_OFFSET)).all():
                yield "silent"
            if "video" in clip and (clip["video"] == clip["video"][:1]).all():
                yield "still picture"

            try:
                for stream in media.streams:
                    for at, frame in media.decode(stream, media.begin):
                        if at > media.end:
                            break
                        if isinstance(frame, av.Packet):
                            frame.decode()

            except (ClipError, *AV_ERRORS) as error:
                yield f"damaged outside the first window: {error}"


# frames/s: every sampling step of the paper is a multiple of 0.08 s
PREPARED_RATE = Fraction(25, 2)
PREPARED_SIDE = 256  # short side, pixels
QUALITY = 5  # JPEG quantizer, 2 (best) to 31: what one core still reads 50 clips/s of


@dataclass
class Prepare:
    """Re-encodes each clip of an Index: frames as JPEG, sound as 16 kHz PCM.
    -> ("bad" or "", reason, bytes)"""

    index: Index
    target: str
    quality: int = QUALITY

    def __getitem__(self, i):
        path = self.path(i)
        partial = path.with_suffix(".partial")
        if path.exists():
            return "", "", path.stat().st_size
        path.parent.mkdir(parents=True, exist_ok=True)

        try:
            with opened(self.index.path(i), (), self.index.segment(i), math.inf) as media:
                with av.open(str(partial), "w", format="matroska") as container:
                    encode(media, container, self.quality)
            os.replace(partial, path)

        except ClipError as error:
            return "bad", str(error), 0
        except OSError as error:
            raise UserError(f"{partial} cannot be written: {error}") from None
        finally:
            partial.unlink(missing_ok=True)
        return "", "", path.stat().st_size

    def path(self, i):
        """Where clip i goes: its path, with its times in ms if it is a part of the file."""
        path = pathlib.PurePath(os.fsdecode(self.index.names[i]))
        start, end, _ = self.index.segment(i)
        cut = "" if math.isnan(start) else f"_{_ms(start)}_{_ms(end)}"
        return pathlib.Path(self.target, path.with_name(path.stem + cut + ".mkv"))


def encode(media, container, quality):
    """Writes a part of a file to another."""
    # all streams exist before anything is written
    quantizer = {"qmin": str(quality), "qmax": str(quality)}
    picture = media.video and container.add_stream("mjpeg", PREPARED_RATE, options=quantizer)
    sound = media.audio and container.add_stream("pcm_s16le", SAMPLE_RATE, layout="mono")

    if picture:
        count = (min(media.end, media.length(media.video)) - media.begin) * PREPARED_RATE
        times = media.begin + np.arange(max(1, math.ceil(count - 1e-6))) / float(PREPARED_RATE)
        for k, image in enumerate(media.frames(times, resizing(0, PREPARED_SIDE))):
            if k == 0:
                picture.height, picture.width, _ = image.shape
                picture.pix_fmt = "yuvj420p"

            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = k, 1 / PREPARED_RATE
            container.mux(picture.encode(frame))
        container.mux(picture.encode(None))

    if sound:
        samples = media.samples(media.begin, media.end)
        there = np.flatnonzero(~np.isnan(samples))
        if len(there):
            samples = (samples[there[0] : there[-1] + 1].clip(-1, 1) * 32767).astype(np.int16)

            frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
            frame.pts, frame.sample_rate = int(there[0]), SAMPLE_RATE
            frame.time_base = Fraction(1, SAMPLE_RATE)
            container.mux(sound.encode(frame))
        container.mux(sound.encode(None))


def _go_through(job, index, workers):
    """Runs a job on each clip, by worker processes, and says which clips are not as they should be
    -> {verdict: count}, bytes."""
    verdicts, size = collections.Counter(), 0
    results = Workers(job, workers, batch_size=None, sampler=range(len(index)))
    for i, (verdict, reason, more) in enumerate(tqdm(results, disable=None)):
        verdicts[verdict] += 1
        size += more

        if verdict:
            tqdm.write(f"{verdict}: {index.name(i)}: {reason}")
        if size and i in (9, 99, 999):
            tqdm.write(f"about {size / (i + 1) * len(index) / 1e9:.2f} GB in all")
    return verdicts, size


def check(index, window, workers, modalities=MODALITIES):
    """Prints the clips that are bad or odd, and a summary; returns how many are bad."""
    verdicts, _ = _go_through(Check(Clips(index, window, modalities)), index, workers)
    print(f"{len(index)} clips: {verdicts['']} fine, {verdicts['warning']} used with a warning, "
          f"{verdicts['bad']} bad")
    return verdicts["bad"]


def prepare(index, target, quality, workers):
    """Re-encodes all clips of an Index to `target`; returns how many are bad."""
    stems = {}
    for name in sorted(set(map(os.fsdecode, index.names))):
        other = stems.setdefault(os.path.splitext(name)[0], name)
        if other != name:
            raise UserError(f"{other} and {name} would become one file: rename one of them")

    verdicts, size = _go_through(Prepare(index, target, quality), index, workers)
    print(f"{verdicts['']} of {len(index)} clips in {target}, {size / 1e9:.3f} GB; "
          f"{verdicts['bad']} bad")
    return verdicts["bad"]


def one_sentence(kind, error, trace):
    """For sys.excepthook: what the user (also avmae's UserError) or a full disk causes is told in a
    sentence."""
    if isinstance(error, BrokenPipeError):  # of `| head`: nor is it told at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    elif kind.__name__ == "UserError" or getattr(error, "errno", None) == errno.ENOSPC:
        print(f"error: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("command", choices=("check", "prepare"))
    add("source", help="folder of video files, or one file")
    add("target", nargs="?", help="prepare: folder to write to")

    add("--annotations", default="", help="annotation file that lists the clips")
    add("--modalities", nargs="+", choices=MODALITIES, default=MODALITIES,
        help="what clips must have; audio alone takes sound files, too")
    add("--quality", type=int, default=QUALITY, help="prepare: JPEG quantizer, 2 (best) to 31")
    add("--seconds", type=float, default=8.0, help="check: audio of a window")
    add("--workers", type=int, default=cpu_count(), help="processes")

    args = parser.parse_args()
    if args.command == "prepare" and not args.target:
        raise UserError("say where to: python data.py prepare SOURCE TARGET")

    modalities = [m for m in MODALITIES if m in args.modalities]
    if args.annotations:
        index = read_annotations(args.annotations, args.source, modalities=modalities)
    else:
        index = find_clips(args.source, modalities)

    if args.command == "check":
        return int(check(index, Window(seconds=args.seconds), args.workers, modalities) > 0)
    return int(prepare(index, args.target, args.quality, args.workers) > 0)


if __name__ == "__main__":
    sys.excepthook = one_sentence
    sys.exit(main())
