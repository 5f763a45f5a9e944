"""The README and the script of experiments say what is so: commands build, names exist."""

import os
import pathlib
import re
import shlex
import subprocess

import pytest
import torch

import avmae
import data
import train_finetune
import train_pretrain

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
EXPERIMENTS = ROOT / "assets" / "experiments.sh"
TABLES = re.findall(r"^table_(\w+)\(\)", EXPERIMENTS.read_text(), re.M)
CLASSES = {"epic": (97, 300), "ave": (29,), "audioset": (527,)}
MODULES = {"train_pretrain.py": train_pretrain, "train_finetune.py": train_finetune}


def experiments(*tables):
    """The commands that the script would run for these tables."""
    stub = 'python() { echo "$*"; }; export -f python; exec bash "$0" "$@"'
    ran = subprocess.run(
        ["bash", "-c", stub, str(EXPERIMENTS), *tables], capture_output=True, text=True,
        env={**os.environ, "RUN": "echo"})
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


def commands_of_the_readme():
    for block in re.findall(r"((?:^    \S.*\n(?:        .*\n)*)+)", README, re.M):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            yield from re.findall(r"((?:train_\w+|data)\.py [^#&]*)", line)


def parsed(command):
    """Module and settings of a command; None if it is one of data.py."""
    script, *args = shlex.split(command)
    if script not in MODULES:
        return None, None

    if "--eval" in args:  # which takes its settings from the checkpoint
        assert args[args.index("--eval") + 1].startswith("runs/")
        del args[args.index("--eval") : args.index("--eval") + 2]
        args = [a for a in args if a not in ("--predict", "--embed") and not a.endswith(".npz")]
        args = args if "--data" in args or not args else ["--data", *args]
    return MODULES[script], MODULES[script].parse_args(args)


def build(command):
    """Builds the model of a command, on no device."""
    module, args = parsed(command)
    with torch.device("meta"):
        if module is train_pretrain:
            avmae.build(module.config_of(args))
        elif module is train_finetune:
            num_classes = CLASSES.get(args.preset, (309,))
            avmae.build(module.config_of(args, num_classes, args.preset))


def test_commands_of_the_readme_build():
    commands = set(commands_of_the_readme())
    assert len(commands) > 7
    for command in commands:
        build(command)


@pytest.mark.parametrize("table", TABLES)
def test_a_table_of_the_paper_has_commands_that_build(table):
    commands = experiments(table)
    assert commands
    for command in set(commands):
        build(command)


@pytest.mark.parametrize("table, names, expected", [
    ("1", "encoder decoder size epochs", {
        (e, d, "base", 400) for e, d in [
            *((e, "shared") for e in avmae.PLANS), ("mid", "early"), ("mid", "separate"),
            ("early", "separate"), ("shared", "separate")]}),
    ("2", "objective encoder", {(objective, "early") for objective in avmae.CONTEXT}),
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
def test_tables_do_what_the_paper_did(table, names, expected):
    """What tells one row of a table from another is in its commands."""
    module = train_finetune if table in ("7", "10", "14", "18") else train_pretrain
    runs = [args for found, args in map(parsed, experiments(table)) if found is module]
    assert {tuple(getattr(args, name) for name in names.split()) for args in runs} == expected


def test_every_table_and_figure_of_the_paper_has_a_row():
    rows = re.findall(r"^\| ([^|]+) \|", README[README.index("## Where the paper") :], re.M)
    for what, count in ("Table", 24), ("Fig", 5):
        numbers = re.findall(rf"{what}s?\.? ((?:\d+(?:, )?)+)", " | ".join(rows))
        found = {int(n) for group in numbers for n in group.split(",") if n.strip()}
        assert set(range(1, count + 1)) <= found, (what, found)
    assert {str(n) for n in range(1, 25)} | {"fig4", "fig5"} == set(TABLES)


def test_names_in_the_readme_exist():
    modules = (avmae, data, *MODULES.values())
    table = README[README.index("## Where the paper is") : README.index("## Differences")]
    for _, code in re.findall(r"^\| (.*?) \| (.*?) \|$", table, re.M)[1:]:
        for name in re.findall(r"`([A-Za-z_]+(?:\.[A-Za-z_]+)?)`", code):
            owner, _, thing = name.rpartition(".")
            places = [getattr(m, owner, m) for m in modules if not owner or hasattr(m, owner)]
            places += [m for m in modules if m.__name__ == owner]
            assert any(hasattr(place, thing) for place in places), name

    flags = {
        f"--{f.replace('_', '-')}"
        for module in MODULES.values() for group in module.GROUPS.values() for f in group}
    others = {"--max-restarts", "--ipc", "--repeats", "--peer", "--growth", "--preset", "--help"}
    used = set(re.findall(r"`[^`\n]*?(--[a-z][a-z-]*)", README))
    assert used <= flags | others, used - flags

    for file in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
        assert (ROOT / file).exists(), file


def test_python_in_the_readme_runs(monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    small, scope = (avmae.Size(24, 3, 2, 32), avmae.Size(16, 3, 2, 24)), {}
    monkeypatch.setitem(avmae.SIZES, "tiny", small)
    exec(code.replace("range(5)", "range(1)"), scope)
    assert scope["rebuilt"].shape == (2, 16, 224, 224, 3)


def test_the_length_of_what_is_to_be_read():
    """The README's counts of lines, to ten."""
    paper = (ROOT / "avmae.py").read_text().split("Nothing below belongs to the paper")[0]
    stated = int(re.search(r"^\| `avmae.py`, down to [^|]*\| (\d+) \|", README, re.M)[1])
    assert abs(stated - len(paper.splitlines())) <= 10
