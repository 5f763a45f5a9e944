"""Write real media files whose pictures and sound tell the time."""

import pathlib
from fractions import Fraction

import av
import numpy as np

COARSE = 20  # gray levels per second, from 16: upper half of a picture
FINE = 200  # gray levels per second of the lower half, which starts again each second
TICKS = 60_000  # stamps per second of pictures


def write(
    path, seconds=4.0, fps=25, rate=44_100, layout="stereo", size=(64, 48), start=0.0,
    audio_start=0.0, audio_seconds=None, times=None, clicks=(1.0, 2.5), wave=None, gaps=(),
    video=True, audio=True, codec="libx264", audio_codec="aac", picture=None, crf=10, gop=50,
    title="", container=None, length=True, options=None):
    """Write a file of pictures that show the time (see `times_of`) and of clicks; return its path.

    start         s by which the stamps of both streams start late; audio_start: of the sound alone
    audio_seconds length of the sound, if not that of the pictures
    times         times of the pictures, s, if the frame rate varies
    clicks        times of clicks of 4 ms, s
    wave          (S,) or (channels, S) in [-1, 1] at `rate`, instead of clicks
    gaps          pairs (start, length) of sound that is left out, s; a length below 0 moves back
    picture       time -> (H, W, 3) uint8, instead of the time
    crf, gop      quality of libx264; pictures from one keyframe to the next
    container     name of FFmpeg's muxer, if not that of the suffix
    length        False: leave the length out of the header, as a recording that was cut off
    options       {name: value} of the muxer
    """
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    options = (options or {}) | ({} if length else {"live": "1"})
    with av.open(str(path), "w", format=container, options=options) as out:
        out.metadata.update({"title": title} if title else {})
        screen = video and out.add_stream(codec, Fraction(fps).limit_denominator(100_000))
        sound = audio and out.add_stream(audio_codec, rate, layout=layout)
        if audio_codec == "wmav2":
            sound.bit_rate = 128_000

        if video:
            times = np.arange(round(seconds * fps)) / fps if times is None else times
            screen.width, screen.height = size
            screen.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            write_pictures(out, screen, times, start, picture or picture_at, {
                "libx264": {"crf": str(crf), "g": str(gop)}, "mjpeg": {"q": "2"}}.get(
                    codec, {"b": "3000000", "g": str(gop)}))

        if audio:
            count = round((audio_seconds or seconds) * rate)
            if wave is None:
                wave = click_wave(count, np.asarray(clicks) - audio_start, rate)
            gaps = [(round(at * rate), round((at + gap) * rate)) for at, gap in gaps]
            write_sound(out, sound, np.atleast_2d(wave), gaps, round((start + audio_start) * rate))
    return path


def picture_at(time, size=(64, 48)):
    """Return a picture that shows a time, s: (H, W, 3) uint8."""
    image = np.full((size[1], size[0], 3), round(16 + FINE * (time % 1)), np.uint8)
    image[: size[1] // 2] = round(16 + COARSE * time)
    return image


def write_pictures(out, stream, times, start, picture, options):
    """Encode the pictures of `times`, s, with stamps that are `start` later."""
    stream.codec_context.options, rate = options, stream.codec_context.framerate
    exact = stream.codec_context.name in ("mpeg1video", "mpeg2video", "h263", "mpeg4")
    stream.codec_context.time_base = 1 / rate if exact else Fraction(1, TICKS)

    for time in times:
        image = picture(time)
        if picture is picture_at:
            image = picture_at(time, (stream.width, stream.height))
        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        frame.pts, frame.time_base = round((time + start) * TICKS), Fraction(1, TICKS)
        out.mux(stream.encode(frame))
    out.mux(stream.encode(None))


def click_wave(count, clicks, rate):
    """Return clicks of 4 ms at the times `clicks`, s: (S,)."""
    wave = np.zeros(count, np.float32)
    for first in (round(click * rate) for click in clicks if click >= 0):
        part = wave[first : first + rate // 250]
        part[:] = 0.8 * (-1) ** (np.arange(len(part)) // max(1, rate // 5500))
    return wave


def write_sound(out, stream, wave, gaps, delay):
    """Encode (1 or channels, S) samples; gaps are pairs of samples (from, to), like the delay."""
    rate, sample_format = stream.rate, stream.codec_context.codec.audio_formats[0]
    dtype = {"s16": np.int16, "s32": np.int32, "u8": np.uint8}.get(sample_format.name.rstrip("p"))
    wave = np.repeat(wave, stream.channels // len(wave), 0)
    if dtype:
        zero, top = (128, 127) if dtype == np.uint8 else (0, np.iinfo(dtype).max)
        wave = np.rint(wave.clip(-1, 1) * np.float64(top) + zero).astype(dtype)

    edges = [0, *(edge for gap in gaps for edge in gap), wave.shape[1]]
    for first, last in zip(edges[::2], edges[1::2]):
        for k in range(first, last, 1024):
            block = wave[:, k : min(k + 1024, last)]
            block = block if sample_format.is_planar else block.T.reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(block), format=sample_format.name, layout=stream.layout.name)
            frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
            frame.pts = k + delay
            out.mux(stream.encode(frame))
    out.mux(stream.encode(None))


def times_of(video):
    """Return the times (T,) that pictures (T, H, W, 3) of `write` show, s."""
    coarse, fine = (
        np.asarray(video)[:, row].reshape(len(video), -1).mean(1) - 16 for row in (0, -1))
    return np.round(coarse / COARSE - fine / FINE) + fine / FINE


def clicks_of(sound):
    """Return the onsets in a waveform (S,) at 16 kHz, s."""
    loud = np.flatnonzero(np.abs(sound) > 0.25)
    return loud[np.diff(loud, prepend=-10_000) > 1600] / 16_000
