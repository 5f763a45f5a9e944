"""Compare models, recipes and transfer with numbers of the authors' JAX code.

Full reference files are in ../shared/reference, extracts of some in tests/reference.
"""

import copy
import itertools
import json
import pathlib
import re

import numpy as np
import pytest
import torch

import avmae
import parity
import train_finetune
import train_pretrain
from parity import MODALITY, OFFICIAL, convert_weights
from test_model import BOTH

HERE = pathlib.Path(__file__).resolve().parent / "reference"
SHARED = HERE.parents[2] / "shared" / "reference"
MODELS = sorted({p.name: p for folder in (HERE, SHARED) for p in folder.glob("*__*.npz")}.values())
MID = "pretrain__separate_encoders_and_concat__same_decoder"
SIZES = {"size": avmae.TransformerConfig(48, 4, 4, 96),
         "decoder_size": avmae.TransformerConfig(32, 2, 4, 64)}


def reference(name):
    path = SHARED / name if (SHARED / name).exists() else HERE / name
    return json.loads(path.read_text()) if path.suffix == ".json" else np.load(path)


MIX, OPTIMIZERS, SCHEDULES = (
    reference(f"{name}.npz") for name in ("mix_loss_targets", "optimizers", "schedules"))


def close_to(x, rel=1e-6, abs=None):
    return pytest.approx(float(x), rel=rel, abs=abs)


# ------------------------------------------------------------------------------------------ parity


def errors_above(path, dtype=torch.float64):
    rows = list(parity.check(path, dtype))
    assert len(rows) > 50
    return [(name, error, bound) for name, error, bound in rows if not error <= bound]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_model(path, dtype):
    assert not errors_above(path, dtype)


def test_parity_detects_a_changed_model(monkeypatch, capsys):
    path = next(p for p in MODELS if p.name.startswith("pretrain"))
    monkeypatch.setattr("sys.argv", ["parity.py", str(path)])
    assert parity.main() == 0 and "0 above" in capsys.readouterr().out

    monkeypatch.setattr(avmae, "NORM_EPS", 1e-5)
    assert parity.main() == 1 and "ABOVE 3e-06" in capsys.readouterr().out


def test_modality_tokens_and_three_equal_channels(tmp_path):
    """Modality tokens subtracted from biases and kernels with an equal sum change nothing."""
    file, g = dict(reference(f"{MID}.npz")), np.random.default_rng(0)
    tokens = {"Encoder": (48, ["embedding_{}/bias"]),
              "Decoder": (32, ["decoder_projection_{}/bias", "mask_token_{}"])}
    for part, m in itertools.product(tokens, MODALITY):
        width, biases = tokens[part]
        token = file[f"params/{part}_modality_token_{m}"] = g.normal(size=(1, 1, width))
        for bias in (f"params/{name.format(m)}" for name in biases):
            file[bias] = file[bias] - token.reshape(file[bias].shape)

    kernel = "embedding_spectrogram/kernel"
    parts = [w * file[f"params/{kernel}"] for w in (0.2, 0.3, 0.5)]
    file[f"params/{kernel}"] = np.concatenate(parts, axis=2)
    file["inputs/spectrogram"] = file["inputs/spectrogram"].repeat(3, axis=-1)
    np.savez(tmp_path / f"{MID}__modality_tokens.npz", **file)
    bad = {name for name, *_ in errors_above(tmp_path / f"{MID}__modality_tokens.npz")}
    assert bad <= {"global gradient norm", "parameters without a norm", f"|{kernel}|"}


@pytest.mark.parametrize("name, expected", [
    ("separate_encoders__same_decoder", "separate shared joint"),
    ("same_encoder__separate_decoders", "shared separate joint"),
    ("concat_and_encode__concat_and_decode__modality_tokens", "early early joint"),
    ("concat_and_encode__separate_decoders__inpainting", "early separate inpaint_both"),
    (f"{MID[10:]}__inpainting_rgb", "mid shared video_from_audio"),
    ("audioset_midfusion_mask70", "mid shared joint")])
def test_parity_finds_the_strategies_in_the_name_or_the_config(name, expected):
    targets = ["rgb"] if name.endswith("_rgb") else ["rgb", "spectrogram"]
    file = {f"loss_raw/{target}": 0 for target in [*targets, "total"]}
    if "__" not in name:
        config = dict(zip(("encoder_strategy", "decoder_strategy"), MID[10:].split("__")))
        file["config_json"] = json.dumps({"model": config})
    settings = parity.strategies(pathlib.Path(f"pretrain__{name}.npz"), file)
    assert [settings[key] for key in ("encoder", "decoder", "objective")] == expected.split()


# ------------------------------------------------------------------------------------- the recipes


@pytest.mark.parametrize("name, stage, clips", [
    ("vggsound", "pretrain", 172_427), ("audioset", "pretrain", 1_857_210),
    ("vggsound", "finetune", 172_427), ("audioset", "finetune", 508_994)])
def test_schedule_of_the_presets(name, stage, clips):
    """Batch, epochs, warm-up and peak rate of the presets give the official rates and steps."""
    file = parity.group(SCHEDULES, f"{name}_{stage}/")
    base, total = float(file["base_learning_rate"]), int(file["total_steps"])
    script = train_pretrain if stage == "pretrain" else train_finetune
    args = script.parse_args(["--preset", name, "--dry-run"])
    assert base == close_to(args.lr * (args.batch / 256 if stage == "pretrain" else 1))
    steps = clips // args.batch
    assert (steps, steps * args.epochs, args.warmup * steps) == (
        file["steps_per_epoch"], total, file["warmup_steps"])

    assert abs(train_pretrain.num_steps(args.epochs, clips, args.batch) - total) <= args.epochs

    for step, expected in zip(file["steps"], file["lr"]):
        if step < total:  # the official schedule is periodic; training ends after one period
            ours = train_pretrain.learning_rate(int(step), base, float(file["warmup_steps"]), total)
            assert ours == close_to(expected, 2e-5, 2e-7 * base)


def tiny_mbt(*names):
    modalities = {m: BOTH[m] for m in names or BOTH}
    return avmae.build_model(
        avmae.ClassifierConfig(modalities, SIZES["size"], "mbt", 2, num_classes=(7,)))


def by_official_path(model):
    """Return a classifier's parameters by official paths, with "qkv" for query, key and value."""
    suffix = "_spec" if len(model.config.modalities) > 1 else ""  # else blocks name no modality
    out = {}
    for name, p in model.named_parameters():
        path = convert_weights.rename(name, convert_weights.OFFICIAL).replace("_rgb", "")
        out[re.sub(r"(block_\d+)_spectrogram", rf"\1{suffix}", path)] = p
    return out


@pytest.mark.parametrize(
    "which, names", [("rgb_spectrogram", ("video", "audio")), ("spectrogram", ("audio",))])
def test_layerwise_decay(which, names):
    model = tiny_mbt(*names)
    scales, parameters = train_finetune.layer_scales(model, 0.75), by_official_path(model)
    scale_of = {}
    for key, x in parity.group(SCHEDULES, f"layerwise/{which}/").items():
        scale_of.setdefault(re.sub("/(query|key|value)/", "/qkv/", key), set()).add(float(x))
    if len(names) == 1:
        scale_of.pop("bottleneck")  # ours has none

    assert scale_of.keys() == parameters.keys()
    for path, (expected,) in scale_of.items():
        assert scales[parameters[path]] == close_to(expected), path


def arrays(at):
    """Return {path: tensor} of an optimizer at a step; only matrices have more than one axis."""
    return {
        path: torch.tensor(x if path.endswith("kernel") else x.squeeze()).float()
        for path, x in parity.group(OPTIMIZERS, f"{at}/").items()}


def test_finetuning_optimizer():
    """Compare five steps of clipping, SGD with momentum and layer-wise decay."""
    model = tiny_mbt()
    used = by_official_path(model)
    for path, x in arrays("finetune/step0/param").items():
        used[path].data = x  # smaller than the model's
    args = train_finetune.parse_args(["--preset", "vggsound", "--dry-run"])
    optimizer = train_finetune.make_optimizer(model, args.layer_decay)

    for step in range(5):
        for path, grad in arrays(f"finetune/step{step}/grad").items():
            used[path].grad = grad
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train_finetune.CLIP_GRAD)
        assert norm.item() == close_to(OPTIMIZERS[f"finetune/step{step}/grad_norm"], 1e-5)

        rate = train_pretrain.learning_rate(step, 0.8, 2.5, 10)
        assert rate == close_to(OPTIMIZERS[f"finetune/step{step}/lr"], 1e-5, 1e-9)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        optimizer.step()
        for path, expected in arrays(f"finetune/step{step + 1}/param").items():
            torch.testing.assert_close(used[path].detach(), expected, rtol=1e-5, atol=1e-6)


def test_pretraining_optimizer():
    """Compare six steps of AdamW; torch decays weights before a step, the authors after it."""
    start = arrays("pretrain/step0/param")
    model = torch.nn.ParameterList(start.values())
    groups = train_pretrain.decay_groups(model, 0.05)
    assert len(groups[0]["params"]) == sum(path.endswith("kernel") for path in start)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)

    for step in range(6):
        for p, grad in zip(model, arrays(f"pretrain/step{step}/grad").values()):
            p.grad = grad
        for group in optimizer.param_groups:
            group["lr"] = float(OPTIMIZERS[f"pretrain/step{step}/lr"])
        optimizer.step()
        for p, expected in zip(model, arrays(f"pretrain/step{step + 1}/param").values()):
            assert (p.detach() - expected).abs().max() < 2e-5, step


def test_weight_decay_applies_to_matrices_only():
    model = avmae.AVMAE(avmae.PretrainConfig(BOTH, **SIZES, modality_embed=True))
    decayed, plain = (set(map(id, g["params"])) for g in train_pretrain.decay_groups(model, 0.05))
    for name, p in model.named_parameters():
        matrix = name.endswith("weight") and "norm" not in name
        assert (id(p) in decayed) == matrix and (id(p) in plain) != matrix, name


def test_mixup():
    inputs, label = parity.by_modality(MIX, "mixup/inputs/"), torch.tensor(MIX["mixup/label"])
    for kind, audio in ("mixup", 0), ("mixmod", 1):
        video, audio = float(MIX[f"{kind}/lam"][0]), float(MIX[f"{kind}/lam"][audio])
        mixed = train_finetune.mixup(inputs, label, {"video": video, "audio": audio})
        for (part, ours), m in itertools.product(zip(("out", "out_label"), mixed), BOTH):
            expected = torch.tensor(MIX[f"{kind}/{part}/{OFFICIAL[m]}"])
            torch.testing.assert_close(ours[m], expected)


@pytest.mark.parametrize("smoothing", [0, 0.3])
@pytest.mark.parametrize("case", ["softmax_onehot", "softmax_soft", "sigmoid_multihot"])
def test_losses(case, smoothing):
    kind, labels = case.split("_")
    logits, target = ({"audio": torch.tensor(MIX[f"loss/{k}"])} for k in ("logits", labels))
    ours = train_finetune.classification_loss(logits, target, kind, smoothing)
    assert ours.item() == close_to(MIX[f"loss/{case}/{smoothing or 'none'}/nomask"], 1e-5)


def test_metrics():
    logits, labels = torch.tensor(MIX["metrics/logits"]), torch.tensor(MIX["metrics/labels"]).bool()
    for c in range(6):
        ours = train_finetune.average_precision(logits[:, c], labels[:, c])
        assert ours == close_to(MIX[f"metrics/out/per_class_average_precision_{c}"])

    ids = [row.nonzero().flatten() for row in labels]
    ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)
    ours = train_finetune.compute_metrics("multi_label", logits, ids, (6,))
    assert ours["mAP"] == close_to(MIX["metrics/out/mAP"])


# ---------------------------------------------------------------------------------------- transfer


@pytest.mark.parametrize("fused", ["rgb+spectrogram", "rgb", "spectrogram"])
@pytest.mark.parametrize("official, encoder", list(parity.ENCODERS.items()))
def test_transfer_copies_what_the_authors_copy(official, encoder, fused):
    """Compare with every row of a table that was recorded from the authors' initialization."""
    table = reference("init_mapping.json")[
        f"{official}|{fused}|renamed embedding_spectrogram->embedding_spec"]
    source = avmae.AVMAE(avmae.PretrainConfig(BOTH, **SIZES, encoder=encoder))
    for value, p in zip(itertools.count(1.0), source.parameters()):
        torch.nn.init.constant_(p, value)  # a different value for each parameter

    target = tiny_mbt(*(MODALITY[m] for m in fused.split("+")))
    before, after = copy.deepcopy(by_official_path(target)), by_official_path(target)
    _, initialized = avmae.transfer(source, target)
    names = {id(p): name for name, p in target.named_parameters()}
    pretrained = {convert_weights.rename(name, convert_weights.OFFICIAL): p
                  for name, p in source.named_parameters()}
    if len(target.config.modalities) == 1:
        table.pop("bottleneck")  # our single-stream model has none

    for path, origin in table.items():
        path = path.replace("embedding_spec/", "embedding_spectrogram/").strip("*")
        parts = [part for part in after if part.startswith(path)]
        assert parts
        for part in parts:
            new = origin == "INIT"
            expected = before[part] if new else pretrained[part.replace(path, origin.strip("*"))]
            assert after[part].equal(expected), (path, origin)
            assert (names[id(after[part])] in initialized) == new
