"""Conversion of published weights: what it reads, assumes, changes and refuses."""

import argparse
import pathlib
import pickle
import re
import subprocess
import sys
from functools import partial, reduce

import msgpack
import numpy as np
import pytest
import torch

import avmae
import parity
from parity import OFFICIAL, convert_weights
from test_model import Hostile
from test_reference import MID, SHARED, SIZES, reference

HEAD = convert_weights.OFFICIAL_HEAD
PRETRAINED, FINETUNED = (reference(f"{name}.npz") for name in (MID, "mbt__rgb_spectrogram"))
TOOL = convert_weights.__file__


def flax_bytes(arrays, at="params"):
    """Serialize {"a/b/c": array} as Flax does, below the name `at` and beside a step."""
    tree = {"global_step": np.int32(7)}
    for path, x in arrays.items():
        *parts, last = f"{at}/{path}".split("/")
        reduce(lambda node, part: node.setdefault(part, {}), parts, tree)[last] = np.asarray(x)

    def pack(x):
        packed = msgpack.packb((x.shape, x.dtype.name, x.tobytes()))
        return msgpack.ExtType(1 if x.ndim else 3, packed)

    return msgpack.packb(tree, default=pack)


def official(file):
    """Return the parameters {path: tensor} of a reference file."""
    return {path: torch.tensor(x) for path, x in parity.group(file, "params/").items()}


# ---------------------------------------------------------------------------- the authors' models


@pytest.mark.parametrize("at", ["optimizer/target", "params", "released"])
def test_flax_checkpoints_of_both_layouts(tmp_path, at):
    path = SHARED / "scenic_checkpoint_pretrain_mid" if at == "released" else tmp_path / "made"
    if at != "released":
        path.write_bytes(flax_bytes(official(PRETRAINED), at))
    elif not path.exists():
        pytest.skip("files in the released format are not committed")

    model, notes = convert_weights.convert(path)
    config = model.config
    assert (config.encoder, config.joint_layers, config.decoder) == ("mid", 2, "shared")
    assert (config.size, config.decoder_size) == tuple(SIZES.values())
    assert [modality.patch for modality in config.modalities.values()] == [(2, 8, 8), (8, 8)]
    assert notes[0] == "assumed: encoder mid, decoder shared, objective joint"
    features = model.features(parity.make_inputs(PRETRAINED, torch.float32), pool=False)
    for m, name in OFFICIAL.items():
        assert parity.error(features[m], PRETRAINED[f"eval_out/{name}"]) < 5e-6


def test_settings_that_parameters_do_not_tell_are_assumed_and_listed():
    params = official(FINETUNED)

    def config_of(classes, **assume):
        head = {f"{HEAD}/kernel": torch.zeros(48, classes), f"{HEAD}/bias": torch.zeros(classes)}
        config, _, notes = convert_weights.from_official(params | head, **assume)
        return config, notes

    config, notes = config_of(7)
    assert config.fusion_layer == 2 and "fusion layer 2 of 4" in notes[0]
    assert config_of(7, fusion_layer=3)[0].fusion_layer == 3
    for wrong in {"decoder": "early"}, {"encoder": "shared"}:
        with pytest.raises(avmae.UserError, match="cannot be chosen for this file"):
            config_of(7, **wrong)
    assert config_of(397)[0].num_classes == (97, 300)
    config, notes = config_of(527)
    audio = config.modalities["audio"]
    assert (audio.mean, audio.std) == (1.102, 2.762) and "2.762" in notes[1]
    assert (config.modalities["video"].mean, config.num_classes) == (0, (527,))

    for i in range(24):  # as deep as the released models
        for path in [path for path in params if "encoderblock_0" in path]:
            params[path.replace("encoderblock_0", f"encoderblock_{i}")] = params[path]
    assert config_of(527)[0].fusion_layer == 18 and config_of(309)[0].fusion_layer == 16


STACKS = {  # names of the layers of each strategy
    "separate_encoders": ["Transformer_rgb", "Transformer_spectrogram"],
    "separate_encoders_and_concat": [
        "Transformer_rgb", "Transformer_spectrogram", "Transformer_concat"],
    "same_encoder": ["Transformer"], "concat_and_encode": ["Transformer"],
    "separate_decoders": ["Decoder_rgb", "Decoder_spectrogram"],
    "same_decoder": ["Decoder"], "concat_and_decode": ["Decoder"]}


@pytest.mark.parametrize("decoder", parity.DECODERS)
@pytest.mark.parametrize("encoder", parity.ENCODERS)
def test_strategies_are_found_in_the_parameters(encoder, decoder):
    params = {  # files have this name or the other
        path.replace("embedding_spectrogram", "embedding_spec"): x
        for path, x in official(PRETRAINED).items()}
    blocks = {like: parity.group(params, f"{like}/") for like in ("Transformer_rgb", "Decoder")}
    params = {path: x for path, x in params.items() if not path.startswith((*blocks, "Transf"))}
    for stack in STACKS[encoder] + STACKS[decoder]:
        like = "Decoder" if "Decoder" in stack else "Transformer_rgb"
        params |= {f"{stack}/{path}": x for path, x in blocks[like].items()}

    names, assume = (parity.ENCODERS[encoder], parity.DECODERS[decoder]), {}
    if names[0] in ("early", "shared"):
        with pytest.raises(avmae.UserError, match="--encoder early or --encoder shared"):
            convert_weights.from_official(params)
        assume["encoder"] = names[0]
    if names[1] == "early":
        assume["decoder"] = "early"

    config, state, _ = convert_weights.from_official(params, **assume)
    assert (config.encoder, config.decoder, list(config.modalities)) == (*names, ["video", "audio"])
    assert config.size.depth == (4 if names[0] == "mid" else 2)
    avmae.build_model(config).load_state_dict(state)


def test_an_unused_bottleneck_is_left_out():
    params, audio = official(FINETUNED), r"_spec|/encoder_norm|Head|^bottleneck"
    one = {
        "video": {path: x for path, x in params.items() if "spec" not in path},
        "audio": {path.replace("_spec/", "/"): params[path]
                  for path in params if re.search(audio, path)}}

    for m, params in one.items():
        config, _, notes = convert_weights.from_official(params)
        assert list(config.modalities) == [m]
        assert notes[-1] == "left out, unused: bottleneck"


# ------------------------------------------------------- ViTs of timm, Hugging Face, MAE, VideoMAE

LAYERS = {  # timm's name of a layer: shape; Hugging Face's name in files; in memory
    "norm1": ((192,), "layernorm_before", "layernorm_before"),
    "norm2": ((192,), "layernorm_after", "layernorm_after"),
    "attn.qkv": ((576, 192), "attention.attention.{}", "attention.{}_proj"),
    "attn.proj": ((192, 192), "attention.output.dense", "attention.o_proj"),
    "mlp.fc1": ((96, 192), "intermediate.dense", "mlp.fc1"),
    "mlp.fc2": ((192, 96), "output.dense", "mlp.fc2")}
OUTSIDE = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
KERNEL = "patch_embed.proj.weight"
QKV = [("query", "key", "value"), ("q", "k", "v")]


def vit(*patch, channels=3):
    """Return the state dict of a small ViT with timm's names."""
    torch.manual_seed(0)
    state = {
        "cls_token": torch.zeros(1, 1, 192), "pos_embed": torch.zeros(1, 5, 192),
        "norm.weight": torch.rand(192), "norm.bias": torch.rand(192),
        "head.weight": torch.zeros(10, 192), "head.bias": torch.zeros(10),
        KERNEL: torch.randn(192, channels, *(patch or (8, 8))),
        "patch_embed.proj.bias": torch.randn(192)}

    for i in range(3):
        for name, (shape, *_) in LAYERS.items():
            state[f"blocks.{i}.{name}.weight"] = torch.randn(shape)
            state[f"blocks.{i}.{name}.bias"] = torch.randn(shape[0])
    return state


def hugging_face(state, style, prefix):
    """Rename a state dict from timm to Hugging Face, as in files (style 0) or in memory (1)."""
    out = {
        f"{prefix}embeddings.cls_token": state["cls_token"], "classifier.weight": torch.ones(9, 4),
        "decoder.decoder_layers.0.layernorm_before.weight": torch.ones(4)}

    for name, x in state.items():
        name, _, kind = name.rpartition(".")
        if name in OUTSIDE:
            out[f"{prefix}{OUTSIDE[name]}.{kind}"] = x
        elif name.startswith("blocks."):
            _, i, layer = name.split(".", 2)
            at = f"{prefix}{('encoder.layer', 'layers')[style]}.{i}.{LAYERS[layer][1 + style]}"
            parts = zip(QKV[style], x.chunk(3)) if layer == "attn.qkv" else [("", x)]
            out |= {f"{at.format(part)}.{kind}": y for part, y in parts}
    return out


def convert(content, path):
    """Save a file, convert it, and return the model and the notes."""
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(content, path)
    else:
        torch.save(content, path)
    return convert_weights.convert(path)


def test_a_vit_initializes_both_streams_of_a_classifier(tmp_path):
    state = vit()
    wrapped = {"state_dict": {f"module.{k}": v for k, v in state.items()}}
    source, notes = convert(wrapped, tmp_path / "vit.pth")
    assert notes[0] == "assumed: 3 attention heads" and "erf GELU" in notes[2]
    assert notes[3] == "left out: cls_token, head, pos_embed"
    assert source.config.size == avmae.TransformerConfig(192, 3, 3, 96)

    target = avmae.Classifier(avmae.ClassifierConfig(
        source.config.modalities, source.config.size, fusion_layer=1, num_classes=(7,)))
    avmae.transfer(source, target)

    kernel = state[KERNEL]
    video = target.patch_embed["video"].proj.weight.reshape(192, 2, 8, 8, 3)  # (t, h, w, c)
    assert not video[:, 0].any() and video[:, 1].equal(kernel.permute(0, 2, 3, 1))
    audio = target.patch_embed["audio"].proj.weight.reshape(192, 8, 8)
    torch.testing.assert_close(audio, kernel.sum(1))
    for blocks in target.encoder.blocks.values():
        for name, x in blocks[2].state_dict().items():
            assert x.equal(state[f"blocks.2.{name}"])
    assert target.encoder.norm.weight.equal(state["norm.weight"])


def test_parts_that_a_vit_lacks_are_initialized_with_a_fixed_seed(tmp_path):
    path, state = tmp_path / "vit.pth", vit()
    torch.manual_seed(1)
    first, notes = convert(state, path)
    after = torch.rand(3)
    assert notes[-1] == "initialized: decoder, decoder_embed, decoder_pred, mask_token"
    torch.manual_seed(1)
    assert after.equal(torch.rand(3))  # the global generator is left alone

    avmae.save_model(first, tmp_path / "out.pt")
    torch.manual_seed(2)
    for model in convert(state, path)[0], avmae.load_model(tmp_path / "out.pt"):
        for name, x in model.state_dict().items():
            assert x.equal(first.state_dict()[name]), name
    assert first.decoder.stages[0]["all"].blocks[0].mlp.fc1.weight.std() > 0.01


@pytest.mark.parametrize("name", ["a.bin", "a.safetensors"])
def test_a_vit_of_one_modality(tmp_path, name):
    state = vit(channels=1)
    model, _ = convert(state, tmp_path / name)
    assert list(model.config.modalities) == ["audio"]
    assert model.patch_embed["audio"].proj.weight.equal(state[KERNEL].reshape(192, 64))
    model, notes = convert(vit(14, 14), tmp_path / name)  # does not tile spectrograms
    assert list(model.config.modalities) == ["video"] and notes[1].endswith("serves video")


def release(state):
    """Return a checkpoint as MAE and VideoMAE save it, with settings and optimizer."""
    parameters = [torch.nn.Parameter(torch.ones(2, 2))]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    parameters[0].sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = np.float64(1e-4)  # VideoMAE's schedule is a numpy array
    args = argparse.Namespace(
        lr=1e-3, betas=[0.9, 0.95], output_dir=pathlib.PosixPath("out"), new=argparse.Namespace(),
        window_size=(8, 14, 14), weight_decay=np.float32(0.05), device=torch.device("cpu"))
    return {"model": state, "optimizer": optimizer.state_dict(), "epoch": 3, "args": args,
            "scaler": {"scale": 65536.0, "_growth_tracker": 7}}


def legacy(content, path):
    """Save a torch file without a zip, with the names of numpy 1."""
    torch.save(content, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"cnumpy._core.", b"cnumpy.core."))


@pytest.mark.parametrize("save", [torch.save, legacy])
def test_a_release_of_mae(tmp_path, save):
    state, path = vit() | {"mask_token": torch.zeros(1, 1, 32)}, tmp_path / "mae.pth"
    state |= {f"decoder_{k}": v for k, v in vit().items() if k.startswith("blocks.0")}
    save(release(state), path)
    model, notes = convert_weights.convert(path)
    blocks = model.encoder.blocks_for("audio")
    assert blocks[2].mlp.fc1.weight.equal(state["blocks.2.mlp.fc1.weight"]) and len(blocks) == 3
    assert notes[3] == "left out: cls_token, decoder_blocks, head, mask_token, pos_embed"


@pytest.mark.parametrize("save", [torch.save, legacy])
def test_a_release_of_videomae(tmp_path, save):
    """It has tubelets, an encoder prefix, and no biases of keys."""
    state = {f"encoder.{k}": v for k, v in vit(2, 8, 8).items() if "qkv.bias" not in k}
    for i in range(3):
        state[f"encoder.blocks.{i}.attn.q_bias"] = torch.ones(192)
        state[f"encoder.blocks.{i}.attn.v_bias"] = torch.full((192,), 2.0)
    state["decoder.blocks.0.norm1.weight"] = torch.ones(4)

    path = tmp_path / "videomae.pth"
    save(release(state), path)
    source, _ = convert_weights.convert(path)
    bias = source.encoder.blocks_for("video")[0].attn.qkv.bias
    assert bias.equal(torch.tensor([1.0, 0.0, 2.0]).repeat_interleave(192))
    ours = source.patch_embed["video"].proj.weight.reshape(192, 2, 8, 8, 3)
    assert ours.equal(state[f"encoder.{KERNEL}"].permute(0, 2, 3, 4, 1))


@pytest.mark.parametrize("style", [0, 1], ids=["files", "memory"])
@pytest.mark.parametrize("prefix, patch", [
    ("vit.", (8, 8)), ("", (8, 8)), ("videomae.", (2, 8, 8))])
def test_names_of_hugging_face_equal_those_of_timm(prefix, patch, style):
    state = vit(*patch)
    renamed = hugging_face(state, style, prefix)
    if (style, prefix) == (0, "videomae."):  # has no biases of keys, and other names of biases
        renamed = {re.sub(r"(q)uery\.bias|(v)alue\.bias", r"\1\2_bias", k): x
                   for k, x in renamed.items() if not k.endswith("key.bias")}
        for i in range(3):
            state[f"blocks.{i}.attn.qkv.bias"][192:384] = 0

    config, weights, notes = convert_weights.from_vit(renamed)
    timm_config, timm_weights, _ = convert_weights.from_vit(state)
    assert notes[3] == "left out: classifier, cls_token, decoder"
    assert config == timm_config and weights.keys() == timm_weights.keys()
    assert all(x.equal(timm_weights[name]) for name, x in weights.items())


def test_a_final_norm_with_another_name_or_none_and_unknown_parameters(tmp_path):
    path, state = tmp_path / "vit.pth", vit()
    pooled = {f"fc_{k}" if k.startswith("norm.") else k: v for k, v in state.items()}
    none = {k: v for k, v in state.items() if not k.startswith("norm.")}
    for given, expected in (pooled, state["norm.weight"]), (none, torch.ones(192)):
        model, notes = convert(given, path)
        assert model.encoder.layers_for("video")[0].norm.weight.equal(expected)
        assert ("encoder norm" in notes[-1]) == (given is none)

    state["blocks.0.ls1.gamma"] = state.pop("blocks.1.norm1.bias")
    with pytest.raises(avmae.UserError, match="blocks.0.ls1.gamma, .*1.norm1.bias of 2 parameters"):
        convert(state, path)


def library_model(kind):
    """Return a small model of a library with the tanh GELU, its blocks and its norm."""
    if kind == "timm":
        model = pytest.importorskip("timm").models.VisionTransformer(
            32, 8, embed_dim=192, depth=2, num_heads=3, mlp_ratio=0.5,
            act_layer=partial(torch.nn.GELU, approximate="tanh"))
        return model, model.blocks, model.norm

    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        kind, hidden_size=192, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
        image_size=32, patch_size=8, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6,
        use_mean_pooling=False, decoder_hidden_size=32, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=4, decoder_intermediate_size=64, num_frames=4)
    task = "ImageClassification" if kind == "vit" else "PreTraining"
    model = getattr(transformers, f"AutoModelFor{task}").from_config(config)
    encoder = model.base_model
    blocks = encoder.layers if hasattr(encoder, "layers") else encoder.encoder.layer
    return model, blocks, encoder.layernorm


@pytest.mark.parametrize("kind", ["timm", "vit", "vit_mae", "videomae"])
def test_blocks_compute_the_same_as_the_libraries(tmp_path, kind):
    torch.manual_seed(0)
    model, blocks, norm = library_model(kind)
    for p in model.eval().parameters():
        torch.nn.init.normal_(p, std=0.1)
    path = tmp_path / "model.safetensors"
    if kind == "timm":
        pytest.importorskip("safetensors.torch").save_file(model.state_dict(), path)
    else:
        model.save_pretrained(tmp_path)  # names in files differ from those in memory

    same = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)
    (ours, _), x = convert_weights.convert(path), torch.randn(2, 5, 192)
    layers = ours.encoder.layers_for("video")[0]
    for library_block, block in zip(blocks, layers.blocks, strict=True):
        y = library_block(x)
        same(block(x), y[0] if isinstance(y, tuple) else y)
    same(layers.norm(x), norm(x))

    if kind == "videomae":
        video, embed = torch.rand(2, 4, 32, 32, 3), ours.patch_embed["video"]
        patches = model.base_model.embeddings.patch_embeddings(video.permute(0, 1, 4, 2, 3))
        same(embed.proj(embed.modality.patchify(video)), patches)


# ------------------------------------------------------------------------------------------- files


class HostileState(argparse.Namespace):
    def __reduce__(self):  # an allowed class, whose state is hostile
        return argparse.Namespace, (), {"x": Hostile()}


def test_hostile_and_damaged_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for at, evil in ("args", Hostile()), ("args", HostileState()), ("model", Hostile()):
        content = release(vit()) | {at: evil}
        for save in torch.save, legacy:
            save(content, pathlib.Path("evil.pth"))
            with pytest.raises(avmae.UserError, match="holds a Python object, .*[a-z]. Save a"):
                convert_weights.convert("evil.pth")

    matrix, flax = np.zeros((2, 3), np.float32), flax_bytes(official(PRETRAINED))
    misfit = {"Decoder/encoderblock_1/MlpBlock_0/Dense_0/kernel": torch.zeros(32, 63)}
    legacy(vit(), pathlib.Path("old.pth"))
    torch.save(vit(), "new.pth")
    old, new = (pathlib.Path(x).read_bytes() for x in ("old.pth", "new.pth"))

    def array(code, values):
        return msgpack.packb({"params": {"a": msgpack.ExtType(code, values)}})

    files = {
        "cut_flax": flax[: len(flax) // 2], "empty": b"", "text": b"hello world",
        "noise": bytes(range(256)) * 9, "cut.pth": new[:9000], "cut_old.pth": old[:9000],
        "evil.pkl": pickle.dumps(Hostile(), 2), "no_arrays": msgpack.packb({"params": {"a": 1}}),
        "unknown": flax_bytes({"Dense_0/kernel": matrix}),
        "half": flax_bytes({"Transformer/kernel": matrix}),
        "misfit": flax_bytes(official(PRETRAINED) | misfit),
        "object": array(1, msgpack.packb(((1,), "object", b"12345678"))),
        "function": array(1, msgpack.packb(((1,), "load", b"12345678"))),
        "extension": array(9, b"12345678"), "list": msgpack.packb([1, 2]),
        "a.safetensors": b"no header, no tensors",
        "list.pt": [1, 2], "number.pt": 3, "args.pt": release({})["args"],
        "other.pt": {"weights": torch.zeros(3)}, "numbers.pt": {1: torch.zeros(3)},
        "flat.pt": vit() | {KERNEL: torch.zeros(192, 192)}}

    for name, content in files.items():
        if isinstance(content, bytes):
            pathlib.Path(name).write_bytes(content)
        else:
            torch.save(content, name)

    for name in [*files, "missing.pt"]:
        with pytest.raises(avmae.UserError) as caught:
            convert_weights.convert(name)
        assert len(str(caught.value)) > 20 and "\n" not in str(caught.value), name
    assert not pathlib.Path("owned").exists()


def test_command_line(tmp_path):
    def run(*args):
        ran = subprocess.run(
            [sys.executable, TOOL, *args], cwd=tmp_path, capture_output=True, text=True)
        return ran.returncode, ran.stdout.splitlines(), ran.stderr.splitlines()

    torch.save(release(vit()), tmp_path / "mae.pth")
    with pytest.raises(avmae.UserError, match=r"python tools/convert_weights.py FILE OUT.pt"):
        avmae.load_model(tmp_path / "mae.pth")
    code, out, errors = run("mae.pth", "out.pt")
    assert (code, errors, out[-1]) == (0, [], "saved out.pt") and len(out) == 6

    assert avmae.load_model(tmp_path / "out.pt").config.size.depth == 3

    for args, message in (
            (("mae.pth", "mae.pth"), "OUT.pt is FILE itself"),
            (("mae.pth", "b.pt", "--encoder", "early"), "leave out encoder"),
            (("mae.pth", "none/b.pt"), "could not save none/b.pt"),
            (("out.pt", "b.pt"), "a checkpoint of this project"),
            (("none.pth", "b.pt"), "cannot read none.pth: No such file")):
        code, out, errors = run(*args)
        assert (code, out, len(errors)) == (1, [], 1) and message in errors[0], (args, errors)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["mae.pth", "out.pt"]
    assert "--fusion-layer N" in "\n".join(run("--help")[1])
