"""Compares our models with numbers of the authors' JAX model: python tests/parity.py FILE.npz ...

Prints the error of every output and exits 1 if one is above its bound. Errors of outputs are
max|a - b| / max(1, max|b|); of gradients, the relative L2 norm of the difference, tensor by tensor.
The kind of a file is told by its `config_json`, else by its name.
"""

import argparse
import dataclasses
import json
import pathlib
import sys

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import avmae  # noqa: E402

OUTPUT_BOUND = {torch.float64: 3e-6, torch.float32: 5e-6}
GRADIENT_BOUND = 1e-4
KEY_BIAS_BOUND = 1e-6  # of the global norm: this gradient is exactly 0
OURS = {"rgb": "video", "spectrogram": "audio"}
ENCODERS = {
    "separate_encoders": "separate", "concat_and_encode": "early", "same_encoder": "shared",
    "separate_encoders_and_concat": "mid"}
DECODERS = {"same_decoder": "shared", "separate_decoders": "separate", "concat_and_decode": "early"}


def error(ours, reference):
    reference = torch.as_tensor(np.asarray(reference), dtype=torch.float64)
    ours = torch.as_tensor(ours).detach().double()
    return ((ours - reference).abs().max() / max(1.0, reference.abs().max())).item()


def group(file, prefix):
    """{rest of the key: array} of the keys that start so."""
    return {k[len(prefix) :]: file[k] for k in file.files if k.startswith(prefix)}


def inputs_of(file, dtype):
    """Inputs by our names; a spectrogram has one channel there, or three equal ones."""
    arrays = {OURS[k]: torch.tensor(v, dtype=dtype) for k, v in group(file, "inputs/").items()}
    return {m: x[..., 0] if m == "audio" else x for m, x in arrays.items()}


def model_of(file, dtype, **assume):
    params = {k: torch.tensor(v) for k, v in group(file, "params/").items()}
    checkpoint = avmae.from_official(params, **assume)
    config = avmae.configure(checkpoint["config"])
    shape = {
        m: tuple(x.shape[1:4] if m == "video" else x.shape[1:])
        for m, x in inputs_of(file, dtype).items()}
    config = dataclasses.replace(config, shape={**config.shape, **shape})
    return config, checkpoint["model"]


def gradient_errors(model, file, prefix, first=None):
    """Per-tensor gradients and norms against the file's."""
    grads = {name: p.grad for name, p in model.named_parameters()}
    total = float(torch.stack([g.norm() for g in grads.values()]).norm())
    scale = {
        "grad": file[f"{prefix}grad_global_norm"]
        if f"{prefix}grad_global_norm" in file.files
        else file[f"grad{prefix}/global_norm"]}["grad"]
    yield "global gradient norm", abs(total - scale) / max(1.0, scale), GRADIENT_BOUND
    norms_at, full_at = (
        (f"{prefix}gradnorm", f"{prefix}grad/")
        if first
        else (f"gradnorm{prefix}", f"grad{prefix}/"))

    def ours(path):
        name, slot = avmae.official_name(path, first)
        if name not in grads:  # a part that this objective does not have
            return None
        return grads[name] if slot is None else grads[name].chunk(3)[slot]

    def compare(path, difference, size):
        if path.strip("|").endswith("key/bias"):
            return f"{path} (exactly 0)", difference / scale, KEY_BIAS_BOUND
        return path, difference / max(size, 1e-12), GRADIENT_BOUND

    for path, norm in zip(file[f"{norms_at}/names"], file[f"{norms_at}/values"]):
        grad = ours(str(path))
        if grad is None:
            yield f"|{path}| (unused)", float(norm), 1e-12
            continue
        kernel = file[f"params/{path}"]
        repeats = (
            kernel.shape[2] ** 0.5 if kernel.ndim == 4 and str(path).startswith("embedding") else 1)
        yield compare(f"|{path}|", abs(float(grad.norm()) * repeats - float(norm)), float(norm))
    for path, array in group(file, full_at).items():
        if path == "global_norm" or ours(path) is None:
            continue
        array = array[:, :, :1] if array.ndim == 4 and path.startswith("embedding") else array
        theirs = avmae.official_tensor(path, torch.tensor(array)).double()
        mine = ours(path).double()
        yield compare(
            path, float((mine.reshape(theirs.shape) - theirs).norm()), float(theirs.norm()))


def check_pretraining(path, file, dtype):
    """Predictions, losses, gradients, and the unmasked encoder's output."""
    official = json.loads(str(file["config_json"]))["model"] if "config_json" in file.files else {}
    names = path.stem.split("__")
    encoder = ENCODERS[official.get("encoder_strategy") or names[1]]
    decoder = DECODERS[official.get("decoder_strategy") or names[2]]
    targets = sorted(OURS[k] for k in group(file, "loss_raw/") if k != "total")
    objective = "joint"
    if official.get("use_inpainting", "inpainting" in path.stem):
        objective = (
            "inpaint_both"
            if len(targets) == 2
            else f"{targets[0]}_from_{'audio' if targets == ['video'] else 'video'}")
    config, state = model_of(file, dtype, encoder=encoder, decoder=decoder, objective=objective)
    masks = tuple(
        {OURS[k]: torch.tensor(v).long() for k, v in group(file, which).items()}
        for which in ("unmasked_indices/", "masked_indices/"))
    ratio = {m: masks[1][m].shape[1] / config.tokens(m) for m in masks[1]}
    config = dataclasses.replace(
        config, mask={**config.mask, **{m: r + 1e-9 for m, r in ratio.items()}}, encoder=encoder,
        decoder=decoder)
    inputs = inputs_of(file, dtype)
    for name, standardise in ("raw", False), ("std", True):
        model = avmae.AVMAE(dataclasses.replace(config, standardise=standardise)).to(dtype)
        model.load_state_dict(state)
        out = model(inputs, masks)
        for key, prediction in out.predictions.items():
            theirs = {v: k for k, v in OURS.items()}[key.split("_")[0]]
            if not standardise:
                rows = avmae.take(torch.tensor(file[f"out/{theirs}"]), out.places[key])
                yield f"predictions {key}", error(prediction, rows), OUTPUT_BOUND[dtype]
            yield (
                f"loss {name} {key}", error(0.5 * out.losses[key], file[f"loss_{name}/{theirs}"]),
                OUTPUT_BOUND[dtype])
        yield f"loss {name}", error(out.loss, file[f"loss_{name}/total"]), OUTPUT_BOUND[dtype]
        out.loss.backward()
        yield from gradient_errors(model, file, f"_{name}")
    for m, features in model.features(inputs, pool=False).items():
        theirs = {v: k for k, v in OURS.items()}[m]
        yield f"features {m}", error(features, file[f"eval_out/{theirs}"]), OUTPUT_BOUND[dtype]


def check_finetuning(path, file, dtype):
    """Logits at test time and in training, tokens, stochastic depth, losses, gradients."""
    import train_finetune

    config, state = model_of(file, dtype, fusion_layer=2)
    model = avmae.Classifier(config).to(dtype)
    model.load_state_dict(state)
    inputs, names = inputs_of(file, dtype), {m: k for k, m in OURS.items()}
    bound = OUTPUT_BOUND[dtype]
    logits = model(inputs)
    yield "logits", error(torch.stack(list(logits.values())).mean(0), file["out/logits"]), bound
    tokens = model.features(inputs, pool=False)
    for m in config.modalities:
        yield f"tokens {m}", error(tokens[m], file[f"out/tokens_{names[m]}"]), bound
        yield f"pooled {m}", error(tokens[m].mean(1), file[f"out/prelogits_{names[m]}"]), bound
        yield f"training logits {m}", error(logits[m], file[f"train_out/logits_{names[m]}"]), bound
    if "droppath/patterns_in_call_order" in file.files:
        yield from check_stochastic_depth(model, inputs, file, names, bound)
    if "out_test_without_bottlenecks/logits" in file.files:
        alone = avmae.Classifier(dataclasses.replace(config, fusion_layer=config.size.layers)).to(
            dtype)
        alone.load_state_dict({k: v for k, v in state.items() if k != "trunk.bottleneck"})
        mean = torch.stack(list(alone(inputs).values())).mean(0)
        yield (
            "logits without bottlenecks", error(mean, file["out_test_without_bottlenecks/logits"]),
            bound)
    for kind in "softmax", "sigmoid":
        model.zero_grad()
        labels = {
            m: torch.tensor(file[f"{kind}/labels_{names[m]}"], dtype=dtype)
            for m in config.modalities}
        loss = train_finetune.classification_loss(model(inputs), labels, kind, smoothing=0.3)
        yield f"{kind} loss", error(loss, file[f"{kind}/loss"]), bound
        loss.backward()
        yield from gradient_errors(model, file, f"{kind}/", config.modalities[0])
        mean = {"all": torch.stack(list(logits.values())).mean(0)}
        onehot = {"all": torch.tensor(file[f"{kind}/labels_onehot"], dtype=dtype)}
        loss = train_finetune.classification_loss(mean, onehot, kind, smoothing=0.3)
        yield (
            f"{kind} loss of mean logits", error(loss, file[f"{kind}/eval_loss_fn_on_avg_logits"]),
            bound)


def check_stochastic_depth(model, inputs, file, names, bound):
    """The file's patterns in call order: layer 1.., modality, attention then MLP; 1 = dropped."""
    modalities, layers = model.config.modalities, model.config.size.layers
    patterns = 1 - torch.tensor(file["droppath/patterns_in_call_order"]).float()
    patterns = patterns.reshape(layers - 1, len(modalities), 2, -1, 1, 1)
    first = torch.ones_like(patterns[:1])
    patterns = torch.cat([first, patterns]).to(next(model.parameters()))
    logits = model(inputs, {m: patterns[:, i] for i, m in enumerate(modalities)})
    for m in modalities:
        yield (
            f"stochastic depth logits {m}", error(logits[m], file[f"droppath/logits_{names[m]}"]),
            bound)


def check(path, dtype):
    """Yields (what, error, bound) for a reference file."""
    path = pathlib.Path(path)
    file = np.load(path)
    pretraining = "config_json" in file.files or path.name.startswith("pretrain")
    yield from (check_pretraining if pretraining else check_finetuning)(path, file, dtype)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+")
    bad = 0
    for path in parser.parse_args().files:
        for dtype in torch.float64, torch.float32:
            rows = list(check(path, dtype))
            bad += sum(not e <= bound for _, e, bound in rows)
            print(
                f"\n{path} in {str(dtype)[6:]}: {len(rows)} comparisons, "
                f"{sum(not e <= bound for _, e, bound in rows)} above their bound")
            gradients = [r for r in rows if "/" in r[0]]
            for what, e, bound in [r for r in rows if r not in gradients] + sorted(
                gradients, key=lambda r: -r[1] / r[2])[:5]:
                print(f"  {what:60s} {e:9.2e}  {'ok' if e <= bound else f'ABOVE {bound:.0e}'}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
