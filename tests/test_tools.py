"""The tools that people run beside training: tools/check_clips.py and tools/prepare_clips.py."""

import csv
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import av
import numpy as np
import pytest

import data
import media
from data import Clips, UserError, Window

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import check_clips  # noqa: E402
import prepare_clips  # noqa: E402

TOOLS = {"check": check_clips, "prepare": prepare_clips}
SMALL = Window(frames=8, step=0.16, size=32, seconds=1.28, mels=32)


def gray(time):
    """Return a picture that does not show the time."""
    return np.full((48, 64, 3), 99, np.uint8)



@pytest.fixture
def run(monkeypatch, capsys):
    """Run a tool in this process: -> its exit status, what it prints."""

    def run(tool, *args):
        monkeypatch.setattr(sys, "argv", [f"{tool}_clips.py", *map(str, args), "--workers", "0"])
        return TOOLS[tool].main(), capsys.readouterr().out

    return run


def start(tool, *args, **how):
    """Start a tool as a user would, from any folder."""
    return subprocess.Popen(
        [sys.executable, ROOT / "tools" / f"{tool}_clips.py", *map(str, args)], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)


def lines_of(out):
    """Return {file name: (verdict, reasons)} of the printed lines."""
    found = re.findall(r"^(bad|warning): ([^:]*): (.*)", out, re.MULTILINE)
    return {name: (verdict, reasons) for verdict, name, reasons in found}


def sound_of(path, start, stop):
    with data.open_media(path, ("audio",)) as m:
        return m.decode_audio(start, stop)


# ------------------------------------------------------------------------------------------- check


def test_check_names_what_training_does_with_each_clip(tmp_path, run):
    good = media.write(tmp_path / "good.mp4", seconds=9.0).read_bytes()
    media.write(tmp_path / "short.mp4", seconds=0.5)
    media.write(tmp_path / "silent.mp4", seconds=9.0, clicks=())
    media.write(tmp_path / "still.mp4", seconds=9.0, picture=gray)
    media.write(tmp_path / "gap.mp4", seconds=9.0, gaps=[(5.0, 0.5)])
    media.write(tmp_path / "mute.mp4", audio=False)
    media.write(tmp_path / "blind.mp4", video=False)
    for name, content in ("text", b"no video"), ("empty", b""), ("cut", good[: len(good) // 2]):
        (tmp_path / f"{name}.mp4").write_bytes(content)

    code, out = run("check", tmp_path, "--seconds", 1)
    said = lines_of(out)
    bad = {name for name, (verdict, _) in said.items() if verdict == "bad"}
    assert code == 1 and bad == {f"{n}.mp4" for n in ("mute", "blind", "text", "empty", "cut")}
    for name, words in (
        ("short", "shorter than a window (0."), ("silent", "silent"),
        ("still", "still picture"), ("gap", "damaged after its first window: a gap in the sound")):
        assert said[f"{name}.mp4"][0] == "warning" and words in said[f"{name}.mp4"][1]
    assert "good.mp4" not in said and "10 clips: 1 fine, 4 with a warning, 5 bad" in out


@pytest.mark.parametrize("suffix, codec, audio_codec", [
    ("mkv", "libx264", "pcm_s16le"), ("webm", "libvpx", "libopus"), ("mp4", "libx264", "aac")])
def test_check_compares_the_tracks_with_their_stated_end(tmp_path, run, suffix, codec, audio_codec):
    how = dict(seconds=8.0, codec=codec, audio_codec=audio_codec, rate=48_000)
    media.write(tmp_path / f"whole.{suffix}", **how)
    media.write(tmp_path / f"late.{suffix}", audio_start=1.0, audio_seconds=7.0, **how)
    media.write(tmp_path / f"short_sound.{suffix}", audio_seconds=5.0, **how)
    if suffix != "mp4":  # its index is at the end
        content = (tmp_path / f"whole.{suffix}").read_bytes()
        (tmp_path / f"truncated.{suffix}").write_bytes(content[: len(content) * 6 // 10])

    said = lines_of(run("check", tmp_path, "--seconds", 1)[1])
    assert f"whole.{suffix}" not in said
    for name, words in (
        ("late", r"picture from 0\.00 to 8\.\d+ s, sound from (1\.00|0\.98) to 8\.\d+ s"),
        ("short_sound", r"picture from 0\.00 to 8\.\d+ s, sound from 0\.00 to 5\.\d+ s")):
        verdict, reasons = said[f"{name}.{suffix}"]
        assert verdict == "warning" and re.search(words, reasons)
    if suffix != "mp4":
        verdict, reasons = said[f"truncated.{suffix}"]
        early = float(re.search(r", (\d\.\d+) s before its stated end", reasons)[1])
        assert verdict == "warning" and 1.5 < early < 6


def test_check_prints_the_normalization(tmp_path, run):
    rng = np.random.default_rng(0)
    for k in range(3):
        noise = rng.normal(0, 0.1 + 0.1 * k, 9 * 44_100).astype(np.float32)
        media.write(tmp_path / f"{k}.mp4", seconds=9.0, wave=noise,
                    picture=lambda t: np.full((48, 64, 3), rng.integers(256), np.uint8))
    (tmp_path / "bad.mp4").write_bytes(b"")
    code, out = run("check", tmp_path)
    clips = [Clips(data.find_clips(tmp_path), Window()).read(i) for i in range(3)]
    expected = []
    for m in "video", "audio":
        x = np.stack([np.asarray(clip[m], np.float64) for clip in clips])
        x = x / 127.5 - 1 if m == "video" else x
        expected += [x.mean(), x.std()]
    numbers = re.search(r"of 3 clips: --norm (.*)$", out, re.MULTILINE)[1].split()
    assert code == 1 and np.allclose([float(x) for x in numbers], expected, rtol=1e-3)

    sound = run("check", tmp_path / "0.mp4", "--modalities", "audio")[1]
    assert re.search(r"--norm 0 1 [\d.]+ [\d.]+$", sound, re.MULTILINE)


def test_check_reads_the_segments_of_a_list(tmp_path, run):
    media.write(tmp_path / "clips" / "a.mp4", seconds=6.0)
    (tmp_path / "list.csv").write_text("path,start,end,label\na.mp4,0,3,x\na.mp4,2,2.5,y\n")
    _, out = run("check", tmp_path / "clips", "--clips", tmp_path / "list.csv", "--seconds", 2)
    assert "2 clips: 1 fine, 1 with a warning" in out
    assert "warning: a.mp4 [2.00-2.50 s]: shorter than a window (0.50 s)" in out


# ----------------------------------------------------------------------------------------- prepare


def test_a_copy_shows_and_sounds_the_same(tmp_path, run):
    source, target = tmp_path / "source", tmp_path / "target"
    raw = media.write(source / "cat" / "a.mp4", seconds=5.0, size=(640, 360), audio_start=0.2)
    (source / "bad.mp4").write_bytes(b"nothing")
    (source / "cut.mp4").write_bytes(raw.read_bytes()[: raw.stat().st_size // 2])
    made = set()
    for _ in range(2):  # an existing copy is kept
        code, out = run("prepare", source, target)
        assert code == 1 and {*lines_of(out)} == {"bad.mp4", "cut.mp4"} and "1 of 3 clips" in out
        made.add((target / "cat" / "a.mkv").stat().st_mtime_ns)
    assert len(made) == 1 and sorted(p.name for p in target.rglob("*")) == ["a.mkv", "cat"]

    window = Window(frames=8, step=0.16, size=224, seconds=4.0)
    with data.open_media(raw) as old, data.open_media(target / "cat" / "a.mkv") as new:
        assert (new.video.height, new.video.width) == (256, 456)
        for begin in 0.32, 0.48, 2.4:
            shown = [
                data.read_video(m, begin, window, lambda *_: (256, 456)).astype(float)
                for m in (old, new)]
            error = np.square(shown[0] - shown[1]).mean()
            assert 10 * np.log10(255**2 / max(error, 1e-9)) > 38
        heard = [media.clicks_of(data.read_audio(m, 0.5, 4.0)) for m in (old, new)]
        assert np.abs(heard[0] - heard[1]).max() < 0.003


@pytest.mark.parametrize("layout, channels", [("mono", 1), ("stereo", 2), ("5.1", 6)])
@pytest.mark.parametrize("gap, late", [(0.0, 0.0), (0.3, 0.0), (0.0, 0.7), (0.15, 0.4)])
def test_a_copy_keeps_level_gaps_and_late_starts(tmp_path, run, layout, channels, gap, late):
    times = np.arange(4 * 48_000) / 48_000
    wave = 0.9 * np.sin(2 * np.pi * (200 * times + 150 * times**2))
    raw = media.write(
        tmp_path / "source" / "a.mkv", seconds=4.0, rate=48_000, audio_codec="pcm_s16le",
        layout=layout, gaps=[(1.0, gap)] * bool(gap), audio_start=late,
        wave=np.repeat(wave[None], channels, 0))
    assert run("prepare", tmp_path / "source", tmp_path / "target")[0] == 0
    old, new = (sound_of(p, 0.0, 3.9) for p in (raw, tmp_path / "target" / "a.mkv"))

    missing = np.isnan(old), np.isnan(new)
    assert (missing[0] != missing[1]).sum() <= 3 * 16  # 1 ms at each edge
    assert abs(missing[1].sum() / 16_000 - gap - late) < 0.005
    error = min(np.nanmean(np.square(np.roll(new, k) - old)[50:-50]) for k in range(-16, 17))
    assert error < 1e-4 * np.nanmean(np.square(old))
    assert np.isclose(np.nanmax(new), 0.9, rtol=0.02)


def test_a_long_copy_has_picture_and_sound_of_a_time_side_by_side(tmp_path, run):
    media.write(tmp_path / "source" / "a.mp4", seconds=30.0, clicks=(1.0, 29.0), picture=gray)
    assert run("prepare", tmp_path / "source", tmp_path / "target")[0] == 0
    with av.open(str(tmp_path / "target" / "a.mkv")) as copy:
        times = [float(p.pts * p.time_base) for p in copy.demux() if p.pts is not None]
    assert np.diff(times).min() > -0.2
    clicks = media.clicks_of(sound_of(tmp_path / "target" / "a.mkv", 28, 30))
    assert np.allclose(clicks, 1, atol=0.01)


@pytest.mark.parametrize("name, codec, how", [
    ("a.webm", "libvpx", dict(length=False)), ("a.mkv", "libx264", dict(length=False)),
    ("a.mkv", "libx264", dict(times=[0.0, 1.0])), ("a.mkv", "libx264", dict(start=3.0)),
    ("a.mp4", "libx264", dict(times=np.arange(1, 4, 0.04)))])
def test_a_copy_is_as_long_as_its_source(tmp_path, run, name, codec, how):
    audio_codec = "libopus" if codec == "libvpx" else "pcm_s16le"
    raw = media.write(tmp_path / "source" / name, seconds=4.0, codec=codec, rate=48_000,
                      audio_codec=audio_codec, **how)
    assert run("prepare", tmp_path / "source", tmp_path / "target")[0] == 0
    window = Window(frames=15, step=0.16, size=32)
    with data.open_media(raw) as old, data.open_media(tmp_path / "target" / "a.mkv") as new:
        assert abs(old.begin - new.begin) < 0.05 and abs(old.end - new.end) < 0.09
        shown = [
            media.times_of(data.read_video(m, old.begin + 0.4, window, lambda *size: size))
            for m in (old, new)]
        assert np.abs(shown[0] - shown[1]).max() < 0.09


def test_a_damaged_jpeg_in_a_copy_is_bad(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    picture = noise.repeat(4, 0).repeat(4, 1)
    media.write(tmp_path / "source" / "a.mp4", seconds=2.0, picture=lambda t: picture)
    index = data.find_clips(tmp_path / "source")
    size, coarse = (prepare_clips.Prepare(index, tmp_path / f"{q}", q)[0][1] for q in (5, 31))
    assert coarse < 0.9 * size
    clips = Clips(data.find_clips(tmp_path / "5"), SMALL)
    whole = clips[0, 0, 0]
    assert not whole["bad"]
    path = tmp_path / "5" / "a.mkv"
    content = path.read_bytes()
    starts = [m.end() for m in re.finditer(b"\xff\xda", content)]  # of the scans of JPEGs

    for begin in starts[:9:2]:  # one of 8 frames, of every second picture of 25
        path.write_bytes(content[:begin] + bytes(100) + content[begin + 100 :])
        assert clips[0, 0, 0]["bad"]
        assert check_clips.Check(clips)[0][0] == "bad"
    path.write_bytes(content[: starts[20]] + bytes(100) + content[starts[20] + 100 :])
    assert not clips[0, 0, 0]["bad"] and clips[0, 0, 0]["video"].equal(whole["video"])
    assert check_clips.Check(clips)[0][0] == "warning"  # damaged outside the window


def test_a_list_is_rewritten_for_the_copies(tmp_path, run):
    source, target, listed = tmp_path / "source", tmp_path / "target", tmp_path / "mine.csv"
    media.write(source / "sub" / "a.mp4", seconds=6.0)
    media.write(source / "b.mp4", seconds=2.0)
    (source / "bad.mp4").write_bytes(b"nothing")
    listed.write_text(
        "path,start,end,split,label\nsub/a.mp4,2,4.5,train,x\nsub/a.mp4,0,2,val,y\n"
        "b.mp4,,,train,y\nbad.mp4,,,train,x\nb.mp4,,,val,x\n")
    (tmp_path / "mine.classes.csv").write_text("column,class\nlabel,x\nlabel,y\n")
    code, out = run("prepare", source, target, "--clips", listed)
    assert code == 1 and "3 of 4 clips" in out

    with open(target / "clips.csv", newline="") as lines:
        rows = [tuple(row.values()) for row in csv.DictReader(lines)]
    assert rows == [
        (os.path.join("sub", "a_2000_4500.mkv"), "", "", "train", "x"),
        (os.path.join("sub", "a_0_2000.mkv"), "", "", "val", "y"), ("b.mkv", "", "", "train", "y"),
        ("b.mkv", "", "", "val", "x")]
    assert "label,y" in (target / "clips.classes.csv").read_text()

    index = data.read_clips(target / "clips.csv", target)
    assert [index.classes[k] for k in index.labels[:, 0]] == ["x", "y", "y", "x"]
    shown = media.times_of(Clips(index, SMALL).read(0)["video"])
    assert abs(shown[0] - 2.0) < 0.05


# ------------------------------------------------------------------------------- mistakes and stops


@pytest.mark.parametrize("args, words", [
    ("check nowhere", "there is no folder"), ("check .", "no video files"),
    ("prepare . ../there", "no video files"), ("check . --clips none.csv", "cannot read"),
    ("prepare ../twins ../there", "x/a.mp4 and x/a.webm would become one file"),
    ("prepare ../twins ../twins/small", "overlap"), ("prepare ../twins ..", "overlap"),
    ("prepare ../twins/x/a.mp4 ../twins/x", "overlap"), ("prepare ../twins ../link/x", "overlap"),
    ("prepare ../one ../one/a.mp4/there", "overlap"),
    ("prepare ../one readme.txt", "readme.txt.* cannot be written: .*")])
def test_mistakes_end_in_a_sentence(tmp_path, args, words, monkeypatch, run):
    for name in "twins/x/a.mp4", "twins/x/a.webm", "one/a.mp4", "here/readme.txt":
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "twins")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=words):
        run(*args.split())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_no_bad_clip(tmp_path, run):
    media.write(tmp_path / "source" / "a.mp4", seconds=1.0)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "a.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match="a.tmp cannot be written: .*No space left"):
        run("prepare", tmp_path / "source", tmp_path / "small")


def test_names_that_are_long_or_not_utf8(tmp_path, run):
    source, target = tmp_path / "source", tmp_path / "target"
    path = media.write(source / "a.mp4", seconds=3.0)
    for name in b"\xff\xe9.mp4", b"x" * 250 + b".mp4":
        os.link(path, source / os.fsdecode(name))
    (source / os.fsdecode(b"bad\xff.mp4")).write_bytes(b"")
    (tmp_path / "list.csv").write_bytes(
        b"path,start,end\na.mp4,,\n\xff\xe9.mp4,,\n" + b"x" * 250 + b".mp4,0,1\nbad\xff.mp4,,\n")

    process = start("prepare", source, target, "--clips", tmp_path / "list.csv", cwd="/",
                    errors="surrogateescape", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    out, err = process.communicate(timeout=200)
    assert process.returncode == 1 and "Traceback" not in err, err
    assert os.fsdecode(b"bad: bad\xff.mp4: ") in out
    assert "x.mp4 [0.00-1.00 s]: the name of its copy would be too long" in out
    assert sorted(os.listdir(os.fsencode(target))) == [b"a.mkv", b"clips.csv", b"\xff\xe9.mkv"]
    assert (target / "clips.csv").read_bytes().split() == [
        b"path,start,end", b"a.mkv,,", b"\xff\xe9.mkv,,"]


@pytest.mark.parametrize("tool", TOOLS)
def test_help_and_a_reader_that_leaves(tmp_path, tool, run, capsys):
    with pytest.raises(SystemExit):
        run(tool, "--help")
    assert f"python tools/{tool}_clips.py clips/" in capsys.readouterr().out

    media.write(tmp_path / "clips" / "a.mp4", seconds=0.5)
    process = start(tool, "clips", *["target"] * (tool == "prepare"), cwd=tmp_path)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1


def test_ctrl_c_ends_the_workers_and_leaves_no_part_of_a_file(tmp_path):
    path = media.write(tmp_path / "clips" / "0.mp4", seconds=20.0, picture=gray)
    for k in range(1, 300):
        os.link(path, tmp_path / "clips" / f"{k}.mp4")
    target = tmp_path / "target"
    process = start(
        "prepare", tmp_path / "clips", target, "--workers", 2, start_new_session=True)
    while not list(target.glob("*.mkv")):
        assert process.poll() is None
        time.sleep(0.1)

    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1 and err == "stopped\n"
    assert {path.suffix for path in target.iterdir()} == {".mkv"}
