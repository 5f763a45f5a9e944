"""Pretrains an audiovisual masked autoencoder (Sec. 3 of the paper; recipe: Table 20).

    torchrun train_pretrain.py --encoder mid               # built-in clips, two minutes on a CPU
    torchrun --nproc_per_node=8 train_pretrain.py --preset vggsound --data clips/ --encoder mid
    python train_pretrain.py --eval runs/demo/last.pt --data clip.mp4       # errors and pictures

The same command resumes a run that was stopped, with the same losses: the step is the only clock,
and whatever is random depends on (seed, step, place in the global batch) alone.
"""

import argparse
import errno
import functools
import json
import math
import os
import pathlib
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

import avmae
import data

# ---------------------------------------------------------------------------------------------
# Settings by group, as name: (default, what it is). A preset overrides a default, a flag a preset;
# without --preset it is demo's, which overrides most of them.

DATA = {  # of both scripts; may change on resume
    "data": ("", "folder of video files, or one file; none: the built-in clips (preset demo)"),
    "annotations": ("", "annotation file that lists the clips of --data to use"),
    "allow_outside": (False, "let annotations name files that are not below --data"),
}
CLIP = {  # what a clip is, in both scripts; fixed for a run
    "modalities": (("video", "audio"), "give one for AudioMAE or VideoMAE (Table 3)"),
    "frames": (16, "video frames of a clip"),
    "frame_step": (0.16, "seconds between frames; stride 4 at 25 frames/s"),
    "image": (224, "height and width of a frame, pixels"),
    "tubelet": ((2, 16, 16), "video patch: frames, height, width"),
    "seconds": (8.0, "audio of a clip"),
    "mels": (128, "mel bins"),
    "audio_patch": ((16, 16), "audio patch: frames of 10 ms, mel bins"),
    "norm": ((0.0, 1.0, 0.0, 1.0), "mean and std of video in [-1, 1], then of log-mel"),
}
MODEL = {  # fixed for a run
    "size": ("base", "of encoder and decoder (Table 21)"),
    "encoder": ("mid", "fusion of the encoder (Sec. 3.2)"),
    "decoder": ("shared", "fusion of the decoder (Sec. 3.3)"),
    "objective": ("joint", "what is reconstructed from what (Sec. 3.4)"),
    "joint_layers": (2, "S, the joint layers of mid fusion (Table 15)"),
    "mask_video": (0.9, "share of video tokens that is masked (Tables 11, 13)"),
    "mask_audio": (0.5, "share of audio tokens that is masked (Tables 11, 12)"),
    "norm_pix": (False, "targets to zero mean and unit variance, per patch"),
    "modality_embed": (False, "a learned embedding added to each modality"),
    "allow_uncoupled": (False, "allow separate encoder + separate decoder (Table 10)"),
}
RECIPE = {  # fixed for a run
    "clips": (4096, "number of built-in clips, and of those of a dry run without --data"),
    "fraction": (1.0, "share of the training clips to use (Table 17)"),
    "repeat": (1, "rows of a batch that share a clip read once, each with its own crop and masks"),
    "epochs": (400, "each has as many rows as there are clips (Table 5)"),
    "batch": (512, "clips a step, over all processes"),
    "lr": (1.5e-4, "peak learning rate for a batch of 256"),
    "warmup": (4.0, "epochs of linear warm-up"),
    "seed": (0, "of weights, order, crops and masks"),
}
RUN = {  # of both scripts; may change on resume
    "out": ("", "folder of the run; none: runs/PRESET, runs/finetune[-PRESET], runs/eval"),
    "micro_batch": (0, "clips a forward pass of a process; 0: all of its share at once"),
    "log_every": (20, "steps between lines of the log"),
    "eval_every": (10.0, "epochs between evaluations"),
    "save_every": (10.0, "minutes between saves of last.pt"),
    "max_bad": (0.1, "share of unreadable clips above which the run stops"),
    "workers": (-1, "data processes of each process; -1: its share of the CPUs, with --data"),
    "device": ("", "cuda, mps or cpu; none: cuda if there is one"),
    "compile": (False, "torch.compile the model"),
    "checkpoint_activations": (False, "recompute activations in the backward pass, to save memory"),
    "dry_run": (False, "print what would be done, and end"),
}
PRETRAIN_ONLY = {
    "val": ("", "folder of held-out clips; none: 2 %% of --data, by hash of the file's name"),
    "init": ("", "checkpoint whose weights to start from"),
    "eval": ("", "evaluate this checkpoint: a run of no steps"),
}
GROUPS = {
    "data": DATA | PRETRAIN_ONLY, "clips": CLIP, "model": MODEL, "recipe": RECIPE, "run": RUN}

PRESETS = {  # Table 20 and the released configs, whose vggsound is separate; the best is mid
    "demo": dict(
        size="demo", frames=8, frame_step=0.32, image=32, tubelet=(2, 8, 8), seconds=2.56, mels=32,
        norm=(-0.5, 0.41, 1.5, 1.4), mask_video=0.6, mask_audio=0.5, epochs=10, batch=32,
        lr=2.4e-2, warmup=0.5, eval_every=5.0),
    "vggsound": dict(size="large", encoder="separate", clips=172_427),
    "audioset": dict(
        size="large", lr=3e-4, epochs=120, seconds=10.0, mask_audio=0.7, clips=1_857_210),
}
SIZES = avmae.SIZES | {"demo": (avmae.Size(96, 3, 3, 384), avmae.Size(64, 2, 2, 256))}
CHOICES = {
    "encoder": tuple(avmae.PLANS), "decoder": tuple(avmae.PLANS), "objective": tuple(avmae.CONTEXT),
    "modalities": tuple(avmae.MODALITIES), "size": tuple(SIZES), "device": ("cuda", "mps", "cpu")}

FOREIGN = {"encoder": "shared"}  # for a foreign checkpoint alone, which does not say it
WEIGHT_DECAY = 0.05  # as released; Table 20 prints 0
HELD_OUT = 256  # built-in clips
EVAL_BATCH = 16  # clips; fixed, so that held-out errors don't depend on the processes


class Parser(argparse.ArgumentParser):
    """Tells a wrong flag in a sentence, without all flags above it."""

    def error(self, message):
        self.exit(2, f"error: {message}; see --help\n")


def parse(about, groups, presets, choices, argv=None):
    """The settings of a command line, a namespace with tuples for lists."""
    defaults = defaults_of(presets, argv)
    parser = Parser(
        usage="%(prog)s [--preset NAME] [--FLAG VALUE ...]", description=about, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset", default=defaults["preset"], choices=presets, help="recipe of a data set [demo]")

    for title, settings in groups.items():
        group = parser.add_argument_group(title)
        for name, (default, text) in settings.items():
            used = defaults.get(name, default)
            shown = "" if used in ("", (), False) else f" [{used}]"
            group.add_argument(
                "--" + name.replace("_", "-"), default=used, help=text + shown,
                **kind_of(name, default, choices))

    args = vars(parser.parse_args(argv))
    args["modalities"] = [m for m in avmae.MODALITIES if m in args["modalities"]]  # in any order
    return argparse.Namespace(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in args.items()})


def defaults_of(presets, argv):
    """What a preset says or, with --eval, the checkpoint: all of its settings but those of the run
    and, if --data is given, of the data."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="demo", choices=presets)
    first.add_argument("--eval")
    first.add_argument("--data")
    known, _ = first.parse_known_args(argv)

    defaults = {"preset": known.preset} | presets[known.preset]
    if known.eval:
        saved = avmae.load_checkpoint(known.eval, **FOREIGN).get("settings", {})
        own = {*RUN, "init"} | ({*DATA, "val", "val_annotations"} if known.data else set())
        defaults |= {k: v for k, v in saved.items() if k not in own}
    return defaults


def kind_of(name, default, choices):
    """What argparse needs to know of a setting besides its default."""
    if isinstance(default, bool):
        return {"action": argparse.BooleanOptionalAction}
    if not isinstance(default, tuple):
        return {"type": type(default), "choices": choices.get(name)}

    of = type(default[0]) if default else str
    count = "+" if of is str else len(default)
    return {"nargs": count, "type": of, "choices": choices.get(name)}


def parse_args(argv=None):
    args = parse(__doc__, GROUPS, PRESETS, CHOICES, argv)
    args.out = args.out or ("runs/eval" if args.eval else f"runs/{args.preset}")
    check_args(args)
    return args


def check_args(args):
    """UserError if a recipe for real videos would be run on generated clips."""
    if args.preset != "demo" and not (args.data or args.eval or args.dry_run):
        raise data.UserError(
            f"--preset {args.preset} is for real videos: give --data FOLDER (and --annotations "
            "FILE), or --dry-run to see what it would do")


def modalities_of(args):
    """The inputs of both scripts' models."""
    video_mean, video_std, audio_mean, audio_std = args.norm
    video = replace(
        avmae.VIDEO, shape=(args.frames, args.image, args.image), patch=args.tubelet,
        mean=video_mean, std=video_std)
    audio = replace(
        avmae.AUDIO, shape=(round(100 * args.seconds), args.mels), patch=args.audio_patch,
        mean=audio_mean, std=audio_std)

    return {m: x for m, x in (("video", video), ("audio", audio)) if m in args.modalities}


def window_of(args):
    """What is cut out of a file."""
    return data.Window(args.frames, args.frame_step, args.image, args.seconds, args.mels)


def config_of(args):
    """The settings as the model's config."""
    encoder, decoder = SIZES[args.size]
    modalities = {
        m: replace(x, mask_ratio={"video": args.mask_video, "audio": args.mask_audio}[m])
        for m, x in modalities_of(args).items()}

    return avmae.PretrainConfig(
        modalities, encoder, decoder, args.encoder, args.decoder, args.objective, args.joint_layers,
        args.norm_pix, args.modality_embed, args.allow_uncoupled)


def clips_of(args):
    """The clips to train on, and those held out."""
    window, modalities = window_of(args), args.modalities
    if not args.data:
        count = round(args.clips * args.fraction)
        return (
            data.Builtin(count, window, args.seed, modalities),
            data.Builtin(HELD_OUT, window, args.seed + 1_000_000, modalities))

    clips = (
        data.read_annotations(args.annotations, args.data, "train", args.allow_outside, modalities)
        if args.annotations
        else data.find_clips(args.data, modalities))
    held = data.held_out(clips)
    held_out = data.find_clips(args.val, modalities) if args.val else clips.subset(held)
    train = data.fraction_of(clips if args.val else clips.subset(~held), args.fraction)

    if not len(held_out):  # a single clip: errors and pictures are of what is trained on
        held_out = clips
    return (
        data.Clips(train if len(train) else clips, window, modalities, data.Augment(), args.seed),
        data.Clips(held_out, window, modalities))


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


# ---------------------------------------------------------------------------------------------
# Held-out errors and pictures (Fig. 5)


def name_of(pair):
    """A reconstruction's name in logs and files: video, or video_from_audio."""
    target, context = pair
    return target if target == context else f"{target}_from_{context}"


@torch.no_grad()
def evaluate(model, clips, run):
    """Held-out errors {(t, c): (error, error with another clip's other modality or None)}, each
    the mean of Eq. 1 over clips, with the same targets and masks; and how many clips were read."""
    model.eval()
    batches = data.in_order(len(clips), EVAL_BATCH, run.rank, run.world)
    pairs = [pair for p in model.config.passes for pair in p.items()]
    sums = torch.zeros(len(pairs), 2, 2, dtype=torch.float64)  # (own, swapped) x (error, clips)

    for batch in run.load(clips, batches):
        inputs, count = {m: batch[m] for m in model.config.modalities}, len(batch["index"])
        generator = torch.Generator().manual_seed(int(batch["index"][0]))
        ids = run.to_device(avmae.random_masking(model.config.modalities, count, generator))

        with run.autocast():
            losses = model(inputs, ids).losses
            for k, (t, c) in enumerate(pairs):
                sums[k, 0] += count * torch.tensor([losses[t, c].item(), 1])
                if count > 1:
                    others = {m: x if m == t else x.roll(1, 0) for m, x in inputs.items()}
                    swapped = model(others, ids).losses[t, c].item()
                    sums[k, 1] += count * torch.tensor([swapped, 1])

    model.train()
    sums = run.sum(sums)
    read, means = int(sums[0, 0, 1]), (sums[..., 0] / sums[..., 1]).tolist()
    errors = {
        pair: (own, None if math.isnan(swapped) else swapped)
        for pair, (own, swapped) in zip(pairs, means)}
    return errors if read else {}, read


@torch.no_grad()
def constant_error(model, train, held_out):
    """Held-out error {m: error} of the best constant: each patch dimension's training mean."""

    def targets(batches, m):
        for batch in batches:
            patches = model.config.modalities[m].patchify(batch[m])  # (B, N, P)
            every = torch.arange(patches.shape[1]).expand(patches.shape[:2])
            yield model.truth(m, patches, every).flatten(0, 1).double()  # (B N, P)

    errors = {}
    for m in model.decoder_pred:
        sums = [(x.sum(0), len(x)) for x in targets(train, m)]
        mean = sum(x for x, _ in sums) / sum(count for _, count in sums)
        squares = [(x - mean).square().mean(1) for x in targets(held_out, m)]
        errors[m] = torch.cat(squares).mean().item()

    return errors


def report(errors, constant):
    """Prints the errors of `evaluate` beside those of `constant_error` -> them as a dict."""
    print("held-out error, its share of the best constant prediction's, and how much lower it")
    print("is than with another clip's other modality:")

    results = {}
    for (t, c), (error, swapped) in errors.items():
        gain = None if swapped is None else 1 - error / swapped
        results[name_of((t, c))] = {
            "error": error, "of_constant": error / constant[t], "lower_than_swapped": gain}
        print(
            f"  {name_of((t, c)):18s} {error:.4f}   {error / constant[t]:.3f} of constant   "
            + ("only one clip" if gain is None else f"{gain:7.2%}"))

    return results


def draw(model, inputs, path):
    """Writes PATH_NAME.png for each reconstruction. Of each clip three rows, time to the right:
    the original, what the encoder saw of it, and with the prediction; blue is what is missing."""
    ids = model.draw_ids(inputs, torch.Generator().manual_seed(0))  # the same at each look
    for pair, clips in model.reconstruct(inputs, ids).items():
        rows = torch.stack(clips, dim=1).cpu()  # (B, 3, T, ...)
        picture = (video_rows if pair[0] == "video" else audio_rows)(rows)
        picture = make_grid(picture, nrow=1, padding=2, pad_value=1)
        save_image(picture, f"{path}_{name_of(pair)}.png")


def video_rows(rows):
    """(B, 3, T, H, W, 3) in [-1, 1] -> (3 B, 3, height, width), at most 8 frames side by side."""
    rows = (rows[:, :, :: max(1, rows.shape[2] // 8)] + 1) / 2
    zoom = max(1, 64 // rows.shape[3])

    rows = rows.permute(0, 1, 5, 3, 2, 4).flatten(4).flatten(0, 1)  # (3 B, 3, H, T W)
    return paint(torch.nn.functional.interpolate(rows, scale_factor=zoom))


def audio_rows(rows):
    """(B, 3, T, F) -> (3 B, 3, height, width), pitch up, each clip from its own low to its high."""
    low, high = rows[:, :1].amin((2, 3), keepdim=True), rows[:, :1].amax((2, 3), keepdim=True)
    rows = ((rows - low) / (high - low).clamp(min=1e-6)).transpose(2, 3).flip(2)

    rows = rows.flatten(0, 1)[:, None].expand(-1, 3, -1, -1)  # (3 B, 3, F, T)
    return paint(torch.nn.functional.interpolate(rows, scale_factor=(2, 2)))


def paint(rows):
    """(K, 3, H, W) -> the same in [0, 1], with blue for NaN."""
    blue = torch.tensor([0.35, 0.45, 0.75]).view(3, 1, 1)
    return torch.where(rows.isnan(), blue, rows.clamp(0, 1))


COLORS = ("#2a6fb0", "#c8452f", "#3a9a4b", "#8a5fb0", "#b08a2a", "#444444")


def draw_curves(curves, path, title=""):
    """Writes an SVG of curves {name: [(x, y)]}, y from 0 to the highest of what is finite."""
    curves = {
        name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in curves.items()}
    every = [point for points in curves.values() for point in points]
    last, top = (max((point[k] for point in every), default=0) or 1 for k in (0, 1))
    across, up = 520 / last, 200 / top

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 260" font-family="sans-serif" '
        'font-size="12"><rect width="720" height="260" fill="white"/>'
        f'<text x="50" y="18">{title}</text>']
    for y in (0, top / 2, top):
        parts.append(
            f'<path d="M50 {230 - up * y:.1f} h520" stroke="#ddd"/>'
            f'<text x="44" y="{234 - up * y:.1f}" text-anchor="end">{y:.3g}</text>')

    for k, (name, points) in enumerate(curves.items()):
        color = COLORS[k % len(COLORS)]
        line = " ".join(f"{50 + across * x:.1f},{230 - up * y:.1f}" for x, y in points)
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{color}"/>'
            f'<text x="580" y="{40 + 16 * k}" fill="{color}">{name}</text>')

    parts.append(f'<text x="570" y="248" text-anchor="end">{last:g}</text></svg>')
    pathlib.Path(path).write_text("\n".join(parts) + "\n")


# ---------------------------------------------------------------------------------------------
# What a run of either script needs: its processes, its folder, and what it says of itself


def one_sentence(kind, error, trace):
    """For sys.excepthook: what a user or a machine causes is told in one sentence."""
    full = issubclass(kind, OSError) and error.errno == errno.ENOSPC

    if issubclass(kind, (avmae.UserError, data.UserError)) or full:
        print(f"error: {error}", file=sys.stderr)
    elif issubclass(kind, torch.OutOfMemoryError):
        print(
            "error: out of memory on the device: lower --micro-batch (mixup mixes within one), or "
            f"give --checkpoint-activations; {str(error).splitlines()[0]}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def device_of(name):
    """The device of this process, one GPU for each of torchrun's."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name != "cuda":
        return torch.device(name)

    local = int(os.environ.get("LOCAL_RANK", 0))
    if local >= torch.cuda.device_count():
        raise data.UserError(
            f"process {local} of this machine has no GPU: {torch.cuda.device_count()} can be used. "
            "Lower --nproc_per_node, or give --device cpu")
    torch.cuda.set_device(local)
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda", local)


class Run:
    """The processes of a run, torchrun's or this one alone, and its folder."""

    def __init__(self, args):
        self.args, self.out, self.told = args, pathlib.Path(args.out), set()
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        self.device = device_of(args.device)
        cuda = self.device.type == "cuda"
        self.bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)

        if self.world > 1:
            dist.init_process_group(
                "nccl" if cuda else "gloo", device_id=self.device if cuda else None)

        self.local = max(1, args.batch // self.world)  # clips of a batch that are this process's
        self.micro = args.micro_batch or self.local
        if not args.eval and (args.batch % self.world or self.local % self.micro):
            raise data.UserError(
                f"a batch of {args.batch} is not divided by {self.world} processes x {self.micro} "
                "clips a forward pass: change --batch or --micro-batch")

    def print(self, line):
        """Prints a line once, not in every process, above the progress bar."""
        if self.rank == 0:
            tqdm.write(line)

    def say(self, model, clips, steps, steps_per_epoch):
        """What is going to happen, in five lines."""
        args, device = self.args, self.device
        name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
        if device.type == "cpu" and torch.version.cuda and not args.device:
            name += " (no GPU can be used)"
        train, held_out = clips
        parameters = sum(p.numel() for p in model.parameters())

        self.print(f"device  {name}, {'bfloat16' if self.bf16 else 'float32'}")
        self.print(f"model   {describe(model.config)}, {parameters:,} parameters")
        self.print(f"clips   {train:,} to train on, {held_out:,} held out")
        self.print(
            f"steps   {steps:,}, {steps_per_epoch:,} an epoch; processes x passes x clips = "
            f"{self.world} x {self.local // self.micro} x {self.micro} = {args.batch} a step")
        self.print(
            f"folder  {self.out}: last.pt, log.jsonl, settings.json, curves.svg, results.json")

    def end_dry(self, config):
        """Prints what else is to be known before a run, and ends."""
        for m, modality in config.modalities.items():
            masked = f", {modality.masked} masked" * isinstance(config, avmae.PretrainConfig)
            self.print(f"{m}   {modality.tokens} tokens of {modality.patch_dim} numbers{masked}")
        self.print(f"FLOPs   {flops(config) / 1e9:.2f} G a clip, forward and backward")
        self.print(json.dumps(vars(self.args), indent=1))
        self.end()

    def autocast(self):
        """bfloat16 where the GPU has it."""
        return torch.autocast("cuda", torch.bfloat16) if self.bf16 else nullcontext()

    def to_device(self, tree):
        """Tensors in tuples and dicts, from pinned memory so that the host need not wait."""
        if isinstance(tree, torch.Tensor):
            pinned = tree.pin_memory() if self.device.type == "cuda" else tree
            return pinned.to(self.device, non_blocking=True)
        if isinstance(tree, dict):
            return {k: self.to_device(x) for k, x in tree.items()}
        return [self.to_device(x) for x in tree]

    def tell(self, line):
        """Tells once what may be found again, and keeps it in unreadable.txt."""
        if line not in self.told:
            self.told.add(line)
            tqdm.write(line)
            with open(self.out / "unreadable.txt", "a") as file:
                file.write(line + "\n")

    def load(self, clips, batches, device=None):
        """A loader of these batches of clips, which names those that it cannot read."""
        workers = self.args.workers
        if workers < 0:
            local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            workers = max(1, data.cpu_count() // local) if self.args.data else 0

        self.out.mkdir(parents=True, exist_ok=True)
        return data.Loader(clips, batches, device or self.device, workers, self.tell)

    def sum(self, x):
        """The sum of a tensor over all processes, on the CPU."""
        if self.world > 1:
            x = x.float().to(self.device)
            dist.all_reduce(x)
        return x.cpu()

    def resume(self, model, optimizer):
        """Takes the run up where it was saved -> what was saved with it, {"step": 0} if nothing.

        UserError if it has other settings, those of groups that may change aside.
        """
        last = self.out / "last.pt"
        saved = avmae.load_checkpoint(last) if last.exists() else {"step": 0}
        steps = self.gather(saved["step"])
        if len(set(steps)) > 1:
            raise data.UserError(
                f"the processes find different steps in {last}: {sorted(set(steps))}. All machines "
                "must share the folder --out")

        if "model" in saved:
            self.check_settings(saved["settings"])
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            self.print(f"resuming {last} at step {saved['step']}")
        return saved

    def check_settings(self, saved):
        """UserError if a run of other settings lies in the folder."""
        free = {*DATA, *RUN, "val", "val_annotations", "init", "eval"}
        differ = [
            f"{k} is {saved.get(k)!r} there and {v!r} here"
            for k, v in vars(self.args).items()
            if k not in free and saved.get(k) != v]

        if differ:
            raise data.UserError(
                f"{self.out} holds a run with other settings: {'; '.join(differ[:3])}. Choose "
                "another folder with --out")

    def wrap(self, model):
        """The model as it is trained: with recomputed activations, compiled, on all processes."""
        args = self.args
        if args.checkpoint_activations:
            for block in model.modules():
                if isinstance(block, avmae.Block):
                    draws = block.drop_path.rate > 0  # else no random state has to be kept
                    block.forward = functools.partial(
                        checkpoint, block.forward, use_reentrant=False, preserve_rng_state=draws)

        net = torch.compile(model, fullgraph=True) if args.compile else model
        if self.world == 1:
            return net
        return torch.nn.parallel.DistributedDataParallel(
            net, device_ids=[self.device.index] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            bucket_cap_mb=100 if args.compile else 25)  # a compiled graph is cut at each bucket

    def exchange(self, net, last):
        """Gradients are exchanged between processes in the last backward pass of a step."""
        return nullcontext() if self.world == 1 or last else net.no_sync()

    def gather(self, x):
        """An object of each process, in all of them."""
        everywhere = [x]
        if self.world > 1:
            everywhere = [None] * self.world
            dist.all_gather_object(everywhere, x)
        return everywhere

    def save(self, model, name, **extra):
        """Saves a checkpoint in the folder of the run, once and not in every process."""
        if self.rank == 0:
            avmae.save(model, self.out / name, settings=vars(self.args), **extra)

    def write(self, name, results):
        """Writes results with the settings that gave them to a file in the folder of the run."""
        if self.rank == 0:
            results = results | {"settings": vars(self.args)}
            (self.out / name).write_text(json.dumps(results, indent=1))

    def end(self, code=0):
        """Ends all processes together: one that leaves while another's last exchange is under way
        would abort it."""
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()
        sys.exit(code)


def describe(config):
    """A model in words."""
    if isinstance(config, avmae.ClassifierConfig):
        return f"{config.trunk} of {' and '.join(config.modalities)}"
    return f"{config.encoder} encoder, {config.decoder} decoder, objective {config.objective}"


def flops(config):
    """FLOPs of a clip, forward and backward, counted on the meta device."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        inputs = {
            m: torch.zeros(1, *x.shape, *([x.channels] if x.channels > 1 else []))
            for m, x in config.modalities.items()}
        out = avmae.build(config)(inputs)
        loss = out.loss if isinstance(out, avmae.Output) else sum(x.sum() for x in out.values())
        loss.backward()

    return counter.get_total_flops()


class Log:
    """The steps of a run: columns on the screen, log.jsonl, a progress bar, and when to stop."""

    def __init__(self, run, clips, loader, names, start, steps, steps_per_epoch):
        self.run, self.clips, self.loader, self.names = run, clips, loader, names
        self.start, self.steps, self.steps_per_epoch = start, steps, steps_per_epoch
        self.done, self.history, self.saved = start, [], time.monotonic()
        self.streak = self.longest = 0  # of steps in a row that were not finite

        self.stop, self.signals = False, []  # a report turns one process's signal into all's stop
        for number in signal.SIGTERM, signal.SIGINT:
            signal.signal(number, lambda number, _: self.signals.append(number))

        self.path = run.out / "log.jsonl"
        if run.rank == 0:
            run.out.mkdir(parents=True, exist_ok=True)
            (run.out / "settings.json").write_text(json.dumps(vars(run.args), indent=1))
            self.trim()

    def trim(self):
        """A killed run had logged on after its last save, perhaps half a line."""
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        kept = [x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= self.start]

        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(kept))
        os.replace(partial, self.path)

    def count_steps(self):
        """Yields the steps that are left."""
        hidden = None if self.run.rank == 0 else True
        with tqdm(total=self.steps, initial=self.start, disable=hidden) as self.bar:
            for step in range(self.start, self.steps):
                if not self.history:  # saving and evaluating is none of the steps' time
                    self.since, self.waited = time.monotonic(), self.loader.waited
                yield step
                self.bar.update()

    def note(self, step, losses, norm, index):
        """Keeps a step's mean losses (K,), norm of the gradient and clips -> whether to report."""
        self.done = step + 1
        self.history.append((step, torch.cat([losses, norm[None]]), index))
        return self.done % self.run.args.log_every == 0 or self.done == self.steps

    def report(self, lr):
        """Logs the means since the last report; if one process was told to stop, all are."""
        values = torch.stack([v for _, v, _ in self.history]).cpu().double()
        self.name_failures(values)
        finite = values[values[:, -1].isfinite()]
        mean = finite.mean(0) if len(finite) else values[0]

        loader, seconds = self.loader, time.monotonic() - self.since
        counts = [bool(self.signals), loader.waited - self.waited, loader.drawn, loader.unreadable]
        shared = self.run.sum(torch.cat([mean[:-1], mean.new_tensor(counts)]).float()).tolist()
        *losses, signals, waited, drawn, unreadable = shared
        self.stop = signals > 0

        count, world = len(self.history), self.run.world
        line = {"step": self.done, "epoch": self.done / self.steps_per_epoch}
        line |= {name: x / world for name, x in zip(self.names, losses)}

        line |= {
            "lr": lr, "grad_norm": mean[-1].item(),
            "clips_per_s": count * self.run.args.batch / seconds,
            "waiting": waited / world / seconds, "unreadable": int(unreadable),
            "seconds_left": seconds / count * (self.steps - self.done)}
        if self.run.device.type == "cuda":
            line["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9

        self.history = []
        self.write(line)
        self.show(line)
        self.check(drawn, unreadable)

    def name_failures(self, values):
        """Names the steps since the last report that were not finite, with their clips."""
        for (step, _, index), row in zip(self.history, values.tolist()):
            self.streak = 0 if math.isfinite(row[-1]) else self.streak + 1
            self.longest = max(self.longest, self.streak)
            if self.streak:
                wrong = [n for n, x in zip(self.names, row) if not math.isfinite(x)]
                clips = ", ".join(self.clips.name(i) for i in index.tolist())
                self.bar.write(
                    f"step {step} is not finite in {', '.join(wrong) or 'gradient'} and was not "
                    f"applied; clips: {clips}")

    def check(self, drawn, unreadable):
        """UserError if steps in a row were not finite, or too many clips cannot be read."""
        out, largest = self.run.out, self.run.args.max_bad
        if self.longest >= 3:
            raise data.UserError(
                f"{self.longest} steps in a row were not finite: {out / 'last.pt'} is from before "
                "them; lower --lr")

        enough = drawn >= min(len(self.clips), 1000)
        if enough and unreadable > largest * (drawn + unreadable):
            raise data.UserError(
                f"{int(unreadable)} of {int(drawn + unreadable)} clips could not be read, more "
                f"than --max-bad {largest:g}: see {out / 'unreadable.txt'}, or run "
                "python data.py check")

    def show(self, line):
        """A line of the log in columns."""
        if self.run.rank:
            return

        minutes = round(line["seconds_left"] / 60)
        columns = {"step": f"{line['step']:8d}", "epoch": f"{line['epoch']:7.2f}"}
        for name in self.names:
            short = name.removeprefix("loss_")
            columns[short] = f"{line[name]:{max(8, len(short))}.4f}"

        columns |= {
            "lr": f"{line['lr']:9.2e}", "clips/s": f"{line['clips_per_s']:8.1f}",
            "waiting": f"{line['waiting']:8.1%}", "left": f"{minutes // 60:4d}:{minutes % 60:02d}"}

        if not hasattr(self, "header"):
            self.header = " ".join(f"{name:>{len(x)}}" for name, x in columns.items())
            self.bar.write(self.header)
        self.bar.write(" ".join(columns.values()))

    def write(self, line):
        """Appends a line to the log."""
        if self.run.rank == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")

    def passed_epochs(self, epochs):
        """Whether a multiple of so many epochs lies in the log interval that ends here, and the
        run goes on."""
        every = max(1, round(epochs * self.steps_per_epoch))
        before = max(0, self.done - self.run.args.log_every)
        return self.done // every > before // every and self.done < self.steps and not self.stop

    def should_save(self):
        """Whether it is time to save; if it is, the clock starts again."""
        minutes = (time.monotonic() - self.saved) / 60
        due = self.stop or minutes >= self.run.args.save_every or self.done == self.steps
        self.saved = time.monotonic() if due else self.saved
        return due

    def end_stopped(self):
        """Ends a run that was told to stop, with status 1 if steps are left."""
        self.run.print(
            f"stopped at step {self.done} of {self.steps}; the same command continues")
        self.run.end(int(self.done < self.steps))

    def curves(self):
        """Draws the log's losses and held-out figures."""
        if self.run.rank:
            return

        curves = {}
        for line in map(json.loads, self.path.read_text().splitlines()):
            held_out = {f"held out: {k}": v for k, v in line.get("held_out", {}).items()}
            figures = {n: line[n] for n in self.names if n in line} | held_out
            for name, y in figures.items():
                curves.setdefault(name, []).append((line["step"], y))
        draw_curves(curves, self.run.out / "curves.svg", "by step")


def start_from(model, path, run, **assume):
    """Gives a model the weights of a checkpoint. UserError if that is another architecture."""
    initial = avmae.load_model(path, **assume)
    for note in initial.notes:
        run.print(f"{path}: {note}")

    try:
        model.load_state_dict(initial.state_dict())
    except RuntimeError as error:
        raise data.UserError(
            f"{path} is another architecture: {str(error).splitlines()[1].strip()[:200]}") from None


def masks_of(model, args, step, rows):
    """A process's rows of the masks that (seed, step) gives the global batch."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    return avmae.random_masking(model.config.modalities, args.batch, generator, rows)


def part_of(ids, k, count):
    """Some rows of (ids_keep, ids_mask)."""
    return [{m: x[k : k + count] for m, x in part.items()} for part in ids]


if __name__ == "__main__":
    sys.excepthook = one_sentence
    args = parse_args()
    run = Run(args)

    # -----------------------------------------------------------------------------------------
    # Model, clips, and what is going to happen

    torch.manual_seed(args.seed)
    # What a foreign checkpoint (the authors') does not say of itself.
    assume = dict(encoder=args.encoder, decoder=args.decoder, objective=args.objective)
    if args.eval:
        model = avmae.load_model(args.eval, **assume)
        avmae.require(
            isinstance(model, avmae.AVMAE), f"{args.eval} is a classifier: it rebuilds nothing")
    else:
        with torch.device("meta" if args.dry_run else "cpu"):
            model = avmae.AVMAE(config_of(args))

    train, held_out = clips_of(args)
    steps_per_epoch = max(1, len(train) // args.batch)
    steps = 0 if args.eval else args.epochs * steps_per_epoch  # an evaluation is a run of no steps
    warmup = args.warmup * steps_per_epoch
    run.say(model, (len(train), len(held_out)), steps, steps_per_epoch)

    if args.dry_run:
        run.end_dry(model.config)

    # -----------------------------------------------------------------------------------------
    # Optimizer, and where we are

    model.to(run.device)
    optimizer = torch.optim.AdamW(
        decay_groups(model, WEIGHT_DECAY), betas=(0.9, 0.95), eps=1e-8, fused=True)
    start = 0
    if not args.eval:
        start = run.resume(model, optimizer)["step"]
    if args.init and not start:
        start_from(model, args.init, run, **assume)

    net = run.wrap(model)
    rows = slice(run.rank * run.local, (run.rank + 1) * run.local)
    loader = run.load(train, data.Batches(
        len(train), args.batch, args.seed, range(start, steps), range(args.batch)[rows],
        micro=run.micro, repeat=args.repeat))
    names = ["loss", *(f"loss_{name_of(pair)}" for p in model.config.passes for pair in p.items())]
    log = Log(run, train, loader, names, start, steps, steps_per_epoch)

    def look():
        """Held-out errors to the log, and pictures of four clips."""
        errors, read = evaluate(model, held_out, run)
        figures = {name_of(pair): error for pair, (error, _) in errors.items()}
        log.write({"step": log.done, "held_out": figures})
        said = ", ".join(f"{k} {v:.4f}" for k, v in figures.items())
        run.print(f"held out: {said or 'no clip can be read'}")

        count = len(held_out)  # a key of a clip is (pass, clip, draw)
        few = [(0, i, 0) for i in range(0, count, 5 if count > 15 else 1)][:4]  # 5: things differ
        for batch in run.load(held_out, [few]) if run.rank == 0 else ():
            (run.out / "pictures").mkdir(exist_ok=True)
            draw(model, batch, run.out / "pictures" / f"{log.done:07d}")
        return errors, read

    # -----------------------------------------------------------------------------------------
    # The loop

    batches = iter(loader)  # this process's clips, --micro-batch at a time

    for step in log.count_steps():
        ids = run.to_device(masks_of(model, args, step, rows))  # {m: (local, V)}, {m: (local, M)}
        losses, index = 0, []

        for k in range(0, run.local, run.micro):
            batch = next(batches)
            inputs = {m: batch[m] for m in model.config.modalities}  # {m: (micro, T, ...)}
            index.append(batch["index"])

            with run.exchange(net, last=k + run.micro == run.local):  # DDP's no_sync, but for it
                with run.autocast():
                    out = net(inputs, part_of(ids, k, run.micro))
                (out.loss * run.micro / run.local).backward()
            parts = torch.stack([out.loss, *out.losses.values()]).detach()
            losses = losses + parts * run.micro / run.local

        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        optimizer.found_inf = (~norm.isfinite()).float()  # GradScaler's switch: at 1, no step
        rate = learning_rate(step, args.lr * args.batch / 256, warmup, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if log.note(step, losses, norm, torch.cat(index)):  # every --log-every steps, and the last
            log.report(rate)
            if log.passed_epochs(args.eval_every):  # but for the last, which the end looks at
                look()
            if log.should_save():
                run.save(model, "last.pt", optimizer=optimizer.state_dict(), step=log.done)
            if log.stop:
                log.end_stopped()

    # -----------------------------------------------------------------------------------------
    # What it has learned: a run that was not stopped ends here, one of no steps, too

    (errors, read), results = look(), {}
    avmae.require(errors or not args.eval, "none of the held-out clips can be read")
    if run.rank == 0 and errors:
        # The best constant, estimated on the CPU from up to 512 training and 256 held-out clips.
        sample = data.Batches(len(train), min(64, len(train)), args.seed, range(8))
        some = data.in_order(min(256, len(held_out)), 16)
        constant = constant_error(
            model.cpu(), run.load(train, sample, "cpu"), run.load(held_out, some, "cpu"))

        results = report(errors, constant)
    counts = {"clips": read, "unreadable": len(held_out) - read}
    run.write("results.json", {"held_out": results} | counts)
    log.curves()
    run.end()
