"""How fast: python tests/benchmark.py [--compile] [--peer] [--growth]

Prints the training steps of both scripts, the readers of both with their augmentation, and how many
cores feed which step. On a GPU at the paper's sizes; on a CPU at the demo's, all of one core and by
process time, so that others don't count. What is compared takes turns; figures are medians.
"""

import argparse
import math
import pathlib
import statistics
import sys
import tempfile
import time
from collections import defaultdict

import numpy as np
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import avmae  # noqa: E402
import data  # noqa: E402
import media  # noqa: E402
import train_finetune  # noqa: E402
import train_pretrain  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
PRESET, SIZES, BATCH, FINETUNE_BATCH = (
    ("vggsound", ("base", "large"), 64, 16) if CUDA else ("demo", ("demo",), 32, 16))
GROWTH = {"frames": (4, 8, 16, 32), "seconds": (1.28, 2.56, 5.12), "batch": (8, 32, 128),
          "size": ("demo", "tiny", "small", "base")}
if CUDA:
    GROWTH = {"frames": (8, 16, 32, 64), "seconds": (4, 8, 16), "batch": (8, 32, 128, 512),
              "size": ("tiny", "small", "base", "large", "huge")}
CLASSES = (309,)  # of VGGSound


def clock():
    """Seconds, when what was asked of the device is done."""
    if not CUDA:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Step:
    """A training step as the scripts do it, timed by stage. loss: net -> loss of a batch; the
    gradient's norm is clipped to clip_grad, and without it only measured."""

    def __init__(self, model, loss, optimizer, batch, clip_grad=math.inf, compiled=False):
        self.model, self.loss, self.optimizer, self.batch = model, loss, optimizer, batch
        self.clip_grad, self.times, self.peak = clip_grad, [], 0
        self.net = torch.compile(model, fullgraph=True) if compiled else model

    def __call__(self):
        held = torch.cuda.memory_allocated()  # 0 without CUDA
        if CUDA:
            torch.cuda.reset_peak_memory_stats()

        start = clock()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
            loss = self.loss(self.net)
        forward = clock()
        loss.backward()
        backward = clock()

        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        self.optimizer.found_inf = (~norm.isfinite()).float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        self.times.append((forward - start, backward - forward, clock() - backward))
        self.peak = torch.cuda.max_memory_allocated() - held


def timed(repeats, *steps):
    """Runs steps in turn, and a large matrix product -> the FLOP/s of this one. Afterwards a step
    has `stages` (s) and `speed` (clips/s)."""
    n, dtype = (8192, torch.bfloat16) if CUDA else (1024, torch.float32)
    a, b = torch.randn(2, n, n, device=DEVICE, dtype=dtype)
    times = []
    for _ in range(repeats + 2):
        for step in steps:
            step()
        start = clock()
        a @ b
        times.append(clock() - start)

    for step in steps:
        step.stages = [statistics.median(t) for t in zip(*step.times[2:])]
        step.speed = step.batch / sum(step.stages)
    return 2 * n**3 / statistics.median(times[2:])


def inputs_of(modalities, batch):
    """Random clips on the device, pictures as bytes."""
    clips = {m: torch.randn(batch, *x.shape) for m, x in modalities.items()}
    if "video" in clips:
        clips["video"] = torch.randint(0, 256, (*clips["video"].shape, 3), dtype=torch.uint8)
    return {m: x.to(DEVICE) for m, x in clips.items()}


def pretraining(*flags, batch=BATCH, compiled=False):
    """The step of train_pretrain.py, mid fusion."""
    args = train_pretrain.parse_args(["--preset", PRESET, "--encoder", "mid", "--dry-run", *flags])
    model = avmae.AVMAE(train_pretrain.config_of(args)).to(DEVICE)
    inputs = inputs_of(model.config.modalities, batch)
    ids = avmae.random_masking(model.config.modalities, batch)
    ids = [{m: x.to(DEVICE) for m, x in part.items()} for part in ids]

    optimizer = torch.optim.AdamW(
        train_pretrain.decay_groups(model, train_pretrain.WEIGHT_DECAY), lr=1e-4, fused=True)
    step = Step(model, lambda net: net(inputs, ids).loss, optimizer, batch, compiled=compiled)
    step.inputs, step.ids = inputs, ids
    return step


def finetuning(*flags, batch=FINETUNE_BATCH, compiled=False):
    """The step of train_finetune.py: MBT, with the recipe's stochastic depth and mixup."""
    args = train_finetune.parse_args(["--preset", PRESET, "--dry-run", *flags])
    model = avmae.Classifier(train_finetune.config_of(args, CLASSES)).to(DEVICE)
    inputs = inputs_of(model.config.modalities, batch)
    label = torch.arange(batch, device=DEVICE)[:, None]

    def loss(net):
        target = train_finetune.targets_of("single", label, CLASSES)
        mixed, labels = train_finetune.mixed(inputs, target, args.mixup[2], 0)
        return train_finetune.classification_loss(net(mixed), labels, "softmax", args.smoothing)

    optimizer = train_finetune.make_optimizer(model, args)
    return Step(model, loss, optimizer, batch, train_finetune.CLIP_GRAD, compiled)


def videomae(ours):
    """The peer at the sizes of our step, on its pictures and with its masks."""
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    config, video = ours.model.config, ours.model.config.modalities["video"]
    size, decoder = config.size, config.decoder_size
    model = VideoMAEForPreTraining(VideoMAEConfig(
        image_size=video.shape[1], num_frames=video.shape[0], tubelet_size=video.patch[0],
        patch_size=video.patch[1], hidden_size=size.width, num_hidden_layers=size.depth,
        num_attention_heads=size.num_heads, intermediate_size=size.mlp_dim,
        decoder_hidden_size=decoder.width, decoder_num_hidden_layers=decoder.depth,
        decoder_num_attention_heads=decoder.num_heads, decoder_intermediate_size=decoder.mlp_dim,
        norm_pix_loss=config.norm_pix)).to(DEVICE)

    masked = torch.zeros(ours.batch, video.tokens, dtype=torch.bool, device=DEVICE)
    given = {"bool_masked_pos": masked.scatter(1, ours.ids[1]["video"], True)}
    given["pixel_values"] = ours.inputs["video"].permute(0, 1, 4, 2, 3) / 127.5 - 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return Step(model, lambda net: net(**given).loss, optimizer, ours.batch)


def training_steps(size, options):
    """Prints the steps of a size -> {stage: clips/s of our fastest}."""
    fastest = {}
    for stage, make, *flags in (
        ("pretraining", pretraining), ("video", pretraining, "--modalities", "video"),
        ("audio", pretraining, "--modalities", "audio"), ("finetuning", finetuning)):
        torch._dynamo.reset()  # another model is no recompilation
        flags, label = ["--size", size, *flags], f"{size}, {stage}"
        steps = {label: make(*flags)}
        if options.compile:
            steps[f"{label}, compiled"] = make(*flags, compiled=True)
        ours = list(steps.values())
        if options.peer and stage == "video":
            steps["VideoMAE of transformers"] = videomae(ours[0])

        rate = timed(options.repeats, *steps.values())
        fastest[stage] = max(step.speed for step in ours)
        # Counted on the meta device, so for every device alike: of attention two products forward
        # and four backward, and nothing that is computed again.
        flops = train_pretrain.flops(ours[0].model.config)
        for label, step in steps.items():
            shares = " ".join(f"{t / sum(step.stages):9.0%}" for t in step.stages)
            print(
                f"{label:28s} {step.speed:8.1f} {step.speed / ours[0].speed:7.2f} {shares} "
                f"{flops / 1e9:8.2f} {step.speed * flops / rate:8.0%}"
                + f" {step.peak / 1e9:7.1f}" * CUDA, flush=True)

    v, a = (fastest["pretraining"] / fastest[m] for m in ("video", "audio"))
    print(f"    time of both : video : audio = 1 : {v:.2f} : {a:.2f} (Table 19: 1 : 0.95 : 0.66)")
    return fastest


def growth(repeats):
    """Prints how the pretraining step changes with one setting, each against the preset's step."""
    print(f"\nclips/s against those of {SIZES[0]} at the preset's settings")
    for what, values in GROWTH.items():
        found = []
        for value in values:
            flags = ["--size", SIZES[0], f"--{what}", str(value)]
            try:
                step = pretraining(*flags, batch=value if what == "batch" else BATCH)
                base = pretraining("--size", SIZES[0])
                timed(repeats, base, step)
                found.append(f"{value}: {step.speed / base.speed:.2f}")
            except torch.OutOfMemoryError:
                found.append(f"{value}: does not fit")
        print(f"    {what:8s} {', '.join(found)}", flush=True)


def picture(t):
    """(360, 640, 3) uint8 at a time, s: a thing before moving noise, which is hard to compress."""
    noise = np.roll(np.random.default_rng(0).normal(0, 18, (360, 640, 3)), int(40 * t), 1)
    return (data.Scene(0, 0).pictures([t], 640)[0, 140:500] + noise).clip(0, 255).astype(np.uint8)


def readers(repeats, folder):
    """Reads a file of 10 s, 640x360 H.264 and AAC, and what data.py prepare makes of it, with the
    presets' augmentation -> {(preset, stage, rows that share a window): clips/s of both}."""
    raw, prepared = pathlib.Path(folder, "raw"), pathlib.Path(folder, "prepared")
    media.write(raw / "a.mp4", seconds=10.0, size=(640, 360), picture=picture, crf=23)
    data.prepare(data.find_clips(raw), prepared, data.QUALITY, 1)

    jobs, spent = {}, defaultdict(list)
    for preset in sorted({"vggsound", PRESET}):
        for script, stage, rows in (
            (train_pretrain, "pretraining", 1), (train_pretrain, "pretraining", 2),
            (train_finetune, "finetuning", 1)):
            args = script.parse_args(["--preset", preset, "--dry-run"])
            augment = train_finetune.AUGMENT[args.augment] if "augment" in args else data.Augment()
            jobs[preset, stage, rows] = [
                data.Clips(data.find_clips(at), train_pretrain.window_of(args), augment=augment)
                for at in (raw, prepared)]

    for k in range(repeats + 2):
        for job, both in jobs.items():
            for kind, clips in enumerate(both):
                start = time.process_time()
                clips.__getitems__([(k, 0, draw) for draw in range(job[2])])
                spent[job, kind].append(time.process_time() - start)
    return {
        job: [job[2] / statistics.median(spent[job, kind][2:]) for kind in (0, 1)] for job in jobs}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=10)
    for flag, text in {
        "compile": "compiled steps, too: they must not break into graphs or be compiled again",
        "peer": "VideoMAE of transformers, not compiled, with the same sizes, pictures and masks",
        "growth": "the step against frames, seconds, batch and size"}.items():
        parser.add_argument(f"--{flag}", action="store_true", help=text)
    options = parser.parse_args()

    torch.set_float32_matmul_precision("high" if CUDA else "highest")
    torch.set_num_threads(1)
    torch._dynamo.config.error_on_recompile = True
    print(
        f"{torch.cuda.get_device_name() if CUDA else 'a core of a CPU'}, torch {torch.__version__}; "
        f"floor: matrix products alone{'; GB: beside weights and optimizer' * CUDA}\n{'step':28s}  "
        f"clips/s of ours   forward  backward optimizer   GFLOP  of floor{'      GB' * CUDA}")
    fastest = {size: training_steps(size, options) for size in SIZES}
    if options.growth:
        growth(options.repeats)

    with tempfile.TemporaryDirectory() as folder:
        speeds = readers(options.repeats, folder)
    print("\nclips/s of a core that reads      raw prepared   cores that feed the step: raw, prepared")
    for (preset, stage, rows), both in speeds.items():
        feed = [
            f"{size} {' / '.join(f'{steps[stage] / speed:.1f}' for speed in both)}"
            for size, steps in fastest.items() if preset == PRESET]
        label = f"{preset}, {stage}{', --repeat 2' * (rows == 2)}"
        print(f"{label:35s}", *(f"{speed:8.1f}" for speed in both), " ", ", ".join(feed))


if __name__ == "__main__":
    main()
