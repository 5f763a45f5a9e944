"""Audiovisual Masked Autoencoders (ICCV 2023): every model of the paper in one file.

    inputs {video: (B, T, H, W, 3), audio: (B, T, F)}        frames and log-mel spectrograms
       -> patches {m: (B, N, P)} -> tokens {m: (B, V, D)}    dicts by modality m throughout
       -> encoder -> decoder -> loss                         AVMAE, Fig. 1
       -> MBT, or the encoder -> logits                      Classifier, Sec. 4.1

Two tables hold the variants of the paper: `FUSION` (Fig. 2: how audio and video are fused) and
`OBJECTIVES` (Sec. 3.4: what is reconstructed from what). One class, `MultimodalTransformer`, runs
any fusion: it is the encoder and the decoder. The file needs torch and einops only.

Letters: B clips, T frames, H W pixels, F mel bins, N tokens of a modality, V visible and M masked
tokens (V + M = N), Q predicted tokens, P values in a patch, D width, L layers, S joint layers.
"""

import json
import math
import os
import pathlib
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import pack, rearrange, unpack
from torch import nn

NORM_EPS = 1e-6  # epsilon of every LayerNorm, as in the release (Flax's default)


class UserError(ValueError):
    """Raised for invalid user input; the message says how to fix it."""


def check(condition, message):
    """Raise UserError(message) if the condition is false."""
    if not condition:
        raise UserError(message)


# ---------------------------------------------------------------------------------------------
# Patches and positions (Sec. 3.1)


@dataclass(frozen=True)
class Modality:
    """One kind of input: how clips are cut into patches and how many patches are masked."""

    pattern: str  # einops: clips to patches; t counts patches, dt frames in a patch
    axes: tuple  # letters of the axes that are cut
    shape: tuple  # size of a clip along these axes
    patch: tuple  # size of a patch along these axes
    mask_ratio: float
    channels: int = 1
    drop_last: bool = False  # drop trailing frames that do not fill a patch instead of raising
    mean: float = 0.0  # inputs become (x - mean) / std
    std: float = 1.0

    def with_shape_of(self, x):
        """Return this modality with the shape of clips x (B, T, ...)."""
        return replace(self, shape=tuple(x.shape[1 : 1 + len(self.axes)]))

    @property
    def grid(self):
        """Number of patches along each axis.

        Raises UserError if patches do not tile the clip (except along time with drop_last).
        """
        used = list(self.shape)
        if self.drop_last:
            used[0] -= used[0] % self.patch[0]

        check(
            all(s and s % p == 0 for s, p in zip(used, self.patch, strict=True)),
            f"a clip of {'x'.join(map(str, self.shape))} ({', '.join(self.axes)}) must be a "
            f"multiple of the patch size {'x'.join(map(str, self.patch))}")
        return [s // p for s, p in zip(used, self.patch)]

    @property
    def num_tokens(self):
        """N, the number of tokens of a clip."""
        return math.prod(self.grid)

    @property
    def num_masked(self):
        """M, the number of tokens masked in pretraining."""
        return int(self.mask_ratio * self.num_tokens)

    @property
    def patch_dim(self):
        """P, the number of values in a patch."""
        return math.prod(self.patch) * self.channels

    @property
    def axis_sizes(self):
        """Sizes of the pattern's letters: {"t": 8, "dt": 2, ...}."""
        in_patch = {f"d{axis}": size for axis, size in zip(self.axes, self.patch)}
        return dict(zip(self.axes, self.grid)) | in_patch

    def patchify(self, x):
        """Cut clips (B, T, ...) into patches (B, N, P) of the same dtype."""
        sizes = self.with_shape_of(x).axis_sizes
        return rearrange(x[:, : sizes["t"] * sizes["dt"]], self.pattern, **sizes)

    def unpatchify(self, patches):
        """Put patches (B, N, P) of clips of `shape` together: (B, T, ...)."""
        clips, cut = self.pattern.split(" -> ")
        return rearrange(patches, f"{cut} -> {clips}", **self.axis_sizes)

    def normalize(self, patches):
        """Scale bytes to [-1, 1], then subtract `mean` and divide by `std`."""
        if patches.dtype == torch.uint8:
            patches = patches * (2 / 255) - 1

        return patches if (self.mean, self.std) == (0, 1) else (patches - self.mean) / self.std


VIDEO = Modality(  # 16 RGB frames in tubelets of 2x16x16: 8x14x14 = 1568 tokens of 1536 values
    "b (t dt) (h dh) (w dw) c -> b (t h w) (dt dh dw c)", ("t", "h", "w"), shape=(16, 224, 224),
    patch=(2, 16, 16), mask_ratio=0.9, channels=3)

AUDIO = Modality(  # 8 s of 100 frames each, 128 mel bins: 50x8 = 400 tokens of 256 values
    "b (t dt) (f df) -> b (t f) (dt df)", ("t", "f"), shape=(800, 128), patch=(16, 16),
    mask_ratio=0.5, drop_last=True)  # the last 8 frames of AudioSet's 10 s fill no patch

MODALITIES = {"video": VIDEO, "audio": AUDIO}  # tokens are concatenated in this order


def sinusoid(length, width):
    """Return fixed positions (N, D) of the flattened grid, as in the release.

    pos[p, 2i] = sin(p w_i), pos[p, 2i+1] = cos(p w_i), w_i = 10000^(-2i/D)
    """
    frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency  # (N, D / 2)

    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).float()


class Positions(nn.Module):
    """A table of positions. A shorter sequence uses the first rows, a longer one extends it."""

    def __init__(self, length, width):
        super().__init__()
        self.register_buffer("table", sinusoid(length, width), persistent=False)

    def forward(self, length):
        """Return positions (N, D)."""
        if length > len(self.table):
            self.table = sinusoid(length, self.table.shape[1]).to(self.table)
        return self.table[:length]


def gather_tokens(x, ids):
    """Pick tokens of each clip: x (B, N, P), ids (B, V) -> (B, V, P)."""
    first = x.shape[1] * torch.arange(len(x), device=x.device)[:, None]  # first token of each clip
    return x.flatten(0, 1)[ids + first]  # copies whole rows, unlike torch.gather


def scatter_tokens(x, ids, rows):
    """Return x (B, N, P) with `rows` (B, V, P) at ids (B, V)."""
    return x.scatter(1, ids[..., None].expand_as(rows), rows)


def patch_stats(patches):
    """Return the mean and standard deviation of each patch: (B, M, P) -> two of (B, M, 1)."""
    variance, mean = torch.var_mean(patches, dim=-1, correction=0, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


# ---------------------------------------------------------------------------------------------
# Transformer: pre-norm ViT blocks with timm's parameter names


@dataclass(frozen=True)
class TransformerConfig:
    """Size of a transformer."""

    width: int  # D
    depth: int  # L
    num_heads: int
    mlp_dim: int


MODEL_SIZES = {  # name: (encoder, decoder); the paper uses base and large (Sec. 4.1, Table 21)
    "tiny": (TransformerConfig(192, 12, 3, 768), TransformerConfig(96, 4, 3, 384)),
    "small": (TransformerConfig(384, 12, 6, 1536), TransformerConfig(192, 4, 3, 768)),
    "base": (TransformerConfig(768, 12, 12, 3072), TransformerConfig(384, 4, 6, 1536)),
    "large": (TransformerConfig(1024, 24, 16, 4096), TransformerConfig(512, 4, 8, 2048)),
    "huge": (TransformerConfig(1280, 32, 16, 5120), TransformerConfig(512, 4, 8, 2048)),
}


def linear(in_features, out_features, init=nn.init.xavier_uniform_):
    """Return a linear layer with zero bias."""
    layer = nn.Linear(in_features, out_features)
    init(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class PatchEmbed(nn.Module):
    """Project the patches of one modality to tokens and add positions (Sec. 3.1)."""

    def __init__(self, modality, width, modality_embed=False):
        super().__init__()
        self.modality = modality

        # Equal to a convolution whose stride is its kernel size.
        self.proj = nn.Linear(modality.patch_dim, width)
        # LeCun normal: a unit normal truncated at +-2 has standard deviation 0.8796.
        std = modality.patch_dim**-0.5 / 0.8796
        nn.init.trunc_normal_(self.proj.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(self.proj.bias)

        self.pos_embed = Positions(modality.num_tokens, width)
        self.modality_embed = nn.Parameter(torch.zeros(width)) if modality_embed else None

    def forward(self, patches, ids=None):
        """Embed raw patches (B, N, P), or only those at ids (B, V): -> (B, N or V, D)."""
        pos = self.pos_embed(patches.shape[1])                          # (N, D)
        if ids is not None:
            patches, pos = gather_tokens(patches, ids), pos[ids]        # (B, V, P), (B, V, D)

        tokens = self.proj(self.modality.normalize(patches)) + pos      # (B, N or V, D)
        return tokens if self.modality_embed is None else tokens + self.modality_embed


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, size):
        super().__init__()
        check(
            size.width % size.num_heads == 0,
            f"width must be a multiple of the {size.num_heads} heads, got {size.width}")
        self.num_heads = size.num_heads

        self.qkv = nn.Linear(size.width, 3 * size.width)
        bound = math.sqrt(3 / size.width)  # Xavier uniform for each of q, k, v as a D x D matrix
        nn.init.uniform_(self.qkv.weight, -bound, bound)
        nn.init.zeros_(self.qkv.bias)

        self.proj = linear(size.width, size.width)

    def forward(self, x):
        """Attend over tokens: (B, N, D) -> same."""
        q, k, v = (
            rearrange(y, "b n (h d) -> b h n d", h=self.num_heads)
            for y in self.qkv(x).chunk(3, dim=-1))
        x = F.scaled_dot_product_attention(q, k, v)                     # (B, heads, N, D / heads)

        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, size):
        super().__init__()
        self.fc1 = linear(size.width, size.mlp_dim)
        self.fc2 = linear(size.mlp_dim, size.width)

        for layer in self.fc1, self.fc2:
            nn.init.normal_(layer.bias, std=1e-6)  # as in the release

    def forward(self, x):
        """Transform each token: (B, N, D) -> same."""
        # Flax's GELU is the tanh approximation; erf moves the released model's output by 2.5e-4.
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class DropPath(nn.Module):
    """Stochastic depth: in training, drop the branch of a clip with probability `rate`.

    Unlike most implementations, kept branches are not rescaled; this matches the release.
    """

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        """Zero the branch (B, N, D) of some clips."""
        if not self.training or self.rate == 0:
            return x
        return x * (torch.rand(len(x), 1, 1, device=x.device) >= self.rate)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, size, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(size.width, eps=NORM_EPS)
        self.attn = Attention(size)
        self.norm2 = nn.LayerNorm(size.width, eps=NORM_EPS)
        self.mlp = Mlp(size)
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        """Apply attention, then the MLP: (B, N, D) -> same."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def drop_path_rates(highest, depth):
    """Return the drop probability of each block i: highest * i / (L - 1)."""
    return [highest * i / max(1, depth - 1) for i in range(depth)]


class Layers(nn.Module):
    """Blocks, one per drop-path rate, and a final LayerNorm."""

    def __init__(self, size, rates):
        super().__init__()
        self.blocks = nn.ModuleList(Block(size, rate) for rate in rates)
        self.norm = nn.LayerNorm(size.width, eps=NORM_EPS)

    def forward(self, x):
        """Apply all blocks and the norm: (B, N, D) -> same."""
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


# ---------------------------------------------------------------------------------------------
# Fusion: the encoders and decoders (Fig. 2, Sec. 3.2 and 3.3)

# A fusion is a list of stages (mode, depth) with L layers in all; only mid fusion uses S.
#   separate: own weights, own pass per modality
#   shared:   same weights, own pass per modality
#   joint:    same weights, one pass over the concatenated tokens
FUSION = {
    "early": lambda L, S: [("joint", L)],
    "separate": lambda L, S: [("separate", L)],
    "shared": lambda L, S: [("shared", L)],
    "mid": lambda L, S: [("separate", L - S), ("joint", S)],
}


class MultimodalTransformer(nn.Module):
    """Run the stages of a fusion over {m: (B, N, D)}: the encoder and the decoder.

    A "separate" stage has Layers per modality, any other stage has one for all. Each ends in its
    own norm, so mid fusion also has a norm per modality before its joint layers, as in the release.
    """

    def __init__(self, fusion, size, modalities, joint_layers=2, drop_path=0.0):
        super().__init__()
        check(fusion in FUSION, f"fusion must be one of {', '.join(FUSION)}, got {fusion!r}")
        check(
            fusion != "mid" or 0 < joint_layers < size.depth,
            f"joint_layers must be between 1 and {size.depth - 1} for mid fusion in {size.depth} "
            f"layers, got {joint_layers}")

        self.modes, self.stages = [], nn.ModuleList()
        rates = drop_path_rates(drop_path, size.depth)
        for mode, depth in FUSION[fusion](size.depth, joint_layers):
            names = modalities if mode == "separate" else ["all"]
            self.modes.append(mode)
            self.stages.append(nn.ModuleDict({name: Layers(size, rates[:depth]) for name in names}))
            rates = rates[depth:]

    def forward(self, tokens):
        """Transform tokens {m: (B, N, D)} -> same."""
        for mode, stage in zip(self.modes, self.stages):
            if mode == "joint":
                x, lengths = pack(list(tokens.values()), "b * d")       # (B, all N, D)
                tokens = dict(zip(tokens, unpack(stage["all"](x), lengths, "b * d")))
            else:  # one pass per modality
                tokens = {m: stage[m if m in stage else "all"](x) for m, x in tokens.items()}

        return tokens

    def layers_for(self, modality):
        """Return the Layers that a modality's tokens pass through, in order."""
        return [stage[modality if modality in stage else "all"] for stage in self.stages]

    def blocks_for(self, modality):
        """Return the blocks that a modality's tokens pass through, in order."""
        return [block for layers in self.layers_for(modality) for block in layers.blocks]


# ---------------------------------------------------------------------------------------------
# The audiovisual masked autoencoder (Sec. 3)

# An objective is a list of decoder passes {target: context}: each target modality is predicted
# from the visible tokens of its context. The decoder's input for a target of N_t tokens, with
# v: a visible token of the target, a: a visible token of the other modality, .: predicted
#
#   joint       [v . v v . .]   target = context: visible tokens keep their positions and the
#                               masked ones are predicted, Q = M
#   inpainting  [a a a . . .]   otherwise the V_c context tokens fill the first positions and all
#                               remaining patches are predicted, Q = N_t - V_c (Fig. 3)
OBJECTIVES = {
    "joint": [{"video": "video", "audio": "audio"}],
    "video_from_audio": [{"video": "audio"}],
    "audio_from_video": [{"audio": "video"}],
    "inpaint_both": [{"video": "audio", "audio": "video"}],
    # Not in the paper, which names it as future work (Sec. 4.2).
    "joint_inpaint": [{"video": "video", "audio": "audio"}, {"video": "audio", "audio": "video"}],
}


@dataclass(frozen=True)
class PretrainConfig:
    """A pretraining model. Raises UserError for combinations that cannot be trained."""

    modalities: dict = field(default_factory=lambda: dict(MODALITIES))
    size: TransformerConfig = MODEL_SIZES["base"][0]
    decoder_size: TransformerConfig = MODEL_SIZES["base"][1]
    encoder: str = "mid"  # a key of FUSION, Sec. 3.2
    decoder: str = "shared"  # a key of FUSION, Sec. 3.3
    objective: str = "joint"  # a key of OBJECTIVES
    joint_layers: int = 2  # S of mid fusion, Table 15
    norm_pix: bool = False  # normalize each target patch to zero mean and unit variance
    modality_embed: bool = False  # add a learned vector per modality (off in the release)
    allow_uncoupled: bool = False  # allow a separate encoder with a separate decoder

    def __post_init__(self):
        check_pretraining(self)

    @property
    def decoder_passes(self):
        """Decoder passes [{target: context}] for the modalities of this model."""
        return [
            {target: c for target, c in targets.items() if target in self.modalities}
            for targets in OBJECTIVES[self.objective]]


class Output(NamedTuple):
    """Output of AVMAE; keys are (target, context), m is a modality."""

    loss: torch.Tensor  # half the sum of `losses`
    losses: dict  # {(target, context): Eq. 1}
    preds: dict  # {(target, context): (B, Q, P)}, detached, normalized like the targets
    ids_pred: dict  # {(target, context): (B, Q)}, their positions
    ids_keep: dict  # {m: (B, V)}, positions of the visible tokens
    ids_mask: dict  # {m: (B, M)}, positions of the masked tokens


class Reconstruction(NamedTuple):
    """Clips (B, T, ...) before `mean` and `std`: video in [-1, 1], log-mel spectrograms."""

    original: torch.Tensor
    visible: torch.Tensor  # NaN where masked
    reconstruction: torch.Tensor  # predicted patches; the others are the original, or NaN


def random_masking(modalities, batch_size, generator=None, rows=slice(None)):
    """Choose visible and masked tokens uniformly at random for each clip and modality.

    Returns ids_keep {m: (B, V)} and ids_mask {m: (B, M)} on the CPU, for the given rows of the
    batch. Masks are drawn for the whole batch, so they do not depend on the number of processes.
    """
    ids_keep, ids_mask = {}, {}
    for m, modality in modalities.items():
        noise = torch.rand(batch_size, modality.num_tokens, generator=generator)
        order = noise[rows].argsort(dim=1)                              # (B, N)

        # Contiguous, since copying a strided tensor to a GPU makes the host wait.
        ids_mask[m] = order[:, : modality.num_masked].contiguous()
        ids_keep[m] = order[:, modality.num_masked :].contiguous()
    return ids_keep, ids_mask


class AVMAE(nn.Module):
    """Encode the visible patches of audio and video, decode the masked ones (Fig. 1)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        width, decoder_width = config.size.width, config.decoder_size.width
        passes = config.decoder_passes
        targets = [m for m in config.modalities if any(m in x.keys() for x in passes)]
        contexts = [m for m in config.modalities if any(m in x.values() for x in passes)]

        self.patch_embed = nn.ModuleDict({
            m: PatchEmbed(modality, width, config.modality_embed)
            for m, modality in config.modalities.items()})
        self.encoder = MultimodalTransformer(
            config.encoder, config.size, config.modalities, config.joint_layers)

        # Create only the modules this objective uses.
        self.decoder_embed = nn.ModuleDict({c: linear(width, decoder_width) for c in contexts})
        self.mask_token = nn.ParameterDict(
            {t: nn.Parameter(torch.zeros(decoder_width)) for t in targets})
        if config.modality_embed:
            self.decoder_modality_embed = nn.ParameterDict(
                {t: nn.Parameter(torch.zeros(decoder_width)) for t in targets})

        longest = max(modality.num_tokens for modality in config.modalities.values())
        self.decoder_pos_embed = Positions(longest, decoder_width)
        self.decoder = MultimodalTransformer(
            config.decoder, config.decoder_size, targets, config.joint_layers)

        # Output layers start at zero, as in the release.
        self.decoder_pred = nn.ModuleDict({
            t: linear(decoder_width, config.modalities[t].patch_dim, nn.init.zeros_)
            for t in targets})

    def forward(self, inputs, ids=None):
        """Return the Output for inputs {video: (B, T, H, W, 3), audio: (B, T, F)}.

        Video is uint8, or float in [-1, 1]. ids: (ids_keep, ids_mask) from `random_masking` on the
        inputs' device; drawn here if None.
        """
        patches = self.patchify(inputs)                                 # {m: (B, N, P)}
        ids_keep, ids_mask = ids = ids or self.sample_masks(inputs)     # {m: (B, V)}, {m: (B, M)}

        latent = self.forward_encoder(patches, ids_keep)                # {m: (B, V, D)}

        losses, preds, ids_preds = {}, {}, {}
        for target_to_context in self.config.decoder_passes:            # joint: one pass
            pred, ids_pred = self.forward_decoder(latent, target_to_context, ids)

            for pair in target_to_context.items():                      # (target, context)
                t = pair[0]
                targets = self.target_patches(t, patches[t], ids_pred[t])   # (B, Q, P)
                losses[pair] = F.mse_loss(pred[t], targets)             # Eq. 1
                preds[pair], ids_preds[pair] = pred[t].detach(), ids_pred[t]

        loss = 0.5 * sum(losses.values())  # as in the release, also for a single target
        return Output(loss, losses, preds, ids_preds, ids_keep, ids_mask)

    def patchify(self, inputs):
        """Cut clips {m: (B, T, ...)} into raw patches {m: (B, N, P)}."""
        modalities = self.config.modalities
        return {m: modalities[m].patchify(inputs[m]) for m in modalities if m in inputs}

    def sample_masks(self, inputs, generator=None):
        """Return (ids_keep, ids_mask) for inputs of any shape, on their device."""
        modalities = self.config.modalities
        clips = inputs[next(iter(modalities))]
        shaped = {m: modalities[m].with_shape_of(inputs[m]) for m in modalities}
        masks = random_masking(shaped, len(clips), generator)
        return [{m: ids.to(clips.device) for m, ids in part.items()} for part in masks]

    def forward_encoder(self, patches, ids_keep=None):
        """Encode the patches {m: (B, N, P)} at ids_keep {m: (B, V)}, or all -> {m: (B, V, D)}."""
        ids = ids_keep or dict.fromkeys(patches)
        return self.encoder({m: self.patch_embed[m](x, ids[m]) for m, x in patches.items()})

    def forward_decoder(self, latent, target_to_context, ids):
        """Predict patches from latent {m: (B, V, D)}.

        Returns predictions {target: (B, Q, P)} and their positions {target: (B, Q)}.
        """
        ids_given, ids_pred = self.decoder_ids(target_to_context, *ids) # {t: (B, V)}, {t: (B, Q)}

        tokens = {}
        for t, c in target_to_context.items():
            num_tokens = ids_given[t].shape[1] + ids_pred[t].shape[1]
            pos = self.decoder_pos_embed(num_tokens)                    # (N, D)
            given = self.decoder_embed[c](latent[c]) + pos[ids_given[t]]    # (B, V, D)
            masked = self.mask_token[t] + pos[ids_pred[t]]              # (B, Q, D)

            tokens[t] = torch.cat([given, masked], dim=1)               # (B, N, D)
            if self.config.modality_embed:  # that of the target, also for context tokens
                tokens[t] = tokens[t] + self.decoder_modality_embed[t]

        # Each token carries its own position, so the order of tokens does not matter.
        decoded = self.decoder(tokens)                                  # {t: (B, N, D)}
        decoded = {t: x[:, ids_given[t].shape[1] :] for t, x in decoded.items()}    # {t: (B, Q, D)}
        return {t: self.decoder_pred[t](x) for t, x in decoded.items()}, ids_pred

    def decoder_ids(self, target_to_context, ids_keep, ids_mask):
        """Return positions of context tokens {target: (B, V)} and predictions {target: (B, Q)}.

        In inpainting a target's own visible tokens do not enter its sequence; their content arrives
        through the encoder's joint layers. Its first V_c patches are never predicted.
        """
        ids_given, ids_pred = {}, {}
        for t, c in target_to_context.items():
            if t == c:
                ids_given[t], ids_pred[t] = ids_keep[t], ids_mask[t]
                continue

            batch, visible = ids_keep[c].shape
            num_tokens = ids_keep[t].shape[1] + ids_mask[t].shape[1]
            in_order = torch.arange(num_tokens, device=ids_keep[c].device).expand(batch, -1)
            ids_given[t], ids_pred[t] = in_order[:, :visible], in_order[:, visible:]
        return ids_given, ids_pred

    def target_patches(self, modality, patches, ids):
        """Return the patches to predict: raw patches (B, N, P) at ids (B, Q) -> (B, Q, P)."""
        patches = self.config.modalities[modality].normalize(gather_tokens(patches, ids))
        if self.config.norm_pix:
            mean, std = patch_stats(patches)
            patches = (patches - mean) / std
        return patches

    def features(self, inputs, pool=True):
        """Encode whole clips: mean-pooled features {m: (B, D)}, or tokens {m: (B, N, D)}."""
        latent = self.forward_encoder(self.patchify(inputs))
        return {m: x.mean(1) for m, x in latent.items()} if pool else latent

    @torch.no_grad()
    def reconstruct(self, inputs, ids=None):
        """Return predictions as clips (Fig. 5): {(target, context): Reconstruction}."""
        out, clips = self(inputs, ids), {}

        for (t, c), pred in out.preds.items():
            ids_pred, modality = out.ids_pred[t, c], self.config.modalities[t]
            modality = modality.with_shape_of(inputs[t])
            original = modality.normalize(modality.patchify(inputs[t])).float()     # (B, N, P)
            if self.config.norm_pix:
                mean, std = patch_stats(gather_tokens(original, ids_pred))
                pred = pred * std + mean

            empty, keep = torch.full_like(original, math.nan), out.ids_keep[t]
            visible = scatter_tokens(empty, keep, gather_tokens(original, keep))
            predicted = scatter_tokens(original if t == c else empty, ids_pred, pred.float())
            clips[t, c] = Reconstruction(*(
                modality.unpatchify(x) * modality.std + modality.mean
                for x in (original, visible, predicted)))

        return clips


def check_pretraining(config):
    """Raise UserError if a PretrainConfig cannot be trained."""
    modalities, objective = config.modalities, config.objective
    check(
        objective in OBJECTIVES,
        f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    check(
        any(config.decoder_passes),
        f"objective {objective} has no target among the modalities "
        f"({', '.join(modalities) or 'none'})")
    check(
        config.allow_uncoupled or len(modalities) == 1
        or not config.encoder == config.decoder == "separate",
        "a separate encoder with a separate decoder is two uncoupled autoencoders (Sec. 3.3): "
        "choose another decoder, or set --allow-uncoupled")

    for m, modality in modalities.items():
        check(
            0 < modality.num_masked < modality.num_tokens,
            f"mask ratio {modality.mask_ratio} masks {modality.num_masked} of "
            f"{modality.num_tokens} {m} tokens: some must be masked and some visible")

    for target_to_context in config.decoder_passes:
        for target, context in target_to_context.items():
            if target != context:
                check_inpainting(config, target, context)


def check_inpainting(config, target, context):
    """Raise UserError if a PretrainConfig cannot predict `target` from `context`."""
    modalities = config.modalities
    check(
        context in modalities,
        f"objective {config.objective} predicts one modality from the other: it needs both")
    check(
        config.encoder not in ("separate", "shared"),
        f"inpainting needs an early or mid encoder: with a {config.encoder} encoder the tokens of "
        "one modality hold nothing of the other, which they must predict (Sec. 3.4)")

    visible = modalities[context].num_tokens - modalities[context].num_masked
    check(
        visible < modalities[target].num_tokens,
        f"inpainting puts the {visible} visible {context} tokens first in the sequence of "
        f"{modalities[target].num_tokens} {target} tokens: mask more {context}")


# ---------------------------------------------------------------------------------------------
# Finetuning: MBT and classification (Sec. 4.1)


@dataclass(frozen=True)
class ClassifierConfig:
    """A finetuning model: MBT, or a pretraining encoder as it is (Table 14)."""

    modalities: dict = field(default_factory=lambda: dict(MODALITIES))
    size: TransformerConfig = MODEL_SIZES["base"][0]
    encoder: str = "mbt"  # or a key of FUSION
    fusion_layer: int = 8  # first layer of MBT with bottleneck tokens
    num_bottlenecks: int = 4
    joint_layers: int = 2  # S of a mid encoder
    drop_path: float = 0.0  # stochastic depth of the last block
    modality_embed: bool = False
    num_classes: tuple = (309,)  # of each head, side by side; EPIC-Kitchens: verbs, nouns
    num_segments: int = 1  # segments with their own logits; AVE: 10 (Table 8)


class MBT(nn.Module):
    """Multimodal bottleneck transformer: blocks per modality and one final norm.

    From `fusion_layer` on, modalities exchange information through a few bottleneck tokens z.
    With one modality it is a plain ViT.

        [x_m^(l+1) ; z_m^(l+1)] = Block_m^l([x_m^l ; z^l]),    z^(l+1) = mean over m of z_m^(l+1)
    """

    def __init__(self, config):
        super().__init__()
        size, fusion_layer = config.size, config.fusion_layer
        check(
            0 <= fusion_layer <= size.depth,
            f"fusion_layer must be between 0 and {size.depth} ({size.depth} disables fusion), got "
            f"{fusion_layer}")

        rates = drop_path_rates(config.drop_path, size.depth)
        self.blocks = nn.ModuleDict(
            {m: nn.ModuleList(Block(size, rate) for rate in rates) for m in config.modalities})
        self.norm = nn.LayerNorm(size.width, eps=NORM_EPS)

        self.depth = size.depth
        self.fusion_layer = fusion_layer if len(config.modalities) > 1 else size.depth
        if self.fusion_layer < size.depth:
            self.bottleneck = nn.Parameter(0.02 * torch.randn(config.num_bottlenecks, size.width))

    def forward(self, x):
        """Transform tokens {m: (B, N, D)} -> same."""
        for layer in range(self.fusion_layer):
            x = {m: self.blocks[m][layer](x[m]) for m in x}

        if self.fusion_layer < self.depth:
            z = self.bottleneck.expand(len(next(iter(x.values()))), -1, -1)         # (B, Z, D)

        for layer in range(self.fusion_layer, self.depth):
            xz = {m: torch.cat([x[m], z], dim=1) for m in x}            # {m: (B, N + Z, D)}
            xz = {m: self.blocks[m][layer](xz[m]) for m in x}
            x = {m: xz[m][:, : -z.shape[1]] for m in x}
            z = torch.stack([xz[m][:, -z.shape[1] :] for m in x]).mean(0)

        return {m: self.norm(x[m]) for m in x}

    def blocks_for(self, modality):
        """Return the blocks that a modality's tokens pass through, in order."""
        return list(self.blocks[modality])


def segment_bounds(num_patches, num_frames, patch, num_segments):
    """Return (first, last + 1) of the patches in time whose center lies in each segment.

    Raises UserError if a segment has no patch.
    """
    centers = [(i + 0.5) * patch / num_frames for i in range(num_patches)]  # in (0, 1)
    segments = [int(center * num_segments) for center in centers]
    check(
        set(segments) == set(range(num_segments)),
        f"{num_patches} patches in time leave one of {num_segments} segments empty: use longer "
        "clips or smaller patches")
    return [(segments.index(k), num_patches - segments[::-1].index(k)) for k in range(num_segments)]


class Classifier(nn.Module):
    """Patch embeddings, an encoder (MBT, or that of pretraining), mean pooling, a shared head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        check(config.modalities, "a classifier needs at least one modality")
        if config.num_segments > 1:
            for x in config.modalities.values():
                segment_bounds(x.grid[0], x.shape[0], x.patch[0], config.num_segments)

        self.patch_embed = nn.ModuleDict({
            m: PatchEmbed(modality, config.size.width, config.modality_embed)
            for m, modality in config.modalities.items()})
        self.encoder = MBT(config) if config.encoder == "mbt" else MultimodalTransformer(
            config.encoder, config.size, config.modalities, config.joint_layers, config.drop_path)
        self.head = linear(config.size.width, sum(config.num_classes), nn.init.zeros_)

    def forward(self, inputs):
        """Return logits {m: (B, C)}, or {m: (B, segments, C)}; inputs as for AVMAE.

        C counts the classes of all heads. At test time the logits are averaged over modalities; in
        training each modality has its own loss.
        """
        return {m: self.head(x) for m, x in self.features(inputs).items()}

    def features(self, inputs, pool=True):
        """Return pooled features {m: (B, [segments,] D)}, or all tokens {m: (B, N, D)}."""
        tokens = self.encoder({
            m: embed(embed.modality.patchify(inputs[m]))                # (B, N, D)
            for m, embed in self.patch_embed.items() if m in inputs})

        if not pool:
            return tokens
        if self.config.num_segments == 1:
            return {m: x.mean(1) for m, x in tokens.items()}            # {m: (B, D)}
        return {m: self.pool_segments(m, x, inputs[m].shape[1]) for m, x in tokens.items()}

    def pool_segments(self, modality, x, num_frames):
        """Average tokens over the segment their center lies in: (B, N, D) -> (B, segments, D)."""
        patch = self.config.modalities[modality].patch[0]
        x = x.float().unflatten(1, (num_frames // patch, -1)).mean(2)   # (B, patches in time, D)
        bounds = segment_bounds(x.shape[1], num_frames, patch, self.config.num_segments)
        return torch.stack([x[:, first:end].mean(1) for first, end in bounds], dim=1)


# ---------------------------------------------------------------------------------------------
# From pretraining to finetuning


def matching_modules(source, target, m):
    """Yield (description, modules of an AVMAE, modules of a Classifier) that stream m copies."""
    known, wanted = source.config.modalities, target.config.modalities
    check(m in wanted, f"there is no stream {m!r}: choose from {', '.join(wanted)}")
    source_modality = m if m in known else next(iter(known))

    if m in known:
        a, b = known[m].patch, wanted[m].patch
        check(a == b, f"the pretrained model has {m} patches of {a}, this one of {b}")
        yield f"{m} patch embedding", [source.patch_embed[m]], [target.patch_embed[m]]

    old, new = source.encoder.blocks_for(source_modality), target.encoder.blocks_for(m)
    yield f"{len(old)} {m} blocks from {source_modality}", old, new

    layers = source.encoder.layers_for(source_modality)
    if target.config.encoder == "mbt":
        if source.encoder.modes[-1] != "separate":
            yield "final norm", [layers[-1].norm], [target.encoder.norm]
        return

    depths = [[len(x.blocks) for x in y] for y in (layers, target.encoder.layers_for(m))]
    check(
        depths[0] == depths[1],
        f"the pretrained encoder is {source.config.encoder}, this one {target.config.encoder}")
    yield f"{m} norms", [x.norm for x in layers], [x.norm for x in target.encoder.layers_for(m)]


def transfer(source, target, streams=None):
    """Initialize a Classifier from an AVMAE in place (Sec. 4.1, Table 3).

    streams: modalities of `target` to initialize; None for all. A stream that the source lacks
    gets the blocks of the source's first modality and keeps its new patch embedding. MBT's single
    final norm is copied from the encoder, except for separate encoders, which have one per
    modality. The norms before mid fusion's joint layers are not used.

    Returns a list of what was copied and the names of the parameters that keep their
    initialization. Raises UserError if sizes, patches or layers differ.
    """
    a, b = source.config.size, target.config.size
    check(a == b, f"the pretrained model has {a}, this one {b}: they must be equal (--size)")
    copied, ids = [], set()

    for m in streams or target.config.modalities:
        for description, old_modules, new_modules in matching_modules(source, target, m):
            copied.append(description)
            for old, new in zip(old_modules, new_modules, strict=True):
                state = old.state_dict()
                missing = ", ".join(new.state_dict().keys() - state.keys())
                check(not missing, f"{description}: the pretrained model has no {missing}")
                new.load_state_dict({name: state[name] for name in new.state_dict()})
                ids.update(map(id, new.parameters()))

    return copied, [name for name, p in target.named_parameters() if id(p) not in ids]


# ---------------------------------------------------------------------------------------------
# Checkpoints: {"config": plain dict, "model": state_dict, ...}


def config_to_dict(config):
    """Return a config as plain dicts, lists, numbers and strings."""
    return {"kind": type(config).__name__, **json.loads(json.dumps(asdict(config)))}


def config_from_dict(values):
    """Invert `config_to_dict`."""

    def to_tuples(x):  # JSON has none
        if isinstance(x, dict):
            return {name: to_tuples(y) for name, y in x.items()}
        return tuple(map(to_tuples, x)) if isinstance(x, list) else x

    values = to_tuples(values)
    kind = values.pop("kind")
    for name in {"size", "decoder_size"} & values.keys():
        values[name] = TransformerConfig(**values[name])
    values["modalities"] = {m: Modality(**x) for m, x in values["modalities"].items()}

    return {"PretrainConfig": PretrainConfig, "ClassifierConfig": ClassifierConfig}[kind](**values)


def build_model(config):
    """Return the model of a config."""
    return (AVMAE if isinstance(config, PretrainConfig) else Classifier)(config)


def save_model(model, path, **extra):
    """Save weights and config in one file that `load_model` reads.

    The file is complete or absent, never partial. Raises UserError if the disk is full.
    """
    content = {"config": config_to_dict(model.config), "model": model.state_dict(), **extra}
    partial = pathlib.Path(f"{path}.partial")
    try:
        torch.save(content, partial)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"could not save {path}: {str(error).splitlines()[0]}. An earlier file, if any, is "
            "still there") from None


def load_model(path):
    """Return the model of a checkpoint in eval mode. Raises UserError if it cannot be read."""
    checkpoint = load_checkpoint(path)
    try:
        model = build_model(config_from_dict(checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"{path} was saved by another version of this code: {message}") from None
    return model.eval()


def load_checkpoint(path):
    """Return a checkpoint as a dict {"config", "model", ...}. No code from the file is run.

    Raises UserError if it cannot be read or is not a checkpoint of this project.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception:  # damaged or foreign files raise many kinds
        checkpoint = None

    check(
        isinstance(checkpoint, dict) and {"config", "model"} <= checkpoint.keys(),
        f"{path} is not a checkpoint of this project. Convert weights of the authors, timm, "
        "Hugging Face, MAE or VideoMAE with python tools/convert_weights.py FILE OUT.pt")
    return checkpoint
