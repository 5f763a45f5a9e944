"""Clips: the right moments of real files, and what happens with the wrong files."""

import copy
import csv
import dataclasses
import io
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torchaudio
from torchvision.transforms.v2 import functional

import data
import media
import stress
from data import Augment, Batches, Clips, UserError, Window

ROOT = pathlib.Path(__file__).resolve().parent.parent
SMALL = Window(frames=8, step=0.16, size=32, seconds=1.28, mels=32)
SQUARE = data.resizing(32, 32)


def clips_in(folder, *modalities, **how):
    return Clips(data.find_clips(folder), SMALL, modalities or data.MODALITIES, **how)


def frames_at(path, times):
    with data.opened(path, ("video",)) as m:
        return media.times_of(np.stack(list(m.frames(np.array(times), SQUARE))))


def sound_of(path, start, stop):
    with data.opened(path) as m:
        return m.samples(start, stop)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs data.py with such arguments -> its exit status, and what it prints."""

    def go(*args):
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, args)])
        return data.main(), capsys.readouterr().out

    return go


# ---------------------------------------------------------------------------------- reading by time


@pytest.mark.parametrize("settings", [
    dict(fps=25), dict(fps=30000 / 1001), dict(fps=12.5), dict(fps=60),
    dict(fps=24, start=1.4, audio=False), dict(fps=25, audio_start=0.3),
    dict(fps=25, codec="mpeg4")], ids=str)
def test_the_frame_shown_at_a_time(tmp_path, settings):
    path, fps = media.write(tmp_path / "a.mp4", **settings), settings["fps"]
    times = np.array([0.0, 0.07, 0.16, 0.95, 1.61, 2.9, 3.5])
    expected = np.floor(times * fps + 1e-3) / fps
    by_seeks = [frames_at(path, [t])[0] for t in times[::-1]][::-1]
    for found in frames_at(path, times), by_seeks:
        assert np.abs(found - expected).max() < 0.6 / fps + 0.01


def test_a_variable_frame_rate(tmp_path):
    stamps = np.cumsum(
        [0, 0.04, 0.04, 0.3, 0.04, 0.04, 0.6, 0.1, 0.04, 0.04, 0.5, 0.04, 0.04, 0.04])
    path = media.write(tmp_path / "a.mp4", times=stamps, seconds=2.0)
    times = [0.05, 0.37, 0.39, 1.0, 1.3, 1.6]
    expected = [stamps[stamps <= t + 1e-3].max() for t in times]
    assert np.abs(frames_at(path, times) - expected).max() < 0.06


def test_pictures_that_a_phone_turned_are_put_upright(tmp_path):
    path, upright = media.write(tmp_path / "a.mp4", audio=False), []
    content = path.read_bytes()
    at = content.index(b"tkhd") + 44
    for turns, (a, b, c, d) in enumerate(
        [(1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0)]):
        matrix = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 14], np.int32) << 16
        path.write_bytes(content[:at] + matrix.astype(">i4").tobytes() + content[at + 36 :])

        with data.opened(path, ("video",)) as m:
            (picture,) = m.frames(np.array([3.5]), lambda height, width: (height, width))
        assert picture.shape == ((48, 64, 3) if turns % 2 == 0 else (64, 48, 3))
        upright.append(np.rot90(picture, -turns).astype(int))  # turned back, all are the same
    assert np.ptp(upright, 0).max() <= 4 and np.abs(np.subtract(upright, upright[0])).max() <= 2


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
    assert np.abs(frames_at(path, [1.32, 2.82]) - [1.0, 2.5]).max() < 0.03


def test_an_index_that_leads_too_far(tmp_path, monkeypatch):
    path, decode = media.write(tmp_path / "a.mp4"), data.Media.decode_from
    monkeypatch.setattr(data.Media, "decode_from", lambda m, s, at, t: decode(m, s, at + 1.0, t))
    assert abs(frames_at(path, [1.5])[0] - 1.48) < 0.03  # 2.5 s leads to the keyframe at 2 s


def test_samples_after_a_seek_are_those_of_the_whole(tmp_path):
    path = media.write(tmp_path / "a.mp4", rate=16_000, clicks=np.arange(1000) / 250)  # a tone
    whole = sound_of(path, 0.0, 4.0)
    for start in 0.777, 1.0, 1.51, 2.49:  # AAC's first samples need those before
        part = sound_of(path, start, start + 0.2)
        assert np.abs(part - whole[round(start * 16_000) :][:3200]).max() < 1e-3


def test_sound_that_ends_early_repeats_starts_late_or_has_a_gap(tmp_path):
    clicks, pcm = np.arange(30) / 10, dict(audio_codec="pcm_s16le")
    path = media.write(tmp_path / "a.mp4", audio_seconds=1.5, clicks=clicks)
    with data.opened(path) as m:
        sound = data.read_audio(m, 0.0, 4.0)
    assert len(sound) == 64_000 and np.abs(sound.reshape(-1, 3200)).max(1).min() > 0.25

    path = media.write(tmp_path / "b.mkv", gap=0.6, clicks=clicks, **pcm)
    with pytest.raises(data.ClipError, match="a gap in the sound at 1.6"):
        sound_of(path, 0.0, 3.0)

    path = media.write(tmp_path / "c.mkv", audio_start=0.5, audio_seconds=3.0, **pcm)
    missing = np.isnan(sound_of(path, 0.0, 4.0))
    assert missing[:7900].all() and not missing[8100:55_900].any() and missing[56_100:].all()


def test_windows_wrap_round_the_end(tmp_path):
    path = media.write(tmp_path / "a.mkv", seconds=2.0, clicks=(0.5,), audio_codec="pcm_s16le")
    with data.opened(path, segment=(0.0, 2.0)) as m:
        shown = media.times_of(data.read_video(m, 1.5, SMALL, SQUARE))
        sound = data.read_audio(m, 1.5, 4.0)
    expected = np.floor(((1.5 + np.arange(8) * 0.16) % 2.0) * 25 + 1e-3) / 25
    assert np.abs(shown - expected).max() < 0.03
    assert np.abs(media.clicks_of(sound) - [1.0, 3.0]).max() < 0.01  # at 0.5 of each turn of 2 s
    assert len(sound) == 64_000 and np.isfinite(sound).all()


def test_sound_and_picture_of_a_training_clip_are_of_the_same_moment(tmp_path):
    media.write(tmp_path / "a.mp4", seconds=6.0, clicks=(2.0, 3.0, 4.0))
    clips, starts = clips_in(tmp_path, augment=Augment(flip=False), seed=3), set()
    for epoch in range(12):
        clip = clips[epoch, 0, 0]
        times = media.times_of(clip["video"])
        assert (np.diff(times) > 0).all()  # a file that is long enough has no end in a window
        starts.add(round(float(times[0]), 2))

        loud = (clip["audio"].amax(1) > 0).nonzero().flatten() / 100
        onsets = [times[0] + t.item() for t in loud if t - 0.05 not in loud]
        for click in (2.0, 3.0, 4.0):
            if 0.1 < click - times[0] < 1.1:
                assert min(abs(onset - click) for onset in onsets) < 0.08
    assert len(starts) > 3


def test_test_windows_are_evenly_spaced(tmp_path):
    media.write(tmp_path / "a.mp4", seconds=6.0, clicks=(5.0,))
    clip = clips_in(tmp_path, views=4)[0, 0, 0]
    assert clip["video"].shape == (4, 8, 32, 32, 3) and clip["audio"].shape == (4, 128, 32)
    starts = [media.times_of(v)[0] for v in clip["video"]]
    assert np.abs(np.array(starts) - np.linspace(0, 6.0 - 1.28, 4)).max() < 0.06

    last = (clip["audio"][3].amax(1) > 0).nonzero()[0].item() / 100  # of 4.72 to 6 s
    assert abs(4.72 + last - 5.0) < 0.04


def test_segments_are_cut(tmp_path):
    media.write(tmp_path / "long.mp4", seconds=8.0, clicks=(3.5,))
    (tmp_path / "a.csv").write_text("long.mp4,3.0,5.0,x\n")
    index = data.read_annotations(tmp_path / "a.csv", tmp_path)
    for epoch in range(4):
        shown = media.times_of(Clips(index, SMALL, augment=Augment())[epoch, 0, 0]["video"])
        assert shown.min() > 2.9 and shown.max() < 5.05
    with data.opened(index.path(0)) as m:
        assert m.part(3.0, 5.0) == (3.0, 5.0)
        start, end = m.part(6.0, 9.0)
        assert start == 6.0 and abs(end - 8.0) < 0.1
        assert m.part(30.0, 40.0)[0] == 0.0  # of about this length: already cut
        with pytest.raises(data.ClipError, match="starts at 20.00 s"):
            m.part(20.0, 24.0)


# ---------------------------------------------------------------------------------------- bad files


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return media.write(tmp_path_factory.mktemp("good") / "good.mp4", seconds=3.0).read_bytes()


def zoo(folder, good):
    """A folder of files that are bad, each for its reason, and three good ones."""
    contents = dict.fromkeys(("a_good", "m_good", "z_good"), good) | {
        "empty": b"", "text": b"not a video", "cut": good[: len(good) // 2],
        # playlists, which would show another file under their own name
        "list": b"ffconcat version 1.0\nfile a_good.mp4\n",
        "stream": b"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\na_good.mp4\n#EXT-X-ENDLIST\n"}
    for name, content in contents.items():
        (folder / f"{name}.mp4").write_bytes(content)

    media.write(folder / "mute.mp4", audio=False)
    media.write(folder / "blind.mp4", video=False)
    os.mkfifo(folder / "pipe.mp4")
    (folder / "folder.mp4").mkdir()
    return {f"{n}.mp4" for n in ("empty", "text", "cut", "mute", "blind", "pipe", "list", "stream")}


def test_bad_files_are_named_and_replaced_by_the_next(tmp_path, good):
    bad, named = zoo(tmp_path, good), {}
    clips = clips_in(tmp_path, augment=Augment())
    assert len(clips) == len(bad) + 3
    for i in range(len(clips)):
        clip = clips[0, i, 0]
        named.update(clip["bad"])
        assert clip["video"].shape == (8, 32, 32, 3)
        assert clips.name(clip["index"]).endswith("good.mp4")

        # what stands in is the same each time, and a clip as it is, not a mixture
        for same in clips[0, i, 0], clips[0, clip["index"], 0]:
            assert same["index"] == clip["index"]
            assert all(same[m].equal(clip[m]) for m in ("video", "audio"))
        assert clip["bad"] or clip["index"] == i

    assert set(named) == bad and "cannot be opened" in named["list.mp4"]
    assert [named[f"{n}.mp4"] for n in ("mute", "blind", "pipe")] == [
        "no audio track", "no picture", "not a file"]
    mute = [clips.name(i) for i in range(len(clips))].index("mute.mp4")
    assert "video" in clips_in(tmp_path, "video")[0, mute, 0]  # one modality needs one stream


def test_every_row_of_a_batch_is_of_the_file_that_it_names(tmp_path):
    """Of files of different grey and different sound, every second one bad."""
    grey = {}
    for i in range(12):
        path = tmp_path / f"{i:02d}.mp4"
        if i % 2:
            path.write_bytes(bytes(1000))
            continue
        grey[i] = 20 + 18 * i
        picture = np.full((48, 64, 3), grey[i], np.uint8)
        media.write(
            path, seconds=2.0, picture=lambda t, picture=picture: picture,
            clicks=[0.05 + k * 1.9 / (i + 1) for k in range(i + 1)])
    clips = clips_in(tmp_path, augment=Augment())
    own = {i: clips.read(i)["audio"] for i in grey}
    told = []
    loader = data.Loader(clips, Batches(12, 6, 0, range(2), micro=2), "cpu", 2, told.append)
    for batch in loader:
        assert len(batch["index"]) == 2 and batch.keys() == {"video", "audio", "label", "index"}
        for row, i in enumerate(batch["index"].tolist()):
            assert abs(batch["video"][row].float().mean() - grey[i]) < 3
            assert batch["audio"][row].equal(own[i])
    assert (loader.drawn, loader.unreadable) == (12, 6) and loader.waited > 0
    assert sorted(loader.bad) == [f"{i:02d}.mp4" for i in range(1, 12, 2)]
    assert len(told) == 6 and all(line.startswith("unreadable, replaced: ") for line in told)


def test_a_corpus_of_damaged_files():
    stress.corpus(per_kind=1)


def test_a_file_that_takes_too_long_is_bad(tmp_path, good, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(good)
    monkeypatch.setattr(data, "TIME_LIMIT", -1.0)
    with pytest.raises(data.ClipError, match="takes longer|cannot be opened"):
        clips_in(tmp_path).read(0)


def test_a_picture_that_the_decoder_had_to_guess_is_bad(tmp_path, good):
    rng, said = np.random.default_rng(0), set()
    for _ in range(60):
        damaged = bytearray(good)
        for at in rng.integers(len(good) // 10, len(good) * 9 // 10, 3):
            damaged[at] ^= 1 << rng.integers(8)
        (tmp_path / "a.mp4").write_bytes(damaged)
        said.update(reason for _, reason in clips_in(tmp_path)[0, 0, 0]["bad"])
    assert "a damaged picture" in said


@pytest.mark.parametrize("title", ["\xc9\xd6\xdc", "\x83\x65\x83\x58"])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_titles_in_a_foreign_encoding(tmp_path, name, title):
    title_to_be = "TITLE" + "x" * len(title)
    path = media.write(tmp_path / name, codec="mpeg4", audio_codec="mp3", title=title_to_be)
    content = path.read_bytes()
    assert b"TITLExx" in content
    path.write_bytes(content.replace(b"x" * len(title), title.encode("latin-1")))
    clip = clips_in(tmp_path)[0, 0, 0]
    assert not clip["bad"] and abs(media.times_of(clip["video"])[1] - 0.16) < 0.1


def test_a_damaged_jpeg_in_a_prepared_clip_is_bad(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    picture = noise.repeat(4, 0).repeat(4, 1)
    media.write(tmp_path / "source" / "a.mp4", seconds=2.0, picture=lambda t: picture)
    index = data.find_clips(tmp_path / "source")
    size, coarse = (data.Prepare(index, tmp_path / f"{q}", q)[0][2] for q in (data.QUALITY, 31))
    assert coarse < 0.9 * size
    clips = clips_in(tmp_path / f"{data.QUALITY}")
    whole = clips[0, 0, 0]
    assert not whole["bad"]
    path = tmp_path / f"{data.QUALITY}" / "a.mkv"
    content, said = path.read_bytes(), set()
    assert len(content) == size
    starts = [m.end() for m in re.finditer(b"\xff\xda", content)]  # of the scans of JPEGs
    for start in starts[:9:2]:  # one of 8 frames, of every second picture of 25
        damaged = bytearray(content)
        damaged[start + 50 : start + 150] = bytes(100)
        path.write_bytes(damaged)
        said.update(clips[0, 0, 0]["bad"])
        verdict, reason, _ = data.Check(clips)[0]
        assert verdict == "bad" and "cannot be decoded" in reason
    assert said == {("a.mkv", "cannot be decoded (InvalidDataError)")}
    path.write_bytes(content[: starts[20]] + bytes(100) + content[starts[20] + 100 :])
    assert not clips[0, 0, 0]["bad"] and clips[0, 0, 0]["video"].equal(whole["video"])
    assert data.Check(clips)[0][0] == "warning"  # damaged outside the window


def test_a_picture_that_ends_early_is_bad_where_it_is_missing(tmp_path):
    path = media.write(tmp_path / "a.mkv", seconds=3.0, audio_codec="pcm_s16le", audio_seconds=8.0)
    with data.opened(path) as m:
        with pytest.raises(data.ClipError, match="the picture ends at"):
            list(m.frames(np.array([1.0, 6.0]), SQUARE))
        assert len(list(m.frames(np.array([1.0, 2.9]), SQUARE))) == 2


def test_check_says_what_training_does(tmp_path, good, run):
    bad = zoo(tmp_path, good)
    media.write(tmp_path / "short.mp4", seconds=0.5)
    media.write(tmp_path / "silent.mp4", seconds=9.0, clicks=())
    media.write(tmp_path / "still.mp4", seconds=9.0, times=[0, 8.9])
    code, out = run("check", tmp_path, "--seconds", 1)
    assert code == 1 and f"{len(bad)} bad" in out

    said = dict(re.findall(r"^((?:bad|warning): [^:]*): (.*)", out, re.MULTILINE))
    assert {name for name in said if name.startswith("bad")} == {f"bad: {name}" for name in bad}
    for name, word in (
        ("short", "shorter than a window"), ("silent", "silent"), ("still", "still picture")):
        assert word in said[f"warning: {name}.mp4"]


@pytest.mark.parametrize("args, words", [
    ("check nowhere", "there is no folder"), ("check .", "no video files"),
    ("prepare .", "say where to"), ("prepare . there", "no video files"),
    ("check . --annotations none.csv", "cannot read annotations"),
    ("prepare ../twins there", "x/a.mp4 and x/a.webm would become one file")])
def test_mistakes_end_in_a_sentence(tmp_path, args, words, monkeypatch, run):
    touch(tmp_path, "twins/x/a.mp4", "twins/x/a.webm", "here/readme.txt")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=words):
        run(*args.split())


@pytest.mark.parametrize("error, told", [
    (UserError("so"), "error: so\n"), (OSError(28, "full"), "error: [Errno 28] full\n"),
    (ValueError("a bug"), "ValueError: a bug\n"), (OSError(2, "a bug"), "FileNotFoundError: ")])
def test_only_mistakes_and_full_disks_are_told_in_a_sentence(error, told, capsys):
    data.one_sentence(type(error), error, None)
    assert capsys.readouterr().err.startswith(told)


def test_a_mistake_and_a_reader_that_leaves_as_they_are_typed(tmp_path, run, capsys):
    touch(tmp_path, "a.mp4")
    for folder, told in ("nowhere", "error: there is no folder nowhere\n"), (".", ""):
        command = [sys.executable, data.__file__, "check", folder, "--workers", "0"]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        with subprocess.Popen(command, cwd=tmp_path, **pipes) as process:
            process.stdout.close()
            assert process.stderr.read() == told
        assert process.returncode == 1

    with pytest.raises(SystemExit):
        run("--help")
    assert "python data.py prepare clips/ small/" in capsys.readouterr().out


def test_prepared_clips_show_the_same(tmp_path, good, run):
    source, target = tmp_path / "source", tmp_path / "target"
    raw = media.write(source / "cat" / "a.mp4", seconds=5.0, size=(640, 360), audio_start=0.2)
    (source / "bad.mp4").write_bytes(b"nothing")
    (source / "cut.mp4").write_bytes(good[: len(good) * 6 // 10])  # it opens, and has no streams
    made = set()
    for _ in range(2):  # what is there is not made again
        code, out = run("prepare", source, target)
        assert code == 1 and "bad: bad.mp4" in out and "bad: cut.mp4: no picture" in out
        assert "1 of 3 clips" in out
        made.add((target / "cat" / "a.mkv").stat().st_mtime_ns)
    assert len(made) == 1

    window = Window(frames=8, step=0.16, size=224, seconds=4.0)
    with data.opened(raw) as old, data.opened(target / "cat" / "a.mkv") as new:
        assert (new.video.height, new.video.width) == (256, 456)
        for start in 0.0, 0.48, 2.4:
            shown = [
                data.read_video(m, start, window, lambda *_: (256, 456)).astype(float)
                for m in (old, new)]
            error = np.square(shown[0] - shown[1]).mean()
            assert 10 * np.log10(255**2 / max(error, 1e-9)) > 38
        heard = [media.clicks_of(data.read_audio(m, 0.5, 4.0)) for m in (old, new)]
        assert np.abs(heard[0] - heard[1]).max() < 0.003


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_no_bad_clip(tmp_path):
    media.write(tmp_path / "a.mp4", seconds=1.0)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "a.partial").symlink_to("/dev/full")
    with pytest.raises(UserError, match="a.partial cannot be written: .*No space left"):
        data.prepare(data.find_clips(tmp_path / "a.mp4"), tmp_path / "small", 5, 1)


def test_prepare_applies_segments_and_annotations_still_fit(tmp_path, run):
    media.write(tmp_path / "source" / "P01_01.mp4", seconds=6.0)
    file, target = tmp_path / "EPIC_100_train.csv", tmp_path / "target"
    file.write_text(EPIC.format(start="00:00:02.00", stop="00:00:04.50"))
    assert run("prepare", tmp_path / "source", target, "--annotations", file)[0] == 0

    index = data.read_annotations(file, target)
    assert index.name(0) == "P01_01_2000_4500.mkv"
    shown = media.times_of(Clips(index, SMALL)[0, 0, 0]["video"])
    assert abs(shown[0] - 2.0) < 0.05


# -------------------------------------------------------------------------------------- annotations

EPIC = textwrap.dedent("""\
    narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,\
start_frame,stop_frame,narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes
    P01_01_0,P01,P01_01,00:00:01.089,{start},{stop},8,202,open door,open,3,door,3,['door'],[3]
    """)


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def listed(folder, text, split=None, name="a.csv", **how):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return data.read_annotations(folder / name, folder, split, **how)


def labels_of(index, i):
    return [index.classes[k] for k in index.labels[i] if k >= 0]


def named(index):
    return {index.name(i): labels_of(index, i) for i in range(len(index))}


CUT = ("30000_40000", "000030", "30", "000030_000040", "30_40", "30.000", "30.000_40.000",
       "30.0_40.0", "30.0-40.0", "30.000-40.000")


@pytest.mark.parametrize("prefix", ["", "Y", "sub/", "a/b/Y"])
def test_vggsound_and_how_its_files_are_named(tmp_path, prefix, capsys):
    text = ('--0PQM4-hqg,30,"waterfall, burbling",train\n--0PQM4-hqg,40,rain & wind,train\n'
            "---g-f_I2yQ,1,male singing,test\n--missing0_x,2,bagpipes,train\n#NAME?,4,rain,train\n"
            "---g-f_I2yQ,7,rain,val\nshort,1\n")
    for k, cut in enumerate(["", *(f"_{cut}" for cut in CUT)]):
        file = f"{prefix}--0PQM4-hqg{cut}.{('mp4', 'MP4', 'mkv', 'webm')[k % 4]}"
        touch(tmp_path / str(k), file, f"{prefix}unlisted000_30.mp4")
        index = listed(tmp_path / str(k), text, "train")
        assert index.classes == (
            "bagpipes", "male singing", "rain", "rain & wind", "waterfall, burbling")
        said = capsys.readouterr().out
        if cut:  # that file is of the row at 30 s, and no other's
            assert index.labels.tolist() == [[4]] and np.isnan(index.start[0])
            assert "1 of 7 rows found their file" in said and "2 without a file (first: --0" in said
        else:
            assert index.start.tolist() == [30, 40] and index.shared.all()
        for words in (
            "1 without a name (first: line 5: #NAME?,4,rain,train)", "1 of split 'val'",
            "1 of split 'test'", "1 with 2 columns, not 4 (first: line 7: short,1)"):
            assert words in said


def test_a_file_cut_for_one_row_is_no_other_rows(tmp_path, capsys):
    touch(tmp_path, "abc_30.mp4", "abc_30_41.mp4", "one/def.mp4")
    with pytest.raises(UserError, match="2 without a file .first: abc.. Files are .* ID_000030, "):
        listed(tmp_path, "abc,31,dog,train\nabc,30.5,cat,train\n")
    text = "YTID,start_seconds,end_seconds,label\nabc,30,40,dog\nabc,30,45,cat\ndef,1,2,cat\n"
    index = listed(tmp_path, text)  # abc_30 may be either's
    assert named(index) == {"one/def.mp4 [1.00-2.00 s]": ["cat"]} and not index.shared.any()
    assert "2 with a file that is another row's, too (first: abc)" in capsys.readouterr().out

    touch(tmp_path, "dog/1.mp4", "cat/1.mp4", "cat/2.mp4")  # 1.mp4 may be either
    assert named(listed(tmp_path, "1.mp4,dog\n2.mp4,cat\n")) == {"cat/2.mp4": ["cat"]}
    assert "1 with several files of their name (first: 1.mp4)" in capsys.readouterr().out
    touch(tmp_path, "1.mp4")
    assert named(listed(tmp_path, "1.mp4,dog\n2.mp4,cat\n"))["1.mp4"] == ["dog"]


def test_a_short_file_that_rows_share_is_not_already_cut(tmp_path):
    media.write(tmp_path / "abc.mp4", seconds=2.0)
    rows = "abc,1,dog,train\nabc,30,cat,train\n"
    one, two = (Clips(listed(tmp_path, text), SMALL) for text in (rows[16:], rows))
    assert not one[0, 0, 0]["bad"]  # ten seconds of which two were left
    assert not two[0, 0, 0]["bad"] and "starts at 30.00 s" in two[0, 1, 0]["bad"][0][1]


def test_vggsound_as_published_with_two_columns(tmp_path):
    touch(tmp_path, "video/x/glLQrEijrKg_000300.mp4", "video/LDoXsip0BEQ_000177.mkv")
    index = listed(
        tmp_path, "glLQrEijrKg_000300.mp4,playing hammond organ\n"
        "LDoXsip0BEQ_000177.mp4,parrot talking\n6jiO0tPLK7U_000090.mp4,basketball bounce\n")
    assert named(index) == {
        "video/x/glLQrEijrKg_000300.mp4": ["playing hammond organ"],
        "video/LDoXsip0BEQ_000177.mkv": ["parrot talking"]}  # prepared


@pytest.mark.parametrize("head", [
    "# Segments csv\n# YTID, start_seconds, positive_labels\n", "",
    "YTID, start_seconds, end_seconds, positive_labels\n"])
def test_audioset(tmp_path, head, capsys):
    touch(tmp_path, "Yaaaaaaaaaaa.mp4", "bbbbbbbbbbb_20000_30000.mp4", "Yccccccccccc_30.0_40.0.mp4")
    text = head + (
        'aaaaaaaaaaa, 30.000, 40.000, "/m/09x0r,/m/05zppz"\n'
        'bbbbbbbbbbb, 20.000, 30.000, "/m/09x0r"\nccccccccccc, 30.000, 40.000, "/m/05zppz"\n')
    with pytest.raises(UserError, match="class_labels_indices.csv must lie beside"):
        listed(tmp_path, text)

    published = tmp_path / "class_labels_indices.csv"
    published.write_text('index,mid,display_name\n0,/m/09x0r,"Speech"\n')
    with pytest.raises(UserError, match="no classes of AudioSet: /m/05zppz"):
        listed(tmp_path, text)
    published.write_text(published.read_text() + '1,/m/05zppz,"Male speech, man speaking"\n')

    index = listed(tmp_path, text)
    assert "3 of 3 rows" in capsys.readouterr().out
    assert index.labels.tolist() == [[0, 1], [0, -1], [1, -1]] and index.task == "many"
    assert index.classes == ("Speech", "Male speech, man speaking")
    assert index.start[0] == 30 and np.isnan(index.start[1:]).all()


EPIC_ROWS = [  # of the validation file: the first of these is a narration of the same number as
    ("P01_11_0", "00:00:00.00", "00:00:01.89", 0, 2),  # a second, at which others start
    ("P01_11_49", "00:03:23.09", "00:03:24.30", 2, 8),
    ("P01_11_10", "00:00:49.15", "00:00:50.95", 0, 49),
    ("P01_11_1", "00:00:01.56", "00:00:02.45", 1, 2)]


@pytest.mark.parametrize(
    "way", ["narration", "times", "P01_11.MP4", "P01/P01_11.MP4", "P01/videos/P01_11.MP4"])
def test_epic_kitchens(tmp_path, way):
    text = EPIC.split("\n")[0] + "\n" + "".join(
        f"{n},P01,P01_11,x,{start},{end},1,9,take it,take,{verb},cup,{noun},['cup'],[1]\n"
        for n, start, end, verb, noun in EPIC_ROWS)
    shared = ROOT.parent / "shared/annotations/epic/EPIC_100_validation_head.csv"
    text = shared.read_text() if shared.exists() else text
    rows = list(csv.DictReader(io.StringIO(text)))
    times = [[data._seconds(r[f"{w}_timestamp"]) for w in ("start", "stop")] for r in rows]
    files = {
        "narration": [f"{r['video_id'][:3]}/{r['narration_id']}.mp4" for r in rows],
        "times": [
            f"{r['video_id']}_{round(s * 1000)}_{round(e * 1000)}.mkv"
            for r, (s, e) in zip(rows, times)],
    }.get(way, [way.replace("P01_11", r["video_id"]) for r in rows])
    touch(tmp_path, *files)
    index = listed(tmp_path, text)
    assert [os.fsdecode(n) for n in index.names] == files
    assert index.labels.tolist() == [[int(r["verb_class"]), int(r["noun_class"])] for r in rows]
    assert index.task == "epic" and [len(c) for c in index.classes] == [97, 300]
    if way.endswith("MP4"):
        assert np.array_equal([index.start, index.end], np.transpose(times)) and index.shared.any()
    else:
        assert np.isnan(index.start).all()


def test_epic_kitchens_that_do_not_fit(tmp_path):
    touch(tmp_path, "P01_01_2.mp4", "P01_01_2.00_3.75.mp4")
    row = EPIC.format(start="00:00:02.00", stop="00:00:03.75")
    with pytest.raises(UserError, match="first: P01_01.. Files are .* NARRATION_ID, "):
        listed(tmp_path, row)  # never that of another narration, or second
    with pytest.raises(UserError, match="no classes of EPIC-Kitchens: noun 300"):
        listed(tmp_path, row.replace("door,3,[", "door,300,["))
    head, row = (",".join(line.split(",")[:8]) for line in row.splitlines())
    touch(tmp_path, "P01_01.mp4")
    index = listed(tmp_path, f"{head}\n{row}\n")  # the test file has no labels
    assert index.labels.tolist() == [[-1]] and index.segment(0) == (2.0, 3.75, False)
    with pytest.raises(UserError, match="have no labels"):
        data.labeled_clips(tmp_path, tmp_path / "a.csv")


@pytest.mark.parametrize("head", ["", "Category&VideoID&Quality&StartTime&EndTime\n"])
def test_ave(tmp_path, head):
    touch(tmp_path, "abc.mp4", "def.mp4")
    index = listed(tmp_path, head + "Dog, bark&abc&good&2&5\nzoo&def&good&0&10\n", name="a.txt")
    assert index.classes == ("Dog, bark", "zoo", "background") and index.task == "ave"
    assert index.labels[0].tolist() == [2, 2, 0, 0, 0, 2, 2, 2, 2, 2]
    assert (index.labels[1] == 1).all() and np.isnan(index.start).all()


def test_real_files_of_all_sets(tmp_path, capsys):
    real = ROOT.parent / "shared/annotations"
    if real.exists():
        for name, count, classes in (
            ("vggsound/test_head.csv", 600, 600), ("vggsound/vggsound_head.csv", 15, 15),
            ("audioset/eval_segments_head.csv", 600, 527), ("ave/trainSet.txt", 3339, 29),
            ("ave/Annotations.txt", 4143, 29), ("epic/EPIC_100_test_timestamps_head.csv", 39, 0)):
            touch(tmp_path, "x.mp4")
            with pytest.raises(UserError, match=f"0 of {count} rows .* {count} without a file"):
                data.read_annotations(real / name, tmp_path)
            found, known = data.Listing(real / name, None).table()
            assert len(known) <= classes and found.max() == len(known) - 1


TIMED, NONE = [(1, 2.5, ["dog"]), (0, 1, ["cat"])], (None, None)


@pytest.mark.parametrize("text, expected", [
    ("path,start,end,label\nx/a.mp4,1,2.5,dog\nb.mp4,0,1,cat\n", TIMED),
    ("video,start,end,label\nx/a.mp4,1,2.5,dog\nb.mp4,0,1,cat\n", TIMED),
    ("Label,End,Start,Fold,File\ndog,2.5,1,7,x/a.mp4\ncat,1,0,7,b.mp4\n", TIMED),
    ("filename,label\nx/a.mp4,dog\nb.mp4,7\n", [(*NONE, ["dog"]), (*NONE, ["7"])]),
    ("Path,Label,Split\nx/a.mp4,dog,Train\nb.mp4,cat,val\n", [(*NONE, ["dog"])]),
    ('path,labels\nx/a.mp4,"dog,loud"\nb.mp4,\n', [(*NONE, ["dog", "loud"]), (*NONE, [])]),
    ("x/a.mp4,dog,loud\nb.mp4,cat\n", [(*NONE, ["dog", "loud"]), (*NONE, ["cat"])]),
    ("x/a.mp4,1,2.5,dog\nb.mp4\nb.mp4,0,1,cat\n", TIMED),
    ("x/a.mp4\n./b.mp4\n", [(*NONE, []), (*NONE, [])]),
    ("x/a.mp4,a & b & c & d & e\n", [(*NONE, ["a & b & c & d & e"])]),
    ('\ufeffpath,class\r\n"x/a.mp4","say ""dog"""\r\n', [(*NONE, ['say "dog"'])])])
def test_plain_csv(tmp_path, text, expected):
    touch(tmp_path, "x/a.mp4", "b.mp4")
    index = listed(tmp_path, text, "train")
    times = [NONE if np.isnan(index.start[i]) else index.segment(i)[:2] for i in range(len(index))]
    assert [(*pair, labels_of(index, i)) for i, pair in enumerate(times)] == expected
    assert [*index.names] == [b"x/a.mp4", b"b.mp4"][: len(expected)]
    assert index.task == ("many" if any(len(e[2]) > 1 for e in expected) else "single")


@pytest.mark.parametrize("text, words", [
    (b"a.mp4,Gl\xfcck\n", "cannot read annotations"), ("", "no rows"),
    ("foo bar\nbaz\n", "line 1 is of no known format .*: foo bar"),
    ("name,label\na.mp4,x\n", "line 1 is of no known format .*: name,label"),
    ("path,file,label\na.mp4,b.mp4,x\n", "line 1: a header of more than one .*: path,file"),
    ("path,start,label\na.mp4,1,x\n", "line 1: a header of more than one meaning: path,start"),
    ("a.mp4,dog\na.mp4,1,2,cat\n", "line 2: times or labels.*: a.mp4,1,2,cat"),
    ('a.mp4,x\na.mp4,"y\na.mp4,z\n', "line 2: a quote that is not closed"),
    ('a.mp4,"x"\na.mp4,"y\na.mp4,"z"\n', "line 2: a quote that is not closed"),
    ('a.mp4,x\na.mp4,"y\nz"\n', "line 2: .* it ends in a later line"),
    ("z.mp4,x\n", "0 of . rows"), ("a.mp4,5,2\n", "0 of . rows"),
    ("path,split\na.mp4,val\n", "0 of . rows")])
def test_annotations_that_are_refused(tmp_path, text, words):
    touch(tmp_path, "a.mp4")
    with pytest.raises(UserError, match=words):
        listed(tmp_path, text, "train")


@pytest.mark.parametrize(
    "name", ["../secret.mp4", "/etc/secret.mp4", "link.mp4", "linked/secret.mp4"])
def test_paths_that_leave_the_folder_are_refused(tmp_path, name):
    touch(tmp_path, "secret.mp4", "data/a.mp4")
    os.symlink(tmp_path / "secret.mp4", tmp_path / "data" / "link.mp4")
    os.symlink(tmp_path, tmp_path / "data" / "linked")
    (tmp_path / "a.csv").write_text(f"{name},x\n")
    with pytest.raises(UserError, match="leads out of"):
        data.read_annotations(tmp_path / "a.csv", tmp_path / "data")
    if not name.startswith("/"):  # of which there is none
        index = data.read_annotations(tmp_path / "a.csv", tmp_path / "data", allow_outside=True)
        assert os.path.samefile(index.path(0), tmp_path / "secret.mp4")


def test_links_are_followed_and_loops_end(tmp_path):
    touch(tmp_path, "clips/cat/a.mp4", "elsewhere/dog/b.mp4")
    os.symlink(tmp_path / "elsewhere" / "dog", tmp_path / "clips" / "dog")
    os.symlink(tmp_path / "clips", tmp_path / "clips" / "cat" / "again")
    os.symlink(tmp_path, tmp_path / "elsewhere" / "dog" / "up")
    index = data.find_clips(tmp_path / "clips")
    assert named(index) == {"cat/a.mp4": ["cat"], "dog/b.mp4": ["dog"]}


def test_sound_files_are_clips_where_sound_is_asked_for(tmp_path, run):
    codecs = {"wav": "pcm_s16le", "flac": "flac", "m4a": "aac", "mp3": "libmp3lame", "ogg": "flac"}
    for suffix, codec in codecs.items():
        media.write(tmp_path / "bell" / f"a.{suffix}", video=False, audio_codec=codec)
    with pytest.raises(UserError, match="no video files"):
        data.find_clips(tmp_path)
    index = data.find_clips(tmp_path, ("audio",))
    assert len(index) == 5 and index.classes == ("bell",)
    for i in range(5):
        with data.opened(index.path(i), ("audio",)) as m:
            assert np.abs(media.clicks_of(m.samples(0.0, 4.0)) - [1.0, 2.5]).max() < 0.03
        clip = Clips(index, SMALL, ("audio",), Augment())[0, i, 0]
        assert clip["audio"].shape == (128, 32) and not clip["bad"] and "video" not in clip
    text = "fname,labels,split\na.wav,Bell,train\n"
    assert len(listed(tmp_path, text, modalities=("audio",))) == 1
    _, out = run("check", tmp_path, "--modalities", "audio", "--seconds", "1")
    assert "5 clips: 5 fine" in out


def test_folders_as_labels(tmp_path):
    touch(tmp_path, "train/cat/a.mp4", "train/dog/b.mp4", "test/dog/c.mp4")
    parts = data.labeled_clips(tmp_path)
    assert parts["train"].classes == parts["test"].classes == ("cat", "dog")
    assert parts["train"].labels.tolist() == [[0], [1]] and parts["test"].labels.tolist() == [[1]]
    touch(tmp_path, "test/fox/c.mp4")
    with pytest.raises(UserError, match="fox"):
        data.labeled_clips(tmp_path)
    other = tmp_path / "other"
    touch(other, *(f"{c}/{i}.mp4" for c in ("cat", "dog") for i in range(100)))
    parts = data.labeled_clips(other)
    assert len(parts["train"]) + len(parts["test"]) == 200 and 5 < len(parts["test"]) < 40
    index = data.find_clips(other / "cat" / "7.mp4")  # one file is a clip, too
    assert index.path(0) == str(other / "cat" / "7.mp4") and len(index) == 1 and not index.classes


def test_held_out_and_fraction(tmp_path):
    touch(tmp_path, *(f"{i}.mp4" for i in range(2000)))
    index = data.find_clips(tmp_path)
    mask = data.held_out(index)
    assert 20 < mask.sum() < 65
    fewer = index.subset(np.arange(0, 2000, 2))
    assert (data.held_out(fewer) == mask[::2]).all()  # whatever other clips there are
    quarter, half = (set(data.fraction_of(index, f).names) for f in (0.25, 0.5))
    assert quarter < half and 0.45 < len(half) / 2000 < 0.55


# ------------------------------------------------------------------------------------------ sampler


@pytest.mark.parametrize("count, batch", [(10, 4), (3, 8), (1, 4), (64, 64)])
def test_every_epoch_has_each_clip_once(count, batch):
    keys = sum(Batches(count, batch, 5, range(3 * count)), [])
    first, second = ([i for e, i, _ in keys if e == epoch] for epoch in range(2))
    assert sorted(first) == sorted(second) == list(range(count))
    assert first != second or count < 10
    assert [e for e, *_ in keys] == sorted(e for e, *_ in keys)


@pytest.mark.parametrize("repeat", [1, 4])
def test_processes_micro_batches_and_resuming_change_nothing(repeat):
    def batches(first=0, rows=None, micro=0, seed=7):
        return list(Batches(50, 12, seed, range(first, 20), rows, micro, repeat))

    whole = batches()
    assert batches(13) == whole[13:] and batches(seed=8) != whole
    assert [k[2] for k in sum(whole, [])] == 240 // repeat * [*range(repeat)]
    for cuts in (0, 6, 12), (0, 1, 7, 12):
        parts = zip(*(batches(rows=range(*pair)) for pair in zip(cuts, cuts[1:])))
        assert [sum(p, []) for p in parts] == whole

    for micro in 3, 4:  # rows of a process, two micro-batches a step
        parts = batches(rows=range(6, 12), micro=micro)
        assert [a + b for a, b in zip(parts[::2], parts[1::2])] == [b[6:] for b in whole]
        assert len(Batches(50, 12, 7, range(20), range(6), micro)) == len(parts) == 40


# ----------------------------------------------------------------------------- sound and transforms


def test_log_mel():
    t = torch.arange(16_000 * 2) / 16_000
    wave = torch.where(t < 1, 0.0, 1.0) * torch.sin(2 * torch.pi * 1000 * t)
    mel = data.log_mel(wave)
    assert mel.shape == (200, 128) and mel.dtype == torch.float32
    assert abs(mel[:95] - np.log(0.01)).max() < 1e-3  # silence is log(offset)
    peak = mel[150].argmax().item()
    highest = 2595 * np.log10(1 + 8000 / 700)
    assert abs((peak + 1) * highest / 129 - 2595 * np.log10(1 + 1000 / 700)) < highest / 129
    onset = (mel[:, peak] > mel[150, peak] - 1).nonzero()[0].item()
    assert abs(onset - 100) <= 1
    # the window is Hamming's: with Hann's, the bins beside a tone's are much lower
    frame = torch.sin(2 * torch.pi * 1000 * torch.arange(16_000) / 16_000)
    window = torch.from_numpy(np.hamming(401)[:400]).float()
    spectrum = torch.fft.rfft(frame[8000 - 200 : 8200] * window, 1024).abs()
    bank = torchaudio.functional.melscale_fbanks(513, 0.0, 8000.0, 128, 16_000)
    expected = (spectrum @ bank + 0.01).log()
    assert (data.log_mel(frame)[50] - expected).abs().max() < 2e-3
    louder = data.log_mel(2 * wave)[150, peak] - mel[150, peak]
    assert louder.item() == pytest.approx(np.log(2), abs=1e-3)  # magnitudes, not powers


def test_crops_and_flips_of_training_and_evaluation(tmp_path):
    y, x = np.mgrid[:64, :96]
    ramp = (20 + 100 * y / 64 + 100 * x / 96)[..., None].repeat(3, 2).astype(np.uint8)
    media.write(tmp_path / "a.mp4", seconds=1.0, size=(96, 64), picture=lambda t: ramp)
    index = data.find_clips(tmp_path)
    y, x = np.mgrid[:32, :32].reshape(2, -1)

    def plane(clip):  # level, slope down and slope to the right
        grey = clip["video"][0].float().mean(-1).flatten().numpy()
        return np.linalg.lstsq(np.stack([np.ones_like(x), y, x], 1), grey, rcond=None)[0]

    still = plane(Clips(index, SMALL)[0, 0, 0])  # the short side is 32
    assert np.abs(still - [20 + 100 / 6, 100 / 32, 100 / 48]).max() < 2
    assert abs(still[1] - 100 / 32) < 0.1
    level, down, right = np.array(
        [plane(Clips(index, SMALL, augment=Augment())[epoch, 0, 0]) for epoch in range(24)]).T
    assert np.abs(down - 100 / 36).max() < 0.1  # 32 of 36, as 224 of 256
    assert np.abs(np.abs(right) - 100 / 54).max() < 0.1 and 4 < (right < 0).sum() < 20
    assert level[right > 0].std() > 5


def test_augmentation_is_the_same_for_all_frames_and_repeats(tmp_path):
    media.write(tmp_path / "a.mp4", times=[0, 1.9], seconds=2.0)
    strong = Augment(jitter=(0.9, 1.33), color=True)
    clips = clips_in(tmp_path, augment=strong, seed=1)
    seen = []
    for epoch in range(8):
        (batch,), (again,) = (list(data.Loader(clips, [[(epoch, 0, 0)]])) for _ in range(2))
        video = batch["video"][0]
        assert video.equal(again["video"][0]) and "color" not in batch
        assert (video.float().std((1, 2, 3)) < 3).all() and (
            video[1:7].float() - video[:1].float()).abs().max() <= 2
        seen.append(video[0].float().mean((0, 1)))
    assert torch.stack(seen).std(0).max() > 5


def test_color_jitter_is_the_recipe_of_each_clip():
    video = torch.randint(0, 256, (40, 2, 16, 16, 3), dtype=torch.uint8)
    with data.seeded(3):
        color = torch.stack([data.draw_color() for _ in range(400)])
    for column, low, high in (1, -32 / 255, 32 / 255), (2, 0.6, 1.4), (3, 0.6, 1.4), (4, -0.2, 0.2):
        assert low <= color[:, column].min() < low + 0.02 * (high - low)
        assert high >= color[:, column].max() > high - 0.02 * (high - low)
    assert 0.74 < color[:, 0].mean() < 0.86 and 0.05 < color[:, 5].mean() < 0.15

    color[0], color[1] = torch.tensor([[0.0, 0.1, 1.4, 1.4, 0.2, 0], [1, 0.1, 1.3, 0.7, 0.2, 1]])
    found = data.color_jitter(video, color[:40])
    assert found.dtype == torch.uint8 and found[0].equal(video[0])
    for clip, result, (jittered, brightness, saturation, contrast, hue, gray) in zip(
        video, found, color.tolist()):
        x = clip.permute(0, 3, 1, 2) / 255.0
        if jittered:
            x = functional.adjust_saturation((x + brightness).clamp(0, 1), saturation)
            x = functional.adjust_hue(functional.adjust_contrast(x, contrast), hue).clamp(0, 1)
        if gray:
            x = functional.rgb_to_grayscale(x, 3)
        assert (x.permute(0, 2, 3, 1) * 255 - result).abs().max() < 0.51


def test_crops_without_jitter_are_cut_and_reach_every_corner():
    video = torch.arange(5 * 6, dtype=torch.uint8).reshape(1, 5, 6, 1).expand(-1, -1, -1, 3)
    corners = set()
    for draw in range(100):
        with data.seeded(draw):
            crop = data.random_crop(video, 4, Augment(flip=False))[0, :, :, 0].int()
        corners.add(int(crop[0, 0]))
        assert crop.equal(crop[0, 0] + torch.arange(4)[:, None] * 6 + torch.arange(4))
    assert corners == {0, 1, 2, 6, 7, 8}
    assert data.center_crop(video, 4)[0, 0, 0, 0] == 1


def test_jitter_scales_height_and_width_independently():
    y, x = np.mgrid[:256, :400]
    video = torch.from_numpy(np.stack([y * 0.9, x * 0.6, 0 * x], -1).astype(np.uint8)[None])
    scales = []
    for draw in range(200):
        with data.seeded(draw):
            crop = data.random_crop(video, 224, Augment(False, (0.9, 1.33)))[0].float().numpy()
        assert crop.shape == (224, 224, 3)
        down, right = np.diff(crop[..., 0].mean(1)), np.diff(crop[..., 1].mean(0))
        scales.append((0.9 / down[5:-5].mean(), 0.6 / right[5:-5].mean()))
    scales = np.array(scales)
    assert (scales > 0.86).all() and (scales < 1.36).all() and np.ptp(scales, 0).min() > 0.38
    assert abs(scales.mean() - 1.115) < 0.03 and abs(np.corrcoef(scales.T)[0, 1]) < 0.2


def test_spec_augment():
    mel, first, widths = torch.rand(100, 32) + 1, set(), [set(), set()]
    for draw in range(400):
        with data.seeded(draw):
            masked = data.spec_augment(mel, Augment(frequency_masks=(1, 8), time_masks=(1, 20)))
        zero = masked == 0
        assert ((masked == mel) | zero).all()
        first.add(zero.all(1).float().argmax().item())
        for axis in 0, 1:
            widths[axis].add(int(zero.all(1 - axis).sum()))
    assert len(first) > 60 and widths == [set(range(21)), set(range(9))]
    with data.seeded(0):
        masked = data.spec_augment(mel, Augment(frequency_masks=(2, 500), time_masks=(4, 48)))
        shifted = data.spec_augment(mel, Augment(time_shift=True))
    assert masked.shape == mel.shape
    assert shifted.sort(0).values.equal(mel.sort(0).values) and not shifted.equal(mel)


def test_random_numbers_are_left_alone_outside():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with data.seeded(1, 2):
        a = torch.rand(3)
    assert torch.rand(3).equal(expected)
    for numbers in (1, 2, 0), (1, 3), (12,):
        with data.seeded(*numbers):
            assert not torch.rand(3).equal(a)


def test_repeated_draws_share_a_window_and_nothing_else(tmp_path, monkeypatch):
    for i in range(3):
        media.write(tmp_path / f"{i}.mp4", seconds=4.0, size=(96, 64))
    strong = Augment(frequency_masks=(1, 16), time_masks=(2, 40), color=True)
    clips = clips_in(tmp_path, augment=strong, seed=2)
    keys = sum(Batches(3, 4, 0, range(6), repeat=2), [])
    assert keys[::2] == [(e, i, 0) for e, i, _ in keys[1::2]]
    assert sorted(keys[:12]) == [(e, i, d) for e in range(2) for i in range(3) for d in range(2)]

    reads, read = [], Clips.read
    monkeypatch.setattr(Clips, "read", lambda *args: (reads.append(1), read(*args))[1])
    together = clips.__getitems__(keys)
    assert len(reads) == 12
    for key, item in zip(keys, together):
        alone = clips[key]
        assert all(item[k].equal(alone[k]) for k in ("video", "audio", "color", "label"))
    starts = {round(float(media.times_of(item["video"])[0]), 1) for item in together[:6:2]}
    assert len(starts) > 1  # clips of an epoch start at different times
    for one, two in zip(together[::2], together[1::2]):
        times = [media.times_of(x["video"]) for x in (one, two)]
        assert np.abs(times[0] - times[1]).max() < 0.02  # the same moments
        assert not one["audio"].equal(two["audio"]) and not one["color"].equal(two["color"])
    assert any(not a["video"].equal(b["video"]) for a, b in zip(together[::2], together[1::2]))


@pytest.mark.parametrize("count, batch, world", [
    (10, 4, 1), (9, 4, 2), (3, 2, 1), (1, 8, 2), (5, 1, 1)])
def test_evaluation_has_each_clip_once(count, batch, world):
    parts = [data.in_order(count, batch, rank, world) for rank in range(world)]
    keys = sum(sum(parts, []), [])
    assert sorted(keys) == [(0, i, 0) for i in range(count)]
    sizes = [len(b) for part in parts for b in part]
    assert max(sizes) - min(sizes) <= 1 and (min(sizes) > 1 or count == 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_of_bad_files_is_an_error_in_one_sentence(tmp_path, workers):
    (tmp_path / "a.mp4").write_bytes(b"")
    clips = clips_in(tmp_path, augment=Augment())
    with pytest.raises(UserError, match="^none of the 1 clips .*; the first: a.mp4: cannot "):
        next(iter(data.Loader(clips, [[(0, 0, 0)]], workers=workers)))


def test_in_evaluation_nothing_takes_the_place_of_a_bad_file(tmp_path, good):
    bad, clips, told = zoo(tmp_path, good), clips_in(tmp_path), []
    loader = data.Loader(clips, data.in_order(len(clips), 2), tell=told.append)
    batches = list(loader)
    assert [clips.name(i) for b in batches for i in b["index"].tolist()] == [
        "a_good.mp4", "m_good.mp4", "z_good.mp4"]
    assert [len(b["video"]) for b in batches] == [len(b["index"]) for b in batches]

    assert 0 < len(batches) < len(loader) and 1 in map(len, (b["index"] for b in batches))
    assert (loader.drawn, loader.unreadable) == (3, len(bad)) and set(loader.bad) == bad
    assert "unreadable, left out: pipe.mp4: not a file" in told and len(told) == len(bad)


# ----------------------------------------------------------------------------------- built-in clips


def test_built_in_clips_are_deterministic():
    window = Window(8, 0.32, 32, 2.56, 32)
    a, b, c = data.Builtin(8, window, 1), data.Builtin(8, window, 1), data.Builtin(8, window, 2)
    one, same, other = a[0, 5, 0], b[3, 5, 1], c[0, 5, 0]

    assert one["video"].equal(same["video"]) and one["audio"].equal(same["audio"])
    assert not one["video"].equal(other["video"]) and not one["audio"].equal(other["audio"])
    assert one["video"].shape == (8, 32, 32, 3) and one["audio"].shape == (256, 32)
    assert one["video"].dtype == torch.uint8 and one["audio"].dtype == torch.float32
    assert one["label"].tolist() == [5] and one["index"] == 5 and a.classes[5] == "striped diamond"
    assert set(data.Builtin(8, window, 1, ["audio"])[0, 5, 0]) == {"audio", "label", "index", "bad"}
    one.clear()  # what is given is not what is kept
    assert a[0, 5, 0].keys() == other.keys()


def scenes(seed, count, **only):
    """The scenes of a seed that are so."""
    made = (data.Scene(seed, i) for i in range(count))
    return [s for s in made if all(getattr(s, k) == v for k, v in only.items())]


def as_another(scene, thing):
    other = copy.copy(scene)
    other.thing = thing
    return other


def test_bayes_rates():
    """Who knows all of a scene but the thing, and compares what comes with each thing's look or
    voice, is right as often as the docstring says: what is there tells, nothing else does."""
    found = []
    for scene in scenes(4, 400):
        others = [as_another(scene, thing) for thing in range(8)]
        look, voice = scene.pictures([1.0], 32), scene.sound(0.1)
        guesses = {  # the first of equals
            "seen": np.argmin([np.abs(o.pictures([1.0], 32) - look * 1.0).sum() for o in others]),
            "heard": np.argmin([np.abs(o.sound(0.1) - voice).sum() for o in others])}
        right = [guesses[sense] == scene.thing for sense in ("seen", "heard")]
        assert right == [getattr(scene, sense) or scene.thing == 0 for sense in ("seen", "heard")]
        found.append([*right, any(right)])
    assert np.abs(np.mean(found, 0) - (0.7375, 0.7375, 0.92125)).max() < 0.05


def test_things_are_equally_many_and_missing_equally_often():
    made = scenes(5, 4000)
    assert np.bincount([s.thing for s in made]).tolist() == [500] * 8
    for thing in range(8):
        senses = np.array([(s.seen, s.heard) for s in made if s.thing == thing])
        assert np.abs(senses.mean(0) - 0.7).max() < 0.08
        assert np.abs((senses[:, 0] & senses[:, 1]).mean() - 0.49) < 0.08


def test_a_bounce_is_heard_where_it_is_seen():
    clear = heard = 0
    for scene in scenes(0, 12, heard=True):
        times = np.arange(0.2, 3.8, 0.01)
        path = scene.position(times)
        turned = np.diff(np.sign(np.diff(path, axis=0)), axis=0).any(1).nonzero()[0] + 1
        bounces = times[turned]

        rough = np.abs(np.diff(scene.sound(4.0)))  # hits are noise: large from sample to sample
        for bounce in bounces:
            if not any(0 < bounce - other < 0.15 for other in bounces):
                at = round(bounce * 16_000)
                clear += 1
                heard += rough[at : at + 480].mean() > 1.3 * rough[at - 640 : at - 160].mean()
    assert heard == clear > 10


def test_height_is_pitch_and_loud_partials_tell_the_thing():
    for scene in scenes(1, 24, heard=True):
        scene.start[:], scene.speed[:] = 0.3, 1e-9  # it stands still: no hits, one pitch
        wave = scene.sound(0.5) / (0.15 * scene.loudness)
        height = 1 - scene.position([0.0])[0, 1]
        pitch = 700 * (10 ** ((data.LOWEST + (data.HIGHEST - data.LOWEST) * height) / 2595) - 1)
        times = np.arange(len(wave)) / 16_000
        levels = [
            2 * np.abs((wave * np.exp(-2j * np.pi * k * pitch * times)).mean())
            for k in range(1, 5)]
        expected = [1.0, *(1.0 if scene.thing >> bit & 1 else data.SOFT for bit in range(3))]
        assert np.abs(np.array(levels) - expected).max() < 0.05


def test_the_thing_is_where_the_scene_says():
    for scene in scenes(1, 16, seen=True):
        nowhere = copy.copy(scene)
        nowhere.seen = False
        scene.thing %= 4  # stripes shift the center of what is bright
        picture = scene.pictures([0.7], 64)[0].astype(float)
        cover = np.abs(picture - nowhere.pictures([0.7], 64)[0]).sum(-1)

        y, x = (np.arange(64) + 0.5) / 64, (np.arange(64) + 0.5) / 64
        center = np.array([(cover.sum(0) * x).sum(), (cover.sum(1) * y).sum()]) / cover.sum()
        assert np.abs(center - scene.position([0.7])[0]).max() < 0.06
