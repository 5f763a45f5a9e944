"""Other people's weights, export, and files that are none."""

import pathlib
import pickle

import msgpack
import numpy as np
import pytest
import torch

import avmae
import parity
from test_reference import SHARED, reference

SIZE = avmae.Size(48, 3, 4, 96)


def encode(tree):
    """A tree of arrays as Flax writes it."""

    def pack(x):
        if isinstance(x, np.ndarray):
            return msgpack.ExtType(1, msgpack.packb((x.shape, x.dtype.name, x.tobytes())))
        if isinstance(x, np.generic):
            return msgpack.ExtType(3, msgpack.packb(((), x.dtype.name, x.tobytes())))
        raise TypeError(type(x))

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


def official(file, rename=lambda path: path):
    return {
        rename(k.removeprefix("params/")): file[k] for k in file.files if k.startswith("params/")}


@pytest.fixture
def pretrained():
    return reference("pretrain__separate_encoders_and_concat__same_decoder.npz")


@pytest.fixture
def finetuned():
    return reference("mbt__rgb_spectrogram.npz")


@pytest.mark.parametrize("layout", ["old", "new"])
def test_flax_checkpoints_of_both_layouts(tmp_path, pretrained, layout):
    params = nested(official(pretrained))
    tree = (
        {"optimizer": {"target": params, "state": {"step": np.int32(7)}}}
        if layout == "old"
        else {
            "params": params, "opt_state": {"0": {"count": np.int32(7)}},
            "global_step": np.int32(7)}
    )
    (tmp_path / "checkpoint").write_bytes(encode(tree))
    model = avmae.load(tmp_path / "checkpoint")
    assert (
        model.config.encoder == "mid"
        and model.config.joint_layers == 2
        and model.config.size == (48, 4, 4, 96))
    assert model.config.patch == {
        "video": (2, 8, 8), "audio": (8, 8)} and model.config.decoder_size == (32, 2, 4, 64)
    inputs = parity.inputs_of(pretrained, torch.float32)
    for m, theirs in ("video", "rgb"), ("audio", "spectrogram"):
        assert (
            parity.error(model.features(inputs, pool=False)[m], pretrained[f"eval_out/{theirs}"])
            < 5e-6)


@pytest.mark.skipif(not SHARED.exists(), reason="the released-format files are not committed")
@pytest.mark.parametrize(
    "name", ["scenic_checkpoint_pretrain_mid", "scenic_checkpoint_finetune_av"])
def test_released_files(name, pretrained, finetuned):
    if "pretrain" in name:
        model, file = avmae.load(SHARED / name), pretrained
        features = model.features(parity.inputs_of(file, torch.float32), pool=False)
        assert parity.error(features["video"], file["eval_out/rgb"]) < 5e-6
    else:
        model, file = avmae.load(SHARED / name, fusion_layer=2), finetuned
        logits = model(parity.inputs_of(file, torch.float32))
        assert parity.error(torch.stack(list(logits.values())).mean(0), file["out/logits"]) < 5e-6


@pytest.mark.parametrize("name", ["embedding_spectrogram", "embedding_spec"])
def test_both_names_of_the_spectrogram_embedding(pretrained, name):
    params = official(pretrained, lambda p: p.replace("embedding_spectrogram", name))
    state = avmae.from_official({k: torch.tensor(v) for k, v in params.items()})["model"]
    assert state["embed.audio.linear.weight"].shape == (48, 64)


def test_three_equal_channels_become_one(finetuned):
    params = {k: torch.tensor(v) for k, v in official(finetuned).items()}
    one = avmae.from_official(params, fusion_layer=2)["model"]["embed.audio.linear.weight"]
    kernel = params["embedding_spectrogram/kernel"]
    params["embedding_spectrogram/kernel"] = torch.cat(
        [0.2 * kernel, 0.3 * kernel, 0.5 * kernel], dim=2)
    three = avmae.from_official(params, fusion_layer=2)
    torch.testing.assert_close(three["model"]["embed.audio.linear.weight"], one)
    assert avmae.configure(three["config"]).patch["audio"] == (8, 8)


def test_what_cannot_be_told_is_assumed_and_said(finetuned):
    params = {k: torch.tensor(v) for k, v in official(finetuned).items()}
    checkpoint = avmae.from_official(params)
    assert (
        checkpoint["config"]["fusion_layer"] == 2
        and "fusion layer 2 of 4" in checkpoint["notes"][0])
    head = "ProjectionHeadAndClassifier_0/output_projection"
    params[f"{head}/kernel"], params[f"{head}/bias"] = torch.zeros(48, 527), torch.zeros(527)
    checkpoint = avmae.from_official(params)
    assert (
        checkpoint["config"]["norm"]["audio"] == [1.102, 2.762]
        and "2.762" in checkpoint["notes"][1])
    for i in range(24):  # as deep as the released ones
        params |= {
            k.replace("encoderblock_0", f"encoderblock_{i}"): v
            for k, v in params.items()
            if "encoderblock_0" in k}
    assert avmae.from_official(params)["config"]["fusion_layer"] == 18
    params[f"{head}/kernel"], params[f"{head}/bias"] = torch.zeros(48, 309), torch.zeros(309)
    assert avmae.from_official(params)["config"]["fusion_layer"] == 16


def test_a_single_encoder_must_be_named(pretrained):
    params = official(pretrained, lambda p: p.replace("Transformer_rgb", "Transformer"))
    params = {k: torch.tensor(v) for k, v in params.items() if "Transformer_" not in k}
    with pytest.raises(ValueError, match="early or shared"):
        avmae.from_official(params)
    assert avmae.from_official(params, encoder="early")["config"]["encoder"] == "early"


def test_a_decoder_of_separate_stacks_is_told(pretrained):
    params = official(pretrained)
    stacks = {
        k.replace("Decoder/", f"Decoder_{m}/"): v
        for m in ("rgb", "spectrogram")
        for k, v in params.items()}
    models = {}
    for name, given in ("shared", params), ("separate", stacks):
        checkpoint = avmae.from_official({k: torch.tensor(v) for k, v in given.items()})
        assert checkpoint["config"]["decoder"] == name
        models[name] = avmae.build(avmae.configure(checkpoint["config"]))
        models[name].load_state_dict(checkpoint["model"])
    inputs = parity.inputs_of(pretrained, torch.float32)
    counts = {m: models["shared"].embed[m].patchify(x).shape[1] for m, x in inputs.items()}
    masks = avmae.draw_masks(counts, {m: n // 2 for m, n in counts.items()}, len(inputs["audio"]))
    torch.testing.assert_close(
        models["separate"](inputs, masks).predictions, models["shared"](inputs, masks).predictions)


def test_an_unused_bottleneck_is_dropped_and_said(finetuned):
    params = {k: torch.tensor(v) for k, v in official(finetuned).items() if "spec" not in k}
    checkpoint = avmae.from_official(params)
    assert checkpoint["config"]["modalities"] == ["video"] and any(
        "trunk.bottleneck" in n for n in checkpoint["notes"])
    audio = {
        k.replace("_spec/", "/"): torch.tensor(v)
        for k, v in official(finetuned).items()
        if "_spec/" in k or "spectrogram" in k or "norm" in k and "block" not in k or "Head" in k}
    assert avmae.from_official(audio)["config"]["modalities"] == ["audio"]


# ------------------------------------------------------------------------------------ timm's ViT


def vit(**extra):
    """A small ViT in timm's names."""
    torch.manual_seed(0)
    state = {
        "cls_token": torch.zeros(1, 1, 48), "pos_embed": torch.zeros(1, 5, 48),
        "norm.weight": torch.rand(48), "norm.bias": torch.rand(48),
        "head.weight": torch.zeros(10, 48), "head.bias": torch.zeros(10),
        "patch_embed.proj.weight": torch.randn(48, 3, 8, 8),
        "patch_embed.proj.bias": torch.randn(48)}
    for i in range(3):
        for name, shape in {
            "norm1.weight": (48,), "norm1.bias": (48,), "norm2.weight": (48,), "norm2.bias": (48,),
            "attn.qkv.weight": (144, 48), "attn.qkv.bias": (144,), "attn.proj.weight": (48, 48),
            "attn.proj.bias": (48,), "mlp.fc1.weight": (96, 48), "mlp.fc1.bias": (96,),
            "mlp.fc2.weight": (48, 96), "mlp.fc2.bias": (48,)}.items():
            state[f"blocks.{i}.{name}"] = torch.randn(shape)
    return state | extra


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s, lambda s: {"model": s, "epoch": 3},
        lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}],
)
def test_a_vit_initialises_both_streams(tmp_path, wrap):
    state = vit()
    torch.save(wrap(state), tmp_path / "vit.pth")
    checkpoint = avmae.read(tmp_path / "vit.pth")
    assert "cls_token" in checkpoint["notes"][1] and "head.weight" in checkpoint["notes"][1]
    source = avmae.load(tmp_path / "vit.pth")
    config = source.config
    target = avmae.Classifier(
        avmae.ClassifierConfig(size=config.size, patch=config.patch, fusion_layer=1, classes=(7,)))
    avmae.transfer(source, target)
    video = target.embed["video"].linear.weight.reshape(48, 2, 8, 8, 3)  # (t, h, w, c)
    assert not video[:, 0].any() and video[:, 1].equal(
        state["patch_embed.proj.weight"].permute(0, 2, 3, 1))
    audio = target.embed["audio"].linear.weight.reshape(48, 8, 8)
    torch.testing.assert_close(audio, state["patch_embed.proj.weight"].sum(1))
    for m in "video", "audio":
        assert target.trunk.blocks[m][2].mlp[2].weight.equal(state["blocks.2.mlp.fc2.weight"])
    assert target.trunk.norm.weight.equal(state["norm.weight"])


def test_a_vit_of_one_channel_is_an_audio_model(tmp_path):
    state = vit() | {"patch_embed.proj.weight": torch.randn(48, 1, 8, 8)}
    torch.save(state, tmp_path / "audio.pth")
    source = avmae.load(tmp_path / "audio.pth")
    assert source.config.modalities == ("audio",)
    kernel = state["patch_embed.proj.weight"].reshape(48, 64)
    torch.testing.assert_close(source.embed["audio"].linear.weight.detach(), kernel)


def test_videomaes_tubelets_and_biases(tmp_path):
    state = {f"encoder.{k}": v for k, v in vit().items() if "qkv.bias" not in k and "head" not in k}
    state["encoder.patch_embed.proj.weight"] = torch.randn(48, 3, 2, 8, 8)
    for i in range(3):
        state[f"encoder.blocks.{i}.attn.q_bias"], state[f"encoder.blocks.{i}.attn.v_bias"] = (
            torch.ones(48), torch.full((48,), 2.0))
    state["decoder.blocks.0.norm1.weight"] = torch.ones(4)
    torch.save({"model": state}, tmp_path / "videomae.pth")
    source = avmae.load(tmp_path / "videomae.pth")
    bias = source.encoder.path("video")[0].attn.qkv.bias
    assert bias[:48].eq(1).all() and not bias[48:96].any() and bias[96:].eq(2).all()
    ours = source.embed["video"].linear.weight.reshape(48, 2, 8, 8, 3)
    assert ours.equal(state["encoder.patch_embed.proj.weight"].permute(0, 2, 3, 4, 1))


# ------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_export_and_load_give_identical_outputs(tmp_path, kind, suffix):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    torch.manual_seed(0)
    common = dict(
        size=SIZE, shape={"video": (4, 32, 32), "audio": (48, 16)},
        patch={"video": (2, 8, 8), "audio": (8, 8)})
    model = avmae.build(
        avmae.PretrainConfig(**common, decoder_size=avmae.Size(32, 3, 4, 64))
        if kind == "pretrain"
        else avmae.ClassifierConfig(**common, fusion_layer=1, classes=(3, 4)))
    avmae.save(model, tmp_path / f"weights{suffix}", names=["a", "b"])
    again = avmae.load(tmp_path / f"weights{suffix}")
    assert again.config == model.config and avmae.read(tmp_path / f"weights{suffix}")["names"] == [
        "a", "b"]
    inputs = {"video": torch.rand(2, 4, 32, 32, 3), "audio": torch.rand(2, 48, 16)}
    for m, features in again.features(inputs).items():
        assert features.equal(model.features(inputs)[m])


def test_features_of_any_length_and_of_one_modality():
    config = avmae.PretrainConfig(
        size=SIZE, decoder_size=avmae.Size(32, 3, 4, 64),
        patch={"video": (2, 8, 8), "audio": (8, 8)})
    model = avmae.build(config)
    features = model.features(
        {"video": torch.rand(1, 6, 16, 40, 3), "audio": torch.rand(1, 100, 32)}, pool=False)
    assert features["video"].shape == (1, 30, 48) and features["audio"].shape == (1, 48, 48)
    assert set(model.features({"audio": torch.rand(1, 40, 16)})) == {"audio"}


class Evil:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("owned"),)


def test_hostile_and_damaged_files_are_refused(tmp_path, monkeypatch, pretrained):
    monkeypatch.chdir(tmp_path)
    flax = encode({"params": nested(official(pretrained))})
    good = avmae.build(avmae.PretrainConfig(size=SIZE, decoder_size=SIZE, joint_layers=1))
    avmae.save(good, "good.pt")
    zipped = pathlib.Path("good.pt").read_bytes()
    torch.save({"config": Evil(), "model": {}}, "evil.pt")
    pathlib.Path("evil.pkl").write_bytes(pickle.dumps(Evil()))
    for name, content in {
        "cut_flax": flax[: len(flax) // 2],
        "empty": b"",
        "text": b"hello world",
        "noise": bytes(range(256)) * 9,
        "cut.pt": zipped[: len(zipped) // 2],
        "foreign": msgpack.packb({"params": {"a": 1}}),
        "strange": encode({"params": {"Dense_0": {"kernel": np.zeros((2, 3), np.float32)}}}),
        "object": msgpack.packb(
            {"params": {"a": msgpack.ExtType(1, msgpack.packb(((1,), "object", b"12345678")))}}),
        "extension": msgpack.packb({"params": {"a": msgpack.ExtType(9, b"12345678")}}),
    }.items():
        pathlib.Path(name).write_bytes(content)
    torch.save({"weights": torch.zeros(3)}, "other.pt")
    torch.save([1, 2], "list.pt")
    for name in (
        "cut_flax", "empty", "text", "noise", "cut.pt", "foreign", "strange", "object", "extension",
        "evil.pt",
        "evil.pkl", "other.pt", "list.pt", "missing.pt"):
        with pytest.raises(ValueError) as caught:
            avmae.load(name)
        assert len(str(caught.value)) > 20 and "\n" not in str(caught.value), name
    assert not pathlib.Path("owned").exists()


def test_damaged_safetensors_are_refused(tmp_path):
    pytest.importorskip("safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"no header, no tensors")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        avmae.load(tmp_path / "a.safetensors")


def test_a_checkpoint_is_whole_or_not_there(tmp_path):
    model = avmae.build(avmae.PretrainConfig(size=SIZE, decoder_size=SIZE, joint_layers=1))
    avmae.save(model, tmp_path / "a.pt")
    before = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="still there"):
        avmae.save(model, tmp_path / "a.pt", step=2)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]
    assert (tmp_path / "a.pt").read_bytes() == before


def test_a_checkpoint_that_does_not_fit_its_settings(tmp_path):
    model = avmae.build(avmae.PretrainConfig(size=SIZE, decoder_size=SIZE, joint_layers=1))
    state = model.state_dict()
    state.pop("encoder.stages.1.all.norm.weight")
    torch.save({"config": avmae.describe(model.config), "model": state}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="missing"):
        avmae.load(tmp_path / "a.pt")
