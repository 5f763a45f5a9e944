"""Reruns the experiments whose results the README states: python tests/evidence.py [GROUP ...]

Each is a command of the two scripts on the built-in clips, on one thread; as many run at once as
there are processors. Results go to assets/results.json with their commands, settings, seeds, time,
hardware and versions, learning curves to assets/curves.svg. Runs that are done are not repeated.
Groups: the keys of GROUPS.
"""

import concurrent.futures
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "evidence"
RESULTS = ROOT / "assets" / "results.json"
SEEDS = (1, 2, 3)  # settings were chosen on seed 0
INPAINT = [  # smaller batches: it takes some 2,000 steps before audio looks at the picture
    "--objective", "inpaint_both", "--encoder", "early", "--mask-audio", "0.95", "--mask-video",
    "0.7", "--batch", "16", "--lr", "3.2e-2", "--epochs", "16"]
BOTH = ["--modalities", "video", "audio"]
OBJECTIVES = ("joint", "video_from_audio", "audio_from_video", "inpaint_both", "joint_inpaint")

PRETRAINED = {  # name: (flags of train_pretrain.py, seeds)
    "demo": ([], SEEDS),
    "inpaint_both, tuned": (INPAINT, SEEDS),
    "50 epochs": (["--epochs", "50"], SEEDS),
}


def pretrained(name, *flags, seeds=SEEDS):
    """Names a pretraining run: 20 epochs of the demo, unless flags say otherwise."""
    PRETRAINED[name] = (["--epochs", "20", *flags], seeds)


pretrained("mid + shared")
for encoder in "early", "shared", "separate":
    pretrained(f"{encoder} + shared", "--encoder", encoder)
for decoder in "early", "separate":
    pretrained(f"mid + {decoder}", "--decoder", decoder)
for objective in OBJECTIVES:
    pretrained(
        objective, "--encoder", "early", "--objective", objective, "--mask-audio", "0.8",
        "--mask-video", "0.8")
for m in "audio", "video":
    pretrained(f"{m} only", "--encoder", "separate", "--modalities", m)
for epochs in "5", "10":
    pretrained(f"{epochs} epochs", "--epochs", epochs)
pretrained("half the clips, 40 epochs", "--fraction", "0.5", "--epochs", "40")
pretrained("S 1", "--joint-layers", "1")
for ratio in "0.3", "0.9":
    pretrained(f"audio {ratio}, video 0.6", "--epochs", "10", "--mask-audio", ratio)
for ratio in "0.3", "0.9":
    pretrained(f"audio 0.5, video {ratio}", "--epochs", "10", "--mask-video", ratio)
for m in "audio", "video":
    for ratio in "0.3", "0.6", "0.9":
        pretrained(
            f"{m} only, {ratio}", "--epochs", "10", "--encoder", "separate", "--modalities", m,
            f"--mask-{m}", ratio)
for objective in "joint", "inpaint_both":
    for rate in "0.8e-2", "3.2e-2", "12.8e-2":
        pretrained(
            f"{objective}, lr {rate}", *INPAINT, "--epochs", "8", "--objective", objective, "--lr",
            rate, seeds=(1,))

ENCODERS = ("early + shared", "shared + shared", "separate + shared", "mid + shared")
AUDIO, VIDEO = ["--modalities", "audio"], ["--modalities", "video"]
GROUPS = {  # group: [(pretrained models, flags of train_finetune.py; None: not finetuned)]
    "demo": [(["demo"], None)],
    "inpainting": [(["inpaint_both, tuned"], None)],
    "finetuning": [
        (models, flags) for models in ([], ["50 epochs"]) for flags in (AUDIO, VIDEO, BOTH)],
    "encoders": [([name], BOTH) for name in (*ENCODERS, "mid + early", "mid + separate")],
    "modalities": [
        *(
            ([name], flags)
            for name in ("audio only", "video only", "mid + shared")
            for flags in (AUDIO, VIDEO, BOTH)),
        (["video only", "audio only"], BOTH)],
    "objectives": [([name], BOTH) for name in OBJECTIVES],
    "joint layers": [([name], BOTH) for name in ("S 1", "mid + shared", "early + shared")],
    "architecture": [
        ([name], flags)
        for flags in ([*BOTH, "--model", "encoder"], [*AUDIO, "--model", "probe"])
        for name in ENCODERS],
    "length": [
        ([name], BOTH)
        for name in ("5 epochs", "10 epochs", "mid + shared", "half the clips, 40 epochs")],
    "learning rates": [([name], None) for name in PRETRAINED if ", lr " in name],
    "masks": [
        ([name], AUDIO if name[:7] == "audio o" else VIDEO if name[:7] == "video o" else BOTH)
        for name in PRETRAINED
        if name.startswith(("audio 0", "audio only, ", "video only, "))],
}


TABLE = [  # (paper's table, [(what, group, row, the paper's accuracy on VGGSound, %)])
    ("1: encoder + decoder", [
        (name, "encoders", f"{name}: video audio", paper)
        for name, paper in (
            ("early + shared", "62.2"), ("shared + shared", ""), ("separate + shared", "63.0"),
            ("mid + shared", ""), ("mid + early", ""), ("mid + separate", ""))]),
    ("14: without MBT, the pretraining encoder", [
        (name, "architecture", f"{name}: video audio encoder", paper)
        for name, paper in zip(ENCODERS, ("59.4", "", "60.4", ""))]),
    ("2: objective, early + shared", [
        (name, "objectives", f"{name}: video audio", "best" if name == "joint" else "")
        for name in OBJECTIVES]),
    ("3, 10: pretrained on", [
        ("audio", "modalities", "audio only: video audio", "58.3"),
        ("video", "modalities", "video only: video audio", "62.1"),
        ("each, two models", "modalities", "video only and audio only: video audio", "63.3"),
        ("both, one model", "modalities", "mid + shared: video audio", "64.2")]),
    ("3: audio-only finetuning, pretrained on", [
        ("audio", "modalities", "audio only: audio", ""),
        ("both", "modalities", "mid + shared: audio", "similar")]),
    ("3: video-only finetuning, pretrained on", [
        ("video", "modalities", "video only: video", ""),
        ("both", "modalities", "mid + shared: video", "similar")]),
    ("5: epochs (the paper's: 200, 400, 800)", [
        (f"{n}", "length", f"{name}: video audio", paper)
        for n, name, paper in (
            (5, "5 epochs", "63.2"), (10, "10 epochs", "63.9"), (20, "mid + shared", "65.0"))]),
    ("9: no pretraining; 50 epochs", [
        ("from scratch", "finetuning", "scratch: video audio", "51.0"),
        ("pretrained", "finetuning", "50 epochs: video audio", "64.2")]),
    ("11: masks, 10 epochs", [
        (name, group, f"{name}: video audio".replace("audio 0.5, video 0.6", "10 epochs"), "")
        for name, group in (
            ("audio 0.5, video 0.6", "length"), ("audio 0.3, video 0.6", "masks"),
            ("audio 0.9, video 0.6", "masks"), ("audio 0.5, video 0.3", "masks"),
            ("audio 0.5, video 0.9", "masks"))]),
    ("12: audio alone, 10 epochs", [
        (r, "masks", f"audio only, {r}: audio", "") for r in ("0.3", "0.6", "0.9")]),
    ("13: video alone, 10 epochs", [
        (r, "masks", f"video only, {r}: video", "") for r in ("0.3", "0.6", "0.9")]),
    ("15: S of 3 layers (the paper's: of 12)", [
        ("1", "joint layers", "S 1: video audio", ""),
        ("2", "joint layers", "mid + shared: video audio", ""),
        ("3, which is early", "joint layers", "early + shared: video audio", "")]),
    ("17: same number of steps", [
        ("all clips, 20 epochs", "length", "mid + shared: video audio", ""),
        ("half, 40 epochs", "length", "half the clips, 40 epochs: video audio", "similar")]),
    ("18: linear probe, audio", [
        (name, "architecture", f"{name}: audio probe", paper)
        for name, paper in zip(ENCODERS, ("26.2", "27.6", "27.6", "27.8"))]),
]


def table(results):
    """The README's table of results, in markdown."""
    yield "| table of the paper | | top-1 here, % | paper, % |"
    yield "|---|---|---|---|"
    for title, rows in TABLE:
        for what, group, name, paper in rows:
            top = [100 * x for x in results[group]["finetuned"][name]["figures"]["top-1"]]
            ours = f"{statistics.mean(top):.1f} ± {statistics.stdev(top):.1f}"
            yield f"| {title} | {what} | {ours} | {paper} |"
            title = ""


def run(folder, command):
    """Runs a command unless its results are there -> its results."""
    out = RUNS / folder
    if not (out / "results.json").exists():
        out.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        with open(out / "said.txt", "w") as said:
            done = subprocess.run(
                [sys.executable, *command, "--device", "cpu", "--out", str(out)], cwd=ROOT,
                stdout=said, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:  # a run that diverges is a result
            reason = (out / "said.txt").read_text().splitlines()[-1]
            (out / "results.json").write_text(json.dumps({"held_out": {}, "failed": reason}))
        (out / "seconds.txt").write_text(f"{time.monotonic() - start:.0f}")
    results = json.loads((out / "results.json").read_text())
    command = [str(pathlib.Path(c).relative_to(ROOT)) if c.startswith("/") else c for c in command]
    results["command"] = " ".join(["python", *command])
    results["seconds"] = int((out / "seconds.txt").read_text())
    return results


def pretrain(name, seed):
    flags, _ = PRETRAINED[name]
    return run(f"{name}-{seed}", ["train_pretrain.py", *flags, "--seed", str(seed)])


def finetune(sources, flags, seed):
    # another pretrained model, training clips and weights for each seed; test clips that no choice
    # has seen
    init = [str(RUNS / f"{s}-{seed}" / "last.pt") for s in sources]
    return run(
        f"{row_name(sources, flags)}-{seed}",
        ["train_finetune.py", *flags, *(["--init", *init] if init else []), "--seed", str(seed),
         "--test-seed", "7"])


def row_name(sources, flags):
    flags = [f for f in flags if not f.startswith("--")]
    return f"{' and '.join(sources) or 'scratch'}: {' '.join(flags)}"


def figures(results):
    """{what: number} of a run."""
    if "metrics" in results:
        return results["metrics"]
    return {
        f"{key} {what}": x
        for key, row in results["held_out"].items()
        for what, x in row.items()
        if what != "error"}


def summary(runs):
    """Of the runs of all seeds."""
    return {
        "commands": [r["command"] for r in runs], "seconds": [r["seconds"] for r in runs],
        "settings": {
            k: v for k, v in runs[0].get("settings", {}).items() if k not in ("out", "init")},
        "figures": {k: [figures(r)[k] for r in runs] for k in figures(runs[0])},
        **{"failed": r["failed"] for r in runs if "failed" in r}}


def curves(path):
    """Draws the training losses of the group "learning rates" (Fig. 4)."""
    colours = {"0.8e-2": "#2a6fb0", "3.2e-2": "#3a9a4b", "12.8e-2": "#c8452f"}
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 250" font-family="sans-serif" '
        'font-size="12"><rect width="720" height="250" fill="white"/>']
    for x0, objective in (40, "joint"), (400, "inpaint_both"):
        runs = {}
        for rate in colours:
            log = (RUNS / f"{objective}, lr {rate}-1" / "log.jsonl").read_text().splitlines()
            runs[rate] = [(r["step"], r["loss"]) for r in map(json.loads, log) if "loss" in r]
        last = max(step for points in runs.values() for step, _ in points)
        parts.append(f'<text x="{x0 + 100}" y="18">{objective}</text>')
        for y in 0.0, 0.5, 1.0:
            parts.append(
                f'<path d="M{x0} {220 - 180 * y} h300" stroke="#ddd"/>'
                f'<text x="{x0 - 6}" y="{224 - 180 * y}" text-anchor="end">{y}</text>')
        for k, (rate, points) in enumerate(runs.items()):
            finite = [(s, x) for s, x in points if math.isfinite(x)]
            smooth = [
                (finite[i][0], statistics.mean(x for _, x in finite[max(0, i - 4) : i + 1]))
                for i in range(len(finite))]
            line = " ".join(
                f"{x0 + 300 * s / last:.1f},{220 - 180 * min(x, 1.1):.1f}" for s, x in smooth)
            parts.append(
                f'<polyline points="{line}" fill="none" stroke="{colours[rate]}"/>'
                f'<text x="{x0 + 210}" y="{44 + 15 * k}" fill="{colours[rate]}">lr {rate}</text>')
        parts.append(f'<text x="{x0 + 300}" y="238" text-anchor="end">{last} steps</text>')
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")


def main():
    wanted = sys.argv[1:] or list(GROUPS)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for group in wanted:
            names = dict.fromkeys(name for sources, _ in GROUPS[group] for name in sources)
            started = {n: [pool.submit(pretrain, n, s) for s in PRETRAINED[n][1]] for n in names}
            found = {n: summary([job.result() for job in jobs]) for n, jobs in started.items()}
            started = {
                row_name(sources, flags): [pool.submit(finetune, sources, flags, s) for s in SEEDS]
                for sources, flags in GROUPS[group]
                if flags is not None}
            tuned = {r: summary([job.result() for job in jobs]) for r, jobs in started.items()}
            made_with = {
                "torch": torch.__version__, "python": platform.python_version(),
                "processor": f"{os.cpu_count()} x {platform.machine()}, one thread a run"}
            kept[group] = {"pretrained": found, "finetuned": tuned, "made with": made_with}
            RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
            for row, what in (found | tuned).items():
                for name, values in what["figures"].items():
                    spread = statistics.stdev(values) if len(values) > 1 else 0.0
                    print(
                        f"{group:14s} {row:36s} {name:34s} {statistics.mean(values):.3f} "
                        f"+- {spread:.3f} ({len(values)} runs)", flush=True)
    if "learning rates" in wanted:
        curves(ROOT / "assets" / "curves.svg")
    if kept.keys() == GROUPS.keys():
        print(*table(kept), sep="\n")


if __name__ == "__main__":
    main()
