"""Pretrains an audiovisual masked autoencoder (Sec. 3 of the paper; recipe: Table 20).

    torchrun train_pretrain.py --encoder mid               # built-in clips, two minutes on a CPU
    torchrun --nproc_per_node=8 train_pretrain.py --preset vggsound --data clips/ --encoder mid
    python train_pretrain.py --eval runs/demo/last.pt --data clip.mp4       # errors and pictures

The same command resumes a run that was stopped, with the same losses: the step is the only clock,
and whatever is random depends on (seed, step, place in the global batch) alone.
"""

import argparse
import functools
import json
import math
import os
import pathlib
import signal
import sys
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.distributed as dist
from einops import repeat
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

import avmae
import data

# ---------------------------------------------------------------------------------------------
# Settings by group, as name: (default, what it is). A preset overrides a default, a flag a preset.
# Without --preset it is the preset demo.

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
    "clips": (4096, "number of built-in clips; in presets of real ones, for --dry-run"),
    "fraction": (1.0, "share of the training clips to use (Table 17)"),
    "repeat": (1, "uses of a clip once read, with other crops and masks; each counts as a clip"),
    "epochs": (400, "passes over the clips (Table 5)"),
    "batch": (512, "clips a step, over all processes"),
    "lr": (1.5e-4, "peak learning rate for a batch of 256"),
    "warmup": (4.0, "epochs of linear warm-up; then the rate falls to 0 as a cosine"),
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

WEIGHT_DECAY = 0.05  # as released; Table 20 prints 0
HELD_OUT = 256  # built-in clips
EVAL_BATCH = 16  # clips; fixed, so that held-out errors don't depend on the processes


def parse(about, groups, presets, choices, argv=None):
    """The settings of a command line, a namespace with tuples for lists. UserError if a recipe for
    real videos would be run on generated clips."""
    defaults = defaults_of(presets, argv)

    parser = argparse.ArgumentParser(
        usage="%(prog)s [--preset NAME] [--FLAG VALUE ...]", description=about, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message}; see --help\n")
    parser.add_argument(
        "--preset", default=defaults["preset"], choices=presets, help="recipe of a data set [demo]")

    for title, settings in groups.items():
        group = parser.add_argument_group(title)
        for name, (default, text) in settings.items():
            used = defaults.get(name, default)
            shown = "" if used in ("", (), False) else f" [{used}]"
            group.add_argument(
                "--" + name.replace("_", "-"), default=used, help=text + shown,
                **kind_of(default, choices.get(name)))

    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        setattr(args, name, tuple(value) if isinstance(value, list) else value)
    args.modalities = tuple(m for m in avmae.MODALITIES if m in args.modalities)  # in this order

    avmae.require(
        args.preset == "demo" or args.data or args.eval or args.dry_run,
        f"--preset {args.preset} is for real videos: give --data FOLDER (and --annotations FILE), "
        "or --dry-run to see what it would do")
    return args


WHICH_CLIPS = {*DATA, "val", "val_annotations"}  # settings that may change on resume, as RUN's may
FOREIGN = {"encoder": "shared"}  # of a checkpoint of the authors, where no flag says it


def defaults_of(presets, argv):
    """What a preset says or, with --eval, the checkpoint: all of its settings but those of the run
    and, if --data is given, of the data."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in "--preset", "--eval", "--data":
        first.add_argument(flag, nargs="?")
    known, _ = first.parse_known_args(argv)

    preset = known.preset or "demo"
    defaults = {"preset": preset} | presets.get(preset, {})
    if known.eval:
        saved = avmae.load_checkpoint(known.eval, **FOREIGN).get("settings", {})
        own = {*RUN, "init"} | (WHICH_CLIPS if known.data else set())
        defaults |= {k: v for k, v in saved.items() if k not in own}
    return defaults


def kind_of(default, choices):
    """What argparse needs to know of a setting besides its default."""
    if isinstance(default, bool):
        return {"action": argparse.BooleanOptionalAction}
    if not isinstance(default, tuple):
        return {"type": type(default), "choices": choices}

    of = type(default[0]) if default else str
    return {"type": of, "choices": choices, "nargs": "+" if of is str else len(default)}


def parse_args(argv=None):
    args = parse(__doc__, GROUPS, PRESETS, CHOICES, argv)
    args.out = args.out or ("runs/eval" if args.eval else f"runs/{args.preset}")
    return args


def modalities_of(args):
    """The inputs of both scripts' models."""
    video_mean, video_std, audio_mean, audio_std = args.norm

    modalities = {
        "video": replace(
            avmae.VIDEO, shape=(args.frames, args.image, args.image), patch=args.tubelet,
            mean=video_mean, std=video_std),
        "audio": replace(
            avmae.AUDIO, shape=(round(100 * args.seconds), args.mels), patch=args.audio_patch,
            mean=audio_mean, std=audio_std)}
    return {m: modalities[m] for m in args.modalities}


def window_of(args):
    """What is cut out of a file."""
    return data.Window(args.frames, args.frame_step, args.image, args.seconds, args.mels)


def config_of(args):
    """The settings as the model's config."""
    encoder, decoder = SIZES[args.size]
    ratios = {"video": args.mask_video, "audio": args.mask_audio}
    modalities = {m: replace(x, mask_ratio=ratios[m]) for m, x in modalities_of(args).items()}

    return avmae.PretrainConfig(
        modalities, encoder, decoder, args.encoder, args.decoder, args.objective, args.joint_layers,
        args.norm_pix, args.modality_embed, args.allow_uncoupled)


def clips_of(args):
    """The clips to train on, and those held out."""
    window, modalities = window_of(args), args.modalities
    if not args.data:
        train = data.Builtin(round(args.clips * args.fraction), window, args.seed, modalities)
        return train, data.Builtin(HELD_OUT, window, args.seed + 1_000_000, modalities)

    clips = (
        data.read_annotations(args.annotations, args.data, "train", args.allow_outside, modalities)
        if args.annotations
        else data.find_clips(args.data, modalities))
    held = data.held_out(clips)
    held_out = data.find_clips(args.val, modalities) if args.val else clips.subset(held)
    train = data.fraction_of(clips if args.val else clips.subset(~held), args.fraction)

    # Of a single clip one of the two is empty: it is held out and trained on.
    return (
        data.Clips(train or clips, window, modalities, data.Augment(), args.seed),
        data.Clips(held_out or clips, window, modalities))


def weights_for(model, other, path):
    """The parameters of another model. UserError if it has another architecture."""
    shapes = [{(name, x.shape) for name, x in y.state_dict().items()} for y in (model, other)]
    differ = sorted({name for name, _ in shapes[0] ^ shapes[1]})[:3]
    avmae.require(not differ, f"{path} is another architecture: {', '.join(differ)} differ")
    return other.state_dict()


# ---------------------------------------------------------------------------------------------
# Held-out errors and pictures (Fig. 5)


def name_of(pair):
    """A reconstruction's name in logs and files: video, or video_from_audio."""
    target, context = pair
    return target if target == context else f"{target}_from_{context}"


@torch.no_grad()
def evaluate(model, clips, run):
    """Held-out errors {(t, c): (error, error with another clip's other modality, or NaN)}, each the
    mean of Eq. 1 over clips, with the same targets and masks; and how many clips were read."""
    model.eval()
    pairs = [pair for p in model.config.passes for pair in p.items()]
    sums = torch.zeros(len(pairs) + 1, 2, dtype=torch.float64)  # (own, swapped); last: clips

    for batch in run.load(clips):
        inputs, count = {m: batch[m] for m in model.config.modalities}, len(batch["index"])
        generator = torch.Generator().manual_seed(int(batch["index"][0]))
        ids = run.to_device(avmae.random_masking(model.config.modalities, count, generator))

        with run.autocast:
            losses, found = model(inputs, ids).losses, []
            for t, c in pairs:
                others = {m: x if m == t else x.roll(1, 0) for m, x in inputs.items()}
                swapped = model(others, ids).losses[t, c]
                found.append([losses[t, c].item(), swapped.item()])
        # A clip that is alone has no other.
        sums += torch.tensor([count, count if count > 1 else 0]) * torch.tensor([*found, [1, 1]])

    model.train()
    sums = sum(run.gather(sums))
    read = int(sums[-1, 0])
    return dict(zip(pairs, (sums[:-1] / sums[-1]).tolist())) if read else {}, read


@torch.no_grad()
def constant_error(model, train, held_out):
    """Held-out error {m: error} of the best constant: each patch dimension's training mean."""

    def truth(batch, m):
        patches = model.config.modalities[m].patchify(batch[m].cpu())  # (B, N, P)
        every = torch.arange(patches.shape[1]).expand(patches.shape[:2])
        return model.truth(m, patches, every).flatten(0, 1).double()  # (B N, P)

    errors = {}
    for m in model.decoder_pred:
        sums = [(x.sum(0), len(x)) for x in (truth(batch, m) for batch in train)]
        total, count = map(sum, zip(*sums))
        squares = [(truth(batch, m) - total / count).square().mean(1) for batch in held_out]
        errors[m] = torch.cat(squares).mean().item()

    return errors


def report(errors, model, train, held_out, run):
    """Prints the errors of `evaluate` beside those of the best constant -> them as a dict."""
    # Estimated on the CPU, from up to 512 training and 256 held-out clips.
    some = data.Batches(len(train), min(64, len(train)), run.args.seed, range(8))
    others = data.in_order(min(256, len(held_out)), EVAL_BATCH)
    constant = constant_error(
        model.cpu(), run.load(train, batches=some), run.load(held_out, batches=others))

    print("held-out error, its share of the best constant prediction's, and how much lower it")
    print("is than with another clip's other modality:")

    results = {}
    for (t, c), (error, swapped) in errors.items():
        name, share = name_of((t, c)), error / constant[t]
        gain = None if math.isnan(swapped) else 1 - error / swapped
        lower = "only one clip" if gain is None else f"{gain:7.2%}"
        print(f"  {name:18s} {error:.4f}   {share:.3f} of constant   {lower}")
        results[name] = {"error": error, "of_constant": share, "lower_than_swapped": gain}

    return results


def draw(model, inputs, path):
    """Writes PATH_NAME.png for each reconstruction. Of each clip three rows, time to the right:
    the original, what the encoder saw of it, and with the prediction; blue is what is missing."""
    ids = model.draw_ids(inputs, torch.Generator().manual_seed(0))  # the same at each look
    blue = torch.tensor([0.35, 0.45, 0.75]).view(3, 1, 1)

    for pair, clips in model.reconstruct(inputs, ids).items():
        x = torch.stack(clips, dim=1).cpu()  # (B, 3, T, ...), NaN is missing

        if pair[0] == "video":  # (B, 3, T, H, W, 3) in [-1, 1]; at most 8 frames side by side
            x, zoom = (x[:, :, :: max(1, x.shape[2] // 8)] + 1) / 2, max(1, 64 // x.shape[3])
            x = repeat(x, "b r t h w c -> (b r) c (h y) (t w x)", y=zoom, x=zoom)
        else:  # (B, 3, T, F), each clip from its own low to its high; pitch up
            low, high = (f(x[:, :1], (2, 3), True) for f in (torch.amin, torch.amax))
            x = ((x - low) / (high - low).clamp(min=1e-6)).flip(3)
            x = repeat(x, "b r t f -> (b r) c (f y) (t x)", c=3, y=2, x=2)

        x = torch.where(x.isnan(), blue, x.clamp(0, 1))  # (3 B, 3, height, width)
        picture = make_grid(x, nrow=1, padding=2, pad_value=1)
        save_image(picture, f"{path}_{name_of(pair)}.png")


def draw_some(model, clips, run, step):
    """Writes pictures of four clips, the same at each look, named by the step."""
    # Of the built-in clips 0, 5, 10 and 15 are of each shape, two of them striped.
    every = 5 if len(clips) > 15 else 1
    keys = [(0, i, 0) for i in range(0, len(clips), every)]  # (epoch, clip, draw)
    (run.out / "pictures").mkdir(exist_ok=True)
    for batch in run.load(clips, batches=[keys[:4]]):
        draw(model, batch, run.out / "pictures" / f"{step:07d}")


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
    if issubclass(kind, torch.OutOfMemoryError):
        error = data.UserError(
            "out of memory on the device: lower --micro-batch (mixup mixes within one), or give "
            f"--checkpoint-activations; {str(error).splitlines()[0]}")
    data.one_sentence(type(error), error, trace)


class Run:
    """The processes of a run, torchrun's or this one alone, and its folder."""

    def __init__(self, args):
        self.args, self.out = args, pathlib.Path(args.out)
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        self.use(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))

        share = max(1, args.batch // self.world)
        self.rows = range(self.rank * share, (self.rank + 1) * share)  # of the global batch
        self.micro = args.micro_batch or share
        self.micro_batches = [slice(k, k + self.micro) for k in self.rows[:: self.micro]]
        avmae.require(
            args.eval or self.world * len(self.micro_batches) * self.micro == args.batch,
            f"a batch of {args.batch} is not divided by {self.world} processes x {self.micro} "
            "clips a forward pass: change --batch or --micro-batch")

    def use(self, device):
        """Takes the device, or of several GPUs that of this process, and meets the others."""
        self.device, self.name, self.bf16 = torch.device(device), device, False
        if device == "cpu" and torch.version.cuda and not self.args.device:
            self.name += " (no GPU can be used)"

        if device == "cuda":
            local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
            avmae.require(
                local < count,
                f"process {local} of this machine has no GPU: {count} can be used. Lower "
                "--nproc_per_node, or give --device cpu")
            self.device, self.name = torch.device("cuda", local), torch.cuda.get_device_name(local)
            self.bf16 = torch.cuda.is_bf16_supported(including_emulation=False)

            torch.cuda.set_device(local)
            torch.set_float32_matmul_precision("high")

        self.autocast = torch.autocast("cuda", torch.bfloat16) if self.bf16 else nullcontext()
        if self.world > 1:
            dist.init_process_group(
                "nccl" if device == "cuda" else "gloo",
                device_id=self.device if device == "cuda" else None)

    def print(self, line):
        """Prints a line once, not in every process, above the progress bar."""
        if self.rank == 0:
            tqdm.write(line)
            sys.stdout.flush()  # to whatever it is piped into

    def say(self, model, train, held_out, steps, steps_per_epoch):
        """What is going to happen, in five lines. With --dry-run also what else is to be known
        before a run, and then the end."""
        args, config = self.args, model.config
        pretraining = isinstance(config, avmae.PretrainConfig)

        kind = (
            f"{config.encoder} encoder, {config.decoder} decoder, objective {config.objective}"
            if pretraining
            else f"{config.trunk} of {' and '.join(config.modalities)}")

        self.print(f"device  {self.name}, {'bfloat16' if self.bf16 else 'float32'}")
        self.print(f"model   {kind}, {sum(p.numel() for p in model.parameters()):,} parameters")
        self.print(f"clips   {len(train):,} to train on, {len(held_out):,} held out")
        self.print(
            f"steps   {steps:,}, {steps_per_epoch:,} an epoch; processes x micro-batches x clips "
            f"= {self.world} x {len(self.micro_batches)} x {self.micro} = {args.batch} a step")
        self.print(
            f"folder  {self.out}: last.pt, log.jsonl, settings.json, curves.svg, results.json")

        if args.dry_run:
            for m, x in config.modalities.items():
                masked = f", {x.masked} masked" if pretraining else ""
                self.print(f"{m}   {x.tokens} tokens of {x.patch_dim} numbers{masked}")
            self.print(f"FLOPs   {flops(config) / 1e9:.2f} G a clip, forward and backward")
            self.print(json.dumps(vars(args), indent=1))
            self.end()

    @functools.cache
    def tell(self, line):
        """Tells once what may be found again, and keeps it in unreadable.txt."""
        tqdm.write(line)
        with open(self.out / "unreadable.txt", "a") as file:
            file.write(line + "\n")

    def load(self, clips, steps=None, batches=None):
        """A loader that names the clips it cannot read: of this process's share of training steps
        (a range), of these batches of keys, or of its share of all clips in order."""
        args, workers = self.args, self.args.workers
        if workers < 0:
            local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            workers = max(1, data.cpu_count() // local) if args.data else 0

        if steps is not None:
            batches = data.Batches(
                len(clips), args.batch, args.seed, steps, self.rows, self.micro,
                getattr(args, "repeat", 1))
        elif batches is None:
            size = max(1, EVAL_BATCH // getattr(clips, "views", 1))
            batches = data.in_order(len(clips), size, self.rank, self.world)

        self.out.mkdir(parents=True, exist_ok=True)
        return data.Loader(clips, batches, self.device, workers, self.tell)

    def to_device(self, ids):
        """(ids_keep, ids_mask), from pinned memory so that the host need not wait."""
        pin = self.device.type == "cuda"
        return [
            {m: (x.pin_memory() if pin else x).to(self.device, non_blocking=True)
             for m, x in part.items()}
            for part in ids]

    def load_model(self, path, **assume):
        """The model of a checkpoint; says what was assumed or left out of a foreign one."""
        model = avmae.load_model(path, **FOREIGN | assume)
        for note in model.notes:
            self.print(f"{path}: {note}")
        return model

    def gather(self, x):
        """An object of each process, in all of them."""
        everywhere = [x] * self.world
        if self.world > 1:
            dist.all_gather_object(everywhere, x)
        return everywhere

    def resume(self, model, optimizer):
        """Takes the run up where it was saved -> what was saved with it, {"step": 0} if nothing.

        UserError if it has other settings, those of groups that may change aside.
        """
        last = self.out / "last.pt"
        some = last.exists() and not self.args.eval
        saved = avmae.load_checkpoint(last) if some else {"step": 0}
        steps = sorted(set(self.gather(saved["step"])))

        avmae.require(
            len(steps) == 1,
            f"the processes find different steps in {last}: {steps}. All machines must share the "
            "folder --out")
        if "model" not in saved:
            return saved

        free, old = {*WHICH_CLIPS, *RUN, "init", "eval"}, saved["settings"]
        differ = [
            f"{k} is {old.get(k)!r} there and {v!r} here"
            for k, v in vars(self.args).items()
            if k not in free and old.get(k) != v]

        avmae.require(
            not differ,
            f"{self.out} holds a run with other settings: {'; '.join(differ[:3])}. Choose another "
            "folder with --out")

        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        self.print(f"resuming {last} at step {saved['step']}")
        return saved

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
            net, gradient_as_bucket_view=True,
            bucket_cap_mb=100 if args.compile else 25)  # a compiled graph is cut at each bucket

    def save(self, model, name, **extra):
        """Saves a checkpoint in the folder of the run, once and not in every process."""
        if self.rank == 0:
            avmae.save(model, self.out / name, settings=vars(self.args), **extra)

    def write(self, name, results):
        """Writes a dict to a file in the folder of the run."""
        if self.rank == 0:
            (self.out / name).write_text(json.dumps(results, indent=1))

    def end(self, code=0):
        """Ends all processes together: one that leaves while another's last exchange is under way
        would abort it."""
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()
        sys.exit(code)


def flops(config):
    """FLOPs of a clip, forward and backward, counted on the meta device."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        inputs = {
            m: x.unpatchify(torch.zeros(1, x.tokens, x.patch_dim))
            for m, x in config.modalities.items()}

        out = avmae.build(config)(inputs)
        loss = out.loss if isinstance(out, avmae.Output) else sum(x.sum() for x in out.values())
        loss.backward()

    return counter.get_total_flops()


class Log:
    """The steps of a run: columns on the screen, log.jsonl, and when to look, save and stop."""

    def __init__(self, run, clips, loader, names, start, steps, steps_per_epoch):
        self.run, self.clips, self.loader, self.names = run, clips, loader, names
        self.done, self.steps, self.steps_per_epoch = start, steps, steps_per_epoch
        self.failed, self.header, self.saved = 0, "", time.monotonic()  # failed: steps in a row
        self.history, self.since, self.waited = [], time.monotonic(), 0.0  # since the last lines

        self.stop, self.signals = False, []  # a report turns one's signal into all's stop
        for number in signal.SIGTERM, signal.SIGINT:
            signal.signal(number, lambda number, _: self.signals.append(number))

        run.write("settings.json", vars(run.args))
        self.path = run.out / "log.jsonl"
        if run.rank == 0:  # a killed run had logged on after its last save, perhaps half a line
            with open(self.path, "ab+") as file:
                file.seek(0)
                kept = [x for x in file if x.endswith(b"\n") and json.loads(x)["step"] <= start]
                file.truncate(sum(map(len, kept)))

    def note(self, step, losses, norm, index):
        """Keeps a step's losses (K,), gradient norm and clips; as tensors, so that no GPU is waited
        for."""
        self.done = step + 1
        self.history.append((step, torch.cat([losses, norm[None]]), index))

    def report(self, lr):
        """Logs the means since the last report; if one process was told to stop, all are."""
        values = torch.stack([x for _, x, _ in self.history]).cpu().double()  # (steps, K + 1)
        seconds = time.monotonic() - self.since
        finite = values[values[:, -1].isfinite()]
        *own, norm = (finite if len(finite) else values[:1]).mean(0).tolist()

        loader, world = self.loader, self.run.world
        own += [bool(self.signals), loader.waited - self.waited, loader.drawn, loader.unreadable]
        shared = sum(self.run.gather(torch.tensor(own))).tolist()
        *losses, signals, waited, drawn, unreadable = shared
        self.stop = signals > 0

        line = {"step": self.done, "epoch": self.done / self.steps_per_epoch}
        line |= {name: x / world for name, x in zip(self.names, losses)}
        line |= {
            "lr": lr, "grad_norm": norm,
            "clips_per_s": len(self.history) * self.run.args.batch / seconds,
            "waiting": waited / world / seconds, "unreadable": int(unreadable),
            "seconds_left": seconds / len(self.history) * (self.steps - self.done)}

        if self.run.device.type == "cuda":
            line["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9

        self.write(line)
        self.show(line)
        self.check(values.tolist(), drawn, unreadable)

    def check(self, values, drawn, unreadable):
        """Names the steps that were not finite, with their clips. UserError if three of them came
        in a row, or if too many clips cannot be read."""
        longest = 0
        for (step, _, index), row in zip(self.history, values):
            self.failed = 0 if math.isfinite(row[-1]) else self.failed + 1
            longest = max(longest, self.failed)

            if self.failed:
                wrong = [n for n, x in zip(self.names, row) if not math.isfinite(x)]
                clips = ", ".join(self.clips.name(i) for i in index.tolist())
                tqdm.write(
                    f"step {step} is not finite in {', '.join(wrong) or 'gradient'} and was not "
                    f"applied; clips: {clips}")

        out, largest = self.run.out, self.run.args.max_bad
        avmae.require(
            longest < 3,
            f"{longest} steps in a row were not finite: {out / 'last.pt'} is from before them; "
            "lower --lr")

        avmae.require(
            drawn < min(len(self.clips), 1000) or unreadable <= largest * (drawn + unreadable),
            f"{int(unreadable)} of {int(drawn + unreadable)} clips could not be read, more than "
            f"--max-bad {largest:g}: see {out / 'unreadable.txt'}, or run python data.py check")

    def write(self, line):
        """Appends a line to the log."""
        if self.run.rank == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")

    def show(self, line):
        """A line of the log in columns."""
        minutes = round(line["seconds_left"] / 60)
        losses = {name.removeprefix("loss_"): f"{line[name]:8.4f}" for name in self.names}

        columns = {
            "step": f"{line['step']:8d}", "epoch": f"{line['epoch']:7.2f}",
            **{name: f"{x:>{len(name)}}" for name, x in losses.items()},
            "lr": f"{line['lr']:9.2e}", "clips/s": f"{line['clips_per_s']:8.1f}",
            "waiting": f"{line['waiting']:8.1%}", "left": f"{minutes // 60:4d}:{minutes % 60:02d}"}

        if not self.header:
            self.header = " ".join(f"{name:>{len(x)}}" for name, x in columns.items())
            self.run.print(self.header)
        self.run.print(" ".join(columns.values()))

    def passed_epochs(self, epochs):
        """Whether a multiple of so many epochs lies in the log interval that ends here, and the
        run goes on."""
        every = max(1, round(epochs * self.steps_per_epoch))
        passed = self.done % every < self.run.args.log_every
        return passed and self.done < self.steps and not self.stop

    def save(self, model, optimizer, **extra):
        """Saves last.pt if it is time to; ends a run that was told to stop, with status 1 if steps
        are left."""
        minutes, done = (time.monotonic() - self.saved) / 60, self.done == self.steps

        if self.stop or done or minutes >= self.run.args.save_every:
            self.run.save(
                model, "last.pt", optimizer=optimizer.state_dict(), step=self.done, **extra)
            self.saved = time.monotonic()

        if self.stop:
            self.run.print(
                f"stopped at step {self.done} of {self.steps}; the same command continues")
            self.run.end(int(not done))
        # Only now, since evaluating and saving is none of the steps' time.
        self.history, self.since, self.waited = [], time.monotonic(), self.loader.waited

    def curves(self):
        """Draws the log's losses and held-out figures."""
        if self.run.rank:
            return

        curves = defaultdict(list)
        for line in map(json.loads, self.path.read_text().splitlines()):
            held_out = {f"held out: {k}": v for k, v in line.get("held_out", {}).items()}
            for name, y in ({n: line[n] for n in self.names if n in line} | held_out).items():
                curves[name].append((line["step"], y))
        draw_curves(curves, self.run.out / "curves.svg", "by step")


# ---------------------------------------------------------------------------------------------
# Schedule and weight decay


def learning_rate(step, peak, warmup, steps):
    """Linear warm-up, then cosine to 0; the first step has 0 (Table 20; int(), as released)."""
    decay = 0.5 * (1 + math.cos(math.pi * max(0.0, step - warmup) / max(1, steps - int(warmup))))
    return peak * min(1.0, step / warmup if warmup else 1.0) * decay


def decay_groups(model, weight_decay):
    """AdamW's groups: matrices decay; vectors (biases, norms, mask and modality tokens) don't."""
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0}]


if __name__ == "__main__":
    sys.excepthook = one_sentence
    args = parse_args()
    run = Run(args)  # the device, this process among torchrun's, its slices of a batch, the folder

    # -----------------------------------------------------------------------------------------
    # Model, clips, and what is going to happen

    torch.manual_seed(args.seed)

    # What a foreign checkpoint (the authors') does not say of itself.
    foreign = dict(encoder=args.encoder, decoder=args.decoder, objective=args.objective)

    if args.eval:
        model = run.load_model(args.eval, **foreign)
        avmae.require(
            isinstance(model, avmae.AVMAE), f"{args.eval} is a classifier: it rebuilds nothing")
    else:
        with torch.device("meta" if args.dry_run else "cpu"):
            model = avmae.AVMAE(config_of(args))

    train, held_out = clips_of(args)
    steps_per_epoch = max(1, len(train) // args.batch)
    steps = 0 if args.eval else args.epochs * steps_per_epoch  # an evaluation is a run of no steps
    run.say(model, train, held_out, steps, steps_per_epoch)  # with --dry-run, the end

    # -----------------------------------------------------------------------------------------
    # Optimizer, and where we are

    model.to(run.device)
    optimizer = torch.optim.AdamW(
        decay_groups(model, WEIGHT_DECAY),
        lr=0.0, betas=(0.9, 0.95), fused=True)  # the rate is set at each step
    start = run.resume(model, optimizer)["step"]

    if args.init and not start:
        model.load_state_dict(weights_for(model, run.load_model(args.init, **foreign), args.init))

    net = run.wrap(model)  # the same model; compiled if asked for, in DDP if not alone

    # Each epoch has all clips in a new random order; a step takes the next --batch of them, and
    # what an epoch leaves over begins the next (`data.Batches`). Of a file a random window, crop
    # and flip are taken; a built-in clip is always the same. A process loads its share of a batch.
    loader = run.load(train, steps=range(start, steps))

    # What a step logs: the loss, and each of out.losses {(target, context): loss}, in that order.
    names = ["loss", *(f"loss_{name_of(pair)}" for p in model.config.passes for pair in p.items())]
    log = Log(run, train, loader, names, start, steps, steps_per_epoch)

    peak, warmup = args.lr * args.batch / 256, args.warmup * steps_per_epoch

    def look():
        """Held-out errors to the log, and pictures of four clips -> errors, number of clips."""
        errors, used = evaluate(model, held_out, run)
        figures = {name_of(pair): error for pair, (error, _) in errors.items()}  # _: see evaluate
        log.write({"step": log.done, "held_out": figures})
        said = ", ".join(f"{k} {v:.4f}" for k, v in figures.items())
        run.print(f"held out: {said or 'no clip can be read'}")

        if run.rank == 0:
            draw_some(model, held_out, run, log.done)
        return errors, used

    # -----------------------------------------------------------------------------------------
    # The loop

    batches = iter(loader)  # on the device, a micro-batch of this process at a time
    count = len(run.micro_batches)
    bar = tqdm(range(start, steps), initial=start, total=steps, disable=run.rank > 0 or None)

    for step in bar:
        losses, index = 0, []

        # Gradient accumulation: the micro-batches are slices of the global batch.
        for rows in run.micro_batches:
            batch = next(batches)  # {video: (b, T, H, W, 3) bytes, audio: (b, T, F), index: (b,)}
            inputs = {m: batch[m] for m in model.config.modalities}
            index.append(batch["index"])

            # Masks of the global batch come from (seed, step), the same on any number of processes;
            # here the rows of the micro-batch.
            generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
            ids = avmae.random_masking(model.config.modalities, args.batch, generator, rows)
            ids = run.to_device(ids)  # ids_keep {m: (b, V)}, ids_mask {m: (b, M)}

            # DDP, if it is one, averages the processes' gradients once a step.
            net.require_backward_grad_sync = rows == run.micro_batches[-1]
            with run.autocast:
                out = net(inputs, ids)
            (out.loss / count).backward()
            losses = losses + torch.stack([out.loss, *out.losses.values()]).detach() / count

        rate = learning_rate(step, peak, warmup, steps)  # linear warm-up, then a cosine to 0
        for group in optimizer.param_groups:
            group["lr"] = rate
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])

        # The step is skipped if the gradient is not finite: `found_inf`, which a GradScaler sets
        # otherwise, tells a fused optimizer so on the device. An `if` would wait for the GPU.
        optimizer.found_inf = (~norm.isfinite()).float()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        log.note(step, losses, norm, torch.cat(index))
        if log.done % args.log_every == 0 or log.done == steps:
            log.report(rate)
            if log.passed_epochs(args.eval_every):
                look()
            log.save(model, optimizer)  # every --save-every minutes, at the end, if told to stop

    # -----------------------------------------------------------------------------------------
    # What it has learned: of a finished run, and of one of no steps (--eval)

    errors, used = look()
    avmae.require(errors or not args.eval, "none of the held-out clips can be read")

    results = report(errors, model, train, held_out, run) if run.rank == 0 and errors else {}
    run.write("results.json", {
        "held_out": results, "clips": used, "unreadable": len(held_out) - used,
        "settings": vars(args)})
    log.curves()
    run.end()
