"""Measure speed: python tests/benchmark.py [--compile] [--peer]

Prints the speed of the training steps of both scripts and of reading clips with augmentation, and
how many CPU cores keep up with a step. A GPU runs the paper's sizes. A CPU runs the demo's on one
core, in process time, so that other programs do not count. Compared steps take turns; all numbers
are medians.

--compile also times compiled steps, without graph breaks. --peer compares with VideoMAE of
transformers, eager, with the same sizes, clips and masks.
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
from torch.utils.flop_counter import FlopCounterMode

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")]
import avmae, data, media, prepare_clips, train_finetune, train_pretrain  # noqa: E401, E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
PRESET, SIZES, BATCH, FINETUNE_BATCH = (
    ("vggsound", ("base", "large"), 64, 16) if CUDA else ("demo", ("demo",), 32, 16))
DEFAULTS = ["--preset", PRESET, "--dry-run"]
CLASSES = (309,)  # of VGGSound


def clock():
    """Return the time in s, once the device has finished all work."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() if CUDA else time.process_time()


class Step:
    """A training step as in the scripts, timed by stage. loss: network -> loss of a batch."""

    def __init__(self, model, loss, optimizer, batch, clip_grad=float("inf"), compiled=False):
        self.model, self.loss, self.optimizer, self.batch = model, loss, optimizer, batch
        self.clip_grad, self.times, self.peak = clip_grad, [], 0  # s of each stage; bytes
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
    """Set `stages` (s) and `speed` (clips/s) of steps; return the FLOP/s of a matrix product."""
    n, dtype = (8192, torch.bfloat16) if CUDA else (1024, torch.float32)
    a, b = torch.randn(2, n, n, device=DEVICE, dtype=dtype)
    times = []
    for k in range(repeats + 2):
        for step in steps[:: (-1) ** k]:  # so that none always follows the product
            step()
        start = clock()
        a @ b
        times.append(clock() - start)

    for step in steps:
        step.stages = [statistics.median(t) for t in zip(*step.times[2:])]
        step.speed = step.batch / sum(step.stages)
    return 2 * n**3 / statistics.median(times[2:])


def random_inputs(modalities, batch):
    """Return random clips on the device, {video: uint8, audio: float32}."""
    shapes = {m: (batch, *x.shape, x.channels) for m, x in modalities.items()}
    clips = {m: torch.randint(256, s, dtype=torch.uint8, device=DEVICE) for m, s in shapes.items()}
    return {m: x if m == "video" else x[..., 0] / 64 - 2 for m, x in clips.items()}


def pretraining(*flags, compiled=False):
    """Return the step of train_pretrain.py with a mid encoder."""
    args = train_pretrain.parse_args([*DEFAULTS, "--encoder", "mid", "--batch", str(BATCH), *flags])
    model = avmae.AVMAE(train_pretrain.make_config(args)).to(DEVICE)
    inputs = random_inputs(model.config.modalities, args.batch)
    ids = avmae.random_masking(model.config.modalities, args.batch)
    ids = [{m: x.to(DEVICE) for m, x in part.items()} for part in ids]

    groups = train_pretrain.decay_groups(model, train_pretrain.WEIGHT_DECAY)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    step = Step(model, lambda net: net(inputs, ids).loss, optimizer, args.batch, compiled=compiled)
    step.inputs, step.ids = inputs, ids
    return step


def finetuning(*flags, compiled=False):
    """Return the step of train_finetune.py: MBT with the preset's stochastic depth and mixup."""
    args = train_finetune.parse_args([*DEFAULTS, "--batch", str(FINETUNE_BATCH), *flags])
    model = avmae.Classifier(train_finetune.make_config(args, CLASSES)).to(DEVICE)
    inputs = random_inputs(model.config.modalities, args.batch)
    label = torch.arange(args.batch, device=DEVICE)[:, None]

    def loss(net):
        target = train_finetune.make_targets("single_label", label, CLASSES)
        mixed, targets = train_finetune.apply_mixup(inputs, target, args.mixup[2], 0)
        return train_finetune.classification_loss(net(mixed), targets, "softmax", args.smoothing)

    optimizer = train_finetune.make_optimizer(model, args.layer_decay)
    return Step(model, loss, optimizer, args.batch, train_finetune.CLIP_GRAD, compiled)


def videomae(step):
    """Return the step of transformers' VideoMAE with the sizes, clips and masks of `step`."""
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    config = step.model.config
    size, decoder, video = config.size, config.decoder_size, config.modalities["video"]
    model = VideoMAEForPreTraining(VideoMAEConfig(
        image_size=video.shape[1], num_frames=video.shape[0], tubelet_size=video.patch[0],
        patch_size=video.patch[1], hidden_size=size.width, num_hidden_layers=size.depth,
        num_attention_heads=size.num_heads, intermediate_size=size.mlp_dim,
        decoder_hidden_size=decoder.width, decoder_num_hidden_layers=decoder.depth,
        decoder_num_attention_heads=decoder.num_heads, decoder_intermediate_size=decoder.mlp_dim,
        norm_pix_loss=False)).to(DEVICE)

    masked = torch.zeros(step.batch, video.num_tokens, dtype=torch.bool, device=DEVICE)
    masked = masked.scatter(1, step.ids[1]["video"], True)
    pixels = step.inputs["video"].permute(0, 1, 4, 2, 3) / 127.5 - 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return Step(model, lambda net: net(pixels, masked).loss, optimizer, step.batch)


def count_flops(config):
    """Return the FLOPs of a clip, forward and backward, counted on the meta device."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        shapes = {m: (1, *x.shape, x.channels) for m, x in config.modalities.items()}
        inputs = {m: torch.zeros(s if m == "video" else s[:-1]) for m, s in shapes.items()}
        out = avmae.build_model(config)(inputs)
        loss = out.loss if isinstance(out, avmae.Output) else sum(x.sum() for x in out.values())
        loss.backward()
    return counter.get_total_flops()


def training_steps(size, options):
    """Print the steps of a model size; return {stage: clips/s of the fastest step of this code}."""
    fastest = {}
    for stage, make, *flags in (
        ("pretraining", pretraining), ("video", pretraining, "--modalities", "video"),
        ("audio", pretraining, "--modalities", "audio"), ("finetuning", finetuning)):
        torch._dynamo.reset()  # so that another model does not count as recompilation
        flags, label = ["--size", size, *flags], f"{size}, {stage}"
        steps = {label: make(*flags)}
        if options.compile:
            steps[f"{label}, compiled"] = make(*flags, compiled=True)
        own = list(steps.values())
        if options.peer and stage == "video":
            steps["VideoMAE of transformers"] = videomae(own[0])

        rate = timed(options.repeats, *steps.values())
        fastest[stage] = max(step.speed for step in own)
        flops = count_flops(own[0].model.config)
        for label, step in steps.items():
            shares = " ".join(f"{t / sum(step.stages):9.0%}" for t in step.stages)
            print(
                f"{label:28s} {step.speed:8.1f} {step.speed / own[0].speed:7.2f} {shares} "
                f"{flops / 1e9:8.2f} {step.speed * flops / rate:8.0%} {step.peak / 1e9:9.1f}",
                flush=True)

    v, a = (fastest["pretraining"] / fastest[m] for m in ("video", "audio"))
    print(f"    time of both : video : audio = 1 : {v:.2f} : {a:.2f} (Table 19: 1 : 0.95 : 0.66)")
    return fastest


def picture(t):
    """Return a picture (360, 640, 3) uint8 at time t (s): a shape and moving noise."""
    noise = np.roll(np.random.default_rng(0).normal(0, 18, (360, 640, 3)), int(40 * t), 1)
    return (data.Scene(0, 0).pictures([t], 640)[0, 140:500] + noise).clip(0, 255).astype(np.uint8)


def readers(repeats, folder):
    """Return {(preset, stage, rows that share a window): clips/s of one core with augmentation}.

    Two numbers each: from 10 s of 640x360 H.264 and AAC, and from its copy by prepare_clips.py.
    """
    raw, prepared = pathlib.Path(folder, "raw"), pathlib.Path(folder, "prepared")
    media.write(raw / "a.mp4", seconds=10.0, size=(640, 360), picture=picture, crf=23)
    prepare_clips.prepare(data.find_clips(raw), prepared, prepare_clips.Prepare.quality, 1)

    spent = defaultdict(lambda: ([], []))
    for k, preset, (script, stage, rows), kind in itertools.product(
        range(repeats + 2), sorted({"vggsound", PRESET}),
        ((train_pretrain, "pretraining", 1), (train_pretrain, "pretraining", 2),
         (train_finetune, "finetuning", 1)), (0, 1)):
        args = script.parse_args(["--preset", preset, "--dry-run"])
        augment = train_finetune.AUGMENT[args.augment] if "augment" in args else data.Augment()
        index = data.find_clips((raw, prepared)[kind])
        clips = data.Clips(index, train_pretrain.make_window(args), augment=augment)

        start = time.process_time()
        clips.__getitems__([(k, 0, draw) for draw in range(rows)])
        spent[preset, stage, rows][kind].append((time.process_time() - start) / rows)

    return {job: [1 / statistics.median(t[2:]) for t in both] for job, both in spent.items()}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--peer", action="store_true")
    options = parser.parse_args()

    torch.set_float32_matmul_precision("high" if CUDA else "highest")
    torch.set_num_threads(1)
    torch._dynamo.config.error_on_recompile = True
    print(torch.cuda.get_device_name() if CUDA else "a core of a CPU", "torch", torch.__version__)
    print(f"{'step':28s}  clips/s relative   forward  backward optimizer   GFLOP of peak   GB more")
    fastest = {size: training_steps(size, options) for size in SIZES}

    with tempfile.TemporaryDirectory() as folder:
        speeds = readers(options.repeats, folder)
    print(f"\n{'clips/s of a core that reads':35s}      raw prepared   cores that feed the step")
    for (preset, stage, rows), (raw, prepared) in speeds.items():
        label = f"{preset}, {stage}{', --repeat 2' * (rows == 2)}"
        feed = [f"{s} {f[stage] / raw:.1f}, {f[stage] / prepared:.1f}" for s, f in fastest.items()]
        print(f"{label:35s} {raw:8.1f} {prepared:8.1f}   {'   '.join(feed) * (preset == PRESET)}")


if __name__ == "__main__":
    main()
