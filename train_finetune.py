"""Finetunes and evaluates a classifier (Sec. 4.1 of the paper; recipes: Tables 22-24).

    torchrun train_finetune.py --init runs/demo/last.pt              # built-in clips
    torchrun --nproc_per_node=8 train_finetune.py --preset vggsound --data clips/ \\
        --annotations vggsound.csv --init runs/vggsound/last.pt
    python train_finetune.py --eval runs/finetune/best.pt            # evaluates only
    python train_finetune.py --eval runs/finetune/best.pt --predict clip.mp4

The same command resumes. `Run` and `Log`, which both scripts use, are in train_pretrain.py.
"""

import csv
import json
import math
import os
import sys
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import avmae
import data
import train_pretrain
from train_pretrain import (
    CLIP, DATA, FOREIGN, RUN, Log, Run, learning_rate, modalities_of, window_of)

# ---------------------------------------------------------------------------------------------
# Settings by group, as name: (default, what it is). A preset overrides a default, a flag a preset.

MODEL = {  # fixed for a run
    "size": ("base", "of the model"),
    "model": ("mbt", "mbt, encoder (the pretrained one, Table 14) or probe (linear, Table 18)"),
    "fusion_layer": (0, "first layer of MBT with bottlenecks; 0: at 2/3 of the depth"),
}
RECIPE = {  # fixed for a run
    "per_class": (40, "built-in training clips of each class"),
    "test_clips": (1024, "number of built-in test clips"),
    "views": (4, "windows of a test clip, whose logits are averaged"),
    "epochs": (50, "passes over the training clips"),
    "batch": (64, "clips a step, over all processes"),
    "lr": (0.8, "peak learning rate for the preset's batch; scaled linearly for another"),
    "warmup": (2.5, "epochs of linear warm-up"),
    "layer_decay": (0.75, "learning rate of a block against that of the next"),
    "smoothing": (0.3, "label smoothing"),
    "drop_path": (0.3, "stochastic depth of the last block"),
    "mixup": ((0.5, 0.5, 0.5), "alpha if a model has audio alone, video alone, or both; 0: off"),
    "augment": ("vggsound", "augmentation of a data set's recipe; -released: without time masks"),
    "seed": (0, "of weights, order, augmentation, and of built-in clips"),
}
FINETUNE_ONLY = {
    "val_annotations": ("", "annotation file of the test clips, if it is another one"),
    "init": ((), "pretrained checkpoint; several: each for its modalities, or as video=FILE"),
    "eval": ("", "evaluate this checkpoint: a run of no steps"),
    "predict": ("", "with --eval: print the labels of this video file"),
    "embed": ("", "with --eval: write the features of all clips of --data to this npz"),
}
TWICE = {  # other defaults of CLIP: the same 2.56 s in twice as many frames
    "frames": (32, "video frames of a clip"),
    "frame_step": (0.08, "seconds between frames; stride 2 at 25 frames/s"),
}
GROUPS = {
    "data": DATA | FINETUNE_ONLY, "clips": CLIP | TWICE, "model": MODEL, "recipe": RECIPE,
    "run": RUN}

VGGSOUND = data.Augment(  # jitter: of height and width, before the crop; masks: how many, widest
    jitter=(0.9, 1.33), color=True, frequency_masks=(1, 48), time_masks=(4, 48))
AUGMENT = {
    "none": data.Augment(flip=False),
    "vggsound": VGGSOUND,
    "epic": replace(VGGSOUND, time_shift=True),
    "audioset": replace(VGGSOUND, time_shift=True, frequency_masks=(2, 36)),
}
AUGMENT |= {
    f"{name}-released": replace(AUGMENT[name], time_masks=(0, 0))
    for name in ("vggsound", "epic", "audioset")}

PRESETS = {  # Tables 22, 23, 24; ave: the recipe of vggsound for a base model, one view of 10 s
    "demo": dict(  # settings chosen on other seeds than those that the README reports
        size="demo", frames=8, frame_step=0.32, image=32, tubelet=(2, 8, 8), seconds=2.56, mels=32,
        norm=(-0.5, 0.41, 1.5, 1.4), views=1, batch=16, lr=0.5, epochs=30, smoothing=0.1,
        drop_path=0.0, mixup=(0.0, 0.0, 0.0), augment="none"),
    "vggsound": dict(size="large"),
    "epic": dict(size="large", lr=1.2, mixup=(1.25, 0.5, 0.5), augment="epic"),
    "audioset": dict(
        size="large", fusion_layer=18, seconds=10.0, batch=128, lr=1.6, mixup=(1.25, 0.5, 0.5),
        augment="audioset"),
    "ave": dict(frame_step=10 / 32, seconds=10.0, views=1),
}
SIZES = {name: encoder for name, (encoder, _) in train_pretrain.SIZES.items()}
CHOICES = train_pretrain.CHOICES | {
    "model": ("mbt", "encoder", "probe"), "augment": tuple(AUGMENT), "size": tuple(SIZES)}

MOMENTUM = 0.9  # of SGD
CLIP_GRAD = 1.0  # largest norm of the gradient


def parse_args(argv=None):
    args = train_pretrain.parse(__doc__, GROUPS, PRESETS, CHOICES, argv)
    folder = "runs/finetune" if args.preset == "demo" else f"runs/finetune-{args.preset}"
    args.out = args.out or ("runs/eval" if args.eval else folder)
    avmae.require(
        args.eval or not (args.predict or args.embed),
        "--predict and --embed need a checkpoint: --eval FILE")
    return args


def config_of(args, num_classes, task="single", sources=()):
    """The classifier's config; what pretrained models decide comes from the first of `sources`."""
    size, first = SIZES[args.size], sources[0].config if sources else avmae.PretrainConfig()
    known = first.modalities if sources else {}  # those are normalized as in pretraining
    modalities = {
        m: replace(x, mean=known.get(m, x).mean, std=known.get(m, x).std)
        for m, x in modalities_of(args).items()}

    mbt = args.model == "mbt"
    return avmae.ClassifierConfig(
        modalities, size, "mbt" if mbt else first.encoder,
        args.fusion_layer or size.depth * 2 // 3, num_joint=first.num_joint,
        drop_path=0.0 if args.model == "probe" else args.drop_path,
        modality_embed=first.modality_embed and not mbt, num_classes=num_classes,
        num_segments=10 if task == "ave" else 1)


def clips_of(args):
    """The clips to train on and those to test on, what their labels mean, and their names."""
    window, modalities = window_of(args), args.modalities
    if not args.data:
        count = len(data.Builtin.classes) * args.per_class
        train = data.Builtin(count, window, args.seed, modalities)
        test = data.Builtin(args.test_clips, window, 2_000_000 + args.seed, modalities)
        return train, test, "single", train.classes

    labeled = data.labeled_clips(
        args.data, args.annotations, args.val_annotations, args.allow_outside, modalities)
    train, test = labeled["train"], labeled["test"]
    return (
        data.Clips(train, window, modalities, AUGMENT[args.augment], args.seed),
        data.Clips(test, window, modalities, views=args.views), train.task, train.classes)


# ---------------------------------------------------------------------------------------------
# The recipe: layer-wise decay, mixup, losses, metrics


def layer_scales(model, decay):
    """{parameter: multiplier of the learning rate}: decay^(L-i) for block i, from 0; decay^(L+1)
    for what comes before the blocks; 1 for what comes after, and for MBT's new bottleneck; a norm
    between stages goes with the block before it."""
    depth = model.config.size.depth
    scales = dict.fromkeys(model.parameters(), 1.0)
    scales.update(dict.fromkeys(model.patch_embed.parameters(), decay ** (depth + 1)))

    for m in model.config.modalities:
        for i, block in enumerate(model.trunk.path(m)):
            scales.update(dict.fromkeys(block.parameters(), decay ** (depth - i)))

        if isinstance(model.trunk, avmae.Fusion):
            for stack in model.trunk.stacks(m)[:-1]:
                scale = scales[next(stack.blocks[-1].parameters())]
                scales.update(dict.fromkeys(stack.norm.parameters(), scale))

    return scales


def make_optimizer(model, args):
    """SGD with momentum, one group for each multiplier of `layer_scales`; no weight decay."""
    groups = {}
    for p, scale in layer_scales(model, args.layer_decay).items():
        if p.requires_grad:
            groups.setdefault(scale, []).append(p)

    optimizer = torch.optim.SGD(
        [{"params": p, "scale": s} for s, p in groups.items()], lr=0.0, momentum=MOMENTUM,
        fused=True)
    for p in sum(groups.values(), []):  # else undefined where `found_inf` skips the first step
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def targets_of(task, label, num_classes):
    """Labels (B, K), padded with -1 -> what the logits should be: (B, C), for ave (B, 10, C).

    task: "single" or "many" labels a clip, "epic" (a verb and a noun), "ave" (a label a second).
    """
    if task == "epic":  # the heads side by side
        heads = [F.one_hot(label[:, i], count) for i, count in enumerate(num_classes)]
        return torch.cat(heads, dim=1).float()
    if task == "ave":
        return F.one_hot(label, num_classes[0]).float()

    target = torch.zeros(len(label), num_classes[0] + 1, device=label.device)
    target.scatter_(1, label.remainder(num_classes[0] + 1), 1.0)
    return target[:, :-1]  # the padding, -1, falls off the end


def mixup(inputs, labels, lam):
    """Mixes a batch with its reverse: inputs {m: (B, ...)}, labels (B, ...), lam {m: weight} ->
    mixed inputs and {m: labels}; each modality has its own weight."""

    def mix(x, weight):
        return weight * x + (1 - weight) * x.flip(0)

    return {m: mix(x, lam[m]) for m, x in inputs.items()}, {m: mix(labels, lam[m]) for m in inputs}


def mixed(inputs, target, alpha, *seeds):
    """`mixup` with weights from Beta(alpha, alpha), bytes as numbers in [-1, 1]; alpha 0: none."""
    if not alpha:
        return inputs, {m: target for m in inputs}

    rng = np.random.default_rng(seeds)
    lam = {m: rng.beta(alpha, alpha) for m in inputs}
    inputs = {m: x * (2 / 255) - 1 if x.dtype == torch.uint8 else x for m, x in inputs.items()}
    return mixup(inputs, target, lam)


def classification_loss(logits, labels, kind, smoothing=0.0, heads=None):
    """Mean over modalities of the softmax or sigmoid cross-entropy with smoothed labels.

    logits and labels {m: (B, C)} or {m: (B, segments, C)}; sigmoid sums over classes; heads: sizes
    of several softmaxes side by side, whose mean is taken.
    """
    losses = []
    for m, x in logits.items():
        sizes = heads or (x.shape[-1],)
        x = x.to(labels[m])  # not in bfloat16

        for part, target in zip(x.split(sizes, -1), labels[m].split(sizes, -1)):
            target = target * (1 - smoothing) + smoothing / target.shape[-1]
            loss = (
                -target * part.log_softmax(-1)
                if kind == "softmax"
                else F.binary_cross_entropy_with_logits(part, target, reduction="none"))
            losses.append(loss.sum(-1).mean())

    return torch.stack(losses).mean()


def average_precision(scores, positive):
    """Area under precision over recall, (N,) and (N,) bool; equal scores are one threshold."""
    scores, order = scores.sort(descending=True)
    hits = positive[order].double().cumsum(0)
    last = torch.cat([scores[1:] != scores[:-1], torch.ones(1, dtype=torch.bool)])  # of equal ones

    precision, recall = (hits / torch.arange(1, len(hits) + 1))[last], (hits / hits[-1])[last]
    return (recall.diff(prepend=recall.new_zeros(1)) * precision).sum().item()


def roc_auc(scores, positive):
    """Chance that a positive scores above a negative; half for equal scores. (N,), (N,) bool."""
    _, rank, counts = scores.unique(return_inverse=True, return_counts=True)
    middle = counts.cumsum(0) - (counts - 1) / 2  # mean rank of equal scores, from 1

    ranks, p = middle[rank][positive].double().sum(), positive.sum()
    return ((ranks - p * (p + 1) / 2) / (p * (len(scores) - p))).item()


def metrics_of(task, logits, labels, num_classes):
    """Metrics of all test clips, the main one first. logits (N, C) or (N, 10, C), labels (N, K)."""

    def hit(x, label, k=1):
        return (x.topk(min(k, x.shape[-1]), -1).indices == label[..., None]).any(-1)

    if task == "many":
        return ranking_metrics(logits, targets_of(task, labels, num_classes).bool())

    if task == "epic":
        heads = logits.split(num_classes, -1)
        verb, noun = (hit(x, labels[:, i]) for i, x in enumerate(heads))
        found = {"action": verb & noun, "verb": verb, "noun": noun}
    elif task == "ave":
        found = {"segment accuracy": hit(logits, labels)}
    else:
        found = {f"top-{k}": hit(logits, labels[:, 0], k) for k in (1, 5)}

    return {name: x.double().mean().item() for name, x in found.items()}


def ranking_metrics(logits, target):
    """Of several labels a clip, (N, C) and (N, C) bool; classes without positives are left out."""
    counts = target.sum(0)
    some = [c for c in range(len(counts)) if counts[c]]
    usable = [c for c in some if counts[c] < len(target)]

    total = sum(average_precision(logits[:, c], target[:, c]) for c in some)
    auc = sum(roc_auc(logits[:, c], target[:, c]) for c in usable) / max(1, len(usable))
    d_prime = math.sqrt(2) * torch.special.ndtri(torch.tensor(auc, dtype=torch.float64)).item()
    return {"mAP": total / max(1, len(some)), "AUC": auc, "d-prime": d_prime}


# ---------------------------------------------------------------------------------------------
# The model: from a finetuned checkpoint, from pretrained ones, or from scratch


def load_classifier(path, run, num_classes=(), names=()):
    """A finetuned model, how its labels are meant and their names; of a foreign one, a guess and
    numbers. UserError if it is none, or knows other classes than are given."""
    saved, model = avmae.load_checkpoint(path, **FOREIGN), run.load_model(path)
    avmae.require(
        isinstance(model, avmae.Classifier),
        f"{path} is a pretrained model and knows no labels: finetune it with --init")

    known = model.config.num_classes
    avmae.require(
        not num_classes or sum(known) == sum(num_classes),
        f"{path} tells {sum(known)} classes apart, these clips have {sum(num_classes)}")
    avmae.require(
        not names or json.dumps(saved.get("names", names)) == json.dumps(names),
        f"{path} knows other classes than these clips have")

    numbers = [[str(i) for i in range(count)] for count in known]
    guess = "epic" if len(known) > 1 else "many" if known == (527,) else "single"
    task = saved.get("task", guess)
    return model, task, saved.get("names", numbers if task == "epic" else numbers[0])


def make_classifier(args, run, task, num_classes):
    """A new model, with what --init gives it."""
    sources = []  # (the streams that a checkpoint is for, its path, its model)
    for given in args.init:
        named = "=" in given and not os.path.exists(given)  # a path may have one, too
        stream, path = given.split("=", 1) if named else (None, given)

        source = run.load_model(path)
        avmae.require(
            isinstance(source, avmae.AVMAE),
            f"{path} is a finetuned model: --init takes pretrained ones")
        own = [m for m in source.config.modalities if m in args.modalities]
        sources.append(([stream] if stream else own if len(args.init) > 1 else None, path, source))

    model = avmae.Classifier(config_of(args, num_classes, task, [x for *_, x in sources]))
    fresh = dict(model.named_parameters())
    for streams, path, source in sources:
        taken, rest = avmae.transfer(source, model, streams)
        fresh = {name: fresh[name] for name in rest if name in fresh}
        run.print(f"{path}: taken: {', '.join(taken)}")

    run.print(f"fresh   {', '.join(fresh) if sources else 'everything'}")
    if args.model == "probe":
        model.patch_embed.requires_grad_(False)
        model.trunk.requires_grad_(False)
    return model


# ---------------------------------------------------------------------------------------------
# Evaluation


def predict(model, inputs, views):
    """Mean logits over modalities and views; inputs {m: (B, views, ...)}, {m: (B, ...)} if one."""
    if views > 1:
        inputs = {m: x.flatten(0, 1) for m, x in inputs.items()}
    logits = torch.stack(list(model(inputs).values())).float().mean(0)
    return logits.unflatten(0, (-1, views)).mean(1) if views > 1 else logits


@torch.no_grad()
def collect(clips, run, function):
    """What a function of inputs {m: (B, ...)} says, {name: (B, ...)}, of all clips that can be
    read, in order and on every process -> {name: (N, ...)}, with "index" and "label"; and how many
    clips cannot. UserError if none can."""
    loader, rows = run.load(clips), []

    for batch in loader:
        with run.autocast:
            found = function({m: batch[m] for m in run.args.modalities})
        found |= {name: batch[name] for name in ("index", "label")}
        rows.append({name: x.cpu() for name, x in found.items()})

    rows, bad = zip(*run.gather((rows, loader.bad)))
    rows, bad = sum(rows, []), set().union(*bad)
    avmae.require(rows, "none of the clips can be read")
    found = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    order = found["index"].argsort()
    return {name: x[order] for name, x in found.items()}, len(bad)


def test_all(model, clips, run, task, names):
    """Metrics of all test clips, printed and in results.json, and predictions.csv -> metrics."""
    model.eval()
    found, unreadable = collect(
        clips, run, lambda inputs: {"logits": predict(model, inputs, run.args.views)})
    model.train()

    index, logits, num_classes = found["index"].tolist(), found["logits"], model.config.num_classes
    metrics = metrics_of(task, logits, found["label"], num_classes)
    figures = ", ".join(f"{k} {v:.4f}" for k, v in metrics.items())
    run.print(f"{figures} of {len(index)} clips, {unreadable} unreadable")

    run.write("results.json", {
        "metrics": metrics, "clips": len(index), "unreadable": unreadable,
        "settings": vars(run.args)})
    if run.rank == 0:
        with open(run.out / "predictions.csv", "w", newline="") as file:
            for i, x in zip(index, logits):
                pairs = sum(top_labels(x, task, num_classes, names), [])
                csv.writer(file).writerow([clips.name(i), *(cell for p in pairs for cell in p)])

    return metrics


def top_labels(logits, task, num_classes, names, top=5):
    """The labels of one clip, best first: [(name, score)] of each head; for ave, of each second."""
    heads = logits.split(num_classes, -1) if logits.ndim == 1 else logits  # (C,) each, or (10, C)

    tops = []
    for head, labels in zip(heads, names if task == "epic" else [names] * len(heads)):
        scores = head.sigmoid() if task == "many" else head.softmax(-1)
        best = scores.topk(min(top, len(scores)))
        tops.append([(labels[i], s) for s, i in zip(best.values.tolist(), best.indices.tolist())])
    return tops


@torch.no_grad()
def predict_file(model, run, task, names):
    """Prints the labels of the file --predict; by its picture alone where it has no sound."""
    args = run.args

    def read(modalities):
        clips = data.find_clips(args.predict, modalities)
        return data.Clips(clips, window_of(args), modalities, views=args.views)[0, 0, 0]

    clip = read(args.modalities)
    silent = "audio" in clip and bool((clip["audio"] <= math.log(2 * data.MEL_OFFSET)).all())
    if (clip["bad"] or silent) and len(args.modalities) == 2:
        why = clip["bad"][0][1] if clip["bad"] else "silent"
        clip = read(("video",))
        if not clip["bad"]:
            run.print(f"{args.predict}: {why}; the picture alone is used")

    if clip["bad"]:
        raise avmae.UserError(f"{args.predict}: {clip['bad'][0][1]}")

    inputs = {m: clip[m][None].to(run.device) for m in args.modalities if m in clip}
    with run.autocast:
        logits = predict(model.to(run.device).eval(), inputs, args.views)[0].cpu()
    for top in top_labels(logits, task, model.config.num_classes, names):
        run.print("  ".join(f"{name} {score:.3f}" for name, score in top))


def embed(model, run):
    """Writes an npz: names (N,), and of each modality the pooled features (N, D) of all clips."""
    args, model = run.args, model.to(run.device)
    clips = data.Clips(
        data.find_clips(args.data, args.modalities), window_of(args), args.modalities)
    found, _ = collect(
        clips, run, lambda inputs: {m: x.float() for m, x in model.features(inputs).items()})

    if run.rank == 0:
        names = [clips.name(i) for i in found["index"].tolist()]
        features = {m: x.numpy() for m, x in found.items() if m in args.modalities}
        np.savez(args.embed, names=names, **features)
    run.print(f"wrote {args.embed}")


if __name__ == "__main__":
    sys.excepthook = train_pretrain.one_sentence
    args = parse_args()
    run = Run(args)

    if args.embed:
        embed(run.load_model(args.eval), run)
        run.end()
    if args.predict:
        model, task, names = load_classifier(args.eval, run)
        predict_file(model, run, task, names)
        run.end()

    # -----------------------------------------------------------------------------------------
    # Clips, model, and what is going to happen

    torch.manual_seed(args.seed)
    # task: labels are "single", "many", "epic" (verb and noun) or "ave" (one a second).
    train, test, task, names = clips_of(args)
    num_classes = (97, 300) if task == "epic" else (len(names),)  # 97 verbs, 300 nouns
    if args.eval:
        model, *_ = load_classifier(args.eval, run, num_classes, names)
    else:
        # Weights of --init, the rest and a new head at random; of a probe the head alone trains.
        model = make_classifier(args, run, task, num_classes)

    steps_per_epoch = max(1, len(train) // args.batch)
    steps = 0 if args.eval else args.epochs * steps_per_epoch  # an evaluation is a run of no steps
    run.say(model, train, test, steps, steps_per_epoch)  # with --dry-run, the end

    # -----------------------------------------------------------------------------------------
    # Optimizer, and where we are

    model.to(run.device)
    # SGD with momentum, no weight decay. A group's rate is the schedule's times its "scale":
    # layer_decay^(L - i) for block i = 0 ... L - 1, less for the patch embeddings, 1 for the head.
    optimizer = make_optimizer(model, args)
    saved = run.resume(model, optimizer)
    start, best = saved["step"], saved.get("best", -1.0)

    net = run.wrap(model)  # the same model; compiled if asked for, in DDP if not alone
    # Batches as in pretraining; --augment is applied to a file's window as it is read.
    loader = run.load(train, steps=range(start, steps))
    log = Log(run, train, loader, ["loss"], start, steps, steps_per_epoch)

    warmup = args.warmup * steps_per_epoch
    # --lr is meant for the preset's batch; for another it is scaled.
    preset_batch = PRESETS[args.preset].get("batch", RECIPE["batch"][0])
    peak = args.lr * args.batch / preset_batch
    audio, video, both = args.mixup
    alpha = {("audio",): audio, ("video",): video}.get(args.modalities, both)

    kind = "sigmoid" if task == "many" else "softmax"
    heads = num_classes if task == "epic" else None  # a softmax over verbs, one over nouns

    def look(best):
        """Tests; keeps the model in best.pt if it is the best so far -> the best.

        There is no third split: best.pt is chosen on the test clips. results.json, which `test_all`
        writes, stays that of the last model.
        """
        metrics = test_all(model, test, run, task, names)
        metric = next(iter(metrics.values()))  # the main one
        log.write({"step": log.done, "held_out": metrics})

        if metric > best and not args.eval:
            run.save(model, "best.pt", step=log.done, metrics=metrics, task=task, names=names)
        return max(best, metric)

    # -----------------------------------------------------------------------------------------
    # The loop

    batches = iter(loader)  # on the device, a micro-batch of this process at a time
    count = len(run.micro_batches)
    bar = tqdm(range(start, steps), initial=start, total=steps, disable=run.rank > 0 or None)

    for step in bar:
        total, index = 0, []

        # Gradient accumulation: the micro-batches are slices of the global batch.
        for rows in run.micro_batches:
            batch = next(batches)  # {video: (b, T, H, W, 3) bytes, audio: (b, T, F), label: (b, K)}
            inputs = {m: batch[m] for m in model.config.modalities}
            target = targets_of(task, batch["label"], num_classes)  # (b, C), for AVE (b, 10, C)
            index.append(batch["index"])

            # Mixup (alpha 0: none): clip k with clip b-1-k of the micro-batch, by one weight for
            # each modality, from Beta(alpha, alpha); labels by the same, so they are {m: (b, C)}.
            part = rows.start // run.micro  # which micro-batch of the step, over all processes
            inputs, labels = mixed(inputs, target, alpha, args.seed, step, part)

            # What DropPath draws depends on (seed, step, part): a resumed run draws the same.
            torch.manual_seed((args.seed * 1_000_003 + step) * args.batch + part)
            net.require_backward_grad_sync = rows == run.micro_batches[-1]  # when DDP averages
            with run.autocast:
                logits = net(inputs)  # {m: (b, C)}

            # Cross-entropy with smoothed labels, averaged over modalities.
            loss = classification_loss(logits, labels, kind, args.smoothing, heads)
            (loss / count).backward()
            total = total + loss.detach() / count

        rate = learning_rate(step, peak, warmup, steps)  # linear warm-up, then a cosine to 0
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * rate
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD)
        optimizer.found_inf = (~norm.isfinite()).float()  # skips it, as in pretraining
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        log.note(step, total[None], norm, torch.cat(index))
        if log.done % args.log_every == 0 or log.done == steps:
            log.report(rate)
            if log.passed_epochs(args.eval_every):
                best = look(best)
            log.save(model, optimizer, best=best, task=task, names=names)

    # -----------------------------------------------------------------------------------------
    # How well it classifies: a finished run, and one of no steps (--eval)

    look(best)
    log.curves()
    run.end()
