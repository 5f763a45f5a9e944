"""Finetunes and evaluates a classifier (paper Sec. 4.1; recipes: Tables 22-24).

    torchrun train_finetune.py --init runs/demo/last.pt           # built-in clips, minutes on a CPU
    torchrun --nproc_per_node=8 train_finetune.py --preset vggsound --data clips/ \\
        --annotations vggsound.csv --init runs/vggsound/last.pt
    python train_finetune.py --eval runs/finetune/best.pt         # evaluates only
    python train_finetune.py --eval runs/finetune/best.pt --predict clip.mp4

The same command resumes. What a run needs whatever it trains (processes, progress, the schedule) is
in train_pretrain.py.
"""

import csv
import json
import math
import os
import pathlib
import shutil
import sys
from contextlib import nullcontext

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import avmae
import data
from train_pretrain import (
    Progress, for_training, learning_rate, loading, parser_of, processes, resume, shares)

# ---------------------------------------------------------------------------------------------
# Settings. A preset overrides the defaults, a flag overrides the preset.

SETTINGS = {  # name: (default, what it is)
    "data": ("", "folder of video files; none: the built-in clips"),
    "annotations": ("", "annotation file of the training clips; none: folder names are labels"),
    "val_annotations": ("", "annotation file of the test clips, if it is another one"),
    "allow_outside": (False, "let annotations name files that are not below --data"),
    "out": ("", "folder of the run; none: runs/finetune for the demo, else runs/finetune-PRESET"),
    "init": ((), "pretrained checkpoint; several: each for its modalities, or as video=FILE"),
    "model": (
        "mbt", "mbt, encoder (the pretraining encoder, Table 14) or probe (linear, Table 18)"),
    "encoder": ("mid", "fusion of --model encoder from scratch; else the checkpoint tells"),
    "modalities": (("video", "audio"), "what to classify by"),
    "task": (
        "single", "label a clip, many labels, epic (verb and noun), or ave (a label a second)"),
    "size": ("base", "size of the model"),
    "fusion_layer": (0, "first layer of MBT with bottlenecks; 0: at 2/3 of the depth"),
    "bottlenecks": (4, "bottleneck tokens of MBT"),
    "joint_layers": (2, "S of --model encoder with a mid encoder from scratch"),
    "frames": (32, "video frames of a clip"),
    "frame_step": (0.08, "seconds between frames; stride 2 at 25 frames/s"),
    "image": (224, "height and width of a frame, pixels"),
    "tubelet": ((2, 16, 16), "video patch: frames, height, width"),
    "seconds": (8.0, "audio of a clip"),
    "mels": (128, "mel bins"),
    "audio_patch": ((16, 16), "audio patch: frames of 10 ms, mel bins"),
    "video_norm": (
        (0.0, 1.0), "mean and std of video in [-1, 1]; a pretrained model brings its own"),
    "audio_norm": ((0.0, 1.0), "mean and std of log-mel; a pretrained model brings its own"),
    "views": (4, "clips of a video at test time, their logits are averaged"),
    "per_class": (10, "built-in training clips of each class"),
    "test_clips": (1024, "number of built-in test clips"),
    "test_seed": (1, "of the built-in test clips"),
    "epochs": (50, "passes over the training clips"),
    "batch": (64, "clips a step, over all processes"),
    "micro_batch": (0, "clips a forward pass of a process; 0: all of its share at once"),
    "lr": (0.8, "peak learning rate for the preset's batch; scaled linearly for another"),
    "warmup": (2.5, "epochs of linear warm-up"),
    "momentum": (0.9, "of SGD"),
    "layer_decay": (0.75, "learning rate of a block against that of the next"),
    "clip_grad": (1.0, "largest norm of the gradient"),
    "smoothing": (0.3, "label smoothing"),
    "drop_path": (0.3, "stochastic depth of the last block"),
    "mixup": ((0.5, 0.5, 0.5), "alpha for audio, video, both; 0: off"),
    "time_shift": (False, "random circular shift of the spectrogram"),
    "frequency_masks": ((1, 48), "SpecAugment: how many, up to how many bins"),
    "time_masks": ((4, 48), "SpecAugment: how many, up to how many frames"),
    "jitter": ((0.9, 1.33), "scale of height and width before the crop"),
    "colour": (True, "colour jitter and grayscale"),
    "flip": (True, "horizontal flip"),
    "seed": (0, "of weights, order and augmentation"),
    "log_every": (20, "steps between lines of the log"),
    "eval_every": (5.0, "epochs between evaluations"),
    "save_every": (1.0, "epochs between saves of last.pt"),
    "max_bad": (0.1, "share of unreadable clips above which the run stops"),
    "workers": (-1, "data processes of each process; -1: as many as there are CPUs to share"),
    "device": ("", "cuda or cpu; none: cuda if there is one"),
    "compile": (False, "torch.compile the model"),
    "checkpoint_activations": (False, "recompute activations in the backward pass, to save memory"),
    "classes": ("", "with an imported model: file with the names of its classes, one a line"),
    "eval": ("", "only evaluate this checkpoint"),
    "predict": ("", "with --eval: print the labels of this video file"),
    "predictions": ("", "csv to write the labels of every test clip to"),
    "embed": ("", "npz to write the features of all clips of --data to, by the model --eval"),
    "dry_run": (False, "print what would be done, and end"),
}
PRESETS = {  # Tables 22, 23, 24; ave: the recipe of vggsound, one pass over 10 s
    "demo": dict(  # 160 clips, no augmentation: chosen on other seeds than those reported
        size="demo", frames=8, frame_step=0.32, image=32, tubelet=(2, 8, 8), seconds=2.56, mels=32,
        video_norm=(-0.46, 0.47), audio_norm=(0.2, 1.6), views=1, batch=16, lr=0.05, epochs=30,
        smoothing=0.1, drop_path=0.0, mixup=(0.0, 0.0, 0.0), jitter=(1.0, 1.0), colour=False,
        frequency_masks=(0, 0), time_masks=(0, 0), flip=False, eval_every=10.0),
    "vggsound": dict(size="large"),
    "epic": dict(size="large", task="epic", lr=1.2, mixup=(1.25, 0.5, 0.5), time_shift=True),
    "audioset": dict(
        size="large", fusion_layer=18, task="many", seconds=10.0, batch=128, lr=1.6,
        mixup=(1.25, 0.5, 0.5), time_shift=True, frequency_masks=(2, 36)),
    "ave": dict(task="ave", frames=32, frame_step=10 / 32, seconds=10.0, views=1),
}
SIZES = {k: v[0] for k, v in avmae.SIZES.items()} | {"demo": avmae.Size(96, 3, 3, 384)}
CHOICES = {
    "model": ("mbt", "encoder", "probe"), "encoder": tuple(avmae.PLANS),
    "modalities": avmae.MODALITIES, "task": ("single", "many", "epic", "ave"), "size": tuple(SIZES)}
FREE = {  # may change on resume
    "out", "init", "data", "annotations", "val_annotations", "allow_outside", "micro_batch",
    "log_every", "eval_every", "save_every", "max_bad", "workers", "device", "compile",
    "checkpoint_activations", "classes", "eval", "predict", "predictions", "embed"}


def parse(argv=None):
    """The settings of a command line, a namespace."""
    parser = parser_of(__doc__, SETTINGS, PRESETS, CHOICES)
    known, _ = parser.parse_known_args(argv)
    parser.set_defaults(**PRESETS[known.preset])
    if known.eval:  # as it was trained
        parser.set_defaults(**avmae.read(known.eval).get("settings", {}))
    args = parser.parse_args(argv)
    args.out = args.out or (
        "runs/finetune" if args.preset == "demo" else f"runs/finetune-{args.preset}")
    return args


def config_of(args, classes, sources=()):
    """The classifier's config; what pretrained models decide comes from the first of `sources`."""
    size, first = SIZES[args.size], sources[0].config if sources else None
    trunk = "mbt" if args.model == "mbt" else first.encoder if first else args.encoder
    return avmae.ClassifierConfig(
        modalities=tuple(args.modalities),
        size=size,
        trunk=trunk,
        classes=classes,
        fusion_layer=args.fusion_layer or size.layers * 2 // 3,
        bottlenecks=args.bottlenecks,
        joint_layers=first.joint_layers if first else args.joint_layers,
        segments=10 if args.task == "ave" else 1,
        shape={
            "video": (args.frames, args.image, args.image),
            "audio": (round(args.seconds * 100), args.mels)},
        patch={"video": tuple(args.tubelet), "audio": tuple(args.audio_patch)},
        norm=first.norm
        if first
        else {"video": tuple(args.video_norm), "audio": tuple(args.audio_norm)},
        modality_tokens=trunk != "mbt" and bool(first and first.modality_tokens),
    )


# ---------------------------------------------------------------------------------------------
# The recipe: layer-wise decay, mixup, losses, metrics


def layer_scales(model, decay):
    """{parameter: multiplier of the learning rate}: decay^(L-i) for block i, decay^(L+1) for what
    comes before the blocks, 1 for what comes after; a norm between stages goes with the block
    before it."""
    layers = model.config.size.layers
    scales = dict.fromkeys(model.parameters(), 1.0)
    scales.update(dict.fromkeys(model.embed.parameters(), decay ** (layers + 1)))
    for m in model.config.modalities:
        path = model.trunk.path(m)
        for i, block in enumerate(path):
            scales.update(dict.fromkeys(block.parameters(), decay ** (layers - i)))
        if isinstance(model.trunk, avmae.Fusion):
            for stack in model.trunk.stacks(m)[:-1]:
                block = scales[next(stack.blocks[-1].parameters())]
                scales.update(dict.fromkeys(stack.norm.parameters(), block))
    return scales


def optimizer_of(model, args):
    """SGD with momentum, one group for each multiplier of `layer_scales`; no weight decay."""
    groups = {}
    for p, scale in layer_scales(model, args.layer_decay).items():
        if p.requires_grad:
            groups.setdefault(scale, []).append(p)
    return torch.optim.SGD(
        [{"params": p, "scale": s} for s, p in groups.items()], lr=0.0, momentum=args.momentum,
        fused=True)


def targets_of(task, label, classes):
    """Labels (B, K), padded with -1 -> what the logits should be: (B, C), for ave (B, 10, C)."""
    if task == "epic":  # the heads side by side
        return torch.cat([F.one_hot(label[:, i], c) for i, c in enumerate(classes)], dim=1).float()
    if task == "ave":
        return F.one_hot(label, classes[0]).float()
    target = torch.zeros(len(label), classes[0] + 1, device=label.device)
    target.scatter_(1, label.remainder(classes[0] + 1), 1.0)
    return target[:, :-1]  # the padding, -1, falls off the end


def mixup(inputs, labels, lam):
    """Mixes a batch with its reverse: inputs {m: (B, ...)}, labels (B, ...), lam {m: weight} ->
    mixed inputs and {m: labels}; each modality has its own weight."""

    def mix(x, weight):
        return weight * x + (1 - weight) * x.flip(0)

    return {m: mix(x, lam[m]) for m, x in inputs.items()}, {m: mix(labels, lam[m]) for m in inputs}


def classification_loss(logits, labels, kind, smoothing=0.0, heads=None):
    """Mean over modalities of the softmax or sigmoid cross-entropy with smoothed labels.

    logits and labels {m: (B, C)} or {m: (B, S, C)}; sigmoid sums over classes; heads: sizes of
    several softmaxes side by side, whose mean is taken.
    """
    losses = []
    for m, x in logits.items():
        heads = heads or (x.shape[-1],)
        x = x.to(labels[m])  # not in bfloat16
        for part, target in zip(x.split(heads, -1), labels[m].split(heads, -1)):
            target = target * (1 - smoothing) + smoothing / target.shape[-1]
            if kind == "softmax":
                losses.append(-(target * part.log_softmax(-1)).sum(-1).mean())
            else:
                losses.append(
                    F.binary_cross_entropy_with_logits(part, target, reduction="none")
                    .sum(-1)
                    .mean())
    return torch.stack(losses).mean()


def average_precision(scores, positive):
    """Area under precision over recall, (N,) and (N,) bool; equal scores are one threshold."""
    scores, order = scores.sort(descending=True)
    hits = positive[order].double().cumsum(0)
    # of each threshold
    last = torch.cat([scores[1:] != scores[:-1], torch.ones(1, dtype=torch.bool)])
    precision, recall = (hits / torch.arange(1, len(hits) + 1))[last], (hits / hits[-1])[last]
    return (recall.diff(prepend=recall.new_zeros(1)) * precision).sum().item()


def roc_auc(scores, positive):
    """Chance that a positive scores above a negative; half for equal scores. (N,), (N,) bool."""
    _, rank, counts = scores.unique(return_inverse=True, return_counts=True)
    middle = counts.cumsum(0) - (counts - 1) / 2  # mean rank of equal scores, from 1
    p = positive.sum().item()
    return (
        (middle[rank][positive].double().sum() - p * (p + 1) / 2) / (p * (len(scores) - p))).item()


def metrics_of(task, logits, labels, classes):
    """Metrics of all test clips, the main one first. logits (N, C) or (N, 10, C), labels (N, K)."""

    def hit(x, label, k=1):
        return (x.topk(min(k, x.shape[-1]), -1).indices == label[..., None]).any(-1)

    if task == "many":
        target = targets_of(task, labels, classes).bool()
        usable = [c for c in range(classes[0]) if 0 < target[:, c].sum() < len(target)]
        ap = [
            average_precision(logits[:, c], target[:, c])
            for c in range(classes[0])
            if target[:, c].any()]
        auc = sum(roc_auc(logits[:, c], target[:, c]) for c in usable) / max(1, len(usable))
        d_prime = math.sqrt(2) * torch.special.ndtri(torch.tensor(auc, dtype=torch.float64)).item()
        return {"mAP": sum(ap) / max(1, len(ap)), "AUC": auc, "d-prime": d_prime}
    if task == "epic":
        verb, noun = (hit(x, labels[:, i]) for i, x in enumerate(logits.split(classes, -1)))
        return {
            name: x.double().mean().item()
            for name, x in (("action", verb & noun), ("verb", verb), ("noun", noun))}
    if task == "ave":
        return {"segment accuracy": hit(logits, labels).double().mean().item()}
    return {f"top-{k}": hit(logits, labels[:, 0], k).double().mean().item() for k in (1, 5)}


# ---------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def predict(model, inputs, views):
    """Mean logits over modalities and views; inputs {m: (B, views, ...)}, {m: (B, ...)} if one."""
    if views > 1:
        inputs = {m: x.flatten(0, 1) for m, x in inputs.items()}
    logits = torch.stack(list(model(inputs).values())).float().mean(0)
    return logits.unflatten(0, (-1, views)).mean(1) if views > 1 else logits


def evaluate(model, loader, args, device, autocast):
    """All readable test clips in order, on each process: index (N,), logits, labels, unreadable."""
    model.eval()
    rows, bad = [], []
    for batch in loader:
        bad += batch["bad"]
        if len(batch["index"]):
            with autocast():
                logits = predict(model, data.to_device(batch, device), args.views).cpu()
            rows.append((batch["index"], logits, batch["label"]))
    model.train()
    gathered = [(rows, bad)]
    if dist.is_initialized():
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (rows, bad))
    rows, bad = sum((r for r, _ in gathered), []), sum((b for _, b in gathered), [])
    if not rows:
        raise data.UserError("none of the test clips can be read")
    index, logits, labels = (torch.cat(x) for x in zip(*rows))
    order = index.argsort()
    return index[order], logits[order], labels[order], bad


@torch.no_grad()
def embed(model, clips, load, path, device, autocast, turn):
    """Writes an npz: names (N,), and for each modality its pooled features (N, D).

    Done in parts of 64 clips that are kept until all are there: a second run makes what is missing.
    """
    parts = pathlib.Path(f"{path}.parts")
    parts.mkdir(parents=True, exist_ok=True)
    rank, world = turn
    weights = sum(p.double().sum().item() for p in model.parameters())
    about, said = parts / "about.txt", f"{len(clips)} clips of {clips.index.folder}, {weights!r}"
    if rank == 0 and about.exists() and about.read_text() != said:
        raise data.UserError(f"{parts} holds features of other clips or another model: remove it")
    if rank == 0:
        about.write_text(said)
    count = math.ceil(len(clips) / 64)
    for k in tqdm(range(rank, count, world), disable=None if rank == 0 else True):
        if (parts / f"{k}.npz").exists():
            continue
        keys = [(0, i) for i in range(64 * k, min(64 * (k + 1), len(clips)))]
        rows = {"names": []}
        for batch in load(clips, batch_sampler=[keys[j : j + 8] for j in range(0, len(keys), 8)]):
            for name, reason in batch["bad"]:
                tqdm.write(f"unreadable, left out: {name}: {reason}")
            if len(batch["index"]):
                rows["names"] += [clips.name(i) for i in batch["index"].tolist()]
                with autocast():
                    features = model.features(data.to_device(batch, device))
                for m, x in features.items():
                    rows.setdefault(m, []).extend(x.float().cpu().numpy())
        np.savez(parts / f"{k}.partial.npz", **rows)
        os.replace(parts / f"{k}.partial.npz", parts / f"{k}.npz")
    if dist.is_initialized():
        dist.barrier()
    if rank == 0:
        files = [np.load(parts / f"{k}.npz") for k in range(count)]
        files = [f for f in files if len(f["names"])]
        if not files:
            raise data.UserError("none of the clips can be read")
        np.savez(path, **{key: np.concatenate([f[key] for f in files]) for key in files[0].files})
        shutil.rmtree(parts)


def names_and_scores(logits, task, classes, names, top=5):
    """The labels of one clip, best first: [(name, score)] of each head; for ave, of each second."""
    heads = logits.split(classes, -1) if logits.ndim == 1 else logits  # (C_h,) each, or (10, C)
    tops = []
    for head, labels in zip(heads, names if task == "epic" else [names] * len(heads)):
        scores = head.sigmoid() if task == "many" else head.softmax(-1)
        best = scores.topk(min(top, len(scores)))
        tops.append([(labels[i], s) for s, i in zip(best.values.tolist(), best.indices.tolist())])
    return tops


if __name__ == "__main__":
    sys.excepthook = data.one_sentence
    args = parse()
    if (args.predict or args.embed) and not args.eval:
        raise data.UserError("--predict and --embed need a checkpoint: --eval FILE")
    world, rank, device, autocast, say, end = processes(args.device)
    # shares of test clips need not be equal
    local, micro = (0, args.micro_batch or 16) if args.eval else shares(args, world)

    # -----------------------------------------------------------------------------------------
    # Data

    modalities = tuple(m for m in avmae.MODALITIES if m in args.modalities)
    window = data.Window(
        frames=args.frames, step=args.frame_step, size=args.image, seconds=args.seconds,
        mels=args.mels)
    augment = data.Augment(
        flip=args.flip, jitter=args.jitter, colour=args.colour, time_shift=args.time_shift,
        frequency_masks=args.frequency_masks, time_masks=args.time_masks)
    if args.predict or args.embed:
        clips = data.single_clip(args.predict) if args.predict else data.find_clips(args.data)
        train, test, names = (
            None, data.Clips(clips, window, modalities, views=args.views if args.predict else 1),
            None)
    elif args.data:
        labelled = data.labelled_clips(
            args.data, args.annotations, args.val_annotations, args.allow_outside)
        if labelled["train"].task != args.task:
            task = labelled["train"].task
            raise data.UserError(f"these annotations are of --task {task}, not {args.task}")
        train = data.Clips(labelled["train"], window, modalities, augment, args.seed)
        test = data.Clips(labelled["test"], window, modalities, views=args.views)
        names = labelled["train"].classes
    else:
        if args.task != "single":
            raise data.UserError(f"the built-in clips are no --task {args.task}: give --data")
        train = data.Builtin(16 * args.per_class, window, args.seed, modalities)
        test = data.Builtin(args.test_clips, window, 2_000_000 + args.test_seed, modalities)
        names = train.classes
    load = loading(args, device)
    mine = [(0, i) for i in range(rank, len(test), world)]
    group = max(1, micro // args.views)
    test_loader = load(
        test, batch_sampler=[mine[k : k + group] for k in range(0, len(mine), group)])

    # -----------------------------------------------------------------------------------------
    # Model: from a finetuned checkpoint, from pretrained ones, or from scratch

    torch.manual_seed(args.seed)
    out = pathlib.Path(args.out)
    last, best = out / "last.pt", out / "best.pt"
    classes = (97, 300) if args.task == "epic" else (len(names or ()),)
    if args.eval:
        assume = {"fusion_layer": args.fusion_layer or None, "encoder": args.encoder}
        saved, model = avmae.read(args.eval, **assume), avmae.load(args.eval, **assume)
        for note in model.notes:
            say(f"{args.eval}: {note}")
        if args.embed:
            embed(model.to(device), test, load, args.embed, device, autocast, (rank, world))
            say(f"wrote {args.embed}")
            end()
        if not isinstance(model, avmae.Classifier):
            raise data.UserError(
                f"{args.eval} is a pretrained model and knows no labels: finetune it with --init")
        if args.classes:
            names = tuple(pathlib.Path(args.classes).read_text().splitlines())
        elif not saved.get("names"):
            say("the order of its classes is unverified; names are the data's, sorted, or numbers")
        numbers = [tuple(f"{i}" for i in range(c)) for c in model.config.classes]
        names = saved.get("names") or names or (numbers if len(numbers) > 1 else numbers[0])
        if sum(model.config.classes) != sum(classes) and not args.predict:
            raise data.UserError(
                f"{args.eval} tells {sum(model.config.classes)} classes apart, these clips have "
                f"{sum(classes)}")
        classes = model.config.classes
    else:
        sources = []  # (the streams that a checkpoint is for, its path, its model)
        for given in args.init:
            named = "=" in given and not os.path.exists(given)  # a path may have one, too
            stream, path = given.split("=", 1) if named else (None, given)
            source = avmae.load(path, encoder="shared")
            if not isinstance(source, avmae.AVMAE):
                raise data.UserError(f"{path} is a finetuned model: --init takes pretrained ones")
            own = [m for m in source.config.modalities if m in modalities]
            several = own if len(args.init) > 1 else None
            sources.append(([stream] if stream else several, path, source))
        model = avmae.Classifier(config_of(args, classes, [source for *_, source in sources]))
        fresh = dict(model.named_parameters())
        for streams, path, source in sources:
            taken, rest = avmae.transfer(source, model, streams)
            fresh = {name: fresh[name] for name in rest if name in fresh}
            for line in (*source.notes, f"taken: {', '.join(taken)}"):
                say(f"{path}: {line}")
        say(f"fresh: {', '.join(fresh) if sources else 'everything'}")
    model.to(device)
    if args.model == "probe":
        model.embed.requires_grad_(False)
        model.trunk.requires_grad_(False)
    if args.dry_run:
        with torch.device("meta"):
            clip = {
                m: torch.zeros(1, *model.config.shape[m], *([3] if m == "video" else []))
                for m in modalities}
            counter = FlopCounterMode(display=False)
            with counter:
                sum(x.sum() for x in avmae.Classifier(model.config)(clip).values()).backward()
        say(json.dumps(vars(args), indent=1))
        say(
            f"{sum(p.numel() for p in model.parameters()):,} parameters, "
            f"{counter.get_total_flops() / 1e9:.2f} GFLOP a clip, forward and backward")
        end()

    def test_now(source):
        """Evaluates, prints the results, and writes them to results.json with what they are of."""
        index, logits, labels, bad = evaluate(model, test_loader, args, device, autocast)
        metrics = metrics_of(args.task, logits, labels, classes)
        for name, reason in dict(bad).items():
            say(f"unreadable, left out: {name}: {reason}")
        say(
            ", ".join(f"{k} {v:.4f}" for k, v in metrics.items())
            + f" of {len(index)} clips, {len(dict(bad))} unreadable")
        if rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            about = {
                "metrics": metrics, "clips": len(index), "unreadable": len(dict(bad)),
                "checkpoint": str(source)}
            (out / "results.json").write_text(
                json.dumps(about | {"settings": vars(args)}, indent=1))
        if rank == 0 and args.predictions:
            with open(args.predictions, "w", newline="") as file:
                for i, x in zip(index.tolist(), logits):
                    pairs = sum(names_and_scores(x, args.task, classes, names), [])
                    csv.writer(file).writerow([test.name(i), *(cell for p in pairs for cell in p)])
        return metrics

    if args.predict:
        clip = test[0, 0]
        if clip["bad"] and len(modalities) == 2:
            say(f"{args.predict}: {clip['bad'][0][1]}; trying the picture alone")
            clip = data.Clips(test.index, window, ("video",), views=args.views)[0, 0]
        elif (
            "audio" in clip
            and (clip["audio"] <= math.log(2 * data.MEL_OFFSET)).all()
            and len(modalities) == 2):
            say(f"{args.predict}: silent; the picture alone is used")
            del clip["audio"]
        if clip["bad"]:
            raise data.UserError(f"{args.predict}: {clip['bad'][0][1]}")
        inputs = data.to_device(data.collate([clip]), device)
        with torch.no_grad(), autocast():
            logits = predict(model.eval(), inputs, args.views)[0].cpu()
        for top in names_and_scores(logits, args.task, classes, names):
            say("  ".join(f"{name} {score:.3f}" for name, score in top))
        end()
    if args.eval:
        test_now(args.eval)
        end()

    # -----------------------------------------------------------------------------------------
    # Schedule, and where we are

    optimizer = optimizer_of(model, args)
    steps_per_epoch = max(1, len(train) // args.batch)
    steps, warmup = args.epochs * steps_per_epoch, args.warmup * steps_per_epoch
    peak = args.lr * args.batch / (PRESETS[args.preset].get("batch") or SETTINGS["batch"][0])
    alpha = args.mixup[2 if len(modalities) == 2 else ("audio", "video").index(modalities[0])]
    drop = 0.0 if args.model == "probe" else args.drop_path
    start, best_metric = 0, -1.0
    if last.exists():
        saved = resume(last, model, optimizer, args, FREE)
        start, best_metric = saved["step"], saved["best"]
        say(f"resuming {last} at step {start} of {steps}")
    net = for_training(model, args, world, device)
    progress = Progress(args, train, start, steps, steps_per_epoch, (world, rank, device))

    def rows_of(tensors, first, count):
        """Rows of a process's micro-batch of what was drawn for the global batch."""
        at = rank * local + first
        return {
            m: x[:, :, at : at + count].to(device, non_blocking=True) for m, x in tensors.items()}

    # -----------------------------------------------------------------------------------------
    # The loop

    batches = data.Batches(len(train), args.batch, args.seed, start, steps, rank, world)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for step, batch in progress.batches(load(train, batch_sampler=batches)):
        inputs = data.to_device(batch, device)
        target = targets_of(args.task, batch["label"].to(device), classes)
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        keep = (
            avmae.draw_keep(drop, model.config.size.layers, modalities, args.batch, generator)
            if drop
            else None)
        total = 0
        for k in range(0, local, micro):
            part = {m: x[k : k + micro] for m, x in inputs.items()}
            labels = {m: target[k : k + micro] for m in part}
            if alpha:
                draw = np.random.default_rng([args.seed, step, (rank * local + k) // micro])
                part = {
                    m: x * (2 / 255) - 1 if x.dtype == torch.uint8 else x for m, x in part.items()}
                part, labels = mixup(
                    part, labels[modalities[0]], {m: draw.beta(alpha, alpha) for m in modalities})
            with net.no_sync() if world > 1 and k + micro < local else nullcontext():
                with autocast():
                    logits = net(part, rows_of(keep, k, micro) if keep else None)
                loss = classification_loss(
                    logits, labels, "sigmoid" if args.task == "many" else "softmax", args.smoothing,
                    classes if args.task == "epic" else None)
                (loss * (micro / local)).backward()
            total = total + loss.detach() * (micro / local)
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip_grad or math.inf)
        # the fused step is not taken where this is 1, without a synchronisation
        optimizer.found_inf = (~norm.isfinite()).float()
        rate = learning_rate(step, peak, warmup, steps)
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not progress.due(torch.stack([total, norm]), batch["index"]):
            continue

        stopped = progress.report(["loss"], rate)
        tested = progress.crossed(args.eval_every)
        metrics = test_now(last) if tested else {}
        better = tested and next(iter(metrics.values())) > best_metric
        best_metric = next(iter(metrics.values())) if better else best_metric
        if rank == 0 and (stopped or tested or progress.crossed(args.save_every)):
            state = dict(
                names=names, settings=vars(args), step=progress.done, best=best_metric,
                metrics=metrics)
            avmae.save(model, last, **state, optimizer=optimizer.state_dict())
            if better:
                avmae.save(model, best, **state)
        if stopped:
            say(f"stopped at step {progress.done} of {steps}; the same command continues")
            end(0 if progress.done == steps else 1)
    if start == steps:
        test_now(last)
    say(f"checkpoints {last} and {best}, results {out / 'results.json'}")
    end()
