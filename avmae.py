"""Audiovisual Masked Autoencoders (ICCV 2023): every model of the paper in one file.

    inputs {video: (B, T, H, W, 3), audio: (B, T, F)}        clips and log-mel spectrograms
       -> patches {m: (B, N, P)} -> tokens {m: (B, V, D)}    a dict by modality all the way
       -> encoder -> decoder -> loss                         AVMAE, Fig. 1
       -> MBT, or the encoder -> logits                      Classifier, Sec. 4.1

Two tables hold the paper's variants: `PLANS` (Fig. 2: how audio and video are fused) and `CONTEXT`
(Sec. 3.4: what is reconstructed from what). One class, `Fusion`, runs any plan: it is the encoder
and the decoder. Needs torch and einops only: copy this file and it works.

Letters: B clips, N tokens of a modality, V visible and M masked ones (V + M = N), P numbers in a
patch, D width (D' of the decoder), L layers, S joint layers; m a modality. The decoder predicts
Q tokens: the M masked ones, but for inpainting (see CONTEXT).
"""

import json
import math
import os
import pathlib
import re
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import pack, rearrange, unpack
from torch import nn

NORM_EPS = 1e-6  # Flax's default, with which the authors' released weights were trained


class UserError(ValueError):
    """A mistake of the user's, told in one sentence that says what to do."""


def require(condition, sentence):
    """UserError with this sentence unless the condition holds."""
    if not condition:
        raise UserError(sentence)


# ---------------------------------------------------------------------------------------------
# Modalities: clips to patches (Sec. 3.1)


@dataclass(frozen=True)
class Modality:
    """A kind of input: how its clips are cut into patches, and how many of these are masked."""

    pattern: str  # einops: clips to patches; `t` counts patches, `dt` what is in one
    axes: tuple  # the letters of the axes that are cut
    shape: tuple  # of a clip along these axes
    patch: tuple  # of a patch along these axes
    mask_ratio: float
    channels: int = 1
    drop_last: bool = False  # whether frames at the end that fill no patch are dropped, or an error
    mean: float = 0.0  # inputs are normalized by these two; the paper's are not
    std: float = 1.0

    def like(self, x):
        """The same for clips x (B, T, ...) of another shape."""
        return replace(self, shape=tuple(x.shape[1 : 1 + len(self.axes)]))

    @property
    def grid(self):
        """Patches along each axis. UserError if they don't fit, but for `drop_last`."""
        used = list(self.shape)
        if self.drop_last:
            used[0] -= used[0] % self.patch[0]

        require(
            all(s and s % p == 0 for s, p in zip(used, self.patch, strict=True)),
            f"a clip of {'x'.join(map(str, self.shape))} ({', '.join(self.axes)}) is not divided "
            f"by patches of {'x'.join(map(str, self.patch))}")
        return [s // p for s, p in zip(used, self.patch)]

    @property
    def tokens(self):
        """N, the tokens of a clip."""
        return math.prod(self.grid)

    @property
    def masked(self):
        """M, how many of them are masked in pretraining."""
        return int(self.mask_ratio * self.tokens)

    @property
    def patch_dim(self):
        """P, the numbers in a patch."""
        return math.prod(self.patch) * self.channels

    @property
    def lengths(self):
        """What the letters of the pattern stand for: {"t": 8, "dt": 2, ...}."""
        in_patch = {f"d{axis}": size for axis, size in zip(self.axes, self.patch)}
        return dict(zip(self.axes, self.grid)) | in_patch

    def patchify(self, x):
        """Clips (B, T, ...) -> patches (B, N, P), as they are: bytes stay bytes."""
        lengths = self.like(x).lengths
        return rearrange(x[:, : lengths["t"] * lengths["dt"]], self.pattern, **lengths)

    def unpatchify(self, patches):
        """The inverse, for clips of `shape` less what is dropped: (B, N, P) -> (B, T, ...)."""
        clips, cut = self.pattern.split(" -> ")
        return rearrange(patches, f"{cut} -> {clips}", **self.lengths)

    def normalize(self, patches):
        """Raw patches -> what the model sees and predicts: bytes to [-1, 1], then mean and std."""
        if patches.dtype == torch.uint8:
            patches = patches * (2 / 255) - 1

        return patches if (self.mean, self.std) == (0, 1) else (patches - self.mean) / self.std


VIDEO = Modality(  # 16 RGB frames, tubelets of 2x16x16: 8x14x14 = 1568 tokens of 1536 numbers
    "b (t dt) (h dh) (w dw) c -> b (t h w) (dt dh dw c)", ("t", "h", "w"), shape=(16, 224, 224),
    patch=(2, 16, 16), mask_ratio=0.9, channels=3)

AUDIO = Modality(  # 8 s of 100 frames each, 128 mel bins: 50x8 = 400 tokens of 256 numbers
    "b (t dt) (f df) -> b (t f) (dt df)", ("t", "f"), shape=(800, 128), patch=(16, 16),
    mask_ratio=0.5, drop_last=True)  # AudioSet's 10 s end in 8 frames too many

MODALITIES = {"video": VIDEO, "audio": AUDIO}  # tokens are concatenated in this order


def sinusoid(length, width):
    """Fixed positions (N, D) of the flattened grid, as released: pos[p, 2i] = sin(p w_i),
    pos[p, 2i+1] = cos(p w_i), w_i = 10000^(-2i/D). A table for many tokens serves for fewer."""
    frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency  # (N, D / 2)

    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).float()


class Positions(nn.Module):
    """A table of positions, made once for clips of the usual length, and anew for a longer one."""

    def __init__(self, length, width):
        super().__init__()
        self.register_buffer("table", sinusoid(length, width), persistent=False)

    def forward(self, length):
        """-> (N, D)"""
        if length > len(self.table):
            self.table = sinusoid(length, self.table.shape[1]).to(self.table)
        return self.table[:length]


def take(x, ids):
    """Rows of each clip: (B, N, P), (B, V) -> (B, V, P)."""
    first = x.shape[1] * torch.arange(len(x), device=x.device)[:, None]  # where each clip begins
    return x.flatten(0, 1)[ids + first]  # copies whole rows, unlike gather


def put(x, ids, rows):
    """x (B, N, P) with `rows` (B, V, P) at ids (B, V)."""
    return x.scatter(1, ids[..., None].expand_as(rows), rows)


def patch_stats(patches):
    """Mean and standard deviation of each patch: (B, M, P) -> twice (B, M, 1)."""
    variance, mean = torch.var_mean(patches, dim=-1, correction=0, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


# ---------------------------------------------------------------------------------------------
# Transformer: pre-norm ViT blocks, whose parameters have timm's names


@dataclass(frozen=True)
class Size:
    """Sizes of a transformer."""

    width: int  # D
    depth: int  # L
    num_heads: int
    mlp_dim: int


SIZES = {  # name: (encoder, its decoder); the paper's are base and large (Sec. 4.1, Table 21)
    "tiny": (Size(192, 12, 3, 768), Size(96, 4, 3, 384)),
    "small": (Size(384, 12, 6, 1536), Size(192, 4, 3, 768)),
    "base": (Size(768, 12, 12, 3072), Size(384, 4, 6, 1536)),
    "large": (Size(1024, 24, 16, 4096), Size(512, 4, 8, 2048)),
    "huge": (Size(1280, 32, 16, 5120), Size(512, 4, 8, 2048)),
}


def linear(in_features, out_features, init=nn.init.xavier_uniform_):
    """A linear layer; its bias starts at 0."""
    layer = nn.Linear(in_features, out_features)
    init(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class PatchEmbed(nn.Module):
    """Patches of a modality to tokens, with their positions added (Sec. 3.1)."""

    def __init__(self, modality, width, modality_embed=False):
        super().__init__()
        self.modality = modality

        # The same as a convolution whose stride is its kernel: each patch is projected on its own.
        self.proj = nn.Linear(modality.patch_dim, width)
        std = modality.patch_dim**-0.5 / 0.8796  # LeCun's; cut at 2, a normal's std is 0.8796
        nn.init.trunc_normal_(self.proj.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(self.proj.bias)

        self.pos_embed = Positions(modality.tokens, width)
        self.modality_embed = nn.Parameter(torch.zeros(width)) if modality_embed else None

    def forward(self, patches, ids=None):
        """Raw patches (B, N, P) -> tokens (B, N, D); only those of ids (B, V) if given."""
        pos = self.pos_embed(patches.shape[1])  # (N, D)
        if ids is not None:
            patches, pos = take(patches, ids), pos[ids]  # (B, V, P), (B, V, D)

        tokens = self.proj(self.modality.normalize(patches)) + pos
        return tokens if self.modality_embed is None else tokens + self.modality_embed


class Attention(nn.Module):
    def __init__(self, size):
        super().__init__()
        require(
            size.width % size.num_heads == 0,
            f"{size.num_heads} heads don't divide a width of {size.width}")
        self.num_heads = size.num_heads

        self.qkv = nn.Linear(size.width, 3 * size.width)
        bound = math.sqrt(3 / size.width)  # q, k and v are each a Xavier-uniform D x D matrix
        nn.init.uniform_(self.qkv.weight, -bound, bound)
        nn.init.zeros_(self.qkv.bias)

        self.proj = linear(size.width, size.width)

    def forward(self, x):
        q, k, v = (
            rearrange(part, "b n (h d) -> b h n d", h=self.num_heads)
            for part in self.qkv(x).chunk(3, dim=-1))
        x = F.scaled_dot_product_attention(q, k, v)

        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class Mlp(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.fc1 = linear(size.width, size.mlp_dim)
        self.fc2 = linear(size.mlp_dim, size.width)

        for layer in self.fc1, self.fc2:
            nn.init.normal_(layer.bias, std=1e-6)  # as released

    def forward(self, x):
        # Flax's GELU: with the erf GELU, predictions of the released weights differ by 2.5e-4.
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class DropPath(nn.Module):
    """Stochastic depth: in training a clip skips the branch with probability `rate`.

    What is kept is not rescaled, unlike in most code: so it is in the authors' release.
    """

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training or self.rate == 0:
            return x
        return x * (torch.rand(len(x), 1, 1, device=x.device) >= self.rate)


class Block(nn.Module):
    def __init__(self, size, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(size.width, eps=NORM_EPS)
        self.attn = Attention(size)
        self.norm2 = nn.LayerNorm(size.width, eps=NORM_EPS)
        self.mlp = Mlp(size)
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        """x (B, N, D) -> same."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def drop_path_rates(highest, depth):
    """Block i is dropped with probability highest * i / (L - 1)."""
    return [highest * i / max(1, depth - 1) for i in range(depth)]


class Stack(nn.Module):
    """Blocks, one for each of these rates of stochastic depth, then a LayerNorm."""

    def __init__(self, size, rates):
        super().__init__()
        self.blocks = nn.ModuleList(Block(size, rate) for rate in rates)
        self.norm = nn.LayerNorm(size.width, eps=NORM_EPS)

    def forward(self, x):
        """x (B, N, D) -> same."""
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


# ---------------------------------------------------------------------------------------------
# Fusion: the encoders and decoders (Fig. 2, Sec. 3.2 and 3.3)

# A plan is a list of stages (how, depth), L layers in all; only mid fusion uses S. "separate":
# each modality has its own weights and its own pass; "shared": same weights, own pass; "joint":
# same weights, one pass over the tokens of all.
PLANS = {
    "early": lambda L, S: [("joint", L)],
    "separate": lambda L, S: [("separate", L)],
    "shared": lambda L, S: [("shared", L)],
    "mid": lambda L, S: [("separate", L - S), ("joint", S)],
}


class Fusion(nn.Module):
    """Runs a plan over {m: (B, N, D)} and returns the same: encoder and decoder.

    A stage has one stack per modality if it is "separate", else one for all. Each stack ends in its
    own norm, so mid fusion has one per modality before the joint layers, too: as released.
    """

    def __init__(self, fusion, size, modalities, num_joint=2, drop_path=0.0):
        super().__init__()
        require(fusion in PLANS, f"no fusion {fusion!r}: choose one of {', '.join(PLANS)}")
        require(
            fusion != "mid" or 0 < num_joint < size.depth,
            f"mid fusion needs 0 < S < {size.depth} layers, not S = {num_joint}")

        self.plan = PLANS[fusion](size.depth, num_joint)
        self.stages = nn.ModuleList()
        rates = drop_path_rates(drop_path, size.depth)
        for how, depth in self.plan:
            names = modalities if how == "separate" else ["all"]
            stacks = {name: Stack(size, rates[:depth]) for name in names}
            self.stages.append(nn.ModuleDict(stacks))
            rates = rates[depth:]

    def forward(self, tokens):
        """tokens {m: (B, N, D)} -> same."""
        for (how, _), stage in zip(self.plan, self.stages):
            if how == "joint":
                x, lengths = pack(list(tokens.values()), "b * d")  # (B, all N, D)
                tokens = dict(zip(tokens, unpack(stage["all"](x), lengths, "b * d")))
            else:  # a pass for each modality
                tokens = {m: stage[m if m in stage else "all"](x) for m, x in tokens.items()}

        return tokens

    def stacks(self, modality):
        """The stacks that a modality's tokens go through, first to last (for transfer)."""
        return [stage[modality if modality in stage else "all"] for stage in self.stages]

    def path(self, modality):
        """The blocks that a modality's tokens go through, first to last."""
        return [block for stack in self.stacks(modality) for block in stack.blocks]


# ---------------------------------------------------------------------------------------------
# The audiovisual masked autoencoder (Sec. 3)


# Objectives (Sec. 3.4; inpainting: Fig. 3). Each is a list of decoder passes {target t: context c}:
# t is decoded from the visible tokens of c. If t = c, they go back to their places and the gaps
# are predicted: Q = M. If not, they have no place in the sequence of t: they take the first V_c of
# its N_t, and the others are predicted, whether the encoder saw them or not: Q = N_t - V_c.
CONTEXT = {
    "joint": [{"video": "video", "audio": "audio"}],
    "video_from_audio": [{"video": "audio"}],
    "audio_from_video": [{"audio": "video"}],
    "inpaint_both": [{"video": "audio", "audio": "video"}],
    # Beyond the paper: its future work (Sec. 4.2).
    "joint_inpaint": [{"video": "video", "audio": "audio"}, {"video": "audio", "audio": "video"}],
}


@dataclass(frozen=True)
class PretrainConfig:
    """A pretraining model. UserError for what cannot be trained: see `__post_init__`."""

    modalities: dict = field(default_factory=lambda: dict(MODALITIES))
    size: Size = SIZES["base"][0]
    decoder_size: Size = SIZES["base"][1]
    encoder: str = "mid"  # a plan, Sec. 3.2
    decoder: str = "shared"  # a plan, Sec. 3.3
    objective: str = "joint"  # a row of CONTEXT
    num_joint: int = 2  # S of mid fusion, Table 15
    norm_pix: bool = False  # targets to zero mean and unit variance, per patch
    modality_embed: bool = False  # learned, added to all tokens of a modality (off in the release)
    allow_uncoupled: bool = False  # separate encoder, separate decoder: the baseline of Table 10

    @property
    def passes(self):
        """The decoder passes of the objective, for the targets that there are."""
        return [
            {t: c for t, c in pairs.items() if t in self.modalities}
            for pairs in CONTEXT[self.objective]]

    def __post_init__(self):
        require(
            self.objective in CONTEXT,
            f"no objective {self.objective!r}: choose one of {', '.join(CONTEXT)}")
        require(
            any(self.passes),
            f"nothing to reconstruct: {', '.join(self.modalities) or 'no modality'} with "
            f"objective {self.objective}")

        require(
            self.allow_uncoupled or len(self.modalities) == 1
            or not (self.encoder == self.decoder == "separate"),
            "a separate encoder with a separate decoder is two uncoupled autoencoders "
            "(Sec. 3.3): choose another decoder, or allow it with --allow-uncoupled")

        for m, modality in self.modalities.items():
            require(
                0 < modality.masked < modality.tokens,
                f"mask ratio {modality.mask_ratio} of {modality.tokens} {m} tokens masks "
                f"{modality.masked}: some must be masked and some visible")

        for pairs in self.passes:
            for target, context in pairs.items():
                if target != context:
                    self.check_inpainting(target, context)

    def check_inpainting(self, target, context):
        """What it needs to predict one modality from the other: see `AVMAE.decoder_ids`."""
        require(
            context in self.modalities,
            f"objective {self.objective} predicts one modality from the other and needs both")

        require(
            self.encoder not in ("separate", "shared"),
            f"inpainting needs early or mid fusion: with a {self.encoder} encoder the tokens of "
            "one modality know nothing of the other, which they must predict (Sec. 3.4)")

        visible = self.modalities[context].tokens - self.modalities[context].masked
        length = self.modalities[target].tokens
        require(
            visible < length,
            f"inpainting puts the {visible} visible {context} tokens at the start of the {target} "
            f"sequence, which has only {length} places: mask more {context}")


class Output(NamedTuple):
    """What AVMAE returns; dicts by (target, context) have an entry for each reconstruction."""

    loss: torch.Tensor  # half the sum of `losses`
    losses: dict  # {(t, c): Eq. 1}
    preds: dict  # {(t, c): (B, Q, P)}, normalized as the truth is
    ids_pred: dict  # {(t, c): (B, Q)}, their positions
    ids_keep: dict  # {m: (B, V)}, what the encoder saw
    ids_mask: dict  # {m: (B, M)}, and what it did not


class Reconstruction(NamedTuple):
    """Clips (B, T, ...) as they are before mean and std: video in [-1, 1], log-mel."""

    original: torch.Tensor
    visible: torch.Tensor  # what the encoder saw of it, NaN elsewhere
    rebuilt: torch.Tensor  # what is predicted, the rest from the original if t = c, else NaN


def random_masking(modalities, batch, generator=None, rows=slice(None)):
    """Which tokens are visible and which masked: uniformly at random for each clip and modality.

    modalities {m: Modality} -> ids_keep {m: (B, V)}, ids_mask {m: (B, M)}, on the CPU. Of several
    processes each asks for its own `rows` of the batch: masks are drawn for all of it, so that they
    don't depend on the number of processes.
    """
    ids_keep, ids_mask = {}, {}
    for m, modality in modalities.items():
        noise = torch.rand(batch, modality.tokens, generator=generator)
        order = noise[rows].argsort(dim=1)  # (B, N)
        ids_mask[m], ids_keep[m] = order[:, : modality.masked], order[:, modality.masked :]

    return ids_keep, ids_mask


class AVMAE(nn.Module):
    """Encodes the visible tokens of audio and video, decodes the masked ones (Fig. 1)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        width, decoder_width = config.size.width, config.decoder_size.width
        targets = [m for m in config.modalities if any(m in p.keys() for p in config.passes)]
        contexts = [m for m in config.modalities if any(m in p.values() for p in config.passes)]

        self.patch_embed = nn.ModuleDict({
            m: PatchEmbed(modality, width, config.modality_embed)
            for m, modality in config.modalities.items()})
        self.encoder = Fusion(config.encoder, config.size, config.modalities, config.num_joint)

        # Only what the objective uses exists: video from audio needs no projection of video tokens.
        self.decoder_embed = nn.ModuleDict({c: linear(width, decoder_width) for c in contexts})
        # Mask tokens and the last layer start at zero, as released.
        self.mask_token = nn.ParameterDict(
            {t: nn.Parameter(torch.zeros(decoder_width)) for t in targets})
        if config.modality_embed:
            self.decoder_modality_embed = nn.ParameterDict(
                {t: nn.Parameter(torch.zeros(decoder_width)) for t in targets})

        longest = max(modality.tokens for modality in config.modalities.values())
        self.decoder_pos_embed = Positions(longest, decoder_width)

        self.decoder = Fusion(config.decoder, config.decoder_size, targets, config.num_joint)
        self.decoder_pred = nn.ModuleDict(
            {t: linear(decoder_width, config.modalities[t].patch_dim, nn.init.zeros_)
             for t in targets})

    def forward(self, inputs, ids=None):
        """inputs {video: (B, T, H, W, 3) uint8 or in [-1, 1], audio: (B, T, F)} -> Output.

        ids: (ids_keep, ids_mask) as `random_masking` makes them, on the inputs' device; drawn
        here if not given.
        """
        patches = self.patchify(inputs)                         # {m: (B, N, P)}
        ids = ids or self.draw_ids(inputs)
        ids_keep, ids_mask = ids                                # {m: (B, V)}, {m: (B, M)}

        latent = self.forward_encoder(patches, ids_keep)        # {m: (B, V, D)}

        losses, preds, ids_preds = {}, {}, {}
        for pairs in self.config.passes:                        # {t: c}; joint: each from itself
            pred, ids_pred = self.forward_decoder(latent, pairs, ids)  # {t: (B, Q, P)}, {t: (B, Q)}

            for t, c in pairs.items():
                truth = self.truth(t, patches[t], ids_pred[t])  # (B, Q, P)
                losses[t, c] = F.mse_loss(pred[t], truth)       # Eq. 1
                preds[t, c], ids_preds[t, c] = pred[t], ids_pred[t]

        loss = 0.5 * sum(losses.values())  # as released: 0.5 for a single target, too
        return Output(loss, losses, preds, ids_preds, ids_keep, ids_mask)

    def patchify(self, inputs):
        """Clips {m: (B, T, ...)} -> raw patches {m: (B, N, P)}, of the modalities given."""
        modalities = self.config.modalities
        return {m: modalities[m].patchify(inputs[m]) for m in modalities if m in inputs}

    def draw_ids(self, inputs, generator=None):
        """Masks for clips of any shape, on their device."""
        modalities = self.config.modalities
        clips = inputs[next(iter(modalities))]
        shaped = {m: modalities[m].like(inputs[m]) for m in modalities}
        ids = random_masking(shaped, len(clips), generator)
        return [{m: part.to(clips.device) for m, part in which.items()} for which in ids]

    def forward_encoder(self, patches, ids_keep=None):
        """patches {m: (B, N, P)}, ids_keep {m: (B, V)} or None for all -> latent {m: (B, V, D)}."""
        ids = ids_keep or dict.fromkeys(patches)
        return self.encoder({m: self.patch_embed[m](x, ids[m]) for m, x in patches.items()})

    def forward_decoder(self, latent, pairs, ids):
        """latent {m: (B, V, D)} -> predicted patches {t: (B, Q, P)}, and where in their target they
        stand {t: (B, Q)}."""
        ids_given, ids_pred = self.decoder_ids(pairs, *ids)  # where t == c: ids_keep, ids_mask

        tokens = {}
        for t, c in pairs.items():
            pos = self.decoder_pos_embed(ids_given[t].shape[1] + ids_pred[t].shape[1])  # (N, D')
            given = self.decoder_embed[c](latent[c]) + pos[ids_given[t]]  # (B, V, D')
            masked = self.mask_token[t] + pos[ids_pred[t]]  # (B, Q, D')

            tokens[t] = torch.cat([given, masked], dim=1)  # (B, N, D')
            if self.config.modality_embed:  # of the target, for the whole sequence
                tokens[t] = tokens[t] + self.decoder_modality_embed[t]

        # Each token carries its own position, so that nothing has to be put back in order.
        decoded = self.decoder(tokens)  # {t: (B, N, D')}
        decoded = {t: x[:, ids_given[t].shape[1] :] for t, x in decoded.items()}  # {t: (B, Q, D')}
        return {t: self.decoder_pred[t](x) for t, x in decoded.items()}, ids_pred

    def decoder_ids(self, pairs, ids_keep, ids_mask):
        """Where in the sequence of a target the tokens of its context stand, {t: (B, V)}, and those
        that are predicted, {t: (B, Q)}: see CONTEXT.

        In inpainting a target's own visible tokens never enter its sequence: what they hold arrives
        through joint layers of encoder or decoder. Its first patches are never predicted.
        """
        ids_given, ids_pred = {}, {}
        for t, c in pairs.items():
            if t == c:
                ids_given[t], ids_pred[t] = ids_keep[t], ids_mask[t]
                continue

            batch, visible = ids_keep[c].shape
            length = ids_keep[t].shape[1] + ids_mask[t].shape[1]
            in_order = torch.arange(length, device=ids_keep[c].device).expand(batch, length)
            ids_given[t], ids_pred[t] = in_order[:, :visible], in_order[:, visible:]

        return ids_given, ids_pred

    def truth(self, modality, patches, ids):
        """What is to be predicted: raw patches (B, N, P) at ids (B, Q) -> (B, Q, P)."""
        patches = self.config.modalities[modality].normalize(take(patches, ids))
        if self.config.norm_pix:
            mean, std = patch_stats(patches)
            patches = (patches - mean) / std
        return patches

    def features(self, inputs, pool=True):
        """Features of whole clips {m: (B, D)}, of each modality of the inputs; the encoder's tokens
        {m: (B, N, D)} if not `pool`."""
        latent = self.forward_encoder(self.patchify(inputs))
        return {m: x.mean(1) for m, x in latent.items()} if pool else latent

    @torch.no_grad()
    def reconstruct(self, inputs, ids=None):
        """What `forward` predicts, as clips (Fig. 5): {(t, c): Reconstruction}."""
        out, clips = self(inputs, ids), {}

        for (t, c), pred in out.preds.items():
            modality, ids_pred = self.config.modalities[t].like(inputs[t]), out.ids_pred[t, c]
            original = modality.normalize(modality.patchify(inputs[t])).float()  # (B, N, P)
            if self.config.norm_pix:
                mean, std = patch_stats(take(original, ids_pred))
                pred = pred * std + mean

            nothing = torch.full_like(original, math.nan)
            visible = put(nothing, out.ids_keep[t], take(original, out.ids_keep[t]))
            rebuilt = put(original if t == c else nothing, ids_pred, pred.float())
            clips[t, c] = Reconstruction(*(
                modality.unpatchify(x) * modality.std + modality.mean
                for x in (original, visible, rebuilt)))

        return clips


# ---------------------------------------------------------------------------------------------
# Finetuning: MBT and classification (Sec. 4.1)


@dataclass(frozen=True)
class ClassifierConfig:
    """A finetuning model: MBT, or a pretraining encoder as it is (Table 14)."""

    modalities: dict = field(default_factory=lambda: dict(MODALITIES))
    size: Size = SIZES["base"][0]
    trunk: str = "mbt"  # or a plan
    fusion_layer: int = 8  # of MBT: the first layer with bottlenecks
    num_bottlenecks: int = 4
    num_joint: int = 2  # S of a mid encoder
    drop_path: float = 0.0  # stochastic depth of the last block
    modality_embed: bool = False
    num_classes: tuple = (309,)  # of each head, side by side; Epic Kitchens: verbs, nouns
    num_segments: int = 1  # with logits of their own; AVE: 10 in a clip of 32 frames (Table 8)


class MBT(nn.Module):
    """Multimodal bottleneck transformer: blocks of its own for each modality, one norm for all.
    From `fusion_layer` on, modalities exchange what they know through a few bottleneck tokens z.
    With one modality it is a plain ViT.

        [x_m^(l+1) ; z_m^(l+1)] = Block_m^l([x_m^l ; z^l]),    z^(l+1) = mean over m of z_m^(l+1)
    """

    def __init__(self, config):
        super().__init__()
        size, fusion_layer = config.size, config.fusion_layer
        require(
            0 <= fusion_layer <= size.depth,
            f"fusion layer {fusion_layer} of {size.depth}: it must be one of them, or the depth "
            "for no fusion")

        rates = drop_path_rates(config.drop_path, size.depth)
        self.blocks = nn.ModuleDict(
            {m: nn.ModuleList(Block(size, rate) for rate in rates) for m in config.modalities})
        self.norm = nn.LayerNorm(size.width, eps=NORM_EPS)

        self.depth = size.depth
        self.fusion_layer = fusion_layer if len(config.modalities) > 1 else size.depth
        if self.fusion_layer < size.depth:
            self.bottleneck = nn.Parameter(0.02 * torch.randn(config.num_bottlenecks, size.width))

    def forward(self, x):
        """x {m: (B, N, D)} -> same."""
        for layer in range(self.fusion_layer):
            x = {m: self.blocks[m][layer](x[m]) for m in x}

        if self.fusion_layer < self.depth:
            z = self.bottleneck.expand(len(next(iter(x.values()))), -1, -1)  # (B, Z, D)

        for layer in range(self.fusion_layer, self.depth):
            joined = {m: torch.cat([x[m], z], dim=1) for m in x}  # {m: (B, N + Z, D)}
            joined = {m: self.blocks[m][layer](joined[m]) for m in x}
            x = {m: joined[m][:, : -z.shape[1]] for m in x}
            z = torch.stack([joined[m][:, -z.shape[1] :] for m in x]).mean(0)

        return {m: self.norm(x[m]) for m in x}

    def path(self, modality):
        """The blocks that a modality's tokens go through, first to last."""
        return list(self.blocks[modality])


class Classifier(nn.Module):
    """Patch embeddings, a trunk (MBT, or a pretraining encoder: Table 14), mean pooling, and one
    linear classifier that all modalities share."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        require(config.modalities, "a classifier needs a modality")
        require(
            all(x.grid[0] >= config.num_segments for x in config.modalities.values()),
            f"{config.num_segments} segments need as many patches in time")

        self.patch_embed = nn.ModuleDict({
            m: PatchEmbed(modality, config.size.width, config.modality_embed)
            for m, modality in config.modalities.items()})
        self.trunk = MBT(config) if config.trunk == "mbt" else Fusion(
            config.trunk, config.size, config.modalities, config.num_joint, config.drop_path)
        self.head = linear(config.size.width, sum(config.num_classes), nn.init.zeros_)

    def forward(self, inputs):
        """inputs as for AVMAE -> logits {m: (B, C)}, C the classes of all heads; with segments
        {m: (B, segments, C)}.

        The caller takes their mean over modalities at test time, and the loss of each in training.
        """
        return {m: self.head(x) for m, x in self.features(inputs).items()}

    def features(self, inputs, pool=True):
        """{m: (B, D)} of each modality of the inputs, with segments {m: (B, segments, D)}; tokens
        {m: (B, N, D)} if not `pool`."""
        tokens = self.trunk({
            m: embed(embed.modality.patchify(inputs[m]))  # (B, N, D)
            for m, embed in self.patch_embed.items() if m in inputs})

        return {m: self.pool(m, x, inputs[m].shape[1]) if pool else x for m, x in tokens.items()}

    def pool(self, modality, x, frames):
        """Mean over tokens, (B, N, D) -> (B, D); with segments -> (B, segments, D), each over those
        tokens whose center in time lies in it."""
        segments = self.config.num_segments
        if segments == 1:
            return x.mean(1)

        patch = self.config.modalities[modality].patch[0]
        x = x.unflatten(1, (frames // patch, -1)).mean(2)  # (B, t, D)
        center = (torch.arange(x.shape[1], device=x.device) + 0.5) * patch / frames  # in (0, 1)
        segment = F.one_hot((center * segments).long(), segments).to(x)  # (t, segments)

        return segment.T @ x / segment.sum(0)[:, None]  # the mean of each: (B, segments, D)


# ---------------------------------------------------------------------------------------------
# From pretraining to finetuning


def transfer(source, target, streams=None):
    """Initializes a Classifier from an AVMAE in place (Sec. 4.1, Table 3) -> what was taken, and
    the names of the parameters that stayed fresh. UserError if sizes differ.

    streams: the modalities of `target` to initialize, all if None. A stream whose modality the
    source lacks takes the blocks of the one it has, and its patch embedding stays fresh. MBT has
    one norm, its last: that of the encoder, unless this is separate. Those inside mid are left.
    """
    a, b = source.config.size, target.config.size
    require(a == b, f"the pretrained model has {a}, this one {b}: they must be equal")
    theirs, ours = source.config.modalities, target.config.modalities
    taken, touched = [], set()

    def copy(old, new):  # which may lack a modality_embed
        new.load_state_dict({k: old.state_dict()[k] for k in new.state_dict()})
        touched.update(map(id, new.parameters()))

    for m in streams or ours:
        require(m in ours, f"no stream {m!r}: choose of {', '.join(ours)}")
        origin = m if m in theirs else next(iter(theirs))

        if origin == m:
            a, b = theirs[m].patch, ours[m].patch
            require(a == b, f"the pretrained model has {m} patches of {a}, this one of {b}")
            copy(source.patch_embed[m], target.patch_embed[m])
            taken.append(f"{m} patch embedding")

        for a, b in zip(source.encoder.path(origin), target.trunk.path(m), strict=True):
            copy(a, b)
        taken.append(f"{source.config.size.depth} {m} blocks from {origin}")

        if target.config.trunk != "mbt":
            for a, b in zip(source.encoder.stacks(origin), target.trunk.stacks(m), strict=True):
                copy(a.norm, b.norm)
            taken.append(f"{m} norms")
        elif source.encoder.plan[-1][0] != "separate":
            copy(source.encoder.stacks(origin)[-1].norm, target.trunk.norm)
            taken.append("final norm")

    return taken, [name for name, p in target.named_parameters() if id(p) not in touched]


# =============================================================================================
# Nothing below belongs to the paper: checkpoints, and other people's weights
# =============================================================================================

# A checkpoint is {"config": plain dict, "model": state_dict, ...}


def to_dict(config):
    """A config as plain dicts, lists, numbers and strings."""
    return {"kind": type(config).__name__, **json.loads(json.dumps(asdict(config)))}


def from_dict(values):
    """The inverse of `to_dict`."""

    def frozen(x):  # json has no tuples
        if isinstance(x, dict):
            return {name: frozen(y) for name, y in x.items()}
        return tuple(map(frozen, x)) if isinstance(x, list) else x

    values = frozen(values)
    kind = values.pop("kind")
    for name in {"size", "decoder_size"} & values.keys():
        values[name] = Size(**values[name])
    values["modalities"] = {m: Modality(**x) for m, x in values["modalities"].items()}

    return {"PretrainConfig": PretrainConfig, "ClassifierConfig": ClassifierConfig}[kind](**values)


def build(config):
    """The model of a config."""
    return (AVMAE if isinstance(config, PretrainConfig) else Classifier)(config)


def save(model, path, **extra):
    """Weights and settings in one file that `load_model` takes; safetensors by that suffix.

    Written beside `path` and moved there: it is whole or not there at all. UserError if the disk
    is full.
    """
    config, state = to_dict(model.config), model.state_dict()
    partial = pathlib.Path(f"{path}.partial")

    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import save_file

            save_file(state, partial, {"config": json.dumps(config), "extra": json.dumps(extra)})
        else:
            torch.save({"config": config, "model": state, **extra}, partial)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"could not save {path}: {str(error).splitlines()[0]}. What was saved before is still "
            "there") from None

    os.replace(partial, path)


def load_model(path, **assume):
    """The model of a checkpoint in eval mode: ours, the authors' (Flax), or a ViT of others.
    Its `notes` say what was assumed, changed or left out of a foreign file.

    assume: what a foreign file cannot tell, see `from_official`. UserError if it is none of these.
    """
    checkpoint = load_checkpoint(path, **assume)
    try:
        model = build(from_dict(checkpoint["config"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} has settings of another version ({error!r})") from None

    missing, unexpected = model.load_state_dict(checkpoint["model"], strict=False)
    missing = [name for name in missing if not name.startswith(tuple(checkpoint.get("fresh", ())))]
    require(
        not missing and not unexpected,
        f"{path} does not fit its own settings: missing {missing[:3]}, unexpected {unexpected[:3]}")

    model.notes = checkpoint.get("notes", [])
    return model.eval()


def load_checkpoint(path, **assume):
    """A checkpoint file as a dict {"config", "model", ...}; never runs code from it. UserError if
    it cannot be read, or is of nobody that we know."""
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"PK"  # as torch.save writes

        if zipped:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        else:
            read = read_safetensors if str(path).endswith(".safetensors") else read_flax
            checkpoint = read(path)

    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except ImportError as error:
        raise UserError(f"to read {path}, install {error.name}") from None
    except Exception as error:  # whatever a parser makes of damaged bytes
        why = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{path} is neither a checkpoint of ours, nor one of torch, safetensors or Flax that "
            f"can be read safely ({type(error).__name__}: {why})") from None

    ours = isinstance(checkpoint, dict) and "config" in checkpoint
    return checkpoint if ours else from_foreign(checkpoint, **assume)


# ---------------------------------------------------------------------------------------------
# Other people's weights, by a table of names for each source


def read_safetensors(path):
    """{name: tensor}, or a checkpoint of ours, which has its config in the metadata."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        state, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    if "config" not in about:
        return state

    return {"config": json.loads(about["config"]), "model": state} | json.loads(about["extra"])


def read_flax(path):
    """{"a/b/c": tensor} of a msgpack file, in Flax's old layout or its new one."""
    import msgpack

    def array(code, data):
        shape, dtype, numbers = msgpack.unpackb(data)
        return torch.frombuffer(bytearray(numbers), dtype=getattr(torch, dtype)).reshape(shape)

    def flat(tree, prefix=""):
        for name, x in tree.items():
            yield from flat(x, f"{prefix}{name}/") if isinstance(x, dict) else [(prefix + name, x)]

    with open(path, "rb") as file:
        tree = msgpack.unpackb(file.read(), ext_hook=array, strict_map_key=False)
    for key in "optimizer", "target", "params":
        tree = tree.get(key, tree)

    return dict(flat(tree))


def from_foreign(state, **assume):
    """Other people's tensors by name -> {"config", "model", "notes", "fresh"}: `fresh` is what
    they don't have of our model. UserError if they are of nobody that we know."""
    for key in "model", "state_dict", "module":
        state = state.get(key, state) if isinstance(state, dict) else {}
    state = {str(name): x.detach().float() for name, x in state.items() if torch.is_tensor(x)}
    official = any(name.startswith("Transformer") for name in state)

    try:
        return from_official(state, **assume) if official else from_vit(state)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            "neither a checkpoint of ours, nor the authors' AV-MAE or MBT, nor a ViT in the names "
            f"of timm or Hugging Face ({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from None


def rename(name, table):
    """A name after all replacements of a table, in order."""
    for pattern, replacement in table.items():
        name = re.sub(pattern, replacement, name)
    return name


# The authors' release (scenic)

OFFICIAL_HEAD = "ProjectionHeadAndClassifier_0/output_projection"
OFFICIAL_MODALITIES = {"video": "rgb", "audio": "spectrogram"}
OFFICIAL = {  # ours: theirs
    r"\.video": "_rgb",
    r"\.audio": "_spectrogram",
    r"^patch_embed(\w+)\.proj": r"embedding\1",
    r"^patch_embed(\w+)\.modality_embed": r"Encoder_modality_token\1",
    r"^decoder_modality_embed": "Decoder_modality_token",
    r"^decoder_embed": "decoder_projection",
    r"^decoder_pred": "output_projection",
    r"^head": OFFICIAL_HEAD,
    r"^trunk\.bottleneck": "bottleneck",
    r"^(encoder|trunk)\.": "Transformer.",
    r"^decoder\.": "Decoder.",
    r"\.stages\.0(\.all)?": "",
    r"\.stages\.1\.all": "_concat",
    r"\.blocks(\w*)\.(\d+)": r".encoderblock_\2\1",
    r"(norm\d?)\.weight": r"\1.scale",
    r"\.weight": ".kernel",
    r"\.norm1": ".LayerNorm_0",
    r"\.norm2": ".LayerNorm_1",
    r"\.norm\.": ".encoder_norm.",
    r"attn\.": "MultiHeadDotProductAttention_0.",
    r"_0\.proj": "_0.out",
    r"mlp\.fc1": "MlpBlock_0.Dense_0",
    r"mlp\.fc2": "MlpBlock_0.Dense_1",
    r"\.": "/",
}
OFFICIAL_ALIASES = {r"^embedding/": "embedding_rgb/", r"_spec/": "_spectrogram/"}  # theirs: theirs


def from_official(params, encoder=None, decoder="shared", objective="joint", fusion_layer=None):
    """The authors' parameters {"a/b/c": tensor} -> a checkpoint dict.

    The arguments are what parameters cannot tell: whether a single encoder was early or shared, a
    single decoder early or shared, the objective, and the first fused layer of MBT (if None: 18 for
    527 classes in 24 layers, else 2/3 of the depth).
    """
    params = {rename(path, OFFICIAL_ALIASES): x for path, x in params.items()}

    modalities = {}
    for m, theirs in OFFICIAL_MODALITIES.items():
        kernel = params.get(f"embedding_{theirs}/kernel")  # (t, [h,] w, channels, D)
        if kernel is not None:
            modalities[m] = replace(MODALITIES[m], patch=tuple(kernel.shape[:-2]))
            if m == "audio":  # three equal channels are one, weights summed
                params[f"embedding_{theirs}/kernel"] = kernel.sum(-2)

    if f"{OFFICIAL_HEAD}/bias" in params:
        config, notes = official_classifier(params, modalities, fusion_layer)
        first = OFFICIAL_MODALITIES[next(iter(modalities))]  # whose blocks name no modality
        params = {re.sub(r"(block_\d+)/", rf"\1_{first}/", path): x for path, x in params.items()}
    else:
        config, notes = official_pretraining(params, modalities, encoder, decoder, objective)

    with torch.device("meta"):
        wanted = build(config).state_dict()
    state = {name: official_tensor(params, name, x.shape) for name, x in wanted.items()}
    if params:
        notes.append(f"left out, unused by this model: {', '.join(sorted(params))}")

    return {"config": to_dict(config), "model": state, "notes": notes, "fresh": []}


def official_tensor(params, name, shape):
    """Takes what we call `name` out of their parameters."""
    path = rename(name, OFFICIAL)
    parts = ("query", "key", "value") if "qkv" in path else ("",)
    tensors = [params.pop(path.replace("qkv", part)) for part in parts]

    if path.endswith("kernel"):  # its first axes are the inputs: of a patch, of heads, or just one
        tensors = [x.reshape(shape[1], -1).T for x in tensors]
    return torch.cat(tensors).reshape(shape)


def official_size(params, part):
    """Size of their "Transformer" or "Decoder", its joint layers, and whether it is one stack."""
    names = [path for path in params if path.startswith(part)]
    query = [params[path] for path in names if path.endswith("query/kernel")][0]
    mlp_bias = [params[path] for path in names if path.endswith("Dense_0/bias")][0]

    blocks = {block[0] for block in (re.match(r"\w+/\w+block_\d+", p) for p in names) if block}
    stacks = [block.split("/")[0] for block in blocks]
    joint = stacks.count(f"{part}_concat")
    depth = joint + max(stacks.count(stack) for stack in stacks if not stack.endswith("_concat"))

    return Size(query.shape[0], depth, query.shape[1], len(mlp_bias)), joint, part in stacks


def official_classifier(params, modalities, fusion_layer):
    """The config of a finetuned model, and notes on what was assumed."""
    size, _, _ = official_size(params, "Transformer")
    classes, notes = len(params[f"{OFFICIAL_HEAD}/bias"]), []

    if fusion_layer is None:
        fusion_layer = 18 if (classes, size.depth) == (527, 24) else size.depth * 2 // 3
    if len(modalities) > 1:
        notes.append(f"assumed: fusion layer {fusion_layer} of {size.depth}")
    if classes == 527 and "audio" in modalities:
        modalities["audio"] = replace(modalities["audio"], mean=1.102, std=2.762)
        notes.append("527 classes: spectrograms are normalized by mean 1.102, std 2.762")

    heads = (97, 300) if classes == 397 else (classes,)  # Epic Kitchens' verbs and nouns
    return ClassifierConfig(modalities, size, fusion_layer=fusion_layer, num_classes=heads), notes


def official_pretraining(params, modalities, encoder, decoder, objective):
    """The config of a pretrained model, and notes on what was assumed."""
    size, joint, one = official_size(params, "Transformer")
    require(
        not one or encoder in ("early", "shared"),
        "one encoder for both modalities is early or shared, which its parameters don't tell: say "
        "encoder='early' or encoder='shared'")

    if not one:
        encoder = "mid" if joint else "separate"

    decoder_size, _, one = official_size(params, "Decoder")
    note = f"assumed: objective {objective}" + (f", decoder {decoder}" if one else "")
    config = PretrainConfig(
        modalities, size, decoder_size, encoder, decoder if one else "separate", objective,
        num_joint=joint or 2, allow_uncoupled=True,
        modality_embed=any(path.startswith("Encoder_modality_token") for path in params))

    return config, [note]


# A ViT: the names of our blocks are timm's, which DeiT, MAE and VideoMAE share

TIMM = {
    r"^((module|model|encoder|backbone)\.)+": "",
    r"^fc_norm\.": "norm.",
    r"\.attn\.([qv])_bias": r".attn.\1.bias",  # VideoMAE
}
HUGGING_FACE = {  # ViT, ViTMAE and VideoMAE, in files and (the second of two) in memory
    r"^((vit|videomae|encoder)\.)+": "",
    r"^embeddings\.patch_embeddings\.projection": "patch_embed.proj",
    r"^embeddings\.": "",
    r"^layers?\.": "blocks.",
    r"\.attention\.(attention\.)?([qkv])(uery|ey|alue|_proj)?[._]": r".attn.\2.",
    r"\.attention\.(output\.dense|o_proj)\.": ".attn.proj.",
    r"\.intermediate\.dense\.": ".mlp.fc1.",
    r"\.output\.dense\.": ".mlp.fc2.",
    r"\.layernorm_before\.": ".norm1.",
    r"\.layernorm_after\.": ".norm2.",
    r"^layernorm\.": "norm.",
}


def from_vit(state):
    """A ViT in the names of timm or Hugging Face -> a checkpoint dict of a shared encoder
    (Tables 6, 9). Class token, positions, heads and decoders are left."""
    vit = {rename(name, TIMM | HUGGING_FACE): x for name, x in state.items()}
    kernel, bias = vit.pop("patch_embed.proj.weight"), vit.pop("patch_embed.proj.bias")
    names = [name for name in vit if name.startswith(("blocks.", "norm."))]
    ours = {f"encoder.stages.0.all.{name}": vit.pop(name) for name in names}

    width, depth = len(bias), len({name.split(".")[1] for name in names if name[0] == "b"})
    for i in range(depth):
        fuse(ours, f"encoder.stages.0.all.blocks.{i}.attn", width)
    modalities = {}
    for m, (modality, weight) in vit_embeddings(kernel).items():
        modalities[m] = modality
        ours |= {f"patch_embed.{m}.proj.weight": weight, f"patch_embed.{m}.proj.bias": bias}

    heads = {size.width: size.num_heads for size, _ in SIZES.values()}  # parameters don't tell
    mlp_dim = len(ours["encoder.stages.0.all.blocks.0.mlp.fc1.bias"])
    size = Size(width, depth, heads.get(width, max(1, width // 64)), mlp_dim)
    config = PretrainConfig(modalities, size, encoder="shared")
    notes = [
        f"a ViT of {size}: patch embedding {tuple(kernel.shape)} for {' and '.join(modalities)}",
        f"left: {', '.join(sorted({name.split('.')[0] for name in vit})) or 'nothing'}",
        "these weights may have been trained with the erf GELU and another LayerNorm epsilon"]

    fresh = ["decoder", "mask_token"] + ["encoder.stages.0.all.norm"] * ("norm.weight" not in names)
    return {"config": to_dict(config), "model": ours, "notes": notes, "fresh": fresh}


def fuse(state, attn, width):
    """Separate q, k and v become one layer; a bias that is not there is 0 (VideoMAE's of k)."""
    if f"{attn}.q.weight" in state:
        weights = [state.pop(f"{attn}.{part}.weight") for part in "qkv"]
        state[f"{attn}.qkv.weight"] = torch.cat(weights)

    biases = [state.pop(f"{attn}.{part}.bias", torch.zeros(width)) for part in "qkv"]
    state.setdefault(f"{attn}.qkv.bias", torch.cat(biases))


def vit_embeddings(kernel):
    """kernel (D, channels, [t,] h, w) -> {m: (Modality, weight (D, P))}."""
    if kernel.ndim == 4:  # an image, put at the central frame of the tubelet
        frames = VIDEO.patch[0]
        kernel = F.pad(kernel[:, :, None], (0, 0, 0, 0, frames // 2, (frames - 1) // 2))
    _, channels, *patch = kernel.shape

    video = replace(VIDEO, patch=tuple(patch)), rearrange(kernel, "d c t h w -> d (t h w c)")
    audio = replace(AUDIO, patch=tuple(patch[1:])), kernel.sum((1, 2)).flatten(1)
    return {"audio": audio} if channels == 1 else {"video": video, "audio": audio}
