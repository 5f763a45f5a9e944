"""Audiovisual Masked Autoencoders (ICCV 2023): every model of the paper in one file.

    inputs {video: (B, T, H, W, 3), audio: (B, T, F)}        clips and log-mel spectrograms
       -> patches {m: (B, N, P)} -> tokens {m: (B, V, D)}    a dict by modality all the way
       -> encoder -> decoder -> loss (AVMAE), or trunk -> logits (Classifier)

Two tables hold the paper's variants: `PLANS` (Fig. 2: how audio and video are fused) and `CONTEXT`
(Sec. 3.4, Fig. 3: what is reconstructed from what). One class, `Fusion`, runs any plan and is the
encoder and the decoder. Needs torch and einops only; copy the file and it works.

Letters: B clips, N tokens of a modality, V visible and M masked ones (V + M = N), P numbers in a
patch, D width, L layers, S joint layers.
"""

import json
import math
import os
import pathlib
import pickle
import re
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import pack, rearrange, unpack
from torch import nn

MODALITIES = ("video", "audio")
NORM_EPS = 1e-6


class Size(NamedTuple):
    """Sizes of a transformer: D, L, attention heads, hidden units of the MLP."""

    width: int
    layers: int
    heads: int
    mlp: int


SIZES = {  # name: (encoder, its decoder). Base and large: Table 21; the others by the same rule.
    "tiny": (Size(192, 12, 3, 768), Size(96, 4, 3, 384)),
    "small": (Size(384, 12, 6, 1536), Size(192, 4, 3, 768)),
    "base": (Size(768, 12, 12, 3072), Size(384, 4, 6, 1536)),
    "large": (Size(1024, 24, 16, 4096), Size(512, 4, 8, 2048)),
    "huge": (Size(1280, 32, 16, 5120), Size(512, 4, 8, 2048)),
}


# Fusion strategies (Fig. 2, Sec. 3.2 and 3.3) as stages (how, depth); L layers, S of them joint.
# separate: own weights, own pass. shared: same weights, own pass. joint: same weights, one pass
# over the concatenated modalities.
PLANS = {
    "early": lambda L, S: [("joint", L)],
    "separate": lambda L, S: [("separate", L)],
    "shared": lambda L, S: [("shared", L)],
    "mid": lambda L, S: [("separate", L - S), ("joint", S)],
}

# Objectives (Fig. 3, Sec. 3.4) as decoder passes {target: whose visible tokens it is decoded from}.
CONTEXT = {
    "joint": [{"video": "video", "audio": "audio"}],
    "video_from_audio": [{"video": "audio"}],
    "audio_from_video": [{"audio": "video"}],
    "inpaint_both": [{"video": "audio", "audio": "video"}],
    "joint_inpaint": [{"video": "video", "audio": "audio"}, {"video": "audio", "audio": "video"}],
}


def _known(name, choices, what):
    if name not in choices:
        raise ValueError(f"unknown {what} {name!r}: choose one of {', '.join(choices)}")
    return name


# ---------------------------------------------------------------------------------------------
# Settings: two frozen dataclasses, stored in every checkpoint


@dataclass(frozen=True)
class Inputs:
    """What goes in: shapes without the batch, patch sizes, and (mean, std) to normalise by.

    Video is (frames, height, width) and scaled to [-1, 1] before its mean and std apply; audio is
    a log-mel spectrogram (frames of 10 ms, mel bins).
    """

    modalities: tuple = MODALITIES
    size: Size = SIZES["base"][0]
    shape: dict = field(default_factory=lambda: {"video": (16, 224, 224), "audio": (800, 128)})
    patch: dict = field(default_factory=lambda: {"video": (2, 16, 16), "audio": (16, 16)})
    norm: dict = field(default_factory=lambda: {"video": (0.0, 1.0), "audio": (0.0, 1.0)})
    modality_tokens: bool = False  # learned, added to every token of a modality (official option)

    def __post_init__(self):
        for modality in self.modalities:
            _known(modality, MODALITIES, "modality")
            self.tokens(modality)
        if not self.modalities or self.size.width % self.size.heads:
            raise ValueError(
                "a model needs a modality, and heads that divide its width: "
                f"{self.modalities}, {self.size}")
        ordered = tuple(m for m in MODALITIES if m in self.modalities)
        object.__setattr__(self, "modalities", ordered)

    def tokens(self, modality):
        """N, the number of tokens of a modality."""
        return math.prod(grid(self.shape[modality], self.patch[modality], modality))


@dataclass(frozen=True)
class PretrainConfig(Inputs):
    """A pretraining model (Sec. 3). Impossible combinations are refused with a ValueError."""

    decoder_size: Size = SIZES["base"][1]
    encoder: str = "mid"  # a fusion strategy, Sec. 3.2
    decoder: str = "shared"  # the same four, Sec. 3.3
    objective: str = "joint"  # Sec. 3.4
    joint_layers: int = 2  # S of mid fusion, Table 15
    mask: dict = field(default_factory=lambda: {"video": 0.9, "audio": 0.5})
    standardise: bool = False  # targets to zero mean and unit variance, per patch
    allow_uncoupled: bool = False  # separate encoder + separate decoder: the baseline of Table 10

    def __post_init__(self):
        super().__post_init__()
        _known(self.objective, CONTEXT, "objective")
        for fusion, layers in (
            (self.encoder, self.size.layers), (self.decoder, self.decoder_size.layers)):
            _known(fusion, PLANS, "fusion strategy")
            if fusion == "mid" and not 0 < self.joint_layers < layers:
                raise ValueError(
                    f"mid fusion needs 0 < S < {layers} layers, not S = {self.joint_layers}")
        both = len(self.modalities) == 2
        if both and self.encoder == self.decoder == "separate" and not self.allow_uncoupled:
            raise ValueError(
                "a separate encoder with a separate decoder is two uncoupled autoencoders "
                "(Sec. 3.3): choose another decoder, or allow it with --allow-uncoupled")
        if self.objective != "joint":
            self._check_inpainting(both)
        for modality in self.modalities:
            tokens, masked = self.tokens(modality), self.masked(modality)
            if not 0 < masked < tokens:
                raise ValueError(
                    f"mask ratio {self.mask[modality]} of {tokens} {modality} tokens masks "
                    f"{masked}: some must be masked and some visible")

    def _check_inpainting(self, both):
        if not both:
            raise ValueError(
                f"objective {self.objective} predicts one modality from the other and needs both")
        if self.encoder in ("separate", "shared"):
            raise ValueError(
                f"inpainting needs early or mid fusion: with a {self.encoder} encoder the tokens "
                "of one modality know nothing of the other, which they must predict (Sec. 3.4)")
        for target, context in CONTEXT[self.objective][-1].items():
            visible = self.tokens(context) - self.masked(context)
            if visible >= self.tokens(target):
                raise ValueError(
                    f"inpainting puts the {visible} visible {context} tokens in front of the "
                    f"{target} sequence, which has only {self.tokens(target)}: mask more {context}")

    def masked(self, modality):
        """M, the number of masked tokens of a modality (Sec. 3.1)."""
        return int(self.mask[modality] * self.tokens(modality))

    @property
    def passes(self):
        """The decoder passes of the objective, with the modalities that there are."""
        return [
            {t: c for t, c in p.items() if t in self.modalities} for p in CONTEXT[self.objective]]


@dataclass(frozen=True)
class ClassifierConfig(Inputs):
    """A finetuning model: MBT, or a pretraining encoder as it is (Sec. 4.1, Table 14)."""

    trunk: str = "mbt"  # or a fusion strategy
    fusion_layer: int = 8  # of MBT: the first layer with bottlenecks
    bottlenecks: int = 4
    joint_layers: int = 2  # S of a mid encoder
    classes: tuple = (309,)  # of each head; Epic Kitchens has two: verbs, nouns
    segments: int = 1  # logits for so many equal parts of the clip (Table 8: 10)

    def __post_init__(self):
        super().__post_init__()
        _known(self.trunk, ("mbt", *PLANS), "trunk")
        if self.trunk == "mbt" and not 0 <= self.fusion_layer <= self.size.layers:
            raise ValueError(f"fusion layer {self.fusion_layer} of {self.size.layers}")


# ---------------------------------------------------------------------------------------------
# Patches and positions (Sec. 3.1)

PATTERN = {  # one pattern is the input of the embedding and the target of the reconstruction
    "video": "b (t dt) (h dh) (w dw) c -> b (t h w) (dt dh dw c)",
    "audio": "b (t dt) (f df) -> b (t f) (dt df)",
}


def grid(shape, patch, modality):
    """Patches along each axis: video (t, h, w), audio (t, f).

    Audio frames at the end that fill no patch are dropped (8 of AudioSet's 1000). Anything else
    that patches don't divide is a ValueError.
    """
    if modality == "audio":
        shape = (shape[0] // patch[0] * patch[0], *shape[1:])
    if any(s % p or s < p for s, p in zip(shape, patch, strict=True)):
        axes = {"video": "frames x height x width", "audio": "frames x mel bins"}[modality]
        raise ValueError(
            f"{modality} of {'x'.join(map(str, shape))} ({axes}) is not divided by "
            f"patches of {'x'.join(map(str, patch))}")
    return tuple(s // p for s, p in zip(shape, patch))


def patchify(x, modality, patch):
    """Clips to patches: video (B, T, H, W, 3) or audio (B, T, F) -> (B, N, P)."""
    axes = grid(x.shape[1:4] if modality == "video" else x.shape[1:], patch, modality)
    x = x[:, : axes[0] * patch[0]]
    return rearrange(
        x, PATTERN[modality],
        **dict(zip(("dt", "dh", "dw") if modality == "video" else ("dt", "df"), patch)))


def unpatchify(patches, modality, patch, shape):
    """The inverse: (B, N, P) -> clips of `shape` (without the batch and channels)."""
    left, right = PATTERN[modality].split(" -> ")
    names = ("t", "h", "w", "dt", "dh", "dw") if modality == "video" else ("t", "f", "dt", "df")
    return rearrange(
        patches, f"{right} -> {left}", **dict(zip(names, (*grid(shape, patch, modality), *patch))))


def sinusoid(count, width, device=None):
    """Fixed positions (N, D): pos[p, 2i] = sin(p w_i), pos[p, 2i+1] = cos(p w_i), where
    w_i = 10000^(-2i/D). Made for the length at hand, so that any length will do."""
    frequency = 10000.0 ** (-torch.arange(0, width, 2, device=device, dtype=torch.float64) / width)
    angle = torch.arange(count, device=device, dtype=torch.float64)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).float()


def take(x, ids):
    """Rows of each clip: (B, N, P), (B, V) -> (B, V, P)."""
    return x[torch.arange(len(x), device=x.device)[:, None], ids]  # copies rows, unlike gather


def standardise(patches):
    """Each patch to zero mean and unit variance: (B, M, P) -> (B, M, P)."""
    variance, mean = torch.var_mean(patches, dim=-1, correction=0, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def draw_masks(counts, masked, batch, generator=None):
    """Which tokens are visible, which masked: uniformly at random for each clip and modality.

    counts {m: N}, masked {m: M} -> visible {m: (B, V)}, masked {m: (B, M)}, on the CPU.
    """
    order = {m: torch.rand(batch, n, generator=generator).argsort(-1) for m, n in counts.items()}
    return (
        {m: o[:, masked[m] :] for m, o in order.items()},
        {m: o[:, : masked[m]] for m, o in order.items()})


class Embed(nn.Module):
    """Patches of one modality to tokens: a convolution whose stride is its kernel (Sec. 3.1)."""

    def __init__(self, modality, config):
        super().__init__()
        self.modality = modality
        self.patch, self.norm = config.patch[modality], config.norm[modality]
        numbers = math.prod(self.patch) * (3 if modality == "video" else 1)
        self.linear = nn.Linear(numbers, config.size.width)
        std = numbers**-0.5 / 0.87962566103423978  # a normal cut at 2 std has that std
        nn.init.trunc_normal_(self.linear.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(self.linear.bias)
        self.token = (
            nn.Parameter(torch.zeros(config.size.width)) if config.modality_tokens else None)

    def patchify(self, x):
        """Clips (B, ...) -> patches (B, N, P), as they are: bytes stay bytes."""
        return patchify(x, self.modality, self.patch)

    def normalise(self, patches):
        """Raw patches -> what the model sees and predicts: bytes to [-1, 1], then mean and std."""
        if patches.dtype == torch.uint8:
            patches = patches * (2 / 255) - 1
        mean, std = self.norm
        return patches if (mean, std) == (0, 1) else (patches - mean) / std

    def forward(self, patches, position):
        """Raw patches (B, V, P) and their positions (B, V, D) or (V, D) -> tokens (B, V, D)."""
        tokens = self.linear(self.normalise(patches)) + position
        return tokens if self.token is None else tokens + self.token


# ---------------------------------------------------------------------------------------------
# Transformer: pre-norm ViT blocks


class Attention(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.heads = size.heads
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.out = nn.Linear(size.width, size.width)
        bound = math.sqrt(3 / size.width)  # q, k and v are each a Xavier-uniform D x D matrix
        nn.init.uniform_(self.qkv.weight, -bound, bound)
        nn.init.xavier_uniform_(self.out.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "b n (qkv h d) -> qkv b h n d", qkv=3, h=self.heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out(rearrange(x, "b h n d -> b n (h d)"))


class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.norm1 = nn.LayerNorm(size.width, eps=NORM_EPS)
        self.attn = Attention(size)
        self.norm2 = nn.LayerNorm(size.width, eps=NORM_EPS)
        self.mlp = nn.Sequential(
            nn.Linear(size.width, size.mlp), nn.GELU(approximate="tanh"),
            nn.Linear(size.mlp, size.width))
        for layer in self.mlp[0], self.mlp[2]:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, x, keep=None):
        """x (B, N, D) -> same; keep (2, B, 1, 1) of 0 and 1, or None: the branches not dropped."""
        attended = self.attn(self.norm1(x))
        x = x + (attended if keep is None else attended * keep[0])
        mixed = self.mlp(self.norm2(x))
        return x + (mixed if keep is None else mixed * keep[1])


class Stack(nn.Module):
    """Blocks, then a LayerNorm."""

    def __init__(self, size, depth):
        super().__init__()
        self.blocks = nn.ModuleList(Block(size) for _ in range(depth))
        self.norm = nn.LayerNorm(size.width, eps=NORM_EPS)

    def forward(self, x, keep=None):
        """x (B, N, D) -> same; keep (depth, 2, B, 1, 1) or None."""
        for i, block in enumerate(self.blocks):
            x = block(x, None if keep is None else keep[i])
        return self.norm(x)


class Fusion(nn.Module):
    """Runs a plan of Fig. 2 over {m: (B, N_m, D)} and returns the same: encoder and decoder.

    A stage has one stack per modality if it is `separate`, else one for all.
    """

    def __init__(self, fusion, size, modalities, joint_layers=2):
        super().__init__()
        self.plan = PLANS[fusion](size.layers, joint_layers)
        self.stages = nn.ModuleList()
        for how, depth in self.plan:
            names = modalities if how == "separate" else ["all"]
            self.stages.append(nn.ModuleDict({name: Stack(size, depth) for name in names}))

    def forward(self, tokens, keep=None):
        """tokens {m: (B, N_m, D)} -> same; keep {m: (L, 2, B, 1, 1)} or None."""
        start = 0
        for (how, depth), stage in zip(self.plan, self.stages):
            part = {m: None if keep is None else keep[m][start : start + depth] for m in tokens}
            start += depth
            if how == "joint":
                together, lengths = pack(list(tokens.values()), "b * d")
                together = stage["all"](together, next(iter(part.values())))
                tokens = dict(zip(tokens, unpack(together, lengths, "b * d")))
            else:
                tokens = {
                    m: stage[m if how == "separate" else "all"](x, part[m])
                    for m, x in tokens.items()}
        return tokens

    def stacks(self, modality):
        """The stacks that a modality's tokens go through, first to last."""
        return [
            stage[modality if how == "separate" else "all"]
            for (how, _), stage in zip(self.plan, self.stages)]

    def path(self, modality):
        """The blocks that a modality's tokens go through, first to last."""
        return [block for stack in self.stacks(modality) for block in stack.blocks]


# ---------------------------------------------------------------------------------------------
# The audiovisual masked autoencoder (Sec. 3)


class Output(NamedTuple):
    """What AVMAE returns. Keys of the dicts: "video" if decoded from its own visible tokens,
    "video_from_audio" if inpainted, likewise for audio."""

    loss: torch.Tensor  # half the sum of `losses`
    losses: dict  # {key: Eq. 1}
    predictions: dict  # {key: (B, M, P)}, of normalised (if asked, standardised) patches
    places: dict  # {key: (B, M)}: which tokens were predicted
    masks: tuple  # visible {m: (B, V)}, masked {m: (B, M)}: what the encoder saw and did not see


class AVMAE(nn.Module):
    """Encodes the visible tokens of audio and video, decodes the masked ones (Fig. 1, Sec. 3)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        targets = [m for m in MODALITIES if any(m in p for p in config.passes)]
        contexts = [m for m in MODALITIES if any(m in p.values() for p in config.passes)]
        width, decoder_width = config.size.width, config.decoder_size.width
        self.embed = nn.ModuleDict({m: Embed(m, config) for m in config.modalities})
        self.encoder = Fusion(config.encoder, config.size, config.modalities, config.joint_layers)
        self.project = nn.ModuleDict({m: nn.Linear(width, decoder_width) for m in contexts})
        self.mask_token = nn.ParameterDict({m: torch.zeros(decoder_width) for m in targets})
        self.decoder = Fusion(config.decoder, config.decoder_size, targets, config.joint_layers)
        self.head = nn.ModuleDict(
            {m: nn.Linear(decoder_width, self.embed[m].linear.in_features) for m in targets})
        for layer in self.project.values():
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in self.head.values():
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        if config.modality_tokens:
            self.decoder_token = nn.ParameterDict({m: torch.zeros(decoder_width) for m in targets})

    def draw_masks(self, batch, generator=None):
        """Masks for clips of the configured shape, see the function of that name."""
        c = self.config
        return draw_masks(
            {m: c.tokens(m) for m in c.modalities}, {m: c.masked(m) for m in c.modalities}, batch,
            generator)

    def forward(self, inputs, masks=None):
        """inputs {video: (B, T, H, W, 3) uint8 or in [-1, 1], audio: (B, T, F)} -> Output.

        masks: (visible, masked) as `draw_masks` makes them; drawn if not given.
        """
        patches = {m: self.embed[m].patchify(inputs[m]) for m in self.embed}  # {m: (B, N, P)}
        if masks is None:
            masks = self.draw_masks(len(next(iter(patches.values()))))
        visible, masked = (
            {m: ids.to(patches[m].device) for m, ids in part.items()} for part in masks)
        latent = self.encode(patches, visible)  # {m: (B, V, D)}
        losses, predictions, places = {}, {}, {}
        for contexts in self.config.passes:
            where = {t: self.places(t, c, visible, masked) for t, c in contexts.items()}
            decoded = self.decode(
                latent, contexts, where, {m: p.shape[1] for m, p in patches.items()})
            for target, context in contexts.items():
                key = target if target == context else f"{target}_from_{context}"
                places[key] = where[target][1]
                predictions[key] = self.head[target](decoded[target])  # (B, M, P)
                goal = self.target(target, take(patches[target], places[key]))
                losses[key] = (predictions[key].to(goal) - goal).square().mean()  # Eq. 1
        return Output(0.5 * sum(losses.values()), losses, predictions, places, (visible, masked))

    def encode(self, patches, visible=None):
        """patches {m: (B, N, P)}, visible {m: (B, V)} or None for all -> latent {m: (B, V, D)}."""
        tokens = {}
        for m, x in patches.items():
            position = sinusoid(x.shape[1], self.config.size.width, x.device)
            if visible is not None:
                x, position = take(x, visible[m]), position[visible[m]]
            tokens[m] = self.embed[m](x, position)
        return self.encoder(tokens)

    def places(self, target, context, visible, masked):
        """Positions of the context tokens (B, V) and of the tokens to predict (B, M).

        Tokens of the target itself go where they belong. Another modality's tokens have no place
        in it: they take the first V positions, and the rest is predicted (Fig. 3).
        """
        if target == context:
            return visible[target], masked[target]
        batch, count = visible[context].shape
        length = visible[target].shape[1] + masked[target].shape[1]
        order = torch.arange(length, device=visible[context].device).expand(batch, length)
        return order[:, :count], order[:, count:]

    def decode(self, latent, contexts, where, counts):
        """latent {m: (B, V, D)} -> decoded tokens {target: (B, M, D')} at the places to predict."""
        tokens = {}
        for target, context in contexts.items():
            given, asked = where[target]
            position = sinusoid(counts[target], self.config.decoder_size.width, given.device)
            context_tokens = self.project[context](latent[context]) + position[given]
            mask_tokens = self.mask_token[target] + position[asked]
            tokens[target] = torch.cat([context_tokens, mask_tokens], dim=1)
            if self.config.modality_tokens:
                tokens[target] = tokens[target] + self.decoder_token[target]
        decoded = self.decoder(tokens)
        return {t: x[:, where[t][0].shape[1] :] for t, x in decoded.items()}

    def target(self, modality, patches):
        """Raw patches (B, M, P) -> what is to be predicted."""
        goal = self.embed[modality].normalise(patches)
        return standardise(goal) if self.config.standardise else goal

    def features(self, inputs, pool=True):
        """Features of unmasked clips, for each modality of the inputs: {m: (B, D)}, or its tokens
        {m: (B, N, D)} without pooling."""
        given = [m for m in self.embed if m in inputs]
        latent = self.encode({m: self.embed[m].patchify(inputs[m]) for m in given})
        return {m: x.mean(1) for m, x in latent.items()} if pool else latent


# ---------------------------------------------------------------------------------------------
# Finetuning: MBT and classification (Sec. 4.1)


class MBT(nn.Module):
    """Multimodal bottleneck transformer: one stack per modality; from `fusion_layer` on, modalities
    exchange what they know through a few bottleneck tokens z. With one modality it is a plain ViT.

        [x_m^(l+1) ; z_m^(l+1)] = Block_m^l([x_m^l ; z^l]),    z^(l+1) = mean over m of z_m^(l+1)
    """

    def __init__(self, size, modalities, fusion_layer, bottlenecks=4):
        super().__init__()
        self.blocks = nn.ModuleDict(
            {m: nn.ModuleList(Block(size) for _ in range(size.layers)) for m in modalities})
        self.norm = nn.LayerNorm(size.width, eps=NORM_EPS)
        self.fusion_layer = fusion_layer if len(modalities) > 1 else size.layers
        if self.fusion_layer < size.layers:
            self.bottleneck = nn.Parameter(0.02 * torch.randn(bottlenecks, size.width))

    def forward(self, tokens, keep=None):
        """tokens {m: (B, N_m, D)} -> same; keep {m: (L, 2, B, 1, 1)} or None."""
        x, z = tokens, None
        for i, blocks in enumerate(zip(*self.blocks.values())):
            blocks = dict(zip(self.blocks, blocks))
            kept = {m: None if keep is None else keep[m][i] for m in x}
            if i < self.fusion_layer:
                x = {m: blocks[m](x[m], kept[m]) for m in x}
                continue
            if z is None:
                z = self.bottleneck.expand(len(next(iter(x.values()))), -1, -1)
            both = {m: blocks[m](torch.cat([x[m], z], dim=1), kept[m]) for m in x}
            x = {m: out[:, : -z.shape[1]] for m, out in both.items()}
            z = torch.stack([out[:, -z.shape[1] :] for out in both.values()]).mean(0)
        return {m: self.norm(x[m]) for m in x}

    def path(self, modality):
        """The blocks that a modality's tokens go through, first to last."""
        return list(self.blocks[modality])


def draw_keep(rate, layers, modalities, batch, generator=None):
    """Stochastic depth: block i of L is dropped with probability rate * i / (L - 1), per clip,
    branch and modality. -> {m: (L, 2, B, 1, 1)} of 0 and 1; kept branches are not rescaled."""
    drop = (rate * torch.arange(layers) / max(layers - 1, 1)).view(-1, 1, 1, 1, 1)
    chance = {m: torch.rand(layers, 2, batch, 1, 1, generator=generator) for m in modalities}
    return {m: (x >= drop).float() for m, x in chance.items()}


class Classifier(nn.Module):
    """Patch embeddings, a trunk (MBT, or a pretraining encoder: Table 14), mean pooling, and one
    linear classifier that all modalities share."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.ModuleDict({m: Embed(m, config) for m in config.modalities})
        if config.trunk == "mbt":
            self.trunk = MBT(
                config.size, config.modalities, config.fusion_layer, config.bottlenecks)
        else:
            self.trunk = Fusion(config.trunk, config.size, config.modalities, config.joint_layers)
        self.head = nn.Linear(config.size.width, sum(config.classes))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, inputs, keep=None):
        """inputs as for AVMAE, keep as `draw_keep` makes it -> logits {m: (B, C)}, or of each
        segment {m: (B, segments, C)}.

        At test time the logits are the mean over modalities; in training each has its own loss.
        """
        return {m: self.head(x) for m, x in self.features(inputs, keep=keep).items()}

    def features(self, inputs, pool=True, keep=None):
        """{m: (B, D)} for each modality of the inputs ((B, segments, D) if the model has segments),
        or its tokens {m: (B, N, D)} without pooling."""
        tokens = {}
        for m in (m for m in self.embed if m in inputs):
            patches = self.embed[m].patchify(inputs[m])
            position = sinusoid(patches.shape[1], self.config.size.width, patches.device)
            tokens[m] = self.embed[m](patches, position)
        tokens = self.trunk(tokens, keep)
        return (
            {m: self.pool(m, x, inputs[m].shape[1]) for m, x in tokens.items()} if pool else tokens)

    def pool(self, modality, x, frames):
        """Mean over tokens, (B, N, D) -> (B, D); with segments, over the tokens whose centre in
        time lies in a segment, -> (B, segments, D)."""
        if self.config.segments == 1:
            return x.mean(1)
        patch = self.config.patch[modality][0]
        x = x.unflatten(1, (frames // patch, -1)).mean(2)  # (B, t, D)
        centre = (torch.arange(x.shape[1], device=x.device) + 0.5) * patch / frames
        segment = F.one_hot((centre * self.config.segments).long(), self.config.segments).to(x)
        return segment.T @ x / segment.sum(0)[:, None]


# ---------------------------------------------------------------------------------------------
# From pretraining to finetuning


def transfer(source, target, streams=None):
    """Initialise a Classifier from an AVMAE (Sec. 4.1, Table 3), in place.

    streams: the modalities of `target` to initialise, all if None. A modality that the source does
    not have takes the blocks of the one it has, and its own patch embedding stays fresh.
    Returns two lists to print: what was taken, which parameters stayed fresh. Sizes that differ
    are a ValueError.
    """
    for name in "size", "patch":
        ours, theirs = (getattr(model.config, name) for model in (target, source))
        if ours != theirs:
            raise ValueError(
                f"the pretrained model has {name} {theirs}, this one {ours}: they must be equal")
    taken, touched = [], set()

    def copy(pairs, what):
        for a, b in pairs:
            b.load_state_dict(a.state_dict())
            touched.update(map(id, b.parameters()))
        taken.append(what)

    encoder, trunk = source.encoder, target.trunk
    for m in streams or target.config.modalities:
        _known(m, target.config.modalities, "stream")
        origin = m if m in source.config.modalities else source.config.modalities[0]
        if origin == m:
            copy([(source.embed[m].linear, target.embed[m].linear)], f"{m} patch embedding")
        blocks = list(zip(encoder.path(origin), trunk.path(m), strict=True))
        copy(blocks, f"{len(blocks)} {m} blocks from {origin}")
        if target.config.trunk != "mbt":
            norms = zip(encoder.stacks(origin), trunk.stacks(m), strict=True)
            copy([(a.norm, b.norm) for a, b in norms], f"{m} norms")
        elif encoder.plan[-1][0] != "separate":  # two norms cannot become MBT's one
            copy([(encoder.stacks(origin)[-1].norm, trunk.norm)], "final norm")
    return taken, [name for name, p in target.named_parameters() if id(p) not in touched]


# ---------------------------------------------------------------------------------------------
# Checkpoints: {"config": plain dict, "model": state_dict, ...}


def describe(config):
    """A config as a dict of plain lists, numbers and strings."""
    return {"kind": type(config).__name__, **json.loads(json.dumps(asdict(config)))}


def configure(described):
    """The inverse of `describe`."""

    def frozen(x):
        if isinstance(x, dict):
            return {k: frozen(v) for k, v in x.items()}
        return tuple(map(frozen, x)) if isinstance(x, list) else x

    values = frozen(described)
    kind = {"PretrainConfig": PretrainConfig, "ClassifierConfig": ClassifierConfig}[
        values.pop("kind")]
    sizes = {k: Size(*v) for k, v in values.items() if k in ("size", "decoder_size")}
    return kind(**{**values, **sizes})


def build(config):
    """The model of a config."""
    return (AVMAE if isinstance(config, PretrainConfig) else Classifier)(config)


def save(model, path, **extra):
    """Weights and settings in one file that `load` takes; safetensors by that suffix.

    Written beside `path` and moved there: it is whole or not there at all. OSError on a full disk.
    """
    config, state = describe(model.config), model.state_dict()
    partial = pathlib.Path(f"{path}.partial")
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import save_file

            save_file(state, partial, {"config": json.dumps(config), "extra": json.dumps(extra)})
        else:
            torch.save({"config": config, "model": state, **extra}, partial)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise OSError(
            f"could not save {path}: {str(error).splitlines()[0]}. What was saved before is still "
            "there") from None
    os.replace(partial, path)


def load(path, **assume):
    """The model of a checkpoint in eval mode: ours, the authors' (Flax), or a ViT in timm's names.
    Its `notes` say what was assumed, changed or left out of a foreign file.

    assume: what a foreign file cannot tell, see `from_official`. ValueError if it is none of these.
    """
    checkpoint = read(path, **assume)
    model = build(configure(checkpoint["config"]))
    missing, unexpected = model.load_state_dict(checkpoint["model"], strict=False)
    missing = [name for name in missing if not name.startswith(tuple(checkpoint.get("fresh", ())))]
    if missing or unexpected:
        raise ValueError(
            f"{path} does not fit its own settings: missing {missing[:3]}, "
            f"unexpected {unexpected[:3]}")
    model.notes = checkpoint.get("notes", [])
    return model.eval()


def read(path, **assume):
    """A checkpoint file as a dict {"config", "model", ...}; never runs code from it."""
    try:
        with open(path, "rb") as file:
            start = file.read(9)
        if str(path).endswith(".safetensors"):
            return _read_safetensors(path)
        if start[:2] != b"PK":
            return from_official(_read_flax(path), **assume)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} is not a checkpoint that can be read safely: "
            f"{str(error).strip().splitlines()[0]}") from None
    if isinstance(checkpoint, dict) and "config" in checkpoint:
        return checkpoint
    return from_vit(checkpoint)


def _read_safetensors(path):
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            state, about = {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    if "config" not in about:
        return from_vit(state)
    return {
        "config": json.loads(about["config"]), "model": state,
        **json.loads(about.get("extra", "{}"))}


# ---------------------------------------------------------------------------------------------
# Other people's weights. A table of names per source; shapes tell the sizes.

OFFICIAL_NAMES = [  # of the authors' release (scenic), applied in order to "a/b/c"; rgb = video
    (r"_(spectrogram|spec)(?=/|$)", "_audio"),
    (r"_rgb(?=/|$)", "_video"),
    (r"^embedding/", "embed.video.linear/"),
    (r"^embedding_(\w+)/", r"embed.\1.linear/"),
    (r"^Encoder_modality_token_", "embed.TOKEN."),
    (r"^Decoder_modality_token_", "decoder_token."),
    (r"^(decoder_projection|mask_token|output_projection)_", r"\1."),
    (r"^decoder_projection", "project"),
    (r"^(ProjectionHeadAndClassifier_0/)?output_projection", "head"),
    (r"^bottleneck$", "trunk.bottleneck"),
    (r"^Transformer_concat/", "encoder.stages.1.all/"),
    (r"^Decoder_concat/", "decoder.stages.1.all/"),
    (r"^Transformer_(\w+?)/", r"encoder.stages.0.\1/"),
    (r"^Decoder_(\w+?)/", r"decoder.stages.0.\1/"),
    (r"^Transformer/", "encoder.stages.0.all/"),
    (r"^Decoder/", "decoder.stages.0.all/"),
    (r"encoderblock_", "blocks."),
    (r"encoder_norm", "norm"),
    (r"LayerNorm_0", "norm1"),
    (r"LayerNorm_1", "norm2"),
    (r"MlpBlock_0/Dense_0", "mlp.0"),
    (r"MlpBlock_0/Dense_1", "mlp.2"),
    (r"MultiHeadDotProductAttention_0/out", "attn.out"),
    (r"MultiHeadDotProductAttention_0/(query|key|value)", "attn.qkv"),
    (r"(kernel|scale)$", "weight"),
    (r"embed\.TOKEN\.(\w+)", r"embed.\1.token"),
    (r"/", "."),
]
MBT_NAMES = [  # the same stacks as MBT's
    (r"^encoder\.stages\.0\.all\.blocks\.(\d+)_audio", r"trunk.blocks.audio.\1"),
    (r"^encoder\.stages\.0\.all\.blocks\.(\d+)", r"trunk.blocks.FIRST.\1"),
    (r"^encoder\.stages\.0\.all\.norm", "trunk.norm"),
]


def official_name(path, first=None):
    """An official parameter's name in our model, and which of q, k, v (0, 1, 2) it is, or None.

    first: for a finetuned model (MBT), the modality of the blocks that name none.
    """
    name = path
    for pattern, ours in OFFICIAL_NAMES + (MBT_NAMES if first else []):
        name = re.sub(pattern, ours, name)
    part = re.search(r"/(query|key|value)/", path)
    return name.replace("FIRST", first or ""), part and ("query", "key", "value").index(part[1])


def official_tensor(path, array):
    """An official array as our weight: kernels are (..., in, out) there, (out, in) here."""
    if path.startswith("embedding") and array.ndim == 4:  # equal channels in: one channel, summed
        array = array.sum(2, keepdim=True)
    if not path.endswith("kernel"):
        return array.flatten() if path != "bottleneck" else array[0]
    inputs = 1 if re.search("/(query|key|value)/", path) else array.ndim - 1
    return array.flatten(inputs).flatten(0, inputs - 1).T.contiguous()


def from_official(params, encoder=None, decoder="shared", objective="joint", fusion_layer=None):
    """The authors' parameters {path: tensor} -> a checkpoint dict.

    The arguments are what parameters cannot tell: whether a single encoder was early or shared, a
    single decoder early or shared, the objective, and the first fused layer of MBT (if None: 18 for
    527 classes in 24 layers, else 2/3 of the depth).
    """
    finetuned = "ProjectionHeadAndClassifier_0/output_projection/bias" in params
    first = (
        ("video" if any(re.match("embedding(_rgb)?/", p) for p in params) else "audio")
        if finetuned
        else None)
    state, parts = {}, {}
    for path, array in params.items():
        name, slot = official_name(path, first)
        if slot is None:
            state[name] = official_tensor(path, array)
        else:
            parts.setdefault(name, {})[slot] = official_tensor(path, array)
    try:
        state.update({name: torch.cat([p[0], p[1], p[2]]) for name, p in parts.items()})
        config, notes = _official_config(
            params, state, finetuned, fusion_layer, encoder, decoder, objective)
        with torch.device("meta"):
            wanted = build(config).state_dict()
    except (KeyError, IndexError, StopIteration, RuntimeError) as error:
        raise ValueError(
            f"these are not the parameters of a released AV-MAE or MBT: {error!r}") from None
    unused = sorted(set(state) - set(wanted))
    if unused:
        notes.append(f"left out, unused by this model: {', '.join(unused)}")
    return {
        "config": describe(config), "notes": notes,
        "model": {k: v for k, v in state.items() if k in wanted}}


def _official_size(params, prefix):
    """Size of the official "Transformer" or "Decoder", its joint layers, names of its stacks."""
    blocks = [p for p in params if p.startswith(prefix)]
    query = next(params[p] for p in blocks if p.endswith("query/kernel"))
    mlp = next(params[p] for p in blocks if p.endswith("Dense_0/bias"))
    stacks = {}  # {stack: its blocks}; a modality goes through its own stack, then the joint one
    for found in (re.match(r"(\w+)/encoderblock_(\d+)(_spec)?/", p) for p in blocks):
        if found:
            stacks.setdefault(found[1] + (found[3] or ""), set()).add(found[2])
    joint = len(stacks.pop(f"{prefix}_concat", ()))
    layers = max(map(len, stacks.values())) + joint
    return Size(query.shape[0], layers, query.shape[1], len(mlp)), joint, set(stacks)


def _official_config(params, state, finetuned, fusion_layer, *strategies):
    """The config that official parameters tell, and notes on what was assumed."""
    size, joint, stacks = _official_size(params, "Transformer")
    kernels = {
        ("video" if a.ndim == 5 else "audio"): tuple(a.shape[:-2])
        for p, a in params.items()
        if p.startswith("embedding") and p.endswith("kernel")}
    common = {
        "modalities": tuple(m for m in MODALITIES if f"embed.{m}.linear.weight" in state),
        "size": size, "patch": {**Inputs().patch, **kernels},
        "modality_tokens": any(".token" in name for name in state)}
    if finetuned:
        return _official_classifier(common, len(state["head.bias"]), fusion_layer)
    return _official_pretraining(common, params, joint, stacks, *strategies)


def _official_classifier(common, classes, fusion_layer):
    layers, norm, notes = common["size"].layers, dict(Inputs().norm), []
    if fusion_layer is None:
        fusion_layer = 18 if (classes, layers) == (527, 24) else layers * 2 // 3
    if len(common["modalities"]) == 2:
        notes.append(f"assumed: fusion layer {fusion_layer} of {layers}")
    if classes == 527:
        norm["audio"] = (1.102, 2.762)
        notes.append("527 classes: spectrograms are normalised by mean 1.102, std 2.762")
    heads = (97, 300) if classes == 397 else (classes,)
    return ClassifierConfig(**common, fusion_layer=fusion_layer, norm=norm, classes=heads), notes


def _official_pretraining(common, params, joint, stacks, encoder, decoder, objective):
    if joint or "Transformer" not in stacks:
        encoder = "mid" if joint else "separate"
    elif encoder not in ("early", "shared"):
        raise ValueError(
            "one encoder for both modalities is early or shared, which its parameters "
            "don't tell: say encoder='early' or encoder='shared'")
    decoder_size, _, stacks = _official_size(params, "Decoder")
    note = f"assumed: objective {objective}"
    if "Decoder" in stacks:
        note += f", decoder {decoder}"
    else:
        decoder = "separate"
    config = PretrainConfig(
        **common, decoder_size=decoder_size, encoder=encoder, decoder=decoder,
        objective=objective, joint_layers=joint or 2, allow_uncoupled=True)
    return config, [note]


def _read_flax(path):
    """A Flax msgpack file -> {"a/b/c": tensor} of its parameters (old and new layout)."""
    import msgpack

    def array(code, data):
        if code not in (1, 3):
            raise ValueError(f"unknown data of type {code}")
        shape, kind, numbers = msgpack.unpackb(data)
        if kind not in ("float32", "float16", "bfloat16", "int32", "int64", "uint32", "bool"):
            raise ValueError(f"unknown number type {kind!r}")
        return torch.frombuffer(bytearray(numbers), dtype=getattr(torch, kind)).reshape(shape)

    def flat(tree, prefix=""):
        for key, value in tree.items():
            yield from (
                flat(value, f"{prefix}{key}/")
                if isinstance(value, dict)
                else [(f"{prefix}{key}", value)])

    try:
        with open(path, "rb") as file:
            tree = msgpack.unpackb(file.read(), ext_hook=array, strict_map_key=False)
        for key in "optimizer", "target", "params":
            tree = tree.get(key, tree)
        return {
            name: value.float() for name, value in flat(tree) if isinstance(value, torch.Tensor)}
    except (ValueError, TypeError, AttributeError, RuntimeError, msgpack.UnpackException) as error:
        raise ValueError(
            f"{path} is neither a checkpoint of ours nor an intact Flax checkpoint "
            f"({type(error).__name__}: {error})") from None


VIT_NAMES = [  # timm's, which DeiT, MAE and VideoMAE share
    (r"^(module|model|encoder|backbone)\.", ""),
    (r"^blocks\.", "encoder.stages.0.all.blocks."),
    (r"^(fc_)?norm\.", "encoder.stages.0.all.norm."),
    (r"\.attn\.proj\.", ".attn.out."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.2."),
]


def from_vit(state):
    """A ViT in timm's names -> a checkpoint dict of a shared encoder (Tables 6, 9).

    The patch embedding of an image goes to the central frame of the tubelet, its channel sum to
    audio. Class token, positions, heads and decoders are left. ValueError if it is no ViT.
    """
    for key in "model", "state_dict", "module":
        state = state.get(key, state) if isinstance(state, dict) else {}
    ours, left = {}, []
    for name, value in state.items():
        for pattern, replacement in VIT_NAMES:
            name = re.sub(pattern, replacement, name)
        keep = name.startswith("encoder.stages") or re.match(r"patch_embed\.proj\.", name)
        ours[name] = value if keep else left.append(name)
    ours = {name: value for name, value in ours.items() if value is not None}
    if "patch_embed.proj.weight" not in ours:
        raise ValueError(
            "neither a checkpoint of ours nor a ViT in timm's names (no patch_embed.proj.weight)")
    for name in [n for n in ours if n.endswith(".q_bias")]:  # VideoMAE: the key has no bias
        q, v = ours.pop(name), ours.pop(name.replace(".q_bias", ".v_bias"))
        ours[name.replace("q_bias", "qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])
    kernel, bias = ours.pop("patch_embed.proj.weight"), ours.pop("patch_embed.proj.bias")
    size, patch, embeds = _vit_embeddings(ours, kernel)
    for m, weight in embeds.items():
        ours |= {f"embed.{m}.linear.weight": weight, f"embed.{m}.linear.bias": bias}
    config = PretrainConfig(modalities=tuple(embeds), size=size, patch=patch, encoder="shared")
    notes = [
        f"a ViT of {size}: patch embedding {tuple(kernel.shape)} for {' and '.join(embeds)}",
        f"left: {', '.join(left) or 'nothing'}",
        "note: these weights may have been trained with the erf GELU and another LayerNorm epsilon"]
    return {
        "config": describe(config), "model": ours, "notes": notes,
        "fresh": ["decoder.", "project.", "mask_token.", "head."]}


def _vit_embeddings(state, kernel):
    """kernel (D, channels, [t,] h, w) -> size, patch sizes, {m: (D, P)}."""
    width, channels, *patch = kernel.shape
    layers = 1 + max(int(re.search(r"blocks\.(\d+)", n)[1]) for n in state if "blocks" in n)
    known = [s.heads for s, _ in SIZES.values() if s.width == width]  # parameters don't tell heads
    mlp = len(state["encoder.stages.0.all.blocks.0.mlp.0.bias"])
    size = Size(width, layers, known[0] if known else max(1, width // 64), mlp)
    if kernel.ndim == 4:  # an image: at the central frame of the tubelet
        frames = torch.zeros(width, channels, 2, *patch)
        frames[:, :, 1] = kernel
        kernel = frames
    embeds = {
        "video": rearrange(kernel, "d c t h w -> d (t h w c)"),
        "audio": rearrange(kernel.sum((1, 2)), "d h w -> d (h w)")}
    if channels == 1:
        del embeds["video"]
    return size, {"video": tuple(kernel.shape[2:]), "audio": tuple(patch[-2:])}, embeds
