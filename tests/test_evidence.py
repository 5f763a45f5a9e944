"""The evidence: its commands are understood, its verdicts are right, the README says what they say.
No run takes place."""

import argparse
import itertools
import json
import pathlib
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import evidence
import train_finetune
import train_pretrain

ASSETS = evidence.ROOT / "assets"


def arguments(folder, seeds=(1, 2), draws=(1, 2)):
    return argparse.Namespace(
        out=pathlib.Path(folder), assets=pathlib.Path(folder), seeds=seeds, draws=draws, tiny=False)


def test_the_scripts_understand_every_command_and_what_it_needs_comes_first():
    plan, done, sides = evidence.plan_of(arguments("runs/evidence")), set(), {}
    for name, (script, *flags) in plan.items():
        if script == "train_pretrain.py":
            train_pretrain.config_of(train_pretrain.parse_args(flags))
        else:
            args, (side, draw) = train_finetune.parse_args(flags), name.split("/")
            needed = {pathlib.Path(x).parent.relative_to("runs/evidence") for x in args.init}
            assert {x.as_posix() for x in needed} <= done
            assert all(x.name == draw.split("-")[0] for x in needed)  # of the same seed
            sides.setdefault(side, []).append(args.seed)
        done.add(name)

    assert list(plan)[:2] == ["mid/1", "mid/2"] and len(sides) > 15
    assert all(seeds == [11, 12, 21, 22] for seeds in sides.values())  # both sides have the same


@pytest.mark.parametrize("gains, paper, verdict, interval", [
    ([5, 1, 3, 4, 2], "64.2 > 51.0", "agrees", [1.04, 4.96]),  # scipy.stats.t.interval's
    ([-4, -5, -6], ">", "disagrees", [-7.48, -2.52]),
    ([-1, 5, 6], ">", "cannot tell", [-6.07, 12.74]),
    ([1, -5, -6], ">", "cannot tell", [-12.74, 6.07]),
    ([-0.5, 0.0, 0.5], "similar", "agrees", [-1.24, 1.24]),
    ([4, 5, 6], "similar", "disagrees", [2.52, 7.48]),
    ([-6, -5, -4], "similar", "disagrees", [-7.48, -2.52]),
    ([-1, 1, 3], "similar", "cannot tell", [-3.97, 5.97]),
    ([-3, -1, 1], "similar", "cannot tell", [-5.97, 3.97])])
def test_a_comparison_is_of_pairs(gains, paper, verdict, interval):
    second = [70.0, 69.0, 72.0, 68.0, 71.0][: len(gains)]  # which play no role
    first = [x + y for x, y in zip(gains, second)]
    found = evidence.compare("a", "b", paper, {"a": first, "b": second}.get)
    assert found["verdict"] == verdict
    assert found["interval"] == pytest.approx(interval, abs=0.01)
    assert found["difference"] == pytest.approx(sum(interval) / 2, abs=0.01)
    assert found["means"][0] - found["means"][1] == pytest.approx(found["difference"], abs=0.02)


def test_intervals_hold_95_percent():
    for n, t in evidence.STUDENT.items():
        x = torch.linspace(-t, t, 10_001, dtype=torch.float64)
        density = torch.distributions.StudentT(torch.tensor(n - 1.0)).log_prob(x).exp()
        assert torch.trapezoid(density, x).item() == pytest.approx(0.95, abs=1e-4)


def test_questions_are_answered_as_soon_as_their_runs_are_there(tmp_path):
    args = arguments(tmp_path, seeds=(1, 2, 3))
    plan, question = evidence.plan_of(args), next(iter(evidence.QUESTIONS))
    for name, command in plan.items():
        if name.startswith(("mid/", "mid_on_video_audio/", "scratch_on_video_audio/")):
            seed, _, draw = name.split("/")[1].partition("-")
            top1 = 0.7 + 0.1 * (seed == "2") + 0.01 * name.startswith("mid_on") * int(draw or 0)
            figures = {"held_out": {}} if "pretrain" in command[0] else {"metrics": {"top-1": top1}}
            (tmp_path / name).mkdir(parents=True)
            (tmp_path / name / "seconds.txt").write_text("3")
            (tmp_path / name / "results.json").write_text(json.dumps(figures | {"settings": {}}))

    evidence.collect(args, plan)
    evidence.report(tmp_path)

    results = json.loads((tmp_path / "results.json").read_text())
    answer = results["answers"][question][0]
    assert list(results["answers"]) == [question] and answer["verdict"] == "agrees"
    assert answer["means"] == [74.83, 73.33] and answer["difference"] == 1.5
    assert len(results["runs"]) == 15 and results["runs"]["mid/1"]["seconds"] == 3
    said = "mid (video audio) against scratch (video audio), 74.8 / 73.3 %: +1.5 (+1.5 to +1.5)"
    assert f"{said}, agrees" in (tmp_path / "results.md").read_text()


def test_pictures_of_two_clips_lie_side_by_side(tmp_path):
    args = arguments(tmp_path)
    colors = {"audio": 50, "video": 200}
    for model in "mid/2", "inpainting/1", "early/2", "inpaint_both/2":
        (tmp_path / f"{model}/pictures").mkdir(parents=True)
        (tmp_path / f"{model}/log.jsonl").write_text('{"step": 20, "loss": 0.5}\n')
        for step, (m, color) in itertools.product(("0000020", "0000040"), colors.items()):
            picture = np.full((794, 516, 3), color if step == "0000040" else 0, np.uint8)
            Image.fromarray(picture).save(tmp_path / f"{model}/pictures/{step}_{m}.png")

    evidence.pictures(args)
    for name in "reconstruction", "inpainting":
        picture = np.asarray(Image.open(tmp_path / f"{name}.png"))
        assert picture.shape == (398, 2 * 516 + 16, 3)  # of 12 rows of 64 + 2 pixels, six
        assert (picture[:, :516] == 200).all() and (picture[:, -516:] == 50).all()
    assert "inpaint_both" in (tmp_path / "curves.svg").read_text()


# --------------------------------------------------------------------------------------- the README


def unfounded(text, answers):
    """A text's numbers with a decimal point that, rounded as they are written, are neither in the
    answers nor among the world's: Bayes rates (one sense, both) and chance."""
    known = [y for x in (0.7375, 0.92125, 0.125) for y in (x, 100 * x)]
    for x in itertools.chain(*answers.values()):
        known += [*x["means"], x["difference"], *x["interval"]]
        known += map(float, re.findall(r"\d+\.\d+", x["paper"]))

    numbers = [x.replace("−", "-") for x in re.findall(r"(?<![\w.])[-+−]?\d+\.\d+", text)]
    return [
        x for x in numbers
        if all(abs(float(x) - y) > 0.5001 * 0.1 ** len(x.split(".")[1]) for y in known)]


def test_numbers_of_no_source_are_found():
    pair = {"means": [76.46, 75.0], "difference": -1.46, "interval": [-3.1, 0.18]}
    answers = {"Is it?": [pair | {"paper": "64.2 > 51.0"}]}
    true = "76.5 / 75.0: -1.5 (−3.1-0.2), 64.2; 12.5 %, 73.75 %, 92.1 %, 3 x"
    assert not unfounded(true, answers)
    wrong = ["1.46", "+3.1", "76.4", "-0.18", "64.3", "0.19", "7.5"]
    assert unfounded("; ".join(wrong), answers) == wrong
    assert unfounded("of 73.75 %, 76.46 % and (-1.46)", {}) == ["76.46", "-1.46"]


def test_the_readme_tells_what_was_found(tmp_path):
    readme = (evidence.ROOT / "README.md").read_text()
    section = readme.split("## What the built-in clips show")[1].split("\n## ")[0]
    results = {"answers": {}}

    if (ASSETS / "results.json").exists():
        shutil.copy(ASSETS / "results.json", tmp_path)
        results = json.loads((tmp_path / "results.json").read_text())
        answers = evidence.answers_of(results["runs"], results["seeds"], results["draws"])
        assert json.loads(json.dumps(answers)) == results["answers"]
        evidence.report(tmp_path)
        assert (ASSETS / "results.md").read_text() == (tmp_path / "results.md").read_text()

    assert not unfounded(section, results["answers"])
    assert bool(results["answers"]) == ("(assets/results.md)" in section)
