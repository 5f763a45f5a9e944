"""Test the commands and verdicts of evidence.py, and the README's numbers, without training."""

import argparse
import itertools
import json
import pathlib
import re
import shutil

import pytest
import torch

import evidence
import train_finetune
import train_pretrain

ASSETS = evidence.ROOT / "assets"


def arguments(folder, seeds=(1, 2), draws=(1, 2)):
    return argparse.Namespace(
        out=pathlib.Path(folder), assets=pathlib.Path(folder), seeds=seeds, draws=draws, tiny=False)


def test_every_command_parses_and_comes_after_its_dependencies():
    plan, done, sides = evidence.make_plan(arguments("runs/evidence")), set(), {}
    for name, (script, *flags) in plan.items():
        if script == "train_pretrain.py":
            train_pretrain.make_config(train_pretrain.parse_args(flags))
        else:
            args, (side, draw) = train_finetune.parse_args(flags), name.split("/")
            needed = {pathlib.Path(x).parent.relative_to("runs/evidence") for x in args.init}
            assert {x.as_posix() for x in needed} <= done
            assert all(x.name == draw.split("-")[0] for x in needed)  # of the same seed
            sides.setdefault(side, []).append(args.seed)
        done.add(name)

    assert list(plan)[:2] == ["mid/1", "mid/2"] and len(sides) > 15
    assert all(seeds == [11, 12, 21, 22] for seeds in sides.values())  # the same on both sides


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
def test_a_comparison_uses_paired_differences(gains, paper, verdict, interval):
    second = [70.0, 69.0, 72.0, 68.0, 71.0][: len(gains)]  # has no influence
    first = [x + y for x, y in zip(gains, second)]
    result = evidence.compare("a", "b", paper, {"a": first, "b": second}.get)
    assert result["verdict"] == verdict
    assert result["interval"] == pytest.approx(interval, abs=0.01)
    assert result["difference"] == pytest.approx(sum(interval) / 2, abs=0.01)
    assert result["means"][0] - result["means"][1] == pytest.approx(result["difference"], abs=0.02)


def test_intervals_are_of_95_percent():
    for n, t in evidence.STUDENT.items():
        x = torch.linspace(-t, t, 10_001, dtype=torch.float64)
        density = torch.distributions.StudentT(torch.tensor(n - 1.0)).log_prob(x).exp()
        assert torch.trapezoid(density, x).item() == pytest.approx(0.95, abs=1e-4)


def test_a_question_is_answered_once_its_runs_are_done(tmp_path):
    args = arguments(tmp_path, seeds=(1, 2, 3))
    plan, question = evidence.make_plan(args), next(iter(evidence.QUESTIONS))
    for name, command in plan.items():
        if name.startswith(("mid/", "mid_on_video_audio/", "scratch_on_video_audio/")):
            seed, _, draw = name.split("/")[1].partition("-")
            top1 = 0.7 + 0.1 * (seed == "2") + 0.01 * name.startswith("mid_on") * int(draw or 0)
            results = {"val": {}} if "pretrain" in command[0] else {"metrics": {"top-1": top1}}
            (tmp_path / name).mkdir(parents=True)
            (tmp_path / name / "seconds.txt").write_text("3")
            (tmp_path / name / "results.json").write_text(json.dumps(results | {"settings": {}}))

    evidence.collect(args, plan)
    evidence.report(tmp_path)

    results = json.loads((tmp_path / "results.json").read_text())
    answer = results["answers"][question][0]
    assert list(results["answers"]) == [question] and answer["verdict"] == "agrees"
    assert answer["means"] == [74.83, 73.33] and answer["difference"] == 1.5
    assert len(results["runs"]) == 15 and results["runs"]["mid/1"]["seconds"] == 3
    line = "mid (video audio) against scratch (video audio), 74.8 / 73.3 %: +1.5 (+1.5 to +1.5)"
    assert f"{line}, agrees" in (tmp_path / "results.md").read_text()


def test_the_last_pictures_are_copied_and_curves_drawn(tmp_path):
    args = arguments(tmp_path)
    for model in "mid/2", "inpainting/1", "early/2", "inpaint_both/2":
        (tmp_path / f"{model}/pictures").mkdir(parents=True)
        lines = [{"step": 20, "loss": 0.5}, {"step": 20, "val": {}}, {"step": 40, "loss": 0.4}]
        (tmp_path / f"{model}/log.jsonl").write_text("\n".join(map(json.dumps, lines)))
        for step in "0000020", "0000040":
            (tmp_path / f"{model}/pictures/{step}.png").write_text(f"{model} at {step}")

    evidence.save_figures(args)
    assert (tmp_path / "reconstruction.png").read_text() == "mid/2 at 0000040"
    assert (tmp_path / "inpainting.png").read_text() == "inpainting/1 at 0000040"
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")

def unfounded(text, answers):
    """Return a text's decimal numbers without a source.

    Sources are the answers and, of the built-in clips, the best possible accuracies (with one
    modality and with both) and chance. A number may be rounded.
    """
    known = [y for x in (0.7375, 0.92125, 0.125) for y in (x, 100 * x)]
    for x in itertools.chain(*answers.values()):
        known += [*x["means"], x["difference"], *x["interval"]]
        known += map(float, re.findall(r"\d+\.\d+", x["paper"]))

    numbers = [x.replace("−", "-") for x in re.findall(r"(?<![\w.])[-+−]?\d+\.\d+", text)]
    return [
        x for x in numbers
        if all(abs(float(x) - y) > 0.5001 * 0.1 ** len(x.split(".")[1]) for y in known)]


def test_numbers_without_a_source_are_found():
    pair = {"means": [76.46, 75.0], "difference": -1.46, "interval": [-3.1, 0.18]}
    answers = {"Is it?": [pair | {"paper": "64.2 > 51.0"}]}
    true = "76.5 / 75.0: -1.5 (−3.1-0.2), 64.2; 12.5 %, 73.75 %, 92.1 %, 3 x"
    assert not unfounded(true, answers)
    wrong = ["1.46", "+3.1", "76.4", "-0.18", "64.3", "0.19", "7.5"]
    assert unfounded("; ".join(wrong), answers) == wrong
    assert unfounded("of 73.75 %, 76.46 % and (-1.46)", {}) == ["76.46", "-1.46"]


def test_the_readme_states_the_results(tmp_path):
    readme = (evidence.ROOT / "README.md").read_text()
    section = readme.split("## Results on built-in clips")[1].split("\n## ")[0]
    results = json.loads((ASSETS / "results.json").read_text())
    answers = evidence.compute_answers(results["runs"], results["seeds"], results["draws"])
    assert json.loads(json.dumps(answers)) == results["answers"]

    shutil.copy(ASSETS / "results.json", tmp_path)
    evidence.report(tmp_path)
    assert (ASSETS / "results.md").read_text() == (tmp_path / "results.md").read_text()
    assert not unfounded(section, results["answers"])
    assert "(assets/results.md)" in section
