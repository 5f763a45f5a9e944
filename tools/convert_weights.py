"""Convert published weights to a checkpoint of this project.

    python tools/convert_weights.py FILE OUT.pt

FILE is an AV-MAE or MBT of the paper's authors (Flax msgpack, old or new layout), a ViT with the
parameter names of timm or Hugging Face (.pth, .bin, .safetensors), or a release of MAE or VideoMAE.
OUT.pt holds a complete model: parts that FILE lacks, such as a ViT's decoder, are initialized with
a fixed seed. Prints what was assumed, changed, left out and initialized. No code from FILE is run.
"""

import argparse
import pathlib
import re
import sys
from dataclasses import replace

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import avmae  # noqa: E402
from avmae import AUDIO, MODALITIES, VIDEO, UserError, check  # noqa: E402


def convert(path, **assume):
    """Return the model of a file in eval mode, and notes on what was assumed or changed.

    assume: settings that parameters do not tell, see `official_config`; None if unknown.
    Raises UserError if the file cannot be read safely or has unknown parameters.
    """
    content, assume = read(path), {k: v for k, v in assume.items() if v is not None}
    try:
        check("'kind':" not in str(content.get("config")), "it is a checkpoint of this project")
        for key in "model", "state_dict", "module":
            content = content.get(key, content)
        state = {str(name): x.detach().float() for name, x in content.items() if torch.is_tensor(x)}

        official = any(name.startswith("Transformer") for name in state)
        config, state, notes = (from_official if official else from_vit)(state, **assume)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = avmae.build_model(config)
        missing, unexpected = model.load_state_dict(state, strict=False)
        initialized = [x for x in missing if re.match(r"decoder|mask_token|encoder.*all\.norm", x)]
        unknown = sorted({*missing, *unexpected}.difference(initialized))
        check(not unknown, f"{', '.join(unknown[:3])} of {len(unknown)} parameters do not match")
    except UserError as error:
        raise UserError(f"{path} cannot be converted: {error}") from None
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError):
        raise UserError(f"{path} has parameters of unknown names or shapes") from None

    parts = {rename(x, {r"^encoder.*": "encoder norm", r"\..*": ""}) for x in initialized}
    return model.eval(), notes + [f"initialized: {', '.join(sorted(parts)) or 'nothing'}"]


def rename(name, table):
    """Apply all replacements of a table {pattern: replacement} in order."""
    for pattern, replacement in table.items():
        name = re.sub(pattern, replacement, name)
    return name


class Ignored:
    """Stand in for a Python object beside the weights, without its content."""

    def __init__(self, *args):
        """Drop the content."""

    __setstate__ = __init__


IGNORED = [(Ignored, name) for name in (
    "argparse.Namespace", "pathlib.PosixPath", "pathlib._local.PosixPath",  # settings
    "numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")]


def read(path):
    """Return the content of a torch (zip or legacy), safetensors or Flax file, or UserError."""
    try:
        with open(path, "rb") as file:
            start = file.read(2)

        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file
            return load_file(path)

        if start != b"PK" and start[:1] != b"\x80":  # neither a zip nor a pickle
            return read_flax(path)
        with torch.serialization.safe_globals(IGNORED):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except ImportError as error:
        raise UserError(f"reading {path} needs a package: pip install {error.name}") from None
    except Exception as error:  # parsers raise many kinds on damaged bytes
        unsafe = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it holds a Python object, {unsafe[1]}" if unsafe else "it is damaged or unknown"
        raise UserError(f"cannot read {path} safely: {reason}. Save a state dict instead") from None


def read_flax(path):
    """Return {"a/b/c": tensor} of a msgpack file in Flax's old or new layout."""
    import msgpack

    def array(code, data):
        shape, dtype, values = msgpack.unpackb(data)
        return torch.frombuffer(bytearray(values), dtype=getattr(torch, dtype)).reshape(shape)

    def flatten(tree, prefix=""):
        for name, x in tree.items():
            at = f"{prefix}{name}"
            yield from flatten(x, f"{at}/") if isinstance(x, dict) else [(at, x)]

    tree = msgpack.unpackb(pathlib.Path(path).read_bytes(), ext_hook=array, strict_map_key=False)
    for key in "optimizer", "target", "params":
        tree = tree.get(key, tree)
    return dict(flatten(tree))


# ---------------------------------------------------------------------------------------------
# The authors' models (scenic)

OFFICIAL_HEAD = "ProjectionHeadAndClassifier_0/output_projection"
OFFICIAL_MODALITIES = {"video": "rgb", "audio": "spectrogram"}
OFFICIAL = {  # our name -> path in the file
    r"\.video": "_rgb", r"\.audio": "_spectrogram", r"^patch_embed(\w+)\.proj": r"embedding\1",
    r"^patch_embed(\w+)\.modality_embed": r"Encoder_modality_token\1",
    r"^decoder_modality_embed": "Decoder_modality_token",
    r"^decoder_embed": "decoder_projection", r"^decoder_pred": "output_projection",
    r"^head": OFFICIAL_HEAD, r"^encoder\.bottleneck": "bottleneck",
    r"^encoder\.": "Transformer.", r"^decoder\.": "Decoder.",
    r"\.stages\.0(\.all)?": "", r"\.stages\.1\.all": "_concat",
    r"\.blocks(\w*)\.(\d+)": r".encoderblock_\2\1",
    r"(norm\d?)\.weight": r"\1.scale", r"\.weight": ".kernel",
    r"\.norm1": ".LayerNorm_0", r"\.norm2": ".LayerNorm_1", r"\.norm\.": ".encoder_norm.",
    r"attn\.": "MultiHeadDotProductAttention_0.", r"_0\.proj": "_0.out",
    r"mlp\.fc1": "MlpBlock_0.Dense_0", r"mlp\.fc2": "MlpBlock_0.Dense_1", r"\.": "/",
}
OFFICIAL_ALIASES = {r"^embedding/": "embedding_rgb/", r"_spec/": "_spectrogram/"}


def from_official(params, **assume):
    """Return (config, state dict, notes) of the authors' parameters {"a/b/c": tensor}."""
    params = {rename(path, OFFICIAL_ALIASES): x for path, x in params.items()}
    modalities = {}
    for m, official in OFFICIAL_MODALITIES.items():
        path = f"embedding_{official}/kernel"
        if path in params:                                              # (t, [h,] w, channels, D)
            modalities[m] = replace(MODALITIES[m], patch=tuple(params[path].shape[:-2]))
            if m == "audio":  # equal channels are one with the sum of their weights
                params[path] = params[path].sum(-2)

    config, notes = official_config(params, modalities, **assume)
    wrong = [name for name, value in assume.items() if getattr(config, name, None) != value]
    check(not wrong, f"{', '.join(wrong)} cannot be chosen for this file")
    if isinstance(config, avmae.ClassifierConfig):  # the first modality's blocks do not name it
        first = OFFICIAL_MODALITIES[next(iter(modalities))]
        params = {re.sub(r"(block_\d+)/", rf"\1_{first}/", path): x for path, x in params.items()}
    with torch.device("meta"):
        wanted = avmae.build_model(config).state_dict()
    state = {name: official_tensor(params, name, x.shape) for name, x in wanted.items()}
    return config, state, notes + [f"left out, unused: {', '.join(sorted(params)) or 'nothing'}"]


def official_tensor(params, name, shape):
    """Remove the parameter that we call `name` from the authors' parameters and return it."""
    path = rename(name, OFFICIAL)
    parts = ("query", "key", "value") if "qkv" in path else ("",)
    tensors = [params.pop(path.replace("qkv", part)) for part in parts]
    if path.endswith("kernel"):  # leading axes are inputs: of a patch, of all heads, or one
        tensors = [x.reshape(shape[1], -1).T for x in tensors]
    return torch.cat(tensors).reshape(shape)


def official_size(params, part):
    """Return the size of "Transformer" or "Decoder", its joint layers, and if it is one stack."""
    names = [path for path in params if path.startswith(part)]
    query = [params[path] for path in names if path.endswith("query/kernel")][0]
    mlp_bias = [params[path] for path in names if path.endswith("Dense_0/bias")][0]
    blocks = set(re.findall(rf"({part}\w*)/\w+block_(\d+)", " ".join(names)))
    stacks = [stack for stack, _ in blocks]
    joint = stacks.count(f"{part}_concat")
    depth = joint + max(stacks.count(stack) for stack in stacks if not stack.endswith("_concat"))
    size = avmae.TransformerConfig(query.shape[0], depth, query.shape[1], len(mlp_bias))
    return size, joint, part in stacks


def official_config(
        params, modalities, encoder=None, decoder=None, objective="joint", fusion_layer=None):
    """Return the config and notes. encoder, decoder: early or shared, if there is a single one."""
    size, joint, single = official_size(params, "Transformer")
    if f"{OFFICIAL_HEAD}/bias" in params:
        classes = len(params[f"{OFFICIAL_HEAD}/bias"])
        if fusion_layer is None:
            fusion_layer = 18 if (classes, size.depth) == (527, 24) else size.depth * 2 // 3
        notes = [f"assumed: fusion layer {fusion_layer} of {size.depth}"]
        if classes == 527 and "audio" in modalities:  # AudioSet
            modalities["audio"] = replace(modalities["audio"], mean=1.102, std=2.762)
            notes.append("assumed: spectrograms are normalized by mean 1.102, std 2.762")
        heads = (97, 300) if classes == 397 else (classes,)  # EPIC-Kitchens: verbs and nouns
        config = avmae.ClassifierConfig(modalities, size, "mbt", fusion_layer, num_classes=heads)
        return config, notes

    message = "its single encoder is early or shared: give --encoder early or --encoder shared"
    check(not single or encoder in ("early", "shared"), message)
    encoder = encoder if single else "mid" if joint else "separate"
    decoder_size, _, single = official_size(params, "Decoder")
    decoder = (decoder or "shared") if single else "separate"

    config = avmae.PretrainConfig(
        modalities, size, decoder_size, encoder, decoder, objective, joint or 2,
        allow_uncoupled=True, modality_embed="Encoder_modality_token" in str(params.keys()))
    return config, [f"assumed: encoder {encoder}, decoder {decoder}, objective {objective}"]


# ---------------------------------------------------------------------------------------------
# ViTs: the names of our blocks are those of timm, DeiT, MAE and VideoMAE

VIT = {  # name in the file -> our name
    r"^((module|model|encoder|backbone|vit|videomae)\.)+": "", r"^fc_norm\.": "norm.",
    r"\.attn\.([qv])_bias": r".attn.\1.bias",  # VideoMAE; then Hugging Face, in files or in memory
    r"^embeddings\.patch_embeddings\.projection": "patch_embed.proj", r"^embeddings\.": "",
    r"^layers?\.": "blocks.", r"^layernorm\.": "norm.",
    r"\.attention\.(attention\.)?([qkv])(uery|ey|alue|_proj)?[._]": r".attn.\2.",
    r"\.attention\.(output\.dense|o_proj)\.": ".attn.proj.",
    r"\.intermediate\.dense\.": ".mlp.fc1.", r"\.output\.dense\.": ".mlp.fc2.",
    r"\.layernorm_before\.": ".norm1.", r"\.layernorm_after\.": ".norm2.",
}


def from_vit(state, **assume):
    """Return (config, state dict, notes) of a ViT, which becomes a shared encoder (Tables 6, 9)."""
    check(not assume, f"a ViT becomes a shared encoder: leave out {', '.join(assume)}")
    vit = {rename(name, VIT): x for name, x in state.items()}
    kernel, bias = vit.pop("patch_embed.proj.weight"), vit.pop("patch_embed.proj.bias")
    names = [name for name in vit if name.startswith(("blocks.", "norm."))]
    ours = {f"encoder.stages.0.all.{name}": vit.pop(name) for name in names}

    width, depth = len(bias), len({name.split(".")[1] for name in names if name[0] == "b"})
    for i in range(depth):
        fuse_qkv(ours, f"encoder.stages.0.all.blocks.{i}.attn", width)
    modalities = {}
    for m, (modalities[m], weight) in vit_embeddings(kernel).items():
        ours |= {f"patch_embed.{m}.proj.weight": weight, f"patch_embed.{m}.proj.bias": bias}

    known = {sizes[0].width: sizes for sizes in avmae.MODEL_SIZES.values()}
    encoder, decoder = known.get(width, avmae.MODEL_SIZES["base"])
    heads = encoder.num_heads if width in known else max(1, width // 64)
    mlp_dim = len(ours["encoder.stages.0.all.blocks.0.mlp.fc1.bias"])
    size = avmae.TransformerConfig(width, depth, heads, mlp_dim)
    return avmae.PretrainConfig(modalities, size, decoder, encoder="shared"), ours, [
        f"assumed: {heads} attention heads",
        f"changed: patch embedding {tuple(kernel.shape)} serves {' and '.join(modalities)}",
        "changed: tanh GELU and LayerNorm epsilon 1e-6; most ViTs were trained with the erf GELU",
        f"left out: {', '.join(sorted({name.split('.')[0] for name in vit})) or 'nothing'}"]


def fuse_qkv(state, attn, width):
    """Merge q, k and v into one layer; a missing bias is 0 (VideoMAE has none for k)."""
    if f"{attn}.q.weight" in state:
        weights = [state.pop(f"{attn}.{part}.weight") for part in "qkv"]
        state[f"{attn}.qkv.weight"] = torch.cat(weights)
    biases = [state.pop(f"{attn}.{part}.bias", torch.zeros(width)) for part in "qkv"]
    state.setdefault(f"{attn}.qkv.bias", torch.cat(biases))


def vit_embeddings(kernel):
    """Return {m: (Modality, weight (D, P))} of a kernel (D, channels, [t,] h, w)."""
    if kernel.ndim == 4:  # an image's weights go to the second frame of the tubelet
        kernel = torch.nn.functional.pad(kernel[:, :, None], (0, 0, 0, 0, 1, VIDEO.patch[0] - 2))
    _, channels, *patch = kernel.shape
    video = replace(VIDEO, patch=tuple(patch)), kernel.permute(0, 2, 3, 4, 1).flatten(1)
    audio = replace(AUDIO, patch=tuple(patch[1:])), kernel.sum((1, 2)).flatten(1)
    if AUDIO.shape[1] % patch[2]:  # patches of 14x14 do not tile 128 mel bins
        return {"video": video}
    return {"audio": audio} if channels == 1 else {"video": video, "audio": audio}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("file", metavar="FILE"), add("out", metavar="OUT.pt")
    for part in "encoder", "decoder":
        add(f"--{part}", choices=("early", "shared"), help=f"kind of the authors' single {part}")
    add("--objective", choices=avmae.OBJECTIVES, help="the authors' objective (default: joint)")
    add("--fusion-layer", type=int, metavar="N", help="first fused layer of the authors' MBT")

    args = vars(parser.parse_args())
    path, out = args.pop("file"), args.pop("out")
    try:
        check(pathlib.Path(path).resolve() != pathlib.Path(out).resolve(), "OUT.pt is FILE itself")
        model, notes = convert(path, **args)
        avmae.save_model(model, out)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(*notes, f"saved {out}", sep="\n")


if __name__ == "__main__":
    main()
