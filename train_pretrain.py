"""Pretrains an audiovisual masked autoencoder (paper Sec. 3; recipe: Table 20).

    torchrun train_pretrain.py --encoder mid                      # built-in clips, minutes on a CPU
    torchrun --nproc_per_node=8 train_pretrain.py --preset vggsound --data clips/ --encoder mid
    python train_pretrain.py --evaluate runs/demo/last.pt         # held-out errors
    python train_pretrain.py --evaluate runs/demo/last.pt --picture clip.mp4

The same command resumes a run that was stopped, with the same losses: the step is the only clock,
and whatever is random depends on (seed, step, place in the global batch) alone.
"""

import argparse
import functools
import json
import math
import os
import pathlib
import resource
import signal
import sys
import time
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

import avmae
import data

# ---------------------------------------------------------------------------------------------
# Settings. A preset overrides the defaults, a flag overrides the preset.

SETTINGS = {  # name: (default, what it is)
    "data": ("", "folder of video files; none: the built-in clips"),
    "annotations": ("", "annotation file that lists the clips of --data to use"),
    "allow_outside": (False, "let annotations name files that are not below --data"),
    "val": ("", "folder of held-out clips; none: 2 % of --data, by hash of the file's name"),
    "out": ("", "folder of the run; none: runs/PRESET"),
    "init": ("", "checkpoint whose weights to start from"),
    "encoder": ("mid", "fusion of the encoder (Sec. 3.2)"),
    "decoder": ("shared", "fusion of the decoder (Sec. 3.3)"),
    "objective": ("joint", "what is reconstructed from what (Sec. 3.4)"),
    "joint_layers": (2, "S, the joint layers of mid fusion (Table 15)"),
    "modalities": (("video", "audio"), "one for AudioMAE or VideoMAE (Table 3)"),
    "mask_video": (0.9, "share of video tokens that is masked (Table 11)"),
    "mask_audio": (0.5, "share of audio tokens that is masked (Table 11)"),
    "standardise": (False, "targets to zero mean and unit variance, per patch"),
    "modality_tokens": (False, "a learned token added to each modality"),
    "allow_uncoupled": (False, "allow separate encoder + separate decoder (Table 10)"),
    "size": ("base", "size of encoder and decoder (Table 21)"),
    "frames": (16, "video frames of a clip"),
    "frame_step": (0.16, "seconds between frames; stride 4 at 25 frames/s"),
    "image": (224, "height and width of a frame, pixels"),
    "tubelet": ((2, 16, 16), "video patch: frames, height, width"),
    "seconds": (8.0, "audio of a clip"),
    "mels": (128, "mel bins"),
    "audio_patch": ((16, 16), "audio patch: frames of 10 ms, mel bins"),
    "video_norm": ((0.0, 1.0), "mean and std of video in [-1, 1], to normalise by"),
    "audio_norm": ((0.0, 1.0), "mean and std of log-mel, to normalise by"),
    "clips": (4096, "number of built-in clips"),
    "held_out_clips": (256, "number of built-in clips to hold out"),
    "fraction": (1.0, "share of the training clips to use (Table 17)"),
    "epochs": (400, "passes over the training clips (Table 5)"),
    "batch": (512, "clips a step, over all processes"),
    "micro_batch": (0, "clips a forward pass of a process; 0: all of its share at once"),
    "lr": (1.5e-4, "peak learning rate for a batch of 256"),
    "warmup": (4.0, "epochs of linear warm-up"),
    "weight_decay": (0.05, "of weight matrices"),
    "seed": (0, "of weights, order, crops and masks"),
    "log_every": (20, "steps between lines of the log"),
    "eval_every": (10.0, "epochs between held-out errors and pictures"),
    "save_every": (1.0, "epochs between saves of last.pt"),
    "keep_every": (0.0, "epochs between checkpoints to keep; 0: none"),
    "max_bad": (0.1, "share of unreadable clips above which the run stops"),
    "workers": (-1, "data processes of each process; -1: as many as there are CPUs to share"),
    "device": ("", "cuda or cpu; none: cuda if there is one"),
    "compile": (False, "torch.compile the model"),
    "checkpoint_activations": (False, "recompute activations in the backward pass, to save memory"),
    "dry_run": (False, "print what would be done, and end"),
    "evaluate": ("", "only report held-out errors of this checkpoint"),
    "picture": ("", "with --evaluate: only draw the reconstruction of this video file"),
}
PRESETS = {
    "demo": dict(
        size="demo", frames=8, frame_step=0.32, image=32, tubelet=(2, 8, 8), seconds=2.56, mels=32,
        epochs=10, batch=32, lr=2.4e-2, warmup=0.5, video_norm=(-0.46, 0.47), audio_norm=(0.2, 1.6),
        mask_video=0.6, mask_audio=0.5, eval_every=5.0),
    "vggsound": dict(size="large", encoder="separate"),
    "audioset": dict(size="large", lr=3e-4, epochs=120, seconds=10.0, mask_audio=0.7),
}
SIZES = avmae.SIZES | {"demo": (avmae.Size(96, 3, 3, 384), avmae.Size(64, 2, 2, 256))}
CHOICES = {
    "encoder": tuple(avmae.PLANS), "decoder": tuple(avmae.PLANS), "objective": tuple(avmae.CONTEXT),
    "modalities": avmae.MODALITIES, "size": tuple(SIZES)}
FREE = {  # may change on resume
    "out", "init", "data", "annotations", "allow_outside", "val", "micro_batch", "log_every",
    "eval_every", "save_every", "keep_every", "max_bad", "workers", "device", "compile",
    "checkpoint_activations"}


def parser_of(about, settings, presets, choices):
    """A parser with a flag for each of the settings {name: (default, what it is)}."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset", default="demo", choices=presets, help="the recipe of a data set")
    for name, (default, text) in settings.items():
        kind = {"type": type(default)}
        if isinstance(default, tuple):
            kind = {"nargs": len(default), "type": type(default[0]) if default else str}
        if name == "modalities" or default == ():
            kind["nargs"] = "+"
        if isinstance(default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(
            "--" + name.replace("_", "-"), default=default, help=text, choices=choices.get(name),
            **kind)
    return parser


def parse(argv=None):
    """The settings of a command line, a namespace."""
    parser = parser_of(__doc__, SETTINGS, PRESETS, CHOICES)
    known, _ = parser.parse_known_args(argv)
    parser.set_defaults(**PRESETS[known.preset])
    if known.evaluate:  # as it was trained
        parser.set_defaults(**avmae.read(known.evaluate, encoder=known.encoder).get("settings", {}))
    args = parser.parse_args(argv)
    args.out = args.out or f"runs/{args.preset}"
    return args


def configs(args):
    """The settings as the model's config and the data's window."""
    encoder, decoder = SIZES[args.size]
    window = data.Window(
        frames=args.frames, step=args.frame_step, size=args.image, seconds=args.seconds,
        mels=args.mels)
    config = avmae.PretrainConfig(
        modalities=tuple(args.modalities),
        size=encoder,
        decoder_size=decoder,
        encoder=args.encoder,
        decoder=args.decoder,
        objective=args.objective,
        joint_layers=args.joint_layers,
        shape={
            "video": (args.frames, args.image, args.image),
            "audio": (round(args.seconds * 100), args.mels)},
        patch={"video": tuple(args.tubelet), "audio": tuple(args.audio_patch)},
        norm={"video": tuple(args.video_norm), "audio": tuple(args.audio_norm)},
        mask={"video": args.mask_video, "audio": args.mask_audio},
        standardise=args.standardise,
        modality_tokens=args.modality_tokens,
        allow_uncoupled=args.allow_uncoupled,
    )
    return config, window


def learning_rate(step, peak, warmup, steps):
    """Linear warm-up, then cosine to 0; the first step has 0 (Table 20, official schedule)."""
    decay = 0.5 * (1 + math.cos(math.pi * max(0.0, step - warmup) / max(1, steps - int(warmup))))
    return peak * min(1.0, step / warmup if warmup else 1.0) * decay


def decay_groups(model, weight_decay):
    """AdamW's groups: weight matrices decay; biases, LayerNorm, mask and modality tokens don't."""
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0}]


def masks_of(model, args, step, rows):
    """Masks of a step: drawn for the global batch, of which a process takes its rows."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    visible, masked = model.draw_masks(args.batch, generator)
    return tuple({m: ids[rows] for m, ids in part.items()} for part in (visible, masked))


# ---------------------------------------------------------------------------------------------
# Held-out errors and pictures (Fig. 5)


@torch.no_grad()
def evaluate(model, loader, device, autocast, seed=0):
    """Held-out errors {key: (error, error with another clip's other modality)}, each the mean of
    Eq. 1 over clips, with the same targets and masks. Works on any number of processes."""
    model.eval()
    keys = [t if t == c else f"{t}_from_{c}" for p in model.config.passes for t, c in p.items()]
    sums = torch.zeros(2 * len(keys) + 1, dtype=torch.float64, device=device)
    for k, batch in enumerate(loader):
        if not len(batch["index"]):
            continue
        inputs, count = data.to_device(batch, device), len(batch["index"])
        masks = model.draw_masks(count, torch.Generator().manual_seed(seed + 7 * k))
        with autocast():
            losses = model(inputs, masks).losses
            for i, key in enumerate(keys):
                others = {
                    m: x if m == key.split("_")[0] else x.roll(1, 0) for m, x in inputs.items()}
                swapped = model(others, masks).losses[key]
                sums[2 * i : 2 * i + 2] += count * torch.stack([losses[key], swapped]).double()
        sums[-1] += count
    if dist.is_initialized():
        dist.all_reduce(sums)
    if not sums[-1]:
        raise data.UserError("none of the held-out clips can be read")
    model.train()
    sums = (sums[:-1] / sums[-1]).tolist()
    return {key: (sums[2 * i], sums[2 * i + 1]) for i, key in enumerate(keys)}


@torch.no_grad()
def constant_error(model, train, held_out):
    """Held-out error {m: error} of the best constant: each patch dimension's training mean."""

    def targets(loader, m):
        for batch in (b for b in loader if m in b):
            yield model.target(m, model.embed[m].patchify(batch[m])).flatten(0, 1).double()

    errors = {}
    for m in model.head:
        sums = [torch.stack([x.sum(0), torch.ones_like(x).sum(0)]) for x in targets(train, m)]
        mean = torch.stack(sums).sum(0)
        mean = mean[0] / mean[1]
        squares = [(x - mean).square().mean(1) for x in targets(held_out, m)]
        errors[m] = torch.cat(squares).mean().item()
    return errors


@torch.no_grad()
def draw(model, inputs, path):
    """Writes PATH_KEY.png for each reconstruction: original, what is visible, reconstruction."""
    model.eval()
    count = len(next(iter(inputs.values())))
    out = model(inputs, model.draw_masks(count, torch.Generator().manual_seed(0)))
    for key, prediction in out.predictions.items():
        m = key.split("_")[0]
        embed, shape = model.embed[m], inputs[m].shape[1:4] if m == "video" else inputs[m].shape[1:]
        original = embed.normalise(embed.patchify(inputs[m])).float()
        prediction = prediction.float()
        if model.config.standardise:  # back to the scale of the original, patch by patch
            goal = avmae.take(original, out.places[key])
            variance, mean = torch.var_mean(goal, dim=-1, correction=0, keepdim=True)
            prediction = prediction * (variance + 1e-6).sqrt() + mean
        seen = torch.zeros_like(original).scatter(
            1, _spread(out.masks[0][m], original), avmae.take(original, out.masks[0][m]))
        rebuilt = (original if key == m else torch.zeros_like(original)).scatter(
            1, _spread(out.places[key], original), prediction)
        rows = [
            avmae.unpatchify(x, m, embed.patch, shape) * embed.norm[1] + embed.norm[0]
            for x in (original, seen, rebuilt)]
        save_image(_video_sheet(rows) if m == "video" else _audio_sheet(rows), f"{path}_{key}.png")
    model.train()


def _spread(ids, patches):
    return ids[..., None].expand(-1, -1, patches.shape[-1])


def _video_sheet(rows):
    """Three (B, T, H, W, 3) in [-1, 1] -> one image: three rows a clip, at most 8 frames each."""
    every = max(1, rows[0].shape[1] // 8)
    frames = torch.stack(rows, dim=1)[:, :, ::every]  # (B, 3, T, H, W, 3)
    zoom = max(1, 64 // frames.shape[3])
    frames = ((frames + 1) / 2).clamp(0, 1).flatten(0, 2).permute(0, 3, 1, 2)
    frames = torch.nn.functional.interpolate(frames, scale_factor=zoom)
    return make_grid(frames, nrow=rows[0][:, ::every].shape[1], padding=2)


def _audio_sheet(rows):
    """Three (B, T, F) -> one image: a clip a row, time to the right and pitch up."""
    sheet = torch.stack(rows, dim=1)  # (B, 3, T, F)
    low, high = sheet[:, :1].amin((2, 3), keepdim=True), sheet[:, :1].amax((2, 3), keepdim=True)
    sheet = ((sheet - low) / (high - low).clamp(min=1e-6)).clamp(0, 1).transpose(2, 3).flip(2)
    sheet = torch.nn.functional.interpolate(sheet, scale_factor=(max(1, 128 // sheet.shape[2]), 1))
    return make_grid(sheet.flatten(0, 1)[:, None], nrow=3, padding=2)


def tell(errors, constant):
    """Prints the errors of `evaluate` beside those of `constant_error` -> them as a dict."""
    print("held-out error, its share of the best constant prediction's, and how much lower it")
    print("is than with another clip's other modality:")
    report = {}
    for key, (error, swapped) in errors.items():
        share, gain = error / constant[key.split("_")[0]], 1 - error / swapped
        report[key] = {"error": error, "of_constant": share, "lower_than_swapped": gain}
        print(f"  {key:18s} {error:.4f}   {share:.3f} of constant   {gain:7.2%}")
    return report


# ---------------------------------------------------------------------------------------------
# A run of either script: its processes, its checkpoint, and what it says of itself


def processes(device):
    """This process among those of torchrun, one per GPU, or alone: world size, rank, device,
    autocast to bfloat16 where the GPU has it, say (prints once), end (ends all of them)."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    native_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    autocast = (
        functools.partial(torch.autocast, "cuda", torch.bfloat16) if native_bf16 else nullcontext)
    if world > 1:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            device_id=device if device.type == "cuda" else None)

    def end(code=0):
        # together: a library's thread that is still busy with the last exchange would abort a
        # process that is on its way out
        if world > 1:
            dist.barrier()
            dist.destroy_process_group()
        sys.exit(code)

    return world, rank, device, autocast, print if rank == 0 else lambda *_: None, end


def shares(args, world):
    """How many clips of a batch a process takes, and how many of these a forward pass."""
    local = args.batch // world
    micro = args.micro_batch or local
    if args.batch % world or local % micro:
        raise data.UserError(
            f"a batch of {args.batch} is not divided by {world} processes x {micro} clips "
            "a forward pass: change --batch or --micro-batch")
    return local, micro


def loading(args, device):
    """A DataLoader that waits for its data set and sampler."""
    cpus = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    workers = args.workers if args.workers >= 0 else (max(1, cpus - 1) if args.data else 0)
    return functools.partial(
        DataLoader, collate_fn=data.collate, num_workers=workers, pin_memory=device.type == "cuda")


def resume(path, model, optimizer, args, free):
    """Takes up a run where it was saved -> the checkpoint. UserError if it has other settings,
    `free` ones aside."""
    saved = avmae.read(path)
    differ = [
        f"{k} is {saved['settings'].get(k)!r} there and {v!r} here"
        for k, v in vars(args).items()
        if k not in free and saved["settings"].get(k) != v]
    if differ:
        raise data.UserError(
            f"{args.out} holds a run with other settings: {'; '.join(differ[:3])}. "
            "Choose another folder with --out")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved


def for_training(model, args, world, device):
    """The model with recomputed activations and compiled, if asked for, on all processes."""
    if args.checkpoint_activations:
        for block in model.modules():
            if isinstance(block, avmae.Block):
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    net = torch.compile(model, fullgraph=True) if args.compile else model
    if world == 1:
        return net
    return torch.nn.parallel.DistributedDataParallel(
        net, device_ids=[device.index] if device.index is not None else None)


class Progress:
    """The steps of a run, and what it says of itself: a progress bar, log.jsonl with a line every
    --log-every steps, unreadable.txt."""

    def __init__(self, args, clips, start, steps, steps_per_epoch, processes):
        self.args, self.clips, self.start, self.steps = args, clips, start, steps
        self.steps_per_epoch, (self.world, self.rank, self.device) = steps_per_epoch, processes
        self.out = pathlib.Path(args.out)
        self.stop, self.history, self.named = [], [], set()
        self.drawn = self.unreadable = self.streak = 0
        for name in signal.SIGTERM, signal.SIGINT:
            signal.signal(name, lambda number, _: self.stop.append(number))
        if self.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            self._trim(self.out / "log.jsonl")
            print(json.dumps(vars(args)))

    def _trim(self, log):
        """A killed run had logged on after its last save, perhaps half a line."""
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        kept = [x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= self.start]
        partial = log.with_suffix(".partial")
        partial.write_text("".join(kept))
        os.replace(partial, log)

    def batches(self, loader):
        """(step, batch) to the end; each clip that could not be read is named once."""
        self.bar = tqdm(
            total=self.steps, initial=self.start, disable=None if self.rank == 0 else True)
        loader = iter(loader)
        for self.step in range(self.start, self.steps):
            asked = time.monotonic()
            if not self.history:  # saving and evaluating is none of the steps' time
                self.waited, self.since = 0.0, asked
            batch = next(loader)
            self.waited += time.monotonic() - asked
            self.drawn += len(batch["index"])
            self.unreadable += len(batch["bad"])
            for name, reason in dict(batch["bad"]).items():
                if name not in self.named:
                    self.named.add(name)
                    self.bar.write(f"unreadable, replaced: {name}: {reason}")
                    with open(self.out / "unreadable.txt", "a") as file:
                        file.write(f"{name}: {reason}\n")
            yield self.step, batch
        self.bar.close()

    def due(self, values, index):
        """Notes a step's losses and, last, norm of the gradient (K + 1,), and its clips -> whether
        it is time to report."""
        self.history.append((self.step, values, index))
        self.bar.update()
        self.done = self.step + 1
        return self.done % self.args.log_every == 0 or self.done == self.steps

    def crossed(self, epochs):
        """Whether a multiple of so many epochs lies in the log interval that ends here."""
        every = max(1, round(epochs * self.steps_per_epoch))
        before = max(0, self.done - self.args.log_every)
        return epochs > 0 and (self.done // every > before // every or self.done == self.steps)

    def report(self, names, lr):
        """Logs the mean losses {names} since the last report -> whether a process was told to stop.

        One exchange between processes. UserError after three steps in a row that are not finite,
        or if too many clips cannot be read.
        """
        values = torch.stack([v for _, v, _ in self.history]).double()
        for (step, _, index), row in zip(self.history, values.tolist()):
            self.streak = 0 if math.isfinite(row[-1]) else self.streak + 1
            if self.streak:
                wrong = [n for n, x in zip(names, row) if not math.isfinite(x)] or ["gradient"]
                self.bar.write(
                    f"step {step} is not finite in {', '.join(wrong)} and was not applied; clips: "
                    + ", ".join(self.clips.name(i) for i in index.tolist()))
        finite = values[values[:, -1].isfinite()]
        mean = finite.mean(0) if len(finite) else values[0]
        shared = torch.cat([
            mean[:-1],
            torch.tensor([bool(self.stop), self.waited, self.drawn, self.unreadable]).to(mean)])
        if self.world > 1:
            dist.all_reduce(shared)
        *losses, stopped, waited, drawn, unreadable = shared.tolist()
        seconds = time.monotonic() - self.since
        memory = (
            torch.cuda.max_memory_allocated()
            if self.device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        line = {"step": self.done, "epoch": self.done / self.steps_per_epoch}
        line |= {name: x / self.world for name, x in zip(names, losses)}
        line |= {
            "lr": lr, "grad_norm": mean[-1].item(),
            "clips_per_s": len(self.history) * self.args.batch / seconds,
            "waiting": waited / self.world / seconds, "memory_gb": memory / 1e9,
            "seconds_left": seconds / len(self.history) * (self.steps - self.done),
            "unreadable": int(unreadable)}
        self.write(line)
        if self.rank == 0:
            self.bar.write(" ".join(f"{k} {v:.4g}" for k, v in line.items()))
        if self.streak >= 3:
            raise data.UserError(
                f"{self.streak} steps in a row were not finite: {self.out / 'last.pt'} is from "
                "before them; lower --lr")
        if drawn >= min(len(self.clips), 1000) and unreadable > self.args.max_bad * (
            drawn + unreadable):
            raise data.UserError(
                f"{int(unreadable)} of {int(drawn + unreadable)} clips could not be read, more "
                f"than --max-bad {self.args.max_bad:g}: see {self.out / 'unreadable.txt'}, or run "
                "python data.py check")
        self.history = []
        return bool(stopped)

    def write(self, line):
        """Appends a line to the log."""
        if self.rank == 0:
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    sys.excepthook = data.one_sentence
    args = parse()
    config, window = configs(args)
    world, rank, device, autocast, say, end = processes(args.device)
    local, micro = shares(args, world)

    # -----------------------------------------------------------------------------------------
    # Data

    if args.data:
        clips = (
            data.read_annotations(args.annotations, args.data, "train", args.allow_outside)
            if args.annotations
            else data.find_clips(args.data))
        held = data.held_out(clips)
        held_out = data.find_clips(args.val) if args.val else clips.subset(held)
        if not len(held_out):
            say("too few clips to hold one out: errors and pictures are of a training clip")
            held_out = clips
        train = data.fraction_of(clips if args.val else clips.subset(~held), args.fraction)
        train = data.Clips(train, window, config.modalities, data.Augment(), args.seed)
        held_out = data.Clips(held_out, window, config.modalities)
    else:
        train = data.Builtin(
            round(args.clips * args.fraction), window, args.seed, config.modalities)
        held_out = data.Builtin(
            args.held_out_clips, window, args.seed + 1_000_000, config.modalities)
    steps_per_epoch = max(1, len(train) // args.batch)
    steps, warmup = args.epochs * steps_per_epoch, args.warmup * steps_per_epoch
    load = loading(args, device)
    mine = [(0, i) for i in range(rank, len(held_out), world)]
    held_loader = load(
        held_out, batch_sampler=[mine[k : k + micro] for k in range(0, len(mine), micro)])

    # -----------------------------------------------------------------------------------------
    # Model

    if args.dry_run:
        with torch.device("meta"):
            model = avmae.AVMAE(config)
            inputs = {
                m: torch.zeros(1, *config.shape[m], *([3] if m == "video" else []))
                for m in config.modalities}
            counter = FlopCounterMode(display=False)
            with counter:
                model(
                    inputs, [{m: i.to("meta") for m, i in p.items()} for p in model.draw_masks(1)]
                ).loss.backward()
        say(json.dumps(vars(args), indent=1))
        say(
            f"encoder {model.encoder.plan}, decoder {model.decoder.plan}, "
            f"objective {config.passes}")
        for m in config.modalities:
            say(f"{m}: {config.tokens(m)} tokens, {config.masked(m)} masked")
        say(f"{sum(p.numel() for p in model.parameters()):,} parameters")
        say(f"{counter.get_total_flops() / 1e9:.2f} GFLOP a clip, forward and backward")
        say(
            f"{len(train)} training clips, {len(held_out)} held out; {steps} steps, "
            f"{steps_per_epoch} an epoch; "
            f"{args.batch} clips a step = {world} processes x {local // micro} passes x {micro}")
        end()

    def constant():
        """Errors of the best constant, of a few clips."""
        few = data.Batches(len(train), min(64, len(train)), args.seed, 0, 8)
        some = [[(0, i)] for i in range(min(256, len(held_out)))]
        return constant_error(
            model.cpu(), load(train, batch_sampler=few), load(held_out, batch_sampler=some))

    torch.manual_seed(args.seed)
    if args.picture and not args.evaluate:
        raise data.UserError("--picture needs a checkpoint to draw with: --evaluate FILE")
    strategies = dict(encoder=args.encoder, decoder=args.decoder, objective=args.objective)
    if args.evaluate:
        model = avmae.load(args.evaluate, **strategies).to(device)
        if not isinstance(model, avmae.AVMAE):
            raise data.UserError(f"{args.evaluate} is no pretraining model: it draws nothing")
        if args.picture:
            clip = data.Clips(data.single_clip(args.picture), window, model.config.modalities)[0, 0]
            if clip["bad"]:
                raise data.UserError(f"{args.picture}: {clip['bad'][0][1]}")
            name = pathlib.Path(args.picture).stem
            draw(model, data.to_device(data.collate([clip]), device), name)
            say(f"wrote {name}_*.png")
        else:
            errors = evaluate(model, held_loader, device, autocast)
            if rank == 0:
                tell(errors, constant())
        end()
    model = avmae.AVMAE(config).to(device)

    # -----------------------------------------------------------------------------------------
    # Where we are

    out, start = pathlib.Path(args.out), 0
    last = out / "last.pt"
    optimizer = torch.optim.AdamW(
        decay_groups(model, args.weight_decay), betas=(0.9, 0.95), eps=1e-8, fused=True)
    if last.exists():
        start = resume(last, model, optimizer, args, FREE)["step"]
        say(f"resuming {last} at step {start} of {steps}")
    elif args.init:
        initial = avmae.load(args.init, **strategies)
        for note in initial.notes:
            say(f"{args.init}: {note}")
        try:
            model.load_state_dict(initial.state_dict())
        except RuntimeError as error:
            raise data.UserError(
                f"{args.init} is another architecture: {str(error).splitlines()[1].strip()}"
            ) from None
    net = for_training(model, args, world, device)
    progress = Progress(args, train, start, steps, steps_per_epoch, (world, rank, device))

    def held_out_errors(step):
        """Evaluates; writes the errors to the log, and pictures."""
        errors = evaluate(model, held_loader, device, autocast)
        progress.write({"step": step, "held_out": {k: e for k, (e, _) in errors.items()}})
        if rank == 0:
            (out / "pictures").mkdir(exist_ok=True)
            some = [5 * i % len(held_out) for i in range(min(4, len(held_out)))]  # of four classes
            few = data.collate([held_out[0, i] for i in some])
            if len(few["index"]):
                draw(model, data.to_device(few, device), out / "pictures" / f"{step:07d}")
        return errors

    # -----------------------------------------------------------------------------------------
    # The loop

    batches = data.Batches(len(train), args.batch, args.seed, start, steps, rank, world)
    for step, batch in progress.batches(load(train, batch_sampler=batches)):
        inputs = data.to_device(batch, device)
        masks = masks_of(model, args, step, slice(rank * local, (rank + 1) * local))
        masks = [
            {m: ids.to(device, non_blocking=True) for m, ids in part.items()} for part in masks]
        losses = 0
        for k in range(0, local, micro):
            rows = slice(k, k + micro)
            with net.no_sync() if world > 1 and rows.stop < local else nullcontext():
                with autocast():
                    result = net(
                        {m: x[rows] for m, x in inputs.items()},
                        tuple({m: ids[rows] for m, ids in part.items()} for part in masks))
                (result.loss * (micro / local)).backward()
            parts = torch.stack([result.loss, *result.losses.values()])
            losses = losses + parts.detach() * (micro / local)
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        # the fused step is not taken where this is 1, without a synchronisation
        optimizer.found_inf = (~norm.isfinite()).float()
        rate = learning_rate(step, args.lr * args.batch / 256, warmup, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not progress.due(torch.cat([losses, norm[None]]), batch["index"]):
            continue

        stopped = progress.report(["loss", *(f"loss_{k}" for k in result.losses)], rate)
        keep = progress.crossed(args.keep_every)
        if rank == 0 and (stopped or keep or progress.crossed(args.save_every)):
            state = dict(
                optimizer=optimizer.state_dict(), step=progress.done, settings=vars(args))
            avmae.save(model, last, **state)
            if keep:
                avmae.save(model, out / f"epoch_{progress.done / steps_per_epoch:g}.pt", **state)
        if stopped:
            say(f"stopped at step {progress.done} of {steps}; the same command continues")
            end(0 if progress.done == steps else 1)
        if progress.crossed(args.eval_every) and progress.done < steps:
            errors = held_out_errors(progress.done)
            said = ", ".join(f"{k} {e:.4f}" for k, (e, _) in errors.items())
            progress.bar.write(f"held out at step {progress.done}: {said}")

    # -----------------------------------------------------------------------------------------
    # What it has learned

    errors = held_out_errors(steps)
    if rank == 0:
        results = {"held_out": tell(errors, constant()), "clips": len(held_out)}
        (out / "results.json").write_text(json.dumps(results | {"settings": vars(args)}, indent=1))
        print(f"checkpoint {last}, log {out / 'log.jsonl'}, pictures {out / 'pictures'}")
    end()
