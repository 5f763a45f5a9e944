"""Finetune and evaluate a classifier (Sec. 4.1; recipes: Tables 22-24).

    torchrun train_finetune.py --init runs/demo/last.pt              # built-in clips
    torchrun --nproc_per_node=8 train_finetune.py --preset vggsound --data clips/ \\
        --clips vggsound.clips.csv --init runs/vggsound/last.pt
    python train_finetune.py --eval runs/finetune/best.pt            # evaluate only
    python train_finetune.py --eval runs/finetune/best.pt --predict clip.mp4

The same command resumes a stopped run. `Run` and `Log` are in train_pretrain.py.
"""

import argparse
import csv
import json
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
    Log, Run, differences, learning_rate, make_modalities, make_window, num_steps, positive)

# ---------------------------------------------------------------------------------------------
# Settings: flags, and the presets that set their defaults

VGGSOUND = data.Augment(  # jitter of height and width; masks: number, largest width
    jitter=(0.9, 1.33), color=True, frequency_masks=(1, 48), time_masks=(4, 48))
AUGMENT = {
    "none": data.Augment(flip=False),
    "vggsound": VGGSOUND,
    "epic": replace(VGGSOUND, time_shift=True),
    "audioset": replace(VGGSOUND, time_shift=True, frequency_masks=(2, 36)),
}

TWICE = dict(frames=32, frame_step=0.08)  # the 2.56 s of pretraining in twice as many frames
PRESETS = {  # Tables 22, 23, 24; ave: the recipe of vggsound for a base model, one window of 10 s
    "demo": dict(  # settings chosen on other seeds than those reported in the README
        size="demo", frames=8, frame_step=0.32, image=32, tubelet=(2, 8, 8), seconds=2.56, mels=32,
        norm=(-0.5, 0.41, 1.5, 1.4), views=1, batch=16, lr=0.5, epochs=30, smoothing=0.1,
        drop_path=0.0, mixup=(0.0, 0.0, 0.0), augment="none"),
    "vggsound": dict(TWICE, size="large"),
    "epic": dict(TWICE, size="large", lr=1.2, mixup=(1.25, 0.5, 0.5), augment="epic"),
    "audioset": dict(
        TWICE, size="large", fusion_layer=18, seconds=10.0, batch=128, lr=1.6,
        mixup=(1.25, 0.5, 0.5), augment="audioset"),
    "ave": dict(frames=32, frame_step=10 / 32, seconds=10.0, views=1),
}
MODEL_SIZES = {name: encoder for name, (encoder, _) in train_pretrain.MODEL_SIZES.items()}

MOMENTUM = 0.9  # of SGD
CLIP_GRAD = 1.0  # largest norm of the gradient


def parse_args(argv=None):
    """Parse the flags of finetuning."""
    parser = train_pretrain.make_parser(__doc__, PRESETS)

    add = parser.add_argument_group("model").add_argument
    add("--size", choices=MODEL_SIZES, default="base", help="model size")
    add("--model", choices=("mbt", "encoder", "probe"), default="mbt",
        help="MBT, the pretraining encoder (Table 14), or a linear probe of it (Table 18)")
    add("--fusion-layer", type=int, default=0,
        help="first MBT layer with bottleneck tokens; 0: two thirds of the depth")

    add = parser.add_argument_group("recipe").add_argument
    add("--init", nargs="+", default=(), metavar="CHECKPOINT",
        help="pretrained weights; several: each for its modalities, or as video=FILE audio=FILE")
    add("--per-class", type=positive, default=40, help="built-in training clips per class")
    add("--test-clips", type=positive, default=1024, help="number of built-in test clips")
    add("--views", type=positive, default=4, help="windows per test clip, averaged")
    add("--epochs", type=float, default=50, help="passes over the training clips")
    add("--batch", type=positive, default=64, help="clips per step over all processes")
    add("--lr", type=float, default=0.8, help="peak learning rate for the preset's batch size")
    add("--warmup", type=float, default=2.5, help="epochs of linear warm-up before cosine decay")
    add("--layer-decay", type=float, default=0.75, help="factor of the rate from block to block")
    add("--smoothing", type=float, default=0.3, help="label smoothing")
    add("--drop-path", type=float, default=0.3, help="stochastic depth of the last block")
    add("--mixup", type=float, nargs=3, default=(0.5, 0.5, 0.5), metavar=("A", "V", "AV"),
        help="alpha for audio only, video only and audiovisual models; 0 disables mixup")
    add("--augment", choices=AUGMENT, default="vggsound", help="augmentation of this data set")
    add("--time-masks", action=argparse.BooleanOptionalAction, default=True,
        help="SpecAugment's time masks, which the release disables")
    add("--seed", type=int, default=0, help="seed of weights, order and augmentation")

    add = parser.add_argument_group("use a classifier (with --eval)").add_argument
    add("--predict", default="", metavar="PATH", help="print the labels of a file or folder")
    add("--embed", default="", metavar="NPZ", help="write the features of all clips of --data")

    args = train_pretrain.parse_with_presets(parser, PRESETS, argv)
    folder = "runs/finetune" if args.preset == "demo" else f"runs/finetune-{args.preset}"
    args.out = args.out or ("runs/eval" if args.eval else folder)
    avmae.check(
        args.eval or not (args.predict or args.embed),
        "--predict and --embed need a checkpoint: give --eval FILE")
    avmae.check(
        args.data or not args.embed, "--embed needs clips: give --data FOLDER (and --clips CSV)")
    folder = os.path.dirname(args.embed) or "."
    avmae.check(os.path.isdir(folder), f"cannot write --embed: there is no folder {folder}")
    return args


def make_config(args, num_classes, task="single_label", sources=()):
    """Return the classifier's config; `sources` are pretrained models, the first decides."""
    first = sources[0].config if sources else avmae.PretrainConfig()
    modalities, size = make_modalities(args), MODEL_SIZES[args.size]
    for m in modalities.keys() & (first.modalities.keys() if sources else ()):
        known = first.modalities[m]  # inputs are normalized as in pretraining
        modalities[m] = replace(modalities[m], mean=known.mean, std=known.std)

    mbt = args.model == "mbt"
    return avmae.ClassifierConfig(
        modalities, size, encoder="mbt" if mbt else first.encoder,
        fusion_layer=args.fusion_layer or size.depth * 2 // 3, joint_layers=first.joint_layers,
        drop_path=0.0 if args.model == "probe" else args.drop_path,
        modality_embed=first.modality_embed and not mbt, num_classes=num_classes,
        num_segments=10 if task == "segments" else 1)


def make_datasets(args, names=()):
    """Return training clips, test clips, task and class names; with --eval those of `names`."""
    window, modalities = make_window(args), args.modalities
    if not args.data:
        train = data.Builtin(
            len(data.Builtin.classes) * args.per_class, window, args.seed, modalities)
        test = data.Builtin(args.test_clips, window, 2_000_000 + args.seed, modalities)
        return train, test, "single_label", train.classes

    if args.split:
        train = test = data.open_index(args.data, args.clips, modalities, args.split)
    else:
        train, test = data.train_and_val(
            args.data, args.clips, args.val, modalities, share=0.1, labeled=True)
    if names:
        train, test = train.with_classes(names), test.with_classes(names)

    augment = AUGMENT[args.augment]
    augment = augment if args.time_masks else replace(augment, time_masks=(0, 0))
    return (
        data.Clips(train, window, modalities, augment, args.seed),
        data.Clips(test, window, modalities, views=args.views), train.task, train.classes)


# ---------------------------------------------------------------------------------------------
# Layer-wise decay, mixup, losses


def layer_scales(model, decay):
    """Return {parameter: factor of the learning rate}.

    decay^(L - i) for block i from 0, decay^(L + 1) for patch embeddings, 1 for the final norm,
    bottleneck and head. A norm between stages has the factor of the block before it.
    """
    depth = model.config.size.depth
    scales = dict.fromkeys(model.parameters(), 1.0)
    scales.update(dict.fromkeys(model.patch_embed.parameters(), decay ** (depth + 1)))

    for m in model.config.modalities:
        for i, block in enumerate(model.encoder.blocks_for(m)):
            scales.update(dict.fromkeys(block.parameters(), decay ** (depth - i)))

        if model.config.encoder != "mbt":
            for layers in model.encoder.layers_for(m)[:-1]:
                scale = scales[next(layers.blocks[-1].parameters())]
                scales.update(dict.fromkeys(layers.norm.parameters(), scale))
    return scales


def make_optimizer(model, layer_decay):
    """Return SGD with momentum and a parameter group per learning rate factor ("scale")."""
    groups = {}
    for p, scale in layer_scales(model, layer_decay).items():
        if p.requires_grad:
            groups.setdefault(scale, []).append(p)

    optimizer = torch.optim.SGD(
        [{"params": p, "scale": s} for s, p in groups.items()], lr=0.0, momentum=MOMENTUM,
        fused=True)
    for p in sum(groups.values(), []):  # otherwise undefined if `found_inf` skips the first step
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def make_targets(task, label, num_classes):
    """Turn labels (B, K), padded with -1, into targets (B, C); for "segments" (B, 10, C)."""
    if task == "verb_noun":  # the two heads side by side
        heads = [F.one_hot(label[:, i], count) for i, count in enumerate(num_classes)]
        return torch.cat(heads, dim=1).float()
    if task == "segments":
        return F.one_hot(label, num_classes[0]).float()

    target = torch.zeros(len(label), num_classes[0] + 1, device=label.device)
    target.scatter_(1, label.remainder(num_classes[0] + 1), 1.0)
    return target[:, :-1]  # drop the column that padding, -1, has set


def mixup(inputs, target, weights):
    """Mix a batch with its reverse; each modality has its own weight.

    inputs {m: (B, ...)}, target (B, ...), weights {m: float} -> inputs, targets {m: (B, ...)}
    """

    def mix(x, weight):
        return weight * x + (1 - weight) * x.flip(0)

    return (
        {m: mix(x, weights[m]) for m, x in inputs.items()},
        {m: mix(target, weights[m]) for m in inputs})


def apply_mixup(inputs, target, alpha, seed):
    """Apply `mixup` with weights from Beta(alpha, alpha), or none if alpha is 0.

    seed: integers. Bytes become numbers in [-1, 1]. Returns inputs and targets {m: (B, ...)}.
    """
    if not alpha:
        return inputs, dict.fromkeys(inputs, target)

    rng = np.random.default_rng(seed)
    weights = {m: rng.beta(alpha, alpha) for m in inputs}
    inputs = {m: x * (2 / 255) - 1 if x.dtype == torch.uint8 else x for m, x in inputs.items()}
    return mixup(inputs, target, weights)


def classification_loss(logits, targets, loss_type, smoothing=0.0, heads=None):
    """Return the cross-entropy with label smoothing, averaged over modalities.

    logits, targets {m: (B, C)} or {m: (B, segments, C)}. loss_type: "softmax", or "sigmoid", which
    is summed over classes. heads: sizes of several softmaxes side by side, which are averaged.
    """
    losses = []
    for m, x in logits.items():
        sizes = heads or (x.shape[-1],)
        x = x.to(targets[m])  # float32, not bfloat16

        for part, target in zip(x.split(sizes, -1), targets[m].split(sizes, -1)):
            target = target * (1 - smoothing) + smoothing / target.shape[-1]
            loss = (
                -target * part.log_softmax(-1)
                if loss_type == "softmax"
                else F.binary_cross_entropy_with_logits(part, target, reduction="none"))
            losses.append(loss.sum(-1).mean())
    return torch.stack(losses).mean()


# ---------------------------------------------------------------------------------------------
# Metrics


def average_precision(scores, positive):
    """Return the area under precision over recall; equal scores are one threshold.

    scores (N,), positive (N,) bool
    """
    scores, order = scores.sort(descending=True)
    hits = positive[order].double().cumsum(0)
    is_last = torch.cat([scores[1:] != scores[:-1], torch.ones(1, dtype=torch.bool)])

    precision, recall = hits / torch.arange(1, len(hits) + 1), hits / hits[-1]
    precision, recall = precision[is_last], recall[is_last]
    return (recall.diff(prepend=recall.new_zeros(1)) * precision).sum().item()


def compute_metrics(task, logits, labels, num_classes):
    """Return {name: value}, the main metric first; logits (N, C) or (N, 10, C), labels (N, K)."""

    def correct(x, label, k=1):
        return (x.topk(min(k, x.shape[-1]), -1).indices == label[..., None]).any(-1)

    if task == "multi_label":  # classes without a positive clip are left out
        target = make_targets(task, labels, num_classes).bool()
        classes = target.any(0).nonzero().flatten().tolist()
        total = sum(average_precision(logits[:, c], target[:, c]) for c in classes)
        return {"mAP": total / max(1, len(classes))}

    if task == "verb_noun":
        heads = logits.split(num_classes, -1)
        verb, noun = (correct(x, labels[:, i]) for i, x in enumerate(heads))
        values = {"action": verb & noun, "verb": verb, "noun": noun}
    elif task == "segments":
        values = {"segment accuracy": correct(logits, labels)}
    else:
        values = {f"top-{k}": correct(logits, labels[:, 0], k) for k in (1, 5)}
    return {name: x.double().mean().item() for name, x in values.items()}


# ---------------------------------------------------------------------------------------------
# The model: finetuned, from pretrained checkpoints, or from scratch


def load_classifier(path):
    """Return a finetuned model, its task and its class names, () if they are unknown.

    Raises UserError for a pretrained model.
    """
    model, saved = avmae.load_model(path), avmae.load_checkpoint(path)
    avmae.check(
        isinstance(model, avmae.Classifier),
        f"{path} is a pretrained model without classes: finetune it with --init")

    counts = model.config.num_classes  # converted weights have neither task nor names
    guess = "multi_label" if counts == (527,) else "single_label"
    guess = "verb_noun" if len(counts) > 1 else guess
    return model, saved.get("task", guess), saved.get("names", ())


def make_classifier(args, run, task, num_classes):
    """Return a new model, initialized from the checkpoints of --init."""
    sources = []  # (streams that a checkpoint initializes, its path, its model)
    for given in args.init:
        named = "=" in given and not os.path.exists(given)
        stream, path = given.split("=", 1) if named else (None, given)

        source = avmae.load_model(path)
        avmae.check(
            isinstance(source, avmae.AVMAE),
            f"{path} is a finetuned model: --init takes pretrained ones")
        own = [m for m in source.config.modalities if m in args.modalities]
        sources.append(([stream] if stream else own if len(args.init) > 1 else None, path, source))

        there = avmae.load_checkpoint(path).get("settings", {})
        notes = differences(there, vars(args), train_pretrain.CLIP_SETTINGS)
        run.print(f"{path}: {'; '.join(notes) or 'the same clip settings'}")

    model = avmae.Classifier(make_config(args, num_classes, task, [x for *_, x in sources]))
    new = dict(model.named_parameters())
    for streams, path, source in sources:
        copied, initialized = avmae.transfer(source, model, streams)
        new = {name: new[name] for name in initialized if name in new}
        run.print(f"{path}: copied {', '.join(copied)}")
    run.print(f"new     {', '.join(new) if sources else 'all parameters'}")

    if args.model == "probe":
        model.patch_embed.requires_grad_(False)
        model.encoder.requires_grad_(False)
    return model


# ---------------------------------------------------------------------------------------------
# Evaluation, prediction, features


def predict(model, inputs, views):
    """Return logits averaged over modalities and views; inputs {m: (B, [views,] ...)}."""
    if views > 1:
        inputs = {m: x.flatten(0, 1) for m, x in inputs.items()}
    logits = torch.stack(list(model(inputs).values())).float().mean(0)
    return logits.unflatten(0, (-1, views)).mean(1) if views > 1 else logits


@torch.no_grad()
def run_on_all(clips, run, function):
    """Apply a function to every batch and gather the results on all ranks, in data set order.

    function: inputs {m: (B, ...)} -> {name: (B, ...)}. Returns {name: (N, ...)} with "index" and
    "label", and {name of an unreadable clip: reason}. A signal ends it early with (None, {}).
    Raises UserError if no clip can be read.
    """
    loader, rows = run.make_loader(clips), []
    for batch in loader:
        if run.signals:
            break
        with run.autocast:
            result = function({m: batch[m] for m in clips.modalities})
        result |= {name: batch[name] for name in ("index", "label")}
        rows.append({name: x.cpu().clone() for name, x in result.items()})  # frees shared memory

    if run.stop_requested():
        return None, {}
    rows, bad = zip(*run.gather((rows, loader.bad)))
    rows, bad = sum(rows, []), {k: v for x in bad for k, v in x.items()}
    first = ": ".join(next(iter(bad.items()), ()))
    avmae.check(rows, f"no clip can be read; the first: {first}")

    results = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    order = results["index"].argsort()
    return {name: x[order] for name, x in results.items()}, bad


def top_labels(logits, task, num_classes, names, top=5):
    """Return the best labels of a clip: [(name, score)] per head or, for "segments", per second."""
    heads = logits.split(num_classes, -1) if logits.ndim == 1 else logits  # (C,) each, or (10, C)
    tops = []
    for head, labels in zip(heads, names if task == "verb_noun" else [names] * len(heads)):
        scores = head.sigmoid() if task == "multi_label" else head.softmax(-1)
        best = scores.topk(min(top, len(scores)))
        tops.append([(labels[i], s) for s, i in zip(best.values.tolist(), best.indices.tolist())])
    return tops


def evaluate(model, clips, run, task, names):
    """Test all clips; print metrics, write results.json and predictions.csv; return the metrics.

    A signal ends it early with None.
    """
    model.eval()
    results, bad = run_on_all(
        clips, run, lambda inputs: {"logits": predict(model, inputs, run.args.views)})
    model.train()
    if results is None:
        return None

    num_classes, index = model.config.num_classes, results["index"].tolist()
    metrics = compute_metrics(task, results["logits"], results["label"], num_classes)
    values = ", ".join(f"{k} {v:.4f}" for k, v in metrics.items())
    run.print(f"test    {values} of {len(index)} clips, {len(bad)} unreadable")

    run.write_json("results.json", {
        "metrics": metrics, "clips": len(index), "unreadable": len(bad),
        "settings": vars(run.args)})
    if run.rank == 0:
        with open(run.out / "predictions.csv", "w", newline="", **data.UTF8) as file:
            for i, x in zip(index, results["logits"]):
                pairs = sum(top_labels(x, task, num_classes, names), [])
                csv.writer(file).writerow([clips.name(i), *(cell for p in pairs for cell in p)])
    return metrics


@torch.no_grad()
def print_predictions(model, run, task, names):
    """Print the labels of each file of --predict; one without sound is classified by its video.

    Raises UserError if no file can be read.
    """
    args, num_classes, num_read = run.args, model.config.num_classes, 0
    numbers = [tuple(map(str, range(count))) for count in num_classes]
    names = names or (numbers if task == "verb_noun" else numbers[0])
    index = data.find_clips(args.predict, args.modalities)

    for i in range(len(index)):
        for modalities in dict.fromkeys((args.modalities, args.modalities[:1])):
            clips = data.Clips(index, make_window(args), modalities, views=args.views)
            clip = clips[0, i, 0]
            if not clip["bad"]:
                break
            run.print(f"{clips.name(i)}: {clip['bad'][0][1]}")
        else:
            continue

        num_read += 1
        with run.autocast:
            inputs = {m: clip[m][None].to(run.device) for m in modalities}
            logits = predict(model, inputs, args.views)[0].cpu()
        if modalities != args.modalities:
            run.print("its video alone is used")
        for top in top_labels(logits, task, num_classes, names):
            run.print("  ".join([clips.name(i), *(f"{name} {score:.3f}" for name, score in top)]))
    avmae.check(num_read, f"no file of {args.predict} can be read ({len(index)} tried)")


def write_features(model, run):
    """Write an npz: names (N,) and the pooled features (N, [views,] D) of each modality."""
    args = run.args
    index = data.open_index(args.data, args.clips, args.modalities, args.split)
    clips = data.Clips(index, make_window(args), args.modalities, views=args.views)

    def features(inputs):
        inputs = {m: x.flatten(0, 1) if args.views > 1 else x for m, x in inputs.items()}
        pooled = {m: x.float() for m, x in model.features(inputs).items()}
        return {m: x.unflatten(0, (-1, args.views)).mean(1) for m, x in pooled.items()}

    results, _ = run_on_all(clips, run, features)
    if run.rank == 0:
        names = [clips.name(i) for i in results["index"].tolist()]
        np.savez(args.embed, names=names, **{m: results[m].numpy() for m in args.modalities})
    run.print(f"wrote the features of {len(results['index'])} clips to {args.embed}")


if __name__ == "__main__":
    data.setup_script(train_pretrain.excepthook)
    args = parse_args()
    run = Run(args)

    if args.embed or args.predict:
        run.open_folder()
        if args.embed:
            write_features(avmae.load_model(args.eval).to(run.device), run)
        if args.predict:
            model, task, names = load_classifier(args.eval)
            print_predictions(model.to(run.device), run, task, names)
        run.shutdown()
        sys.exit()

    # ---- Clips and model

    torch.manual_seed(args.seed)
    model, _, names = load_classifier(args.eval) if args.eval else (None, None, ())
    with run.quiet_ranks():
        # task: "single_label", "multi_label", "verb_noun" (EPIC) or "segments" (AVE)
        train, test, task, names = make_datasets(args, names)
    num_classes = tuple(map(len, names)) if task == "verb_noun" else (len(names),)
    model = model or make_classifier(args, run, task, num_classes)
    avmae.check(
        model.config.num_classes == num_classes,
        f"{args.eval} has {model.config.num_classes} classes, these clips have {num_classes}")

    steps = 0 if args.eval else num_steps(args.epochs, len(train), args.batch)
    warmup = round(args.warmup * len(train) / args.batch)  # steps
    run.print_summary(model, train, test, steps)
    if args.data:
        run.print(f"labels  {data.describe_classes(train.index)}")
    if args.dry_run:
        run.print(json.dumps(vars(args), indent=1))
        sys.exit()

    # ---- Optimizer and resume

    run.open_folder()
    model.to(run.device)
    optimizer = make_optimizer(model, args.layer_decay)
    saved = run.resume(model, optimizer, len(train), names)
    start, best = saved["step"], saved.get("best", -1.0)

    net = run.wrap_model(model)
    loader = run.make_loader(train, steps=range(start, steps))
    log = Log(run, loader, ["loss"], start, steps)

    # --lr belongs to the preset's batch size and scales linearly.
    peak = args.lr * args.batch / PRESETS[args.preset].get("batch", 64)
    audio, video, both = args.mixup
    alpha = {("audio",): audio, ("video",): video}.get(args.modalities, both)
    loss_type = "sigmoid" if task == "multi_label" else "softmax"
    heads = num_classes if task == "verb_noun" else None
    eval_interval = num_steps(args.eval_every, len(train), args.batch)
    run.catch_signals()

    def evaluate_and_log(step, best):
        """Test the model; keep it in best.pt if it is the best so far. Return the best metric.

        best.pt is chosen on the test clips, as in the paper there is no third split.
        """
        metrics = evaluate(model, test, run, task, names)
        if metrics is None:  # stopped by a signal
            return best
        log.write({"step": step, "val": metrics})

        metric = next(iter(metrics.values()))
        if metric > best and not args.eval:
            run.save(model, "best.pt", step=step, metrics=metrics, task=task, names=names)
        return max(best, metric)

    # ---- Training loop

    batches, done, stop = iter(loader), start, False
    progress = tqdm(range(start, steps), initial=start, total=steps, disable=run.rank > 0 or None)

    for step in progress:
        total, index = 0, []

        for k, rows in enumerate(run.micro_batches):  # gradient accumulation
            batch = next(batches)  # {video: (b, T, H, W, 3) bytes, audio: (b, T, F), label: (b, K)}
            inputs = {m: batch[m] for m in model.config.modalities}
            target = make_targets(task, batch["label"], num_classes)  # (b, C); AVE: (b, 10, C)
            index.append(batch["index"])

            # Mixup and DropPath depend on (seed, step, number of the micro-batch over all ranks).
            micro_index = run.rank * len(run.micro_batches) + k
            inputs, targets = apply_mixup(inputs, target, alpha, (args.seed, step, micro_index))
            torch.manual_seed((args.seed * 1_000_003 + step) * args.batch + micro_index)

            net.require_backward_grad_sync = rows == run.micro_batches[-1]  # DDP: once per step
            with run.autocast:
                logits = net(inputs)  # {m: (b, C)}
            loss = classification_loss(logits, targets, loss_type, args.smoothing, heads)
            (loss / len(run.micro_batches)).backward()
            total = total + loss.detach() / len(run.micro_batches)

        lr = learning_rate(step, peak, warmup, steps)
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * lr

        # A fused optimizer skips the step if `found_inf` is 1; an `if` would wait for the GPU.
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD)
        optimizer.found_inf = (~norm.isfinite()).float()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        log.record(step, total[None], norm, torch.cat(index))
        done = step + 1
        stop = run.stop_requested()  # a signal on any rank
        if stop or done == steps or done % args.log_every == 0:
            log.check_health(log.log_metrics(lr, done * args.batch / len(train)))
        if done % eval_interval == 0 and done < steps and not stop:
            best = evaluate_and_log(done, best)
        if stop or done == steps or run.save_is_due():
            run.save(
                model, "last.pt", optimizer=optimizer.state_dict(), step=done, best=best,
                task=task, names=names, num_clips=len(train))
        if stop:
            break
        log.restart_clock()

    # ---- Results: of a finished run, or of --eval

    if not stop:
        evaluate_and_log(done, best)
        stop = run.stop_requested()
    if stop:
        run.print(f"stopped at step {done} of {steps}; the same command continues")
    else:
        log.save_curves()
    run.shutdown()
    sys.exit(int(stop))
