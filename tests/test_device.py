"""Run steps of both scripts on fake CUDA tensors, which have a shape and a device but no numbers.

No GPU is needed. A tensor on the wrong device is an error, and so is a line that waits for the GPU.
"""

import ast
import inspect

import pytest
import torch
from torch._subclasses import FakeTensorMode, fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import avmae
import data
import train_finetune
import train_pretrain

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="torch without CUDA")

CUDA = torch.device("cuda", 0)
FUSED_SGD = torch.ops.aten._fused_sgd_
COPIES = torch.ops.aten._to_copy, torch.ops.aten.copy_
NOTICED = (  # raised by `Watch` and by fake tensors
    AssertionError, RuntimeError, fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException)
CLIP = ["--frames", "4", "--image", "32", "--seconds", "0.64"]


class Watch(TorchDispatchMode):
    """Raise an error for anything that makes the host wait for a GPU, and for float64 on a GPU."""

    def __init__(self, pinned=True):
        super().__init__()
        self.pinned = pinned  # copies to the GPU must come from pinned memory

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, func.overloadpacket
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if packet is FUSED_SGD:  # torch has no fake implementation
            assert {x.device for x in given} == {CUDA}
            return None

        result = func(*args, **kwargs)
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        assert not any(x.is_cuda and x.dtype == torch.float64 for x in made), f"{func}: float64"

        if packet in COPIES:
            source = given[-1] if packet is torch.ops.aten.copy_ else given[0]
            if source.device != made[0].device:
                non_blocking = kwargs.get("non_blocking") or args[2:] == (True,)
                assert made[0].is_cuda and non_blocking, f"{func}: the host waits"
                # torch copies a strided tensor through pageable memory.
                assert source.is_contiguous(), f"{func}: the host waits, strided"
                assert not self.pinned or hasattr(source, "pinned"), f"{func}: the host waits"
        else:
            assert len({x.device for x in given if x.ndim}) < 2, f"{func}: two devices"
        return result


def pin_memory(x):
    """Return a pinned copy with the same strides, as torch does."""
    pinned = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    pinned.pinned = True
    return pinned


def backward(loss):
    """Run the backward pass in Python: autograd's engine needs a driver, and there is none."""
    order, seen, todo = [], set(), [(loss.grad_fn, False)]
    while todo:
        node, done = todo.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            todo += [(node, True), *((f, False) for f, _ in node.next_functions if f)]

    grads = {loss.grad_fn: {0: torch.ones_like(loss)}}
    for node in reversed(order):
        own = grads.pop(node)
        values = node(*(own.get(i) for i in range(max(own) + 1)))
        values = values if isinstance(values, tuple) else (values,)
        for (f, i), x in zip(node.next_functions, values):
            if f and x is not None:
                like, others = f._input_metadata[i], grads.setdefault(f, {})
                assert x.device == like.device
                x = x.sum_to_size(tuple(like.shape)).to(like.dtype)
                others[i] = others[i] + x if i in others else x


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    """Make all tensors fake, and autocast believe that there is a GPU."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    # It draws until all numbers are in range.
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda *_, **__: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def body(script, change=("", "")):
    """Compile the step in a script's training loop, up to its log; change: (old, new text)."""
    source = inspect.getsource(script)
    assert change[0] in source
    loop = next(
        x for x in ast.walk(ast.parse(source.replace(*change)))
        if isinstance(x, ast.For) and ast.unparse(x.iter) == "progress")
    end = next(i for i, x in enumerate(loop.body) if "log.record(" in ast.unparse(x))
    return compile(ast.Module(loop.body[:end], []), script.__file__, "exec")


def batch_of(config, count, labels=1):
    """Return a batch as from a loader, with all but the index on the GPU."""
    video, audio = (x.shape for x in config.modalities.values())
    return {
        "video": torch.zeros(count, *video, 3, dtype=torch.uint8, device=CUDA),
        "audio": torch.zeros(count, *audio, device=CUDA),
        "label": torch.zeros(count, labels, dtype=torch.int64, device=CUDA),
        "index": torch.arange(count)}


def start(script, argv, tmp_path, more=()):
    """Return a script's settings, run and model; more: classes and task of a classifier."""
    args = script.parse_args([*CLIP, *argv, "--device", "cpu", "--out", str(tmp_path)])
    run = train_pretrain.Run(args)
    run.device, run.autocast = CUDA, torch.autocast("cuda", torch.bfloat16)
    with CUDA:
        return args, run, avmae.build_model(script.make_config(args, *more))


def step(script, tmp_path, argv=(), task="single_label", num_classes=(5,), change=("", "")):
    """Run two steps of a script, the second with an optimizer state; return all its names."""
    pretraining = script is train_pretrain
    recipe = [] if pretraining else ["--drop-path", "0.5", "--smoothing", "0.1"]
    flags = ["--batch", "4", "--micro-batch", "2", *recipe, *argv]
    args, run, model = start(script, flags, tmp_path, () if pretraining else (num_classes, task))
    optimizer = (
        torch.optim.AdamW(script.decay_groups(model, 0.05), betas=(0.9, 0.95), fused=True)
        if pretraining else script.make_optimizer(model.train(), args.layer_decay))
    labels = {"verb_noun": 2, "segments": 10}.get(task, 1)
    names = vars(script) | {
        "args": args, "run": run, "model": model, "net": model, "optimizer": optimizer,
        "batches": iter([batch_of(model.config, 2, labels) for _ in range(4)]), "warmup": 2.0,
        "steps": 8, "peak": 0.1, "task": task, "num_classes": num_classes, "alpha": 0.5,
        "loss_type": "sigmoid" if task == "multi_label" else "softmax",
        "heads": num_classes if task == "verb_noun" else None}

    code = body(script, change)
    with Watch():
        for names["step"] in 1, 2:
            exec(code, names)
    return names


@pytest.mark.parametrize(
    "argv", [[], ["--objective", "joint_inpaint", "--norm-pix", "--mask-video", "0.9"]], ids=str)
def test_pretraining_step_does_not_wait(tmp_path, argv, monkeypatch):
    drawn, draw = [], avmae.random_masking
    monkeypatch.setattr(
        avmae, "random_masking",
        lambda modalities, batch, generator, rows: drawn.append(
            (generator.initial_seed(), batch, rows)) or draw(modalities, batch, generator, rows))
    names = step(train_pretrain, tmp_path, argv)

    assert drawn == [(k, 4, slice(0, 4)) for k in (1, 2)]  # once per step, for the global batch
    losses, pred = names["losses"], names["out"].preds["video", "video"]
    assert losses.device == CUDA and losses.dtype == torch.float32
    assert pred.dtype == torch.bfloat16 and not pred.requires_grad
    assert names["out"].ids_mask["video"].shape[0] == 2  # a micro-batch takes its rows
    assert all(p in names["optimizer"].state for p in names["model"].parameters())


@pytest.mark.parametrize(
    "task, num_classes",
    [("single_label", (5,)), ("multi_label", (5,)), ("verb_noun", (3, 4)), ("segments", (5,))])
def test_finetuning_step_does_not_wait(tmp_path, task, num_classes, monkeypatch):
    seeds, original = [], train_finetune.apply_mixup
    monkeypatch.setattr(
        train_finetune, "apply_mixup", lambda *x: seeds.append(x[3]) or original(*x))
    long = ["--frames", "20", "--seconds", "1.6"]  # AVE needs 10 patches in time
    names = step(train_finetune, tmp_path, ["--fusion-layer", "1", *long], task, num_classes)

    assert seeds == [(0, k, micro) for k in (1, 2) for micro in (0, 1)]  # (seed, step, micro-batch)
    assert names["total"].device == CUDA and names["total"].dtype == torch.float32
    assert names["inputs"]["video"].is_floating_point()  # after mixup
    assert {x.dtype for x in names["logits"].values()} == {torch.bfloat16}
    assert names["optimizer"].found_inf.device == CUDA
    if task == "segments":
        tokens = torch.zeros(2, 160, 96, dtype=torch.bfloat16, device=CUDA)  # 10 x 4 x 4 patches
        pooled = names["model"].pool_segments("video", tokens, 20)
        assert pooled.shape == (2, 10, 96) and pooled.dtype == torch.float32


def waits(x):
    """Assert that each of these lines is noticed; x () is on the GPU, other tensors on the CPU."""
    cpu, row = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    strided = torch.zeros(2, 4)[:, :2].pin_memory()
    for line in (
        x.item, x.tolist, x.isfinite().__bool__, x.cpu, x.double, x.nonzero,
        lambda: x.to("cpu", non_blocking=True), lambda: x + cpu, lambda: x[None][row],
        lambda: cpu.to(CUDA), lambda: cpu.to(CUDA, non_blocking=True), lambda: x[None].copy_(cpu),
        lambda: cpu.pin_memory().to(CUDA), lambda: strided.to(CUDA, non_blocking=True)):
        with pytest.raises(NOTICED):
            line()
    cpu.pin_memory().to(CUDA, non_blocking=True)


TO_DEVICE = "masks = run.to_device(masks)"
STRIDED = TO_DEVICE.replace(
    "(masks)", "([{m: x[:, : x.shape[1] - 1] for m, x in ids.items()} for ids in masks])")


@pytest.mark.parametrize(
    "script, old, new, message",
    [
        (train_pretrain, "optimizer.step()", "norm.item(); optimizer.step()", None),
        (train_finetune, "optimizer.step()", "norm.item(); optimizer.step()", None),
        (train_pretrain, TO_DEVICE, "pass", None),
        (train_pretrain, TO_DEVICE, STRIDED, "strided"),
        (train_finetune, 'batch["label"], num', 'batch["label"].cpu(), num', None)],
    ids=lambda x: getattr(x, "__name__", "x"))
def test_a_mistake_in_a_step_is_noticed(tmp_path, monkeypatch, script, old, new, message):
    with pytest.raises(NOTICED, match=message):
        step(script, tmp_path, change=(old, new))

    if "norm" in new:
        monkeypatch.setattr(script, "waits", waits, raising=False)
        step(script, tmp_path, change=(old, "waits(norm); optimizer.step()"))


@pytest.mark.parametrize("script, more", [(train_pretrain, ()), (train_finetune, ((5,),))])
def test_evaluation_runs_on_the_gpu(tmp_path, script, more):
    _, run, model = start(script, [], tmp_path, more)
    model.eval()
    batch = batch_of(model.config, 4)
    inputs = {m: batch[m] for m in model.config.modalities}

    with Watch(), torch.no_grad(), run.autocast:
        if more:
            inputs = {m: x.unflatten(0, (2, 2)) for m, x in inputs.items()}
            result = script.predict(model, inputs, views=2)
            assert result.shape == (2, 5)
        else:
            masks = run.to_device(avmae.random_masking(model.config.modalities, 4))
            result = model(inputs, masks).loss
    assert result.device == CUDA and result.dtype == torch.float32


@pytest.mark.parametrize("color", [True, False])
def test_a_batch_is_copied_from_pinned_memory(color):
    loader = data.Loader([], [])
    loader.device = CUDA
    batch = {
        "video": torch.zeros(2, 4, 32, 32, 3, dtype=torch.uint8), "label": torch.zeros(2, 1),
        "audio": torch.zeros(2, 64, 32), "index": torch.arange(2)}
    batch = {k: x.pin_memory() for k, x in batch.items()}
    if color:
        with fake_tensor.unset_fake_temporarily():
            batch["color"] = torch.tensor(
                [[1.0, 0.1, 1.2, 0.8, 0.1, 0.0], [0.0, 0.0, 1.0, 1.0, 0.0, 1.0]])

    with Watch(pinned=not color):  # torchvision copies a table of 18 numbers
        result = loader.to_device(batch)
    assert {k: x.device.type for k, x in result.items()} == {
        "video": "cuda", "audio": "cuda", "label": "cuda", "index": "cpu"}
    assert result["video"].dtype == torch.uint8 and result["video"].shape == (2, 4, 32, 32, 3)
