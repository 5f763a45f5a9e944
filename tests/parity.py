"""Compare our models with numbers of the authors' JAX model: python tests/parity.py FILE.npz ...

Prints the error of every output and exits 1 if one is above its bound. Errors of outputs are
max|a - b| / max(1, max|b|); errors of gradients are relative L2 norms, tensor by tensor. Settings
that parameters do not tell are read from `config_json` in the file, or from its name.
"""

import argparse
import json
import pathlib
import sys
from dataclasses import replace
from unittest import mock

import numpy as np
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import avmae  # noqa: E402
import convert_weights  # noqa: E402

OUTPUT_BOUND = {torch.float64: 3e-6, torch.float32: 5e-6}
GRADIENT_BOUND = 1e-4
KEY_BIAS_BOUND = 1e-6  # relative to the global norm, since this gradient is exactly 0
OFFICIAL = convert_weights.OFFICIAL_MODALITIES
MODALITY = {official: m for m, official in OFFICIAL.items()}
ENCODERS = {
    "separate_encoders": "separate", "concat_and_encode": "early", "same_encoder": "shared",
    "separate_encoders_and_concat": "mid"}
DECODERS = {"same_decoder": "shared", "separate_decoders": "separate", "concat_and_decode": "early"}


def error(ours, reference):
    """Return the largest difference relative to the largest reference value, if that is above 1."""
    reference = torch.as_tensor(np.asarray(reference), dtype=torch.float64)
    ours = torch.as_tensor(ours).detach().double()
    return ((ours - reference).abs().max() / max(1.0, reference.abs().max())).item()


def average(logits):
    return torch.stack(list(logits.values())).mean(0)


def group(file, prefix):
    """Return {rest of the key: array} for keys with this prefix."""
    return {key[len(prefix) :]: file[key] for key in file if key.startswith(prefix)}


def by_modality(file, prefix, dtype=None):
    """Return {m: tensor} for arrays whose key is a prefix and an official modality."""
    return {MODALITY[k]: torch.tensor(v, dtype=dtype) for k, v in group(file, prefix).items()}


def make_inputs(file, dtype):
    """Return inputs {m: tensor}; official spectrograms have one channel or three equal ones."""
    inputs = by_modality(file, "inputs/", dtype)
    return {m: x[..., 0] if m == "audio" else x for m, x in inputs.items()}


def load(file, dtype, **assume):
    """Return config, inputs, our state dict and the official parameters it was computed from."""
    params = {
        path: torch.tensor(x, dtype=dtype, requires_grad=True)
        for path, x in group(file, "params/").items()}
    config, state, _ = convert_weights.from_official(params, **assume)

    inputs = make_inputs(file, dtype)
    modalities = {m: x.with_shape_of(inputs[m]) for m, x in config.modalities.items()}
    return replace(config, modalities=modalities), inputs, state, params


def gradient_errors(model, state, params, file, at):
    """Compare gradients with respect to official parameters: global norm, norms and arrays.

    Gradients go back through the conversion of weights. `at` is the prefix of their keys in the
    file, such as "grad_raw/" or "softmax/grad/".
    """
    used = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    grads = torch.autograd.grad(
        [state[name] for name in used], list(params.values()), list(used.values()),
        retain_graph=True, allow_unused=True)
    grads = {path: grad.double() for path, grad in zip(params, grads) if grad is not None}

    key = f"{at}global_norm" if f"{at}global_norm" in file else f"{at[:-1]}_global_norm"
    scale = float(file[key])
    total = sum(grad.norm() ** 2 for grad in grads.values()).item() ** 0.5
    yield "global gradient norm", abs(total - scale) / max(1.0, scale), GRADIENT_BOUND

    norms = at.replace("grad", "gradnorm")
    norm_of = dict(zip(map(str, file[f"{norms}names"]), map(float, file[f"{norms}values"])))
    yield "parameters without a norm", len(grads.keys() - norm_of.keys()), 0

    def compare(path, difference, size):
        if path.strip("|").endswith("key/bias"):
            return f"{path} (exactly 0)", difference / scale, KEY_BIAS_BOUND
        return path, difference / max(size, 1e-12), GRADIENT_BOUND

    for path, norm in norm_of.items():
        if path in grads:
            yield compare(f"|{path}|", abs(float(grads[path].norm()) - norm), norm)
        else:  # a module that this objective does not use
            yield f"|{path}| (unused)", norm, 1e-12
    for path, array in group(file, at).items():
        if path in grads:
            official = torch.tensor(array).double()
            yield compare(path, float((grads[path] - official).norm()), float(official.norm()))


def strategies(path, file):
    """Return encoder, decoder and objective from the config in a file, or from its name."""
    config = json.loads(str(file["config_json"]))["model"] if "config_json" in file else {}
    _, encoder, decoder, *_ = [*path.stem.split("__"), "", ""]
    target, *others = sorted(MODALITY[k] for k in group(file, "loss_raw/") if k != "total")

    objective = "joint"
    if config.get("use_inpainting", "inpainting" in path.stem):
        context = {"video": "audio", "audio": "video"}[target]
        objective = "inpaint_both" if others else f"{target}_from_{context}"
    return {
        "encoder": ENCODERS[config.get("encoder_strategy") or encoder],
        "decoder": DECODERS[config.get("decoder_strategy") or decoder], "objective": objective}


def check_pretraining(path, file, dtype):
    """Compare predictions, losses, gradients and the features of whole clips."""
    config, inputs, state, params = load(file, dtype, **strategies(path, file))
    ids = [by_modality(file, f"{which}_indices/", torch.long) for which in ("unmasked", "masked")]
    bound, modalities = OUTPUT_BOUND[dtype], {
        m: replace(modality, mask_ratio=(ids[1][m].shape[1] + 0.5) / modality.num_tokens)
        for m, modality in config.modalities.items()}
    config = replace(config, modalities=modalities)

    for name in "raw", "std":
        model = avmae.AVMAE(replace(config, norm_pix=name == "std")).to(dtype)
        model.load_state_dict(state)
        out = model(inputs, ids)
        for (t, c), pred in out.preds.items():
            rows = avmae.gather_tokens(torch.tensor(file[f"out/{OFFICIAL[t]}"]), out.ids_pred[t, c])
            yield f"{name} predictions {t} from {c}", error(pred, rows), bound
            loss = error(0.5 * out.losses[t, c], file[f"loss_{name}/{OFFICIAL[t]}"])
            yield f"loss {name} {t} from {c}", loss, bound

        yield f"loss {name}", error(out.loss, file[f"loss_{name}/total"]), bound
        out.loss.backward()
        yield from gradient_errors(model, state, params, file, f"grad_{name}/")

    for m, features in model.features(inputs, pool=False).items():
        yield f"features {m}", error(features, file[f"eval_out/{OFFICIAL[m]}"]), bound


def check_finetuning(path, file, dtype):
    """Compare logits at test time and in training, tokens, stochastic depth, losses, gradients."""
    config, inputs, state, params = load(file, dtype, fusion_layer=2)
    bound = OUTPUT_BOUND[dtype]

    def model_with(state=state, **settings):
        model = avmae.Classifier(replace(config, **settings)).to(dtype)
        model.load_state_dict(state)
        return model.eval()

    model, last = model_with(), {}
    for m, blocks in model.encoder.blocks.items():
        blocks[-1].register_forward_hook(lambda block, x, y, m=m: last.update({m: y}))
    logits, tokens = model(inputs), model.features(inputs, pool=False)
    yield "logits", error(average(logits), file["out/logits"]), bound
    if len(last) > 1 and "out/bottleneck" in file:  # the final norm hides its scale from the logits
        both = {m: y[:, -file["out/bottleneck"].shape[1] :] for m, y in last.items()}
        yield "bottleneck tokens", error(average(both), file["out/bottleneck"]), bound

    for m, official in ((m, OFFICIAL[m]) for m in config.modalities):
        yield f"tokens {m}", error(tokens[m], file[f"out/tokens_{official}"]), bound
        yield f"pooled {m}", error(tokens[m].mean(1), file[f"out/prelogits_{official}"]), bound
        yield f"training logits {m}", error(logits[m], file[f"train_out/logits_{official}"]), bound

    if "droppath/patterns_in_call_order" in file:
        yield from check_stochastic_depth(model_with(drop_path=0.3), inputs, file, bound)
    if "out_test_without_bottlenecks/logits" in file:
        no_bottleneck = {k: v for k, v in state.items() if k != "encoder.bottleneck"}
        alone = model_with(no_bottleneck, fusion_layer=config.size.depth)(inputs)
        official = file["out_test_without_bottlenecks/logits"]
        yield "logits without bottlenecks", error(average(alone), official), bound

    for kind in "softmax", "sigmoid":
        yield from check_loss(model, inputs, kind, file, bound)
        yield from gradient_errors(model, state, params, file, f"{kind}/grad/")


def check_loss(model, inputs, kind, file, bound):
    """Compare the loss per modality, whose gradients it leaves, and the loss of the mean logits."""
    from train_finetune import classification_loss

    model.zero_grad()
    logits, dtype = model(inputs), model.head.weight.dtype
    labels = {m: torch.tensor(file[f"{kind}/labels_{OFFICIAL[m]}"], dtype=dtype) for m in logits}
    loss = classification_loss(logits, labels, kind, smoothing=0.3)
    yield f"{kind} loss", error(loss, file[f"{kind}/loss"]), bound
    loss.backward()

    onehot = {"all": torch.tensor(file[f"{kind}/labels_onehot"], dtype=dtype)}
    loss = classification_loss({"all": average(logits)}, onehot, kind, smoothing=0.3)
    official = file[f"{kind}/eval_loss_fn_on_avg_logits"]
    yield f"{kind} loss of mean logits", error(loss, official), bound


def check_stochastic_depth(model, inputs, file, bound):
    """Compare logits with the drop patterns of the file (1: dropped), which are in call order."""
    patterns = iter(torch.tensor(file["droppath/patterns_in_call_order"]))
    rates = []

    def forward(self, x):
        if self.rate == 0:
            return x
        rates.append(self.rate)
        return x * (1 - next(patterns).to(x))[:, None, None]

    with mock.patch.object(avmae.DropPath, "forward", forward):
        logits = model(inputs)

    yield "stochastic depth rates", error(rates, file["droppath/probabilities_in_call_order"]), 1e-6
    for m in logits:
        official = file[f"droppath/logits_{OFFICIAL[m]}"]
        yield f"stochastic depth logits {m}", error(logits[m], official), bound


def check(path, dtype):
    """Yield (name, error, bound) for every comparison with a reference file."""
    path = pathlib.Path(path)
    with np.load(path) as arrays:
        file = dict(arrays)

    pretraining = "config_json" in file or path.name.startswith("pretrain")
    yield from (check_pretraining if pretraining else check_finetuning)(path, file, dtype)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+")
    bad = 0

    for path in parser.parse_args().files:
        for dtype in torch.float64, torch.float32:
            rows = list(check(path, dtype))
            above = sum(not e <= bound for _, e, bound in rows)
            bad += above
            print(
                f"\n{path} in {str(dtype)[6:]}: {len(rows)} comparisons, {above} above their bound")

            gradients = sorted((r for r in rows if "/" in r[0]), key=lambda r: -r[1] / r[2])
            for what, e, bound in [r for r in rows if "/" not in r[0]] + gradients[:5]:
                print(f"  {what:60s} {e:9.2e}  {'ok' if e <= bound else f'ABOVE {bound:.0e}'}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
