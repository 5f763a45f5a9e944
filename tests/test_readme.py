"""The README says what is so: its commands parse and build, its names exist."""

import json
import pathlib
import re
import shlex
import subprocess

import pytest
import torch

import avmae
import data
import evidence
import train_finetune
import train_pretrain

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SCRIPTS = {"train_pretrain.py": train_pretrain, "train_finetune.py": train_finetune}


def commands():
    """Every command line of our scripts in the README, loops unrolled."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S) + re.findall(
        r"((?:^    \S.*\n(?:        .*\n)*)+)", README, re.M)
    for block in blocks:
        lines = "\n".join(
            line[4:] if line.startswith("    ") and "P --" not in line else line
            for line in block.splitlines())
        if not re.search(r"(train_\w+|data)\.py", lines):
            continue
        shell = (
            'torchrun() { echo "RUN $*"; }; python() { torchrun "$@"; }; '
            "pip() { :; }; pytest() { :; }\n" + lines)
        ran = subprocess.run(["bash", "-euc", shell], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        yield from (
            line[4:]
            for line in ran.stdout.splitlines()
            if re.match(r"RUN .*(train_\w+|data)\.py", line))


def test_every_table_and_figure_of_the_paper_has_a_row():
    assert len(list(commands())) > 50
    rows = re.findall(r"^\| ([^|]+) \|", README[README.index("## Where the paper") :], re.M)
    for what, count in ("Table", 24), ("Fig", 5):
        numbers = re.findall(rf"{what}s?\.? ((?:\d+(?:, )?)+)", " | ".join(rows))
        found = {int(n) for group in numbers for n in group.split(",") if n.strip()}
        assert set(range(1, count + 1)) <= found, (what, found)


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_a_command_of_the_readme(command):
    words = shlex.split(command)
    script = next(w for w in words if w.endswith(".py"))
    args = words[words.index(script) + 1 :]
    if script == "data.py":
        assert args[0] in ("check", "prepare")
        return
    module = SCRIPTS[script]
    if "--evaluate" in args or "--eval" in args:  # these take their settings from a checkpoint
        args = [a for a in args if not a.endswith(".pt") and a not in ("--evaluate", "--eval")]
    args = module.parse(args)
    with torch.device("meta"):
        if module is train_pretrain:
            avmae.build(module.configs(args)[0])
        else:
            assert args.init == () or all(
                "runs/" in p or p.endswith(".safetensors") for p in args.init)
            avmae.build(module.config_of(args, (97, 300) if args.task == "epic" else (309,)))


def test_the_table_of_results_is_that_of_the_results():
    results = json.loads((ROOT / "assets" / "results.json").read_text())
    assert "\n".join(evidence.table(results)) in README


def test_names_in_the_readme_exist():
    modules = (avmae, data, train_pretrain, train_finetune)
    table = README[README.index("## Where the paper is") : README.index("```bash")]
    flags = {f"--{f.replace('_', '-')}" for m in modules[2:] for f in m.SETTINGS} | {"--preset"}
    for _, code, given in re.findall(r"^\| (.*?) \| (.*?) \|(.*)\|$", table, re.M)[1:]:
        for name in re.findall(r"`([A-Za-z_]+(?:\.[A-Za-z_]+)?)`", code):
            owner, _, thing = name.rpartition(".")
            if name not in ("log.jsonl", "clips_per_s"):
                places = modules if not owner else [
                    getattr(m, owner) if hasattr(m, owner) else m
                    for m in modules
                    if hasattr(m, owner) or m.__name__ == owner]
                assert any(hasattr(place, thing) for place in places), name
        assert set(re.findall(r"--[a-z-]+", given)) <= flags, given
    for file in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
        assert (ROOT / file).exists(), file


def test_the_readmes_embedding_of_a_clip(tmp_path, monkeypatch):
    import media

    code = README[README.index("```python") + 9 :]
    code = code[: code.index("```")]
    monkeypatch.chdir(tmp_path)
    media.write(tmp_path / "clip.mp4", seconds=3.0)
    config, _ = train_pretrain.configs(train_pretrain.parse([]))
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    avmae.save(avmae.build(config), tmp_path / "runs" / "demo" / "last.pt")
    scope = {}
    exec(code, scope)
    assert {m: tuple(x.shape) for m, x in scope["embedding"].items()} == {
        "video": (1, 96), "audio": (1, 96)}
