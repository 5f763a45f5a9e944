"""Properties of the models: who sees what, what is shared, what is counted."""

import copy
import itertools
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

import avmae
from avmae import AVMAE, CONTEXT, PLANS, Classifier, ClassifierConfig, PretrainConfig, Size

TINY = dict(
    size=Size(24, 4, 2, 32), decoder_size=Size(16, 3, 2, 24),
    patch={"video": (2, 8, 8), "audio": (8, 8)}, shape={"video": (4, 32, 32), "audio": (48, 16)},
    mask={"video": 0.7, "audio": 0.7})
INPAINT = [o for o in CONTEXT if o != "joint"]


def variants():
    for encoder, decoder, objective in itertools.product(PLANS, PLANS, CONTEXT):
        if encoder in ("separate", "shared") and objective != "joint":
            continue
        yield dict(encoder=encoder, decoder=decoder, objective=objective, allow_uncoupled=True)


def clips(batch=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "video": torch.rand(batch, 4, 32, 32, 3, generator=g) * 2 - 1,
        "audio": torch.randn(batch, 48, 16, generator=g)}


def model_of(randomise=True, **settings):
    torch.manual_seed(0)
    model = AVMAE(PretrainConfig(**{**TINY, **settings}))
    if randomise:  # heads and tokens start at zero, which would hide what flows through them
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.2)
    return model


def total(config):
    with torch.device("meta"):
        return sum(p.numel() for p in avmae.build(config).parameters())


# -------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    "size, encoder, count",
    [
        ("base", "separate", 179_869_696), ("large", "separate", 621_040_384),
        ("base", "mid", 165_695_488), ("large", "mid", 595_849_984), ("base", "early", 94_813_696),
        ("large", "early", 318_728_960), ("base", "shared", 94_813_696),
        ("large", "shared", 318_728_960)],
)
def test_parameter_counts_of_the_paper(size, encoder, count):
    encoder_size, decoder_size = avmae.SIZES[size]
    sizes = dict(
        size=encoder_size, decoder_size=decoder_size, encoder=encoder, allow_uncoupled=True)
    extra = {"base": 7_098_624, "large": 12_610_560}[size]
    assert total(PretrainConfig(**sizes)) == count
    assert total(PretrainConfig(**sizes, decoder="early")) == count
    assert total(PretrainConfig(**sizes, decoder="separate")) == count + extra


@pytest.mark.parametrize(
    "size, modalities, count",
    [
        ("base", ("video", "audio"), 171_728_949), ("large", ("video", "audio"), 606_778_677),
        ("large", ("video",), 304_206_133 - 4 * 1024),
        ("large", ("audio",), 302_895_413 - 4 * 1024)],
)
def test_parameter_counts_of_finetuning(size, modalities, count):
    assert total(ClassifierConfig(size=avmae.SIZES[size][0], modalities=modalities)) == count


def test_token_and_mask_counts():
    config = PretrainConfig()
    assert (config.tokens("video"), config.masked("video")) == (1568, 1411)
    assert (config.tokens("audio"), config.masked("audio")) == (400, 200)
    audioset = PretrainConfig(
        shape={"video": (16, 224, 224), "audio": (1000, 128)}, mask={"video": 0.9, "audio": 0.7})
    assert (audioset.tokens("audio"), audioset.masked("audio")) == (496, 347)


# ------------------------------------------------------------------------------------------ patches


def test_patches_are_in_the_stated_order():
    video = torch.arange(2 * 4 * 6 * 8 * 3).reshape(2, 4, 6, 8, 3)
    patches = avmae.patchify(video, "video", (2, 3, 4))
    index = (1 * 2 + 1) * 2 + 0  # time 1, row 1, column 0 of a 2 x 2 x 2 grid
    assert patches.shape == (2, 8, 72)
    assert patches[1, index].equal(video[1, 2:4, 3:6, 0:4].reshape(-1))  # dt, row, column, channel
    audio = torch.arange(2 * 12 * 8).reshape(2, 12, 8)
    patches = avmae.patchify(audio, "audio", (4, 2))
    assert patches[1, 2 * 4 + 3].equal(audio[1, 8:12, 6:8].reshape(-1))  # time-major


@pytest.mark.parametrize("modality", avmae.MODALITIES)
def test_unpatchify_is_the_inverse(modality):
    x, patch = clips()[modality], TINY["patch"][modality]
    shape = x.shape[1:4] if modality == "video" else x.shape[1:]
    assert avmae.unpatchify(avmae.patchify(x, modality, patch), modality, patch, shape).equal(x)


def test_trailing_audio_frames_are_dropped():
    audio = clips()["audio"]
    longer = torch.cat([audio, torch.full((3, 7, 16), 9.0)], dim=1)
    assert avmae.patchify(longer, "audio", (8, 8)).equal(avmae.patchify(audio, "audio", (8, 8)))


def test_embedding_is_a_strided_convolution():
    model, x = model_of(), clips()
    linear = model.embed["video"].linear
    weight = rearrange(linear.weight, "d (t h w c) -> d c t h w", t=2, h=8, w=8)
    convolved = F.conv3d(x["video"].permute(0, 4, 1, 2, 3), weight, linear.bias, stride=(2, 8, 8))
    ours = linear(avmae.patchify(x["video"], "video", (2, 8, 8)))
    torch.testing.assert_close(
        ours, rearrange(convolved, "b d t h w -> b (t h w) d"), atol=1e-5, rtol=1e-5)


def test_bytes_are_scaled_to_plus_minus_one():
    model = model_of()
    video = torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8)
    x = {"video": video, "audio": clips(2)["audio"]}
    y = x | {"video": video.float() * 2 / 255 - 1}
    masks = model.draw_masks(2)
    torch.testing.assert_close(model(x, masks).loss, model(y, masks).loss)


def test_positions():
    table = avmae.sinusoid(1568, 16)
    for p, i in (0, 0), (7, 3), (1567, 7):
        w = 10000 ** (-2 * i / 16)
        assert table[p, 2 * i].item() == pytest.approx(math.sin(p * w), abs=1e-7)
        assert table[p, 2 * i + 1].item() == pytest.approx(math.cos(p * w), abs=1e-7)


# -------------------------------------------------------------------------------------------- masks


def test_masks_partition_the_tokens():
    config = PretrainConfig(**TINY)
    visible, masked = AVMAE(config).draw_masks(5, torch.Generator().manual_seed(1))
    for m in config.modalities:
        together = torch.cat([visible[m], masked[m]], dim=1).sort(1).values
        assert together.equal(torch.arange(config.tokens(m)).expand(5, -1))
        assert masked[m].shape[1] == int(0.7 * config.tokens(m))
        assert not masked[m][0].sort().values.equal(masked[m][1].sort().values)


def test_masks_are_uniform():
    ids = avmae.draw_masks({"audio": 10}, {"audio": 3}, 20_000, torch.Generator().manual_seed(0))[
        1]["audio"]
    share = torch.bincount(ids.flatten(), minlength=10) / 20_000
    assert (share - 0.3).abs().max() < 0.02


def test_given_masks_come_back_and_decide():
    model, x = model_of(), clips()
    masks = model.draw_masks(3)
    first, again = model(x, masks), model(x, masks)
    assert first.loss == again.loss and first.masks[0]["audio"].equal(masks[0]["audio"])
    assert first.loss != model(x, model.draw_masks(3)).loss


def test_masked_patches_are_not_seen():
    model, x = model_of(), clips()
    masks = model.draw_masks(3)
    before = model(x, masks).predictions
    for m in avmae.MODALITIES:
        patches = avmae.patchify(x[m], m, TINY["patch"][m])
        patches = patches.scatter(1, masks[1][m][..., None].expand(-1, -1, patches.shape[-1]), 5.0)
        shape = x[m].shape[1:4] if m == "video" else x[m].shape[1:]
        x[m] = avmae.unpatchify(patches, m, TINY["patch"][m], shape)
    after = model(x, masks).predictions
    assert all(before[k].equal(after[k]) for k in before)


# ----------------------------------------------------------------------------------------- variants


@pytest.mark.parametrize(
    "settings", list(variants()), ids=lambda s: "-".join(map(str, list(s.values())[:3])))
def test_every_variant_trains(settings):
    model, x = model_of(randomise=False, **settings), clips(8)
    masks = model.draw_masks(8, torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        out = model(x, masks)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < 0.97 * losses[0]
    missing = [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0
    ]
    assert not missing


@pytest.mark.parametrize("encoder", PLANS)
def test_who_sees_whom_in_the_encoder(encoder):
    model, x = model_of(encoder=encoder), clips()
    for m, other in ("video", "audio"), ("audio", "video"):
        x[other].requires_grad_()
        latent = model.features(x, pool=False)[m]
        (grad,) = torch.autograd.grad(latent.square().sum(), x[other], allow_unused=True)
        sees = grad is not None and bool(grad.abs().max() > 0)
        assert sees == (encoder in ("early", "mid"))


@pytest.mark.parametrize("decoder", PLANS)
def test_who_sees_whom_in_the_decoder(decoder):
    model, x = model_of(encoder="shared", decoder=decoder), clips()
    x["video"].requires_grad_()
    audio = model(x).predictions["audio"]
    (grad,) = torch.autograd.grad(audio.square().sum(), x["video"], allow_unused=True)
    assert (grad is not None and bool(grad.abs().max() > 0)) == (decoder in ("early", "mid"))


@pytest.mark.parametrize("fusion", PLANS)
def test_which_weights_are_shared(fusion):
    stack = avmae.Fusion(fusion, TINY["size"], avmae.MODALITIES)
    paths = [stack.path(m) for m in avmae.MODALITIES]
    same = [a is b for a, b in zip(*paths, strict=True)]
    assert (
        same
        == {
            "early": [True] * 4, "shared": [True] * 4, "separate": [False] * 4,
            "mid": [False, False, True, True]}[fusion]
    )


def test_mid_fusion_has_a_norm_before_the_joint_layers():
    fusion = avmae.Fusion("mid", TINY["size"], avmae.MODALITIES, joint_layers=1)
    x = {m: torch.randn(2, n, 24) for m, n in (("video", 5), ("audio", 3))}
    separate = {
        m: fusion.stages[0][m].norm(
            fusion.stages[0][m].blocks[2](
                fusion.stages[0][m].blocks[1](fusion.stages[0][m].blocks[0](v)))
        )
        for m, v in x.items()
    }
    joint = fusion.stages[1]["all"](torch.cat([separate["video"], separate["audio"]], 1))
    torch.testing.assert_close(fusion(x)["audio"], joint[:, 5:])


@pytest.mark.parametrize("modality", avmae.MODALITIES)
def test_one_modality(modality):
    base = dict(modalities=(modality,))
    counts = {fusion: total(PretrainConfig(**TINY, **base, encoder=fusion)) for fusion in PLANS}
    counts["mid"] -= 2 * 24  # it has a norm between its stages
    assert len(set(counts.values())) == 1
    out = model_of(**base, encoder="separate", decoder="separate")({modality: clips()[modality]})
    assert set(out.losses) == {modality} and out.loss == 0.5 * out.losses[modality]


# --------------------------------------------------------------------------------------- objectives


def classic_joint_loss(model, x, masks):
    """The formulation with sequences in order and a binary mask: mask tokens fill the gaps, the
    loss is a masked mean over all tokens."""
    latent = model.encode({m: avmae.patchify(x[m], m, TINY["patch"][m]) for m in x}, masks[0])
    tokens, binary, targets = {}, {}, {}
    for m in x:
        targets[m] = avmae.patchify(x[m], m, TINY["patch"][m])
        count = targets[m].shape[1]
        rows = torch.arange(3)[:, None]
        full = model.mask_token[m].expand(3, count, -1).clone()
        full[rows, masks[0][m]] = model.project[m](latent[m])
        tokens[m] = full + avmae.sinusoid(count, full.shape[-1])
        binary[m] = torch.zeros(3, count).index_put((rows, masks[1][m]), torch.tensor(1.0))
    decoded = model.decoder(tokens)
    losses = {
        m: ((model.head[m](decoded[m]) - targets[m]).square().mean(-1) * binary[m]).sum()
        / binary[m].sum()
        for m in x}
    return 0.5 * losses["video"] + 0.5 * losses["audio"]


@pytest.mark.parametrize(
    "encoder, decoder", [("mid", "shared"), ("shared", "early"), ("early", "mid")])
def test_equals_the_classic_formulation(encoder, decoder):
    model, x = (
        model_of(encoder=encoder, decoder=decoder).double(),
        {m: v.double() for m, v in clips().items()})
    masks = model.draw_masks(3)
    torch.testing.assert_close(
        model(x, masks).loss, classic_joint_loss(model, x, masks).double(), rtol=1e-6, atol=1e-6)


def test_inpainting_puts_the_other_modality_first():
    model, x = model_of(encoder="early", objective="inpaint_both"), clips()
    out = model(x)
    seen = {m: ids.shape[1] for m, ids in out.masks[0].items()}
    assert out.places["video_from_audio"].equal(torch.arange(seen["audio"], 32).expand(3, -1))
    assert out.places["audio_from_video"].equal(torch.arange(seen["video"], 12).expand(3, -1))


def test_inpainting_decodes_from_the_other_modality_only():
    model, x = model_of(encoder="early", objective="inpaint_both"), clips()
    patches = {m: avmae.patchify(x[m], m, TINY["patch"][m]) for m in x}
    visible, masked = model.draw_masks(3)
    latent = {m: v.detach().requires_grad_() for m, v in model.encode(patches, visible).items()}
    contexts = {"video": "audio", "audio": "video"}
    where = {t: model.places(t, c, visible, masked) for t, c in contexts.items()}
    decoded = model.decode(latent, contexts, where, {m: p.shape[1] for m, p in patches.items()})
    own, other = torch.autograd.grad(
        decoded["video"].sum() + 0 * decoded["audio"].sum(), [latent["video"], latent["audio"]],
        allow_unused=True)
    assert not own.abs().any() and other.abs().max() > 0


def test_only_what_an_objective_uses_exists():
    names = [
        name
        for name, _ in model_of(encoder="early", objective="video_from_audio").named_parameters()]
    assert not any(n.startswith(("project.video", "mask_token.audio", "head.audio")) for n in names)
    assert any(n.startswith("project.audio") for n in names)


def test_joint_inpaint_is_the_sum_of_both():
    parts = {
        o: model_of(encoder="early", objective=o)
        for o in ("joint", "inpaint_both", "joint_inpaint")}
    for o in "joint", "inpaint_both":
        parts[o].load_state_dict(parts["joint_inpaint"].state_dict())
    masks, x = parts["joint"].draw_masks(3), clips()
    loss = {o: model(x, masks).loss for o, model in parts.items()}
    torch.testing.assert_close(loss["joint_inpaint"], loss["joint"] + loss["inpaint_both"])


def test_standardised_targets():
    x = torch.randn(2, 5, 64, dtype=torch.float64) * 3 + 1
    y = avmae.standardise(x)
    torch.testing.assert_close(
        y, (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt())


def test_modality_tokens():
    plain, model, x = model_of(), model_of(modality_tokens=True), clips()
    added = set(model.state_dict()) - set(plain.state_dict())
    assert added == {
        "embed.video.token", "embed.audio.token", "decoder_token.video", "decoder_token.audio"}
    for p in added:
        model.state_dict()[p].zero_()
    model.load_state_dict(plain.state_dict(), strict=False)
    masks = model.draw_masks(3)
    assert model(x, masks).loss == plain(x, masks).loss
    for p in added:
        before = model(x, masks).predictions
        model.state_dict()[p].normal_()
        after = model(x, masks).predictions
        m = p.split(".")[1]
        assert not before[m].equal(after[m])


# ----------------------------------------------------------------------------------- initialisation


def test_initialisation():
    torch.manual_seed(0)
    model = AVMAE(PretrainConfig())
    block, width = model.encoder.path("video")[0], 768
    xavier = math.sqrt(6 / (2 * width))  # of D x D, not of 3D x D
    assert block.attn.qkv.weight.abs().max() <= xavier
    assert block.attn.qkv.weight.std().item() == pytest.approx(math.sqrt(2 / (2 * width)), rel=0.01)
    assert block.attn.out.weight.std().item() == pytest.approx(math.sqrt(2 / (2 * width)), rel=0.01)
    assert block.mlp[0].weight.std().item() == pytest.approx(math.sqrt(2 / (768 + 3072)), rel=0.01)
    assert 0 < block.mlp[0].bias.std() < 2e-6
    for m, numbers in ("video", 1536), ("audio", 256):
        weight = model.embed[m].linear.weight
        assert weight.std().item() == pytest.approx(numbers**-0.5, rel=0.01)
        assert weight.abs().max() <= 2 * numbers**-0.5 / 0.8796
        assert not model.head[m].weight.any() and not model.mask_token[m].any()
    assert model.project["audio"].weight.std().item() == pytest.approx(
        math.sqrt(2 / (768 + 384)), rel=0.01)
    assert not any(
        p.any()
        for n, p in model.named_parameters()
        if n.endswith("bias") and "mlp" not in n and "norm" not in n)


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(encoder="separate", objective="inpaint_both"), "early or mid fusion"),
        (dict(encoder="shared", objective="joint_inpaint"), "early or mid fusion"),
        (dict(encoder="separate", decoder="separate"), "--allow-uncoupled"),
        (dict(encoder="late"), "early, separate, shared, mid"),
        (dict(decoder="late"), "early, separate, shared, mid"),
        (dict(objective="both"), "joint, video_from_audio"),
        (dict(modalities=("smell",)), "video, audio"),
        (  # as many visible video tokens as audio has in all
            dict(
                objective="audio_from_video", encoder="early",
                mask={"video": 0.625, "audio": 0.5}),
            "mask more video"),
        (dict(modalities=("audio",), objective="inpaint_both"), "needs both"),
        (dict(modalities=()), "needs a modality"),
        (dict(size=Size(25, 4, 2, 48)), "divide its width"),
        (dict(joint_layers=4), "0 < S < 4"),
        (dict(mask={"video": 1.0, "audio": 0.5}), "some visible"),
        (dict(mask={"video": 0.9, "audio": 0.0}), "some must be masked"),
        (dict(shape={"video": (4, 30, 32), "audio": (48, 16)}), "4x30x32"),
        (dict(shape={"video": (3, 32, 32), "audio": (48, 16)}), "3x32x32"),
        (dict(shape={"video": (4, 32, 32), "audio": (48, 15)}), "48x15"),
    ],
)
def test_impossible_settings_are_refused_with_a_sentence(settings, words):
    with pytest.raises(ValueError, match=words.replace("+", r"\+")):
        PretrainConfig(**{**TINY, **settings})


def test_a_fusion_layer_beyond_the_depth_is_refused():
    with pytest.raises(ValueError, match="fusion layer 5 of 4"):
        classifier(fusion_layer=5)


def test_an_input_that_patches_do_not_divide_is_refused():
    model, x = model_of(), clips()
    with pytest.raises(ValueError, match="4x32x30"):
        model(x | {"video": x["video"][:, :, :, :30]})


# --------------------------------------------------------------------------------------- finetuning


def classifier(**settings):
    torch.manual_seed(0)
    base = {k: TINY[k] for k in ("size", "patch", "shape")} | dict(classes=(5,), fusion_layer=2)
    model = Classifier(ClassifierConfig(**{**base, **settings}))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def test_mbt_with_one_modality_is_a_vit():
    model, x = classifier(modalities=("audio",)), clips()["audio"]
    tokens = model.embed["audio"].linear(avmae.patchify(x, "audio", (8, 8))) + avmae.sinusoid(
        12, 24)
    for block in model.trunk.blocks["audio"]:
        tokens = block(tokens)
    torch.testing.assert_close(
        model({"audio": x})["audio"], model.head(model.trunk.norm(tokens).mean(1)))
    assert not hasattr(model.trunk, "bottleneck")


@pytest.mark.parametrize("layer, sees", [(0, True), (3, False), (4, False), (2, True)])
def test_modalities_meet_in_the_bottleneck_only(layer, sees):
    # what enters at layer l reaches the other modality at layer l + 1
    model, x = classifier(fusion_layer=layer), clips()
    x["audio"].requires_grad_()
    (grad,) = torch.autograd.grad(model(x)["video"].square().sum(), x["audio"], allow_unused=True)
    assert (grad is not None and bool(grad.abs().max() > 0)) == sees


def test_every_modality_gets_the_mean_of_the_last_bottlenecks():
    trunk = classifier(fusion_layer=1).trunk
    x = {m: torch.randn(2, n, 24) for m, n in (("video", 6), ("audio", 5))}
    video, audio = (trunk.blocks[m][0](x[m]) for m in ("video", "audio"))
    z = trunk.bottleneck.expand(2, -1, -1)
    for i in 1, 2, 3:  # a block's norm hides the scale of z, its residual shows it a block later
        both_video = trunk.blocks["video"][i](torch.cat([video, z], 1))
        both_audio = trunk.blocks["audio"][i](torch.cat([audio, z], 1))
        video, audio = both_video[:, :6], both_audio[:, :5]
        z = (both_video[:, 6:] + both_audio[:, 5:]) / 2
    torch.testing.assert_close(trunk(x)["video"], trunk.norm(video))
    torch.testing.assert_close(trunk(x)["audio"], trunk.norm(audio))


def test_stochastic_depth_probabilities():
    keep = avmae.draw_keep(0.3, 4, ("video", "audio"), 20_000, torch.Generator().manual_seed(0))
    share = torch.stack([1 - k.mean((2, 3, 4)) for k in keep.values()])  # (modality, L, branch)
    assert (share - torch.tensor([0.0, 0.1, 0.2, 0.3])[None, :, None]).abs().max() < 0.02
    assert not keep["video"].equal(keep["audio"]) and not keep["video"][3, 0].equal(
        keep["video"][3, 1])


def test_a_dropped_branch_adds_nothing_and_a_kept_one_is_not_rescaled():
    block, x = classifier().trunk.blocks["audio"][0], torch.randn(2, 5, 24)
    keep = torch.tensor([[1.0, 0.0], [0.0, 0.0]])[..., None, None]  # (branch, clip)
    y = block(x, keep)
    assert y[1].equal(x[1])
    torch.testing.assert_close(y[0], (x + block.attn(block.norm1(x)))[0])


@pytest.mark.parametrize("trunk", PLANS)
def test_the_pretraining_encoder_can_be_finetuned_as_it_is(trunk):
    source, target = model_of(encoder=trunk), classifier(trunk=trunk)
    taken, fresh = avmae.transfer(source, target)
    assert fresh == ["head.weight", "head.bias"]
    x = clips()
    for m, features in target.features(x, pool=False).items():
        torch.testing.assert_close(features, source.features(x, pool=False)[m])


def test_logits_of_a_segment_come_from_its_tokens():
    model, x = classifier(segments=2, trunk="shared"), clips()
    tokens = model.features(x, pool=False)["audio"]  # 6 x 2: three time patches a segment
    pooled = model.features(x)["audio"]
    torch.testing.assert_close(pooled[:, 0], tokens[:, :6].mean(1))
    torch.testing.assert_close(pooled[:, 1], tokens[:, 6:].mean(1))
    assert model(x)["audio"].shape == (3, 2, 5)


@pytest.mark.parametrize("fusion", PLANS)
def test_a_dropped_block_of_an_encoder_is_one_that_adds_nothing(fusion):
    torch.manual_seed(0)
    encoder = avmae.Fusion(fusion, TINY["size"], avmae.MODALITIES)
    tokens = {"video": torch.randn(2, 5, 24), "audio": torch.randn(2, 3, 24)}
    for i in range(4):
        keep = {m: torch.ones(4, 2, 2, 1, 1) for m in tokens}
        without = copy.deepcopy(encoder)
        for m in tokens:
            keep[m][i] = 0
            block = without.path(m)[i]
            for p in *block.attn.out.parameters(), *block.mlp[2].parameters():
                torch.nn.init.zeros_(p)
        torch.testing.assert_close(encoder(tokens, keep), without(tokens))


def test_segments_of_ave():
    # 32 frames and 1000 mel frames over 10 s; the last 8 of 1000 frames fill no patch
    config = ClassifierConfig(
        shape={"video": (32, 32, 32), "audio": (1000, 16)}, segments=10, classes=(29,),
        size=Size(24, 1, 2, 24), fusion_layer=1)
    model = Classifier(config)
    centres = (torch.arange(16) + 0.5) * 2 * 0.3125
    second = centres.floor().repeat_interleave(4)  # each token knows its own
    tokens = second[None, :, None].repeat(1, 1, 24)
    assert model.pool("video", tokens, 32)[0, :, 0].tolist() == list(range(10))
    centres = (torch.arange(62) + 0.5) * 0.16
    assert model.pool("audio", centres.floor()[None, :, None].repeat(1, 1, 24), 1000)[
        0, :, 0].tolist() == list(range(10))


# ----------------------------------------------------------------------------------------- transfer


def test_transfer_needs_equal_sizes():
    with pytest.raises(ValueError, match="must be equal"):
        avmae.transfer(model_of(size=Size(16, 4, 2, 32)), classifier())


def test_two_unimodal_models_initialise_a_stream_each():
    target = classifier()
    sources = {m: model_of(modalities=(m,), encoder="separate") for m in avmae.MODALITIES}
    for i, (m, source) in enumerate(sources.items()):
        for p in source.parameters():
            torch.nn.init.constant_(p, i + 1.0)
        avmae.transfer(source, target, [m])
    for i, m in enumerate(sources):
        assert all((p == i + 1).all() for p in target.trunk.blocks[m].parameters())
        assert all((p == i + 1).all() for p in target.embed[m].parameters())


def test_an_audio_model_initialises_both_streams():
    source, target = model_of(modalities=("audio",), encoder="separate"), classifier()
    before = target.embed["video"].linear.weight.clone()
    _, fresh = avmae.transfer(source, target)
    assert target.trunk.blocks["video"][1].attn.qkv.weight.equal(
        source.encoder.path("audio")[1].attn.qkv.weight)
    assert (
        target.embed["video"].linear.weight.equal(before) and "embed.video.linear.weight" in fresh)


# ----------------------------------------------------------------------------------------- the file


@pytest.fixture
def compiled():
    """Compiles a model, and raises where it would be compiled again."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield lambda model: torch.compile(model, fullgraph=True, backend="aot_eager")


def test_pretraining_compiles_once_without_graph_breaks(compiled):
    model = model_of()
    net = compiled(model)
    for seed in range(3):
        x, masks = clips(seed=seed), model.draw_masks(3, torch.Generator().manual_seed(seed))
        torch.testing.assert_close(net(x, masks).loss, model(x, masks).loss)


@pytest.mark.parametrize("trunk", ["mbt", *PLANS])
def test_finetuning_compiles_once_without_graph_breaks(compiled, trunk):
    model = classifier(trunk=trunk)
    net = compiled(model)
    for seed in range(3):
        x, layers = clips(seed=seed), model.config.size.layers
        dice = torch.Generator().manual_seed(seed)
        keep = avmae.draw_keep(0.5, layers, avmae.MODALITIES, 3, dice)
        for ours, theirs in zip(net(x, keep).values(), model(x, keep).values()):
            torch.testing.assert_close(ours, theirs)


def test_copies_alone(tmp_path):
    (tmp_path / "avmae.py").write_bytes(open(avmae.__file__, "rb").read())
    code = (
        "import sys, torch, avmae; loaded = set(sys.modules); "
        "assert not {'av', 'torchvision', 'torchaudio', 'msgpack', 'numpy.f2py', 'data'} & loaded; "
        "s = avmae.Size(24, 2, 2, 32); "
        "c = avmae.PretrainConfig(size=s, decoder_size=s, joint_layers=1, "
        "shape={'video': (4, 32, 32), 'audio': (32, 32)}); "
        "x = {'video': torch.rand(1, 4, 32, 32, 3), 'audio': torch.rand(1, 32, 32)}; "
        "avmae.AVMAE(c)(x).loss.backward()"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout == "", ran.stderr
