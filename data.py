"""Clips for Audiovisual Masked Autoencoders: video files with sound, or generated ones.

    folder or csv -> Index -> Clips[epoch, i, draw] -> {"audio": (T, F), "video": (T, H, W, 3)}

A clip is cut by time: frames and sound of the same moments, at any frame rate and sample rate.
Windows, crops and order depend only on the seed and the position in training, so they are the same
on any number of processes or workers, and after a resume.
"""

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
import signal
import sys
import threading
import time
import warnings
from array import array
from dataclasses import dataclass, replace

import av
import numpy as np
import torch
import torchaudio
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

MODALITIES = ("video", "audio")
SUFFIXES = tuple(
    ".mp4 .mkv .webm .mov .avi .m4v .mpg .mpeg .ts .mts .m2ts .flv .wmv .3gp .ogv".split())
SOUND_SUFFIXES = tuple(  # used if no picture is needed
    ".wav .flac .m4a .mp3 .ogg .opus .aac .oga .mka .wma .aiff .aif".split())
# Containers with pictures and sound of their own: a playlist named .mp4 could point anywhere.
CONTAINERS = "mov,mp4,m4a,3gp,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,wav,flac,mp3,aac,aiff"
# Containers that do not state where each stream ends, and those where FFmpeg guesses it.
NO_ENDS, GUESSED_ENDS = ("matroska,webm", "flv"), ("mp3", "aac", "mpeg", "mpegts")

SAMPLE_RATE = 16_000  # Hz
HOP = 160  # samples: 10 ms
MEL_WINDOW = 400  # samples: 25 ms
N_FFT = 1024
MEL_OFFSET = 0.01  # in log(mel + offset)

PREROLL = 0.25  # s of sound decoded ahead: codecs need some time to settle after a seek
JITTER = 0.015  # s by which stamps of sound may be off; the shortest lost packet is 20 ms
MAX_GAP = 0.1  # s of missing sound that is bridged: some lost packets, as phones and streams have
MIN_OVERLAP = 0.1  # share of a clip that all its streams must have
TIME_LIMIT = 60.0  # s of CPU time to read a clip; a file that takes longer is a bad file

MAX_TRIES = 1000  # clips that are tried in place of one that cannot be read
CGROUP = pathlib.Path("/sys/fs/cgroup")  # quotas of a container

av.logging.set_level(av.logging.PANIC)  # a damaged file is reported by name, once
AV_ERRORS = (av.error.FFmpegError, OSError, ValueError, IndexError, EOFError)
ERROR_WORDS = (  # of the first that fits; other errors have words of their own
    (av.error.InvalidDataError, "its content is damaged or of an unknown format"),
    ((av.error.ArgumentError, av.error.PatchWelcomeError, NotImplementedError,
      av.error.DecoderNotFoundError), "its format is not supported"),
    (PermissionError, "there is no permission to read it"), (EOFError, "it ends too early"))
NOUNS = {"video": "picture", "audio": "sound"}
EXTRA_PICTURES = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
# A title in a foreign encoding must not make a file unreadable: PyAV 19 escapes it by itself.
FOREIGN_TITLES = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}
try:  # otherwise each resampler starts a thread for each CPU; PyAV 17 cannot avoid it
    ONE_THREAD = {"threads": 1}
    av.AudioResampler(**ONE_THREAD)
except TypeError:
    ONE_THREAD = {}


class UserError(ValueError):
    """Raised for invalid user input; the message says how to fix it."""

    def __init__(self, message):  # from a data worker it comes at the end of a traceback
        super().__init__(str(message).rsplit("UserError: ", 1)[-1].strip())


class ClipError(Exception):
    """Raised when a clip cannot be used; the message says why."""


@dataclass(frozen=True)
class Window:
    """Size of the part of a clip that the model sees. The defaults are the paper's pretraining."""

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
    """Random changes in training. The defaults are the pretraining recipe: crop and flip."""

    flip: bool = True  # with probability 0.5
    jitter: tuple = (1.0, 1.0)  # scale of height and of width, before the crop
    color: bool = False
    time_shift: bool = False  # circular, uniform, of the spectrogram
    frequency_masks: tuple = (0, 0)  # SpecAugment: number of masks, largest width in bins
    time_masks: tuple = (0, 0)  # number of masks, largest width in frames


def cpu_count():
    """Return how many CPUs this process may use, by its affinity and its container's quota."""
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    for files in ("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"):  # version 2, 1
        with contextlib.suppress(OSError, ValueError):  # no such file, no quota ("max")
            quota, period = map(int, " ".join((CGROUP / f).read_text() for f in files).split())
            count = min(count, max(1, quota // period)) if quota > 0 else count
    return count


def explain(error):
    """Return a UserError in place of an error of the machine whose remedy is known."""
    text = str(error) if isinstance(error, (RuntimeError, OSError)) else ""
    if "Too many open files" in text:
        return UserError("too many open files: lower --workers, or raise the limit by ulimit -n")
    if re.search("Bus error|shared memory|</torch_", text):
        return UserError("too little shared memory for the data workers: start the container with "
                         "--ipc=host (or --shm-size=8g), or lower --workers")
    return error


def excepthook(kind, error, trace):
    """Print a UserError (also that of avmae) and a full disk as one line; for sys.excepthook."""
    error = explain(error)
    if isinstance(error, BrokenPipeError):  # of `| head`; Python would report it again at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    elif type(error).__name__ == "UserError" or getattr(error, "errno", None) == errno.ENOSPC:
        print(f"error: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def setup_script(hook=excepthook):
    """Install the hook, and print file names of any encoding."""
    sys.excepthook = hook
    for stream in sys.stdout, sys.stderr:
        stream.reconfigure(errors="backslashreplace")


# ---------------------------------------------------------------------------------------------
# Sound


_mel_spectrogram = functools.cache(torchaudio.transforms.MelSpectrogram)


def log_mel(waveform, mels=128):
    """Return the log-mel spectrogram of a 16 kHz mono waveform: (S,) -> (S // 160, mels).

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
def open_media(path, modalities=MODALITIES, segment=(math.nan, math.nan, False), limit=None):
    """Open a file, or a segment (start, end, shared) of it, as `Media`, in a `with`.

    Raises ClipError, on entering or inside, if the file cannot be opened or decoded, lacks a stream
    of `modalities` or takes more than `limit` s of CPU time. Without modalities any stream will do.
    """
    # This thread's CPU time: on a network drive that stalls, a limit on wall time would replace
    # clips, and a run would not repeat. For the same reason FFmpeg gets no timeout.
    deadline, container = time.thread_time() + (limit or TIME_LIMIT), None
    try:
        if not os.path.isfile(path):  # a directory, or a pipe, which would block
            raise ClipError("not a file")

        container = av.open(
            os.fspath(path), **FOREIGN_TITLES,
            options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"})
        with container:
            media = Media(container, modalities, deadline)
            media.begin, media.end = media.clip_bounds(*segment)
            yield media

    except AV_ERRORS as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        action = "decoded" if container else "opened"
        words = next((words for kinds, words in ERROR_WORDS if isinstance(error, kinds)), None)
        words = words or getattr(error, "strerror", None) or str(error)
        raise ClipError(f"cannot be {action}: {words}") from error


class Media:
    """Pictures and sound of an open file. Times are in s from its earliest stream's start.

    `begin` and `end` are the bounds of the clip, `spans` {stream index: (start, end)}.
    """

    def __init__(self, container, modalities, deadline):
        self.container, self.deadline, self.scaler = container, deadline, VideoReformatter()
        self.modalities = tuple(modalities)
        self.video, self.audio = self.best_stream("video"), self.best_stream("audio")
        self.streams = [s for s in (self.video, self.audio) if s]

        if not self.video and ("video" in modalities or not self.audio):
            raise ClipError("no picture")
        if not self.audio and "audio" in modalities:
            raise ClipError("no audio track")

        if self.video:
            codec = self.video.codec_context
            codec.thread_count = 1  # workers share the cores
            # Otherwise the part of a JPEG that cannot be decoded shows what was decoded before.
            # (Codecs that predict do set `is_corrupt`.)
            codec.options = {"err_detect": "explode"} if codec.name == "mjpeg" else {}

        starts = [s.start_time * s.time_base for s in self.streams if s.start_time is not None]
        self.origin = float(min(starts, default=0))
        self.spans = self.find_spans()

    def best_stream(self, kind):
        """Return the default stream of a kind, or else the longest; None if the file has none.
        Covers and thumbnails do not count."""
        def rank(stream):
            length = float((stream.duration or 0) * stream.time_base)
            default = bool(stream.disposition & Disposition.default)
            return stream.frames != 1, default, stream.metadata.get("DURATION", ""), length

        streams = [
            s for s in getattr(self.container.streams, kind)
            if s.codec_context and not s.disposition & EXTRA_PICTURES]
        return max(streams, key=rank, default=None)

    def find_spans(self):
        """Return {stream index: (start, end)}, s.

        An end is that of the header, or of the last packet if the header does not state it. In that
        case a last picture is shown until the file ends.
        """
        spans, kind = {}, self.container.format.name
        measured = kind in NO_ENDS + GUESSED_ENDS or any(s.duration is None for s in self.streams)
        last = self.last_packets() if measured else {}

        for stream in self.streams:
            start, tick = (stream.start_time or 0) * stream.time_base, stream.time_base
            end = float(start + (stream.duration or 0) * tick) - self.origin
            if measured:
                end = last.get(stream.index, 0.0)
            if stream.type == "video" and kind in NO_ENDS:
                end = max(last.values(), default=0.0)
            spans[stream.index] = max(0.0, float(start) - self.origin), end
        return spans

    def last_packets(self):
        """Return {stream index: end of its last packet, s}, from the end of the file."""
        stated, ends = (self.container.duration or 0) / av.time_base, {}
        for back in (1.0, 30.0, math.inf) if stated else (math.inf,):
            self.seek(self.streams[0], stated - back)
            for packet in self.packets(self.streams):
                if packet.pts is not None:
                    index, end = packet.stream_index, packet.pts + (packet.duration or 0)
                    ends[index] = max(ends.get(index, 0), end)
            if len(ends) == len(self.streams):
                break

        ticks = {s.index: float(s.time_base) for s in self.streams}
        ends = {index: max(0.0, end * ticks[index] - self.origin) for index, end in ends.items()}
        # A damaged stamp may be too late. The stated length counts from 0 or from the first stamp.
        if stated and self.container.format.name not in GUESSED_ENDS:
            ends = {k: min(end, stated + max(0.0, -self.origin)) for k, end in ends.items()}
        return ends

    def length(self, stream):
        """Return the end of a stream, s."""
        return self.spans[stream.index][1]

    def clip_bounds(self, start, end, shared=False):
        """Return (begin, end) of a segment; of the file if its times are NaN.

        A clip is the part that the streams of all modalities have. A segment beyond a file of about
        its own length means that the file is already cut, unless other rows share it: nobody knows
        for which of them.
        """
        needed = [s for s in self.streams if s.type in self.modalities]
        spans = [self.spans[s.index] for s in needed or self.streams]
        starts, ends = zip(*spans)
        length = max(ends)
        if not 0 < length < 1e6:
            raise ClipError(f"its stated length is {length:g} s")

        already_cut = not shared and end > length + 0.5 and length <= end - start + 1
        if math.isnan(start) or already_cut:
            start, end = 0.0, length
        if start >= length:
            raise ClipError(f"its segment starts at {start:.2f} s, the file ends at {length:.2f} s")

        if not needed:
            return max(start, min(starts)), min(end, length)
        begin, stop = max(start, *starts), min(end, *ends)
        if stop - begin < MIN_OVERLAP * (min(end, length) - start):
            parts = ", ".join(
                f"{NOUNS[s.type]} from {a:.2f} to {b:.2f} s" for s, (a, b) in zip(needed, spans))
            raise ClipError(f"{parts}: too little of the clip, {start:.2f} to {end:.2f} s")
        return begin, stop

    def packets(self, streams):
        """Yield packets of streams. To close the demuxer frees its packet, which PyAV's `decode`
        does not."""
        with contextlib.closing(self.container.demux(streams)) as packets:
            for packet in packets:
                if time.thread_time() > self.deadline:
                    raise ClipError(f"takes longer than {TIME_LIMIT:g} s of CPU time to read")
                yield packet

    def seek(self, stream, at):
        """Go to a keyframe before a time, s, or to the start of the stream."""
        first = stream.start_time or 0
        stamp = max(first, math.floor((max(at, -1e6) + self.origin) / stream.time_base))
        if stamp == first:
            # MPEG-TS needs room before, since it is decoded earlier than shown. AVI and MP3 refuse.
            with contextlib.suppress(av.error.FFmpegError):
                self.container.seek(first - math.ceil(10 / stream.time_base), stream=stream)
                return
        try:
            self.container.seek(stamp, stream=stream)
        except av.error.FFmpegError:
            raise ClipError(f"no {NOUNS[stream.type]} can be found by its time") from None

    def decode(self, stream, start):
        """Return an iterator of (time, frame) of a stream, from a picture not later than `start`,
        or from sound at most half a PREROLL later."""
        latest = start + (PREROLL / 2 if stream.type == "audio" else 1e-3)
        for back in (0.0, 1.0, 4.0, 16.0, 64.0, math.inf):  # an index may be wrong or missing
            found = self.decode_from(stream, start - back)
            first = next(found, None)
            if start - back <= self.spans[stream.index][0]:  # this was the start of the stream
                break
            if first and first[0] <= latest and not first[1].is_corrupt:
                break
        return itertools.chain([first] if first else [], found)

    def decode_from(self, stream, start):
        """Yield (time, frame) from a keyframe before `start` on.

        Where every packet is a picture of its own, yield the packet, so that only those that are
        shown get decoded.
        """
        intra = stream.type == "video" and stream.codec_context.codec.intra_only
        first, tick = self.spans[stream.index][0], float(stream.time_base)
        at, begun = max(start, first), False
        self.seek(stream, start)

        for packet in self.packets(stream):
            if not begun and packet.size and packet.has_sidedata("encryption_info"):
                raise ClipError("it is encrypted")
            try:
                frames = ([packet] if packet.size else []) if intra else packet.decode()
            except av.error.InvalidDataError:
                if begun or start <= first:  # otherwise a seek may have cut the packet
                    raise
                continue

            for frame in frames:
                begun = True
                if frame.pts is not None:
                    at = frame.pts * tick - self.origin
                yield at, frame

    def frames(self, times, resize):
        """Yield the pictures shown at increasing `times`: (H, W, 3) uint8 arrays.

        resize: (height, width) of a picture -> of the result. A picture is shown from its own time
        to that of the next; the first also before, the last for its own length, and at least for a
        second or two frames.
        """
        tail = max(1.0, 2 / (self.video.average_rate or 2))
        decoded = itertools.chain(self.decode(self.video, times[0]), [(math.inf, None)])
        done, shape = 0, None

        for (at, frame), (until, _) in itertools.pairwise(decoded):
            due = times[done:][times[done:] + 1e-3 < until]
            if not len(due):
                continue

            if until == math.inf:  # the last picture
                held = self.container.format.name in NO_ENDS
                until = self.length(self.video) if held else at + float(
                    (frame.duration or 0) * frame.time_base)
            if due[-1] > max(at + tail, until):
                raise ClipError(f"the picture ends at {at:.2f} s, before its stated end")
            image = self.to_image(frame, resize)
            if image.shape != (shape or image.shape):
                raise ClipError(f"the size of the picture changes at {at:.2f} s")

            yield from [image] * len(due)
            done, shape = done + len(due), image.shape
            if done == len(times):
                return
        raise ClipError("no picture can be decoded")

    def to_image(self, frame, resize):
        """Return a frame, or a packet that holds one, as upright (H, W, 3) uint8, resized."""
        if isinstance(frame, av.Packet):
            frame = next(iter(frame.decode()), None)
        if frame is None or frame.is_corrupt:
            raise ClipError("a damaged picture")

        # the directions in which its rows and columns are shown, of a phone or a mirror
        matrix = frame.side_data.get("DISPLAYMATRIX")
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5] if matrix else (1, 0, 0, 0, 1)
        turned = abs(int(b)) > abs(int(a))

        height, width = frame.height, frame.width
        height, width = resize(width, height)[::-1] if turned else resize(height, width)
        frame = self.scaler.reformat(
            frame, width, height, "rgb24", interpolation="BILINEAR", threads=1)
        image = frame.to_ndarray()
        image, right, down = (image.transpose(1, 0, 2), c, b) if turned else (image, a, d)
        return image[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1]

    def decode_audio(self, start, stop):
        """Return the sound from `start` to `stop`, s: (S,) float32, 16 kHz, the mean of the
        channels, NaN where the track has none. Samples are placed by their stamps."""
        sound = np.full(round((stop - start) * SAMPLE_RATE), np.nan, np.float32)

        for begin in (start - PREROLL, -math.inf):  # of FLAC in Ogg, stamps are wrong after a seek
            try:
                runs = itertools.groupby(self.audio_frames(begin, stop), key=lambda item: item[0])
                for (at, *_), run in runs:
                    wave = resample(frame for _, frame in run)
                    first = round((at - start) * SAMPLE_RATE)
                    wave = wave[max(0, -first) :]
                    place = sound[max(0, first) :][: len(wave)]
                    place[:] = wave[: len(place)]

                return sound
            except ClipError:
                if begin == -math.inf:
                    raise

    def audio_frames(self, start, stop):
        """Yield ((start of its run, rate, format, channels), frame) of each decoded frame.

        In a run samples follow each other without a gap, though stamps are rounded (matroska: 1 ms)
        and jitter. A packet that is lost is at least 20 ms, and begins another run.
        """
        run, count = (), 0
        for at, frame in self.decode(self.audio, start):
            kind = frame.sample_rate, frame.format.name, frame.layout.nb_channels
            expected = run[0] + count / run[1] if run else at
            at = expected if frame.pts is None else at
            if at < expected - MAX_GAP:
                raise ClipError(f"the time stamps of the sound jump back at {expected:.2f} s")
            if at >= stop:
                return

            if kind != run[1:] or abs(at - expected) > JITTER:
                run, count = (at, *kind), 0
            count += frame.samples
            yield run, frame


def to_mono(frames):
    """Return the mean of the channels of audio frames of one format: (S,) float32 in [-1, 1].

    The mean of equal channels is as loud as one of them, for any number and layout.
    """
    samples = np.concatenate([f.to_ndarray() for f in frames], axis=1)    # (C, S) or (1, S * C)
    if not frames[0].format.is_planar:
        samples = samples.reshape(-1, frames[0].layout.nb_channels).T

    if samples.dtype.kind in "iu":
        info = np.iinfo(samples.dtype)
        zero = 0.0 if info.min else 128.0
        samples = (samples.astype(np.float32) - zero) / (info.max + 1.0 - zero)
    return samples.mean(0, dtype=np.float32)


def resample(frames):
    """Return audio frames that follow each other as one mono waveform of 16 kHz: (S,) float32."""
    frames, parts = iter(frames), []
    resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE, **ONE_THREAD)

    while block := list(itertools.islice(frames, 200)):  # some 4 s in a call: fewer, larger calls
        frame = av.AudioFrame.from_ndarray(to_mono(block)[None], format="flt", layout="mono")
        frame.sample_rate = block[0].sample_rate
        parts += resampler.resample(frame)
    parts = [f.to_ndarray()[0] for f in parts + resampler.resample(None)]
    return np.concatenate([np.zeros(0, np.float32), *parts])  # very few samples give none


def fill_gaps(sound, start):
    """Bridge short gaps (NaN) in a waveform (S,) that starts at `start`, s.

    Raises ClipError for a longer one: it is not to be learned that a moment is silent.
    """
    missing = np.isnan(sound)
    if not missing.any():
        return sound

    gaps = np.flatnonzero(np.diff(missing, prepend=False, append=False)).reshape(-1, 2)
    first, last = gaps[np.diff(gaps)[:, 0].argmax()]
    if last - first > MAX_GAP * SAMPLE_RATE or missing.all():
        at, length = start + first / SAMPLE_RATE, (last - first) / SAMPLE_RATE
        raise ClipError(f"a gap in the sound at {at:.2f} s of {length:.2f} s")

    known = np.flatnonzero(~missing)
    return np.interp(np.arange(len(sound)), known, sound[known]).astype(np.float32)


def read_video(media, start, window, resize):
    """Return the frames from `start` on, wrapping round the clip's end: (T, H, W, 3) uint8."""
    begin, end = media.begin, media.end
    times = begin + (start - begin + np.arange(window.frames) * window.step) % (end - begin)
    runs = np.split(times, np.flatnonzero(np.diff(times) < 0) + 1)
    return np.stack([image for run in runs for image in media.frames(run, resize)])


def read_audio(media, start, seconds):
    """Return the samples from `start` on, wrapping round the clip's end: (S,) float32."""
    begin, end = media.begin, media.end
    stop = start + min(seconds, end - begin)  # one turn at most
    sound = fill_gaps(media.decode_audio(start, min(stop, end)), start)
    if stop - end > 1e-6:
        rest = media.decode_audio(begin, begin + stop - end)
        sound = np.concatenate([sound, fill_gaps(rest, begin)])
    return np.resize(sound, round(seconds * SAMPLE_RATE))


def verify_clip(media):
    """Decode a whole clip. Raises ClipError for damage, gaps, and ends before the stated end."""
    needed = media.modalities or MODALITIES
    if media.video and "video" in needed:
        for at, frame in media.decode(media.video, media.begin):
            if at > media.end:
                break
            if isinstance(frame, av.Packet):
                frame.decode()
        list(media.frames(np.array([media.end - 1e-3]), resizing(0, 32)))
    if media.audio and "audio" in needed:
        fill_gaps(media.decode_audio(media.begin, media.end), media.begin)


# ---------------------------------------------------------------------------------------------
# Augmentation: torch's random numbers, which `seeded` makes a function of its arguments


@contextlib.contextmanager
def seeded(*numbers):
    """Make torch's random numbers on the CPU depend on `numbers` alone, inside a `with`. The
    generator outside does not change."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int.from_bytes(digest, "big"))
        yield


def resizing(size, short):
    """Return a function (height, width) -> size with a short side `short`, no side below `size`."""

    def resize(height, width):
        scale = short / min(height, width)
        # even, like the frames of prepared files
        return tuple(max(size, 2 * round(side * scale / 2)) for side in (height, width))

    return resize


def center_crop(video, size):
    """Crop the center: (T, H, W, 3) -> (T, size, size, 3)."""
    return F.center_crop(video.permute(0, 3, 1, 2), [size, size]).permute(0, 2, 3, 1).contiguous()


def random_crop(video, size, augment):
    """Crop a random box, scale it to `size`, maybe flip: (T, H, W, 3) -> (T, size, size, 3) uint8.

    Scaling the picture's height by j before a crop is the same as a box of height size / j.
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


COLOR = torch.tensor([  # ranges of the six numbers of `draw_color`
    (0, 1), (-32 / 255, 32 / 255), (0.6, 1.4), (0.6, 1.4), (-0.2, 0.2), (0, 1)])


def draw_color():
    """Draw the numbers of a clip's color jitter (finetuning recipe): (6,) float32.

    1 with probability 0.8 (jitter), brightness, saturation, contrast, hue in turns, and 1 with
    probability 0.1 (gray).
    """
    low, high = COLOR.T
    color = low + (high - low) * torch.rand(6)
    color[0], color[5] = color[0] < 0.8, color[5] < 0.1
    return color


def color_jitter(video, color):
    """Change colors by the numbers of `draw_color`, one draw for all frames of a clip.

    (B, T, H, W, 3) uint8 on any device, (B, 6) on the CPU -> (B, T, H, W, 3) uint8. Does not wait
    for the device.
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
    """Shift a spectrogram circularly, then mask times and frequencies: (T, F) -> (T, F).

    The masked value is 0, as in the official recipes. Silence is log 0.01.
    """
    if augment.time_shift:
        mel = mel.roll(int(torch.randint(len(mel), ())), 0)

    for axis, (count, widest) in enumerate((augment.time_masks, augment.frequency_masks)):
        widest = min(widest, mel.shape[axis] - 1)
        for _ in range(count):  # torchaudio's masks are narrower than its argument
            mel = torchaudio.functional.mask_along_axis(mel, widest + 1, 0.0, axis)
    return mel


# ---------------------------------------------------------------------------------------------
# Which clips there are: a folder, or a csv that lists them

UTF8 = {"encoding": "utf-8", "errors": "surrogateescape"}  # keeps file names in other encodings
SPLITS = {  # names of folders, and words in the column `split` -> split
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test", "eval": "test"}

SEGMENTS = 10  # labels of a clip with an event, one a second (AVE)
TASKS = {  # columns that hold the labels -> task
    (): "single_label", ("label",): "single_label", ("labels",): "multi_label",
    ("verb", "noun"): "verb_noun", ("label", "event_start", "event_end"): "segments"}
COLUMNS = ["path", "start", "end", "split", *dict.fromkeys(itertools.chain(*TASKS))]


@dataclass(frozen=True)
class Index:
    """Clips as numpy arrays, which worker processes share with their parent without a copy.

    folder: the names are paths below it.   names: (N,) bytes, as on disk.
    start, end: (N,) s, NaN for the whole file.
    labels: (N, K) int32, numbers of classes; -1 where a clip has fewer than K.
    classes: their names. For "verb_noun" two tuples, of the verbs and of the nouns.
    task: "single_label"; "multi_label"; "verb_noun", K = 2; "segments", a label a second, K = 10.
    shared: (N,) bool, computed if not given: the file has another segment in this list.
    """

    folder: str
    names: np.ndarray
    start: np.ndarray
    end: np.ndarray
    labels: np.ndarray
    classes: tuple = ()
    task: str = "single_label"
    shared: np.ndarray = None

    def __post_init__(self):
        if self.shared is None:
            object.__setattr__(self, "shared", find_shared(self.names, self.start, self.end))

    def __len__(self):
        return len(self.names)

    def name(self, i):
        """Return the path below the folder, and the segment if there is one."""
        cut = "" if np.isnan(self.start[i]) else f" [{self.start[i]:.2f}-{self.end[i]:.2f} s]"
        return self.names[i].decode(**UTF8) + cut

    def path(self, i):
        return os.path.join(self.folder, os.fsdecode(self.names[i]))

    def segment(self, i):
        """Return (start, end, shared) for `open_media`."""
        return float(self.start[i]), float(self.end[i]), bool(self.shared[i])

    def label(self, i):
        return torch.from_numpy(self.labels[i].astype(np.int64))

    def label_groups(self):
        """Return [(class names, labels (N, K))]: one pair, or one of verbs and one of nouns."""
        if self.task == "verb_noun":
            return [(self.classes[k], self.labels[:, k : k + 1]) for k in range(2)]
        return [(self.classes, self.labels)]

    def used_classes(self):
        """Return the set of class names that the clips have."""
        return {x[k] for x, labels in self.label_groups() for k in np.unique(labels) if k >= 0}

    def subset(self, which):
        """Return the clips of a mask (N,) or of ids."""
        columns = {k: x[which] for k, x in vars(self).items() if isinstance(x, np.ndarray)}
        return replace(self, **columns)

    def with_classes(self, classes):
        """Return the clips numbered by other classes. Raise UserError if a label is not among them.
        """
        result = replace(self, labels=np.full_like(self.labels, -1), classes=classes)
        for (own, old), (names, new) in zip(self.label_groups(), result.label_groups()):
            number = {name: i for i, name in enumerate(names)}
            new[:] = np.array([*(number.get(name, -1) for name in own), -1], np.int32)[old]

        missing = sorted(self.used_classes() - result.used_classes())
        if missing:
            raise UserError(f"{len(missing)} labels of the clips of {self.folder} are not among "
                            f"the classes: {', '.join(missing[:3])}")
        return result


def find_shared(names, start, end):
    """Return a mask (N,) of the clips whose file has a clip with other times, too."""
    if np.isnan(start).all():
        return np.zeros(len(names), bool)
    _, first, file = np.unique(names, return_index=True, return_inverse=True)
    times = np.nan_to_num(np.stack([start, end]), nan=-1)  # (2, N)
    return np.bincount(file, (times != times[:, first[file]]).any(0))[file] > 0


def list_files(folder, modalities=MODALITIES):
    """Return the paths (bytes) of all video files below a folder, sorted; print what is ignored.

    Sound files count if only audio is asked for. Hidden files and folders are skipped. Links are
    followed, to each folder once. Raise UserError if a folder cannot be read or has no files.
    """
    def refuse(error):
        raise UserError(f"cannot read the folder {os.fsdecode(error.filename)} ({error.strerror}): "
                        f"make it readable or move it out of {folder}")

    if not os.path.isdir(folder):
        raise UserError(f"there is no folder {folder}")
    suffixes = SUFFIXES + (SOUND_SUFFIXES if tuple(modalities) == ("audio",) else ())
    root = os.path.join(os.fsencode(folder), b"")
    tops, seen, found, ignored = [root], set(), [], collections.Counter()

    for top in tops:  # grows by each link to a folder
        for at, folders, names in os.walk(top, onerror=refuse):
            status = os.stat(at)
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))

            folders[:] = sorted(name for name in folders if not name.startswith(b"."))
            tops += filter(os.path.islink, [os.path.join(at, name) for name in folders])
            for name in (name for name in names if not name.startswith(b".")):
                suffix = os.fsdecode(os.path.splitext(name)[1]).lower()
                if suffix in suffixes:
                    found.append(os.path.join(at, name)[len(root) :])
                else:
                    ignored[suffix or "no suffix"] += 1

    counts = ", ".join(f"{suffix} {count}" for suffix, count in ignored.most_common(8))
    if not found:
        others = f", but: {counts}" if counts else ""
        raise UserError(f"no video files ({', '.join(suffixes)}) below {folder}{others}")
    if ignored:
        print(f"{folder}: ignored {sum(ignored.values())} files: {counts}")
    return sorted(found)


def find_clips(path, modalities=MODALITIES):
    """Return an Index of all clips below a folder, or of one file.

    The label is the first folder, as in folder/LABEL/any/where.mp4; files beside these have none.
    """
    folder, file = os.path.split(path) if os.path.isfile(path) else (os.fspath(path), "")
    names = [os.fsencode(file)] if file else list_files(folder, modalities)

    parts = (name.decode(**UTF8).partition(os.sep) for name in names)
    tops = [top if rest else "" for top, _, rest in parts]
    classes = tuple(sorted(set(tops) - {""}))
    number = {name: i for i, name in enumerate(classes)}

    labels = np.array([[number.get(top, -1)] for top in tops], np.int32)
    whole = np.full(len(names), np.nan)
    return Index(folder, np.array(names, bytes), whole, whole, labels, classes)


def find_splits(folder):
    """Return {"train": path, "val": path, "test": path} of folders with such names (SPLITS).

    Return {} unless one to train on stands beside one to validate or test on: a class may be called
    "train", too.
    """
    paths = {p.name.lower(): str(p) for p in pathlib.Path(folder).glob("*") if p.is_dir()}
    found = {split: paths[word] for word, split in reversed(SPLITS.items()) if word in paths}
    return found if "train" in found and len(found) > 1 else {}


def parse_segment(path, start="", end=""):
    """Return the path (bytes), start and end (s, or NaN) that cells of a csv name."""
    if path[:1] in ("", "/", "\\", ".") or ".." in path or path[1:2] == ":":
        path = os.path.normpath(path)
        if path.startswith(".") or os.path.isabs(path):
            raise ValueError("the path is empty or leads out of the data folder")
    if not start and not end:
        return path.encode(**UTF8), math.nan, math.nan

    if not 0 <= float(start or "nan") < float(end or "nan") < math.inf:
        raise ValueError("start and end must be seconds, 0 <= start < end, or both be empty")
    return path.encode(**UTF8), float(start), float(end)


def parse_labels(task, cells):
    """Return the class names that cells of a csv name: none, one, several, or one a second."""
    cells = [cell.strip() for cell in cells]
    if not any(cells):
        return []
    if task == "multi_label":
        return [name.strip() for name in cells[0].split("|") if name.strip()]
    if not all(cells):
        raise ValueError("a part of the label is empty")
    if task != "segments":
        return cells

    start, end = map(float, cells[1:])
    if not 0 <= start <= end < math.inf:
        raise ValueError("event_start and event_end must be seconds, 0 <= start <= end")
    return [cells[0] if start <= second < end else "background" for second in range(SEGMENTS)]


def read_csv(path):
    """Yield (line number, cells) of a csv. Raise UserError with the line if cells are missing."""
    last, header = 0, ()
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            for row in reader:
                if reader.line_num > last + 1:
                    raise csv.Error("a quote is not closed")
                header = header or row
                if row and len(row) != len(header):
                    raise csv.Error(f"{len(row)} cells, not {len(header)}: {','.join(row)}")

                last = reader.line_num
                if row:
                    yield last, row

    except csv.Error as error:
        raise UserError(f"{path}, line {last + 1}: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def read_classes(csv_path, columns, seen):
    """Return the classes: of NAME.classes.csv beside NAME.csv, else those seen, sorted."""
    path, fixed = classes_path(csv_path), {}
    for _, (column, name) in read_csv(path) if os.path.exists(path) else ():
        fixed.setdefault(column, []).append(name)

    groups = [tuple(fixed.get(column, sorted(names))) for column, names in zip(columns, seen)]
    if TASKS[columns] == "segments":
        return *(name for name in groups[0] if name != "background"), "background"
    return tuple(groups) if len(seen) > 1 else sum(groups, ())


def classes_path(csv_path):
    return os.path.splitext(csv_path)[0] + ".classes.csv"


def label_columns(csv_path, line, header):
    """Return the columns of a clips csv that hold labels, a key of TASKS."""
    columns = tuple(column for column in COLUMNS[4:] if column in header)
    if ("path" not in header or sorted(header) != sorted({*header} & {*COLUMNS})
            or ("start" in header) != ("end" in header) or columns not in TASKS):
        raise UserError(
            f"{csv_path}, line {line}: the columns must be path, and may be start,end and split, "
            f"and label or labels or verb,noun or label,event_start,event_end: {','.join(header)}")
    return columns


def read_splits(csv_path, folder):
    """Return {split: Index} of a clips csv, and {None: Index} of all its rows."""
    rows = read_csv(csv_path)
    line, header = next(rows, (1, ()))
    columns = label_columns(csv_path, line, header)

    names, times, numbers, keys = [], array("d"), array("i"), {}  # (split, *label) cells -> number
    labels, seen = [], [{} for _ in range(2 if columns == ("verb", "noun") else 1)]
    for line, row in rows:
        cells = dict(zip(header, row))
        key = *map(cells.get, ("split", *columns)),
        try:
            name, *segment = parse_segment(cells["path"], cells.get("start"), cells.get("end"))
            if key not in keys:
                own = zip(itertools.cycle(seen), parse_labels(TASKS[columns], key[1:]))
                own = [group.setdefault(label, len(group)) for group, label in own]
                labels.append(own or [-1] * len(seen))
        except ValueError as error:
            raise UserError(f"{csv_path}, line {line}: {error}: {','.join(row)}") from None

        names.append(name)
        times.extend(segment)
        numbers.append(keys.setdefault(key, len(keys)))

    if not names:
        raise UserError(f"{csv_path} has no rows")
    start, end = np.array(times).reshape(-1, 2).T.copy()
    table = np.array([*itertools.zip_longest(*labels, fillvalue=-1)], np.int32).T
    classes = tuple(map(tuple, seen)) if len(seen) > 1 else tuple(seen[0])
    index = Index(
        os.fspath(folder), np.array(names), start, end, table[numbers], classes, TASKS[columns])
    index = index.with_classes(read_classes(csv_path, columns, seen))

    words = [(split or "").strip().lower() for split, *_ in keys]
    words = np.array([SPLITS.get(word, word) for word in words])
    parts = {str(word): index.subset((words == word)[numbers]) for word in {*words}}
    return {None: index} | (parts if any(words) else {})


def read_clips(csv_path, folder, modalities=MODALITIES, split=None):
    """Return an Index of the rows of a csv, of one split if it is given.

    Columns: path (below `folder`); start, end (s; empty for the whole file); split; and label, or
    labels (separated by |), or verb, noun, or label, event_start, event_end. Raise UserError with
    the line if one is wrong, and if none of the first files exists.
    """
    parts = read_splits(csv_path, folder)
    index = parts.get(split and SPLITS.get(split.lower(), split.lower()))
    if index is None:
        known = ", ".join(word or "(empty)" for word in parts if word is not None) or "(no column)"
        raise UserError(f"{csv_path} has no rows of split {split}, only of: {known}")

    check_files(index, csv_path, modalities)
    if (index.labels >= 0).any():
        check_labels(index)
    return index


def check_files(index, csv_path, modalities):
    """Raise UserError if none of the first 100 files exists, or the first is of sound alone."""
    first = [index.path(i) for i in range(min(100, len(index)))]
    if not any(map(os.path.exists, first)):
        raise UserError(f"none of the first {len(first)} clips of {csv_path} is below "
                        f"{index.folder}: there is no {first[0]}")
    if "video" in modalities and first[0].lower().endswith(SOUND_SUFFIXES):
        raise UserError(f"{csv_path} lists sound, such as {first[0]}: give --modalities audio")


def check_labels(index):
    """Raise UserError if a clip has no label."""
    missing = np.flatnonzero((index.labels < 0).all(1))
    if len(missing):
        raise UserError(
            f"{len(missing)} of {len(index)} clips of {index.folder} have no label, such as "
            f"{index.name(missing[0])}: put clips into folders named by class, or list them with "
            "labels in --clips")


TIMES_AND_SUFFIX = re.compile(rb"(_\d+_\d+)?(\.[^./]*)?$")


def is_validation(index, share=0.02, salt=b"held out"):
    """Return a mask (N,) of about this share of the clips, at least one of two or more.

    It depends on the path without suffix, and without times as in NAME_2000_4500.mkv: clips stay
    where they are when others are added, and parts of a file stay together.
    """
    names = (TIMES_AND_SUFFIX.sub(b"", name, count=1) for name in index.names.tolist())
    hashes = (hashlib.blake2b(name, digest_size=4, salt=salt).digest() for name in names)
    hashes = np.array([int.from_bytes(h, "big") for h in hashes])
    return (hashes < share * 2**32) | ((hashes == hashes.min()) & (len(hashes) > 1))


def take_fraction(index, share):
    """Return a share of the clips, by another hash; a smaller is part of a larger (Table 17)."""
    return index if share >= 1 else index.subset(is_validation(index, share, b"fraction"))


def split_clips(folder, clips_csv="", modalities=MODALITIES):
    """Return {"train": Index}, and "val" if the data says which clips it has; print from where.

    Both are rows of a csv by its column `split`, or folders by their names (`find_splits`). Clips
    to test on stand in for those to validate on.
    """
    where, parts = clips_csv or folder, {} if clips_csv else find_splits(folder)
    if clips_csv:
        parts = read_splits(clips_csv, folder)
        everything = parts.pop(None)
        check_files(everything, clips_csv, modalities)
    if not parts:
        return {"train": everything if clips_csv else find_clips(folder, modalities)}
    if "train" not in parts:
        raise UserError(f"{where} has no rows of split train, only of {', '.join(sorted(parts))}")

    used = {"train": "train", "val": "val" if "val" in parts else "test"}
    used = {k: split for k, split in used.items() if split in parts}
    names = {k: s if clips_csv else os.path.basename(parts[s]) for k, s in used.items()}
    others = {*(parts if clips_csv else os.listdir(folder))} - {*names.values()}
    print(f"{where}: " + ", ".join(f"{k} is {name}" for k, name in names.items())
          + (f"; ignored: {', '.join(sorted(x or '(empty)' for x in others))}" if others else ""))
    return {k: parts[s] if clips_csv else find_clips(parts[s], modalities) for k, s in used.items()}


def open_index(folder, clips_csv="", modalities=MODALITIES, split=""):
    """Return an Index of a folder, file or csv; of one split only, unless it is "" or "all"."""
    split = "" if split == "all" else split
    if clips_csv:
        return read_clips(clips_csv, folder, modalities, split or None)
    if split:
        splits = find_splits(folder)
        if split not in splits:
            raise UserError(f"{folder} has no split {split}, only: {', '.join(splits) or 'none'}")
        folder = splits[split]
    return find_clips(folder, modalities)


def train_and_val(
    folder, clips_csv="", val="", modalities=MODALITIES, share=0.02, labeled=False):
    """Return the training clips and the validation clips, two Index.

    val: folder or csv of validation clips. If it is empty, they are those of `split_clips`, or else
    a share of all clips by hash. With `labeled` both have the same classes.

    Raises UserError if labels are needed and a clip has none, or one that no training clip has.
    """
    parts = split_clips(folder, clips_csv, modalities)
    if val:
        is_csv = os.path.isfile(val) and val.lower().endswith(".csv")
        parts["val"] = (
            read_clips(val, folder, modalities) if is_csv else find_clips(val, modalities))

    train = parts["train"]
    if labeled:
        for index in parts.values():
            check_labels(index)
    if "val" not in parts:  # a single clip is used for both
        mask = is_validation(train, share)
        return (train if mask.all() else train.subset(~mask)), (
            train.subset(mask) if mask.any() else train)

    if labeled:
        parts["val"] = parts["val"].with_classes(train.classes)
        unknown = sorted(parts["val"].used_classes() - train.used_classes())
        if unknown and not os.path.exists(classes_path(clips_csv)):
            raise UserError(f"no training clip has a label of the validation clips: {unknown[:3]}")
    return train, parts["val"]


def describe_classes(index):
    """Return a line such as "12 classes: dog 40, cat 38, ...", the largest first."""
    lines = []
    for kind, (names, labels) in zip(("classes", "nouns"), index.label_groups()):
        counts = np.bincount(labels[labels >= 0], minlength=len(names))
        order = np.argsort(-counts, kind="stable")
        largest = [f"{names[k]} {counts[k]}" for k in order[:8]] + ["..."] * (len(names) > 8)
        kind = "verbs" if index.task == "verb_noun" and not lines else kind
        lines.append(f"{len(names)} {kind}: {', '.join(largest)}")
    return "; ".join(lines)


# ---------------------------------------------------------------------------------------------
# The data set: clips by (epoch, i, draw), and which of them a batch has


class Clips:
    """Clips of an Index, addressed by (epoch, i, draw).

    The window depends on (epoch, i) only; crop, flip and colors also on the draw. In training, a
    clip that cannot be read is replaced by one drawn from (seed, epoch, i, try). augment None is
    evaluation: `views` windows at evenly spaced starts (of audio and video each on its own), center
    crop, and no tensors for a clip that cannot be read.
    """

    def __init__(self, index, window, modalities=MODALITIES, augment=None, seed=0, views=1):
        self.index, self.window, self.modalities = index, window, tuple(modalities)
        self.augment, self.seed, self.views = augment, seed, views

    def __len__(self):
        return len(self.index)

    def name(self, i):
        return self.index.name(i)

    def __getitem__(self, key):
        """Return {"audio": (T, F) float32, "video": (T, H, W, 3) uint8, "label": (K,) int64,
        "index": the clip that was read, "bad": [(name, reason)], "unreadable": whether the clip i
        was bad}, and "color" (6,) for `color_jitter`. Several views are the first axis of both."""
        return self.__getitems__([key])[0]

    def __getitems__(self, keys):
        """Return the items of several keys. Neighbors that differ in draw only are decoded once."""
        items = []
        for (epoch, i), group in itertools.groupby(keys, key=lambda key: tuple(key[:2])):
            clip = self.read_or_replace(i, epoch)
            items += [self.augmented(clip, epoch, draw) for _, _, draw in group]
        return items

    def read_or_replace(self, wanted, epoch):
        """Return the windows of a clip, in training of another if it cannot be read."""
        i, bad = wanted, {}
        for attempt in range(MAX_TRIES if self.augment else 1):
            if attempt:
                rng = np.random.default_rng([self.seed, epoch, wanted, attempt])
                i = int(rng.integers(len(self)))
            if self.name(i) in bad:
                continue

            try:
                clip = self.read(i, epoch) | {"label": self.index.label(i)}
                return clip | {"index": i, "bad": [*bad.items()], "unreadable": i != wanted}
            except ClipError as error:
                bad[self.name(i)] = str(error)

        if self.augment:
            raise UserError(
                f"none of {len(bad)} clips tried can be read; the first: "
                f"{': '.join(next(iter(bad.items())))}. Run python tools/check_clips.py FOLDER")
        return {"index": wanted, "bad": [*bad.items()], "unreadable": True}

    def read(self, i, epoch=0):
        """Return the windows of clip i as tensors {m: ...}, before any augmentation."""
        with open_media(self.index.path(i), self.modalities, self.index.segment(i)) as media:
            views = [self.cut(media, *pair) for pair in self.starts(media, i, epoch)]
        return {
            m: torch.stack([view[m] for view in views]) if self.views > 1 else views[0][m]
            for m in views[0]}

    def starts(self, media, i, epoch):
        """Return (start of the video window, start of the audio window) of each view, s: the same
        random one in training, else each evenly spaced from the first to the last."""
        seconds = self.window.video_seconds, self.window.seconds
        room = [max(0.0, media.end - media.begin - s) for s in seconds]

        if self.augment:
            with seeded(self.seed, epoch, i):
                start = media.begin + room[0] * torch.rand((), dtype=torch.float64).item()
            return [(start, start)]
        return zip(*(media.begin + np.linspace(0, r, self.views) for r in room))

    def cut(self, media, video_start, audio_start):
        """Return a window as tensors {m: ...}, with all of the picture that a random crop may take.
        """
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
        """Return an item of its own, with the random crop and masks of this draw."""
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


def batch_keys(count, batch, seed, steps, rows=None, micro=0, repeat=1):
    """Yield the keys (epoch, i, draw) of each micro-batch of a range of steps, from (seed, step).

    Epochs follow each other in one stream, each a permutation of the clips made from (seed, epoch).
    Row r of step k is draw n % repeat of clip n // repeat of the stream, n = k * batch + r. So each
    epoch has each clip once, and a batch may span two. rows: those of this process, a range.
    """
    @functools.lru_cache(maxsize=2)
    def order(epoch):
        return np.random.default_rng([seed, epoch]).permutation(count)

    rows = range(batch) if rows is None else rows
    for step in steps:
        keys = []
        for row in rows:
            place, draw = divmod(step * batch + row, repeat)
            epoch, i = divmod(place, count)
            keys.append((epoch, int(order(epoch)[i]), draw))

        for first in range(0, len(keys), micro or len(keys)):
            yield keys[first : first + (micro or len(keys))]


def in_order(count, batch, rank=0, world=1):
    """Return the lists of keys (0, i, 0) of this process, to read all clips once in order.

    Batches are nearly equal. None has one clip only, which a batch-wise comparison could not use,
    unless there is only one: with few clips, a batch may be larger than asked for.
    """
    batches = max(1, min(math.ceil(count / batch), count // 2))
    parts = np.array_split(np.arange(count), batches)[rank::world] if count else []
    return [[(0, int(i), 0) for i in part] for part in parts]


def collate(items):
    """Return a batch: tensors stacked (by a worker, straight into shared memory), "index" (B,),
    "bad" one list, "asked" and "unreadable" counts. Items without tensors are left out."""
    good = [{k: x for k, x in item.items() if k not in ("bad", "unreadable")}
            for item in items if "label" in item]
    batch = default_collate(good) if good else {"index": torch.zeros(0, dtype=torch.int64)}
    return batch | {
        "bad": [pair for item in items for pair in item["bad"]], "asked": len(items),
        "unreadable": sum(item.get("unreadable", False) for item in items)}


# ---------------------------------------------------------------------------------------------
# Loading

STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}


def ignore_signals(_):
    """Ignore both signals in a worker, unless its parent sends them to end it."""
    def wait():
        while signal.sigwaitinfo(STOP_SIGNALS).si_pid != os.getppid():
            pass
        os._exit(0)

    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=wait, daemon=True).start()
    else:  # macOS and Windows
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def blocked_signals():
    """Inside, hold both signals back; a process that is started here does so for good."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return

    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Workers(DataLoader):
    """A DataLoader whose worker processes ignore SIGTERM and SIGINT.

    On Linux they are forks, which share an index of millions of clips with their parent; the
    default of Python 3.14 would copy it to each.
    """

    def __init__(self, dataset, count, **how):
        fork = "fork" if count > 0 and sys.platform == "linux" else None
        super().__init__(
            dataset, num_workers=count, multiprocessing_context=fork, worker_init_fn=ignore_signals,
            **how)

    def __iter__(self):
        # Remove garbage before a fork: a codec that waits for its threads when it is freed would
        # wait forever in a worker, which has not inherited them.
        gc.collect()
        with warnings.catch_warnings(), blocked_signals():
            # about other threads, which a worker does not use
            warnings.filterwarnings("ignore", ".*use of fork", DeprecationWarning)
            return super().__iter__()


class Loader(Workers):
    """Yields batches on a device: {"video": (B, T, H, W, 3) uint8, "audio": (B, T, F) float32,
    "label": (B, K) int64, "index": (B,) int64 on the CPU}.

    sampler: lists of keys. In evaluation, a batch without a readable clip is skipped. On a CPU,
    tensors of workers each hold an open file while they are kept; label and index do not.

    Attributes: num_loaded, num_unreadable (clips asked for), bad {name: reason}, waited (s).
    """

    def __init__(self, clips, sampler, device="cpu", workers=0, warn=print):
        self.device, self.warn = torch.device(device), warn
        super().__init__(
            clips, workers, batch_sampler=sampler, collate_fn=collate,
            pin_memory=self.device.type == "cuda")
        self.fate = "replaced" if getattr(clips, "augment", None) else "left out"
        self.num_loaded, self.num_unreadable, self.bad, self.waited = 0, 0, {}, 0.0

    def __iter__(self):
        batches = super().__iter__()
        while True:
            start = time.monotonic()
            try:
                batch = next(batches, None)
            except RuntimeError as error:
                raise explain(error) from error.__cause__
            self.waited += time.monotonic() - start
            if batch is None:
                return

            self.count(batch)
            if len(batch["index"]):
                yield self.to_device(batch)

    def count(self, batch):
        """Take the counts from a batch, and report each unreadable clip once."""
        self.num_loaded += batch.pop("asked")
        self.num_unreadable += batch.pop("unreadable")
        for name, reason in batch.pop("bad"):
            if name not in self.bad:
                self.bad[name] = reason
                self.warn(f"unreadable, {self.fate}: {name}: {reason}")

    def to_device(self, batch):
        """Return a batch with all tensors but "index" on the device, and its colors changed.

        Copies do not block on CUDA, from pinned memory; on MPS such copies may be corrupted.
        """
        cuda = self.device.type == "cuda"
        color, index = batch.pop("color", None), batch.pop("index")
        batch = {k: x.to(self.device, non_blocking=cuda) for k, x in batch.items()}
        if color is not None:
            batch["video"] = color_jitter(batch["video"], color)

        if not cuda:  # a tensor of a worker holds an open file
            index, batch["label"] = index.clone(), batch["label"].clone()
        return batch | {"index": index}


# ---------------------------------------------------------------------------------------------
# Built-in clips: a generated world of objects with a look and a voice

SHAPES = {"star": 0.6, "diamond": 1.0, "disc": 2.0, "square": 8.0}  # p of |x|^p + |y|^p = 1
CLASSES = tuple(f"{pattern} {shape}" for pattern in ("plain", "striped") for shape in SHAPES)
STRIPES = 0.6  # distance of two stripes, radii
SOFT = 0.6  # amplitude of the soft partials of a voice; the loud ones are 1
HIDDEN = SILENT = 0.3  # shares of the clips in which the object is not visible, not audible
LOWEST, HIGHEST = (2595 * math.log10(1 + hertz / 700) for hertz in (180, 1600))  # pitch, mel


class Scene:
    """An object that flies in a box and bounces off its walls, as a function of (seed, index).

    Its look (shape, stripes) and its voice (which of the partials 2, 3, 4 are loud) show its class.
    Its height is the pitch, a bounce is a hit. In some clips it is not visible, and in some,
    independently, noise replaces its voice. A perfect classifier of pictures or of sound is right
    in 0.7 + 0.3 / 8 = 74 % of the clips, one of both in 1 - 0.3^2 * 7 / 8 = 92 %.
    """

    def __init__(self, seed, index):
        rng = np.random.default_rng([seed, index])
        self.seed, self.class_id = (seed, index), index % len(CLASSES)
        self.visible, self.audible = rng.random(2) >= (HIDDEN, SILENT)

        self.radius = rng.uniform(0.28, 0.38)  # lengths are shares of the frame's side
        self.turn = rng.uniform(-0.3, 0.3)  # radians
        self.start = rng.uniform(0, 2, 2)  # x, y, in distances from wall to wall
        self.speed = rng.uniform(0.15, 0.5, 2) * rng.choice((-1, 1), 2)  # such distances per second
        self.loudness = rng.uniform(0.6, 1.0)

        self.color = rng.permutation([0.95, rng.uniform(0.1, 1.0), rng.uniform(0.0, 0.3)])
        self.background = rng.uniform(0.0, 0.4, 3)  # a color, with slopes to the right and down
        self.slope = rng.uniform(-0.15, 0.15, (2, 3))
        self.stripes = rng.uniform(0, 2 * math.pi)  # phase, radians

    def position(self, times):
        """Return the object's centers (T, 2) at times (T,), s: x to the right, y down."""
        travel = (self.start + self.speed * np.asarray(times)[:, None]) % 2
        return self.radius + (1 - 2 * self.radius) * np.minimum(travel, 2 - travel)

    def pictures(self, times, size):
        """Return the pictures at times (T,), s: (T, size, size, 3) uint8."""
        y, x = (np.mgrid[:size, :size].astype(np.float32) + 0.5) / size  # (H, W)
        right, down = self.slope.astype(np.float32)
        background = self.background + right * (x - 0.5)[..., None] + down * (y - 0.5)[..., None]

        center = self.position(times).astype(np.float32)[:, :, None, None]
        x, y = x - center[:, 0], y - center[:, 1]  # (T, H, W)
        cos, sin = math.cos(self.turn) / self.radius, math.sin(self.turn) / self.radius
        x, y = cos * x + sin * y, cos * y - sin * x

        p = list(SHAPES.values())[self.class_id % 4]
        outside = (np.abs(x) ** p + np.abs(y) ** p) ** (1 / p) - 1  # in radii
        cover = self.visible * np.clip(0.5 - outside * self.radius * size, 0, 1)  # a soft edge
        light = np.sin(2 * math.pi / STRIPES * x + self.stripes) if self.class_id >= 4 else 1.0
        paint = (0.65 + 0.35 * light * np.ones_like(x))[..., None] * self.color

        picture = background + cover[..., None] * (paint - background)  # (T, H, W, 3)
        return (picture.clip(0, 1) * 255 + 0.5).astype(np.uint8)

    def sound(self, seconds):
        """Return the sound of the first seconds: (S,) float32, 16 kHz."""
        count, tail = round(seconds * SAMPLE_RATE), SAMPLE_RATE // 10
        noise = np.random.default_rng([*self.seed, 1]).standard_normal(count + tail)

        points = np.arange(0, count + 2 * HOP, HOP)  # 100 a second
        path = self.position(points / SAMPLE_RATE)
        mel = LOWEST + (HIGHEST - LOWEST) * (1 - path[:, 1])
        hertz = np.interp(np.arange(count), points, 700 * (10 ** (mel / 2595) - 1))
        phase = np.cumsum(2 * math.pi / SAMPLE_RATE * hertz).astype(np.float32)

        partials = 1.0, *(1.0 if self.class_id >> bit & 1 else SOFT for bit in range(3))
        voice = sum(loud * np.sin(k * phase) for k, loud in enumerate(partials, start=1))
        wave = 0.15 * self.loudness * voice if self.audible else np.zeros_like(phase)
        wave = wave + (0.01 if self.audible else 0.1 * self.loudness) * noise[:count]

        hit = 0.5 * self.loudness * noise[count:] * np.exp(-50 / SAMPLE_RATE * np.arange(tail))
        turned = np.diff(np.sign(np.diff(path, axis=0)), axis=0).any(1)  # in x or in y
        for start in points[1:-1][turned]:
            wave[start : start + tail] += hit[: count - start]
        return wave.astype(np.float32)


@functools.cache
def generated(seed, i, window, modalities):
    """Return a generated clip as tensors, with its label; each is made once and cached."""
    scene = Scene(seed, i)
    clip = {"label": torch.tensor([scene.class_id])}

    if "video" in modalities:
        times = (np.arange(window.frames) + 0.5) * window.step
        clip["video"] = torch.from_numpy(scene.pictures(times, window.size))
    if "audio" in modalities:
        clip["audio"] = log_mel(torch.from_numpy(scene.sound(window.seconds)), window.mels)
    return clip


class Builtin:
    """Generated clips with the items of `Clips`: the same in all epochs and draws."""

    classes = CLASSES

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
