"""How fast: python tests/benchmark.py [--compile] [--peer] [--growth]

Prints the training steps of both scripts, their readers with augmentation, and how many cores feed
which step. On a GPU at the paper's sizes, on a CPU at the demo's: of one core, by process time, so
that others don't count. What is compared takes turns; figures are medians.

--compile: compiled steps, too, without graph breaks; --peer: VideoMAE of transformers, eager, with
the same sizes, pictures and masks; --growth: frames, seconds, batch and size.
"""

import argparse
import itertools
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
import avmae, data, media, train_finetune, train_pretrain  # noqa: E401, E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
PRESET, SIZES, BATCH, FINETUNE_BATCH = (
    ("vggsound", ("base", "large"), 64, 16) if CUDA else ("demo", ("demo",), 32, 16))
GROWTH = {  # on a GPU, on a CPU
    "frames": ((8, 32, 64), (4, 16, 32)), "seconds": ((4, 16), (1.28, 5.12)),
    "batch": ((8, 32, 128, 512), (8, 128)), "size": (avmae.SIZES, ("tiny", "small", "base"))}
USUAL = ["--preset", PRESET, "--dry-run"]
CLASSES = (309,)  # of VGGSound


def clock():
    """Seconds, when what was asked of the device is done."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() if CUDA else time.process_time()


class Step:
    """A training step as the scripts do it, timed by stage. loss: net -> loss of a batch; the
    gradient's norm is clipped to clip_grad, and without it only measured."""

    def __init__(self, model, loss, optimizer, batch, clip_grad=float("inf"), compiled=False):
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
    """Runs steps in turn, which then have `stages` (s) and `speed` (clips/s), and a large matrix
    product -> the FLOP/s of this one."""
    n, dtype = (8192, torch.bfloat16) if CUDA else (1024, torch.float32)
    a, b = torch.randn(2, n, n, device=DEVICE, dtype=dtype)
    times = []
    for k in range(repeats + 2):
        for step in steps[:: (-1) ** k]:  # to come after the product is no advantage
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
    shapes = {m: (batch, *x.shape, x.channels) for m, x in modalities.items()}
    clips = {m: torch.randint(256, s, dtype=torch.uint8, device=DEVICE) for m, s in shapes.items()}
    return {m: x if m == "video" else x[..., 0] / 64 - 2 for m, x in clips.items()}


def pretraining(*flags, compiled=False):
    """The step of train_pretrain.py, mid fusion."""
    args = train_pretrain.parse_args([*USUAL, "--encoder", "mid", "--batch", str(BATCH), *flags])
    model = avmae.AVMAE(train_pretrain.config_of(args)).to(DEVICE)
    inputs = inputs_of(model.config.modalities, args.batch)
    ids = avmae.random_masking(model.config.modalities, args.batch)
    ids = [{m: x.to(DEVICE) for m, x in part.items()} for part in ids]

    optimizer = torch.optim.AdamW(train_pretrain.decay_groups(model, 0.05), lr=1e-4, fused=True)
    step = Step(model, lambda net: net(inputs, ids).loss, optimizer, args.batch, compiled=compiled)
    step.inputs, step.ids = inputs, ids
    return step


def finetuning(*flags, compiled=False):
    """The step of train_finetune.py: MBT, with the recipe's stochastic depth and mixup."""
    args = train_finetune.parse_args([*USUAL, "--batch", str(FINETUNE_BATCH), *flags])
    model = avmae.Classifier(train_finetune.config_of(args, CLASSES)).to(DEVICE)
    inputs = inputs_of(model.config.modalities, args.batch)
    label = torch.arange(args.batch, device=DEVICE)[:, None]

    def loss(net):
        target = train_finetune.targets_of("single", label, CLASSES)
        mixed, labels = train_finetune.mixed(inputs, target, args.mixup[2], 0)
        return train_finetune.classification_loss(net(mixed), labels, "softmax", args.smoothing)

    optimizer = train_finetune.make_optimizer(model, args)
    return Step(model, loss, optimizer, args.batch, train_finetune.CLIP_GRAD, compiled)


def videomae(ours):
    """The peer at the sizes of our step, on its pictures and with its masks."""
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    config = ours.model.config
    size, decoder, video = config.size, config.decoder_size, config.modalities["video"]
    model = VideoMAEForPreTraining(VideoMAEConfig(
        image_size=video.shape[1], num_frames=video.shape[0], tubelet_size=video.patch[0],
        patch_size=video.patch[1], hidden_size=size.width, num_hidden_layers=size.depth,
        num_attention_heads=size.num_heads, intermediate_size=size.mlp_dim,
        decoder_hidden_size=decoder.width, decoder_num_hidden_layers=decoder.depth,
        decoder_num_attention_heads=decoder.num_heads, decoder_intermediate_size=decoder.mlp_dim,
        norm_pix_loss=False)).to(DEVICE)

    masked = torch.zeros(ours.batch, video.tokens, dtype=torch.bool, device=DEVICE)
    masked = masked.scatter(1, ours.ids[1]["video"], True)
    pixels = ours.inputs["video"].permute(0, 1, 4, 2, 3) / 127.5 - 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return Step(model, lambda net: net(pixels, masked).loss, optimizer, ours.batch)


def training_steps(size, options):
    """Prints the steps of a size -> {stage: clips/s of our fastest}. Floor: products of matrices
    alone. FLOPs are counted on the meta device, alike for all devices: of attention two products
    forward and four backward, and nothing that is computed again."""
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
        flops = train_pretrain.flops(ours[0].model.config)
        for label, step in steps.items():
            shares = " ".join(f"{t / sum(step.stages):9.0%}" for t in step.stages)
            print(
                f"{label:28s} {step.speed:8.1f} {step.speed / ours[0].speed:7.2f} {shares} "
                f"{flops / 1e9:8.2f} {step.speed * flops / rate:8.0%} {step.peak / 1e9:9.1f}",
                flush=True)

    v, a = (fastest["pretraining"] / fastest[m] for m in ("video", "audio"))
    print(f"    time of both : video : audio = 1 : {v:.2f} : {a:.2f} (Table 19: 1 : 0.95 : 0.66)")
    return fastest


def growth(repeats):
    """Prints how the pretraining step changes with one setting."""
    print(f"\nclips/s against those of {SIZES[0]} with the preset's settings")
    for what, values in GROWTH.items():
        found = []
        for value in values[not CUDA]:
            usual = ["--size", SIZES[0]]
            try:
                base, step = pretraining(*usual), pretraining(*usual, f"--{what}", str(value))
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
    """{(preset, stage, rows that share a window): clips/s of a core from a file of 10 s, 640x360
    H.264 and AAC, and from what data.py prepare makes of it}, with augmentation."""
    raw, prepared = pathlib.Path(folder, "raw"), pathlib.Path(folder, "prepared")
    media.write(raw / "a.mp4", seconds=10.0, size=(640, 360), picture=picture, crf=23)
    data.prepare(data.find_clips(raw), prepared, data.QUALITY, 1)

    spent = defaultdict(lambda: ([], []))
    for k, preset, (script, stage, rows), kind in itertools.product(
        range(repeats + 2), sorted({"vggsound", PRESET}),
        ((train_pretrain, "pretraining", 1), (train_pretrain, "pretraining", 2),
         (train_finetune, "finetuning", 1)), (0, 1)):
        args = script.parse_args(["--preset", preset, "--dry-run"])
        augment = train_finetune.AUGMENT[args.augment] if "augment" in args else data.Augment()
        index = data.find_clips((raw, prepared)[kind])
        clips = data.Clips(index, train_pretrain.window_of(args), augment=augment)

        start = time.process_time()
        clips.__getitems__([(k, 0, draw) for draw in range(rows)])
        spent[preset, stage, rows][kind].append((time.process_time() - start) / rows)

    return {job: [1 / statistics.median(t[2:]) for t in both] for job, both in spent.items()}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    for flag in "compile", "peer", "growth":
        parser.add_argument(f"--{flag}", action="store_true")
    options = parser.parse_args()

    torch.set_float32_matmul_precision("high" if CUDA else "highest")
    torch.set_num_threads(1)
    torch._dynamo.config.error_on_recompile = True
    print(torch.cuda.get_device_name() if CUDA else "a core of a CPU", "torch", torch.__version__)
    print(f"{'step':28s}  clips/s of ours   forward  backward optimizer   GFLOP of floor   GB more")
    fastest = {size: training_steps(size, options) for size in SIZES}
    if options.growth:
        growth(options.repeats)

    with tempfile.TemporaryDirectory() as folder:
        speeds = readers(options.repeats, folder)
    print(f"\n{'clips/s of a core that reads':35s}      raw prepared   cores that feed the step")
    for (preset, stage, rows), (raw, prepared) in speeds.items():
        label = f"{preset}, {stage}{', --repeat 2' * (rows == 2)}"
        feed = [f"{s} {f[stage] / raw:.1f}, {f[stage] / prepared:.1f}" for s, f in fastest.items()]
        print(f"{label:35s} {raw:8.1f} {prepared:8.1f}   {'   '.join(feed) * (preset == PRESET)}")


if __name__ == "__main__":
    main()
