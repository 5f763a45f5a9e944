"""Reading a file: pictures and sound of the right moments, or a reason in words."""

import itertools
import os
import re

import av
import numpy as np
import pytest

import data
import media
from data import Clips, Window

SMALL = Window(frames=8, step=0.16, size=32, seconds=1.28, mels=32)
SQUARE = data.resizing(32, 32)
PCM = dict(audio_codec="pcm_s16le")
OPUS = dict(audio_codec="libopus", rate=48_000)


def times_at(path, times, modalities=("video",)):
    """Return what pictures at `times`, s, show: their own times (T,)."""
    with data.open_media(path, modalities) as m:
        return media.times_of(np.stack(list(m.frames(np.array(times), SQUARE))))


def sound_of(path, start, stop, modalities=("audio",)):
    with data.open_media(path, modalities) as m:
        return m.decode_audio(start, stop)


def bounds(path, modalities=data.MODALITIES):
    with data.open_media(path, modalities) as m:
        return m.begin, m.end


def refusal(path, modalities=data.MODALITIES, start=0.0, seconds=1.28):
    """Return why a window cannot be read, in words; "" if it can."""
    try:
        with data.open_media(path, modalities) as m:
            if "video" in modalities:
                data.read_video(m, m.begin + start, SMALL, SQUARE)
            if "audio" in modalities:
                data.read_audio(m, m.begin + start, seconds)
        return ""
    except data.ClipError as error:
        assert not re.search(r"[a-z]Error|Errno|\d{6}", str(error)), error
        return str(error)


# ------------------------------------------------------------------------- pictures and sound agree

EVERY = dict(clicks=np.arange(0.26, 4.0, 0.2))  # clicks in the middle of a picture of 25 per second
MPEG2 = dict(codec="mpeg2video", audio_codec="mp2", rate=48_000, gop=15)
AGREE = {  # file: settings of media.write
    "h264_aac.mp4": {}, "h264_aac.mov": {}, "h264_aac.m4v": {}, "h264_aac.3gp": {},
    "h264_aac.mkv": {}, "no_length.mkv": dict(length=False), "named.mp4": dict(
        container="mpegts", gop=75), "h264.ts": dict(gop=75), "h264.mts": {},
    "h264.m2ts": dict(container="mpegts"), "mpeg2.mpg": MPEG2, "mpeg2.mpeg": MPEG2,
    "h264.flv": {}, "sorenson.flv": dict(codec="flv", audio_codec="libmp3lame"),
    "mpeg4.avi": dict(codec="mpeg4", audio_codec="libmp3lame"),
    "wmv.wmv": dict(codec="wmv2", audio_codec="wmav2"),
    "vp8.ogv": dict(codec="libvpx", **OPUS), "vp9.webm": dict(codec="libvpx-vp9", **OPUS),
    "no_length.webm": dict(codec="libvpx", length=False, **OPUS),
    "hevc.mkv": dict(codec="libx265", audio_codec="ac3", rate=48_000, layout="5.1"),
    "prepared.mkv": dict(codec="mjpeg", rate=16_000, layout="mono", **PCM),
    "late_sound.mp4": dict(audio_start=0.4), "late_sound.ts": dict(audio_start=0.4),
    "late_picture.mkv": dict(start=0.5, audio_start=-0.5), "not_from_0.mkv": dict(start=3.0),
    "short_sound.mp4": dict(audio_seconds=2.5), "short_sound.mkv": dict(audio_seconds=2.5),
    "long_sound.mkv": dict(audio_seconds=6.0, layout="mono", rate=8_000, **PCM),
    "gap.mkv": dict(gaps=((1.5, 0.05), (2.21, 0.06)), **PCM),
    "lost.mp4": dict(gaps=((1.5, 0.05), (2.21, 0.06))), "lost.ts": dict(gaps=((1.5, 0.07),)),
    "drops.mkv": dict(gaps=[(0.1 * k, 0.03) for k in range(1, 39)], **PCM),
    "u8.mkv": dict(audio_codec="pcm_u8", layout="mono"), "s32.mkv": dict(audio_codec="pcm_s32le"),
    "flac.mkv": dict(audio_codec="flac"), "alac.mov": dict(audio_codec="alac"),
    "large_gap.mkv": dict(gaps=((1.5, 0.3),), **PCM), "large_gap.mp4": dict(gaps=((1.5, 0.5),)),
    "little_sound.mp4": dict(audio_seconds=0.2)}
REFUSED = {  # file: the share of its windows that is refused, and the words
    "large_gap.mkv": (0.6, "a gap in the sound at 1.[5-7]. s of 0.[1-3]. s"),
    "large_gap.mp4": (0.6, "a gap in the sound at 1.[4-9]. s of 0.[1-5]. s"),
    "little_sound.mp4": (1.0, "picture from 0.00 to 4.00 s, sound from 0.00 to 0.2.*: too little")}


@pytest.mark.parametrize("name", AGREE)
def test_pictures_and_sound_agree_to_40_ms_or_the_file_is_refused(tmp_path, name):
    path = media.write(tmp_path / name, **EVERY | AGREE[name])
    offset, counted, refused = AGREE[name].get("audio_start", 0.0), 0, 0
    share, words = REFUSED.get(name, (0.0, "nothing"))
    try:
        begin, end = bounds(path)
    except data.ClipError as error:
        assert share == 1 and re.search(words, str(error)), error
        return
    assert name == "long_sound.mkv" or end - begin > 2.4

    for start in np.linspace(begin, end - 1.28, 8):
        reason = refusal(path, start=start - begin)
        if reason:
            assert re.match(words, reason)
            refused += 1
            continue

        with data.open_media(path) as m:
            clicks = media.clicks_of(data.read_audio(m, start, 1.28))
            clicks = start + clicks[(clicks > 0.02) & (clicks < 1.25)]
            shown = media.times_of(np.stack([*m.frames(clicks, SQUARE)])) if len(clicks) else clicks
        error = (shown + 0.02 - 0.26 + 0.1) % 0.2 - 0.1  # from the nearest click
        if start < 3:  # then the picture is held in some
            assert np.abs(error).max(initial=0) < 0.04, (name, start, error)
            counted += len(clicks)
    assert refused <= 8 * share and (refused > 0) == (share > 0)
    assert counted >= 10


SOUNDS = {
    "a.wav": PCM, "a.flac": dict(audio_codec="flac"), "a.m4a": {}, "a.mp3": dict(
        audio_codec="libmp3lame"), "a.ogg": OPUS, "a.opus": OPUS, "a.aac": {},
    "a.oga": dict(audio_codec="flac"), "a.mka": {}, "a.wma": dict(audio_codec="wmav2"),
    "a.aiff": dict(audio_codec="pcm_s16be"), "a.aif": dict(audio_codec="pcm_s16be"),
    "m.mp3": dict(audio_codec="libmp3lame", rate=16_000, layout="mono")}


@pytest.mark.parametrize("name", SOUNDS)
def test_sound_files(tmp_path, name):
    path = media.write(tmp_path / name, video=False, **EVERY | SOUNDS[name])
    assert len(data.find_clips(tmp_path, ("audio",))) == 1 and path.suffix in data.SOUND_SUFFIXES
    begin, end = bounds(path, ("audio",))
    assert begin == 0 and abs(end - 4.0) < 0.06

    delay = 0.05 if name in ("a.aac", "a.wma") else 0.003  # of the codec, which they do not state
    for start in np.linspace(0, end - 1.28, 6):
        with data.open_media(path, ("audio",)) as m:
            clicks = start + media.clicks_of(data.read_audio(m, start, 1.28))
        error = (clicks - 0.26 + 0.06) % 0.2 - 0.06
        assert len(clicks) >= 5 and -0.003 < error.min() and error.max() < delay


def test_suffixes_of_videos(tmp_path):
    names = {os.path.splitext(name)[1] for name in AGREE}
    assert names == set(data.SUFFIXES)


# ---------------------------------------------------------------------------------- frames by time


@pytest.mark.parametrize("settings", [
    dict(fps=25), dict(fps=30000 / 1001), dict(fps=12.5), dict(fps=60),
    dict(fps=24, start=1.4, audio=False), dict(fps=25, audio_start=0.3),
    dict(fps=25, codec="mpeg4"), dict(fps=25, gop=75, container="mpegts", audio=False)], ids=str)
def test_the_frame_shown_at_a_time(tmp_path, settings):
    path, fps = media.write(tmp_path / "a.mp4", **settings), settings["fps"]
    times = np.array([0.0, 0.07, 0.16, 0.95, 1.61, 2.9, 3.5])
    expected = np.floor(times * fps + 1e-3) / fps
    by_seeks = [times_at(path, [t])[0] for t in times[::-1]][::-1]
    for found in times_at(path, times), by_seeks:
        assert np.abs(found - expected).max() < 0.6 / fps + 0.01


def test_a_variable_frame_rate(tmp_path):
    stamps = np.cumsum(
        [0, 0.04, 0.04, 0.3, 0.04, 0.04, 0.6, 0.1, 0.04, 0.04, 0.5, 0.04, 0.04, 0.04])
    path = media.write(tmp_path / "a.mp4", times=stamps, seconds=2.0)
    times = [0.05, 0.37, 0.39, 1.0, 1.3, 1.6]
    expected = [stamps[stamps <= t + 1e-3].max() for t in times]
    assert np.abs(times_at(path, times) - expected).max() < 0.06


def test_an_index_that_leads_too_far_costs_a_step_back(tmp_path, monkeypatch):
    path, seek, sought = media.write(tmp_path / "a.mp4", seconds=8.0), data.Media.seek, []
    monkeypatch.setattr(data.Media, "seek", lambda m, stream, at: (
        sought.append(at), seek(m, stream, at + 1.0))[1])
    assert abs(times_at(path, [5.5])[0] - 5.48) < 0.03  # 6.5 s leads to the keyframe at 6 s
    assert sought == [5.5, 4.5]  # and not to the start of the file


def test_transport_streams_are_not_decoded_from_the_start(tmp_path):
    path = media.write(tmp_path / "a.mp4", seconds=9.0, gop=25, container="mpegts")
    with data.open_media(path) as m:
        for start in 0.5, 4.5, 7.9:
            first, _ = next(m.decode(m.video, start))
            assert max(m.begin, start) - 2.5 < first <= max(m.begin, start) + 1e-3


ORIENTATIONS = {  # a, b, c, d of a display matrix: what is done to a picture
    (1, 0, 0, 1): lambda x: x, (-1, 0, 0, 1): np.fliplr, (1, 0, 0, -1): np.flipud,
    (-1, 0, 0, -1): lambda x: x[::-1, ::-1], (0, 1, -1, 0): lambda x: np.rot90(x, -1),
    (0, -1, 1, 0): np.rot90, (0, 1, 1, 0): lambda x: x.transpose(1, 0, 2),
    (0, -1, -1, 0): lambda x: x[::-1, ::-1].transpose(1, 0, 2)}


def test_pictures_that_are_stored_turned_or_mirrored_are_put_upright(tmp_path):
    y, x = np.mgrid[:48, :64]
    picture = np.stack([4 * y, 3 * x, 0 * x], -1).astype(np.uint8)
    path = media.write(tmp_path / "a.mp4", audio=False, seconds=1.0, picture=lambda t: picture)
    content, stored = path.read_bytes(), None
    at = content.index(b"tkhd") + 44

    for (a, b, c, d), upright in ORIENTATIONS.items():
        matrix = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 14], np.int32) << 16
        path.write_bytes(content[:at] + matrix.astype(">i4").tobytes() + content[at + 36 :])
        with data.open_media(path, ("video",)) as m:
            (image,) = m.frames(np.array([0.5]), lambda height, width: (height, width))
        stored = image if stored is None else stored
        assert image.shape == upright(stored).shape and np.array_equal(image, upright(stored))
    assert np.abs(stored.astype(int) - picture).max() < 20


@pytest.mark.parametrize("name", ["a.mkv", "a.webm"])
def test_a_last_picture_lasts_until_the_end_of_the_file(tmp_path, name):
    codecs = dict(codec="libvpx", **OPUS) if name == "a.webm" else {}
    for times in [0.0, 0.8], [0.0]:  # a slide show, and one picture with sound
        path = media.write(tmp_path / name, times=times, **codecs)
        assert abs(bounds(path)[1] - 4.0) < 0.05 and not refusal(path, start=2.7)
        assert np.abs(times_at(path, [0.9, 3.9], data.MODALITIES) - times[-1]).max() < 0.02


def test_the_picture_of_an_mp4_ends_with_its_track(tmp_path):
    path = media.write(tmp_path / "a.mp4", times=[0.0, 0.04, 0.08])
    with pytest.raises(data.ClipError, match="picture from 0.00 to 0.1.* s, sound .* too little"):
        bounds(path)
    path = media.write(tmp_path / "b.mp4", seconds=3.0, audio_seconds=8.0)
    assert np.abs(np.subtract(bounds(path), (0.0, 3.0))).max() < 0.03


# ----------------------------------------------------------------------------------- sound by time


@pytest.mark.parametrize("settings", [
    dict(), dict(rate=16_000, layout="mono"), dict(rate=48_000, layout="5.1"),
    dict(rate=8_000, layout="mono"), dict(start=1.4, audio_codec="pcm_s16le"),
    dict(audio_start=0.4), dict(audio_codec="libmp3lame")], ids=str)
def test_the_samples_of_a_time(tmp_path, settings):
    path = media.write(tmp_path / ("a.mkv" if "start" in settings else "a.mp4"), **settings)
    found = media.clicks_of(sound_of(path, 0.0, 4.0))
    assert np.abs(found - [1.0, 2.5]).max() < 0.006
    assert np.abs(2.2 + media.clicks_of(sound_of(path, 2.2, 3.2)) - 2.5).max() < 0.006  # by a seek
    assert len(sound_of(path, 2.2, 3.2)) == 16_000


def test_sound_that_starts_first_is_in_step_with_the_picture(tmp_path):
    path = media.write(tmp_path / "a.mkv", start=0.5, audio_start=-0.3)
    assert np.abs(media.clicks_of(sound_of(path, 0.0, 3.0)) - [1.3, 2.8]).max() < 0.006
    assert np.abs(times_at(path, [1.32, 2.82]) - [1.0, 2.5]).max() < 0.03


def test_samples_after_a_seek_are_those_of_the_whole(tmp_path):
    path = media.write(tmp_path / "a.mp4", rate=16_000, clicks=np.arange(1000) / 250)  # a tone
    whole = sound_of(path, 0.0, 4.0)
    for start in 0.777, 1.0, 1.51, 2.49:  # AAC's first samples need those before
        part = sound_of(path, start, start + 0.2)
        assert np.abs(part - whole[round(start * 16_000) :][:3200]).max() < 1e-3


LAYOUTS = ["mono", "stereo", "2.1", "3.0", "quad", "5.1", "7.1", "hexadecagonal"]


@pytest.mark.parametrize("audio_codec", ["pcm_s16le", "pcm_u8", "pcm_s32le", "pcm_f32le", "flac"])
def test_the_level_does_not_depend_on_the_number_of_channels(tmp_path, audio_codec):
    tone = (0.9 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)).astype(np.float32)
    for layout in LAYOUTS[: 7 if audio_codec == "flac" else 8]:
        path = media.write(
            tmp_path / "a.mkv", video=False, audio_seconds=1.0, wave=tone, rate=16_000,
            layout=layout, audio_codec=audio_codec)
        step = 1 / 64 if audio_codec == "pcm_u8" else 1e-4
        assert np.abs(sound_of(path, 0.0, 1.0) - tone).max() < step, layout

    two = np.stack([tone, 0 * tone])  # the mean of the channels
    path = media.write(
        tmp_path / "a.mkv", video=False, wave=two, rate=16_000, audio_codec=audio_codec)
    assert np.abs(sound_of(path, 0.0, 1.0) - tone / 2).max() < step


def test_a_layout_without_a_name(tmp_path):
    tone = (0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)).astype(np.float32)
    path = media.write(tmp_path / "a.wav", video=False, wave=tone, rate=16_000, layout="3.0", **PCM)
    content = bytearray(path.read_bytes())
    at = content.index(b"fmt ") + 8 + 20  # the mask of the channels' places
    content[at : at + 4] = bytes(4)
    path.write_bytes(content)
    with av.open(str(path)) as container:
        assert container.streams.audio[0].layout.name == "3 channels"
    assert np.abs(sound_of(path, 0.0, 1.0) - tone).max() < 1e-4


def test_gaps_are_marked_and_move_nothing(tmp_path):
    gaps = ((0.5, 0.02), (1.5, 0.3))
    path = media.write(tmp_path / "a.mkv", gaps=gaps, clicks=np.arange(0.05, 4, 0.2), **PCM)
    sound = sound_of(path, 0.0, 4.0)
    found = media.clicks_of(sound)
    assert len(found) == 20 - 1 and np.abs(found - np.round(found - 0.05, 1) - 0.05).max() < 0.002

    edges = np.flatnonzero(np.diff(np.isnan(sound))) / 16_000
    assert np.abs(edges - [0.5, 0.52, 1.5, 1.8]).max() < 0.003
    with data.open_media(path) as m:
        assert np.isfinite(data.read_audio(m, 0.0, 1.28)).all()  # what is short is bridged
        with pytest.raises(data.ClipError, match="^a gap in the sound at 1.50 s of 0.30 s$"):
            data.read_audio(m, 1.0, 1.28)


def test_stamps_that_jitter_cut_no_seams_and_stamps_that_go_back_are_seen(tmp_path, monkeypatch):
    tone = np.sin(2 * np.pi * 5 * np.arange(4 * 44_100) / 44_100).astype(np.float32)
    path = media.write(tmp_path / "a.mkv", wave=tone, **PCM)
    whole, decode = sound_of(path, 0.0, 3.9), data.Media.decode

    def shifted(delay):
        monkeypatch.setattr(data.Media, "decode", lambda *args: (
            (at + delay(at), frame) for at, frame in decode(*args)))
        return sound_of(path, 0.0, 3.9)

    rng = np.random.default_rng(0)
    assert np.array_equal(shifted(lambda at: rng.uniform(-0.01, 0.01) if at > 0 else 0), whole)

    late = shifted(lambda at: -0.05 * (at > 2))  # repeats 50 ms
    assert np.isfinite(late[:-800]).all() and np.array_equal(late[:31_000], whole[:31_000])
    assert np.abs(late[33_000:60_000] - whole[33_800:60_800]).max() < 0.05
    with pytest.raises(data.ClipError, match="time stamps of the sound jump back at 2.0"):
        shifted(lambda at: -2.0 * (at > 2))


def test_silence_is_not_missing_sound():
    sound = np.zeros(16_000, np.float32)
    sound[4000:5000] = np.nan
    sound[3999], sound[5000] = 0.1, 0.3
    bridged = data.fill_gaps(sound, 0.0)
    assert bridged.dtype == np.float32 and abs(bridged[4500] - 0.2) < 0.01
    sound[:1700] = np.nan
    with pytest.raises(data.ClipError, match="a gap in the sound at 3.00 s of 0.11 s"):
        data.fill_gaps(sound, 3.0)


# ------------------------------------------------------------------------------- where a clip ends


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_windows_lie_in_what_both_tracks_have(tmp_path, name):
    clicks = np.arange(0.05, 8, 0.1)
    path = media.write(
        tmp_path / name, seconds=8.0, audio_seconds=3.0, audio_start=0.4, clicks=clicks)
    begin, end = bounds(path)
    assert abs(begin - 0.4) < 0.03 and abs(end - 3.4) < 0.06
    assert bounds(path, ("video",))[1] > 7.9 and abs(bounds(path, ("audio",))[1] - 3.4) < 0.06

    clips = Clips(data.find_clips(path), SMALL, augment=data.Augment(), seed=1)
    for epoch in range(6):
        shown = media.times_of(clips.read(0, epoch)["video"])
        assert begin - 0.05 < shown.min() and shown.max() < end + 0.01


def test_picture_and_sound_of_a_short_clip_wrap_together(tmp_path):
    path = media.write(tmp_path / "a.mkv", seconds=2.5, audio_seconds=2.0, clicks=(0.5,), **PCM)
    with data.open_media(path) as m:
        assert abs(m.end - 2.0) < 0.002
        shown = media.times_of(data.read_video(m, 1.5, SMALL, SQUARE))
        sound = data.read_audio(m, 1.5, 4.0)
    expected = np.floor(((1.5 + np.arange(8) * 0.16) % m.end) * 25 + 1e-3) / 25
    assert np.abs(shown - expected).max() < 0.03
    assert np.abs(media.clicks_of(sound) - [1.0, 3.0]).max() < 0.01  # at 0.5 of each turn of 2 s
    assert len(sound) == 64_000 and np.isfinite(sound).all()


def test_bounds_of_a_segment(tmp_path):
    path = media.write(tmp_path / "a.mp4", seconds=8.0, audio_seconds=6.0)
    with data.open_media(path, segment=(3.0, 5.0, False)) as m:
        assert (m.begin, m.end) == (3.0, 5.0)
        begin, end = m.clip_bounds(5.5, 9.0)
        assert begin == 5.5 and abs(end - 6.0) < 0.03
        assert m.clip_bounds(30.0, 40.0)[0] == 0.0  # of about this length: already cut
        with pytest.raises(data.ClipError, match="sound .* to 6.0. s: too little .*, 6.50 to 7.50"):
            m.clip_bounds(6.5, 7.5)
        for segment in (20.0, 24.0), (30.0, 40.0, True):
            with pytest.raises(data.ClipError, match="starts at [23]0.00 s, the file ends at 8.0"):
                m.clip_bounds(*segment)


def test_without_modalities_a_clip_is_all_that_there_is(tmp_path):
    path = media.write(tmp_path / "a.mp4", audio_start=0.4, audio_seconds=5.0)
    begin, end = bounds(path, ())
    assert begin == 0.0 and abs(end - 5.4) < 0.05


@pytest.mark.parametrize("name", ["a.mkv", "a.webm", "a.flv", "a.ts"])
def test_a_file_that_is_cut_off_ends_where_it_does(tmp_path, name):
    codecs = dict(codec="libvpx", **OPUS) if name == "a.webm" else {}
    path = media.write(tmp_path / name, seconds=8.0, clicks=np.arange(0.05, 8, 0.1), **codecs)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])
    begin, end = bounds(path)
    assert 2.0 < end < 6.5
    for start in np.linspace(0, end - begin - 1.28, 4):
        assert not refusal(path, start=start)
    with data.open_media(path) as m:
        data.verify_clip(m)


def test_ends_that_a_header_states_wrongly_are_refused_and_verified(tmp_path):
    path = media.write(tmp_path / "a.wav", video=False, clicks=np.arange(0.05, 4, 0.1), **PCM)
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"data") + 8 + 4 * 88_200])  # a copy that was cut off
    assert bounds(path, ("audio",))[1] > 1.9
    with data.open_media(path, ("audio",)) as m:
        m.end = 4.0
        with pytest.raises(data.ClipError, match="a gap in the sound at 2.0"):
            data.verify_clip(m)

    path = media.write(tmp_path / "a.avi", codec="mpeg4", audio_codec="libmp3lame")
    with data.open_media(path, ("video",)) as m:
        data.verify_clip(m)
        m.end = 9.0
        with pytest.raises(data.ClipError, match="the picture ends at [34]"):
            data.verify_clip(m)


def test_the_length_of_an_mp3_without_a_header_is_counted(tmp_path):
    rng = np.random.default_rng(0)
    noise = np.concatenate([np.zeros(220_500), rng.uniform(-0.9, 0.9, 220_500)]).astype(np.float32)
    path = media.write(
        tmp_path / "a.mp3", video=False, audio_seconds=10.0, wave=noise, layout="mono",
        audio_codec="libmp3lame")
    content = path.read_bytes()
    at = content.find(b"Xing") if b"Xing" in content else content.find(b"Info")
    frames = [m.start() for m in re.finditer(b"\xff\xfb", content)]
    path.write_bytes(content[next(start for start in frames if start > at) :])
    begin, end = bounds(path, ("audio",))
    assert abs(end - begin - 10.0) < 0.1 and not refusal(path, ("audio",), 8.0, 1.9)


# ------------------------------------------------------------------------------------ which stream


def many_streams(path, first, second, kind):
    """Write a file of two streams of a kind: (length in s, value, whether it is the default)."""
    with av.open(str(path), "w") as out:
        streams = []
        for _, _, default in (first, second):
            codec = "libx264" if kind == "video" else "pcm_s16le"
            stream = out.add_stream(codec, 25 if kind == "video" else 16_000)
            stream.disposition = av.stream.Disposition.default if default else 0
            if kind == "video":
                stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            else:
                stream.layout = "mono"
            streams.append(stream)

        for stream, (seconds, value, _) in zip(streams, (first, second)):
            for k in range(round(seconds * 25)):
                if kind == "video":
                    image = np.full((48, 64, 3), value, np.uint8)
                    frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                    frame.pts, frame.time_base = k, 1 / stream.codec_context.framerate
                else:
                    wave = np.full((1, 640), value * 100, np.int16)
                    frame = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
                    frame.pts, frame.sample_rate = 640 * k, 16_000
                out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("name, kind", [
    ("a.mkv", "video"), ("a.mp4", "video"), ("a.mkv", "audio"), ("a.mov", "audio")])
def test_the_default_stream_or_else_the_longest(tmp_path, name, kind):
    short, whole = (0.04 if kind == "video" else 1.0, 40), (3.0, 200)
    for first, second in (
        ((*short, False), (*whole, True)), ((*short, True), (*whole, True)),
        ((3.0, 40, False), (*whole, True)), ((*whole, True), (3.0, 40, False))):
        path = many_streams(tmp_path / name, first, second, kind)
        with data.open_media(path, (kind,)) as m:
            if kind == "video":
                (image,) = m.frames(np.array([0.02]), SQUARE)
                assert abs(image.mean() - 200) < 4, (first, second)
            else:
                assert abs(m.decode_audio(0.1, 0.2).mean() * 32768 - 20_000) < 2, (first, second)
            assert abs(m.end - 3.0) < 0.05


def test_a_cover_is_no_picture(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as out:
        cover = out.add_stream("mjpeg", 1)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        sound = out.add_stream("aac", 16_000, layout="mono")
        frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
        out.mux(cover.encode(frame))
        wave = np.zeros((1, 32_000), np.float32)
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        frame.sample_rate = 16_000
        out.mux(sound.encode(frame))
        out.mux(sound.encode(None))
    assert refusal(tmp_path / "a.mp4") == "no picture"
    assert not refusal(tmp_path / "a.mp4", ("audio",))


# ---------------------------------------------------------------------------------------- bad files


def test_reasons_are_words(tmp_path, monkeypatch):
    assert refusal(tmp_path / "none.mp4") == "not a file" == refusal(tmp_path)
    for name, content, words in (
        ("empty", b"", "cannot be opened: "), ("text", b"no video", "cannot be opened: "),
        ("list", b"ffconcat version 1.0\nfile a_good.mp4\n", "cannot be opened: its format is")):
        (tmp_path / name).write_bytes(content)
        assert refusal(tmp_path / name).startswith(words)

    def fail(error):
        def opened(*args, **kwargs):
            raise error
        monkeypatch.setattr(av, "open", opened)
        return refusal(tmp_path / "text")

    assert fail(PermissionError(13, "x")) == "cannot be opened: there is no permission to read it"
    for kind in av.error.classes.values():
        code = next((c for c, k in av.error.classes.items() if k is kind), 1)
        assert len(fail(kind(code, os.strerror(5), "a.mp4"))) > len("cannot be opened: ")


def test_empty_tracks_and_encryption_are_named(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as out:
        screen = out.add_stream("libx264", 25)
        out.add_stream("pcm_s16le", 16_000, layout="mono")
        screen.width, screen.height, screen.pix_fmt = 64, 48, "yuv420p"
        for k in range(50):
            frame = av.VideoFrame.from_ndarray(media.picture_at(k / 25), format="rgb24")
            frame.pts = k
            out.mux(screen.encode(frame))
        out.mux(screen.encode(None))
    assert "sound from 0.00 to 0.00 s: too little of the clip" in refusal(path)
    assert not refusal(path, ("video",))

    encrypted = media.write(tmp_path / "b.mp4", options={
        "encryption_scheme": "cenc-aes-ctr", "encryption_key": "76" * 16,
        "encryption_kid": "a7" * 16})
    assert refusal(encrypted) == "it is encrypted"
    assert refusal(encrypted, ("audio",)) == "it is encrypted"


def test_a_change_of_size_is_named_unless_nothing_is_seen_of_it(tmp_path):
    parts = [
        media.write(tmp_path / f"{k}.ts", seconds=2.0, size=size, start=1.4 + 2 * k)
        for k, size in enumerate([(64, 48), (96, 48), (128, 96)])]
    for names, words in (("01", "the size of the picture changes at [23]."), ("02", "")):
        path = tmp_path / f"{names}_joined.ts"
        path.write_bytes(b"".join(parts[int(n)].read_bytes() for n in names))
        with data.open_media(path, ("video",)) as m:
            times = np.array([0.5, m.end - 0.5])
            keep_shape = data.resizing(32, 32)
            if words:
                with pytest.raises(data.ClipError, match=words):
                    list(m.frames(times, keep_shape))
            else:
                assert len(list(m.frames(times, keep_shape))) == 2


def test_a_change_of_channels_is_heard_through(tmp_path):
    clicks = np.arange(0.05, 2, 0.15)
    parts = [
        media.write(
            tmp_path / f"{layout}.ts", seconds=2.0, layout=layout, start=start, clicks=clicks)
        for layout, start in (("mono", 1.4), ("stereo", 3.4))]
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    with data.open_media(path) as m:
        sound = data.read_audio(m, 1.2, 1.6)
    clicks = media.clicks_of(sound)
    assert len(clicks) >= 9 and np.abs(sound).max() < 1.0


def test_a_file_that_takes_too_long_is_bad(tmp_path, monkeypatch):
    path = media.write(tmp_path / "a.mp4", seconds=2.0)
    monkeypatch.setattr(data, "TIME_LIMIT", -1.0)
    assert re.match("takes longer than", refusal(path))
    monkeypatch.setattr(data, "TIME_LIMIT", 60.0)
    monkeypatch.setattr(data.time, "monotonic", itertools.count(0, 1e6).__next__)  # a slow disk
    assert not refusal(path)


def test_a_picture_that_the_decoder_had_to_guess_is_bad(tmp_path):
    good = media.write(tmp_path / "good.mp4", seconds=3.0).read_bytes()
    rng, reasons = np.random.default_rng(0), set()
    for _ in range(60):
        damaged = bytearray(good)
        for at in rng.integers(len(good) // 10, len(good) * 9 // 10, 3):
            damaged[at] ^= 1 << rng.integers(8)
        (tmp_path / "a.mp4").write_bytes(damaged)
        reasons.add(refusal(tmp_path / "a.mp4"))
    assert "a damaged picture" in reasons


@pytest.mark.parametrize("title", ["\xc9\xd6\xdc", "\x83\x65\x83\x58"])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_titles_in_a_foreign_encoding(tmp_path, name, title):
    title_to_be = "TITLE" + "x" * len(title)
    path = media.write(tmp_path / name, codec="mpeg4", audio_codec="mp3", title=title_to_be)
    content = path.read_bytes()
    assert b"TITLExx" in content
    path.write_bytes(content.replace(b"x" * len(title), title.encode("latin-1")))
    assert not refusal(path) and abs(times_at(path, [0.16])[0] - 0.16) < 0.1


def test_reading_leaks_no_packets_and_starts_no_threads(tmp_path):
    path = media.write(tmp_path / "a.mp4", seconds=2.0)
    clips = Clips(data.find_clips(path), SMALL)
    closed, demux = [], data.Media.packets

    def counted(m, streams):
        closed.append(0)
        try:
            yield from demux(m, streams)
        finally:
            closed[-1] = 1

    data.Media.packets, before = counted, threads()
    try:
        clips.read(0)
    finally:
        data.Media.packets = demux
    assert closed and all(closed)
    if data.ONE_THREAD:  # PyAV 17 has no such option
        assert threads() == before


def threads():
    return len(os.listdir("/proc/self/task")) if os.path.exists("/proc/self/task") else 0
