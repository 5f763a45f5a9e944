"""Long tests of what the README promises: python tests/stress.py corpus | kills

corpus  some 300 damaged files: each is used or named, none crashes, hangs or is replaced silently
kills   a training run killed 50 times at random moments, also while it saves: same losses
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import data  # noqa: E402
import media  # noqa: E402


def damaged(folder, per_kind=10, seed=0):
    """Writes damaged variants of good files; returns how many there are."""
    rng = random.Random(seed)
    good = {
        "h264.mp4": dict(), "mpeg4.avi": dict(codec="mpeg4", audio_codec="mp3"),
        "pcm.mkv": dict(audio_codec="pcm_s16le", layout="mono"), "mjpeg.mkv": dict(codec="mjpeg"),
        "odd.mp4": dict(size=(66, 50), fps=7, rate=8_000, layout="mono"),
        "many.mkv": dict(layout="7.1", rate=48_000, audio_codec="pcm_s16le"),
        "late.mp4": dict(audio_start=1.0), "short_sound.mp4": dict(audio_seconds=0.7),
        "long_sound.mp4": dict(audio_seconds=6.0), "one_frame.mp4": dict(times=[0.0]),
        "shifted.mkv": dict(start=3.0), "mute.mp4": dict(audio=False),
        "blind.mp4": dict(video=False)}
    contents = {}
    for name, settings in good.items():
        if settings.get("codec") == "mjpeg":
            settings = settings | {"audio_codec": "pcm_s16le"}
        contents[name] = media.write(folder / name, seconds=2.5, **settings).read_bytes()
    for name, content in list(contents.items())[:6]:
        stem, suffix = name.split(".")
        for tenth in range(1, 10):
            (folder / f"{stem}_cut{tenth}.{suffix}").write_bytes(
                content[: len(content) * tenth // 10])
        for k in range(3 * per_kind):
            flipped = bytearray(content)
            for _ in range(rng.choice((1, 20, 400))):
                flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
            (folder / f"{stem}_flip{k}.{suffix}").write_bytes(flipped)
        for k in range(per_kind):
            zeroed = bytearray(content)
            at = rng.randrange(len(zeroed))
            zeroed[at : at + len(zeroed) // 5] = bytes(len(zeroed[at : at + len(zeroed) // 5]))
            (folder / f"{stem}_zero{k}.{suffix}").write_bytes(zeroed)
        (folder / f"{stem}_renamed.mov").write_bytes(content)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("no video")
    (folder / "list.mp4").write_text("ffconcat version 1.0\nfile h264.mp4\n")
    os.mkfifo(folder / "pipe.mp4")
    (folder / "folder.mp4").mkdir()
    return len(data.find_clips(folder))


def corpus(per_kind=10):
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        count = damaged(folder, per_kind)
        index = data.find_clips(folder)
        window = data.Window(frames=4, step=0.16, size=32, seconds=1.28, mels=32)
        train = data.Clips(index, window, augment=data.Augment())
        evaluation = data.Clips(index, window)
        slowest, replaced, bad = 0.0, 0, set()
        for i in range(count):
            start = time.monotonic()
            clip = train[0, i]
            slowest = max(slowest, time.monotonic() - start)
            assert ("bad" in clip and clip["index"] == i) or clip["bad"][0][0] == index.name(i)
            assert clip["audio"].isfinite().all() and clip["video"].shape == (4, 32, 32, 3)
            if clip["index"] != i:
                replaced += 1
                assert index.name(i) in dict(clip["bad"])
            assert train[0, i]["video"].equal(clip["video"])  # the same substitute again
            sample = evaluation[0, i]
            assert ("video" in sample) != bool(sample["bad"])
            if sample["bad"]:
                bad.add(index.name(i))
        said = {index.name(i) for i in range(count) if data.examine(i, evaluation)[0] == "bad"}
        assert said == bad, said ^ bad
        print(
            f"{count} files: {count - len(bad)} used, {len(bad)} bad in evaluation and in check, "
            f"{replaced} replaced in training; the slowest took {slowest:.2f} s")


def losses(out):
    lines = [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]
    return {x["step"]: x["loss"] for x in lines if "loss" in x}


def kills(times=50):
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        run = [
            sys.executable, str(ROOT / "train_pretrain.py"), "--clips", "64", "--batch", "8",
            "--epochs", str(10 * times), "--log-every", "1", "--save-every", "0.125",
            "--eval-every", "0", "--device", "cpu", "--out"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        killed = saving = 0
        while killed < times:
            before = (folder / "cut" / "last.pt").exists()
            process = subprocess.Popen([*run, str(folder / "cut")], **quiet)
            lines = len(losses(folder / "cut")) if before else 0
            while process.poll() is None and (
                not (folder / "cut" / "log.jsonl").exists()
                or len(losses(folder / "cut")) < lines + 2):
                time.sleep(0.01)
            time.sleep(rng.random() * 0.5)
            while (
                rng.random() < 0.5
                and process.poll() is None
                and not (folder / "cut" / "last.pt.partial").exists()):
                time.sleep(0.0005)  # every second time: during a save
            saving += (folder / "cut" / "last.pt.partial").exists()
            assert process.poll() is None, "the run ended before it was killed"
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
        reached = max(losses(folder / "cut"))
        process = subprocess.Popen([*run, str(folder / "whole")], **quiet)
        while (
            not (folder / "whole" / "log.jsonl").exists()
            or max(losses(folder / "whole"), default=0) < reached):
            assert process.poll() is None
            time.sleep(0.1)
        process.kill()
        process.wait()
        whole, cut = losses(folder / "whole"), losses(folder / "cut")
        assert all(whole[step] == loss for step, loss in cut.items())
        print(
            f"killed {killed} times, {saving} of them during a save; {len(cut)} steps with the "
            "losses of a whole run"
        )


if __name__ == "__main__":
    {"corpus": corpus, "kills": kills}[sys.argv[1] if len(sys.argv) > 1 else "corpus"]()
