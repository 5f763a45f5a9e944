"""The scripts, run for real with tiny settings."""

import functools
import json
import os
import pathlib
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
import torch

import avmae
import data
import media
import train_finetune
import train_pretrain

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = [
    "--clips", "40", "--held-out-clips", "16", "--batch", "8", "--epochs", "4", "--log-every", "1",
    "--device", "cpu"]
FILES = [
    "--frames", "4", "--image", "32", "--seconds", "1.28", "--tubelet", "2", "8", "8", "--mels",
    "32", "--frame-step", "0.16", "--size", "demo", "--epochs", "2", "--batch", "4", "--log-every",
    "1", "--device", "cpu", "--workers", "1"]


def command(script, *args, torchrun=()):
    """The command line of a script, with torchrun's flags if there are any."""
    module = ["-m", "torch.distributed.run", *torchrun] if torchrun else []
    return [sys.executable, *module, str(ROOT / f"{script}.py"), *map(str, args)]


@functools.cache
def forks():
    return subprocess.Popen(
        [sys.executable, "-m", "forks"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=ROOT / "tests", env={**os.environ, "PYTHONPATH": str(ROOT)})


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(script, *args, processes=1, cwd=ROOT, fails=False):
    """A script's run to its end, in so many forks of a process that has imported torch."""
    with tempfile.TemporaryDirectory() as said:
        out, err = (pathlib.Path(said, name) for name in ("out", "err"))
        argv = command(script, *args)[1:]
        job = {
            "argv": argv, "cwd": str(cwd), "out": str(out), "err": str(err),
            "processes": processes, "port": free_port()}
        forks().stdin.write(json.dumps(job) + "\n")
        forks().stdin.flush()
        status = int(forks().stdout.readline())
        ran = subprocess.CompletedProcess(argv, status, out.read_text(), err.read_text())
    assert bool(ran.returncode) == fails, ran.stdout + ran.stderr
    return ran


def losses(folder):
    lines = [
        json.loads(line) for line in (pathlib.Path(folder) / "log.jsonl").read_text().splitlines()]
    found = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert len(found) == sum("loss" in line for line in lines)  # no step stands there twice
    return found


def logged(folder, what):
    """A figure of all steps in the log."""
    lines = map(json.loads, (pathlib.Path(folder) / "log.jsonl").read_text().splitlines())
    return [line[what] for line in lines if what in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A short run that nothing interrupts."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    ran = run("train_pretrain", *TINY, "--out", out)
    return out, ran.stdout


# -------------------------------------------------------------------------------------- pretraining


def test_a_run_leaves_what_it_says(whole):
    out, said = whole
    assert len(losses(out)) == 20
    last = json.loads(
        [line for line in (out / "log.jsonl").read_text().splitlines() if '"loss"' in line][-1])
    assert {
        "step", "epoch", "loss_video", "loss_audio", "lr", "grad_norm", "clips_per_s", "waiting",
        "memory_gb", "seconds_left"} <= set(last)
    assert {p.name for p in (out / "pictures").iterdir()} == {
        "0000020_video.png", "0000020_audio.png"}
    checkpoint = avmae.read(out / "last.pt")
    assert checkpoint["step"] == 20 and any(k.startswith("decoder") for k in checkpoint["model"])
    assert "of constant" in said and isinstance(avmae.load(out / "last.pt"), avmae.AVMAE)
    rates = [train_pretrain.learning_rate(i, 2.4e-2 * 8 / 256, 2.5, 20) for i in range(20)]
    assert logged(out, "lr") == pytest.approx(rates)
    assert not list(out.glob("*.partial"))


def test_a_finished_run_says_so_again(whole):
    out, _ = whole
    before = (out / "last.pt").read_bytes()
    assert "of constant" in run("train_pretrain", *TINY, "--out", out).stdout
    assert (out / "last.pt").read_bytes() == before and len(losses(out)) == 20


def interrupt(args, out, number, script="train_pretrain", torchrun=(), worker=False):
    """Starts a run and sends a signal to it, or to one of the processes that it started, when its
    log has three lines -> exit status."""
    process = subprocess.Popen(
        command(script, *args, "--out", out, torchrun=torchrun), cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "log.jsonl").exists() and len(losses(out)) >= 3:
            break
        time.sleep(0.02)
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]) if worker else process.pid, number)
    return process.wait(120)


SAVING = [*TINY, "--save-every", "0.2"]  # at every step


@pytest.mark.parametrize(
    "number, worker",
    [(signal.SIGTERM, False), (signal.SIGKILL, False), (signal.SIGKILL, True)],
    ids=["SIGTERM", "SIGKILL", "a worker"])
def test_a_stopped_run_continues_with_the_same_losses(tmp_path, whole, number, worker):
    out = tmp_path / "run"
    slow = [*SAVING, "--workers", "2"]  # which change nothing
    assert interrupt(slow, out, number, worker=worker) != 0
    stopped_at = avmae.read(out / "last.pt")["step"]
    assert 0 < stopped_at < 20
    with open(out / "log.jsonl", "a") as log:  # as a run does that was killed before it saved
        log.write(json.dumps({"step": 20, "loss": 0.0}) + '\n{"step": 2')
    run("train_pretrain", *slow, "--out", out)
    assert losses(out) == losses(whole[0])


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, whole):
    out = tmp_path / "run"
    assert interrupt(SAVING, out, signal.SIGKILL) != 0
    before = (out / "last.pt").read_bytes()
    (out / "last.pt.partial").unlink(missing_ok=True)
    (out / "last.pt.partial").symlink_to("/dev/full")
    ran = run("train_pretrain", *SAVING, "--out", out, fails=True)
    assert "could not save" in ran.stderr and "still there" in ran.stderr
    assert "Traceback" not in ran.stderr and (out / "last.pt").read_bytes() == before
    run("train_pretrain", *SAVING, "--out", out)
    assert losses(out) == losses(whole[0])


def close(ours, theirs):
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=2e-4)


def test_two_machines_give_the_losses_of_one(tmp_path, whole):
    """Two agents of torchrun that find each other."""
    meet = [
        "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
        f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--local_addr=127.0.0.1"]
    agents = [
        subprocess.Popen(
            command("train_pretrain", *TINY, "--out", tmp_path, torchrun=meet), cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)]
    said = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    close(losses(tmp_path), losses(whole[0]))
    state, expected = (avmae.read(folder / "last.pt") for folder in (tmp_path, whole[0]))
    assert state["model"].keys() == expected["model"].keys()


def test_a_run_moved_from_two_processes_to_one(tmp_path, whole):
    moved = [*SAVING, "--micro-batch", "2"]
    two = ["--nproc_per_node=2", "--standalone"]
    assert interrupt(moved, tmp_path, signal.SIGINT, torchrun=two) != 0
    assert 0 < avmae.read(tmp_path / "last.pt")["step"] < 20
    run("train_pretrain", *SAVING, "--out", tmp_path)
    close(losses(tmp_path), losses(whole[0]))


def test_torchrun_restarts_a_run(tmp_path, whole, monkeypatch):
    # else a restarted process may find the addresses of the one before in torchrun's store
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    restart = ["--nproc_per_node=2", "--standalone", "--max_restarts=1"]
    assert interrupt(SAVING, tmp_path, signal.SIGKILL, torchrun=restart, worker=True) == 0
    close(losses(tmp_path), losses(whole[0]))


def test_accumulation_gives_the_losses_of_one_pass(tmp_path, whole):
    run(
        "train_pretrain", *TINY, "--out", tmp_path, "--micro-batch", "2", "--checkpoint-activations"
    )
    np.testing.assert_allclose(
        list(losses(tmp_path).values()), list(losses(whole[0]).values()), rtol=2e-4)


def test_a_run_of_other_settings_is_not_overwritten(whole):
    out, _ = whole
    before = (out / "last.pt").read_bytes()
    ran = run("train_pretrain", *TINY, "--out", out, "--encoder", "early", fails=True)
    assert "encoder is 'mid' there and 'early' here" in ran.stderr and "Traceback" not in ran.stderr
    assert (out / "last.pt").read_bytes() == before


def test_weights_can_start_another_run(tmp_path, whole):
    run(
        "train_pretrain", *TINY, "--out", tmp_path, "--init", whole[0] / "last.pt", "--epochs", "1",
        "--seed", "5")
    assert losses(tmp_path)[1] < losses(whole[0])[1]
    ran = run(
        "train_pretrain", *TINY, "--out", tmp_path / "b", "--init", whole[0] / "last.pt",
        "--encoder", "early", fails=True)
    assert "another architecture" in ran.stderr and "Traceback" not in ran.stderr


def test_the_constant_that_errors_are_compared_with():
    window = data.Window(8, 0.32, 32, 2.56, 32)
    config, _ = train_pretrain.configs(train_pretrain.parse([]))
    model = avmae.AVMAE(config)
    clips = [data.Builtin(20, window, s) for s in (0, 1)]
    loaders = [
        torch.utils.data.DataLoader(
            c, 10, sampler=[(0, i) for i in range(20)], collate_fn=data.collate)
        for c in clips
    ]
    ours = train_pretrain.constant_error(model, *loaders)
    for m in "video", "audio":
        train, test = (
            model.embed[m]
            .normalise(model.embed[m].patchify(torch.stack([c[0, i][m] for i in range(20)])))
            .flatten(0, 1)
            for c in clips)
        assert ours[m] == pytest.approx((test - train.mean(0)).square().mean().item(), rel=1e-5)


def test_evaluation_sees_the_other_modality_swapped():
    """Where the other modality cannot matter, another clip's makes no difference; else it does."""
    window = data.Window(8, 0.32, 32, 2.56, 32)
    loader = torch.utils.data.DataLoader(
        data.Builtin(16, window), 8, sampler=[(0, i) for i in range(16)], collate_fn=data.collate)
    for encoder, matters in ("shared", False), ("early", True):
        config, _ = train_pretrain.configs(train_pretrain.parse(["--encoder", encoder]))
        torch.manual_seed(0)
        model = avmae.AVMAE(config)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.2)
        errors = train_pretrain.evaluate(model, loader, "cpu", train_pretrain.nullcontext)
        for error, swapped in errors.values():
            assert (error != swapped) == matters


@pytest.mark.parametrize(
    "args, words",
    [
        (["--data", "nowhere"], "there is no folder nowhere"),
        (["--encoder", "separate", "--decoder", "separate"], "--allow-uncoupled"),
        (["--batch", "9", "--micro-batch", "2"], "not divided by"),
        (["--init", "README.md"], "neither a checkpoint of ours nor"),
        (["--objective", "dream"], "invalid choice: 'dream'")],
)
def test_mistakes_end_in_a_sentence(tmp_path, args, words):
    ran = run("train_pretrain", *args, "--out", tmp_path / "out", fails=True)
    assert words in ran.stderr and "Traceback" not in ran.stderr
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------- real files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Nine short videos of two labels, one file that is no video."""
    root = tmp_path_factory.mktemp("clips")
    for part in "train", "test":
        for i in range(6 if part == "train" else 3):
            path = root / part / ("cat" if i % 2 else "dog") / f"{part}{i}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            media.write(path, seconds=2.0, clicks=(0.2 * i,), size=(64, 48))
    (root / "train" / "cat" / "broken.mp4").write_bytes(b"no video")
    return root


def test_pretraining_on_files(tmp_path, folder):
    common = [
        *FILES, "--data", folder / "train", "--val", folder / "test", "--out", tmp_path / "out"]
    ran = run("train_pretrain", *common, "--max-bad", "0.5", "--epochs", "4")
    assert ran.stdout.count("unreadable, replaced: cat/broken.mp4: cannot be opened") == 1
    assert max(logged(tmp_path / "out", "unreadable")) > 1  # named once all the same
    assert (
        (tmp_path / "out" / "unreadable.txt")
        .read_text()
        .startswith("cat/broken.mp4: cannot be opened"))
    ran = run(
        "train_pretrain", "--evaluate", tmp_path / "out" / "last.pt", "--device", "cpu",
        "--picture", folder / "test" / "dog" / "test0.mp4", cwd=tmp_path)
    assert {p.name for p in tmp_path.glob("*.png")} == {"test0_video.png", "test0_audio.png"}
    ran = run("train_pretrain", *common[:-1], tmp_path / "other", "--max-bad", "0.05", fails=True)
    assert "more than --max-bad 0.05" in ran.stderr and "Traceback" not in ran.stderr
    ran = run(
        "train_pretrain", "--evaluate", tmp_path / "out" / "last.pt", "--picture",
        folder / "train" / "cat" / "broken.mp4", fails=True)
    assert "cannot be opened" in ran.stderr


def test_finetuning_on_files_and_what_can_be_done_with_the_model(tmp_path, folder):
    out = tmp_path / "out"
    run(
        "train_finetune", *FILES, "--data", folder, "--views", "2", "--out", out, "--max-bad", "0.5"
    )
    results = json.loads((out / "results.json").read_text())
    assert results["clips"] == 3 and results["unreadable"] == 0 and "top-1" in results["metrics"]
    best = out / "best.pt"
    again = run(
        "train_finetune", "--eval", best, "--device", "cpu", "--data", folder, "--out",
        tmp_path / "e", "--predictions", tmp_path / "p.csv")
    rows = (tmp_path / "p.csv").read_text().splitlines()
    assert len(rows) == 3 and rows[0].split(",")[1] in ("cat", "dog") and "top-1" in again.stdout
    said = run(
        "train_finetune", "--eval", best, "--device", "cpu", "--predict",
        folder / "test" / "dog" / "test0.mp4").stdout
    assert "cat" in said and "dog" in said
    media.write(tmp_path / "mute.mp4", audio=False)
    media.write(tmp_path / "silent.mp4", clicks=())
    for name, words in ("mute", "no audio track"), ("silent", "silent"):
        said = run(
            "train_finetune", "--eval", best, "--device", "cpu", "--predict",
            tmp_path / f"{name}.mp4").stdout
        assert words in said and "picture alone" in said and "cat" in said


def test_held_out_clips_are_not_trained_on(tmp_path, folder):
    said = run(
        "train_pretrain", *FILES, "--data", folder, "--out", tmp_path, "--dry-run").stdout
    clips = data.find_clips(folder)
    held = int(data.held_out(clips).sum())
    assert held and f"{len(clips) - held} training clips, {held} held out" in said


@pytest.mark.parametrize("script", ["train_pretrain", "train_finetune"])
def test_a_step_that_a_clip_breaks_is_named_and_not_applied(tmp_path, script):
    clips = tmp_path / "clips"
    for i in range(3):
        media.write(clips / "train" / "a" / f"good{i}.mp4", seconds=2.0)
    for part in "train", "test":  # finite in the file, not in the spectrogram
        media.write(
            clips / part / "b" / "loud.mkv", seconds=2.0, audio_codec="pcm_f32le", layout="mono",
            rate=16_000, loudness=3e38 if part == "train" else 0.8, clicks=np.arange(20) / 10)
    flags = [*FILES, "--batch", "1", "--epochs", "3", "--out", tmp_path / "out"]
    if script == "train_pretrain":
        ran = run(script, *flags, "--data", clips / "train", "--val", clips / "test")
    else:
        ran = run(script, *flags, "--data", clips)
    lines = [line for line in ran.stdout.splitlines() if "is not finite" in line]
    named = "loss_audio" if script == "train_pretrain" else "loss"
    assert len(lines) == 3 and all(named in x and "loud.mkv" in x for x in lines)
    weights = avmae.read(tmp_path / "out" / "last.pt")["model"].values()
    assert all(p.isfinite().all() for p in weights)
    assert sum(np.isfinite(x) for x in losses(tmp_path / "out").values()) == 9


@pytest.mark.parametrize("count", [1, 3])
def test_pretraining_on_hardly_any_clips(tmp_path, count):
    for i in range(count):
        media.write(tmp_path / "clips" / f"{i}.mp4", seconds=2.0)
    run("train_pretrain", *FILES, "--data", tmp_path / "clips", "--out", tmp_path / "out")
    assert len(losses(tmp_path / "out")) == 2  # an epoch is a step, where a batch is larger


def test_checkpoints_to_keep(tmp_path):
    run("train_pretrain", *TINY, "--epochs", "2", "--keep-every", "1", "--out", tmp_path)
    assert [avmae.read(tmp_path / f"epoch_{k}.pt")["step"] for k in (1, 2)] == [5, 10]


# --------------------------------------------------------------------------------------- finetuning

FINE = [
    "--per-class", "1", "--test-clips", "64", "--batch", "4", "--epochs", "3", "--log-every", "1",
    "--device", "cpu"]


@pytest.mark.parametrize(
    "args",
    [
        [], ["--modalities", "audio"], ["--modalities", "video"], ["--model", "encoder"],
        ["--model", "probe"]],
    ids=str,
)
def test_finetuning_from_a_pretrained_model(tmp_path, whole, args):
    last = tmp_path / "a=b.pt"  # no stream of the name a
    shutil.copy(whole[0] / "last.pt", last)
    init = [last] if args else [f"video={last}", f"audio={last}"]  # one for both, or one for each
    said = run("train_finetune", *FINE, *args, "--init", *init, "--out", tmp_path).stdout
    assert "fresh: " in said and "head.weight" in said and len(losses(tmp_path)) == 12
    model, before = avmae.load(tmp_path / "last.pt"), avmae.load(whole[0] / "last.pt")
    m = model.config.modalities[0]
    changed = not model.trunk.path(m)[0].attn.qkv.weight.equal(
        before.encoder.path(m)[0].attn.qkv.weight)
    assert changed == ("probe" not in args)


def test_finetuning_keeps_to_its_recipe(tmp_path, monkeypatch, capsys):
    """Learning rate, norm of the gradient, stochastic depth; and the best model is kept."""
    generators, draw = [], avmae.draw_keep
    monkeypatch.setattr(
        avmae, "draw_keep", lambda *args: generators.append(args[-1].initial_seed()) or draw(*args))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    flags = [*FINE, "--drop-path", "0.5", "--eval-every", "1", "--lr", "0.4", "--seed", "1"]
    monkeypatch.setattr(sys, "argv", ["train_finetune.py", *flags, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "train_finetune.py"), run_name="__main__")
    assert not end.value.code and len(generators) == len(set(generators)) == 12
    tops = [float(x) for x in re.findall(r"^top-1 ([\d.]+)", capsys.readouterr().out, re.M)]
    best = avmae.read(tmp_path / "best.pt")["metrics"]["top-1"]
    assert len(tops) == 3 and best == pytest.approx(max(tops), abs=1e-4)  # here not the last
    peak, warmup = 0.4 * 4 / 16, train_finetune.parse([]).warmup * 4
    rates = [train_pretrain.learning_rate(i, peak, warmup, 12) for i in range(12)]
    assert logged(tmp_path, "lr") == pytest.approx(rates)
    monkeypatch.undo()
    short = [*FINE, "--clip-grad", "1e-6", "--lr", "1", "--out", tmp_path / "clipped"]
    run("train_finetune", *short)
    assert 0 < avmae.load(tmp_path / "clipped" / "last.pt").head.weight.abs().max() < 1e-5


def test_layers_learn_at_their_own_rates(tmp_path, whole):
    pretrained = avmae.load(whole[0] / "last.pt")
    flags = ["--init", whole[0] / "last.pt", "--layer-decay", "0", "--out", tmp_path]
    run("train_finetune", *FINE, *flags)
    model = avmae.load(tmp_path / "last.pt")
    for m in avmae.MODALITIES:  # of all blocks it is 0 times that of the head
        for ours, theirs in zip(model.trunk.path(m), pretrained.encoder.path(m), strict=True):
            assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    assert model.head.weight.any()


def test_a_stopped_finetuning_continues_with_the_same_losses(tmp_path):
    fine = [*FINE, "--save-every", "0.25", "--eval-every", "3", "--lr", "0.05"]
    run("train_finetune", *fine, "--out", tmp_path / "whole")
    assert interrupt(fine, tmp_path / "cut", signal.SIGTERM, "train_finetune") != 0
    assert 0 < avmae.read(tmp_path / "cut" / "last.pt")["step"] < 12
    run("train_finetune", *fine, "--out", tmp_path / "cut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    two = ["--nproc_per_node=2", "--standalone"]
    moved = tmp_path / "moved"
    assert interrupt(fine, moved, signal.SIGKILL, "train_finetune", two, worker=True) != 0
    assert 0 < avmae.read(moved / "last.pt")["step"] < 12
    run("train_finetune", *fine, "--out", moved)
    close(losses(moved), losses(tmp_path / "whole"))


def test_evaluation_on_three_processes_is_that_on_one(tmp_path, folder):
    out = tmp_path / "out"
    run(
        "train_finetune", *FILES, "--data", folder, "--views", "2", "--out", out, "--max-bad", "0.5"
    )
    for name in (
        "test3.mp4",
        "test4.mp4",
    ):  # five clips, one unreadable: three processes don't divide them
        (folder / "test" / "cat" / name).write_bytes(
            (folder / "test" / "dog" / "test0.mp4").read_bytes())
    (folder / "test" / "cat" / "wrong.mp4").write_bytes(b"nothing")
    try:
        metrics = []
        for processes in 1, 3, 8:  # which is more than there are clips
            run(
                "train_finetune", "--eval", out / "best.pt", "--data", folder, "--device", "cpu",
                "--workers", "0", "--out", tmp_path / f"e{processes}", processes=processes)
            results = json.loads((tmp_path / f"e{processes}" / "results.json").read_text())
            assert (results["clips"], results["unreadable"]) == (5, 1)
            metrics.append(results["metrics"])
        assert metrics[0] == metrics[1]
    finally:
        for name in "test3.mp4", "test4.mp4", "wrong.mp4":
            (folder / "test" / "cat" / name).unlink()


@pytest.mark.parametrize(
    "args, words",
    [
        (["--init", "nothing.pt"], "cannot read nothing.pt"),
        (["--data", "nowhere"], "there is no folder"),
        (["--size", "tiny", "--init", "PRETRAINED"], "must be equal"),
        (["--init", "smell=PRETRAINED"], "unknown stream 'smell'"),
        (["--eval", "PRETRAINED"], "is a pretrained model")],
)
def test_mistakes_in_finetuning_end_in_a_sentence(tmp_path, whole, args, words):
    args = [a.replace("PRETRAINED", str(whole[0] / "last.pt")) for a in args]
    ran = run("train_finetune", *args, "--device", "cpu", "--out", tmp_path / "out", fails=True)
    assert words in ran.stderr and "Traceback" not in ran.stderr
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------- benchmarks


def epic_csv(rows):
    head = (
        "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,"
        "start_frame,stop_frame,narration,verb,verb_class,noun,noun_class,all_nouns,"
        "all_noun_classes\n"
    )
    return head + "".join(
        f"{v}_{k},P01,{v},00:00:01.089,00:00:{a:05.2f},00:00:{b:05.2f},8,202,x,x,{verb},x,{noun},"
        "['x'],[3]\n"
        for k, (v, a, b, verb, noun) in enumerate(rows))


def benchmark(folder, name):
    """Clips and annotations in a benchmark's official format -> its arguments."""
    for i in range(6):
        media.write(folder / "clips" / f"P01_0{i}.mp4", seconds=3.0, clicks=(0.3 * i,))
    if name == "audioset":
        (folder / "class_labels_indices.csv").write_text(
            "index,mid,display_name\n" + "".join(f'{i},/m/0{i},"Sound {i}"\n' for i in range(527)))
        for part, ids in ("train", (0, 1, 2, 3)), ("eval", (4, 5, 0)):
            (folder / f"{part}_segments.csv").write_text(
                "# a\n# b\n# c\n"
                + "".join(f'P01_0{i}, 30.000, 33.000, "/m/0{i},/m/09"\n' for i in ids))
        return [
            "--annotations", folder / "train_segments.csv", "--val-annotations",
            folder / "eval_segments.csv"]
    if name == "epic":
        for part, ids in ("train", (0, 1, 2, 3)), ("validation", (4, 5)):
            (folder / f"EPIC_100_{part}.csv").write_text(
                epic_csv([(f"P01_0{i}", 0.5, 2.5, i, 10 * i) for i in ids]))
        return [
            "--annotations", folder / "EPIC_100_train.csv", "--val-annotations",
            folder / "EPIC_100_validation.csv"]
    if name == "ave":
        for part, ids in ("train", (0, 1, 2, 3)), ("test", (4, 5)):
            (folder / f"{part}Set.txt").write_text(
                "".join(f"{'Bark' if i % 2 else 'Axe'}&P01_0{i}&good&2&7\n" for i in ids))
        return [
            "--annotations", folder / "trainSet.txt", "--val-annotations", folder / "testSet.txt"]
    (folder / "vggsound.csv").write_text(
        "".join(f'P01_0{i},30,"sound, {i % 2}",{"test" if i > 3 else "train"}\n' for i in range(6)))
    return ["--annotations", folder / "vggsound.csv"]


@pytest.mark.parametrize(
    "name, metrics, clips",
    [
        ("vggsound", ["top-1", "top-5"], 2), ("audioset", ["mAP", "AUC", "d-prime"], 3),
        ("epic", ["action", "verb", "noun"], 2), ("ave", ["segment accuracy"], 2)],
)
def test_a_benchmark_in_its_official_format(tmp_path, name, metrics, clips):
    args = benchmark(tmp_path, name)
    small = [
        "--size", "demo", "--fusion-layer", "2", "--image", "32", "--tubelet", "2", "8", "8",
        "--mels", "32", "--frames", "4" if name != "ave" else "32", "--epochs", "2", "--batch", "4",
        "--log-every", "1", "--device", "cpu", "--workers", "1", "--frequency-masks", "1", "8",
        "--out", tmp_path / "out"]
    if name != "ave":
        small += ["--seconds", "1.28", "--views", "2"]
    run("train_finetune", "--preset", name, "--data", tmp_path / "clips", *args, *small)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["metrics"]) == metrics and results["clips"] == clips
    saved = avmae.read(tmp_path / "out" / "last.pt")
    assert (
        saved["config"]["classes"]
        == {"vggsound": [2], "audioset": [527], "epic": [97, 300], "ave": [3]}[name])
    assert all(np.isfinite(list(losses(tmp_path / "out").values())))
    if name == "vggsound":  # the same clips with another number of classes
        (tmp_path / "three.csv").write_text(
            "".join(f"P01_0{i},30,sound {i % 3},{'test' if i > 2 else 'train'}\n" for i in range(6))
        )
        ran = run(
            "train_finetune", "--eval", tmp_path / "out" / "last.pt", "--annotations",
            tmp_path / "three.csv", "--out", tmp_path / "e", fails=True)
        assert "2 classes apart, these clips have 3" in ran.stderr
        assert "Traceback" not in ran.stderr and not (tmp_path / "e").exists()


def test_the_authors_finetuned_model_labels_a_file(tmp_path):
    from test_import import encode, nested, official
    from test_reference import reference

    (tmp_path / "released").write_bytes(
        encode({"params": nested(official(reference("mbt__rgb_spectrogram.npz")))}))
    (tmp_path / "classes.txt").write_text("".join(f"sound {i}\n" for i in range(7)))
    media.write(tmp_path / "clip.mp4")
    said = run(
        "train_finetune", "--eval", tmp_path / "released", "--fusion-layer", "2", "--frames", "4",
        "--image", "32", "--seconds", "0.48", "--mels", "16", "--device", "cpu", "--predict",
        tmp_path / "clip.mp4", "--classes", tmp_path / "classes.txt").stdout
    assert "assumed: fusion layer 2 of 4" in said and said.count("sound ") == 5


def test_features_of_a_folder(tmp_path, whole, folder):
    args = [
        "--embed", tmp_path / "features.npz", "--eval", whole[0] / "last.pt", "--data",
        folder / "train", "--device", "cpu"]
    parts = tmp_path / "features.npz.parts"
    run("train_finetune", *args, processes=2)
    once = np.load(tmp_path / "features.npz")
    assert (
        len(once["names"]) == 6
        and once["video"].shape == once["audio"].shape == (6, 96)
        and not parts.exists())
    parts.mkdir()  # of a run that was stopped
    np.savez(parts / "0.npz", names=["kept"], video=np.ones((1, 96)), audio=np.ones((1, 96)))
    run("train_finetune", *args)
    assert np.load(tmp_path / "features.npz")["names"].tolist() == ["kept"]
    parts.mkdir()
    (parts / "about.txt").write_text("other clips")
    model, clips = avmae.load(whole[0] / "last.pt"), data.Clips(data.find_clips(folder), None)
    with pytest.raises(data.UserError, match="another model"):
        train_finetune.embed(model, clips, None, tmp_path / "features.npz", "cpu", None, (0, 1))
    shutil.rmtree(parts)


# ------------------------------------------------------------------------------------------ recipes


def test_presets_are_the_papers_tables():
    """Tables 20, 22, 23, 24."""
    common = dict(
        batch=512, weight_decay=0.05, warmup=4.0, frames=16, frame_step=0.16, image=224, mels=128,
        mask_video=0.9, joint_layers=2, decoder="shared", objective="joint", size="large")
    for name, table in {
        "vggsound": dict(lr=1.5e-4, epochs=400, seconds=8.0, mask_audio=0.5, encoder="separate"),
        "audioset": dict(lr=3e-4, epochs=120, seconds=10.0, mask_audio=0.7, encoder="mid")}.items():
        args = vars(train_pretrain.parse(["--preset", name]))
        assert {k: args[k] for k in common | table} == common | table
    common = dict(
        momentum=0.9, layer_decay=0.75, clip_grad=1.0, warmup=2.5, epochs=50, smoothing=0.3,
        drop_path=0.3, frames=32, frame_step=0.08, image=224, views=4, jitter=(0.9, 1.33),
        flip=True, colour=True, time_masks=(4, 48), size="large", bottlenecks=4)
    for name, table in {
        "vggsound": dict(
            batch=64, lr=0.8, mixup=(0.5, 0.5, 0.5), time_shift=False, seconds=8.0, fusion_layer=0,
            frequency_masks=(1, 48), task="single"),
        "epic": dict(
            batch=64, lr=1.2, mixup=(1.25, 0.5, 0.5), time_shift=True, seconds=8.0, fusion_layer=0,
            task="epic"),
        "audioset": dict(
            batch=128, lr=1.6, mixup=(1.25, 0.5, 0.5), time_shift=True, seconds=10.0,
            fusion_layer=18, frequency_masks=(2, 36), task="many"),
    }.items():
        args = train_finetune.parse(["--preset", name])
        assert {k: vars(args)[k] for k in common | table} == common | table
        assert train_finetune.config_of(args, (309,)).fusion_layer == (
            18 if name == "audioset" else 16)


@pytest.mark.parametrize(
    "args", [["--preset", "vggsound", "--encoder", "mid"], ["--preset", "audioset"], []], ids=str)
def test_dry_run_allocates_and_writes_nothing(tmp_path, args):
    said = run("train_pretrain", *args, "--dry-run", "--out", tmp_path / "out").stdout
    if "vggsound" in args:
        assert "595,849,984 parameters" in said and "1568 tokens, 1411 masked" in said
        gflop = float(said.split(" GFLOP")[0].split()[-1])
        # attention's recomputation is not counted here
        assert gflop == pytest.approx(904, rel=0.12)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_losses_that_are_not_finite_name_the_step_and_stop(tmp_path, processes):
    ran = run(
        "train_pretrain", *TINY, "--out", tmp_path, "--lr", "1e30", "--warmup", "0.1", fails=True,
        processes=processes)
    assert "in a row were not finite" in ran.stderr and "Traceback" not in ran.stderr
    first = next(line for line in ran.stdout.splitlines() if "is not finite" in line)
    assert "video" in first and "built-in clip" in first and not (tmp_path / "last.pt").exists()


def test_several_processes_give_the_gradients_of_one(tmp_path):
    code = """
import os, sys, torch, torch.distributed as dist, avmae, train_pretrain, data
config, window = train_pretrain.configs(train_pretrain.parse([]))
clips = data.Builtin(8, window)
batch = data.collate([clips[0, i] for i in range(8)])
torch.manual_seed(0)
model = avmae.AVMAE(config)
for p in model.parameters(): torch.nn.init.normal_(p, std=0.1)
masks = model.draw_masks(8, torch.Generator().manual_seed(1))
model({m: batch[m] for m in avmae.MODALITIES}, masks).loss.backward()
expected = [p.grad.clone() for p in model.parameters()]
for world in 2, 4:
    children = []
    for rank in range(world):
        children.append(os.fork())
        if children[-1]:
            continue
        model.zero_grad()
        dist.init_process_group(
            "gloo", init_method=f"file://{sys.argv[1]}/{world}", rank=rank, world_size=world)
        rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
        net = torch.nn.parallel.DistributedDataParallel(model)
        mine = tuple({m: i[rows] for m, i in p.items()} for p in masks)
        net({m: batch[m][rows] for m in avmae.MODALITIES}, mine).loss.backward()
        for p, e in zip(model.parameters(), expected):
            assert (p.grad - e).norm() <= 1e-5 * e.norm() + 1e-7
        dist.barrier()
        dist.destroy_process_group()
        sys.exit()
    assert not any(os.waitpid(child, 0)[1] for child in children), world
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
        timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
