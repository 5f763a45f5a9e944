"""Ask the paper's questions on the built-in clips: python tests/evidence.py [--jobs N]

A question compares two ways to train a classifier, with the same seeds, labeled clips and test
clips on both sides. Each pretrained model is finetuned several times (other labeled clips, order
and test clips). The interval of a difference is a t-interval over the pretraining seeds, of the
mean over these draws.

Every run is a command of the two scripts, on one thread; --jobs is the number of runs at once.
Finished runs are not repeated, stopped ones are resumed. The answers are in assets/results.json,
from which assets/results.md is made. All runs take some six hours of one core, the first nine
questions less than four.
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import pathlib
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time

import torch
from matplotlib.figure import Figure

ROOT = pathlib.Path(__file__).resolve().parent.parent

SEEDS = (6, 7, 8, 9, 10)  # of pretraining; the clips and the recipes were chosen on other seeds
STUDENT = {  # t, two-sided 95 %, by number of seeds
    2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
SIMILAR = 3.0  # points; an interval within +- this confirms the paper's "similar"
TINY = {  # flags of --tiny, to check this file in minutes
    "train_pretrain.py": ["--num-clips", "32", "--epochs", "1", "--batch", "16"],
    "train_finetune.py": ["--per-class", "2", "--epochs", "1", "--test-clips", "64"]}

# With the demo's recipes (seeds 1 to 5, 20 epochs, 40 labels per class), draws of a paired
# difference spread by 7 points, too much for Tables 2 and 10, and by 3 on audio.
STEPS = "--batch 8 --lr 6.4e-2"
LABELS = ["--per-class", "80", "--epochs", "15"]
MODELS = {  # name: flags of train_pretrain.py
    "mid": f"{STEPS} --epochs 16",
    "audio-only": f"{STEPS} --epochs 16 --encoder separate --modalities audio",
    "video-only": f"{STEPS} --epochs 16 --encoder separate --modalities video",
    "4-epochs": f"{STEPS} --epochs 4",
    "half": f"{STEPS} --epochs 32 --fraction 0.5",
    "inpainting": "--epochs 16 --encoder early --objective inpaint_both --mask-audio 0.95 "
    "--mask-video 0.7 --batch 16 --lr 3.2e-2",  # for the picture: hardly any audio is visible
}
MODELS |= {e: f"{STEPS} --epochs 16 --encoder {e}" for e in ("early", "separate", "shared")}
OBJECTIVES = ("inpaint_both", "video_from_audio", "audio_from_video")
MODELS |= {o: f"{STEPS} --epochs 16 --encoder early --objective {o}" for o in OBJECTIVES}

BOTH, AUDIO, VIDEO, PROBE = "video audio", "audio", "video", "video audio probe"
QUESTIONS = {  # question: [(side, other side, result of the paper)]; a side is (model, inputs)
    "Does pretraining help? (Table 9)": [
        (("mid", BOTH), ("scratch", BOTH), "64.2 > 51.0")],
    "Is it better to pretrain on both than on one? (Table 3)": [
        (("mid", how), (one, how), paper) for how in (BOTH, PROBE)
        for one, paper in (("audio-only", "64.2 > 58.3"), ("video-only", "64.2 > 62.1"))],
    "Is joint reconstruction better than inpainting? (Table 2)": [
        (("early", how), ("inpaint_both", how), ">") for how in (BOTH, PROBE)],
    "Is one joint model better than two single ones? (Table 10)": [
        (("mid", how), ("video-only + audio-only", how), "64.2 > 63.3") for how in (BOTH, PROBE)],
    "Does longer pretraining help? (Table 5)": [
        (("mid", how), ("4-epochs", how), "65.0 > 63.2") for how in (BOTH, PROBE)],
    "Do both modalities tell more than one? (Table 7)": [
        (("mid", BOTH), ("mid", AUDIO), "65.0 > 57.2"),
        (("mid", BOTH), ("mid", VIDEO), "65.0 > 50.3")],
    "Is a mid encoder better than an early one? (Table 1)": [
        (("mid", how), ("early", how), ">") for how in (BOTH, PROBE)],
    "Is early fusion worse in a linear probe of audio? (Table 18)": [
        (("mid", "audio probe"), ("early", "audio probe"), "27.8 > 26.2")],
    "Is a model of both as good for one? (Table 3)": [
        (("mid", AUDIO), ("audio-only", AUDIO), "similar"),
        (("mid", VIDEO), ("video-only", VIDEO), "similar")],
    "Is a mid encoder better than a separate or a shared one? (Table 1)": [
        (("mid", BOTH), (e, BOTH), ">") for e in ("separate", "shared")],
    "Are half the clips enough, for as many steps? (Table 17)": [
        (("mid", BOTH), ("half", BOTH), "similar")],
    "Is it better to reconstruct both than to inpaint one? (Table 2)": [
        (("early", BOTH), (o, BOTH), ">") for o in OBJECTIVES[1:]],
}

def list_sides(comparisons):
    """Return the distinct sides of comparisons, in order."""
    return list(dict.fromkeys(side for *both, _ in comparisons for side in both))


def list_sources(model):
    """Return the pretrained models of a side: none, one, or one per modality."""
    return [] if model == "scratch" else model.split(" + ")


def run_name(side, seed, draw):
    """Return the name of a finetuning run."""
    return f"{' on '.join(side)}/{seed}-{draw}".replace(" ", "_")


def finetune_command(side, seed, draw, runs):
    """Return the command of a finetuning run; "probe" in a side's inputs freezes the encoder."""
    (model, inputs), init = side, []
    if model != "scratch":
        init = ["--init", *(f"{runs}/{name}/{seed}/last.pt" for name in list_sources(model))]
    inputs = inputs.replace(" probe", " --model probe").split()

    return [
        "train_finetune.py", "--modalities", *inputs, *init, *LABELS, "--eval-every", "1000",
        "--seed", f"{10 * seed + draw}"]


def make_plan(args):
    """Return {run: command} in the order of the questions, pretraining before finetuning."""
    plan = {}

    def pretrain(models, seeds=args.seeds):
        for model, seed in itertools.product(models, seeds):
            flags = MODELS[model].split()
            plan[f"{model}/{seed}"] = ["train_pretrain.py", *flags, "--seed", f"{seed}"]

    for sides in map(list_sides, QUESTIONS.values()):
        pretrain(name for model, _ in sides for name in list_sources(model))
        for which in itertools.product(sides, args.seeds, args.draws):
            plan[run_name(*which)] = finetune_command(*which, args.out)

    pretrain(["inpainting"], [1])
    return {name: x + (TINY[x[0]] if args.tiny else []) for name, x in plan.items()}


def run(out, command, needed):
    """Run a command after the runs it depends on (futures), unless its results exist."""
    for job in needed:
        job.result()
    if (out / "seconds.txt").exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()

    with open(out / "output.txt", "a") as output:
        done = subprocess.run(
            [sys.executable, *command, "--device", "cpu", "--out", str(out)], stdout=output,
            stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"a run failed with status {done.returncode}: see {out / 'output.txt'}")

    for checkpoint in out.glob("*.pt") if command[0] == "train_finetune.py" else ():
        checkpoint.unlink()  # no other run needs it
    (out / "seconds.txt").write_text(f"{time.monotonic() - start:.0f}")

def compare(a, b, paper, top1):
    """Return means, their difference with its 95 % interval, in %, and a verdict, as a dict.

    top1: a function of a side that returns the mean over draws of each pretraining seed.
    """
    means = top1(a), top1(b)
    gains = [x - y for x, y in zip(*means)]
    gain = statistics.mean(gains)
    half = STUDENT[len(gains)] * statistics.stdev(gains) / len(gains) ** 0.5
    low, high = gain - half, gain + half

    similar = paper == "similar"
    agrees = -SIMILAR < low and high < SIMILAR if similar else low > 0
    disagrees = low > 0 or high < 0 if similar else high < 0
    return {
        "a": a, "b": b, "paper": paper, "means": [round(statistics.mean(x), 2) for x in means],
        "difference": round(gain, 2), "interval": [round(low, 2), round(high, 2)],
        "verdict": "agrees" if agrees else "disagrees" if disagrees else "cannot tell"}


def compute_answers(runs, seeds, draws):
    """Return {question: its comparisons} for the questions whose runs are all done."""

    def top1(side):
        names = [[run_name(side, seed, draw) for draw in draws] for seed in seeds]
        return [100 * statistics.mean(runs[n]["figures"]["top-1"] for n in x) for x in names]

    answers = {}
    for question, comparisons in QUESTIONS.items():
        needed = itertools.product(list_sides(comparisons), seeds, draws)
        if all(run_name(*which) in runs for which in needed):
            answers[question] = [compare(*x, top1) for x in comparisons]

    return answers


def collect(args, plan):
    """Write the answers so far, and a line for each finished run, to results.json."""
    runs, settings = {}, {}

    for name, command in plan.items():
        folder = args.out / name
        if (folder / "seconds.txt").exists():
            x = json.loads((folder / "results.json").read_text())
            runs[name] = {
                "command": shlex.join(["python", *command]),
                "figures": x.get("metrics", x.get("val")),
                "seconds": int((folder / "seconds.txt").read_text())}
            settings[command[0]] = {
                k: v for k, v in x["settings"].items() if k not in ("out", "init", "seed")}

    about = {
        "torch": torch.__version__, "python": platform.python_version(),
        "processor": f"{os.cpu_count()} x {platform.machine()}, a run has one thread",
        "seeds": args.seeds, "draws": args.draws, "settings": settings,
        "answers": compute_answers(runs, args.seeds, args.draws)}
    text = json.dumps(about, indent=1).removesuffix("\n}") + ',\n "runs": {\n'
    text += ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in runs.items())
    (args.assets / "results.json").write_text(f"{text}\n }}\n}}\n")


def report(assets):
    """Write results.md from results.json: a table, and a sentence per question."""
    answers = json.loads((assets / "results.json").read_text())["answers"]
    table = ["| | top-1, % | difference, 95 % interval | the paper | |", "|---|---|---|---|---|"]
    sentences = []

    for question, comparisons in answers.items():
        table.append(f"| **{question}** | | | | |")
        parts = []

        for x in comparisons:
            a, b = (f"{model} ({inputs})" for model, inputs in (x["a"], x["b"]))
            gain = "{:+.1f} ({:+.1f} to {:+.1f})".format(x["difference"], *x["interval"])
            means = "{:.1f} / {:.1f}".format(*x["means"])
            table.append(f"| {a} / {b} | {means} | {gain} | {x['paper']} | {x['verdict']} |")
            parts.append(f"{a} against {b}, {means} %: {gain}, {x['verdict']}")

        sentences.append(f"* {question} {'; '.join(parts)}.")

    (assets / "results.md").write_text("\n".join([*table, "", *sentences]) + "\n")


def save_figures(args):
    """Copy the last pictures of two runs, and draw the training losses of two objectives."""
    seed = args.seeds[len(args.seeds) // 2]
    for name, model in ("reconstruction", f"mid/{seed}"), ("inpainting", "inpainting/1"):
        last = max((args.out / model / "pictures").glob("*.png"))
        shutil.copy(last, args.assets / f"{name}.png")

    ax = Figure(figsize=(7, 3), layout="constrained").subplots()
    for name, model in ("joint", "early"), ("inpaint_both", "inpaint_both"):
        lines = (args.out / f"{model}/{seed}/log.jsonl").read_text().splitlines()
        lines = [x for x in map(json.loads, lines) if "loss" in x]
        ax.plot([x["step"] for x in lines], [x["loss"] for x in lines], label=name)

    ax.set(title="training loss of two objectives", xlabel="step", ylabel="loss", ylim=(0, None))
    ax.legend()
    ax.figure.savefig(args.assets / "curves.png", dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="pretraining seeds")
    parser.add_argument("--draws", type=int, nargs="+", default=(1, 2), help="of finetuning")
    parser.add_argument("--tiny", action="store_true", help="few clips; write to runs/tiny only")
    args = parser.parse_args()

    os.chdir(ROOT)
    args.out = pathlib.Path("runs", "tiny" if args.tiny else "evidence")
    args.assets = args.out if args.tiny else pathlib.Path("assets")
    plan, jobs = make_plan(args), {}

    pool = concurrent.futures.ThreadPoolExecutor(args.jobs)
    for name, command in plan.items():
        paths = (pathlib.Path(c).parent for c in command if c.endswith("last.pt"))
        needed = [jobs[path.relative_to(args.out).as_posix()] for path in paths]
        jobs[name] = pool.submit(run, args.out / name, command, needed)

    try:
        for k, (name, job) in enumerate(jobs.items(), start=1):
            job.result()
            print(f"{k} of {len(plan)} runs: {name}", flush=True)
            collect(args, plan)
            report(args.assets)
        save_figures(args)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


if __name__ == "__main__":
    main()
