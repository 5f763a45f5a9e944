"""Test that commands in the README and experiments.sh build, and that names and files exist."""

import argparse
import functools
import inspect
import pathlib
import re
import runpy
import shlex
import shutil
import subprocess

import pytest
import torch

import avmae
import data
import train_finetune
import train_pretrain

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
EXPERIMENTS = ROOT / "tools" / "experiments.sh"
TABLES = re.findall(r"^table_(\w+)\(\)", EXPERIMENTS.read_text(), re.M)
MODULES = {"train_pretrain.py": train_pretrain, "train_finetune.py": train_finetune}
TASKS = {  # preset: task, number of classes
    "epic": ("verb_noun", (97, 300)), "ave": ("segments", (29,)),
    "audioset": ("multi_label", (527,))}
OTHER_FLAGS = {"--nproc_per_node", "--ipc", "--shm-size", "--help"}  # of torchrun, docker, argparse


class Caught(Exception):
    """Carries a script's argument parser."""


@functools.cache
def get_parser(script):
    """Return the argparse parser of a script."""

    def catch(parser, *_):
        raise Caught(parser)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Caught) as caught:
        patch.setattr(argparse.ArgumentParser, "parse_args", catch)
        if script in MODULES:
            MODULES[script].parse_args([])
        else:
            runpy.run_path(str(ROOT / script), run_name="script")["main"]()
    return caught.value.args[0]


def parse(command):
    """Return a command's script and settings; --eval and what needs it are left out."""
    script, *args = shlex.split(command)
    if script not in MODULES:
        return script, get_parser(script).parse_args(args)

    if "--eval" in args:  # the checkpoint, which does not exist here, has the other settings
        for flag in {"--eval", "--predict", "--embed"} & set(args):
            first = args.index(flag)
            del args[first : first + 2]
        args += ["--preset", "vggsound"] if "--data" in args else []
    return script, MODULES[script].parse_args(args)


@functools.cache
def build(command):
    """Build the model of a command on the meta device."""
    script, args = parse(command)
    with torch.device("meta"):
        if script == "train_pretrain.py":
            avmae.build_model(train_pretrain.make_config(args))
        elif script == "train_finetune.py":
            task, num_classes = TASKS.get(args.preset, ("single_label", (309,)))
            avmae.build_model(train_finetune.make_config(args, num_classes, task))


def readme_commands():
    """Return the commands in indented blocks and in inline code, in order, from the script on."""
    text = re.sub(r"```.*?```", "", re.sub(r"\\\n\s*", " ", README), flags=re.S)
    code = re.findall(r"^(?: {4}| {7})(\S.*)|`((?:python|torchrun) [^`]+)`", text, re.M)
    pattern = r"((?:train_\w+|(?:tools|tests)/\w+)\.py\b[^#&|]*)"
    return sum((re.findall(pattern, "".join(pair)) for pair in code), [])


def experiments(folder, *tables):
    """Return the commands that a copy of the script would run for these tables."""
    copy = pathlib.Path(folder, "tools", EXPERIMENTS.name)
    copy.parent.mkdir(exist_ok=True)
    shutil.copy(EXPERIMENTS, copy)
    stub = 'python() { echo "$*"; }; export -f python; RUN=echo exec bash "$0" "$@"'
    return subprocess.check_output(["bash", "-c", stub, copy, *tables], text=True).splitlines()


def check_commands(commands):
    """Build commands; assert that csv files and checkpoints come from earlier commands."""
    written = set()
    for command in commands:
        build(command)
        script, args = parse(command)
        if script in MODULES:
            used = set(re.findall(r" ((?:runs|lists)/\S+\.pt|\S+\.csv)\b", command))
            assert used <= written, (command, used - written)
        out = getattr(args, "out", "")
        written |= {out, f"{out}/last.pt", f"{out}/best.pt"}


def test_commands_of_the_readme_build():
    commands = readme_commands()
    assert len(commands) > 15
    check_commands(commands)
    for names in re.findall(r"tools/experiments\.sh ([\w ]+)", README):
        assert set(names.split()) <= {*TABLES, "lists"}


def test_commands_of_the_experiments_build(tmp_path):
    for line in experiments(tmp_path, "lists"):  # the authors' lists, of which there is none yet
        path = tmp_path / line.removeprefix("skipped: there is no ")
        path.parent.mkdir(exist_ok=True)
        path.touch()

    commands = [experiments(tmp_path, table) for table in ("lists", *TABLES)]
    assert all(commands)
    check_commands(sum(commands, []))


@pytest.mark.parametrize("table, names, expected", [
    ("1", "encoder decoder size epochs", {
        (e, d, "base", 400) for e, d in [
            *((e, "shared") for e in avmae.FUSION), ("mid", "early"), ("mid", "separate"),
            ("early", "separate"), ("shared", "separate")]}),
    ("2", "objective encoder", {(objective, "early") for objective in avmae.OBJECTIVES}),
    ("5", "epochs encoder size", {(n, "mid", "large") for n in (200, 400, 800, 1200)}),
    ("11", "mask_audio mask_video encoder epochs", {
        (a, v, "separate", 400) for a in (0.3, 0.5, 0.7, 0.8) for v in (0.7, 0.9, 0.95)}),
    ("12", "modalities mask_audio", {(("audio",), a) for a in (0.3, 0.5, 0.7, 0.8)}),
    ("13", "modalities mask_video", {(("video",), v) for v in (0.7, 0.9, 0.95)}),
    ("15", "joint_layers", {(1,), (2,), (4,), (8,)}),
    ("16", "preset encoder epochs", {("audioset", e, 120) for e in ("mid", "separate")}),
    ("17", "fraction epochs", {(0.5, 800), (1.0, 400)}),
    ("18", "model modalities", {("probe", ("audio",))}),
    ("14", "model size", {("mbt", "base"), ("encoder", "base")}),
    ("10", "init", {(("runs/b-video/last.pt", "runs/b-audio/last.pt"),)}),
    ("7", "preset", {("vggsound",), ("audioset",), ("epic",)})])
def test_experiments_have_the_settings_of_the_paper(table, names, expected, tmp_path):
    script = f"train_{'finetune' if table in ('7', '10', '14', '18') else 'pretrain'}.py"
    runs = [args for name, args in map(parse, experiments(tmp_path, table)) if name == script]
    assert {tuple(getattr(args, name) for name in names.split()) for args in runs} == expected


def paper_table():
    """Return the rows (paper, code) of "Where the paper is in the code"."""
    section = README.split("## Where the paper is in the code")[1].split("\n## ")[0]
    return re.findall(r"^\| (.*?) \| (.*?) \|$", section, re.M)[1:]


def test_every_table_and_figure_of_the_paper_has_a_row_and_an_experiment():
    rows = " | ".join(paper for paper, _ in paper_table())
    for kind, count in ("Table", 24), ("Fig", 5):
        groups = re.findall(rf"\b{kind}s?\.? (\d+(?:(?:, | and |-)\d+)*)", rows)
        numbers = {int(n) for group in groups for n in re.findall(r"\d+", group)}
        assert numbers == set(range(1, count + 1)), kind

    assert set(TABLES) == {*map(str, range(1, 25)), "fig4", "fig5"}


def test_names_in_the_table_of_the_paper_exist():
    modules = avmae, data, train_pretrain, train_finetune
    names = re.findall(
        r"`([A-Za-z_]+(?:\.(?!py)[A-Za-z_]+)?)`", " ".join(code for _, code in paper_table()))
    assert len(names) > 20
    for name in names:
        owner, _, attribute = name.rpartition(".")
        owners = [m for m in modules if not owner or m.__name__ == owner]
        owners += [getattr(m, owner) for m in modules if owner and hasattr(m, owner)]
        assert any(hasattr(x, attribute) for x in owners), name

    assert "# Eq. 1" in inspect.getsource(avmae.AVMAE.forward)


def test_flags_and_files_in_the_readme_exist():
    scripts = [*MODULES, "tests/benchmark.py", "tests/parity.py"]
    scripts += [f"tools/{path.name}" for path in (ROOT / "tools").glob("*.py")]
    flags = {flag for x in scripts for flag in get_parser(x)._option_string_actions} | OTHER_FLAGS
    used = set(re.findall(r"(?<![\w|-])--[a-z][a-z_-]*", README))
    assert used <= flags, used - flags

    files = re.findall(r"\]\((?!http|#)([^)]+)\)", README)
    files += re.findall(r"`((?:tools|tests|assets)/[\w./]+|\w+\.py)`", README)
    for file in files:
        assert (ROOT / file).exists(), file


def test_python_in_the_readme_runs(monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    tiny, scope = (avmae.TransformerConfig(24, 3, 2, 32),) * 2, {}
    monkeypatch.setitem(avmae.MODEL_SIZES, "tiny", tiny)
    exec(code.replace("range(5)", "range(1)"), scope)
    assert scope["reconstruction"].shape == (2, 16, 224, 224, 3)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200
