"""Properties of the models: information flow, shared weights, counts, initialization, errors."""

import itertools
import math
import pathlib
import pickle
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

import avmae
from avmae import FUSION, OBJECTIVES, ClassifierConfig, PretrainConfig, TransformerConfig

VIDEO = replace(avmae.VIDEO, shape=(4, 32, 32), patch=(2, 8, 8), mask_ratio=0.7)  # 32 tokens
AUDIO = replace(avmae.AUDIO, shape=(48, 16), patch=(8, 8), mask_ratio=0.7)  # 12 tokens
BOTH = {"video": VIDEO, "audio": AUDIO}
SIZE = TransformerConfig(24, 4, 2, 32)


def clips(batch=3, seed=0):
    """Return random inputs."""
    g = torch.Generator().manual_seed(seed)
    return {
        "video": torch.rand(batch, 4, 32, 32, 3, generator=g) * 2 - 1,
        "audio": torch.randn(batch, 48, 16, generator=g)}


def build(config, random=True):
    """Return a model; zero parameters would hide the information flow, so make all random."""
    torch.manual_seed(0)
    model = avmae.build_model(config)
    for p in model.parameters() if random else ():
        torch.nn.init.normal_(p, std=0.2)
    return model


def autoencoder(random=True, **settings):
    tiny = {"modalities": BOTH, "size": SIZE, "decoder_size": TransformerConfig(16, 3, 2, 24)}
    return build(PretrainConfig(**tiny | settings), random)


def classifier(**settings):
    tiny = {"modalities": BOTH, "size": SIZE, "num_classes": (5,), "fusion_layer": 2}
    return build(ClassifierConfig(**tiny | settings)).eval()


def masks(seed=0, batch=3, rows=slice(None)):
    return avmae.random_masking(BOTH, batch, torch.Generator().manual_seed(seed), rows)


def depends(output, x):
    """Return True if an output depends on x."""
    (grad,) = torch.autograd.grad(output.square().sum(), x, allow_unused=True, retain_graph=True)
    return grad is not None and bool(grad.abs().max() > 0)


def count(config):
    """Return the number of parameters."""
    with torch.device("meta"):
        return sum(p.numel() for p in avmae.build_model(config).parameters())


# ---------------------------------------------------------------------------- sizes, patches, masks


@pytest.mark.parametrize("encoder, base, large", [
    ("separate", 179_869_696, 621_040_384), ("mid", 165_695_488, 595_849_984),
    ("early", 94_813_696, 318_728_960), ("shared", 94_813_696, 318_728_960)])
def test_parameter_counts_of_pretraining(encoder, base, large):
    for size, expected, extra in ("base", base, 7_098_624), ("large", large, 12_610_560):
        config = PretrainConfig(
            avmae.MODALITIES, *avmae.MODEL_SIZES[size], encoder=encoder, allow_uncoupled=True)
        assert count(config) == count(replace(config, decoder="early")) == expected
        assert count(replace(config, decoder="separate")) == expected + extra


def test_parameter_counts_of_finetuning():
    base, large = (ClassifierConfig(size=avmae.MODEL_SIZES[x][0]) for x in ("base", "large"))
    assert (count(base), count(large)) == (171_728_949, 606_778_677)
    for m, official in ("video", 304_206_133), ("audio", 302_895_413):  # with an unused bottleneck
        one = replace(large, modalities={m: avmae.MODALITIES[m]})
        assert count(one) == official - 4 * 1024


def test_token_and_mask_counts():
    audioset = replace(avmae.AUDIO, shape=(1000, 128), mask_ratio=0.7)
    counts = [(x.num_tokens, x.num_masked) for x in (avmae.VIDEO, avmae.AUDIO, audioset)]
    assert counts == [(1568, 1411), (400, 200), (496, 347)]


def test_unpatchify_inverts_patchify_and_trailing_audio_is_dropped():
    x = clips()
    for m, modality in BOTH.items():
        assert modality.unpatchify(modality.patchify(x[m])).equal(x[m])
    longer = torch.cat([x["audio"], torch.full((3, 7, 16), 9.0)], dim=1)
    assert AUDIO.patchify(longer).equal(AUDIO.patchify(x["audio"]))


def test_inputs_are_normalized():
    video = torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8)
    model, ids, audio = autoencoder(), masks(batch=2), clips(2)["audio"]
    loss = model({"video": video, "audio": audio}, ids).loss
    scaled = video.float() * 2 / 255 - 1  # to [-1, 1]
    torch.testing.assert_close(loss, model({"video": scaled, "audio": audio}, ids).loss)

    model = autoencoder(modalities=BOTH | {"audio": replace(AUDIO, mean=1.0, std=4.0)})
    torch.testing.assert_close(loss, model({"video": video, "audio": audio * 4 + 1}, ids).loss)


def test_positions():
    table = avmae.sinusoid(1568, 16)
    angle = torch.arange(1568.0).double()[:, None] / 10000 ** (torch.arange(0, 16, 2) / 16)
    for i, part in enumerate((angle.sin(), angle.cos())):
        torch.testing.assert_close(table[:, i::2], part.float())
    assert avmae.Positions(4, 16)(9).equal(table[:9])  # extended


def test_masks_do_not_depend_on_the_number_of_processes_and_are_contiguous():
    g = torch.Generator().manual_seed(3)
    ids_keep, ids_mask = whole = masks(3, batch=6)
    for m, modality in BOTH.items():  # video first
        order = torch.rand(6, modality.num_tokens, generator=g).argsort(-1)
        assert ids_mask[m].equal(order[:, : modality.num_masked])
        assert ids_keep[m].equal(order[:, modality.num_masked :])

    for processes in 1, 2, 3:
        size = 6 // processes
        parts = [masks(3, 6, slice(r * size, (r + 1) * size)) for r in range(processes)]
        for which, m in itertools.product((0, 1), BOTH):
            assert all(part[which][m].is_contiguous() for part in parts)
            assert torch.cat([part[which][m] for part in parts]).equal(whole[which][m])


@pytest.mark.parametrize("objective", ["joint", "joint_inpaint"])
def test_masks_of_longer_clips_cover_every_token(objective):
    model = autoencoder(encoder="early", objective=objective)
    x = {"video": torch.rand(2, 6, 16, 40, 3), "audio": torch.rand(2, 100, 32)}
    out, features = model(x), model.features(x, pool=False)
    assert not out.ids_mask["audio"].equal(model(x).ids_mask["audio"])  # new masks in each call

    for m, num_tokens in ("video", 30), ("audio", 48):
        assert out.ids_mask[m].shape[1] == int(0.7 * num_tokens)
        ids = torch.cat([out.ids_keep[m], out.ids_pred[m, m]], dim=1)
        assert ids.sort(1).values.equal(torch.arange(num_tokens).expand(2, -1))
        assert features[m].shape == (2, num_tokens, 24)

    assert set(model.features({"audio": x["audio"]})) == {"audio"}
    for (t, _), clip in model.reconstruct(x).items():
        assert all(part.shape[2:] == x[t].shape[2:] for part in clip)


# -------------------------------------------------------------------------- variants and objectives


@pytest.mark.parametrize("encoder, decoder, objective", [
    row for row in itertools.product(FUSION, FUSION, OBJECTIVES)
    if row[0] in ("early", "mid") or row[2] == "joint"])
def test_every_variant_trains(encoder, decoder, objective):
    variant = dict(encoder=encoder, decoder=decoder, objective=objective, allow_uncoupled=True)
    model, x, losses = autoencoder(False, **variant), clips(8), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(12):
        optimizer.zero_grad()
        losses.append(model(x, masks(batch=8)).loss)
        losses[-1].backward()
        optimizer.step()

    assert losses[-1] < 0.97 * losses[0]
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("fusion, same", [
    ("early", 4 * [True]), ("shared", 4 * [True]), ("separate", 4 * [False]),
    ("mid", [False, False, True, True])])
def test_information_flow_and_shared_weights(fusion, same):
    blocks = map(avmae.MultimodalTransformer(fusion, SIZE, BOTH).blocks_for, BOTH)
    assert [a is b for a, b in zip(*blocks, strict=True)] == same

    joint = fusion in ("early", "mid")
    for m, other in ("video", "audio"), ("audio", "video"):
        x = clips()
        x[other].requires_grad_()
        assert depends(autoencoder(encoder=fusion).features(x, pool=False)[m], x[other]) == joint
        model = autoencoder(encoder="shared", decoder=fusion)
        latent = model.forward_encoder(model.patchify(x), masks()[0])
        preds, _ = model.forward_decoder(latent, {m: m for m in BOTH}, masks())
        assert depends(preds[m], x[other]) == joint


@pytest.mark.parametrize("m", BOTH)
def test_one_modality(m):
    one = {"modalities": {m: BOTH[m]}, "encoder": "separate", "decoder": "separate"}
    out = autoencoder(**one)({m: clips()[m]})
    assert set(out.losses) == {(m, m)} and out.loss == 0.5 * out.losses[m, m]


def test_predictions_are_detached_from_the_graph():
    out = autoencoder()(clips())
    assert out.loss.requires_grad and not any(x.requires_grad for x in out.preds.values())


def test_inpainting_decodes_from_the_other_modality_only():
    model, ids = autoencoder(encoder="early", objective="inpaint_both"), masks()
    latent = model.forward_encoder(model.patchify(clips()), ids[0])
    latent = {m: y.detach().requires_grad_() for m, y in latent.items()}
    target_to_context = {"video": "audio", "audio": "video"}
    preds, ids_pred = model.forward_decoder(latent, target_to_context, ids)

    for t, c in target_to_context.items():
        assert depends(preds[t], latent[c]) and not depends(preds[t], latent[t])
        visible = latent[c].shape[1]  # these fill the first positions
        assert ids_pred[t].equal(torch.arange(visible, BOTH[t].num_tokens).expand(3, -1))


def test_joint_inpaint_is_the_sum_of_both():
    joint, inpaint, both = (
        autoencoder(encoder="early", objective=objective)(clips(), masks()).loss
        for objective in ("joint", "inpaint_both", "joint_inpaint"))
    torch.testing.assert_close(both, joint + inpaint)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_reconstructions(norm_pix):
    """Visible patches are the original; predicted ones are predictions in units of the input."""
    modalities, x, ids = BOTH | {"audio": replace(AUDIO, mean=1.0, std=4.0)}, clips(), masks()
    model = autoencoder(
        modalities=modalities, encoder="early", objective="joint_inpaint", norm_pix=norm_pix)
    out, reconstructions, pick = model(x, ids), model.reconstruct(x, ids), avmae.gather_tokens
    assert set(reconstructions) == {(t, c) for t in BOTH for c in BOTH}

    for (t, c), clip in reconstructions.items():
        modality, (keep, mask) = modalities[t], (part[t] for part in ids)
        original, visible, predicted = map(modality.patchify, clip)
        torch.testing.assert_close(clip.original, x[t])

        torch.testing.assert_close(pick(visible, keep), pick(original, keep))
        assert pick(visible, mask).isnan().all()
        if t == c:
            torch.testing.assert_close(pick(predicted, keep), pick(original, keep))
        else:
            assert predicted[:, : out.ids_pred[t, c][0, 0]].isnan().all()

        pred, ids_pred = out.preds[t, c], out.ids_pred[t, c]
        y = (pick(original, ids_pred) - modality.mean) / modality.std
        mean, std = 0, 1
        if norm_pix:  # of each patch
            mean = y.mean(-1, keepdim=True)
            std = (y.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        loss = (pred - (y - mean) / std).square().mean()
        torch.testing.assert_close(out.losses[t, c], loss, rtol=1e-4, atol=1e-5)
        pred = (pred * std + mean) * modality.std + modality.mean
        torch.testing.assert_close(pick(predicted, ids_pred), pred, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- initialization and errors


def test_initialization():
    model = build(PretrainConfig(avmae.MODALITIES, *avmae.MODEL_SIZES["small"]), random=False)
    block, embed = model.encoder.blocks_for("video")[0], model.patch_embed

    for layer, variance in (
            (block.attn.qkv, 2 / (2 * 384)), (block.attn.proj, 2 / (2 * 384)),
            (block.mlp.fc1, 2 / (384 + 1536)), (model.decoder_embed["audio"], 2 / (384 + 192)),
            (embed["video"].proj, 1 / 1536), (embed["audio"].proj, 1 / 256)):
        assert layer.weight.std().item() == pytest.approx(math.sqrt(variance), rel=0.01)
        highest = 2 / 0.8796 if variance in (1 / 1536, 1 / 256) else math.sqrt(3)
        assert 0.98 < layer.weight.abs().max() / math.sqrt(variance) / highest <= 1.0001

    for name, p in model.named_parameters():
        if name.startswith(("decoder_pred", "mask_token")) or name.endswith("bias"):
            assert (p.std() < 2e-6) and p.any() == ("mlp" in name), name
    config = ClassifierConfig(size=avmae.MODEL_SIZES["small"][0], num_bottlenecks=40)
    mbt = build(config, random=False)
    assert mbt.encoder.bottleneck.std().item() == pytest.approx(0.02, rel=0.05)
    assert not mbt.head.weight.any()


def changed(**changes):
    return {"modalities": {m: replace(x, **changes.get(m, {})) for m, x in BOTH.items()}}


@pytest.mark.parametrize("mistake, message", [
    *((partial(autoencoder, **settings), message) for settings, message in [
        (dict(encoder="separate", objective="inpaint_both"), "an early or mid encoder"),
        (dict(encoder="shared", objective="joint_inpaint"), "an early or mid encoder"),
        (dict(encoder="separate", decoder="separate"), "--allow-uncoupled"),
        (dict(encoder="late"), "early, separate, shared, mid, got 'late'"),
        (dict(decoder="late"), "early, separate, shared, mid, got 'late'"),
        (dict(objective="both"), "joint, video_from_audio"),
        (dict(encoder="early", objective="audio_from_video",  # as many visible as audio tokens
              **changed(video={"mask_ratio": 0.625})), "mask more video"),
        (dict(modalities={"audio": AUDIO}, objective="inpaint_both"), "needs both"),
        (dict(modalities={"audio": AUDIO}, objective="video_from_audio"), "has no target"),
        (dict(modalities={}), r"no target among the modalities \(none\)"),
        (dict(size=TransformerConfig(25, 4, 2, 48)), "multiple of the 2 heads, got 25"),
        (dict(joint_layers=0), "between 1 and 3 .*, got 0"),
        (dict(joint_layers=4), "between 1 and 3 .*, got 4"),
        (changed(video={"mask_ratio": 1.0}), "some visible"),
        (changed(audio={"mask_ratio": 0.0}), "some must be masked"),
        (changed(video={"shape": (4, 30, 32)}), "4x30x32"),
        (changed(video={"shape": (3, 32, 32)}), "3x32x32"),
        (changed(audio={"shape": (48, 15)}), "48x15")]),
    (lambda: VIDEO.patchify(torch.zeros(1, 5, 32, 32, 3)), "5x32x32"),
    (lambda: autoencoder()(clips() | {"video": torch.zeros(3, 4, 32, 30, 3)}), "4x32x30"),
    (lambda: classifier(fusion_layer=5), r"between 0 and 4 \(4 disables fusion\), got 5"),
    (lambda: classifier(modalities={}), "at least one modality"),
    (lambda: classifier(num_segments=3), "leave one of 3 segments empty"),
    (lambda: avmae.transfer(autoencoder(size=TransformerConfig(16, 4, 2, 32)), classifier()),
     "must be equal"),
    (lambda: avmae.transfer(autoencoder(encoder="mid"), classifier(encoder="early")),
     "the pretrained encoder is mid, this one early"),
    (lambda: avmae.transfer(autoencoder(), classifier(**changed(audio={"patch": (16, 8)}))),
     "patches of .*, this one of"),
    (lambda: avmae.transfer(autoencoder(), classifier(), ["smell"]), "no stream 'smell'")])
def test_invalid_settings_raise_errors_that_name_them(mistake, message):
    with pytest.raises(avmae.UserError, match=message):
        mistake()


# -------------------------------------------------------------------------- finetuning and transfer


def test_stochastic_depth_drops_whole_branches_of_clips_without_rescaling():
    for encoder in "mbt", *FUSION:
        blocks = classifier(encoder=encoder, drop_path=0.3).encoder.blocks_for("audio")
        assert [block.drop_path.rate for block in blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3])

    torch.manual_seed(0)
    drop, ones = avmae.DropPath(0.3), torch.ones(20_000, 2, 3)
    y = drop(ones)
    dropped = y.eq(0).all((1, 2))
    assert y[~dropped].eq(1).all()
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert not y.equal(drop(ones)) and drop.eval()(ones).equal(ones)


AVE = {"video": replace(avmae.VIDEO, shape=(32, 32, 32)),  # 32 frames, 2 x 2 patches each, 10 s
       "audio": replace(avmae.AUDIO, shape=(1000, 16))}  # the last 8 of 1000 frames fill no patch


def test_ave_averages_the_tokens_whose_center_lies_in_a_second():
    model = classifier(modalities=AVE, num_segments=10)
    x = {"video": torch.rand(2, 32, 32, 32, 3), "audio": torch.randn(2, 1000, 16)}
    tokens, pooled = model.features(x, pool=False), model.features(x)

    for m, centers, per_time in (
            ("video", (torch.arange(16) + 0.5) * 2 * 10 / 32, 4),
            ("audio", (torch.arange(62) + 0.5) * 0.16, 1)):
        second = centers.floor().repeat_interleave(per_time)  # of each token
        means = [tokens[m][:, second == k].mean(1) for k in range(10)]
        torch.testing.assert_close(pooled[m], torch.stack(means, dim=1))
    assert model(x)["audio"].shape == (2, 10, 5)


def test_segments_without_a_patch_are_refused():
    def refused(frames):
        try:
            return not avmae.segment_bounds(frames // 16, frames, 16, 10)
        except avmae.UserError as error:
            return "one of 10 segments empty" in str(error)

    expected = [*range(169, 176), *range(187, 192), *range(205, 208), 223]
    assert [frames for frames in range(160, 1001) if refused(frames)] == expected
    model = classifier(modalities=AVE, num_segments=10)
    with pytest.raises(avmae.UserError, match="one of 10 segments empty"):
        model({"audio": torch.zeros(1, 170, 16)})


@pytest.mark.parametrize("modality_embed", [False, True])
@pytest.mark.parametrize("encoder", FUSION)
def test_finetuning_the_pretraining_encoder_starts_from_its_features(encoder, modality_embed):
    source = autoencoder(encoder=encoder, modality_embed=modality_embed)
    target = classifier(encoder=encoder, modality_embed=modality_embed)
    torch.nn.init.constant_(target.head.weight, 3.0)
    _, initialized = avmae.transfer(source, target)
    assert initialized == ["head.weight", "head.bias"]
    for m, features in target.features(clips(), pool=False).items():
        torch.testing.assert_close(features, source.features(clips(), pool=False)[m])


def test_unimodal_models_initialize_their_stream_or_all_streams():
    sources, target, both = {}, classifier(), classifier()
    for value, m in enumerate(BOTH, start=1):
        sources[m] = autoencoder(modalities={m: BOTH[m]}, encoder="separate")
        for p in sources[m].parameters():
            torch.nn.init.constant_(p, value)
        avmae.transfer(sources[m], target, [m])

    for value, m in enumerate(BOTH, start=1):
        modules = target.encoder.blocks[m], target.patch_embed[m]
        assert all((p == value).all() for module in modules for p in module.parameters())

    _, initialized = avmae.transfer(sources["audio"], both)
    assert all((p == 2).all() for p in both.encoder.blocks.parameters())
    embed = "patch_embed.video.proj.weight"
    assert embed in initialized
    assert both.get_parameter(embed).equal(classifier().get_parameter(embed))


@pytest.mark.parametrize("encoder", [None, "mbt", "mid"])
def test_models_compile_once_without_graph_breaks(encoder):
    torch._dynamo.reset()
    model = classifier(encoder=encoder, drop_path=0.5).train() if encoder else autoencoder()
    net = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            x = [clips(seed=seed)] if encoder else [clips(seed=seed), masks(seed)]
            outs = [torch.manual_seed(seed) and run(*x) for run in (net, model)]
            torch.testing.assert_close(*(out if encoder else out.loss for out in outs))


# ------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("make", [
    autoencoder, partial(classifier, num_classes=(3, 4), drop_path=0.9)])
def test_a_saved_model_loads_with_equal_outputs(tmp_path, make):
    model, path = make(), tmp_path / "model.pt"
    avmae.save_model(model, path, names=["a", "b"])

    again = avmae.load_model(path)
    assert again.config == model.config and not again.training
    assert avmae.load_checkpoint(path)["names"] == ["a", "b"]
    for m, features in again.features(clips()).items():
        assert features.equal(model.features(clips())[m])
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


class Hostile:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("owned"),)


def test_files_of_others_hostile_and_damaged_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = autoencoder()
    avmae.save_model(model, "good.pt")
    good = avmae.load_checkpoint("good.pt")
    fewer = {name: x for name, x in good["model"].items() if name != "mask_token.audio"}
    pathlib.Path("cut.pt").write_bytes(pathlib.Path("good.pt").read_bytes()[:9000])
    pathlib.Path("text.pt").write_bytes(b"hello world")
    pathlib.Path("hostile.pkl").write_bytes(pickle.dumps(Hostile(), 2))

    converter, version = "tools/convert_weights.py FILE OUT.pt", "another version of this code"
    foreign = {"vit.pt": {"blocks.0.norm1.weight": torch.ones(3)}, "list.pt": [1, 2],
               "hostile.pt": {"config": Hostile(), "model": {}}}
    ours = {"fewer.pt": good | {"model": fewer}, "config.pt": good | {"config": {"kind": "new"}},
            "other.pt": good | {"config": good["config"] | {"encoder": "early"}}}
    for name, content in (foreign | ours).items():
        torch.save(content, name)

    cases = dict.fromkeys([*foreign, "text.pt", "hostile.pkl"], converter)
    cases |= dict.fromkeys(ours, version) | {"cut.pt": "cannot read", "none.pt": "No such file"}
    for name, message in cases.items():
        with pytest.raises(avmae.UserError, match=message) as caught:
            avmae.load_model(name)
        assert "\n" not in str(caught.value)
    assert not pathlib.Path("owned").exists()


def test_avmae_py_works_alone(tmp_path):
    (tmp_path / "avmae.py").write_bytes(pathlib.Path(avmae.__file__).read_bytes())
    code = (
        "import sys, torch, avmae; loaded = set(sys.modules); "
        "assert not {'av', 'torchvision', 'torchaudio', 'msgpack', 'safetensors', 'data'} & loaded;"
        "x = {'video': torch.rand(1, 4, 32, 32, 3), 'audio': torch.rand(1, 32, 32)}; "
        "modalities = {m: avmae.MODALITIES[m].with_shape_of(x[m]) for m in x}; "
        "s = avmae.TransformerConfig(24, 2, 2, 32); "
        "model = avmae.AVMAE(avmae.PretrainConfig(modalities, s, s, joint_layers=1)); "
        "model(x).loss.backward(); avmae.save_model(model, 'a.pt'); "
        "avmae.load_model('a.pt').reconstruct(x)")
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout == "", ran.stderr
