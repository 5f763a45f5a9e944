"""How fast: python tests/benchmark.py [--compile] [--peer] [--growth]

Tables of the training steps (forward, backward, optimiser; clips/s; share of what the device's
matrix products alone would allow; peak memory), of the data (clips/s of one core) and of how many
cores feed which step. On a GPU at the paper's sizes, on a CPU at the demo's. Each figure is the
median of interleaved repeats.

--compile adds the compiled steps, which must not break into graphs nor be compiled again; --peer
Hugging Face's VideoMAEForPreTraining (pip install transformers) beside ours in the video-only mode,
same sizes, masks and pictures; --growth how the step grows with frames, seconds, size and batch.
"""

import argparse
import pathlib
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext

import av
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import avmae  # noqa: E402
import data  # noqa: E402
import media  # noqa: E402
import train_finetune  # noqa: E402
import train_pretrain  # noqa: E402

BOTH = ("video", "audio")
ON_GPU = {"preset": "vggsound", "sizes": ("base", "large"), "batch": 64, "finetune": 16}
ON_CPU = {"preset": "demo", "sizes": ("demo",), "batch": 32, "finetune": 16}
GROWTH = {  # flag: values; the paper's sizes, and the demo's
    "vggsound": {
        "frames": (8, 16, 32, 64), "seconds": (4, 8, 16), "batch": (8, 32, 128, 512),
        "size": ("tiny", "small", "base", "large", "huge")},
    "demo": {
        "frames": (4, 8, 16, 32), "seconds": (1.28, 2.56, 5.12), "batch": (8, 32, 128),
        "size": ("demo", "tiny", "small", "base")},
}


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def matrix_rate(device):
    """FLOP/s of large matrix products, in the precision of the step."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(8):
        start = clock(device)
        a @ b
        times.append(clock(device) - start)
    return 2 * n**3 / statistics.median(times[2:])


class Step:
    """A training step of a model, timed by stage. loss: net -> loss of a batch."""

    def __init__(self, model, loss, optimizer, batch, device, compiled=False):
        self.model, self.loss, self.optimizer, self.batch = model, loss, optimizer, batch
        self.device, self.times = device, []
        torch._dynamo.reset()  # another model is no recompilation
        self.net = torch.compile(model, fullgraph=True) if compiled else model
        self.autocast = (
            (lambda: torch.autocast("cuda", torch.bfloat16))
            if device.type == "cuda"
            else nullcontext)

    def __call__(self):
        at = [clock(self.device)]
        with self.autocast():
            loss = self.loss(self.net)
        at.append(clock(self.device))
        loss.backward()
        at.append(clock(self.device))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        at.append(clock(self.device))
        self.times.append([b - a for a, b in zip(at, at[1:])])

    def medians(self):
        """Seconds of forward, backward and optimiser, without the two first steps."""
        return [statistics.median(t) for t in zip(*self.times[2:])]

    def clips_per_s(self):
        return self.batch / sum(self.medians())

    def gflop(self):
        """Of a clip, forward and backward, without what attention recomputes."""
        with FlopCounterMode(display=False) as counter:
            self.loss(self.model).backward()
        self.optimizer.zero_grad(set_to_none=True)
        return counter.get_total_flops() / 1e9 / self.batch


def random_inputs(config, batch, device):
    return {
        m: torch.randint(0, 256, (batch, *config.shape[m], 3), dtype=torch.uint8, device=device)
        if m == "video"
        else torch.randn(batch, *config.shape[m], device=device)
        for m in config.modalities}


def pretraining(args, device, modalities=BOTH, size="", batch=0, compiled=False, **settings):
    """The step of train_pretrain.py, mid fusion."""
    given = train_pretrain.parse(["--preset", args.preset, "--encoder", "mid"])
    vars(given).update(modalities=modalities, **({"size": size} if size else {}), **settings)
    config, _ = train_pretrain.configs(given)
    batch = batch or args.batch
    model = avmae.AVMAE(config).to(device)
    inputs = random_inputs(config, batch, device)
    masks = tuple({m: i.to(device) for m, i in p.items()} for p in model.draw_masks(batch))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    step = Step(model, lambda net: net(inputs, masks).loss, optimizer, batch, device, compiled)
    step.inputs, step.masks = inputs, masks
    return step


def finetuning(args, device, size, compiled=False):
    """The step of train_finetune.py: MBT, both modalities, stochastic depth."""
    given = train_finetune.parse(["--preset", args.preset])
    vars(given).update(size=size)
    model = avmae.Classifier(train_finetune.config_of(given, (309,))).to(device)
    batch = args.finetune
    inputs = random_inputs(model.config, batch, device)
    keep = avmae.draw_keep(0.3, model.config.size.layers, BOTH, batch)
    keep = {m: k.to(device) for m, k in keep.items()}
    labels = torch.nn.functional.one_hot(torch.arange(batch, device=device) % 309, 309).float()

    def loss(net):
        return train_finetune.classification_loss(
            net(inputs, keep), {m: labels for m in inputs}, "softmax", 0.3)

    optimizer = train_finetune.optimizer_of(model, given)
    return Step(model, loss, optimizer, batch, device, compiled)


def videomae(ours, device):
    """The peer at the same sizes, on the same pictures and with the same tokens masked."""
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    config, (frames, height, _) = ours.model.config, ours.model.config.shape["video"]
    peer = VideoMAEForPreTraining(
        VideoMAEConfig(
            image_size=height, patch_size=config.patch["video"][1], num_frames=frames,
            tubelet_size=config.patch["video"][0], hidden_size=config.size.width,
            num_hidden_layers=config.size.layers, num_attention_heads=config.size.heads,
            intermediate_size=config.size.mlp, decoder_hidden_size=config.decoder_size.width,
            decoder_num_hidden_layers=config.decoder_size.layers,
            decoder_num_attention_heads=config.decoder_size.heads,
            decoder_intermediate_size=config.decoder_size.mlp, norm_pix_loss=False)
    ).to(device)
    where = torch.zeros(ours.batch, config.tokens("video"), dtype=torch.bool, device=device)
    where.scatter_(1, ours.masks[1]["video"], True)
    pixels = (ours.inputs["video"].permute(0, 1, 4, 2, 3).float() / 255 - 0.5) / 0.5
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-4, fused=True)
    return Step(
        peer, lambda net: net(pixel_values=pixels, bool_masked_pos=where).loss, optimizer,
        ours.batch, device)


def timed(args, *steps):
    """Runs steps in turn, and returns the first."""
    for _ in range(args.repeats + 2):
        for step in steps:
            step()
    return steps[0]


def memory(device):
    """Peak of the device since the last call, as words; of a CPU it is not known."""
    if device.type != "cuda":
        return ""
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return f"{peak:.1f} GB"


def row(label, step, rate, device):
    gflop = step.gflop()
    print(
        f"{label:44s} " + " ".join(f"{1e3 * t:7.1f}ms" for t in step.medians())
        + f" {step.clips_per_s():8.1f} {step.clips_per_s() * gflop * 1e9 / rate:8.2f}"
        + f" {gflop:9.2f}  {memory(device)}")


def training_steps(args, device):
    """Prints the table of steps; returns {step: clips/s} of those with both modalities."""
    rate = matrix_rate(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(
        f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}: "
        f"{rate / 1e12:.3g} TFLOP/s in matrix products\n"
        f"{'step':44s} {'forward':>9s} {'backward':>9s} {'optimiser':>9s} {'clips/s':>8s} "
        f"{'of floor':>8s} {'GFLOP':>9s}  peak")
    speeds = {}
    for size in args.sizes:
        alone = {}
        for modalities in BOTH, ("video",), ("audio",):
            label = f"{size}, pretraining, {' + '.join(modalities)}"
            step = pretraining(args, device, modalities, size)
            peers = [videomae(step, device)] if args.peer and modalities == ("video",) else []
            alone[modalities] = timed(args, step, *peers).clips_per_s()
            row(label, step, rate, device)
            for peer in peers:
                print(f"    {alone[modalities] / peer.clips_per_s():.2f} times VideoMAE's clips/s")
            if args.compile:
                step = timed(args, pretraining(args, device, modalities, size, compiled=True))
                row(f"{label}, compiled", step, rate, device)
                for peer in peers:
                    ratio = step.clips_per_s() / peer.clips_per_s()
                    print(f"    {ratio:.2f} times VideoMAE's clips/s, which is not compiled")
        a, v = (alone[BOTH] / alone[m,] for m in ("audio", "video"))
        print(
            f"    time of both : video : audio = 1 : {v:.2f} : {a:.2f} (Table 19: 1 : 0.95 : 0.66)")
        speeds[f"{size}, pretraining"] = alone[BOTH]
        for compiled in (False, True) if args.compile else (False,):
            step = timed(args, finetuning(args, device, size, compiled))
            label = f"{size}, finetuning{', compiled' if compiled else ''}"
            row(label, step, rate, device)
            speeds[label] = step.clips_per_s()
    return speeds


def growth(args, device):
    """Prints how the pretraining step grows, relative to the preset's."""
    size = args.sizes[0]
    base = timed(args, pretraining(args, device, size=size)).clips_per_s()
    print(f"growth, against {size} at the preset's settings: relative clips/s, peak memory")
    for what, values in GROWTH[args.preset].items():
        found = []
        for value in values:
            settings = {"size": size} | {what: value}
            memory(device)
            try:
                step = timed(args, pretraining(args, device, **settings))
                found.append(f"{value}: {step.clips_per_s() / base:.2f} {memory(device)}".rstrip())
            except torch.OutOfMemoryError:
                found.append(f"{value}: does not fit")
        print(f"    {what:8s} " + ", ".join(found))


def textured(seed=0):
    """time -> (360, 640, 3) uint8: a shape before a noisy ground that moves, hard to compress."""
    world, rng = data.scene(0, 0), np.random.default_rng(seed)
    ground = rng.normal(0, 18, (360, 640, 3))

    def picture(t):
        image = data.render(world, [t], 640)[0, 140:500] + np.roll(ground, int(40 * t), 1)
        return image.clip(0, 255).astype(np.uint8)

    return picture


def bare(path, window):
    """What a plain PyAV loop takes to the same clip: every frame decoded, the chosen ones scaled
    to the size that training crops from, the sound resampled, log-mel."""
    with av.open(str(path)) as container:
        container.streams.video[0].thread_count = 1
        wanted, k = np.arange(window.frames) * window.step, 0
        for frame in container.decode(video=0):
            if frame.time >= wanted[k]:
                frame.reformat(456, 256, "rgb24", interpolation="BILINEAR").to_ndarray()
                k += 1
                if k == len(wanted):
                    break
    with av.open(str(path)) as container:
        resampler = av.AudioResampler(format="flt", layout="mono", rate=data.SAMPLE_RATE)
        sound = [
            r.to_ndarray()[0] for f in container.decode(audio=0) for r in resampler.resample(f)]
    data.log_mel(torch.from_numpy(np.concatenate(sound))[: round(window.seconds * 16_000)])


def readers(args):
    """Prints clips/s of one core; by process time, so that other processes don't count."""
    torch.set_num_threads(1)
    speeds, window = {}, data.Window()
    with tempfile.TemporaryDirectory() as folder:
        raw, prepared = pathlib.Path(folder, "raw"), pathlib.Path(folder, "prepared")
        for name, picture in (
            ("plain", lambda t: data.render(data.scene(0, 0), [t], 640)[0, 140:500]),
            ("textured", textured())):
            media.write(
                raw / f"{name}.mp4", seconds=10.0, size=(640, 360), clicks=range(10),
                picture=picture, crf=23)
        data.prepare(data.find_clips(raw), prepared, data.QUALITY, 1)
        small = train_pretrain.configs(train_pretrain.parse([]))[1]
        jobs = {"built-in, demo": lambda k: data.Builtin(10**6, small)[0, k]}
        for kind, at in ("raw", raw), ("prepared", prepared):
            index = data.find_clips(at)
            clips = data.Clips(index, window, augment=data.Augment())
            for i, name in enumerate(("plain", "textured")):
                jobs[f"{kind}, {name}"] = lambda k, i=i, clips=clips: clips[k, i]
                if kind == "raw":
                    path = index.path(i)
                    jobs[f"bare PyAV loop, {name}"] = lambda k, path=path: bare(path, window)
        times = {name: [] for name in jobs}
        for k in range(args.repeats + 2):
            for name, job in jobs.items():
                start = time.process_time()
                job(k)
                times[name].append(time.process_time() - start)
    print("clips/s of a core (raw: 10 s of 640x360 H.264 and AAC, to 16 frames and 8 s)")
    for name, spent in times.items():
        speeds[name] = 1 / statistics.median(spent[2:])
        print(f"    {name:28s} {speeds[name]:7.1f}")
    return speeds


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--peer", action="store_true", help="VideoMAE of transformers, too")
    parser.add_argument("--compile", action="store_true", help="compiled, too")
    parser.add_argument("--growth", action="store_true", help="with frames, seconds, size, batch")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vars(args).update(ON_GPU if device.type == "cuda" else ON_CPU)
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")
    torch._dynamo.config.error_on_recompile = True
    steps = training_steps(args, device)
    if args.growth:
        growth(args, device)
    cores = readers(args)
    if args.preset != "demo":  # whose clips are generated
        print("cores that feed a step, raw / prepared (textured):")
        for name, speed in steps.items():
            raw, prepared = (speed / cores[f"{k}, textured"] for k in ("raw", "prepared"))
            print(f"    {name:28s} {raw:5.0f} / {prepared:5.0f}")


if __name__ == "__main__":
    main()
