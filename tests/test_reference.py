"""Our numbers against those of the authors' JAX model.

The files lie in ../shared/reference, or are the extracts in tests/reference.
"""

import itertools
import json
import pathlib
from dataclasses import replace

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
VIDEO = replace(avmae.VIDEO, shape=(4, 32, 32), patch=(2, 8, 8))
AUDIO = replace(avmae.AUDIO, shape=(48, 16), patch=(8, 8))
SIZES = {"size": avmae.Size(48, 4, 4, 96), "decoder_size": avmae.Size(32, 2, 4, 64)}


def reference(name):
    path = SHARED / name if (SHARED / name).exists() else HERE / name
    return json.loads(path.read_text()) if path.suffix == ".json" else np.load(path)


def modalities(*names):
    return {m: {"video": VIDEO, "audio": AUDIO}[m] for m in names or ("video", "audio")}


# ------------------------------------------------------------------------------------------ parity


def above(path, dtype=torch.float64):
    rows = list(parity.check(path, dtype))
    assert len(rows) > 50
    return [(what, error, bound) for what, error, bound in rows if not error <= bound]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_model(path, dtype):
    assert not above(path, dtype)


def test_parity_notices_a_changed_model(monkeypatch, capsys):
    path = next(p for p in MODELS if p.name.startswith("pretrain"))
    monkeypatch.setattr("sys.argv", ["parity.py", str(path)])
    assert parity.main() == 0 and "0 above" in capsys.readouterr().out

    monkeypatch.setattr(avmae, "NORM_EPS", 1e-5)
    assert parity.main() == 1 and "ABOVE 3e-06" in capsys.readouterr().out


def made_from(params, **assume):
    """A random model of ours with parameters of these names and shapes: (model, inputs, params)."""
    g = np.random.default_rng(0)
    params = {path: g.normal(0, 0.1, x.shape) for path, x in params.items()}
    checkpoint = avmae.from_official({k: torch.tensor(x) for k, x in params.items()}, **assume)
    config = avmae.from_dict(checkpoint["config"])
    config = replace(config, modalities=modalities(*config.modalities))

    model = avmae.build(config).double().eval()
    model.load_state_dict(checkpoint["model"])
    x = {"video": torch.rand(3, 4, 32, 32, 3).double(), "audio": torch.randn(3, 48, 16).double()}
    return model, {m: x[m] for m in config.modalities}, params


def gradients(model, params, norms, full, total, first=None):
    """The keys of a file with every parameter's gradient, in the authors' layout."""
    grads, arrays = {name: p.grad for name, p in model.named_parameters()}, {}
    for path, x in params.items():
        name, slot = parity.official_name(path, first)
        grad = grads.get(name, torch.zeros(x.shape))  # of what our model leaves out
        grad = grad if slot is None else grad.chunk(3)[slot]
        grad = grad.T.numpy() if path.endswith("kernel") else grad.numpy()
        if "embedding_spec" in path and x.ndim == 4:  # the same for each of equal channels
            grad = grad.reshape(*x.shape[:2], 1, -1)
            arrays[path] = np.broadcast_to(grad, x.shape)
        else:
            arrays[path] = grad.reshape(x.shape)

    norm = {path: np.linalg.norm(x) for path, x in sorted(arrays.items())}
    return {
        f"{norms}/names": np.array(list(norm)), f"{norms}/values": np.array(list(norm.values())),
        total: np.linalg.norm(list(norm.values())), **{f"{full}/{k}": x for k, x in arrays.items()}}


def write(path, params, inputs, values):
    channels = params.get("embedding_spectrogram/kernel", np.zeros((0, 0, 1))).shape[2]
    for m, x in inputs.items():
        x = x[..., None].expand(*x.shape, channels) if m == "audio" else x
        values[f"inputs/{parity.THEIRS[m]}"] = x.numpy()
    np.savez(path, **values, **{f"params/{name}": x for name, x in params.items()})
    return path


@pytest.mark.parametrize("name, objective", [
    ("separate_encoders__same_decoder", "joint"),
    ("separate_encoders__separate_decoders", "joint"),
    ("separate_encoders__concat_and_decode", "joint"),
    ("same_encoder__separate_decoders", "joint"),
    ("concat_and_encode__concat_and_decode__modality_tokens", "joint"),
    ("concat_and_encode__separate_decoders__inpainting", "inpaint_both"),
    ("separate_encoders_and_concat__same_decoder__inpainting_rgb", "video_from_audio"),
    ("audioset_midfusion_mask70", "joint"), ("spectrogram_only", "joint")])
def test_parity_takes_every_kind_of_pretraining_file(tmp_path, name, objective):
    """Made of a model of ours, in the authors' layout."""
    known = {"audioset_midfusion_mask70": "separate_encoders_and_concat__same_decoder",
             "spectrogram_only": "separate_encoders__same_decoder"}
    encoder, decoder, *_ = known.get(name, name).split("__")
    params = {}
    file = reference("pretrain__separate_encoders_and_concat__same_decoder.npz")
    for path, x in parity.group(file, "params/").items():
        stack, rest = path.split("/", 1) if "/" in path else (path, "")
        names = [stack]
        if stack == "Decoder" and decoder == "separate_decoders":
            names = ["Decoder_rgb", "Decoder_spectrogram"]
        if stack == "Transformer_rgb" and encoder in ("same_encoder", "concat_and_encode"):
            names = ["Transformer"]
        elif stack.startswith("Transformer_") and "and_concat" not in encoder:
            names = names if encoder == "separate_encoders" and "concat" not in stack else []
        names = [s for s in names if "only" not in name or "rgb" not in s]
        params |= {f"{s}/{rest}".rstrip("/"): x for s in names}
    if "tokens" in name:
        for m in "rgb", "spectrogram":
            params[f"Encoder_modality_token_{m}"] = np.zeros((1, 1, 48))
            params[f"Decoder_modality_token_{m}"] = np.zeros((1, 1, 32))

    strategies = {"encoder": parity.ENCODERS[encoder], "decoder": parity.DECODERS[decoder]}
    model, x, params = made_from(params, **strategies, objective=objective)
    assert (model.config.encoder, model.config.decoder) == tuple(strategies.values())
    inputs = {m: replace(y, mask_ratio=0.7) for m, y in model.config.modalities.items()}
    ids, values = avmae.random_masking(inputs, 3), {}
    if name in known:
        official = {"encoder_strategy": encoder, "decoder_strategy": decoder}
        values["config_json"] = np.array(json.dumps({"model": official}))
    for part, which in zip(ids, ("unmasked_indices", "masked_indices")):
        values |= {f"{which}/{parity.THEIRS[m]}": i.numpy() for m, i in part.items()}

    config = model.config
    for target in "raw", "std":
        model.config = replace(config, norm_pix=target == "std")
        model.zero_grad()
        out = model(x, ids)
        out.loss.backward()
        values[f"loss_{target}/total"] = out.loss.item()
        for (t, c), pred in out.preds.items():
            theirs, whole = parity.THEIRS[t], torch.zeros(3, inputs[t].tokens, pred.shape[-1])
            whole = avmae.put(whole.double(), out.ids_pred[t, c], pred)
            values[f"out/{theirs}"] = whole.detach().numpy()
            values[f"loss_{target}/{theirs}"] = 0.5 * out.losses[t, c].item()
        at = f"gradnorm_{target}", f"grad_{target}", f"grad_{target}/global_norm"
        values |= gradients(model, params, *at)
    for m, features in model.features(x, pool=False).items():
        values[f"eval_out/{parity.THEIRS[m]}"] = features.detach().numpy()

    assert not above(write(tmp_path / f"pretrain__{name}.npz", params, x, values))


@pytest.mark.parametrize("which", ["inflated3", "rgb", "spectrogram"])
def test_parity_takes_every_kind_of_finetuning_file(tmp_path, which):
    params = parity.group(reference("mbt__rgb_spectrogram.npz"), "params/")
    if which == "inflated3":
        params["embedding_spectrogram/kernel"] = np.zeros((8, 8, 3, 48))
    elif which == "rgb":
        params = {path: x for path, x in params.items() if "_spec" not in path}
    else:
        params = {
            path.replace("_spec/", "/"): x for path, x in params.items()
            if "block" not in path and "embedding/" not in path or "_spec/" in path}
    model, x, params = made_from(params, fusion_layer=2)
    logits, tokens = model(x), model.features(x, pool=False)

    values = {"out/logits": parity.mean_of(logits).detach().numpy()}
    for m in x:
        theirs = parity.THEIRS[m]
        values[f"out/tokens_{theirs}"] = tokens[m].detach().numpy()
        values[f"out/prelogits_{theirs}"] = tokens[m].mean(1).detach().numpy()
        values[f"train_out/logits_{theirs}"] = logits[m].detach().numpy()
    for kind in "softmax", "sigmoid":
        model.zero_grad()
        labels = {m: torch.rand(3, 7).double().softmax(1) for m in (*x, "all")}
        logits, onehot = model(x), {"all": labels.pop("all")}
        mean = {"all": parity.mean_of(logits)}
        loss = train_finetune.classification_loss(logits, labels, kind, smoothing=0.3)
        of_mean = train_finetune.classification_loss(mean, onehot, kind, smoothing=0.3)
        loss.backward()
        values |= {f"{kind}/labels_{parity.THEIRS[m]}": y.numpy() for m, y in labels.items()}
        values |= {f"{kind}/labels_onehot": onehot["all"].numpy(), f"{kind}/loss": loss.item()}
        values[f"{kind}/eval_loss_fn_on_avg_logits"] = of_mean.item()
        at = f"{kind}/gradnorm", f"{kind}/grad", f"{kind}/grad_global_norm"
        values |= gradients(model, params, *at, first=next(iter(x)))

    assert not above(write(tmp_path / f"mbt__{which}.npz", params, x, values))


# ------------------------------------------------------------------------------------- the recipes


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
        args = train_pretrain.parse_args(["--preset", name, "--dry-run"])
        assert args.lr * args.batch / 256 == pytest.approx(
            float(file[f"{name}_pretrain/base_learning_rate"]))
        steps = clips // args.batch
        assert (steps, steps * args.epochs) == (
            file[f"{name}_pretrain/steps_per_epoch"], file[f"{name}_pretrain/total_steps"])
        assert args.warmup * steps == file[f"{name}_pretrain/warmup_steps"]
    for name, clips in ("vggsound", 172_427), ("audioset", 508_994):
        args = train_finetune.parse_args(["--preset", name, "--dry-run"])
        assert args.lr == pytest.approx(float(file[f"{name}_finetune/base_learning_rate"]))
        steps = clips // args.batch
        assert (steps, steps * args.epochs) == (
            file[f"{name}_finetune/steps_per_epoch"], file[f"{name}_finetune/total_steps"])
        assert args.warmup * steps == file[f"{name}_finetune/warmup_steps"]


def tiny_mbt(*names):
    return avmae.Classifier(
        avmae.ClassifierConfig(
            modalities(*names), SIZES["size"], fusion_layer=2, num_classes=(7,)))


@pytest.mark.parametrize(
    "which, names", [("rgb_spectrogram", ("video", "audio")), ("spectrogram", ("audio",))])
def test_layerwise_decay(which, names):
    model = tiny_mbt(*names)
    scales = train_finetune.layer_scales(model, 0.75)
    parameters = dict(model.named_parameters())
    prefix, compared = f"layerwise/{which}/", set()

    for key, expected in reference("schedules.npz").items():
        name, _ = parity.official_name(key.removeprefix(prefix), names[0])
        if key.startswith(prefix) and name in parameters:
            assert scales[parameters[name]] == pytest.approx(float(expected), rel=1e-6), key
            compared.add(name)
    assert compared == set(parameters)


def arrays_of(file, at):
    """{path: tensor in our layout} of the keys that start so."""
    return {
        path: parity.official_tensor(path, x).float()
        for path, x in parity.group(file, f"{at}/").items()}


def test_finetuning_optimizer():
    """Five steps of clipping, SGD with momentum and layer-wise decay."""
    file, model = reference("optimizers.npz"), tiny_mbt()
    parameters = dict(model.named_parameters())
    used = {}
    for path, x in arrays_of(file, "finetune/step0/param").items():
        used[path] = parameters[parity.official_name(path, "video")[0]]
        used[path].data = x  # smaller than the model's
    args = train_finetune.parse_args(["--preset", "vggsound", "--dry-run"])
    optimizer = train_finetune.make_optimizer(model, args)

    for step in range(5):
        for path, grad in arrays_of(file, f"finetune/step{step}/grad").items():
            used[path].grad = grad
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train_finetune.CLIP_GRAD)
        assert norm.item() == pytest.approx(float(file[f"finetune/step{step}/grad_norm"]), rel=1e-5)

        rate = train_pretrain.learning_rate(step, 0.8, 2.5, 10)
        assert rate == pytest.approx(float(file[f"finetune/step{step}/lr"]), rel=1e-5, abs=1e-9)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        optimizer.step()
        for path, expected in arrays_of(file, f"finetune/step{step + 1}/param").items():
            torch.testing.assert_close(used[path].detach(), expected, rtol=1e-5, atol=1e-6)


def test_pretraining_optimizer():
    """Six steps of Adam with decoupled decay; torch decays before a step, the authors after it."""
    file = reference("optimizers.npz")
    start = arrays_of(file, "pretrain/step0/param")
    model = torch.nn.ParameterList(start.values())
    groups = train_pretrain.decay_groups(model, 0.05)
    assert len(groups[0]["params"]) == sum(path.endswith("kernel") for path in start)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)

    for step in range(6):
        for p, grad in zip(model, arrays_of(file, f"pretrain/step{step}/grad").values()):
            p.grad = grad
        for group in optimizer.param_groups:
            group["lr"] = float(file[f"pretrain/step{step}/lr"])
        optimizer.step()
        for p, expected in zip(model, arrays_of(file, f"pretrain/step{step + 1}/param").values()):
            assert (p.detach() - expected).abs().max() < 2e-5, step


def test_weight_decay_is_on_matrices_only():
    model = avmae.AVMAE(avmae.PretrainConfig(modalities(), **SIZES, modality_embed=True))
    decayed, plain = (set(map(id, g["params"])) for g in train_pretrain.decay_groups(model, 0.05))
    for name, p in model.named_parameters():
        matrix = name.endswith("weight") and "norm" not in name
        assert (id(p) in decayed) == matrix and (id(p) in plain) != matrix, name


def test_mixup():
    file = reference("mix_loss_targets.npz")
    inputs = {
        m: torch.tensor(file[f"mixup/inputs/{theirs}"]) for theirs, m in parity.OURS.items()}
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
    video = torch.tensor(file["targets/inputs/rgb"])
    audio = torch.tensor(file["targets/inputs/spectrogram"])[..., 0]
    for name, modality, x in ("rgb", VIDEO, video), ("spectrogram", AUDIO, audio):
        patches = modality.patchify(x)
        mean, std = avmae.patch_stats(patches)
        assert parity.error(patches, file[f"targets/{name}/raw"]) == 0
        assert parity.error((patches - mean) / std, file[f"targets/{name}/std_patch"]) < 5e-6

    wide = replace(VIDEO, patch=(2, 16, 8)).patchify(video)
    assert parity.error(wide, file["targets/rgb/raw_16x8x2"]) == 0
    for size, table in parity.group(file, "posemb/").items():
        assert parity.error(avmae.sinusoid(*map(int, size.split("x"))), table) < 1e-6


# ----------------------------------------------------------------------------- transfer and sizes


@pytest.mark.parametrize("fused", ["rgb+spectrogram", "rgb", "spectrogram"])
@pytest.mark.parametrize("official, encoder", list(parity.ENCODERS.items()))
def test_where_pretrained_parameters_go(official, encoder, fused):
    """Every row of the authors' own initialization, found by running it."""
    table = reference("init_mapping.json")[
        f"{official}|{fused}|renamed embedding_spectrogram->embedding_spec"]
    names = [parity.OURS[m] for m in fused.split("+")]
    source = avmae.AVMAE(avmae.PretrainConfig(modalities(), **SIZES, encoder=encoder))
    for value, p in zip(itertools.count(1.0), source.parameters()):
        torch.nn.init.constant_(p, value)  # every parameter has a value of its own

    target = tiny_mbt(*names)
    fresh = {name: p.clone() for name, p in target.state_dict().items()}
    avmae.transfer(source, target)
    got, have = target.state_dict(), source.state_dict()
    for theirs, origin in table.items():
        if theirs == "bottleneck" and len(names) == 1:
            continue  # ours has none with one modality
        name, _ = parity.official_name(theirs.replace("*", ""), names[0])
        at, _ = parity.official_name(origin.replace("*", ""))
        parts = [key for key in got if key.startswith(name)]
        assert parts
        for part in parts:
            expected = fresh[part] if origin == "INIT" else have[part.replace(name, at)]
            assert got[part].equal(expected), (theirs, origin)


@pytest.mark.skipif(not SHARED.exists(), reason="the extract has no full sizes")
def test_full_sizes():
    for name, count in reference("full_size.json").items():
        stage, dataset, letter, first, second = name.split("|")
        if second == "spec_channels=3":
            continue  # ours has one spectrogram channel; three are summed on import
        size, decoder_size = avmae.SIZES[{"B": "base", "L": "large"}[letter]]
        inputs = {
            "video": replace(avmae.VIDEO, shape=(16 if stage == "pretrain" else 32, 224, 224)),
            "audio": replace(avmae.AUDIO, shape=(1000 if dataset == "audioset" else 800, 128))}

        unused = 0
        if stage == "pretrain":
            config = avmae.PretrainConfig(
                inputs, size, decoder_size, parity.ENCODERS[first], parity.DECODERS[second],
                allow_uncoupled=True)
        else:
            inputs = {parity.OURS[m]: inputs[parity.OURS[m]] for m in first.split("+")}
            classes = (309 if dataset == "vggsound" else 527,)
            config = avmae.ClassifierConfig(inputs, size, num_classes=classes)
            unused = 4 * size.width * (len(inputs) == 1)  # their bottleneck

        with torch.device("meta"):
            parameters = avmae.build(config).parameters()
        assert sum(p.numel() for p in parameters) + unused == count["total"], name
        for theirs, tokens in count.get("tokens", {}).items():
            assert inputs[parity.OURS[theirs]].tokens == tokens, name
