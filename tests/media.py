"""Writes real video files whose picture and sound tell the time."""

import pathlib
from fractions import Fraction

import av
import numpy as np

COARSE = 20  # grey levels a second, from 16: of the upper half
FINE = 200  # of the lower half, which starts again each second


def write(
    path, seconds=4.0, fps=25, rate=44_100, layout="stereo", size=(64, 48), start=0.0,
    audio_start=0.0, audio_seconds=None, times=None, clicks=(1.0, 2.5), video=True, audio=True,
    codec="libx264", audio_codec="aac", picture=None, crf=10, loudness=0.8, gap=0.0, title=""):
    """Frames whose upper half is as bright as the time is late, and whose lower half starts again
    each second: see `times_of`. A click of 4 ms is heard at each of `clicks` (s).

    picture: time -> (H, W, 3) uint8, instead of that. start shifts both streams, audio_start the
    sound alone; times (s) makes the frame rate variable; crf is the codec's quality; gap (s) is
    without sound, after its first second.
    """
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        container.metadata.update({"title": title} if title else {})
        screen = video and container.add_stream(codec, Fraction(fps).limit_denominator(100_000))
        sound = audio and container.add_stream(audio_codec, rate, layout=layout)

        if video:
            screen.width, screen.height = size
            screen.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            screen.codec_context.time_base = Fraction(1, 60_000)
            screen.options = {"crf": str(crf), "g": "50"} if codec == "libx264" else {}

            for t in np.arange(round(seconds * fps)) / fps if times is None else times:
                image = np.full((size[1], size[0], 3), round(16 + FINE * (t % 1)), np.uint8)
                image[: size[1] // 2] = round(16 + COARSE * t)
                frame = av.VideoFrame.from_ndarray(picture(t) if picture else image, format="rgb24")
                frame.pts, frame.time_base = round((t + start) * 60_000), Fraction(1, 60_000)
                container.mux(screen.encode(frame))
            container.mux(screen.encode(None))

        if audio:
            wave = np.zeros(round((audio_seconds or seconds) * rate), np.float32)
            for first in (round((click - audio_start) * rate) for click in clicks):
                if first >= 0:
                    part = wave[first : first + rate // 250]
                    part[:] = loudness * (-1) ** (np.arange(len(part)) // 8)

            kind = {"pcm_s16le": "s16", "pcm_f32le": "flt"}.get(audio_codec, "fltp")
            wave = (wave * 32767).astype(np.int16) if kind == "s16" else wave
            for k in range(0, len(wave), 1024):
                block = np.repeat(wave[None, k : k + 1024], sound.channels, 0)
                block = block if kind == "fltp" else block.T.reshape(1, -1)
                frame = av.AudioFrame.from_ndarray(
                    np.ascontiguousarray(block), format=kind, layout=layout)
                frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
                frame.pts = k + round((start + audio_start + gap * (k >= rate)) * rate)
                container.mux(sound.encode(frame))
            container.mux(sound.encode(None))
    return path


def times_of(video):
    """(T, H, W, 3) -> the times (T,) that frames of `write` show, s."""
    coarse, fine = (
        np.asarray(video)[:, row].reshape(len(video), -1).mean(1) - 16 for row in (0, -1))
    return np.round(coarse / COARSE - fine / FINE) + fine / FINE


def clicks_of(sound):
    """Onsets in a waveform (S,) at 16 kHz, s."""
    loud = np.flatnonzero(np.abs(sound) > 0.25)
    return loud[np.diff(loud, prepend=-10_000) > 1600] / 16_000
