"""The evidence: its commands are understood, its verdicts are right; no run takes place."""

import argparse
import json
import pathlib

import pytest

import evidence
import train_finetune
import train_pretrain


def arguments(folder, seeds=(1, 2), draws=(1, 2)):
    return argparse.Namespace(
        out=pathlib.Path(folder), assets=pathlib.Path(folder), seeds=seeds, draws=draws, tiny=False)


def test_the_scripts_understand_every_command_and_what_it_needs_comes_first():
    plan, done, sides = evidence.plan_of(arguments("runs/evidence")), set(), {}
    for name, (script, *flags) in plan.items():
        if script == "train_pretrain.py":
            train_pretrain.config_of(train_pretrain.parse_args(flags))
        else:
            args = train_finetune.parse_args(flags)
            assert {str(pathlib.Path(x).parent)[len("runs/evidence/") :] for x in args.init} <= done
            sides.setdefault(name.split("/")[0], []).append(args.seed)
        done.add(name)

    assert list(plan)[:2] == ["mid/1", "mid/2"] and len(sides) > 15
    assert all(seeds == [11, 12, 21, 22] for seeds in sides.values())  # both sides have the same


@pytest.mark.parametrize(
    "gains, paper, verdict",
    [
        ([4, 5, 6], "64.2 > 51.0", "agrees"),
        ([-4, -5, -6], ">", "disagrees"),
        ([-1, 5, 6], ">", "cannot tell"),
        ([-0.5, 0.0, 0.5], "similar", "agrees"),
        ([4, 5, 6], "similar", "disagrees"),
        ([-9, 0, 9], "similar", "cannot tell")],
)
def test_verdicts(gains, paper, verdict):
    first, second = [50 + x for x in gains], [50.0] * len(gains)
    found = evidence.compare("a", "b", paper, lambda side: first if side == "a" else second)
    assert found["verdict"] == verdict
    assert found["difference"] == pytest.approx(sum(gains) / len(gains), abs=0.01)


def test_an_interval_is_students():
    gains = [1.0, 2.0, 3.0, 4.0, 5.0]  # scipy.stats.t.interval(0.95, 4, 3, 0.7071)
    found = evidence.compare("a", "b", ">", lambda side: gains if side == "a" else [0.0] * 5)
    assert found["interval"] == pytest.approx([1.04, 4.96], abs=0.01)


def test_questions_are_answered_as_soon_as_their_runs_are_there(tmp_path):
    args = arguments(tmp_path)
    plan, question = evidence.plan_of(args), next(iter(evidence.QUESTIONS))
    for name, command in plan.items():
        if name.startswith(("mid/", "mid_on_video_audio/", "scratch_on_video_audio/")):
            top1 = 0.75 + 0.01 * name.startswith("mid_on") * int(name[-1])
            figures = {"held_out": {}} if "pretrain" in command[0] else {"metrics": {"top-1": top1}}
            (tmp_path / name).mkdir(parents=True)
            (tmp_path / name / "seconds.txt").write_text("3")
            (tmp_path / name / "results.json").write_text(json.dumps(figures | {"settings": {}}))

    evidence.collect(args, plan)
    evidence.report(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    answer = results["answers"][question][0]
    assert list(results["answers"]) == [question] and answer["verdict"] == "agrees"
    assert answer["means"] == [76.5, 75.0] and answer["difference"] == 1.5
    assert len(results["runs"]) == 10 and results["runs"]["mid/1"]["seconds"] == 3
    assert "+1.5 (+1.5 to +1.5)" in (tmp_path / "results.md").read_text()
