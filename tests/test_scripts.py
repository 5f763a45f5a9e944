"""The scripts, run for real with tiny settings."""

import ast
import errno
import json
import os
import pathlib
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch

import avmae
import data
import media
import train_finetune
import train_pretrain
from launch import free_port, launch, read_log

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = {"train_pretrain": train_pretrain, "train_finetune": train_finetune}
CPU = ["--device", "cpu"]
TINY = ["--num-clips", "40", "--batch", "8", "--epochs", "4", "--log-every", "1", *CPU]
SAVING = [*TINY, "--save-every", "0"]  # at every step
SMALL = ["--frames", "4", "--image", "32", "--seconds", "1.28", "--tubelet", "2", "8", "8"]
FILES = [
    "--preset", "demo", *SMALL, "--mels", "32", "--frame-step", "0.16", "--size", "demo", "--epochs", "2", "--batch",
    "4", "--log-every", "1", "--workers", "1", *CPU]
FINE = [  # 16 clips
    "--per-class", str(16 // len(data.Builtin.classes)), "--test-clips", "64", "--batch", "4",
    "--epochs", "3", "--log-every", "1", *CPU]


def command(script, *args, torchrun=()):
    """The command line of a script, with torchrun's flags if there are any."""
    module = ["-m", "torch.distributed.run", *torchrun] if torchrun else []
    return [sys.executable, *module, str(ROOT / f"{script}.py"), *map(str, args)]


def run(script, *args, processes=1, cwd=ROOT, fails=False, **ending):
    """Run a script to its end; if it is to fail, with a message instead of a traceback.

    cwd: a folder, or one for each process.
    """
    folders = cwd if isinstance(cwd, list) else [cwd] * processes
    ran = launch(command(script, *args)[1:], folders, **ending)
    expected = bool(ran.returncode) == fails and "Traceback" not in ran.stderr
    assert expected or (ending and ran.returncode), ran.stdout + ran.stderr
    return ran


def logged(folder, what):
    """Return a value of every log line that has it."""
    return [line[what] for line in read_log(folder) if what in line]


def losses(folder):
    found = {line["step"]: line["loss"] for line in read_log(folder) if "loss" in line}
    assert len(found) == len(logged(folder, "loss"))  # no step stands there twice
    return found


def results(folder):
    return json.loads((pathlib.Path(folder) / "results.json").read_text())


def close(folder, other):
    """Whether two runs logged the same steps, with losses equal to rounding; the gradients' norms
    as well, since Adam does not see their scale."""
    assert losses(folder).keys() == losses(other).keys()
    for what in "loss", "grad_norm":
        np.testing.assert_allclose(logged(folder, what), logged(other, what), rtol=2e-4)


def step_of(path):
    return avmae.load_checkpoint(path)["step"]


def interrupt(args, out, number, script="train_pretrain", **how):
    """Run a script that gets a signal once its log has three steps (or its data worker does)."""
    return run(script, *args, "--out", out, number=number, log=out / "log.jsonl", **how)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A short run that nothing interrupts: its folder, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, run("train_pretrain", *TINY, "--out", out).stdout


# -------------------------------------------------------------------------------------- pretraining


def columns_align(table):
    """Return True if all cells end below the words of the first line."""
    ends = [[cell.end() for cell in re.finditer(r"\S+", line)] for line in table]
    return len(table) > 1 and all(x == ends[0] for x in ends)


def test_a_run_leaves_what_it_prints(whole):
    out, printed = whole
    lines = printed.splitlines()
    assert [x.split()[0] for x in lines[:6]] == [
        "device", "model", "tokens", "clips", "steps", "folder"]
    assert len(max(lines[:6], key=len)) <= 100 + len(str(out))
    assert "40 for training, 40 for validation" in lines[3]
    assert columns_align(lines[6:27]) and lines[6].split()[0] == "step"
    assert "of variance" in printed

    left = set(re.findall(r"[\w.]+\.\w+", lines[5].split(": ")[1]))
    assert left == {"last.pt", "log.jsonl", "settings.json", "curves.png", "results.json"}
    assert left | {"pictures", "run.lock"} == {p.name for p in out.iterdir()}
    assert {p.name for p in (out / "pictures").iterdir()} == {"0000020.png"}
    assert json.loads((out / "settings.json").read_text())["num_clips"] == 40

    assert len(losses(out)) == 20 and len(logged(out, "val")) == 1
    assert {
        "step", "epoch", "loss_video", "loss_audio", "lr", "grad_norm", "clips/s", "waiting",
        "seconds_left", "unreadable"} <= set(read_log(out)[19])
    rates = [train_pretrain.learning_rate(i, 2.4e-2 * 8 / 256, 2, 20) for i in range(20)]
    assert logged(out, "lr") == pytest.approx(rates)

    checkpoint = avmae.load_checkpoint(out / "last.pt")
    assert checkpoint["step"] == 20 and any(k.startswith("decoder") for k in checkpoint["model"])
    assert isinstance(avmae.load_model(out / "last.pt"), avmae.AVMAE)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_last_step_is_logged_and_saved(tmp_path, script):
    flags = TINY if script == "train_pretrain" else FINE  # 20 steps, 12 steps
    run(script, *flags, "--log-every", "7", "--out", tmp_path)
    assert list(losses(tmp_path)) in ([7, 14, 20], [7, 12])
    assert step_of(tmp_path / "last.pt") == max(losses(tmp_path))


@pytest.mark.parametrize("epochs, clips, batch, steps", [
    (10, 100, 64, 16), (1, 40, 16, 2), (0.5, 100, 10, 5), (1, 3, 64, 1)])
def test_epochs_are_passes_over_the_clips(epochs, clips, batch, steps):
    assert train_pretrain.num_steps(epochs, clips, batch) == steps


@pytest.mark.parametrize("names", [["loss", "loss_video_from_audio", "loss_audio"], ["loss"]])
def test_columns_line_up(names):
    table, log = [], object.__new__(train_pretrain.Log)
    log.run, log.names, log.header = types.SimpleNamespace(print=table.append), names, ""
    for k, x in enumerate((1.0, 0.0123, float("nan"))):
        line = {"step": 10**k, "epoch": 7.5 * 9**k, "lr": 1e-4 * x, "clips/s": 9.0 * 30**k}
        line |= {"waiting": 0.5**k, "seconds_left": 3e4 * k, **dict.fromkeys(names, x)}
        log.print_row(line)
    assert columns_align(table) and len(table) == 4


def test_a_finished_run_stays(whole):
    """It prints its results again; a run with other settings does not overwrite it."""
    out, _ = whole
    before = (out / "last.pt").read_bytes()
    printed = run("train_pretrain", *TINY, "--out", out, "--tubelet", 2, 8, 8).stdout
    assert "of variance" in printed and len(losses(out)) == 20

    ran = run("train_pretrain", *TINY, "--out", out, "--encoder", "early", fails=True)
    assert "--encoder mid there, early here" in ran.stderr
    assert (out / "last.pt").read_bytes() == before


@pytest.mark.parametrize(
    "flags, processes, stopped",
    [
        (["--workers", "2"], 1, {"number": signal.SIGTERM}),
        (["--workers", "2"], 1, {"number": signal.SIGKILL}),
        (["--workers", "2"], 1, {"number": signal.SIGKILL, "worker": True}),
        (["--micro-batch", "2"], 2, {"number": signal.SIGINT}),
        (["--micro-batch", "2", "--checkpoint-activations"], 1, None)],
    ids=["SIGTERM", "SIGKILL", "a worker", "moved to one process", "more passes"])
def test_a_run_has_the_same_losses(tmp_path, whole, flags, processes, stopped):
    """Stopped and resumed, with workers, on other processes, with micro-batches."""
    if stopped:
        interrupt([*SAVING, *flags], tmp_path, processes=processes, **stopped)
        step = step_of(tmp_path / "last.pt")
        assert 0 < step < 20
        with open(tmp_path / "log.jsonl", "a") as file:  # as if killed before it saved
            file.write(json.dumps({"step": step + 1, "loss": 0.0}) + '\n{"step": 2')

    run("train_pretrain", *SAVING, *(flags if processes == 1 else ()), "--out", tmp_path)
    close(tmp_path, whole[0])
    assert "--workers" not in flags or losses(tmp_path) == losses(whole[0])
    assert len(read_log(tmp_path)) == len(losses(tmp_path)) + 1  # the end's held-out errors


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, whole):
    interrupt(SAVING, tmp_path, signal.SIGKILL)
    before, partial = (tmp_path / "last.pt").read_bytes(), tmp_path / "last.pt.partial"
    partial.unlink(missing_ok=True)
    partial.symlink_to("/dev/full")

    printed = run("train_pretrain", *SAVING, "--out", tmp_path, fails=True).stderr
    assert "could not save" in printed and "still there" in printed
    assert (tmp_path / "last.pt").read_bytes() == before
    run("train_pretrain", *SAVING, "--out", tmp_path)
    assert losses(tmp_path) == losses(whole[0])


def test_two_machines_give_the_losses_of_one(tmp_path, whole):
    """Two agents of torchrun that find each other; one keeps the store, else both might try."""
    meet = [
        "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--local_addr=127.0.0.1",
        f"--rdzv_endpoint=127.0.0.1:{free_port()}"]
    agents = [
        subprocess.Popen(
            command(
                "train_pretrain", *TINY, "--out", tmp_path,
                torchrun=[*meet, f"--rdzv_conf=is_host={host}"]),
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for host in (1, 0)]
    printed = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], printed

    close(tmp_path, whole[0])
    models = [avmae.load_checkpoint(x / "last.pt")["model"] for x in (tmp_path, whole[0])]
    assert models[0].keys() == models[1].keys()


def test_machines_that_share_no_folder(tmp_path, whole):
    """A run goes on where no process has one; it is refused where one has what another lacks."""
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        folder.mkdir()
    shutil.copytree(whole[0], folders[0] / "run")
    ran = run(
        "train_pretrain", *TINY, "--out", "run", processes=2, cwd=folders, fails=True)
    assert "different steps" in ran.stderr and "share the folder" in ran.stderr

    for i in range(3):
        media.write(tmp_path / "clips" / "train" / "a" / f"{i}.mp4", seconds=2.0)
    shutil.copytree(tmp_path / "clips" / "train", tmp_path / "clips" / "test")
    (tmp_path / "clips" / "train" / "a" / "bad.mp4").write_bytes(b"no video")
    where = [tmp_path / "clips" / "train", "--val", tmp_path / "clips" / "test"]
    for script, clips in ("train_pretrain", where), ("train_finetune", [tmp_path / "clips"]):
        flags = [*FILES, "--data", *clips, "--max-bad", "0.9", "--out", script]
        run(script, *flags, processes=2, cwd=folders)
        assert len(losses(folders[0] / script)) == 2


def test_rows_that_share_a_clip(tmp_path, whole):
    """--repeat: the same losses after a resume, and on one process as on two."""
    twice = [*SAVING, "--repeat", "2"]
    run("train_pretrain", *twice, "--out", tmp_path / "one")
    assert losses(tmp_path / "one")[1] != losses(whole[0])[1]
    interrupt(twice, tmp_path / "cut", signal.SIGTERM, processes=2)
    assert 0 < step_of(tmp_path / "cut" / "last.pt") < 20
    run("train_pretrain", *twice, "--out", tmp_path / "cut")
    close(tmp_path / "cut", tmp_path / "one")


def wait_for_losses(folder, count):
    """Wait until a run has logged so many steps."""
    deadline, file = time.monotonic() + 240, folder / "log.jsonl"
    while time.monotonic() < deadline and not (file.exists() and len(losses(folder)) >= count):
        time.sleep(0.05)
    assert file.exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_signal_to_the_process_group_of_torchrun(tmp_path, script, whole):
    """SIGTERM to all processes, data workers too: saved, no traceback, the same losses later."""
    flags = [*SAVING[:-2], "--save-every", "60", "--workers", "1"]
    flags = flags if script == "train_pretrain" else [*FINE, "--workers", "1"]
    agent = subprocess.Popen(
        command(script, *flags, "--log-every", "1", "--out", tmp_path,
                torchrun=["--nproc_per_node=2", "--standalone"]),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True)
    wait_for_losses(tmp_path, 2)
    os.killpg(agent.pid, signal.SIGTERM)
    printed = agent.communicate(timeout=120)[0]

    step = step_of(tmp_path / "last.pt")
    assert f"stopped at step {step} of" in printed and agent.returncode
    assert "DataLoader worker" not in printed
    run(script, *flags, "--log-every", "1", "--out", tmp_path)
    if script == "train_pretrain":
        close(tmp_path, whole[0])


def test_torchrun_restarts_a_run(tmp_path, whole):
    flags = ["--nproc_per_node=2", "--standalone", "--max_restarts=1"]
    # else a restarted process may find the addresses of the one before in torchrun's store
    env = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    agent = subprocess.Popen(
        command("train_pretrain", *SAVING, "--out", tmp_path, torchrun=flags), cwd=ROOT, env=env,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    wait_for_losses(tmp_path, 3)
    workers = pathlib.Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    assert agent.wait(120) == 0
    close(tmp_path, whole[0])


def test_weights_can_start_another_run(tmp_path, whole):
    init = ["--init", whole[0] / "last.pt"]
    run("train_pretrain", *TINY, "--out", tmp_path, *init, "--epochs", "1", "--seed", "5")
    assert losses(tmp_path)[1] < losses(whole[0])[1]


def test_validation_errors_depend_on_the_clips_alone(tmp_path, whole):
    """Not on the number of processes, nor on what fits into memory."""
    found = []
    for processes, micro in (1, 0), (2, 3), (3, 1):
        out = tmp_path / str(processes)
        flags = ["--eval", whole[0] / "last.pt", "--micro-batch", micro, "--out", out, *CPU]
        run("train_pretrain", *flags, processes=processes)
        metrics = results(out)["val"]
        found.append([x for values in metrics.values() for x in values.values()])

    assert len(found[0]) == 6
    np.testing.assert_allclose(found[1:], [found[0]] * 2, rtol=1e-5, atol=1e-7)


def make_model(flags, tmp_path):
    """Return args, a model with random parameters, and a Run."""
    args = train_pretrain.parse_args([*flags, "--out", str(tmp_path), *CPU])
    torch.manual_seed(0)
    model = avmae.AVMAE(train_pretrain.make_config(args))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return args, model, train_pretrain.Run(args)


def test_errors_are_compared_with_the_variance_of_the_targets(tmp_path):
    args, model, some_run = make_model([], tmp_path)
    clips = data.Builtin(20, train_pretrain.make_window(args))
    metrics, count = train_pretrain.evaluate(model, clips, some_run)
    assert count == 20

    for m, modality in model.config.modalities.items():
        x = torch.stack([clips[0, i, 0][m] for i in range(20)])
        x = modality.normalize(modality.patchify(x)).flatten(0, 1)
        variance = (x - x.mean(0)).square().mean().item()
        assert metrics[m]["error"] / metrics[m]["of_variance"] == pytest.approx(variance, rel=1e-5)


def test_evaluation_swaps_the_other_modality(tmp_path):
    """Another clip's other modality changes nothing where it cannot matter; a lone clip has none."""
    for encoder, matters in ("shared", False), ("early", True):
        args, model, some_run = make_model(["--encoder", encoder], tmp_path)
        for count in 17, 1:
            clips = data.Builtin(count, train_pretrain.make_window(args))
            metrics, read = train_pretrain.evaluate(model, clips, some_run)
            assert read == count and model.training
            for x in metrics.values():
                lower = x["lower_than_swapped"]
                assert lower is None if count == 1 else (lower != 0) == matters


@pytest.mark.parametrize("script, args, words", [
    ("train_pretrain", ["--preset", "demo", "--data", "nowhere"], "there is no folder nowhere"),
    ("train_pretrain", ["--data", "."], "--data needs --preset"),
    ("train_pretrain", ["--encoder", "separate", "--decoder", "separate"], "--allow-uncoupled"),
    ("train_pretrain", ["--batch", "9", "--micro-batch", "2"], "must be a multiple of"),
    ("train_pretrain", ["--init", "README.md"], "tools/convert_weights.py"),
    ("train_pretrain", ["--init", "PRETRAINED", "--encoder", "early"], "--encoder mid there, early"),
    ("train_pretrain", ["--device", "gpu"], "invalid choice: 'gpu'"),
    ("train_pretrain", ["--log-every", "0"], "--log-every: invalid positive value: '0'"),
    ("train_finetune", ["--views", "0"], "--views: invalid positive value: '0'"),
    ("train_finetune", ["--init", "nothing.pt"], "cannot read nothing.pt"),
    ("train_finetune", ["--size", "tiny", "--init", "PRETRAINED"], "must be equal"),
    ("train_finetune", ["--init", "smell=PRETRAINED"], "no stream 'smell'"),
    ("train_finetune", ["--eval", "PRETRAINED"], "is a pretrained model"),
    ("train_finetune", ["--eval", "PRETRAINED", "--data", ".", "--embed", "no/x"], "no folder no"),
    ("train_finetune", ["--embed", "x"], "need a checkpoint: give --eval")])
def test_mistakes_end_in_a_sentence(tmp_path, whole, script, args, words):
    args = [a.replace("PRETRAINED", str(whole[0] / "last.pt")) for a in args]
    ran = run(script, *CPU, *args, "--out", tmp_path / "out", fails=True)
    assert words in ran.stderr and len(ran.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    ran = run("train_pretrain", *TINY, "--out", tmp_path / "file", fails=True)
    assert f"cannot write to --out {tmp_path / 'file'}" in ran.stderr


def test_two_runs_do_not_share_a_folder(tmp_path):
    process = subprocess.Popen(
        command("train_pretrain", *TINY, "--epochs", "400", "--out", tmp_path), cwd=ROOT,
        stdout=subprocess.DEVNULL)
    try:
        wait_for_losses(tmp_path, 1)
        ran = run("train_pretrain", *TINY, "--epochs", "400", "--out", tmp_path, fails=True)
        assert f"is in use by process {process.pid} on" in ran.stderr
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 1
    assert step_of(tmp_path / "last.pt") < 2000


def test_a_leftover_world_size(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(avmae.UserError, match="RANK, MASTER_ADDR, MASTER_PORT is not set"):
        train_pretrain.Run(train_pretrain.parse_args(CPU))


def test_compiling_without_a_compiler(tmp_path, monkeypatch):
    """Training goes on without it, unless --compile was given."""
    def fail(*_):
        raise RuntimeError("no compiler\nmore")

    monkeypatch.setattr(torch, "compile", lambda f: fail)
    for flags in [], ["--compile"]:
        args, _, some_run = make_model(flags, tmp_path)
        if flags:
            with pytest.raises(avmae.UserError, match="does not work here .no compiler.: give --no"):
                some_run.compiler_works()
        else:
            assert some_run.compiler_works() is False


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags(script, capsys):
    module = SCRIPTS[script]
    printed = run(script, "--preset", [*module.PRESETS][1], "--help").stdout
    titles = re.findall(r"^([a-z]+)[a-z (-]*\)?:$", printed, re.M)
    assert titles[:6] == ["options", "data", "clip", "run", "model", "recipe"]
    assert "[--FLAG VALUE" in printed and "(default: large)" in printed  # of this preset

    for wrong in ["--wrong"], ["--objective", "x"], ["--device", "cuda:1"], ["--batch", "many"]:
        with pytest.raises(SystemExit) as end:
            module.parse_args(wrong)
        message = capsys.readouterr().err
        assert end.value.code and len(message.splitlines()) == 1 and wrong[0] in message


@pytest.mark.parametrize(
    "script, preset",
    [(script, name) for script, x in SCRIPTS.items() for name in x.PRESETS if name != "demo"])
def test_a_preset_for_real_videos_needs_data(script, preset):
    with pytest.raises(avmae.UserError, match=f"--preset {preset} needs videos: give --data"):
        SCRIPTS[script].parse_args(["--preset", preset])
    SCRIPTS[script].parse_args(["--preset", preset, "--dry-run"])


def test_errors_of_users_and_machines_are_one_line(capsys):
    def printed(error):
        train_pretrain.excepthook(type(error), error, None)
        return capsys.readouterr().err

    for error in avmae.UserError("so"), data.UserError("so"), OSError(errno.ENOSPC, "so"):
        assert printed(error) == f"error: {error}\n"
    for error in ValueError("so"), OSError(errno.EACCES, "so"), KeyError("so"), RuntimeError("so"):
        assert type(error).__name__ in printed(error) and not printed(error).startswith("error")
    memory = printed(torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"))
    assert "--micro-batch" in memory and "--checkpoint-activations" in memory
    assert len(memory.splitlines()) == 1


def test_a_reader_that_leaves(tmp_path):
    """As head does; each line is written at once, so that the run ends there and not later."""
    reader, writer = os.pipe()
    os.close(reader)
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    ran = subprocess.run(
        command("train_pretrain", *TINY, "--out", tmp_path / "out"), stdout=writer,
        stderr=subprocess.PIPE, text=True, env=buffered)
    os.close(writer)

    assert ran.returncode == 1 and not ran.stderr
    assert not (tmp_path / "out").exists()


def test_nothing_is_used_that_only_unix_has():
    unix = {"resource", "pwd", "grp", "termios", "pty", "tty", "syslog", "readline"}
    fine = {"os": {"sched_getaffinity"}, "signal": {
        "SIGINT", "SIGTERM", "SIG_IGN", "signal", "pthread_sigmask", "sigwaitinfo", "SIG_BLOCK",
        "SIG_SETMASK"}}
    for name in "avmae", "data", *SCRIPTS:
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not {x.name.split(".")[0] for x in node.names} & unix, name
            elif isinstance(node, ast.ImportFrom):
                assert node.module not in {*unix, "os", "signal"}, name
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                of = node.value.id
                assert of != "signal" or node.attr in fine["signal"], (name, node.attr)
                assert of != "os" or node.attr in fine["os"] or not re.match(
                    "fork|get[ug]id|kill|sched_|mkfifo|nice|wait|statvfs|uname", node.attr)
    for guard in "os, sched_getaffinity", "signal, pthread_sigmask", "signal, sigwaitinfo":
        guard = 'hasattr({}, "{}")'.format(*guard.split(", "))
        assert guard in (ROOT / "data.py").read_text()


# --------------------------------------------------------------------------------------- real files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eleven short videos of two labels, six of them to train on, and in each part no video."""
    root = tmp_path_factory.mktemp("clips")
    for part, count in ("train", 6), ("test", 5):
        for i in range(count):
            path = root / part / ("cat" if i % 2 else "dog") / f"{part}{i}.mp4"
            media.write(path, seconds=2.0, clicks=(0.2 * i,), size=(64, 48))
        (root / part / "cat" / "broken.mp4").write_bytes(b"no video")
    return root


def test_pretraining_on_files(tmp_path, folder):
    out, broken = tmp_path / "out", "cat/broken.mp4: cannot be opened"
    common = [*FILES, "--data", folder, "--out"]
    printed = run("train_pretrain", *common, out, "--max-bad", "0.5", "--epochs", "4").stdout
    assert "train is train, val is test" in printed
    assert printed.count(f"unreadable, replaced: {broken}") == 1
    assert max(logged(out, "unreadable")) > 1  # named once all the same
    assert printed.count(f"unreadable, left out: {broken}") == 1
    bad = (out / "unreadable.txt").read_text().splitlines()
    assert len(bad) == 2 and all(broken in line for line in bad)

    before = (out / "results.json").read_bytes()
    evaluate = ["--eval", out / "last.pt", *CPU, "--data"]
    run("train_pretrain", *evaluate, folder / "test" / "dog" / "test0.mp4", cwd=tmp_path)
    assert (out / "results.json").read_bytes() == before
    found = results(tmp_path / "runs" / "eval")
    assert found["clips"] == 1 and found["val"]["video"]["lower_than_swapped"] is None
    assert len(list((tmp_path / "runs" / "eval" / "pictures").glob("*.png"))) == 1

    ran = run(
        "train_pretrain", *evaluate, folder / "train" / "cat" / "broken.mp4", cwd=tmp_path, fails=True)
    assert "cannot be opened" in ran.stdout and "can be read" in ran.stderr
    ran = run("train_pretrain", *common, tmp_path / "other", "--max-bad", "0.05", fails=True)
    assert "more than --max-bad 0.05" in ran.stderr


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, folder):
    """A model finetuned on these files."""
    out = tmp_path_factory.mktemp("runs") / "tuned"
    run(
        "train_finetune", *FILES, "--data", folder, "--views", "2", "--out", out, "--max-bad", "0.5"
    )
    return out


def test_finetuning_on_files_and_what_can_be_done_with_the_model(tmp_path, folder, tuned):
    before = (tuned / "results.json").read_bytes()
    assert results(tuned)["clips"] == 5 and results(tuned)["unreadable"] == 1
    best = ["--eval", tuned / "best.pt", *CPU]
    printed = run("train_finetune", *best, cwd=tmp_path).stdout  # the run's own test clips
    rows = (tmp_path / "runs" / "eval" / "predictions.csv").read_text().splitlines()
    assert len(rows) == 5 and rows[0].split(",")[1] in ("cat", "dog")
    assert "top-1" in printed and "unreadable, left out: cat/broken.mp4" in printed
    assert (tuned / "results.json").read_bytes() == before

    # All clips of a folder are tested, or one split; a subset of the classes is tested by name.
    for flags, count in (["--data", folder / "train"], 6), (
            ["--data", folder, "--split", "train"], 6), (["--data", tmp_path / "one"], 3):
        for i in (0, 2, 4) if count == 3 else ():
            path = tmp_path / "one" / "dog" / f"{i}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / "test" / "dog" / f"test{i}.mp4", path)
        run("train_finetune", *best, *flags, cwd=tmp_path)
        assert results(tmp_path / "runs" / "eval")["clips"] == count

    new = tmp_path / "new"
    new.mkdir()
    shutil.copy(folder / "test" / "dog" / "test0.mp4", new)
    media.write(new / "mute.mp4", audio=False)
    (new / "junk.mp4").write_bytes(b"no video")
    printed = run("train_finetune", *best, "--predict", new, cwd=tmp_path).stdout
    assert "mute.mp4: no audio track" in printed and "its video alone is used" in printed
    assert "junk.mp4: cannot be opened" in printed
    for name in "test0.mp4", "mute.mp4":
        assert re.search(rf"^{name}  (cat|dog) 0\.\d+  (cat|dog) 0", printed, re.M)

    ran = run("train_finetune", *best, "--predict", new / "junk.mp4", fails=True, cwd=tmp_path)
    assert "no file of" in ran.stderr


@pytest.mark.parametrize("processes", [3, 8])  # which don't divide the clips; more than there are
def test_evaluation_on_some_processes_is_that_on_one(tmp_path, folder, tuned, processes):
    flags = ["--eval", tuned / "best.pt", "--workers", "0", *CPU]
    run("train_finetune", *flags, "--out", tmp_path, processes=processes)
    ours, theirs = results(tmp_path), results(tuned)
    assert (ours["clips"], ours["unreadable"]) == (5, 1)
    assert ours["metrics"] == theirs["metrics"]


def test_validation_clips_are_not_trained_on(tmp_path, folder):
    flags = ["--data", folder / "train", "--out", tmp_path, "--dry-run"]
    printed = run("train_pretrain", *FILES, *flags).stdout
    clips = data.find_clips(folder / "train")
    count = int(data.is_validation(clips).sum())
    assert count and f"{len(clips) - count} for training, {count} for validation" in printed


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_step_that_a_clip_breaks_is_named_and_not_applied(tmp_path, script):
    clips, pretraining = tmp_path / "clips", script == "train_pretrain"
    for i in range(3):
        media.write(clips / "train" / "a" / f"good{i}.mp4", seconds=2.0)
    clicks = (np.arange(32_000) % 1600 < 64) * (-1.0) ** (np.arange(32_000) // 8)
    for part, loudness in ("train", 3e38), ("test", 0.8):  # finite, but not in the spectrogram
        media.write(
            clips / part / "b" / "loud.mkv", seconds=2.0, audio_codec="pcm_f32le", layout="mono",
            rate=16_000, wave=(loudness * clicks).astype(np.float32))

    flags = [*FILES, "--batch", "1", "--epochs", "3", "--out", tmp_path / "out", "--data"]
    flags += [clips / "train", "--val", clips / "test"] if pretraining else [clips]
    printed = run(script, *flags).stdout
    lines = [line for line in printed.splitlines() if "not finite" in line]
    named = "loss_audio" if pretraining else "loss"
    assert len(lines) == 3 and all(named in x and "loud.mkv" in x for x in lines)
    weights = avmae.load_checkpoint(tmp_path / "out" / "last.pt")["model"].values()
    assert all(p.isfinite().all() for p in weights)
    assert sum(np.isfinite(x) for x in losses(tmp_path / "out").values()) == 9


@pytest.mark.parametrize("count", [1, 3])
def test_pretraining_on_hardly_any_clips(tmp_path, count):
    for i in range(count):
        media.write(tmp_path / "clips" / f"{i}.mp4", seconds=2.0)
    run("train_pretrain", *FILES, "--data", tmp_path / "clips", "--out", tmp_path / "out")
    assert len(losses(tmp_path / "out")) == max(1, round(2 * max(1, count - 1) / 4))


# --------------------------------------------------------------------------------------- finetuning


@pytest.mark.parametrize(
    "args",
    [
        [], ["--modalities", "audio"], ["--modalities", "video"], ["--model", "encoder"],
        ["--model", "probe"], ["--layer-decay", "0"]],
    ids=str)
def test_finetuning_from_a_pretrained_model(tmp_path, whole, args):
    last = tmp_path / "a=b.pt"  # no stream of the name a
    shutil.copy(whole[0] / "last.pt", last)
    init = [last] if args else [f"video={last}", f"audio={last}"]  # one for both, or one for each
    printed = run("train_finetune", *FINE, *args, "--init", *init, "--out", tmp_path).stdout
    assert re.search("^new .*head.weight", printed, re.M) and len(losses(tmp_path)) == 12

    model, before = (avmae.load_model(f) for f in (tmp_path / "last.pt", whole[0] / "last.pt"))
    assert model.head.weight.any()
    for m in model.config.modalities:
        blocks = zip(model.encoder.blocks_for(m), before.encoder.blocks_for(m), strict=True)
        stayed = [ours.attn.qkv.weight.equal(theirs.attn.qkv.weight) for ours, theirs in blocks]
        assert set(stayed) == {bool({"probe", "--layer-decay"} & set(args))}


def test_finetuning_keeps_to_its_recipe(tmp_path, monkeypatch, capsys):
    """Learning rate, norm of the gradient, stochastic depth; and the best model is kept."""
    seeds, clipped, clip = [], [], torch.nn.utils.clip_grad_norm_
    drop = avmae.DropPath.forward
    monkeypatch.setattr(
        avmae.DropPath, "forward",
        lambda self, x: self.training and seeds.append(torch.initial_seed()) or drop(self, x))
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_",
        lambda p, norm, *rest: clipped.append(norm) or clip(p, norm, *rest))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    flags = [*FINE, "--drop-path", "0.5", "--eval-every", "1", "--lr", "0.4", "--seed", "2"]
    monkeypatch.setattr(sys, "argv", ["train_finetune.py", *flags, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "train_finetune.py"), run_name="__main__")

    assert not end.value.code and len(set(seeds)) == 12 and clipped == [1.0] * 12
    tops = [x["top-1"] for x in logged(tmp_path, "val")]
    steps = [x["step"] for x in read_log(tmp_path) if "val" in x]
    best = avmae.load_checkpoint(tmp_path / "best.pt")
    assert steps == [4, 8, 12] and best["step"] == steps[tops.index(max(tops))]
    assert best["metrics"]["top-1"] == max(tops)  # with this seed not the last
    printed = re.findall(r"top-1 ([\d.]+)", capsys.readouterr().out)
    assert list(map(float, printed)) == pytest.approx(tops, abs=1e-4)
    warmup = train_finetune.parse_args([]).warmup * 4
    rates = [train_pretrain.learning_rate(i, 0.4 * 4 / 16, warmup, 12) for i in range(12)]
    assert logged(tmp_path, "lr") == pytest.approx(rates)


@pytest.mark.parametrize(
    "k, modalities", [(0, ["audio"]), (1, ["video"]), (2, ["audio", "video"])])
def test_mixup_has_an_alpha_for_each_kind_of_model(tmp_path, k, modalities):
    alphas = {"none": [0, 0, 0], "others": [0.5, 0.5, 0.5], "own": [0, 0, 0]}
    alphas["others"][k], alphas["own"][k] = 0, 0.5
    for name, alpha in alphas.items():
        flags = ["--modalities", *modalities, "--mixup", *alpha, "--epochs", "1"]
        run("train_finetune", *FINE, *flags, "--out", tmp_path / name)

    none, others, own = (losses(tmp_path / name) for name in alphas)
    assert none == others and none != own


def test_a_stopped_finetuning_continues_with_the_same_losses(tmp_path):
    fine = [*FINE, "--save-every", "0", "--eval-every", "3", "--lr", "0.05"]
    drawn = [*fine, "--drop-path", "0.5", "--mixup", "0.5", "0.5", "0.5", "--micro-batch", "2"]
    for flags, number, processes in (drawn, signal.SIGTERM, 1), (fine, signal.SIGKILL, 2):
        whole, out = tmp_path / f"whole{processes}", tmp_path / f"cut{processes}"
        run("train_finetune", *flags, "--out", whole)
        interrupt(flags, out, number, "train_finetune", processes=processes)
        assert 0 < step_of(out / "last.pt") < 12
        run("train_finetune", *flags, "--out", out)
        close(out, whole)
        assert processes > 1 or losses(out) == losses(whole)


def test_momentum_starts_at_zero_though_the_first_step_is_skipped(monkeypatch):
    """What is not yet written is NaN here, as it may be anything."""
    model = avmae.Classifier(train_finetune.make_config(train_finetune.parse_args([]), (3,)))
    before = [p.detach().clone() for p in model.parameters()]
    monkeypatch.setattr(torch, "empty_like", lambda x, **kw: torch.full_like(x, torch.nan, **kw))
    optimizer = train_finetune.make_optimizer(model, 0.75)
    for group in optimizer.param_groups:
        group["lr"] = 0.5

    for skipped in 1.0, 0.0:
        for p in model.parameters():
            p.grad = torch.full_like(p, torch.inf if skipped else 2.0)
        optimizer.found_inf = torch.tensor(skipped)
        optimizer.step()
        for p, old in zip(model.parameters(), before, strict=True):
            torch.testing.assert_close(p.detach(), old if skipped else old - 1.0)


def test_each_modality_is_mixed_with_its_own_weight():
    inputs = {"video": torch.zeros(2, 3, dtype=torch.uint8), "audio": torch.zeros(2, 3)}
    inputs["video"][0], inputs["audio"][0] = 255, 1.0
    target = torch.eye(2)
    found = set()
    for place in range(3):
        mixed, labels = train_finetune.apply_mixup(inputs, target, 0.5, (0, 7, place))
        lam = {m: labels[m][0, 0].item() for m in inputs}
        found |= set(lam.values())
        assert mixed["audio"][0, 0].item() == pytest.approx(lam["audio"], abs=1e-6)
        assert mixed["video"][0, 0].item() == pytest.approx(2 * lam["video"] - 1, abs=1e-6)
    assert len(found) == 6
    assert train_finetune.apply_mixup(inputs, target, 0.0, (0, 7, 0))[0] is inputs


def test_logits_are_the_mean_of_modalities_and_views():
    inputs = {m: torch.randn(4, 3, 5) for m in avmae.MODALITIES}  # of three views
    found = train_finetune.predict(lambda x: x, inputs, 3)
    torch.testing.assert_close(found, (inputs["video"] + inputs["audio"]).mean(1) / 2)
    one = {m: x[:, 0] for m, x in inputs.items()}
    torch.testing.assert_close(
        train_finetune.predict(lambda x: x, one, 1), (one["video"] + one["audio"]) / 2)


# --------------------------------------------------------------------------------------- benchmarks


def write_clips_csv(folder, name):
    """Write six clips, and csv files in the columns of a benchmark; return the flags."""
    for i in range(6):
        media.write(folder / "clips" / f"{i}.mp4", seconds=3.0, clicks=(0.3 * i,))
    head, row, classes = {
        "vggsound": ("path,label,split", lambda i: f'{i}.mp4,"sound, {i % 2}"', []),
        "audioset": ("path,labels,split", lambda i: f"{i}.mp4,Sound {i}|Sound 9",
                     [f"labels,Sound {i}" for i in range(527)]),
        "epic": ("path,start,end,verb,noun,split", lambda i: f"{i}.mp4,0.5,2.5,v{i},n{10 * i}",
                 [f"verb,v{i}" for i in range(97)] + [f"noun,n{i}" for i in range(300)]),
        "ave": ("path,label,event_start,event_end,split",
                lambda i: f"{i}.mp4,{'Bark' if i % 2 else 'Axe'},2,7", [])}[name]

    rows = [head, *(f"{row(i)},{'train' if i < 4 else 'test'}" for i in range(6))]
    (folder / "a.csv").write_text("\n".join(rows) + "\n")
    if classes:
        (folder / "a.classes.csv").write_text("\n".join(["column,class", *classes]) + "\n")
    return ["--preset", name, "--data", folder / "clips", "--clips", folder / "a.csv"]


@pytest.mark.parametrize("name, metrics, classes", [
    ("vggsound", ["top-1", "top-5"], (2,)), ("ave", ["segment accuracy"], (3,)),
    ("audioset", ["mAP"], (527,)), ("epic", ["action", "verb", "noun"], (97, 300))])
def test_a_benchmark(tmp_path, name, metrics, classes):
    """Each kind of labels is trained and tested; every preset's recipe runs."""
    flags, out = write_clips_csv(tmp_path, name), tmp_path / "out"
    small = [*FILES[2:], "--fusion-layer", "2", "--views", "2", "--out", out]
    if name == "ave":  # its model sees all of the 10 s
        small += ["--frames", "32", "--seconds", "10", "--frame-step", 10 / 32, "--views", "1"]
    printed = run("train_finetune", *flags, *small).stdout
    assert "train is train, val is test" in printed and f"{classes[0]} " in printed
    assert list(results(out)["metrics"]) == metrics and results(out)["clips"] == 2
    assert tuple(avmae.load_checkpoint(out / "last.pt")["config"]["num_classes"]) == classes
    assert all(np.isfinite(list(losses(out).values())))

    if name == "vggsound":
        csv_file = tmp_path / "a.csv"
        csv_file.write_text(csv_file.read_text().replace("sound, 1", "a new sound"))
        ran = run("train_finetune", *flags, *small, fails=True)
        assert "classes ('sound, 0', 'sound, 1') there" in ran.stderr
        ran = run("train_finetune", "--eval", out / "last.pt", *flags[2:], fails=True)
        assert "not among the classes: a new sound" in ran.stderr

        lines = csv_file.read_text().replace("a new sound", "sound, 1").splitlines()
        csv_file.write_text("\n".join([lines[0], lines[1], *lines[1:]]) + "\n")
        printed = run("train_finetune", *flags, *small).stdout
        assert "warning: 5 training clips instead of 4" in printed


def test_features_of_a_folder(tmp_path, whole, folder):
    found, clips = [], data.find_clips(folder / "train")
    names = [name for name in map(clips.name, range(len(clips))) if "broken" not in name]
    for processes in 1, 2:
        file = tmp_path / f"{processes}.npz"
        run(
            "train_finetune", "--embed", file, "--eval", whole[0] / "last.pt", "--data",
            folder / "train", "--workers", "0", *CPU, processes=processes, cwd=tmp_path)
        found.append(np.load(file))

    assert names == found[0]["names"].tolist() == found[1]["names"].tolist() and len(names) == 6
    for m in avmae.MODALITIES:
        assert found[0][m].shape == (6, 96)
        np.testing.assert_allclose(found[0][m], found[1][m], atol=1e-5)


# ------------------------------------------------------------------------------------------ recipes


def test_presets_are_the_papers_tables():
    """Tables 20, 22, 23, 24."""
    common = dict(
        batch=512, warmup=4.0, frames=16, frame_step=0.16, image=224, mels=128, mask_video=0.9,
        joint_layers=2, decoder="shared", objective="joint", size="large")
    for name, table in {
        "vggsound": dict(lr=1.5e-4, epochs=400, seconds=8.0, mask_audio=0.5, encoder="separate"),
        "audioset": dict(lr=3e-4, epochs=120, seconds=10.0, mask_audio=0.7, encoder="mid")}.items():
        args = vars(train_pretrain.parse_args(["--preset", name, "--dry-run"]))
        assert {k: args[k] for k in common | table} == common | table
    assert (train_pretrain.WEIGHT_DECAY, train_finetune.MOMENTUM) == (0.05, 0.9)

    common = dict(
        layer_decay=0.75, warmup=2.5, epochs=50, smoothing=0.3, drop_path=0.3, frames=32,
        frame_step=0.08, image=224, views=4, size="large")
    drawn = dict(jitter=(0.9, 1.33), flip=True, color=True, time_masks=(4, 48))
    for name, table, layer, augment in (
        ("vggsound", dict(batch=64, lr=0.8, mixup=(0.5, 0.5, 0.5), seconds=8.0), 16,
         dict(time_shift=False, frequency_masks=(1, 48))),
        ("epic", dict(batch=64, lr=1.2, mixup=(1.25, 0.5, 0.5), seconds=8.0), 16,
         dict(time_shift=True, frequency_masks=(1, 48))),
        ("audioset", dict(batch=128, lr=1.6, mixup=(1.25, 0.5, 0.5), seconds=10.0), 18,
         dict(time_shift=True, frequency_masks=(2, 36)))):
        args = train_finetune.parse_args(["--preset", name, "--dry-run"])
        assert {k: vars(args)[k] for k in common | table} == common | table
        assert vars(train_finetune.AUGMENT[args.augment]) == drawn | augment and args.time_masks
        config = train_finetune.make_config(args, (309,))
        assert (config.fusion_layer, config.num_bottlenecks) == (layer, 4)


def test_the_preset_of_ave_sees_ten_seconds():
    args = train_finetune.parse_args(["--preset", "ave", "--dry-run"])
    assert (args.frames * args.frame_step, args.seconds, args.views) == (10.0, 10.0, 1)
    assert (args.size, args.lr, args.batch) == ("base", 0.8, 64)


@pytest.mark.parametrize(
    "args", [["--preset", "vggsound", "--encoder", "mid"], ["--preset", "audioset"], []], ids=str)
def test_dry_run_writes_nothing(tmp_path, args):
    printed = run("train_pretrain", *args, "--dry-run", "--out", tmp_path / "out").stdout
    if "vggsound" in args:
        assert "595,849,984 parameters" in printed and "172,427" in printed
        assert "1568 video (1411 masked), 400 audio (200 masked)" in printed
        assert "steps   134,709;" in printed  # 400 x 172,427 / 512
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_losses_that_are_not_finite_name_the_step_and_stop(tmp_path, processes):
    flags = ["--out", tmp_path, "--lr", "1e30", "--warmup", "0.1"]
    ran = run("train_pretrain", *TINY, *flags, fails=True, processes=processes)
    assert "in a row were not finite" in ran.stderr
    first = next(line for line in ran.stdout.splitlines() if "not finite" in line)
    assert "video" in first and "built-in clip" in first and not (tmp_path / "last.pt").exists()


def test_three_steps_in_a_row_end_a_run(tmp_path, capsys):
    """A finite loss may have a gradient that is not; a row goes on in the next interval."""
    log = object.__new__(train_pretrain.Log)
    log.run = types.SimpleNamespace(
        out=tmp_path, args=types.SimpleNamespace(max_bad=0.1), sum=lambda x: x)
    log.names, log.num_failed = ["loss"], 0
    clips = data.Builtin(9, train_pretrain.make_window(train_pretrain.parse_args([])))
    log.loader = types.SimpleNamespace(dataset=clips, num_loaded=0, num_unreadable=0)

    def printed(*norms):
        log.records = [(k, None, torch.tensor([k])) for k in range(len(norms))]
        log.check_health(torch.tensor([(1.0, norm) for norm in norms]))
        return capsys.readouterr().out.splitlines()

    inf = float("inf")
    assert printed(1.0, inf, 1.0) == [
        f"step 1 skipped: gradient not finite; clips: {clips.name(1)}"]
    assert len(printed(inf, inf, 1.0, inf)) == 3 and len(printed(inf, 1.0)) == 1
    assert len(printed(inf, inf)) == 2
    with pytest.raises(avmae.UserError, match="^3 steps in a row were not finite"):
        printed(inf, 1.0)


@pytest.mark.parametrize("loaded, unreadable, fine", [
    (9, 9, True), (10, 1, True), (10, 2, False), (1000, 100, True), (1000, 101, False)])
def test_too_many_unreadable_clips_end_a_run(tmp_path, loaded, unreadable, fine):
    """Above --max-bad, once as many clips as there are, or 1,000, have been loaded."""
    log = object.__new__(train_pretrain.Log)
    log.run = types.SimpleNamespace(
        out=tmp_path, args=types.SimpleNamespace(max_bad=0.1), sum=lambda x: x)
    log.records, log.num_failed = [], 0
    log.loader = types.SimpleNamespace(
        dataset=range(10 if loaded <= 10 else 2000), num_loaded=loaded, num_unreadable=unreadable)
    if fine:
        log.check_health(torch.zeros(0, 2))
    else:
        with pytest.raises(avmae.UserError, match=f"{unreadable} of {loaded} clips"):
            log.check_health(torch.zeros(0, 2))
