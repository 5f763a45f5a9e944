"""The README and the script of experiments say what is so: commands parse and build, names exist."""

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


def model_of(command):
    """The model that a command builds, on no device; None if it only reads or measures."""
    script, *args = shlex.split(command)
    if not script.startswith("train_"):
        return None

    module = {"train_pretrain.py": train_pretrain, "train_finetune.py": train_finetune}[script]
    if "--eval" in args:  # which takes its settings from the checkpoint
        assert args[args.index("--eval") + 1].startswith("runs/")
        del args[args.index("--eval") : args.index("--eval") + 2]
        args = [a for a in args if a not in ("--predict", "--embed") and not a.endswith(".npz")]
        args = args if "--data" in args or not args else ["--data", *args]

    args = module.parse_args(args)
    with torch.device("meta"):
        if module is train_pretrain:
            return avmae.build(train_pretrain.config_of(args))
        num_classes = CLASSES.get(args.preset, (309,))
        return avmae.build(train_finetune.config_of(args, num_classes, args.preset))


@pytest.mark.parametrize("command", sorted(set(commands_of_the_readme())))
def test_a_command_of_the_readme(command):
    model_of(command)


def test_commands_are_found():
    assert len(set(commands_of_the_readme())) > 7


@pytest.mark.parametrize("table", TABLES)
def test_a_table_of_the_paper_has_commands_that_build(table):
    commands = experiments(table)
    assert commands
    for command in set(commands):
        model_of(command)


def test_tables_do_what_the_paper_did():
    """What tells one row of a table from another is in its commands."""

    def flags(table, script, *names):
        found = set()
        for command in experiments(table):
            name, *args = shlex.split(command)
            if name == f"train_{script}.py":
                module = train_pretrain if script == "pretrain" else train_finetune
                args = module.parse_args(args)
                found.add(tuple(getattr(args, n) for n in names))
        return found

    fusions = flags("1", "pretrain", "encoder", "decoder", "size", "epochs")
    assert {x[:2] for x in fusions} >= {(e, "shared") for e in avmae.PLANS} | {("mid", "separate")}
    assert {x[2:] for x in fusions} == {("base", 400)}
    assert flags("2", "pretrain", "objective", "encoder") == {(o, "early") for o in avmae.CONTEXT}
    assert flags("5", "pretrain", "epochs", "encoder", "size") == {
        (n, "mid", "large") for n in (200, 400, 800, 1200)}
    assert flags("11", "pretrain", "mask_audio", "mask_video", "encoder", "epochs") == {
        (a, v, "separate", 400) for a in (0.3, 0.5, 0.7, 0.8) for v in (0.7, 0.9, 0.95)}
    assert flags("12", "pretrain", "modalities", "mask_audio") == {
        (("audio",), a) for a in (0.3, 0.5, 0.7, 0.8)}
    assert flags("13", "pretrain", "modalities", "mask_video") == {
        (("video",), v) for v in (0.7, 0.9, 0.95)}
    assert flags("15", "pretrain", "joint_layers") == {(1,), (2,), (4,), (8,)}
    assert flags("16", "pretrain", "preset", "encoder", "epochs") == {
        ("audioset", e, 120) for e in ("mid", "separate")}
    assert flags("17", "pretrain", "fraction", "epochs") == {(0.5, 800), (1.0, 400)}
    assert ("probe", ("audio",)) in flags("18", "finetune", "model", "modalities")
    assert {x for x, _ in flags("14", "finetune", "model", "size")} == {"mbt", "encoder"}
    assert len(next(x for (x,) in flags("10", "finetune", "init"))) == 2
    assert {x for (x,) in flags("7", "finetune", "preset")} == {"vggsound", "audioset", "epic"}


def test_every_table_and_figure_of_the_paper_has_a_row():
    rows = re.findall(r"^\| ([^|]+) \|", README[README.index("## Where the paper") :], re.M)
    for what, count in ("Table", 24), ("Fig", 5):
        numbers = re.findall(rf"{what}s?\.? ((?:\d+(?:, )?)+)", " | ".join(rows))
        found = {int(n) for group in numbers for n in group.split(",") if n.strip()}
        assert set(range(1, count + 1)) <= found, (what, found)
    assert {str(n) for n in range(1, 25)} | {"fig4", "fig5"} == set(TABLES)


def test_names_in_the_readme_exist():
    modules = (avmae, data, train_pretrain, train_finetune)
    table = README[README.index("## Where the paper is") : README.index("## Differences")]
    for _, code in re.findall(r"^\| (.*?) \| (.*?) \|$", table, re.M)[1:]:
        for name in re.findall(r"`([A-Za-z_]+(?:\.[A-Za-z_]+)?)`", code):
            owner, _, thing = name.rpartition(".")
            places = [getattr(m, owner, m) for m in modules if not owner or hasattr(m, owner)]
            places += [m for m in modules if m.__name__ == owner]
            assert any(hasattr(place, thing) for place in places), name

    flags = {
        f"--{f.replace('_', '-')}"
        for module in modules[2:] for group in module.GROUPS.values() for f in group}
    others = {"--max-restarts", "--ipc", "--repeats", "--peer", "--growth", "--preset", "--help"}
    used = set(re.findall(r"`[^`\n]*?(--[a-z][a-z-]*)", README))
    assert used <= flags | others, used - flags

    for file in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
        assert (ROOT / file).exists(), file


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.S))
def test_python_in_the_readme_runs(code):
    code = code.replace("range(5)", "range(1)").replace('SIZES["tiny"]', "TINY")
    avmae.TINY = (avmae.Size(24, 3, 2, 32), avmae.Size(16, 3, 2, 24))
    scope = {}
    exec(code, scope)
    assert scope["rebuilt"].shape == (2, 16, 224, 224, 3)


def test_the_length_of_what_is_to_be_read():
    """The README's counts of lines, to ten."""
    paper = (ROOT / "avmae.py").read_text().split("Nothing below belongs to the paper")[0]
    stated = int(re.search(r"^\| `avmae.py`, down to [^|]*\| (\d+) \|", README, re.M)[1])
    assert abs(stated - len(paper.splitlines())) <= 10
