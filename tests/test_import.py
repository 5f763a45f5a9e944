"""Other people's weights, export, and files that are none."""

import pathlib
import pickle
import re
from functools import partial

import msgpack
import numpy as np
import pytest
import torch

import avmae
import parity
from test_reference import SHARED, SIZES, modalities, reference

HEAD = "ProjectionHeadAndClassifier_0/output_projection"


def encode(tree):
    """A tree of arrays as Flax writes it."""

    def pack(x):
        x = np.asarray(x)
        packed = msgpack.packb((x.shape, x.dtype.name, x.tobytes()))
        return msgpack.ExtType(1 if x.ndim else 3, packed)

    return msgpack.packb(tree, default=pack)


def nested(flat):
    tree = {}
    for path, value in flat.items():
        *at, last = path.split("/")
        node = tree
        for part in at:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def official(file, old="", new=""):
    """The file's parameters {path: tensor}, with another word for one."""
    params = parity.group(file, "params/")
    return {path.replace(old, new) if old else path: torch.tensor(x) for path, x in params.items()}


@pytest.fixture
def pretrained():
    return reference("pretrain__separate_encoders_and_concat__same_decoder.npz")


@pytest.fixture
def finetuned():
    return reference("mbt__rgb_spectrogram.npz")


# --------------------------------------------------------------------------------- the authors'


@pytest.mark.parametrize("layout", ["old", "new"])
def test_flax_checkpoints_of_both_layouts(tmp_path, pretrained, layout):
    params, step = nested(official(pretrained)), np.int32(7)
    tree = (
        {"optimizer": {"target": params, "state": {"step": step}}}
        if layout == "old"
        else {"params": params, "opt_state": {"0": {"count": step}}, "global_step": step})
    (tmp_path / "checkpoint").write_bytes(encode(tree))

    model = avmae.load_model(tmp_path / "checkpoint")
    config = model.config
    assert (config.encoder, config.num_joint, config.decoder) == ("mid", 2, "shared")
    assert (config.size, config.decoder_size) == tuple(SIZES.values())
    assert [modality.patch for modality in config.modalities.values()] == [(2, 8, 8), (8, 8)]
    features = model.features(parity.inputs_of(pretrained, torch.float32), pool=False)
    for m, theirs in parity.THEIRS.items():
        assert parity.error(features[m], pretrained[f"eval_out/{theirs}"]) < 5e-6


@pytest.mark.skipif(not SHARED.exists(), reason="the released-format files are not committed")
def test_released_files(pretrained, finetuned):
    model = avmae.load_model(SHARED / "scenic_checkpoint_pretrain_mid")
    features = model.features(parity.inputs_of(pretrained, torch.float32), pool=False)
    assert parity.error(features["video"], pretrained["eval_out/rgb"]) < 5e-6

    model = avmae.load_model(SHARED / "scenic_checkpoint_finetune_av", fusion_layer=2)
    logits = model(parity.inputs_of(finetuned, torch.float32))
    assert parity.error(parity.mean_of(logits), finetuned["out/logits"]) < 5e-6
    assert "fusion layer 2 of 4" in model.notes[0]


def test_every_weight_is_where_an_independent_table_says(pretrained, finetuned):
    for file, first in (pretrained, None), (finetuned, "video"):
        params = official(file)
        state = avmae.from_official(params)["model"]
        named = set()
        for path, x in params.items():
            name, slot = parity.official_name(path, first)
            ours = state[name] if slot is None else state[name].chunk(3)[slot]
            assert ours.equal(parity.official_tensor(path, x)), path
            named.add(name)
        assert named == set(state)


def test_both_names_of_the_spectrogram_embedding(pretrained):
    params = official(pretrained, "embedding_spectrogram", "embedding_spec")
    state = avmae.from_official(params)["model"]
    assert state["patch_embed.audio.proj.weight"].shape == (48, 64)


def test_three_equal_channels_become_one(finetuned):
    params, name = official(finetuned), "patch_embed.audio.proj.weight"
    one = avmae.from_official(params)["model"][name]
    kernel = params["embedding_spectrogram/kernel"]
    params["embedding_spectrogram/kernel"] = torch.cat(
        [0.2 * kernel, 0.3 * kernel, 0.5 * kernel], dim=2)

    three = avmae.from_official(params)
    torch.testing.assert_close(three["model"][name], one)
    assert avmae.from_dict(three["config"]).modalities["audio"].patch == (8, 8)


def test_what_cannot_be_told_is_assumed_and_said(finetuned):
    params = official(finetuned)

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


def test_a_single_encoder_must_be_named(pretrained):
    params = official(pretrained, "Transformer_rgb", "Transformer")
    params = {path: x for path, x in params.items() if "Transformer_" not in path}
    with pytest.raises(avmae.UserError, match="early or shared"):
        avmae.from_foreign(params)
    for encoder in "early", "shared":
        assert avmae.from_official(params, encoder)["config"]["encoder"] == encoder
    assert avmae.from_official(params, "early", "early")["config"]["decoder"] == "early"


def test_a_decoder_of_separate_stacks_is_told(pretrained):
    params, stacks, outputs = official(pretrained), {}, []
    for m in "rgb", "spectrogram":
        stacks |= {path.replace("Decoder/", f"Decoder_{m}/"): x for path, x in params.items()}

    inputs = parity.inputs_of(pretrained, torch.float32)
    for name, given in ("shared", params), ("separate", stacks):
        checkpoint = avmae.from_official(given)
        assert checkpoint["config"]["decoder"] == name
        model = avmae.build(avmae.from_dict(checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
        torch.manual_seed(0)
        outputs.append(model(inputs, model.draw_ids(inputs)).preds)
    torch.testing.assert_close(*outputs)


def test_an_unused_bottleneck_is_dropped_and_said(finetuned):
    video = {path: x for path, x in official(finetuned).items() if "spec" not in path}
    audio = {
        path.replace("_spec/", "/"): x
        for path, x in official(finetuned).items()
        if re.search(r"_spec|/encoder_norm|Head|^bottleneck", path)}
    for params, m in (video, "video"), (audio, "audio"):
        checkpoint = avmae.from_foreign(params)
        assert list(checkpoint["config"]["modalities"]) == [m]
        assert checkpoint["notes"] == ["left out, unused by this model: bottleneck"]

    shapes = official(finetuned)
    shapes["Transformer/encoderblock_3/MlpBlock_0/Dense_0/kernel"] = torch.zeros(48, 95)
    with pytest.raises(avmae.UserError, match="neither a checkpoint of ours"):
        avmae.from_foreign(shapes)


# ---------------------------------------------------------------------- timm's and Hugging Face's

LAYERS = {  # of a small ViT in timm's names
    "norm1.weight": (48,), "norm1.bias": (48,), "norm2.weight": (48,), "norm2.bias": (48,),
    "attn.qkv.weight": (144, 48), "attn.qkv.bias": (144,), "attn.proj.weight": (48, 48),
    "attn.proj.bias": (48,), "mlp.fc1.weight": (96, 48), "mlp.fc1.bias": (96,),
    "mlp.fc2.weight": (48, 96), "mlp.fc2.bias": (48,)}
HUGGING_FACE = {  # timm's name: in files, in memory
    "patch_embed.": ["embeddings.patch_embeddings."] * 2, ".proj.": [".projection."] * 2,
    "blocks.": ["encoder.layer.", "layers."], "norm.": ["layernorm."] * 2,
    "norm1.": ["layernorm_before."] * 2, "norm2.": ["layernorm_after."] * 2,
    "attn.proj.": ["attention.output.dense.", "attention.o_proj."],
    "mlp.fc1.": ["intermediate.dense.", "mlp.fc1."], "mlp.fc2.": ["output.dense.", "mlp.fc2."],
    "q": ["attention.attention.query.", "attention.q_proj."],
    "k": ["attention.attention.key.", "attention.k_proj."],
    "v": ["attention.attention.value.", "attention.v_proj."]}


def vit(*patch, channels=3):
    torch.manual_seed(0)
    state = {
        "cls_token": torch.zeros(1, 1, 48), "pos_embed": torch.zeros(1, 5, 48),
        "norm.weight": torch.rand(48), "norm.bias": torch.rand(48),
        "head.weight": torch.zeros(10, 48), "head.bias": torch.zeros(10),
        "patch_embed.proj.weight": torch.randn(48, channels, *(patch or (8, 8))),
        "patch_embed.proj.bias": torch.randn(48)}
    for i in range(3):
        state |= {f"blocks.{i}.{name}": torch.randn(shape) for name, shape in LAYERS.items()}
    return state


def hugging_face(state, style, prefix, key_bias=True):
    """A state dict in timm's names -> in Hugging Face's."""
    state, out = dict(state), {
        f"{prefix}embeddings.cls_token": state["cls_token"],
        "decoder.decoder_layers.0.layernorm_before.weight": torch.ones(4),
        "classifier.weight": torch.zeros(10, 48)}
    names = {timm: both[style] for timm, both in HUGGING_FACE.items()}
    for kind in "weight", "bias":
        name = f"patch_embed.proj.{kind}"
        out[f"{prefix}embeddings.patch_embeddings.projection.{kind}"] = state.pop(name)
        out[f"{prefix}layernorm.{kind}"] = state.pop(f"norm.{kind}")

    for name, x in state.items():
        if name.startswith("blocks."):
            _, i, layer = name.split(".", 2)
            at = f"{prefix}{names['blocks.']}{i}."
            if layer == "attn.qkv.bias" and not key_bias:  # as VideoMAE
                q, _, v = x.chunk(3)
                out |= {f"{at}attention.attention.{p}_bias": x for p, x in (("q", q), ("v", v))}
            elif "qkv" in layer:
                parts = zip("qkv", x.chunk(3))
                out |= {at + names[p] + layer.split(".")[-1]: x for p, x in parts}
            else:
                layer, kind = layer.rsplit(".", 1)
                out[at + names[f"{layer}."] + kind] = x
    return out


def classifier_from(source):
    config = source.config
    target = avmae.Classifier(avmae.ClassifierConfig(
        config.modalities, config.size, fusion_layer=1, num_classes=(7,)))
    avmae.transfer(source, target)
    return target


@pytest.mark.parametrize("wrap", [
    lambda s: s, lambda s: {"model": s, "epoch": 3},
    lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}])
def test_a_vit_initializes_both_streams(tmp_path, wrap):
    state = vit()
    torch.save(wrap(state), tmp_path / "vit.pth")
    source = avmae.load_model(tmp_path / "vit.pth")
    assert "cls_token, head, pos_embed" in source.notes[1] and "erf GELU" in source.notes[2]

    target = classifier_from(source)
    kernel = state["patch_embed.proj.weight"]
    video = target.patch_embed["video"].proj.weight.reshape(48, 2, 8, 8, 3)  # (t, h, w, c)
    assert not video[:, 0].any() and video[:, 1].equal(kernel.permute(0, 2, 3, 1))
    audio = target.patch_embed["audio"].proj.weight.reshape(48, 8, 8)
    torch.testing.assert_close(audio, kernel.sum(1))
    for blocks in target.trunk.blocks.values():
        for name, x in blocks[2].state_dict().items():  # timm's names are ours
            assert x.equal(state[f"blocks.2.{name}"])
    assert target.trunk.norm.weight.equal(state["norm.weight"])


def test_a_vit_of_one_channel_is_an_audio_model(tmp_path):
    state = vit(channels=1)
    torch.save(state, tmp_path / "audio.pth")
    source = avmae.load_model(tmp_path / "audio.pth")
    assert list(source.config.modalities) == ["audio"]
    kernel = state["patch_embed.proj.weight"].reshape(48, 64)
    torch.testing.assert_close(source.patch_embed["audio"].proj.weight.detach(), kernel)


def test_videomaes_tubelets_and_biases(tmp_path):
    state = {f"encoder.{k}": v for k, v in vit(2, 8, 8).items() if "qkv.bias" not in k}
    for i in range(3):
        state[f"encoder.blocks.{i}.attn.q_bias"] = torch.ones(48)
        state[f"encoder.blocks.{i}.attn.v_bias"] = torch.full((48,), 2.0)
    state["decoder.blocks.0.norm1.weight"] = torch.ones(4)
    torch.save({"model": state}, tmp_path / "videomae.pth")

    source = avmae.load_model(tmp_path / "videomae.pth")
    bias = source.encoder.path("video")[0].attn.qkv.bias
    assert bias[:48].eq(1).all() and not bias[48:96].any() and bias[96:].eq(2).all()
    ours = source.patch_embed["video"].proj.weight.reshape(48, 2, 8, 8, 3)
    assert ours.equal(state["encoder.patch_embed.proj.weight"].permute(0, 2, 3, 4, 1))


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("style", [0, 1], ids=["files", "memory"])
@pytest.mark.parametrize("prefix, patch", [
    ("vit.", (8, 8)), ("", (8, 8)), ("videomae.", (2, 8, 8))])
def test_hugging_faces_names_mean_timms(tmp_path, prefix, patch, style, suffix):
    state = vit(*patch)
    key_bias = style == 1 or prefix != "videomae."
    if not key_bias:
        for i in range(3):
            state[f"blocks.{i}.attn.qkv.bias"][48:96] = 0
    theirs = hugging_face(state, style, prefix, key_bias)
    if suffix == ".bin":
        torch.save(theirs, tmp_path / "model.bin")
    else:
        save_file = pytest.importorskip("safetensors.torch").save_file
        save_file({k: v.contiguous() for k, v in theirs.items()}, tmp_path / "model.safetensors")

    checkpoint, timm = avmae.load_checkpoint(tmp_path / f"model{suffix}"), avmae.from_foreign(state)
    assert checkpoint["config"] == timm["config"]
    assert checkpoint["model"].keys() == timm["model"].keys()
    assert all(x.equal(timm["model"][name]) for name, x in checkpoint["model"].items())
    assert checkpoint["notes"][1] == "left: classifier, cls_token, decoder"
    avmae.load_model(tmp_path / f"model{suffix}")


def test_a_norm_of_another_name_or_none_and_parts_unknown(tmp_path):
    torch.save({f"fc_{k}" if k[:5] == "norm." else k: v for k, v in vit().items()},
               tmp_path / "pooled.pth")
    norm = avmae.load_model(tmp_path / "pooled.pth").encoder.stacks("video")[0].norm
    assert norm.weight.equal(vit()["norm.weight"])
    torch.save({k: v for k, v in vit().items() if "norm." not in k}, tmp_path / "vit.pth")
    norm = avmae.load_model(tmp_path / "vit.pth").encoder.stacks("video")[0].norm
    assert norm.weight.eq(1).all() and not norm.bias.any()
    torch.save(vit() | {"blocks.0.ls1.gamma": torch.ones(48)}, tmp_path / "scaled.pth")
    with pytest.raises(avmae.UserError, match="blocks.0.ls1.gamma"):
        avmae.load_model(tmp_path / "scaled.pth")


def library_model(kind):
    """A small random model of a library with our GELU: (model, blocks, norm, patch embedding)."""
    if kind == "timm":
        timm = pytest.importorskip("timm")
        model = timm.models.VisionTransformer(
            32, 8, embed_dim=192, depth=2, num_heads=3, mlp_ratio=0.5,
            act_layer=partial(torch.nn.GELU, approximate="tanh"))
        return model, model.blocks, model.norm, None

    transformers = pytest.importorskip("transformers")
    name = {"vit": "ViT", "vitmae": "ViTMAE", "videomae": "VideoMAE"}[kind]
    task = "ForImageClassification" if kind == "vit" else "ForPreTraining"
    config = getattr(transformers, f"{name}Config")(
        hidden_size=192, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
        image_size=32, patch_size=8, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6,
        use_mean_pooling=False, decoder_hidden_size=32, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=4, decoder_intermediate_size=64, num_frames=4)
    model = getattr(transformers, name + task)(config)
    trunk = model.videomae if kind == "videomae" else model.vit
    blocks = trunk.layers if hasattr(trunk, "layers") else trunk.encoder.layer
    return model, blocks, trunk.layernorm, kind == "videomae" and trunk.embeddings.patch_embeddings


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("kind", ["timm", "vit", "vitmae", "videomae"])
def test_blocks_compute_what_the_libraries_do(tmp_path, kind, suffix):
    torch.manual_seed(0)
    model, blocks, norm, patches = library_model(kind)
    for p in model.eval().parameters():
        torch.nn.init.normal_(p, std=0.1)
    path = tmp_path / f"model{suffix}"
    if suffix == ".bin":
        torch.save(model.state_dict(), path)
    elif kind == "timm":
        pytest.importorskip("safetensors.torch").save_file(model.state_dict(), path)
    else:
        model.save_pretrained(tmp_path)

    ours, x = avmae.load_model(path), torch.randn(2, 5, 192)
    stack = ours.encoder.stacks("video")[0]
    for theirs, block in zip(blocks, stack.blocks, strict=True):
        y = theirs(x)
        torch.testing.assert_close(
            block(x), y[0] if isinstance(y, tuple) else y, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stack.norm(x), norm(x))
    if patches:
        video, embed = torch.rand(2, 4, 32, 32, 3), ours.patch_embed["video"]
        torch.testing.assert_close(
            embed.proj(embed.modality.patchify(video)), patches(video.permute(0, 1, 4, 2, 3)),
            atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------ files


def small_model():
    return avmae.AVMAE(avmae.PretrainConfig(modalities(), **SIZES, num_joint=1))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_export_and_load_give_identical_outputs(tmp_path, kind, suffix):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    path = tmp_path / f"weights{suffix}"
    model = small_model() if kind == "pretrain" else avmae.Classifier(
        avmae.ClassifierConfig(modalities(), SIZES["size"], fusion_layer=1, num_classes=(3, 4)))
    avmae.save(model, path, names=["a", "b"])

    again = avmae.load_model(path)
    assert again.config == model.config and again.notes == []
    assert avmae.load_checkpoint(path)["names"] == ["a", "b"]
    inputs = {"video": torch.rand(2, 4, 32, 32, 3), "audio": torch.rand(2, 48, 16)}
    for m, features in again.features(inputs).items():
        assert features.equal(model.features(inputs)[m])


class Evil:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("owned"),)


def test_hostile_and_damaged_files_are_refused(tmp_path, monkeypatch, pretrained):
    monkeypatch.chdir(tmp_path)
    flax = encode({"params": nested(official(pretrained))})
    avmae.save(small_model(), "good.pt")
    zipped = pathlib.Path("good.pt").read_bytes()

    def array(code, numbers):
        return msgpack.packb({"params": {"a": msgpack.ExtType(code, numbers)}})

    files = {
        "cut_flax": flax[: len(flax) // 2], "empty": b"", "text": b"hello world",
        "noise": bytes(range(256)) * 9, "cut.pt": zipped[: len(zipped) // 2],
        "evil.pkl": pickle.dumps(Evil()), "foreign": msgpack.packb({"params": {"a": 1}}),
        "strange": encode({"params": {"Dense_0": {"kernel": np.zeros((2, 3), np.float32)}}}),
        "half": encode({"params": {"Transformer": {"kernel": np.zeros((2, 3), np.float32)}}}),
        "object": array(1, msgpack.packb(((1,), "object", b"12345678"))),
        "function": array(1, msgpack.packb(((1,), "load", b"12345678"))),
        "extension": array(9, b"12345678"), "list": msgpack.packb([1, 2]),
        "a.safetensors": b"no header, no tensors"}
    for name, content in files.items():
        pathlib.Path(name).write_bytes(content)
    saved = {
        "evil.pt": {"config": Evil(), "model": {}}, "list.pt": [1, 2], "number.pt": 3,
        "other.pt": {"weights": torch.zeros(3)}, "numbers.pt": {1: torch.zeros(3)},
        "flat.pt": vit() | {"patch_embed.proj.weight": torch.zeros(48, 192)}}
    for name, content in saved.items():
        torch.save(content, name)

    for name in [*files, *saved, "missing.pt"]:
        if name.endswith(".safetensors"):
            pytest.importorskip("safetensors")
        with pytest.raises(avmae.UserError) as caught:
            avmae.load_model(name)
        assert len(str(caught.value)) > 20 and "\n" not in str(caught.value), name
    assert not pathlib.Path("owned").exists()


def test_a_checkpoint_is_whole_or_not_there(tmp_path):
    avmae.save(small_model(), tmp_path / "a.pt")
    before = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt.partial").symlink_to("/dev/full")
    with pytest.raises(avmae.UserError, match="still there"):
        avmae.save(small_model(), tmp_path / "a.pt", step=2)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]
    assert (tmp_path / "a.pt").read_bytes() == before


def test_a_checkpoint_that_does_not_fit_its_settings(tmp_path):
    model = small_model()
    state = model.state_dict()
    state.pop("encoder.stages.1.all.norm.weight")
    torch.save({"config": avmae.to_dict(model.config), "model": state}, tmp_path / "a.pt")
    with pytest.raises(avmae.UserError, match="missing"):
        avmae.load_model(tmp_path / "a.pt")
