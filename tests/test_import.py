"""Other people's weights, export, and files that are none."""

import pathlib
import pickle
import re
from functools import partial, reduce

import msgpack
import numpy as np
import pytest
import torch

import avmae
import parity
from test_model import clips
from test_reference import BOTH, MID, SHARED, SIZES, reference

HEAD = "ProjectionHeadAndClassifier_0/output_projection"
PRETRAINED, FINETUNED = (reference(f"{name}.npz") for name in (MID, "mbt__rgb_spectrogram"))


def encode(arrays, at="params"):
    """{"a/b/c": array} as Flax writes it, below the name `at` and with a step beside it."""
    tree = {"global_step": np.int32(7)}
    for path, x in arrays.items():
        *parts, last = f"{at}/{path}".split("/")
        reduce(lambda node, part: node.setdefault(part, {}), parts, tree)[last] = np.asarray(x)

    def pack(x):
        packed = msgpack.packb((x.shape, x.dtype.name, x.tobytes()))
        return msgpack.ExtType(1 if x.ndim else 3, packed)

    return msgpack.packb(tree, default=pack)


def official(file):
    """The file's parameters {path: tensor}."""
    return {path: torch.tensor(x) for path, x in parity.group(file, "params/").items()}


# ------------------------------------------------------------------------------------- the authors'


@pytest.mark.parametrize("at", ["optimizer/target", "params", "released"])
def test_flax_checkpoints_of_both_layouts(tmp_path, at):
    path = SHARED / "scenic_checkpoint_pretrain_mid" if at == "released" else tmp_path / "made"
    if at != "released":
        path.write_bytes(encode(official(PRETRAINED), at))
    elif not path.exists():
        pytest.skip("files in the released format are not committed")

    model = avmae.load_model(path)
    config = model.config
    assert (config.encoder, config.num_joint, config.decoder) == ("mid", 2, "shared")
    assert (config.size, config.decoder_size) == tuple(SIZES.values())
    assert [modality.patch for modality in config.modalities.values()] == [(2, 8, 8), (8, 8)]
    features = model.features(parity.inputs_of(PRETRAINED, torch.float32), pool=False)
    for m, theirs in parity.THEIRS.items():
        assert parity.error(features[m], PRETRAINED[f"eval_out/{theirs}"]) < 5e-6


def test_what_cannot_be_told_is_assumed_and_said():
    params = official(FINETUNED)

    def of(classes, **assume):
        head = {f"{HEAD}/kernel": torch.zeros(48, classes), f"{HEAD}/bias": torch.zeros(classes)}
        checkpoint = avmae.from_official(params | head, **assume)
        return avmae.from_dict(checkpoint["config"]), checkpoint["notes"]

    config, notes = of(7)
    assert config.fusion_layer == 2 and "fusion layer 2 of 4" in notes[0]
    assert of(7, fusion_layer=3)[0].fusion_layer == 3
    assert of(397)[0].num_classes == (97, 300)
    config, notes = of(527)
    audio = config.modalities["audio"]
    assert (audio.mean, audio.std) == (1.102, 2.762) and "2.762" in notes[1]
    assert (config.modalities["video"].mean, config.num_classes) == (0, (527,))

    for i in range(24):  # as deep as the released ones
        for path in [path for path in params if "encoderblock_0" in path]:
            params[path.replace("encoderblock_0", f"encoderblock_{i}")] = params[path]
    assert of(527)[0].fusion_layer == 18 and of(309)[0].fusion_layer == 16


STACKS = {  # of each strategy
    "separate_encoders": ["Transformer_rgb", "Transformer_spectrogram"],
    "separate_encoders_and_concat": [
        "Transformer_rgb", "Transformer_spectrogram", "Transformer_concat"],
    "same_encoder": ["Transformer"], "concat_and_encode": ["Transformer"],
    "separate_decoders": ["Decoder_rgb", "Decoder_spectrogram"],
    "same_decoder": ["Decoder"], "concat_and_decode": ["Decoder"]}


@pytest.mark.parametrize("decoder", parity.DECODERS)
@pytest.mark.parametrize("encoder", parity.ENCODERS)
def test_parameters_tell_all_but_what_a_single_stack_is(encoder, decoder):
    params = {  # both names are around
        path.replace("embedding_spectrogram", "embedding_spec"): x
        for path, x in official(PRETRAINED).items()}
    blocks = {like: parity.group(params, f"{like}/") for like in ("Transformer_rgb", "Decoder")}
    params = {path: x for path, x in params.items() if not path.startswith((*blocks, "Transf"))}
    for stack in STACKS[encoder] + STACKS[decoder]:
        like = "Decoder" if "Decoder" in stack else "Transformer_rgb"
        params |= {f"{stack}/{path}": x for path, x in blocks[like].items()}

    names, assume = (parity.ENCODERS[encoder], parity.DECODERS[decoder]), {}
    if names[0] in ("early", "shared"):
        with pytest.raises(avmae.UserError, match="early or shared"):
            avmae.from_foreign(params)
        assume["encoder"] = names[0]
    if names[1] == "early":
        assume["decoder"] = "early"

    checkpoint = avmae.from_official(params, **assume)
    config = avmae.from_dict(checkpoint["config"])
    assert (config.encoder, config.decoder, list(config.modalities)) == (*names, ["video", "audio"])
    assert config.size.depth == (4 if names[0] == "mid" else 2)
    avmae.build(config).load_state_dict(checkpoint["model"])


def test_an_unused_bottleneck_is_dropped_and_said():
    params, audio = official(FINETUNED), r"_spec|/encoder_norm|Head|^bottleneck"
    one = {
        "video": {path: x for path, x in params.items() if "spec" not in path},
        "audio": {path.replace("_spec/", "/"): params[path]
                  for path in params if re.search(audio, path)}}

    for m, params in one.items():
        checkpoint = avmae.from_foreign(params)
        assert list(checkpoint["config"]["modalities"]) == [m]
        assert checkpoint["notes"] == ["left out, unused by this model: bottleneck"]


# ---------------------------------------------------------------------- timm's and Hugging Face's

LAYERS = {  # of a small ViT's blocks, by timm's names: shape; Hugging Face's in files, in memory
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
    """A state dict in timm's names -> in Hugging Face's, of files (style 0) or in memory (1)."""
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


def load(state, path):
    """The model of a file with this state dict."""
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        torch.save(state, path)
    return avmae.load_model(path)


def test_a_vit_initializes_both_streams(tmp_path):
    state = vit()
    wrapped = {"state_dict": {f"module.{k}": v for k, v in state.items()}}
    source = load(wrapped, tmp_path / "vit.pth")
    assert "cls_token, head, pos_embed" in source.notes[1] and "erf GELU" in source.notes[2]
    assert source.config.size == avmae.Size(192, 3, 3, 96)

    target = avmae.Classifier(avmae.ClassifierConfig(
        source.config.modalities, source.config.size, fusion_layer=1, num_classes=(7,)))
    avmae.transfer(source, target)

    kernel = state[KERNEL]
    video = target.patch_embed["video"].proj.weight.reshape(192, 2, 8, 8, 3)  # (t, h, w, c)
    assert not video[:, 0].any() and video[:, 1].equal(kernel.permute(0, 2, 3, 1))
    audio = target.patch_embed["audio"].proj.weight.reshape(192, 8, 8)
    torch.testing.assert_close(audio, kernel.sum(1))
    for blocks in target.trunk.blocks.values():
        for name, x in blocks[2].state_dict().items():  # timm's names are ours
            assert x.equal(state[f"blocks.2.{name}"])
    assert target.trunk.norm.weight.equal(state["norm.weight"])


@pytest.mark.parametrize("name", ["a.bin", "a.safetensors"])
def test_a_vit_of_one_channel_is_an_audio_model(tmp_path, name):
    source, kernel = load(vit(channels=1), tmp_path / name), vit(channels=1)[KERNEL]
    assert list(source.config.modalities) == ["audio"]
    assert source.patch_embed["audio"].proj.weight.equal(kernel.reshape(192, 64))


def test_videomaes_tubelets_and_biases(tmp_path):
    state = {f"encoder.{k}": v for k, v in vit(2, 8, 8).items() if "qkv.bias" not in k}
    for i in range(3):
        state[f"encoder.blocks.{i}.attn.q_bias"] = torch.ones(192)
        state[f"encoder.blocks.{i}.attn.v_bias"] = torch.full((192,), 2.0)
    state["decoder.blocks.0.norm1.weight"] = torch.ones(4)

    source = load({"model": state, "epoch": 3}, tmp_path / "videomae.pth")
    bias = source.encoder.path("video")[0].attn.qkv.bias
    assert bias.equal(torch.tensor([1.0, 0.0, 2.0]).repeat_interleave(192))
    ours = source.patch_embed["video"].proj.weight.reshape(192, 2, 8, 8, 3)
    assert ours.equal(state[f"encoder.{KERNEL}"].permute(0, 2, 3, 4, 1))


@pytest.mark.parametrize("style", [0, 1], ids=["files", "memory"])
@pytest.mark.parametrize("prefix, patch", [
    ("vit.", (8, 8)), ("", (8, 8)), ("videomae.", (2, 8, 8))])
def test_hugging_faces_names_mean_timms(prefix, patch, style):
    state = vit(*patch)
    theirs = hugging_face(state, style, prefix)
    if (style, prefix) == (0, "videomae."):  # has no biases of keys, and others' by another name
        theirs = {re.sub(r"(q)uery\.bias|(v)alue\.bias", r"\1\2_bias", k): x
                  for k, x in theirs.items() if not k.endswith("key.bias")}
        for i in range(3):
            state[f"blocks.{i}.attn.qkv.bias"][192:384] = 0

    found, timm = avmae.from_foreign(theirs), avmae.from_foreign(state)
    assert found["notes"][1] == "left: classifier, cls_token, decoder"
    assert found["config"] == timm["config"] and found["model"].keys() == timm["model"].keys()
    assert all(x.equal(timm["model"][name]) for name, x in found["model"].items())


def test_a_norm_of_another_name_or_none_and_parts_unknown(tmp_path):
    path, state = tmp_path / "vit.pth", vit()
    pooled = {f"fc_{k}" if k.startswith("norm.") else k: v for k, v in state.items()}
    none = {k: v for k, v in state.items() if not k.startswith("norm.")}
    for given, expected in (pooled, state["norm.weight"]), (none, torch.ones(192)):
        assert load(given, path).encoder.stacks("video")[0].norm.weight.equal(expected)
    with pytest.raises(avmae.UserError, match="blocks.0.ls1.gamma"):
        load(state | {"blocks.0.ls1.gamma": torch.ones(192)}, path)


def library_model(kind):
    """A small random model of a library with our GELU: (model, blocks, norm)."""
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
    trunk = model.base_model
    blocks = trunk.layers if hasattr(trunk, "layers") else trunk.encoder.layer
    return model, blocks, trunk.layernorm


@pytest.mark.parametrize("kind", ["timm", "vit", "vit_mae", "videomae"])
def test_blocks_compute_what_the_libraries_do(tmp_path, kind):
    torch.manual_seed(0)
    model, blocks, norm = library_model(kind)
    for p in model.eval().parameters():
        torch.nn.init.normal_(p, std=0.1)
    if kind == "timm":
        load(model.state_dict(), tmp_path / "model.safetensors")
    else:
        model.save_pretrained(tmp_path)  # names of files, which are others than in memory

    same = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)
    ours, x = avmae.load_model(tmp_path / "model.safetensors"), torch.randn(2, 5, 192)
    stack = ours.encoder.stacks("video")[0]
    for theirs, block in zip(blocks, stack.blocks, strict=True):
        y = theirs(x)
        same(block(x), y[0] if isinstance(y, tuple) else y)
    same(stack.norm(x), norm(x))

    if kind == "videomae":
        video, embed = torch.rand(2, 4, 32, 32, 3), ours.patch_embed["video"]
        patches = model.base_model.embeddings.patch_embeddings(video.permute(0, 1, 4, 2, 3))
        same(embed.proj(embed.modality.patchify(video)), patches)


# ------------------------------------------------------------------------------------------ files


def small_model():
    return avmae.AVMAE(avmae.PretrainConfig(BOTH, **SIZES, num_joint=1))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_export_and_load_give_identical_outputs(tmp_path, kind, suffix):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    path = tmp_path / f"weights{suffix}"
    model = small_model() if kind == "pretrain" else avmae.Classifier(avmae.ClassifierConfig(
        BOTH, SIZES["size"], fusion_layer=1, num_classes=(3, 4), drop_path=0.9)).eval()
    avmae.save(model, path, names=["a", "b"])

    again = avmae.load_model(path)
    assert again.config == model.config and again.notes == []
    assert avmae.load_checkpoint(path)["names"] == ["a", "b"]
    for m, features in again.features(clips()).items():
        assert features.equal(model.features(clips())[m])


class Evil:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("owned"),)


def test_hostile_and_damaged_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, matrix = small_model(), np.zeros((2, 3), np.float32)
    avmae.save(model, "good.pt")
    flax, zipped = encode(official(PRETRAINED)), pathlib.Path("good.pt").read_bytes()
    misfit = {"Decoder/encoderblock_1/MlpBlock_0/Dense_0/kernel": torch.zeros(32, 63)}
    state = model.state_dict()
    state.pop("encoder.stages.1.all.norm.weight")

    def array(code, numbers):
        return msgpack.packb({"params": {"a": msgpack.ExtType(code, numbers)}})

    files = {
        "cut_flax": flax[: len(flax) // 2], "empty": b"", "text": b"hello world",
        "noise": bytes(range(256)) * 9, "cut.pt": zipped[: len(zipped) // 2],
        "evil.pkl": pickle.dumps(Evil()), "foreign": msgpack.packb({"params": {"a": 1}}),
        "strange": encode({"Dense_0/kernel": matrix}),
        "half": encode({"Transformer/kernel": matrix}),
        "misfit": encode(official(PRETRAINED) | misfit),
        "object": array(1, msgpack.packb(((1,), "object", b"12345678"))),
        "function": array(1, msgpack.packb(((1,), "load", b"12345678"))),
        "extension": array(9, b"12345678"), "list": msgpack.packb([1, 2]),
        "a.safetensors": b"no header, no tensors",
        "unfit.pt": {"config": avmae.to_dict(model.config), "model": state},
        "evil.pt": {"config": Evil(), "model": {}}, "list.pt": [1, 2], "number.pt": 3,
        "other.pt": {"weights": torch.zeros(3)}, "numbers.pt": {1: torch.zeros(3)},
        "flat.pt": vit() | {KERNEL: torch.zeros(192, 192)}}

    for name, content in files.items():
        if isinstance(content, bytes):
            pathlib.Path(name).write_bytes(content)
        else:
            torch.save(content, name)

    for name in [*files, "missing.pt"]:
        with pytest.raises(avmae.UserError) as caught:
            avmae.load_model(name)
        assert len(str(caught.value)) > 20 and "\n" not in str(caught.value), name
    assert not pathlib.Path("owned").exists()
