"""Pretrain an audiovisual masked autoencoder (Sec. 3; recipe: Table 20).

    torchrun train_pretrain.py --encoder mid               # built-in clips, minutes on a CPU
    torchrun --nproc_per_node=8 train_pretrain.py --preset vggsound --data clips/ --encoder mid
    python train_pretrain.py --eval runs/demo/last.pt --data clip.mp4       # errors and pictures

The same command resumes a stopped run with the same losses: order, windows, crops and masks
depend only on the seed, the step and the position in the global batch.
"""

import argparse
import datetime
import functools
import json
import math
import os
import pathlib
import signal
import socket
import sys
import time
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import avmae
import data

try:
    import fcntl  # locks the folder of a run; Windows has none
except ImportError:
    fcntl = None

# ---------------------------------------------------------------------------------------------
# Settings: flags, and the presets that set their defaults

PRESETS = {  # Table 20 and the released configs; VGGSound's uses separate, the paper's best is mid
    "demo": dict(
        size="demo", frames=8, frame_step=0.32, image=32, tubelet=(2, 8, 8), seconds=2.56, mels=32,
        norm=(-0.5, 0.41, 1.5, 1.4), mask_video=0.6, mask_audio=0.5, epochs=10, batch=32,
        lr=2.4e-2, warmup=0.5, eval_every=5.0, num_clips=4096),
    "vggsound": dict(size="large", encoder="separate", num_clips=172_427),
    "audioset": dict(
        size="large", lr=3e-4, epochs=120, seconds=10.0, mask_audio=0.7, num_clips=1_857_210),
}
MODEL_SIZES = avmae.MODEL_SIZES | {
    "demo": (avmae.TransformerConfig(96, 3, 3, 384), avmae.TransformerConfig(64, 2, 2, 256))}

# Settings that may differ when a run is resumed. All others must stay.
MAY_CHANGE = {
    "data", "clips", "val", "split", "init", "eval", "predict", "embed", "out", "micro_batch",
    "log_every", "eval_every", "save_every", "max_bad", "workers", "device", "compile",
    "checkpoint_activations", "dry_run"}

CLIP_SETTINGS = (
    "modalities", "frames", "frame_step", "image", "tubelet", "seconds", "mels", "audio_patch",
    "norm")
MODEL_SETTINGS = ("size", "encoder", "decoder", "objective", "joint_layers")

WEIGHT_DECAY = 0.05  # as in the release; Table 20 prints 0
NUM_VAL = 256  # built-in validation clips, or as many as there are training clips
EVAL_BATCH = 16  # clips; fixed, so that validation errors do not depend on the number of processes


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show defaults, except empty ones."""

    def _get_help_string(self, action):
        empty = action.default in (None, "", (), False, argparse.SUPPRESS)
        return action.help if empty else super()._get_help_string(action)


def positive(text):
    """Parse an integer above 0."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def make_parser(description, presets):
    """Return a parser with the flags that both scripts share."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--preset NAME] [--FLAG VALUE ...]", description=description,
        formatter_class=HelpFormatter, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"error: {message}; see --help\n")
    parser.add_argument("--preset", choices=presets, help="recipe; required with --data")

    add = parser.add_argument_group("data").add_argument
    add("--data", default="", help="folder of videos, or one file; empty: built-in clips")
    add("--clips", default="", help="csv that lists the clips of --data (see README)")
    add("--val", default="", help="folder or csv of validation clips; empty: the split of --clips, "
        "folders train/ and val/, or a part of --data")
    add("--split", default="", help="with --eval: the split of --data to evaluate; empty: all")
    add("--eval", default="", metavar="CHECKPOINT", help="evaluate a checkpoint, do not train")

    add = parser.add_argument_group("clip").add_argument
    add("--modalities", nargs="+", choices=[*avmae.MODALITIES], default=("video", "audio"),
        help="one alone gives AudioMAE or VideoMAE (Table 3)")
    add("--frames", type=positive, default=16, help="video frames in a clip")
    add("--frame-step", type=float, default=0.16, help="seconds between frames")
    add("--image", type=positive, default=224, help="height and width of a frame in pixels")
    add("--tubelet", type=positive, nargs=3, default=(2, 16, 16), help="video patch: T H W")
    add("--seconds", type=float, default=8.0, help="length of the audio window")
    add("--mels", type=positive, default=128, help="mel bins")
    add("--audio-patch", type=positive, nargs=2, default=(16, 16), help="audio patch: T F")
    add("--norm", type=float, nargs=4, default=(0.0, 1.0, 0.0, 1.0),
        help="mean and std of video in [-1, 1], then of the log-mel spectrogram")

    add = parser.add_argument_group("run").add_argument
    add("--out", default="", help="output folder; empty: below runs/")
    add("--micro-batch", type=int, default=0, help="clips per forward pass and process; 0: all")
    add("--log-every", type=positive, default=20, help="steps between log lines")
    add("--eval-every", type=float, default=10.0, help="epochs between evaluations")
    add("--save-every", type=float, default=10.0, help="minutes between saves of last.pt")
    add("--max-bad", type=float, default=0.1, help="stop above this share of unreadable clips")
    add("--workers", type=int, default=-1, help="data processes per process; -1: all CPUs")
    add("--device", choices=("cuda", "mps", "cpu"), help="empty: cuda if available, else cpu")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile; empty: on CUDA if a compiler works")
    add("--checkpoint-activations", action="store_true", help="recompute activations: less memory")
    add("--dry-run", action="store_true", help="print the model and all settings, then exit")
    return parser


def parse_with_presets(parser, presets, argv=None):
    """Parse flags whose defaults come from a preset or, with --eval, from a checkpoint.

    Returns a namespace with tuples for lists. Raises UserError for --data without --preset, and for
    a preset of real videos without --data.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in "--preset", "--eval", "--data":
        first.add_argument(flag, nargs="?")
    known, _ = first.parse_known_args(argv)

    parser.set_defaults(**presets.get(known.preset or "demo", {}))
    if known.eval:
        saved = avmae.load_checkpoint(known.eval).get("settings", {})
        avmae.check(
            saved or known.preset,
            f"{known.eval} was converted and has no clip settings: give --preset")
        own_data = {"data", "clips", "val"} if not known.data else set()
        parser.set_defaults(
            **{k: v for k, v in saved.items() if k in own_data or k not in MAY_CHANGE})

    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        setattr(args, name, tuple(value) if isinstance(value, list) else value)
    args.modalities = tuple(m for m in avmae.MODALITIES if m in args.modalities)  # in this order
    if known.eval and known.data:  # all clips of the given folder are tested
        args.split = args.split or "all"

    avmae.check(
        args.preset or args.eval or not args.data,
        f"--data needs --preset: one of {', '.join(presets)}; demo trains a tiny model")
    args.preset = args.preset or "demo"
    avmae.check(
        args.preset == "demo" or args.data or args.eval or args.dry_run,
        f"--preset {args.preset} needs videos: give --data FOLDER or --dry-run")
    return args


def parse_args(argv=None):
    """Parse the flags of pretraining."""
    parser = make_parser(__doc__, PRESETS)

    add = parser.add_argument_group("model").add_argument
    add("--size", choices=MODEL_SIZES, default="base", help="encoder and decoder size (Table 21)")
    add("--encoder", choices=avmae.FUSION, default="mid", help="encoder fusion (Sec. 3.2)")
    add("--decoder", choices=avmae.FUSION, default="shared", help="decoder fusion (Sec. 3.3)")
    add("--objective", choices=avmae.OBJECTIVES, default="joint", help="targets (Sec. 3.4)")
    add("--joint-layers", type=positive, default=2, help="joint layers S of mid fusion (Table 15)")
    add("--mask-video", type=float, default=0.9, help="share of masked video tokens (Table 11)")
    add("--mask-audio", type=float, default=0.5, help="share of masked audio tokens (Table 11)")
    add("--norm-pix", action="store_true", help="standardize each target patch")
    add("--allow-uncoupled", action="store_true", help="allow separate encoder and decoder")

    add = parser.add_argument_group("recipe").add_argument
    add("--init", default="", metavar="CHECKPOINT", help="start from these weights")
    add("--num-clips", type=positive, default=4096, help="number of built-in training clips")
    add("--fraction", type=float, default=1.0, help="share of the training clips (Table 17)")
    add("--repeat", type=positive, default=1,
        help="augmentations per decoded clip; each counts as a clip")
    add("--epochs", type=float, default=400, help="passes over the clips (Table 5)")
    add("--batch", type=positive, default=512, help="clips per step over all processes")
    add("--lr", type=float, default=1.5e-4, help="peak learning rate for a batch of 256")
    add("--warmup", type=float, default=4.0, help="epochs of linear warm-up before cosine decay")
    add("--seed", type=int, default=0, help="seed of weights, order, crops and masks")

    args = parse_with_presets(parser, PRESETS, argv)
    args.out = args.out or ("runs/eval" if args.eval else f"runs/{args.preset}")
    return args


def make_modalities(args):
    """Return {m: avmae.Modality} for the flags of a clip."""
    video_mean, video_std, audio_mean, audio_std = args.norm
    modalities = {
        "video": replace(
            avmae.VIDEO, shape=(args.frames, args.image, args.image), patch=args.tubelet,
            mean=video_mean, std=video_std),
        "audio": replace(
            avmae.AUDIO, shape=(round(100 * args.seconds), args.mels), patch=args.audio_patch,
            mean=audio_mean, std=audio_std)}
    return {m: modalities[m] for m in args.modalities}


def make_window(args):
    """Return the data.Window for the flags of a clip."""
    return data.Window(args.frames, args.frame_step, args.image, args.seconds, args.mels)


def make_config(args):
    """Return the avmae.PretrainConfig of the flags."""
    size, decoder_size = MODEL_SIZES[args.size]
    ratios = {"video": args.mask_video, "audio": args.mask_audio}
    modalities = {m: replace(x, mask_ratio=ratios[m]) for m, x in make_modalities(args).items()}

    return avmae.PretrainConfig(
        modalities, size, decoder_size, args.encoder, args.decoder, args.objective,
        joint_layers=args.joint_layers, norm_pix=args.norm_pix,
        allow_uncoupled=args.allow_uncoupled)


def make_datasets(args):
    """Return the training clips and the validation clips."""
    window, modalities = make_window(args), args.modalities
    if not args.data:
        train = data.Builtin(round(args.num_clips * args.fraction), window, args.seed, modalities)
        num_val = min(NUM_VAL, args.num_clips)
        return train, data.Builtin(num_val, window, args.seed + 1_000_000, modalities)

    if args.split:
        train = val = data.open_index(args.data, args.clips, modalities, args.split)
    else:
        train, val = data.train_and_val(args.data, args.clips, args.val, modalities, share=0.02)
    train = data.take_fraction(train, args.fraction)
    return (
        data.Clips(train, window, modalities, data.Augment(), args.seed),
        data.Clips(val, window, modalities))


def differences(there, here, names):
    """Compare two dicts of settings; return a list like "--image 32 there, 64 here"."""
    return [
        f"--{name.replace('_', '-')} {there[name]} there, {here[name]} here"
        for name in names if name in there and there[name] != here[name]]


def load_weights(model, path, args):
    """Copy the weights of another pretraining checkpoint; return the settings that differ.

    Raises UserError if the architectures differ.
    """
    source = avmae.load_model(path)
    settings = avmae.load_checkpoint(path).get("settings", {})
    notes = differences(settings, vars(args), (*CLIP_SETTINGS, *MODEL_SETTINGS))

    shapes = [{(name, x.shape) for name, x in y.state_dict().items()} for y in (model, source)]
    parameters = sorted({name for name, _ in shapes[0] ^ shapes[1]})[:3]
    avmae.check(
        not parameters,
        f"{path} has another architecture: {'; '.join(notes or parameters)}")
    model.load_state_dict(source.state_dict())
    return notes


# ---------------------------------------------------------------------------------------------
# Distributed setup, output folder, checkpoints


def excepthook(kind, error, trace):
    """Print user errors and out-of-memory errors in one line, others with their traceback."""
    if issubclass(kind, torch.OutOfMemoryError):
        error = data.UserError(
            "out of memory on the device: lower --micro-batch or set --checkpoint-activations; "
            + str(error).splitlines()[0])
    data.excepthook(type(error), error, trace)


class Run:
    """A run's processes (those of torchrun, or one), device, output folder and stop signal."""

    def __init__(self, args):
        self.args, self.out = args, pathlib.Path(args.out)
        self.warned, self.signals, self.last_save = set(), [], time.monotonic()

        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        self.setup_device()

        share = max(1, args.batch // self.world)
        self.micro = args.micro_batch or share
        self.rows = slice(self.rank * share, (self.rank + 1) * share)  # of the global batch
        self.micro_batches = [slice(k, k + self.micro) for k in range(0, share, self.micro)]
        avmae.check(
            args.eval or self.world * len(self.micro_batches) * self.micro == args.batch,
            f"--batch {args.batch} must be a multiple of {self.world} processes x {self.micro} "
            "clips per forward pass: change --batch or --micro-batch")

    def setup_device(self):
        """Select this rank's device and join the process group."""
        device = self.args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.device, self.device_name, bf16 = torch.device(device), device, False

        if device == "cuda":
            local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
            avmae.check(
                local < count,
                f"local rank {local} has no GPU, this machine has {count}: lower --nproc_per_node "
                "or give --device cpu")
            self.device = torch.device(device, local)
            self.device_name = torch.cuda.get_device_name(local)
            torch.cuda.set_device(self.device)
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            torch.set_float32_matmul_precision("high")

            # The backward pass of cuDNN's attention may give NaN on Hopper where the number of
            # tokens is 64 modulo 128, such as MBT's 3,136. Fixed in cuDNN frontend 9.26.
            torch.backends.cuda.enable_cudnn_sdp(False)

        elif not self.args.data and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)  # more do not help the demo, and hurt on a busy machine

        self.dtype = "bfloat16" if bf16 else "float32"
        self.autocast = torch.autocast("cuda", torch.bfloat16) if bf16 else nullcontext()
        if self.world > 1:
            self.join_process_group()

    def join_process_group(self):
        """Meet the other ranks. An evaluation may keep one waiting, so the limit is an hour."""
        missing = [x for x in ("RANK", "MASTER_ADDR", "MASTER_PORT") if x not in os.environ]
        avmae.check(
            not missing,
            f"WORLD_SIZE is {self.world}, but {', '.join(missing)} is not set: start with "
            "torchrun, or unset WORLD_SIZE")

        cuda = self.device.type == "cuda"
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=1),
            device_id=self.device if cuda else None)

    def open_folder(self):
        """Create the output folder and lock it. Raises UserError if another run has it."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if self.rank:
                return
            self.lock = open(self.out / "run.lock", "a+")  # stays open, and locked, until the end
        except OSError as error:
            raise avmae.UserError(
                f"cannot write to --out {self.out}: {error.strerror or error}") from None

        try:
            if fcntl:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.seek(0)
            raise avmae.UserError(
                f"{self.out} is in use by {self.lock.read().strip() or 'another run'}: choose "
                "another folder with --out, or start all processes with torchrun") from None
        except OSError:  # a file system without locks
            pass

        self.lock.truncate(0)
        self.lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.lock.flush()

    def catch_signals(self):
        """Note SIGTERM and SIGINT from now on; the loop stops after the current step."""
        for number in signal.SIGTERM, signal.SIGINT:
            signal.signal(number, lambda number, _: self.signals.append(number))

    def stop_requested(self):
        """Return True if any rank has received a signal. All ranks must call it."""
        return bool(self.sum(torch.tensor(len(self.signals))))

    def sum(self, x):
        """Return the sum of a CPU tensor over ranks. No rank waits for a GPU."""
        if self.world > 1:
            dist.all_reduce(x)  # by gloo
        return x

    def gather(self, x):
        """Return the objects of all ranks as a list."""
        objects = [x] * self.world
        if self.world > 1:
            dist.all_gather_object(objects, x)
        return objects

    def print(self, line):
        """Print a line above the progress bar, on rank 0 only."""
        if self.rank == 0:
            tqdm.write(line)
            sys.stdout.flush()

    def quiet_ranks(self):
        """Return a context in which only rank 0 prints."""
        return redirect_stdout(None) if self.rank else nullcontext()

    def warn_once(self, line):
        """Print a line and append it to unreadable.txt, once per process."""
        if line not in self.warned:
            self.warned.add(line)
            tqdm.write(line)
            with open(self.out / "unreadable.txt", "a", **data.UTF8) as file:
                file.write(line + "\n")

    def print_summary(self, model, train, val, steps):
        """Print a six-line summary of the run."""
        config, pretraining = model.config, isinstance(model, avmae.AVMAE)
        kind = (
            f"{config.encoder} encoder, {config.decoder} decoder, objective {config.objective}"
            if pretraining
            else f"{config.encoder} of {' and '.join(config.modalities)}")

        self.print(f"device  {self.device_name}, {self.dtype}")
        self.print(f"model   {kind}, {sum(p.numel() for p in model.parameters()):,} parameters")
        self.print("tokens  " + ", ".join(
            f"{x.num_tokens} {m}" + (f" ({x.num_masked} masked)" if pretraining else "")
            for m, x in config.modalities.items()))
        self.print(f"clips   {len(train):,} for training, {len(val):,} for validation")
        self.print(
            f"steps   {steps:,}; batch {self.args.batch} = {self.world} processes x "
            f"{len(self.micro_batches)} micro-batches x {self.micro} clips")
        self.print(
            f"folder  {self.out}: last.pt, log.jsonl, settings.json, curves.png, results.json")

    def make_loader(self, clips, steps=None, batches=None):
        """Return a data.Loader: this rank's part of training steps (a range), the given batches of
        keys, or this rank's part of all clips in order."""
        args, workers = self.args, self.args.workers
        if workers < 0:
            local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            workers = max(1, data.cpu_count() // local) if args.data else 0

        if steps is not None:
            rows = range(args.batch)[self.rows]
            batches = data.batch_keys(
                len(clips), args.batch, args.seed, steps, rows, self.micro,
                getattr(args, "repeat", 1))
        elif batches is None:
            size = max(1, EVAL_BATCH // getattr(clips, "views", 1))
            batches = data.in_order(len(clips), size, self.rank, self.world)
        return data.Loader(clips, batches, self.device, workers, self.warn_once)

    def to_device(self, masks):
        """Copy (ids_keep, ids_mask), each {m: (B, N)}, to the device without waiting for it."""
        cuda = self.device.type == "cuda"
        return [
            {m: (x.pin_memory() if cuda else x).to(self.device, non_blocking=cuda)
             for m, x in ids.items()}
            for ids in masks]

    def resume(self, model, optimizer, num_clips, names=()):
        """Load last.pt into model and optimizer; return what else it holds, or {"step": 0}.

        Raises UserError if it has other settings or class names, or if ranks see different files.
        """
        path = self.out / "last.pt"
        exists = path.exists() and not self.args.eval
        saved = avmae.load_checkpoint(path) if exists else {"step": 0}
        steps = sorted(set(self.gather(saved["step"])))
        avmae.check(
            len(steps) == 1,
            f"the processes find different steps in {path}: {steps}. All machines must share the "
            "folder --out")
        if not exists:
            return saved

        fixed = [name for name in vars(self.args) if name not in MAY_CHANGE]
        notes = differences(saved["settings"], vars(self.args), fixed)
        if saved.get("names", names) != names:
            notes.append(f"classes {saved['names']} there, {names} here")
        avmae.check(
            not notes,
            f"{self.out} holds a run with other settings: {'; '.join(notes[:3])}. Choose another "
            "folder with --out")

        model.load_state_dict(saved.pop("model"))
        optimizer.load_state_dict(saved.pop("optimizer"))
        self.print(f"resuming {path} at step {saved['step']}")
        if saved["num_clips"] != num_clips:
            self.print(
                f"warning: {num_clips:,} training clips instead of {saved['num_clips']:,}: the "
                "number of steps and the order of clips change")
        return saved

    def wrap_model(self, model):
        """Return the model with the requested recomputation, compilation and DDP."""
        args = self.args
        if args.checkpoint_activations:
            for block in model.modules():
                if isinstance(block, avmae.Block):
                    random = block.drop_path.rate > 0  # otherwise no random state is kept
                    block.forward = functools.partial(
                        checkpoint, block.forward, use_reentrant=False, preserve_rng_state=random)

        wanted = self.device.type == "cuda" if args.compile is None else args.compile
        net = torch.compile(model) if wanted and self.compiler_works() else model
        if self.world == 1:
            return net
        return torch.nn.parallel.DistributedDataParallel(
            net, gradient_as_bucket_view=True, forward_sync_buffers=False)

    def compiler_works(self):
        """Compile a small function. Raises UserError if that fails and --compile was given."""
        torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs uncompiled
        try:
            torch.compile(torch.sin)(torch.ones(2, device=self.device))
            return True
        except Exception as error:
            reason = f"torch.compile does not work here ({str(error).strip().splitlines()[0]})"
            avmae.check(not self.args.compile, f"{reason}: give --no-compile")
            self.print(f"{reason}; training without it")
            return False

    def save_is_due(self):
        """Return True if --save-every minutes have passed since the last save."""
        return time.monotonic() - self.last_save >= 60 * self.args.save_every

    def save(self, model, name, **extra):
        """Save a checkpoint in the output folder, on rank 0 only."""
        if self.rank == 0:
            avmae.save_model(model, self.out / name, settings=vars(self.args), **extra)
        if name == "last.pt":
            self.last_save = time.monotonic()

    def write_json(self, name, content):
        """Write a JSON file in the output folder, on rank 0 only."""
        if self.rank == 0:
            (self.out / name).write_text(json.dumps(content, indent=1))

    def shutdown(self):
        """Leave the process group once all ranks are done."""
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------
# Log


class Log:
    """Record steps; write their means to log.jsonl, the screen and curves.png."""

    def __init__(self, run, loader, names, start, steps):
        self.run, self.loader, self.names, self.steps = run, loader, names, steps
        self.records, self.seconds, self.waited = [], 0.0, 0.0  # since the last log line
        self.num_failed, self.header, self.clock = 0, "", time.monotonic()

        run.write_json("settings.json", vars(run.args))
        self.path = run.out / "log.jsonl"
        if run.rank == 0:  # drop lines after the resumed checkpoint, and a torn last line
            with open(self.path, "ab+") as file:
                file.seek(0)
                kept = [x for x in file if x.endswith(b"\n") and json.loads(x)["step"] <= start]
                file.truncate(sum(map(len, kept)))

    def record(self, step, losses, norm, index):
        """Keep a step's losses (K,), gradient norm and clip numbers. No GPU is waited for."""
        self.records.append((step, torch.cat([losses, norm[None]]), index))
        self.seconds += time.monotonic() - self.clock

    def restart_clock(self):
        """Exclude the time since the last step, spent on evaluation and saving."""
        self.clock = time.monotonic()

    def log_metrics(self, lr, epoch):
        """Write means over steps and ranks; return the rows (S, K + 1) of this rank."""
        rows = torch.stack([x for _, x, _ in self.records]).cpu().double()
        finite = rows[rows[:, -1].isfinite()]
        means = (finite if len(finite) else rows[:1]).mean(0)

        loader, run = self.loader, self.run
        shared = run.sum(torch.cat([means[:-1], torch.tensor(
            [loader.waited - self.waited, loader.num_unreadable], dtype=torch.float64)]))
        *losses, waited, unreadable = shared.tolist()
        step, count = self.records[-1][0] + 1, len(self.records)

        line = {"step": step, "epoch": epoch}
        line |= {name: x / run.world for name, x in zip(self.names, losses)}
        line |= {
            "lr": lr, "grad_norm": means[-1].item(),
            "clips/s": count * run.args.batch / self.seconds,
            "waiting": waited / run.world / self.seconds, "unreadable": int(unreadable),
            "seconds_left": self.seconds / count * (self.steps - step)}
        if run.device.type == "cuda":
            line["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9

        self.write(line)
        self.print_row(line)
        self.seconds, self.waited = 0.0, loader.waited
        return rows

    def check_health(self, rows):
        """Name the steps that were not finite, and start the next interval.

        Raises UserError after three such steps in a row, or above --max-bad unreadable clips.
        """
        longest, run, loader = 0, self.run, self.loader
        for (step, _, index), row in zip(self.records, rows.tolist()):
            self.num_failed = 0 if math.isfinite(row[-1]) else self.num_failed + 1
            longest = max(longest, self.num_failed)
            if self.num_failed:
                wrong = [n for n, x in zip(self.names, row) if not math.isfinite(x)] or ["gradient"]
                clips = ", ".join(map(loader.dataset.name, index.tolist()))
                tqdm.write(f"step {step} skipped: {', '.join(wrong)} not finite; clips: {clips}")

        self.records = []
        avmae.check(
            longest < 3,
            f"{longest} steps in a row were not finite and were skipped: lower --lr. The same "
            "command continues from the last save")

        loaded, bad = run.sum(torch.tensor([loader.num_loaded, loader.num_unreadable])).tolist()
        avmae.check(
            loaded < min(len(loader.dataset), 1000) or bad <= run.args.max_bad * loaded,
            f"{bad} of {loaded} clips could not be read, more than --max-bad {run.args.max_bad:g}: "
            f"see {run.out / 'unreadable.txt'}, or run tools/check_clips.py")

    def write(self, line):
        """Append a line to log.jsonl, on rank 0 only."""
        if self.run.rank == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")

    def print_row(self, line):
        """Print a log line in columns, the first time below their names."""
        shown = ("step", "epoch", *self.names, "lr", "clips/s", "waiting")
        columns = {name.removeprefix("loss_"): f"{line[name]:.4g}" for name in shown}
        minutes = round(line["seconds_left"] / 60)
        columns["left"] = f"{minutes // 60}:{minutes % 60:02d}"

        if not self.header:
            self.header = " ".join(f"{name:>9}" for name in columns)
            self.run.print(self.header)
        self.run.print(" ".join(f"{x:>{max(9, len(name))}}" for name, x in columns.items()))

    def save_curves(self):
        """Draw curves.png from log.jsonl: training losses above, validation metrics below."""
        if self.run.rank:
            return
        lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        val = [{"step": line["step"], **line["val"]} for line in lines if "val" in line]
        figure = Figure(figsize=(7, 6), layout="constrained")

        train = [line for line in lines if "loss" in line]
        for ax, title, rows in zip(
            figure.subplots(2), ("training", "validation"), (train, val)):
            for name in self.names if title == "training" else [*val[0]][1:] if val else ():
                ax.plot([x["step"] for x in rows], [x[name] for x in rows], ".-", ms=3, label=name)
                ax.legend()
            ax.set(title=title, xlabel="step", ylabel="loss" if title == "training" else "metric")
        figure.savefig(self.run.out / "curves.png", dpi=120)


# ---------------------------------------------------------------------------------------------
# Validation errors and pictures (Fig. 5)


MISSING = (0.35, 0.45, 0.75)  # the color of masked patches


def pair_name(target, context):
    """Return the name of a reconstruction in logs: "video", or "video_from_audio"."""
    return target if target == context else f"{target}_from_{context}"


def patch_moments(model, m, clips):
    """Return count, sums and sums of squares (3, P) of a batch's target patches, in float64."""
    patches = model.patchify({m: clips})[m]  # (B, N, P)
    ids = torch.arange(patches.shape[1], device=patches.device).expand(patches.shape[:2])
    x = model.target_patches(m, patches, ids).flatten(0, 1).cpu().double()  # (B N, P)
    return torch.stack([torch.full_like(x[0], len(x)), x.sum(0), x.square().sum(0)])


@torch.no_grad()
def evaluate(model, clips, run):
    """Return {name: {"error", "of_variance", "lower_than_swapped"}} and the number of clips read.

    error: the mean of Eq. 1 over clips, with the same masks at every call. of_variance: its share
    of the targets' variance, the error of the best constant prediction. lower_than_swapped: how
    much lower it is than if the encoder sees another clip's other modality. After a signal, None.
    """
    model.eval()
    modalities = model.config.modalities
    pairs = [pair for x in model.config.decoder_passes for pair in x.items()]
    errors = torch.zeros(len(pairs) + 1, 2, dtype=torch.float64)  # own, swapped; last row: clips
    moments = {t: torch.zeros(3, modalities[t].patch_dim, dtype=torch.float64) for t, _ in pairs}

    for batch in run.make_loader(clips):
        if run.signals:
            break
        inputs, count = {m: batch[m] for m in modalities}, len(batch["index"])
        generator = torch.Generator().manual_seed(int(batch["index"][0]))
        masks = run.to_device(avmae.random_masking(modalities, count, generator))

        with run.autocast:
            losses, found = model(inputs, masks).losses, []
            for t, c in pairs:
                swapped = {m: x if m == t else x.roll(1, 0) for m, x in inputs.items()}
                other = model(swapped, masks).losses[t, c]
                found.append([losses[t, c].item(), other.item()])

        weights = torch.tensor([count, count if count > 1 else 0])  # a lone clip has no other
        errors += weights * torch.tensor([*found, [1, 1]])
        for t in moments:
            moments[t] += patch_moments(model, t, inputs[t])

    model.train()
    if run.stop_requested():
        return None
    errors, variance = run.sum(errors), {}
    for t in moments:
        count, total, squares = run.sum(moments[t])
        variance[t] = (squares / count - (total / count).square()).mean().item()

    num_clips, metrics = int(errors[-1, 0]), {}
    for (t, c), (error, swapped) in zip(pairs, (errors[:-1] / errors[-1]).tolist()):
        metrics[pair_name(t, c)] = {
            "error": error, "of_variance": error / variance[t],
            "lower_than_swapped": None if math.isnan(swapped) else 1 - error / swapped}
    return metrics if num_clips else {}, num_clips


def print_metrics(metrics, run):
    """Print the results of `evaluate` as a table."""
    run.print("validation error, its share of the variance of the targets, and how much lower it")
    run.print("is than with another clip's other modality:")
    for name, x in metrics.items():
        lower = x["lower_than_swapped"]
        lower = "only one clip" if lower is None else f"{lower:7.2%}"
        run.print(f"  {name:18s} {x['error']:.4f}   {x['of_variance']:.3f} of variance   {lower}")


def draw_clip(ax, clip, modality, seconds):
    """Draw one clip: frames (T, H, W, 3) in [-1, 1] side by side, or a spectrogram (T, F).

    NaN is drawn in blue. The axes show seconds and, for audio, mel bins.
    """
    if modality == "audio":
        ax.imshow(
            np.ma.masked_invalid(clip.T), origin="lower", aspect="auto", cmap="gray",
            extent=(0, seconds, 0, clip.shape[1]), interpolation="nearest")
        ax.set_facecolor(MISSING)
        return

    clip = clip[:: max(1, len(clip) // 8)]  # at most 8 frames
    strip = np.concatenate(list((clip + 1) / 2), axis=1)  # (H, T W, 3)
    strip = np.where(np.isnan(strip), MISSING, strip.clip(0, 1))
    ax.imshow(strip, extent=(0, seconds, 0, 1), aspect="auto", interpolation="nearest")
    ax.set_yticks([])


@torch.no_grad()
def save_pictures(model, val, run, metrics, step):
    """Save pictures/STEP.png: three rows for each of three clips, a column per reconstruction."""
    keys = [(0, i, 0) for i in range(len(val))]
    keys = keys[:: 5 if len(val) > 15 else 1][:3]  # built-in clips 0, 5, 10: three shapes
    inputs = next(iter(run.make_loader(val, batches=[keys])), None)
    if inputs is None:
        return

    masks = model.sample_masks(inputs, torch.Generator().manual_seed(0))  # the same at every call
    clips = model.reconstruct(inputs, masks)
    seconds = {"video": run.args.frames * run.args.frame_step, "audio": run.args.seconds}
    num_rows = 3 * len(inputs["index"])
    figure = Figure(figsize=(7 * len(clips), 0.9 * num_rows + 0.8))
    figure.subplots_adjust(0.08 / len(clips), 0.06, 0.99, 0.94, wspace=0.13)
    axes = figure.subplots(num_rows, len(clips), squeeze=False, sharex="col")

    for column, (pair, images) in zip(axes.T, clips.items()):
        name = pair_name(*pair)
        column[0].set_title(
            f"{name.replace('_', ' ')}: validation error {metrics[name]['error']:.3f}, "
            f"{metrics[name]['of_variance']:.2f} of the variance")
        column[-1].set_xlabel("seconds")

        for row, ax in enumerate(column):
            clip, kind = divmod(row, 3)
            draw_clip(ax, images[kind][clip].cpu().numpy(), pair[0], seconds[pair[0]])
            label = ("original", "visible", "reconstruction")[kind]
            ax.set_ylabel(label if pair[0] == "video" else f"{label}\nmel bin", fontsize=8)

    (run.out / "pictures").mkdir(exist_ok=True)
    figure.savefig(run.out / "pictures" / f"{step:07d}.png", dpi=100)


# ---------------------------------------------------------------------------------------------
# Schedule and weight decay


def num_steps(epochs, clips, batch):
    """Return the number of steps of so many passes over the clips, at least one."""
    return max(1, round(epochs * clips / batch))


def learning_rate(step, peak, warmup, steps):
    """Linear warm-up, then cosine to 0; the first step has rate 0 (Table 20, as in the release)."""
    decay = 0.5 * (1 + math.cos(math.pi * max(0.0, step - warmup) / max(1, steps - int(warmup))))
    return peak * min(1.0, step / warmup if warmup else 1.0) * decay


def decay_groups(model, weight_decay):
    """Return AdamW's groups: matrices decay; vectors (biases, norms, mask tokens) do not."""
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0}]


if __name__ == "__main__":
    data.setup_script(excepthook)
    args = parse_args()
    run = Run(args)

    # ---- Model and clips

    torch.manual_seed(args.seed)
    if args.eval:
        model = avmae.load_model(args.eval)
        avmae.check(
            isinstance(model, avmae.AVMAE),
            f"{args.eval} is a classifier: evaluate it with train_finetune.py")
    else:
        with torch.device("meta" if args.dry_run else "cpu"):
            model = avmae.AVMAE(make_config(args))
    if args.init and not args.dry_run:
        notes = load_weights(model, args.init, args)
        run.print(f"init    {args.init}: {'; '.join(notes) or 'the same settings'}")

    with run.quiet_ranks():
        train, val = make_datasets(args)
    steps = 0 if args.eval else num_steps(args.epochs, len(train), args.batch)
    warmup = round(args.warmup * len(train) / args.batch)  # steps
    run.print_summary(model, train, val, steps)
    if args.dry_run:
        run.print(json.dumps(vars(args), indent=1))
        sys.exit()

    # ---- Optimizer and resume

    run.open_folder()
    model.to(run.device)
    optimizer = torch.optim.AdamW(
        decay_groups(model, WEIGHT_DECAY),
        lr=0.0, betas=(0.9, 0.95), fused=True)  # the rate is set at each step
    start = run.resume(model, optimizer, len(train))["step"]

    net = run.wrap_model(model)
    loader = run.make_loader(train, steps=range(start, steps))
    pairs = [pair for x in model.config.decoder_passes for pair in x.items()]
    log = Log(run, loader, ["loss", *(f"loss_{pair_name(*pair)}" for pair in pairs)], start, steps)

    peak = args.lr * args.batch / 256
    eval_interval = num_steps(args.eval_every, len(train), args.batch)
    run.catch_signals()

    def evaluate_and_log(step):
        """Log validation errors and save pictures; return `evaluate`'s result."""
        result = evaluate(model, val, run)
        if not result or not result[0]:
            return result

        errors = {name: x["error"] for name, x in result[0].items()}
        log.write({"step": step, "val": errors})
        run.print("val     " + ", ".join(f"{k} {v:.4f}" for k, v in errors.items()))
        if run.rank == 0:
            save_pictures(model, val, run, result[0], step)
        return result

    # ---- Training loop

    batches, done, stop = iter(loader), start, False
    progress = tqdm(range(start, steps), initial=start, total=steps, disable=run.rank > 0 or None)

    for step in progress:
        losses, index = 0, []

        # Masks of the global batch depend on (seed, step); this rank takes its rows.
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        masks = avmae.random_masking(model.config.modalities, args.batch, generator, run.rows)
        masks = run.to_device(masks)  # ids_keep {m: (b, V)}, ids_mask {m: (b, M)}

        for rows in run.micro_batches:  # gradient accumulation
            batch = next(batches)  # {video: (b, T, H, W, 3) bytes, audio: (b, T, F), index: (b,)}
            inputs = {m: batch[m] for m in model.config.modalities}
            index.append(batch["index"])

            net.require_backward_grad_sync = rows == run.micro_batches[-1]  # DDP: once per step
            with run.autocast:
                out = net(inputs, [{m: x[rows] for m, x in ids.items()} for ids in masks])
            (out.loss / len(run.micro_batches)).backward()
            losses = losses + torch.stack([out.loss, *out.losses.values()]).detach()

        losses = losses / len(run.micro_batches)
        lr = learning_rate(step, peak, warmup, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # A fused optimizer skips the step if `found_inf` is 1; an `if` would wait for the GPU.
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        optimizer.found_inf = (~norm.isfinite()).float()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        log.record(step, losses, norm, torch.cat(index))
        done = step + 1
        stop = run.stop_requested()  # a signal on any rank
        if stop or done == steps or done % args.log_every == 0:
            log.check_health(log.log_metrics(lr, done * args.batch / len(train)))
        if done % eval_interval == 0 and done < steps and not stop:
            evaluate_and_log(done)
        if stop or done == steps or run.save_is_due():
            run.save(
                model, "last.pt", optimizer=optimizer.state_dict(), step=done,
                num_clips=len(train))
        if stop:
            break
        log.restart_clock()

    # ---- Results: of a finished run, or of --eval

    result = None if stop else evaluate_and_log(steps)
    if result is None:
        run.print(f"stopped at step {done} of {steps}; the same command continues")
        run.shutdown()
        sys.exit(1)

    metrics, num_clips = result
    avmae.check(metrics or not args.eval, "no validation clip can be read")
    print_metrics(metrics, run)
    run.write_json("results.json", {
        "val": metrics, "clips": num_clips, "unreadable": len(val) - num_clips,
        "settings": vars(args)})
    log.save_curves()
    run.shutdown()
