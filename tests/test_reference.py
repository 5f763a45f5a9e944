"""Our numbers against those of the authors' JAX model.

The files lie in ../shared/reference, or are the extracts in tests/reference.
"""

import itertools
import json
import pathlib

import numpy as np
import pytest
import torch

import avmae
import parity
import train_finetune
import train_pretrain

HERE = pathlib.Path(__file__).resolve().parent / "reference"
SHARED = HERE.parents[2] / "shared" / "reference"
MODELS = sorted({p.name: p for folder in (HERE, SHARED) for p in folder.glob("*__*.npz")}.values())


def reference(name):
    path = SHARED / name if (SHARED / name).exists() else HERE / name
    return json.loads(path.read_text()) if path.suffix == ".json" else np.load(path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_model(path, dtype):
    rows = list(parity.check(path, dtype))
    assert len(rows) > 50
    assert not [(what, error, bound) for what, error, bound in rows if not error <= bound]


def test_parity_notices_a_changed_model(monkeypatch):
    path = next(p for p in MODELS if p.name.startswith("pretrain"))
    monkeypatch.setattr(avmae, "NORM_EPS", 1e-5)
    assert [what for what, error, bound in parity.check(path, torch.float64) if error > bound]


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("name", ["vggsound", "audioset"])
def test_schedule(name, stage):
    file = {
        k.split("/")[1]: v
        for k, v in reference("schedules.npz").items()
        if k.startswith(f"{name}_{stage}/")}
    script = train_pretrain if stage == "pretrain" else train_finetune
    total = int(file["total_steps"])
    for step, expected in zip(file["steps"], file["lr"]):
        if step < total:  # the official schedule is periodic; training ends before it starts again
            ours = script.learning_rate(
                int(step), float(file["base_learning_rate"]), float(file["warmup_steps"]), total)
            assert ours == pytest.approx(
                float(expected), rel=2e-5, abs=2e-7 * float(file["base_learning_rate"]))


def test_schedule_of_the_presets():
    """Clips, batch, epochs and base rate of the presets give the official rates and steps."""
    file = reference("schedules.npz")
    for name, clips in ("vggsound", 172_427), ("audioset", 1_857_210):
        args = train_pretrain.parse(["--preset", name])
        assert args.lr * args.batch / 256 == pytest.approx(
            float(file[f"{name}_pretrain/base_learning_rate"]))
        steps = clips // args.batch
        assert (steps, steps * args.epochs) == (
            file[f"{name}_pretrain/steps_per_epoch"], file[f"{name}_pretrain/total_steps"])
        assert args.warmup * steps == file[f"{name}_pretrain/warmup_steps"]
    for name, clips in ("vggsound", 172_427), ("audioset", 508_994):
        args = train_finetune.parse(["--preset", name])
        assert args.lr == pytest.approx(float(file[f"{name}_finetune/base_learning_rate"]))
        steps = clips // args.batch
        assert (steps, steps * args.epochs) == (
            file[f"{name}_finetune/steps_per_epoch"], file[f"{name}_finetune/total_steps"])
        assert args.warmup * steps == file[f"{name}_finetune/warmup_steps"]


def tiny_mbt(modalities):
    config = avmae.ClassifierConfig(
        size=avmae.Size(48, 4, 4, 96), modalities=modalities, fusion_layer=2, classes=(7,),
        patch={"video": (2, 8, 8), "audio": (8, 8)},
        shape={"video": (4, 32, 32), "audio": (48, 16)})
    return avmae.Classifier(config)


@pytest.mark.parametrize(
    "which, modalities", [("rgb_spectrogram", ("video", "audio")), ("spectrogram", ("audio",))])
def test_layerwise_decay(which, modalities):
    model = tiny_mbt(modalities)
    scales = train_finetune.layer_scales(model, 0.75)
    parameters = dict(model.named_parameters())
    prefix = f"layerwise/{which}/"
    compared = set()
    for key, expected in reference("schedules.npz").items():
        name, _ = avmae.official_name(key.removeprefix(prefix), modalities[0])
        if key.startswith(prefix) and name in parameters:
            assert scales[parameters[name]] == pytest.approx(float(expected), rel=1e-6), key
            compared.add(name)
    assert compared == set(parameters)


def test_finetuning_optimiser():
    """Five steps of clipping, SGD with momentum and layer-wise decay."""
    file = reference("optimizers.npz")
    model = tiny_mbt(("video", "audio"))
    args = train_finetune.parse(["--preset", "vggsound"])
    optimizer = train_finetune.optimizer_of(model, args)
    parameters = dict(model.named_parameters())
    paths = [
        k.removeprefix("finetune/step0/param/")
        for k in file.files
        if k.startswith("finetune/step0/param/")]
    used = {path: parameters[avmae.official_name(path, "video")[0]] for path in paths}
    for path, p in used.items():  # the file's arrays are smaller than the model's
        p.data = avmae.official_tensor(
            path, torch.tensor(file[f"finetune/step0/param/{path}"])).clone()
    for step in range(5):
        for path, p in used.items():
            p.grad = avmae.official_tensor(
                path, torch.tensor(file[f"finetune/step{step}/grad/{path}"])).clone()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        assert norm.item() == pytest.approx(float(file[f"finetune/step{step}/grad_norm"]), rel=1e-5)
        rate = train_finetune.learning_rate(step, 0.8, 2.5, 10)
        assert rate == pytest.approx(float(file[f"finetune/step{step}/lr"]), rel=1e-5, abs=1e-9)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        optimizer.step()
        for path, p in used.items():
            expected = avmae.official_tensor(
                path, torch.tensor(file[f"finetune/step{step + 1}/param/{path}"]))
            torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-6)


def test_pretraining_optimiser():
    """Six steps of Adam with decoupled decay; torch decays before a step, the authors after it."""
    file = reference("optimizers.npz")
    paths = [
        k.removeprefix("pretrain/step0/param/")
        for k in file.files
        if k.startswith("pretrain/step0/param/")]
    model = torch.nn.Module()
    for i, path in enumerate(paths):
        model.register_parameter(
            f"p{i}",
            torch.nn.Parameter(
                avmae.official_tensor(
                    path, torch.tensor(file[f"pretrain/step0/param/{path}"])).float()
            ),
        )
    groups = train_pretrain.decay_groups(model, 0.05)
    assert len(groups[0]["params"]) == sum(path.endswith("kernel") for path in paths)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)
    for step in range(6):
        for path, p in zip(paths, model.parameters()):
            p.grad = avmae.official_tensor(
                path, torch.tensor(file[f"pretrain/step{step}/grad/{path}"])).float()
        for group in optimizer.param_groups:
            group["lr"] = float(file[f"pretrain/step{step}/lr"])
        optimizer.step()
        for path, p in zip(paths, model.parameters()):
            expected = avmae.official_tensor(
                path, torch.tensor(file[f"pretrain/step{step + 1}/param/{path}"])).float()
            assert (p.detach() - expected).abs().max() < 2e-5, (step, path)


def test_weight_decay_is_on_matrices_only():
    model = avmae.AVMAE(
        avmae.PretrainConfig(
            size=avmae.Size(24, 4, 2, 32), decoder_size=avmae.Size(16, 3, 2, 24),
            modality_tokens=True)
    )
    decayed, plain = (set(map(id, g["params"])) for g in train_pretrain.decay_groups(model, 0.05))
    for name, p in model.named_parameters():
        matrix = name.endswith("weight") and "norm" not in name
        assert (id(p) in decayed) == matrix and (id(p) in plain) != matrix, name


def test_mixup():
    file = reference("mix_loss_targets.npz")
    inputs = {
        "video": torch.tensor(file["mixup/inputs/rgb"]),
        "audio": torch.tensor(file["mixup/inputs/spectrogram"])}
    label = torch.tensor(file["mixup/label"])
    for kind, names in ("mixup", (0, 0)), ("mixmod", (0, 1)):
        lam = {m: float(file[f"{kind}/lam"][i]) for m, i in zip(("video", "audio"), names)}
        mixed, labels = train_finetune.mixup(inputs, label, lam)
        for m, theirs in ("video", "rgb"), ("audio", "spectrogram"):
            torch.testing.assert_close(mixed[m], torch.tensor(file[f"{kind}/out/{theirs}"]))
            torch.testing.assert_close(labels[m], torch.tensor(file[f"{kind}/out_label/{theirs}"]))


@pytest.mark.parametrize("smoothing", ["none", "0.3"])
@pytest.mark.parametrize(
    "kind, labels", [("softmax", "onehot"), ("softmax", "soft"), ("sigmoid", "multihot")])
def test_losses(kind, labels, smoothing):
    file = reference("mix_loss_targets.npz")
    logits, target = (torch.tensor(file[f"loss/{k}"]) for k in ("logits", labels))
    ours = train_finetune.classification_loss(
        {"audio": logits}, {"audio": target}, kind, float(smoothing.replace("none", "0")))
    assert ours.item() == pytest.approx(
        float(file[f"loss/{kind}_{labels}/{smoothing}/nomask"]), rel=1e-5)


def test_metrics():
    file = reference("mix_loss_targets.npz")
    logits, labels = torch.tensor(file["metrics/logits"]), torch.tensor(file["metrics/labels"])
    for c in range(6):
        ours = train_finetune.average_precision(logits[:, c], labels[:, c].bool())
        assert ours == pytest.approx(
            float(file[f"metrics/out/per_class_average_precision_{c}"]), rel=1e-6)
    ids = torch.full((40, 6), -1)
    for i, row in enumerate(labels.bool()):
        ids[i, : row.sum()] = row.nonzero().flatten()
    ours = train_finetune.metrics_of("many", logits, ids, (6,))
    for name in "mAP", "AUC", "d-prime":
        assert ours[name] == pytest.approx(float(file[f"metrics/out/{name}"]), rel=1e-6)


@pytest.mark.skipif(not SHARED.exists(), reason="the extract has no targets")
def test_targets_and_positions():
    file = reference("mix_loss_targets.npz")
    video = avmae.patchify(torch.tensor(file["targets/inputs/rgb"]), "video", (2, 8, 8))
    audio = avmae.patchify(
        torch.tensor(file["targets/inputs/spectrogram"])[..., 0], "audio", (8, 8))
    for name, patches in ("rgb", video), ("spectrogram", audio):
        assert parity.error(patches, file[f"targets/{name}/raw"]) == 0
        assert parity.error(avmae.standardise(patches), file[f"targets/{name}/std_patch"]) < 5e-6
    wide = avmae.patchify(torch.tensor(file["targets/inputs/rgb"]), "video", (2, 16, 8))
    assert parity.error(wide, file["targets/rgb/raw_16x8x2"]) == 0
    for key in file.files:
        if key.startswith("posemb/"):
            n, d = map(int, key.removeprefix("posemb/").split("x"))
            assert parity.error(avmae.sinusoid(n, d), file[key]) < 1e-6


def filled(config):
    """A model whose every parameter has a value of its own."""
    model = avmae.build(config)
    for value, p in zip(itertools.count(1.0), model.parameters()):
        torch.nn.init.constant_(p, value)
    return model


@pytest.mark.parametrize("fused", ["rgb+spectrogram", "rgb", "spectrogram"])
@pytest.mark.parametrize("official, encoder", list(parity.ENCODERS.items()))
def test_where_pretrained_parameters_go(official, encoder, fused):
    """Every row of the authors' own initialisation, found by running it."""
    table = reference("init_mapping.json")[
        f"{official}|{fused}|renamed embedding_spectrogram->embedding_spec"]
    modalities = tuple(parity.OURS[m] for m in fused.split("+"))
    sizes = dict(size=avmae.Size(48, 4, 4, 96), patch={"video": (2, 8, 8), "audio": (8, 8)})
    source = filled(
        avmae.PretrainConfig(
            **sizes, decoder_size=avmae.Size(32, 2, 4, 64), encoder=encoder,
            joint_layers=2 if encoder == "mid" else 1)
    )
    target = avmae.Classifier(
        avmae.ClassifierConfig(**sizes, modalities=modalities, fusion_layer=2, classes=(7,)))
    fresh = {k: v.clone() for k, v in target.state_dict().items()}
    avmae.transfer(source, target)
    got, have = target.state_dict(), source.state_dict()
    for theirs, origin in table.items():
        if theirs == "bottleneck" and len(modalities) == 1:
            continue  # ours has none with one modality
        name, _ = avmae.official_name(theirs.replace("*", ""), modalities[0])
        parts = [k for k in got if k.startswith(name)]
        assert parts
        for part in parts:
            expected = (
                fresh[part]
                if origin == "INIT"
                else have[part.replace(name, avmae.official_name(origin.replace("*", ""))[0])])
            assert got[part].equal(expected), (theirs, origin)


@pytest.mark.parametrize(
    "name, count",
    [
        (k, v)
        for k, v in (
            json.loads((SHARED / "full_size.json").read_text()) if SHARED.exists() else {}).items()
    ],
)
def test_full_sizes(name, count):
    stage, dataset, size, *rest = name.split("|")
    shapes = {
        "video": (16 if stage == "pretrain" else 32, 224, 224),
        "audio": (1000 if dataset == "audioset" else 800, 128)}
    if stage == "pretrain":
        config = avmae.PretrainConfig(
            size=avmae.SIZES[size_name(size)][0], decoder_size=avmae.SIZES[size_name(size)][1],
            shape=shapes, encoder=parity.ENCODERS[rest[0]], decoder=parity.DECODERS[rest[1]],
            allow_uncoupled=True)
        extra = 0
    else:
        if rest[1] == "spec_channels=3":
            pytest.skip("ours has one spectrogram channel; three are summed on import")
        modalities = tuple(parity.OURS[m] for m in rest[0].split("+"))
        config = avmae.ClassifierConfig(
            size=avmae.SIZES[size_name(size)][0], modalities=modalities, shape=shapes,
            classes=(309 if dataset == "vggsound" else 527,))
        # an official bottleneck that is never used
        extra = 0 if len(modalities) == 2 else 4 * config.size.width
    with torch.device("meta"):
        assert sum(p.numel() for p in avmae.build(config).parameters()) + extra == count["total"]
    for theirs, tokens in count.get("tokens", {}).items():
        assert config.tokens(parity.OURS[theirs]) == tokens


def size_name(letter):
    return {"B": "base", "L": "large"}[letter]
