"""Properties of the models: who sees what, what is shared, what is counted."""

import itertools
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

import avmae
from avmae import CONTEXT, PLANS, ClassifierConfig, PretrainConfig, Size

VIDEO = replace(avmae.VIDEO, shape=(4, 32, 32), patch=(2, 8, 8), mask_ratio=0.7)  # 32 tokens
AUDIO = replace(avmae.AUDIO, shape=(48, 16), patch=(8, 8), mask_ratio=0.7)  # 12 tokens
BOTH = {"video": VIDEO, "audio": AUDIO}
SIZE = Size(24, 4, 2, 32)


def clips(batch=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "video": torch.rand(batch, 4, 32, 32, 3, generator=g) * 2 - 1,
        "audio": torch.randn(batch, 48, 16, generator=g)}


def built(config, random=True):
    torch.manual_seed(0)
    model = avmae.build(config)
    for p in model.parameters() if random else ():  # zeros would hide what flows through them
        torch.nn.init.normal_(p, std=0.2)
    return model


def model_of(random=True, **settings):
    tiny = {"modalities": BOTH, "size": SIZE, "decoder_size": Size(16, 3, 2, 24)}
    return built(PretrainConfig(**tiny | settings), random)


def classifier(**settings):
    tiny = {"modalities": BOTH, "size": SIZE, "num_classes": (5,), "fusion_layer": 2}
    return built(ClassifierConfig(**tiny | settings)).eval()


def draw(seed=0, batch=3):
    return avmae.random_masking(BOTH, batch, torch.Generator().manual_seed(seed))


def depends(output, x):
    (grad,) = torch.autograd.grad(output.square().sum(), x, allow_unused=True, retain_graph=True)
    return grad is not None and bool(grad.abs().max() > 0)


def total(config):
    with torch.device("meta"):
        return sum(p.numel() for p in avmae.build(config).parameters())


# ---------------------------------------------------------------------------- sizes, patches, masks


@pytest.mark.parametrize("encoder, base, large", [
    ("separate", 179_869_696, 621_040_384), ("mid", 165_695_488, 595_849_984),
    ("early", 94_813_696, 318_728_960), ("shared", 94_813_696, 318_728_960)])
def test_parameter_counts_of_the_paper(encoder, base, large):
    for size, count, extra in ("base", base, 7_098_624), ("large", large, 12_610_560):
        config = PretrainConfig(
            avmae.MODALITIES, *avmae.SIZES[size], encoder=encoder, allow_uncoupled=True)
        assert total(config) == total(replace(config, decoder="early")) == count
        assert total(replace(config, decoder="separate")) == count + extra


def test_parameter_counts_of_finetuning():
    base, large = (ClassifierConfig(size=avmae.SIZES[size][0]) for size in ("base", "large"))
    assert (total(base), total(large)) == (171_728_949, 606_778_677)
    for m, count in ("video", 304_206_133), ("audio", 302_895_413):  # there: with a bottleneck
        assert total(replace(large, modalities={m: avmae.MODALITIES[m]})) == count - 4 * 1024


def test_token_and_mask_counts():
    audioset = replace(avmae.AUDIO, shape=(1000, 128), mask_ratio=0.7)
    found = [(x.tokens, x.masked) for x in (avmae.VIDEO, avmae.AUDIO, audioset)]
    assert found == [(1568, 1411), (400, 200), (496, 347)]


def test_unpatchify_is_the_inverse_and_trailing_audio_is_dropped():
    x = clips()
    for m, modality in BOTH.items():
        assert modality.unpatchify(modality.patchify(x[m])).equal(x[m])
    longer = torch.cat([x["audio"], torch.full((3, 7, 16), 9.0)], dim=1)
    assert AUDIO.patchify(longer).equal(AUDIO.patchify(x["audio"]))


def test_inputs_are_normalized():
    video = torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8)
    model, ids, audio = model_of(), draw(batch=2), clips(2)["audio"]
    loss = model({"video": video, "audio": audio}, ids).loss
    scaled = video.float() * 2 / 255 - 1  # to [-1, 1]
    torch.testing.assert_close(loss, model({"video": scaled, "audio": audio}, ids).loss)

    model = model_of(modalities=BOTH | {"audio": replace(AUDIO, mean=1.0, std=4.0)})
    torch.testing.assert_close(loss, model({"video": video, "audio": audio * 4 + 1}, ids).loss)


def test_positions():
    table = avmae.sinusoid(1568, 16)
    angle = torch.arange(1568.0).double()[:, None] / 10000 ** (torch.arange(0, 16, 2) / 16)
    for i, part in enumerate((angle.sin(), angle.cos())):
        torch.testing.assert_close(table[:, i::2], part.float())
    assert avmae.Positions(4, 16)(9).equal(table[:9])  # made longer


def test_masks_are_drawn_for_the_whole_batch_and_stay_the_same():
    g = torch.Generator().manual_seed(3)
    whole = keep, mask = draw(3, batch=6)
    for m, modality in BOTH.items():  # video first
        order = torch.rand(6, modality.tokens, generator=g).argsort(-1)
        assert mask[m].equal(order[:, : modality.masked])
        assert keep[m].equal(order[:, modality.masked :])

    part = avmae.random_masking(BOTH, 6, g.manual_seed(3), rows=slice(2, 4))
    for some, all_of in zip(part, whole):
        assert all(some[m].equal(all_of[m][2:4]) for m in BOTH)


@pytest.mark.parametrize("objective", ["joint", "joint_inpaint"])
def test_masks_of_longer_clips_cover_every_token(objective):
    model = model_of(encoder="early", objective=objective)
    x = {"video": torch.rand(2, 6, 16, 40, 3), "audio": torch.rand(2, 100, 32)}
    out, features = model(x), model.features(x, pool=False)
    assert not out.ids_mask["audio"].equal(model(x).ids_mask["audio"])  # drawn anew

    for m, tokens in ("video", 30), ("audio", 48):
        assert out.ids_mask[m].shape[1] == int(0.7 * tokens)
        together = torch.cat([out.ids_keep[m], out.ids_pred[m, m]], dim=1)
        assert together.sort(1).values.equal(torch.arange(tokens).expand(2, -1))
        assert features[m].shape == (2, tokens, 24)

    assert set(model.features({"audio": x["audio"]})) == {"audio"}
    for (t, _), clip in model.reconstruct(x).items():
        assert all(part.shape[2:] == x[t].shape[2:] for part in clip)


# -------------------------------------------------------------------------- variants and objectives


@pytest.mark.parametrize("encoder, decoder, objective", [
    row for row in itertools.product(PLANS, PLANS, CONTEXT)
    if row[0] in ("early", "mid") or row[2] == "joint"])
def test_every_variant_trains(encoder, decoder, objective):
    variant = dict(encoder=encoder, decoder=decoder, objective=objective, allow_uncoupled=True)
    model, x, losses = model_of(False, **variant), clips(8), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(12):
        optimizer.zero_grad()
        losses.append(model(x, draw(batch=8)).loss)
        losses[-1].backward()
        optimizer.step()

    assert losses[-1] < 0.97 * losses[0]
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("fusion, same", [
    ("early", 4 * [True]), ("shared", 4 * [True]), ("separate", 4 * [False]),
    ("mid", [False, False, True, True])])
def test_who_sees_whom_and_which_weights_are_shared(fusion, same):
    paths = map(avmae.Fusion(fusion, SIZE, BOTH).path, BOTH)
    assert [a is b for a, b in zip(*paths, strict=True)] == same

    joint = fusion in ("early", "mid")
    for m, other in ("video", "audio"), ("audio", "video"):
        x = clips()
        x[other].requires_grad_()
        assert depends(model_of(encoder=fusion).features(x, pool=False)[m], x[other]) == joint
        preds = model_of(encoder="shared", decoder=fusion)(x).preds
        assert depends(preds[m, m], x[other]) == joint


@pytest.mark.parametrize("m", BOTH)
def test_one_modality(m):
    one = {"modalities": {m: BOTH[m]}, "encoder": "separate", "decoder": "separate"}
    out = model_of(**one)({m: clips()[m]})
    assert set(out.losses) == {(m, m)} and out.loss == 0.5 * out.losses[m, m]


def test_inpainting_decodes_from_the_other_modality_only():
    model, ids = model_of(encoder="early", objective="inpaint_both"), draw()
    latent = model.forward_encoder(model.patchify(clips()), ids[0])
    latent = {m: y.detach().requires_grad_() for m, y in latent.items()}
    pairs = {"video": "audio", "audio": "video"}
    preds, ids_pred = model.forward_decoder(latent, pairs, ids)

    for t, c in pairs.items():
        assert depends(preds[t], latent[c]) and not depends(preds[t], latent[t])
        seen = latent[c].shape[1]  # which stand first
        assert ids_pred[t].equal(torch.arange(seen, BOTH[t].tokens).expand(3, -1))


def test_joint_inpaint_is_the_sum_of_both():
    joint, inpaint, both = (
        model_of(encoder="early", objective=objective)(clips(), draw()).loss
        for objective in ("joint", "inpaint_both", "joint_inpaint"))
    torch.testing.assert_close(both, joint + inpaint)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_reconstructions(norm_pix):
    """What is visible is the original, what is predicted the prediction in the inputs' units."""
    modalities, x, ids = BOTH | {"audio": replace(AUDIO, mean=1.0, std=4.0)}, clips(), draw()
    model = model_of(
        modalities=modalities, encoder="early", objective="joint_inpaint", norm_pix=norm_pix)
    out, clips_of = model(x, ids), model.reconstruct(x, ids)
    assert set(clips_of) == {(t, c) for t in BOTH for c in BOTH}

    for (t, c), clip in clips_of.items():
        modality, (keep, mask) = modalities[t], (part[t] for part in ids)
        original, visible, rebuilt = map(modality.patchify, clip)
        torch.testing.assert_close(clip.original, x[t])

        torch.testing.assert_close(avmae.take(visible, keep), avmae.take(original, keep))
        assert avmae.take(visible, mask).isnan().all()
        if t == c:
            torch.testing.assert_close(avmae.take(rebuilt, keep), avmae.take(original, keep))
        else:
            assert rebuilt[:, : out.ids_pred[t, c][0, 0]].isnan().all()

        pred, where = out.preds[t, c].detach(), out.ids_pred[t, c]
        if norm_pix:  # undone with the patch's own mean and standard deviation
            y = (avmae.take(original, where) - modality.mean) / modality.std
            pred = pred * (y.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
            pred = pred + y.mean(-1, keepdim=True)
        pred = pred * modality.std + modality.mean
        torch.testing.assert_close(avmae.take(rebuilt, where), pred, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- initialization and refusals


def test_initialization():
    model = built(PretrainConfig(avmae.MODALITIES, *avmae.SIZES["small"]), random=False)
    block, embed = model.encoder.path("video")[0], model.patch_embed

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
    mbt = built(ClassifierConfig(size=avmae.SIZES["small"][0], num_bottlenecks=40), random=False)
    assert mbt.trunk.bottleneck.std().item() == pytest.approx(0.02, rel=0.05)
    assert not mbt.head.weight.any()


def changed(**changes):
    return {"modalities": {m: replace(x, **changes.get(m, {})) for m, x in BOTH.items()}}


@pytest.mark.parametrize("mistake, words", [
    *((partial(model_of, **settings), words) for settings, words in [
        (dict(encoder="separate", objective="inpaint_both"), "early or mid fusion"),
        (dict(encoder="shared", objective="joint_inpaint"), "early or mid fusion"),
        (dict(encoder="separate", decoder="separate"), "--allow-uncoupled"),
        (dict(encoder="late"), "early, separate, shared, mid"),
        (dict(decoder="late"), "early, separate, shared, mid"),
        (dict(objective="both"), "joint, video_from_audio"),
        (dict(encoder="early", objective="audio_from_video",  # as many as audio has in all
              **changed(video={"mask_ratio": 0.625})), "mask more video"),
        (dict(modalities={"audio": AUDIO}, objective="inpaint_both"), "needs both"),
        (dict(modalities={"audio": AUDIO}, objective="video_from_audio"), "nothing to reconstruct"),
        (dict(modalities={}), "nothing to reconstruct: no modality"),
        (dict(size=Size(25, 4, 2, 48)), "2 heads don't divide a width of 25"),
        (dict(num_joint=4), "0 < S < 4"),
        (changed(video={"mask_ratio": 1.0}), "some visible"),
        (changed(audio={"mask_ratio": 0.0}), "some must be masked"),
        (changed(video={"shape": (4, 30, 32)}), "4x30x32"),
        (changed(video={"shape": (3, 32, 32)}), "3x32x32"),
        (changed(audio={"shape": (48, 15)}), "48x15")]),
    (lambda: VIDEO.patchify(torch.zeros(1, 5, 32, 32, 3)), "5x32x32"),
    (lambda: model_of()(clips() | {"video": torch.zeros(3, 4, 32, 30, 3)}), "4x32x30"),
    (lambda: classifier(fusion_layer=5), "fusion layer 5 of 4"),
    (lambda: classifier(modalities={}), "needs a modality"),
    (lambda: classifier(num_segments=3), "3 segments need as many patches in time"),
    (lambda: avmae.transfer(model_of(size=Size(16, 4, 2, 32)), classifier()), "must be equal"),
    (lambda: avmae.transfer(model_of(), classifier(**changed(audio={"patch": (16, 8)}))),
     "patches of .*, this one of"),
    (lambda: avmae.transfer(model_of(), classifier(), ["smell"]), "no stream 'smell'")])
def test_what_is_impossible_is_refused_with_a_sentence(mistake, words):
    with pytest.raises(avmae.UserError, match=words):
        mistake()


# -------------------------------------------------------------------------- finetuning and transfer


def test_stochastic_depth_drops_branches_of_clips():
    for trunk in "mbt", *PLANS:
        path = classifier(trunk=trunk, drop_path=0.3).trunk.path("audio")
        assert [block.drop_path.rate for block in path] == pytest.approx([0.0, 0.1, 0.2, 0.3])

    torch.manual_seed(0)
    drop, ones = avmae.DropPath(0.3), torch.ones(20_000, 2, 3)
    y = drop(ones)
    dropped = y.eq(0).all((1, 2))
    assert y[~dropped].eq(1).all()  # whole clips, and the rest is not rescaled
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert not y.equal(drop(ones)) and drop.eval()(ones).equal(ones)


def test_segments_of_ave():
    # 32 frames and 1000 mel frames over 10 s; the last 8 of 1000 frames fill no patch
    video = replace(avmae.VIDEO, shape=(32, 32, 32))
    audio = replace(avmae.AUDIO, shape=(1000, 16))
    model = classifier(modalities={"video": video, "audio": audio}, num_segments=10)

    for m, frames, centers, each in (
            ("video", 32, (torch.arange(16) + 0.5) * 2 * 0.3125, 4),
            ("audio", 1000, (torch.arange(62) + 0.5) * 0.16, 1)):
        second = centers.floor().repeat_interleave(each)  # each token knows its own
        tokens = second[None, :, None].repeat(1, 1, 24)
        assert model.pool(m, tokens, frames)[0, :, 0].tolist() == list(range(10))
    assert classifier(num_segments=2)(clips())["audio"].shape == (3, 2, 5)


@pytest.mark.parametrize("modality_embed", [False, True])
@pytest.mark.parametrize("trunk", PLANS)
def test_the_pretraining_encoder_can_be_finetuned_as_it_is(trunk, modality_embed):
    source = model_of(encoder=trunk, modality_embed=modality_embed)
    target = classifier(trunk=trunk, modality_embed=modality_embed)
    torch.nn.init.constant_(target.head.weight, 3.0)
    _, fresh = avmae.transfer(source, target)
    assert fresh == ["head.weight", "head.bias"]
    for m, features in target.features(clips(), pool=False).items():
        torch.testing.assert_close(features, source.features(clips(), pool=False)[m])


def test_two_unimodal_models_initialize_a_stream_each_or_one_of_them_both():
    sources, target, both = {}, classifier(), classifier()
    for value, m in enumerate(BOTH, start=1):
        sources[m] = model_of(modalities={m: BOTH[m]}, encoder="separate")
        for p in sources[m].parameters():
            torch.nn.init.constant_(p, value)
        avmae.transfer(sources[m], target, [m])

    for value, m in enumerate(BOTH, start=1):
        parts = target.trunk.blocks[m], target.patch_embed[m]
        assert all((p == value).all() for part in parts for p in part.parameters())

    _, fresh = avmae.transfer(sources["audio"], both)
    assert all((p == 2).all() for p in both.trunk.blocks.parameters())
    embed = "patch_embed.video.proj.weight"
    assert embed in fresh and both.get_parameter(embed).equal(classifier().get_parameter(embed))


@pytest.mark.parametrize("trunk", [None, "mbt", "mid"])
def test_models_compile_once_without_graph_breaks(trunk):
    torch._dynamo.reset()
    model = classifier(trunk=trunk, drop_path=0.5).train() if trunk else model_of()
    net = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            x = [clips(seed=seed)] if trunk else [clips(seed=seed), draw(seed)]
            outs = [torch.manual_seed(seed) and run(*x) for run in (net, model)]
            torch.testing.assert_close(*(out if trunk else out.loss for out in outs))


def test_copies_alone(tmp_path):
    (tmp_path / "avmae.py").write_bytes(open(avmae.__file__, "rb").read())
    code = (
        "import sys, torch, avmae; loaded = set(sys.modules); "
        "assert not {'av', 'torchvision', 'torchaudio', 'msgpack', 'safetensors', 'data'} & loaded;"
        "x = {'video': torch.rand(1, 4, 32, 32, 3), 'audio': torch.rand(1, 32, 32)}; "
        "modalities = {m: avmae.MODALITIES[m].like(x[m]) for m in x}; s = avmae.Size(24, 2, 2, 32);"
        "model = avmae.AVMAE(avmae.PretrainConfig(modalities, s, s, num_joint=1)); "
        "model(x).loss.backward(); avmae.save(model, 'a.pt'); "
        "avmae.load_model('a.pt').reconstruct(x)")
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout == "", ran.stderr
