"""Long tests of what the README promises: python tests/stress.py corpus | kills | memory | index

corpus  300 damaged files: each is used or reported, none crashes, hangs or is replaced silently
kills   stop runs 52 times at random moments, also while they save: the losses stay the same
memory  20,000 clips, half of them damaged, in four workers: their memory does not grow
index   2 million clips (index csv | audioset | vggsound | epic): how long it takes to list and read
        them and what it costs, also in four workers
"""

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")]
import torch  # noqa: E402

import check_clips  # noqa: E402
import data  # noqa: E402
import media  # noqa: E402


GOOD = {  # files of many kinds: settings of media.write
    "h264.mp4": dict(), "mpeg4.avi": dict(codec="mpeg4", audio_codec="mp3"),
    "pcm.mkv": dict(audio_codec="pcm_s16le", layout="mono"),
    "mjpeg.mkv": dict(codec="mjpeg", audio_codec="pcm_s16le"),
    "odd.mp4": dict(size=(66, 50), fps=7, rate=8_000, layout="mono"),
    "many.mkv": dict(layout="7.1", rate=48_000, audio_codec="pcm_s16le"),
    "late.mp4": dict(audio_start=1.0), "short_sound.mp4": dict(audio_seconds=0.7),
    "long_sound.mp4": dict(audio_seconds=6.0), "one_frame.mp4": dict(times=[0.0]),
    "shifted.mkv": dict(start=3.0), "4k.mp4": dict(size=(3840, 2160), times=[0.0, 0.5]),
    "no_end.mkv": dict(times=[0.0, 2.4]), "mute.mp4": dict(audio=False),
    "blind.mp4": dict(video=False)}


def damaged(folder, per_kind=10, seed=0):
    """Write damaged variants of good files; return how many clips there are."""
    rng = random.Random(seed)
    files = {
        name: media.write(folder / name, seconds=2.5, **settings).read_bytes()
        for name, settings in GOOD.items()}

    for name in list(GOOD)[:6]:
        (stem, suffix), content = name.split("."), files[name]
        size, fifth = len(content), len(content) // 5
        for tenth in range(1, 10):
            files[f"{stem}_cut{tenth}.{suffix}"] = content[: size * tenth // 10]

        for k in range(3 * per_kind):
            flipped = bytearray(content)
            for _ in range(rng.choice((1, 20, 400))):
                flipped[rng.randrange(size)] ^= 1 << rng.randrange(8)
            files[f"{stem}_flip{k}.{suffix}"] = flipped
        for k in range(per_kind):
            at = rng.randrange(size)
            zeroed = content[:at] + bytes(fifth) + content[at + fifth :]
            files[f"{stem}_zero{k}.{suffix}"] = zeroed[:size]
        files[f"{stem}_renamed.mov"] = content

    files |= {"empty.mp4": b"", "locked.mp4": files["h264.mp4"], "text.mp4": b"no video"}
    files["list.mp4"] = b"ffconcat version 1.0\nfile h264.mp4\n"
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "locked.mp4").chmod(0)
    os.mkfifo(folder / "pipe.mp4")
    (folder / "folder.mp4").mkdir()
    return len(data.find_clips(folder))


SMALL = data.Window(frames=4, step=0.16, size=32, seconds=1.28, mels=32)


def corpus(per_kind=10):
    """Read each damaged file in training, in evaluation and by check_clips."""
    with tempfile.TemporaryDirectory() as folder:
        count = damaged(pathlib.Path(folder), per_kind)
        index = data.find_clips(folder)
        train = data.Clips(index, SMALL, augment=data.Augment())
        evaluation = data.Clips(index, SMALL)
        slowest, replaced, bad = 0.0, 0, set()

        for i, name in enumerate(map(index.name, range(count))):
            start = time.monotonic()
            clip = train[0, i, 0]
            slowest = max(slowest, time.monotonic() - start)
            assert clip["audio"].isfinite().all() and clip["video"].shape == (4, 32, 32, 3)
            assert train[0, i, 0]["video"].equal(clip["video"])  # the same substitute again
            assert (name in dict(clip["bad"])) == (clip["index"] != i)
            replaced += clip["index"] != i

            sample = evaluation[0, i, 0]
            assert ("video" in sample) != bool(sample["bad"])
            bad |= {name} if sample["bad"] else set()

        check = check_clips.Check(evaluation)
        reported = {index.name(i) for i in range(count) if check[i][0] == "bad"}
        assert reported == bad, reported ^ bad
        print(
            f"{count} files: {count - len(bad)} used, {len(bad)} bad in evaluation and check, "
            f"{replaced} replaced in training; the slowest took {slowest:.2f} s")


def losses(out):
    """Return {step: loss} of the log of a run."""
    log = out / "log.jsonl"
    lines = [json.loads(x) for x in log.read_text().splitlines()] if log.exists() else []
    return {x["step"]: x["loss"] for x in lines if "loss" in x}


def children(process):
    """Return the ids of the processes that a process has started."""
    listed = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(x) for x in listed.read_text().split()] if listed.exists() else []


def start_run(script, flags, processes, out):
    many = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [
            sys.executable, *(many if processes > 1 else []), str(ROOT / f"{script}.py"), *flags,
            "--epochs", "400", "--batch", "8", "--log-every", "1", "--save-every", "0",
            "--eval-every", "400", "--device", "cpu", "--out", str(out)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"})


def interrupted(case, out, times, rng):
    """Start a run and stop it at a random moment, `times` times; return how often it was saving."""
    saving = 0
    for _ in range(times):
        before = len(losses(out))
        process = start_run(*case, out)
        while process.poll() is None and len(losses(out)) < before + 2:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.5)
        during = rng.random() < 0.5  # every second time: during a save
        while during and process.poll() is None and not (out / "last.pt.partial").exists():
            time.sleep(0.0005)
        saving += (out / "last.pt.partial").exists()
        assert process.poll() is None, "the run ended before it was stopped"
        number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        below = children(process)  # data workers, or what torchrun has started
        if case[2] > 1 or (below and rng.random() < 0.3):
            os.kill(rng.choice(below), number if case[2] > 1 else signal.SIGKILL)
        else:
            process.send_signal(number)
        process.wait(120)
    return saving


def kills(times=52):
    """Compare the losses of runs that are stopped and resumed with those of whole runs."""
    rng = random.Random(0)
    pretrain = ["--num-clips", "64"]
    finetune = ["--per-class", "4", "--test-clips", "16", "--mixup", "0.5", "0.5", "0.5"]
    finetune += ["--drop-path", "0.2"]
    cases = {
        "pretraining": ("train_pretrain", pretrain, 1),
        "pretraining, workers": ("train_pretrain", [*pretrain, "--workers", "2"], 1),
        "pretraining, 2 processes": ("train_pretrain", [*pretrain, "--micro-batch", "2"], 2),
        "finetuning, accumulation": ("train_finetune", [*finetune, "--micro-batch", "4"], 1),
        "finetuning, 2 processes": ("train_finetune", finetune, 2)}
    with tempfile.TemporaryDirectory() as folder:
        for k, (name, case) in enumerate(cases.items()):
            cut, whole = (pathlib.Path(folder, f"{kind}{k}") for kind in ("cut", "whole"))
            count = times * (k + 1) // len(cases) - times * k // len(cases)
            saving = interrupted(case, cut, count, rng)
            reached = max(losses(cut))
            process = start_run(*case, whole)
            while max(losses(whole), default=0) < reached:
                assert process.poll() is None
                time.sleep(0.1)
            process.terminate()
            process.wait(120)
            expected = losses(whole)
            assert all(expected[step] == loss for step, loss in losses(cut).items())
            print(
                f"{name}: stopped {count} times, {saving} of them during a save; "
                f"{len(losses(cut))} steps with the losses of a whole run", flush=True)


def memory_of(pids):
    """Return the memory of processes, MB; shared memory is divided among its users."""
    lines = (
        line for pid in pids
        for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines())
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def load(clips, count):
    """Yield batches as four workers make them."""
    batches = data.batch_keys(len(clips), 20, 0, range(count // 20))
    return data.Workers.__iter__(data.Loader(clips, batches, "cpu", 4))


class Heap(ctypes.Structure):
    """mallinfo2 of glibc: [4] and [7] are bytes in use, [8] bytes that are kept for reuse."""

    _fields_ = [("sizes", ctypes.c_size_t * 10)]


class Watched(data.Clips):
    """Clips whose workers write a row each to `held`: bytes in use, Python's blocks, open files,
    bytes that malloc keeps."""

    held = torch.zeros(4, 4, dtype=torch.int64).share_memory_()

    def __getitems__(self, keys):
        gc.collect()  # otherwise garbage that is not yet collected counts as a leak
        mallinfo = ctypes.CDLL(None).mallinfo2
        mallinfo.restype = Heap
        heap = mallinfo().sizes
        files = len(os.listdir("/proc/self/fd"))

        row = torch.utils.data.get_worker_info().id
        self.held[row] = torch.tensor(
            [heap[4] + heap[7], sys.getallocatedblocks(), files, heap[8]])
        return super().__getitems__(keys)


def memory(count=20_000):
    """Measure what four workers hold while they read `count` clips.

    Another process makes the files: if a process has encoded large pictures before it forks its
    workers, their malloc keeps more and more freed memory, without a leak.
    """
    held, resident = [], []
    with tempfile.TemporaryDirectory() as folder:
        maker = multiprocessing.get_context("spawn").Process(
            target=damaged, args=(pathlib.Path(folder),))
        maker.start()
        maker.join()
        clips = Watched(data.find_clips(folder), SMALL, augment=data.Augment())
        batches = load(clips, count)
        pids = [w.pid for w in batches._workers]

        print(f"{len(clips)} files, half of them bad; four workers hold:")
        for k, _ in enumerate(batches, start=1):
            if k % (count // 400) == 0 and k < count // 20 - 8:  # while all workers live
                held.append(clips.held.sum(0))
                used, blocks, files, kept = held[-1].tolist()
                resident.append(memory_of(pids))
                print(
                    f"  after {20 * k:6d} clips {used / 1e6:.2f} MB, {blocks} blocks, "
                    f"{files} files; {kept / 1e6:.0f} MB kept by malloc, "
                    f"{resident[-1]:.0f} MB resident", flush=True)

    first = len(held) // 3  # by then, caches are filled
    grown = (held[-1] - held[first]) / (count / 20 * (len(held) - 1 - first))
    print("a clip adds {:.1f} bytes, {:.2f} blocks, {:.4f} files".format(*grown.tolist()))
    assert (grown[:3] < torch.tensor([100, 1, 0.01])).all()
    # Up to 64 MB that are free at the end of its heap, glibc does not give back.
    assert max(h[3] for h in held) - held[0][3] < 4 * 64e6
    early = resident[1]  # after a tenth of the clips
    assert resident[-1] < 1.1 * early, (early, resident[-1])


LISTS = {  # rows of lists of clips in 1,000 files: row k -> its line
    "csv": lambda k: f"v{k % 1000:04d}.mp4,0,{2 + k % 7 / 100},train,label {k % 309}",
    "audioset": lambda k: (
        f"v{k % 1000:04d}, {k // 1000}.000, {k // 1000 + 10}.000, "
        f'"{MIDS[k % 527]},{MIDS[k % 523]}"'),
    "vggsound": lambda k: f'v{k % 1000:04d},{k // 1000},"label, {k % 309}",train',
    "epic": lambda k: (
        f"v_{k},P01,v{k % 1000:04d},00:00:01.1,00:{k // 60000:02d}:{k // 1000 % 60:02d}.00,"
        f"00:{k // 60000:02d}:{k // 1000 % 60:02d}.90,1,9,take it,take,{k % 97},cup,{k % 300},x,x")}
MIDS = [f"/m/{k:05x}" for k in range(527)]
HEADERS = {
    "csv": "path,start,end,split,label\n", "epic": (
        "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,"
        "start_frame,stop_frame,narration,verb,verb_class,noun,noun_class,all_nouns,"
        "all_noun_classes\n")}


def index(name="csv", rows=2_000_000):
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        file = media.write(folder / "clips" / "v0000.mp4", seconds=2.5)
        for i in range(1, 1000):
            os.link(file, folder / "clips" / f"v{i:04d}.mp4")
        (folder / "class_labels_indices.csv").write_text(
            "index,mid,display_name\n" + "".join(f"{k},{m},{m}\n" for k, m in enumerate(MIDS)))
        with open(folder / "list.csv", "w") as out:
            out.write(HEADERS.get(name, ""))
            out.writelines(LISTS[name](k) + "\n" for k in range(rows))

        listed = folder / "list.csv"
        if name != "csv":
            tool, start = str(ROOT / "tools/list_clips.py"), time.monotonic()
            listed = folder / "clips.csv"
            subprocess.run(
                [sys.executable, tool, name, folder / "list.csv", folder / "clips", "--out", listed],
                check=True)
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
            print(f"{name}: listed in {time.monotonic() - start:.1f} s with {peak:.0f} MB")

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        start, cpu = time.monotonic(), time.process_time()
        clips = data.read_clips(listed, folder / "clips")
        seconds, cpu = time.monotonic() - start, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
        assert len(clips) == rows

        batches = load(data.Clips(clips, SMALL, augment=data.Augment()), 4000)
        before = memory_of([w.pid for w in batches._workers])
        for _ in range(100 if name == "csv" else 0):  # the others' segments are beyond the files
            next(batches)
        grown = memory_of([w.pid for w in batches._workers]) - before
        held = sum(x.nbytes for x in vars(clips).values() if hasattr(x, "nbytes"))
        print(
            f"{name}: {rows} rows read in {seconds:.1f} s ({cpu:.1f} of a core) with "
            f"{peak:.0f} MB meanwhile; the index holds {held / 1e6:.0f} MB; "
            f"{len(batches._workers)} workers grew by {grown:.0f} MB while they read 2,000 clips")


if __name__ == "__main__":
    tests = {"corpus": corpus, "kills": kills, "memory": memory, "index": index}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("test", nargs="?", default="corpus", choices=tests)
    parser.add_argument("how", nargs="*", help="a number, or for index a list")
    args = parser.parse_args()
    tests[args.test](*(int(x) if x.isdigit() else x for x in args.how))
