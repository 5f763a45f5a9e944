"""How fast: python tests/benchmark.py [--size base] [--peer]

A table of the training step (forward, backward, optimiser; clips/s; share of what the device's
matrix products alone would allow; peak memory) and of the data (clips/s of one core, built-in, raw
and prepared). Each figure is the median of interleaved repeats. --peer puts Hugging Face's
VideoMAEForPreTraining (pip install transformers) beside ours in the video-only mode: same sizes,
masks and data, in the same run, as a ratio.
"""

import argparse
import pathlib
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import avmae  # noqa: E402
import data  # noqa: E402
import media  # noqa: E402
import train_pretrain  # noqa: E402

MODES = {"video + audio": ("video", "audio"), "video": ("video",), "audio": ("audio",)}


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def matrix_rate(device, dtype):
    """FLOP/s of large matrix products."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(8):
        start = clock(device)
        a @ b
        times.append(clock(device) - start)
    return 2 * n**3 / statistics.median(times[2:])


class Step:
    """A training step of a model, timed by stage."""

    def __init__(self, net, loss, device):
        self.net, self.loss, self.device = net, loss, device
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
        self.autocast = (
            (lambda: torch.autocast("cuda", torch.bfloat16))
            if device.type == "cuda"
            else nullcontext)
        self.times = []

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

    def medians(self, warm=2):
        return [statistics.median(t) for t in zip(*self.times[warm:])]


def ours(args, modalities, device, compiled):
    settings = train_pretrain.parse(
        [
            "--preset", args.preset, *(["--size", args.size] if args.size else []), "--encoder",
            "mid", "--modalities", *modalities]
    )
    config, window = train_pretrain.configs(settings)
    torch.manual_seed(0)
    model = avmae.AVMAE(config).to(device)
    shapes = {m: (args.batch, *config.shape[m]) for m in config.modalities}
    inputs = {
        m: torch.randint(0, 256, (*s, 3), dtype=torch.uint8, device=device)
        if m == "video"
        else torch.randn(s, device=device)
        for m, s in shapes.items()}
    masks = tuple({m: i.to(device) for m, i in p.items()} for p in model.draw_masks(args.batch))
    net = torch.compile(model, fullgraph=True) if compiled else model
    return model, Step(net, lambda net: net(inputs, masks).loss, device), inputs, masks


def flops_of(model, inputs, masks):
    with FlopCounterMode(display=False) as counter:
        model(
            {m: x[:1] for m, x in inputs.items()},
            tuple({m: i[:1] for m, i in p.items()} for p in masks)).loss.backward()
    model.zero_grad()
    return counter.get_total_flops()


def videomae(config, video, masks, device):
    """The peer at the same sizes, on the same pictures and with the same tokens masked."""
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    frames, height, _ = config.shape["video"]
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
    where = torch.zeros(
        len(video), config.tokens("video"), dtype=torch.bool, device=device
    ).scatter(1, masks[1]["video"], True)
    pixels = (video.permute(0, 1, 4, 2, 3).float() / 255 - 0.5) / 0.5
    return Step(peer, lambda net: net(pixel_values=pixels, bool_masked_pos=where).loss, device)


def steps(args, device):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rate = matrix_rate(device, dtype)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(
        f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}: "
        f"{rate / 1e12:.3g} TFLOP/s in matrix products"
    )
    print(
        f"{'step':24s} {'forward':>9s} {'backward':>9s} {'optimiser':>9s}  clips/s  of floor"
        "  GFLOP/clip  memory"
    )
    for mode, modalities in MODES.items():
        for compiled in (False, True) if args.compile else (False,):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            model, step, inputs, masks = ours(args, modalities, device, compiled)
            gflop = flops_of(model, inputs, masks) / 1e9
            rivals = {"": step}
            if args.peer and modalities == ("video",):
                rivals["peer"] = videomae(model.config, inputs["video"], masks, device)
            for _ in range(args.repeats + 2):
                for rival in rivals.values():
                    rival()
            for rival, timed in rivals.items():
                parts = timed.medians()
                speed = args.batch / sum(parts)
                memory = (
                    torch.cuda.max_memory_allocated() / 1e9
                    if device.type == "cuda"
                    else float("nan"))
                label = f"{mode} {rival or ('compiled' if compiled else '')}"
                print(
                    f"{label:24s} "
                    + " ".join(f"{1e3 * p:7.1f}ms" for p in parts)
                    + f"  {speed:7.1f}  {speed * gflop * 1e9 / rate:8.2f}  {gflop:10.2f}"
                    + f"  {memory:5.1f} GB"
                )
            if "peer" in rivals:
                print(
                    "  ours / peer: "
                    f"{sum(rivals['peer'].medians()) / sum(step.medians()):.2f} times its clips/s"
                )


def readers(args):
    """clips/s of one core, by process time: other processes don't count."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        raw, prepared = pathlib.Path(folder) / "raw", pathlib.Path(folder) / "prepared"
        raw.mkdir()
        world = data.scene(0, 0)
        media.write(
            raw / "a.mp4", seconds=10.0, size=(640, 360), clicks=range(10),
            picture=lambda t: data.render(world, [t], 640)[0, 140:500])
        data.prepare(data.find_clips(raw), prepared, 3, 1)
        window = data.Window()
        sets = {
            "raw 640x360 H.264, AAC": data.Clips(
                data.find_clips(raw), window, augment=data.Augment()),
            "prepared": data.Clips(data.find_clips(prepared), window, augment=data.Augment()),
            "built-in, demo": data.Builtin(
                10**6, train_pretrain.configs(train_pretrain.parse([]))[1]),
        }
        for name, clips in sets.items():
            times = []
            for k in range(args.repeats + 2):
                start = time.process_time()
                clips[(k, 0 if "built" not in name else k)]
                times.append(time.process_time() - start)
            print(f"{name:24s} {1 / statistics.median(times[2:]):7.1f} clips/s a core")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="vggsound", choices=train_pretrain.PRESETS)
    parser.add_argument("--size", default="", help="none: the preset's")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--compile", action="store_true", help="also compiled")
    args = parser.parse_args()
    steps(args, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    readers(args)


if __name__ == "__main__":
    main()
