"""One step of each script on fake CUDA tensors: they have a device and a shape, no numbers, and
need no GPU. A tensor on the wrong device, or a line at which the host would wait, is an error."""

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
NOTICED = (  # by `Watch` and by fake tensors
    AssertionError, RuntimeError, fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException)
CLIP = ["--frames", "4", "--image", "32", "--seconds", "0.64"]


class Watch(TorchDispatchMode):
    """Lets pass what a GPU does without making the host wait; and no float64, which others lack."""

    def __init__(self, pinned=True):
        super().__init__()
        self.pinned = pinned  # whether all that is copied to the GPU must be in pinned memory

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, func.overloadpacket
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if packet is FUSED_SGD:  # torch has no fake of it
            assert {x.device for x in given} == {CUDA}
            return None

        result = func(*args, **kwargs)
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        assert not any(x.is_cuda and x.dtype == torch.float64 for x in made), f"{func}: float64"

        if packet in COPIES:
            source = given[-1] if packet is torch.ops.aten.copy_ else given[0]
            if source.device != made[0].device:
                later = kwargs.get("non_blocking") or args[2:] == (True,)
                pinned = not self.pinned or hasattr(source, "pinned")
                assert made[0].is_cuda and later and pinned, f"{func}: the host waits"
        else:
            assert len({x.device for x in given if x.ndim}) < 2, f"{func}: two devices"
        return result


def pin_memory(x):
    x = x.clone()
    x.pinned = True
    return x


def backward(loss):
    """What autograd's engine does; it asks the driver for a device, and there is none."""
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
        found = node(*(own.get(i) for i in range(max(own) + 1)))
        found = found if isinstance(found, tuple) else (found,)
        for (f, i), x in zip(node.next_functions, found):
            if f and x is not None:
                like, others = f._input_metadata[i], grads.setdefault(f, {})
                assert x.device == like.device
                x = x.sum_to_size(tuple(like.shape)).to(like.dtype)
                others[i] = others[i] + x if i in others else x


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    """Inside, tensors have no numbers; autocast believes that there is a GPU."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    # which draws until all fits
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda *_, **__: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def body(script, change=("", "")):
    """The step in the loop of a script, compiled: all up to its report; with a change of text."""
    source = inspect.getsource(script)
    assert change[0] in source
    loop = next(
        x for x in ast.walk(ast.parse(source.replace(*change)))
        if isinstance(x, ast.For) and ast.unparse(x.iter) == "bar")
    end = next(i for i, x in enumerate(loop.body) if "log.note(" in ast.unparse(x))
    return compile(ast.Module(loop.body[:end], []), script.__file__, "exec")


def batch_of(config, count, labels=1):
    """A batch as a loader gives it: bytes, numbers and labels on the GPU, the index not."""
    video, audio = (x.shape for x in config.modalities.values())
    return {
        "video": torch.zeros(count, *video, 3, dtype=torch.uint8, device=CUDA),
        "audio": torch.zeros(count, *audio, device=CUDA),
        "label": torch.zeros(count, labels, dtype=torch.int64, device=CUDA),
        "index": torch.arange(count)}


def run_of(script, argv, tmp_path):
    args = script.parse_args([*CLIP, *argv, "--device", "cpu", "--out", str(tmp_path)])
    run = train_pretrain.Run(args)
    run.device, run.autocast = CUDA, torch.autocast("cuda", torch.bfloat16)
    return args, run


def step(script, tmp_path, argv=(), task="single", num_classes=(5,), change=("", "")):
    """Runs a step of a script -> all names after it. Twice, as the second finds an optimizer's
    state."""
    pretraining = script is train_pretrain
    recipe = [] if pretraining else ["--drop-path", "0.5", "--smoothing", "0.1"]
    flags = ["--batch", "4", "--micro-batch", "2", *recipe, *argv]
    args, run = run_of(script, flags, tmp_path)
    with CUDA:
        model = avmae.build(script.config_of(args, *(() if pretraining else (num_classes, task))))

    optimizer = (
        torch.optim.AdamW(
            script.decay_groups(model, script.WEIGHT_DECAY), betas=(0.9, 0.95), fused=True)
        if pretraining
        else script.make_optimizer(model.train(), args))
    labels = {"epic": 2, "ave": 10}.get(task, 1)
    names = vars(script) | {
        "args": args, "run": run, "model": model, "net": model, "optimizer": optimizer,
        "batches": iter([batch_of(model.config, 2, labels) for _ in range(4)]), "warmup": 2.0,
        "count": 2, "steps": 8, "peak": 0.1, "task": task, "num_classes": num_classes, "alpha": 0.5,
        "kind": "sigmoid" if task == "many" else "softmax",
        "heads": num_classes if task == "epic" else None}

    code = body(script, change)
    with Watch():
        for names["step"] in 1, 2:
            exec(code, names)
    return names


@pytest.mark.parametrize(
    "argv",
    [[], ["--objective", "joint_inpaint", "--norm-pix", "--modality-embed", "--mask-video", "0.9"]],
    ids=str)
def test_a_step_of_pretraining_makes_no_gpu_wait(tmp_path, argv, monkeypatch):
    drawn, draw = [], avmae.random_masking
    monkeypatch.setattr(
        avmae, "random_masking",
        lambda modalities, batch, generator, rows: drawn.append(
            (generator.initial_seed(), batch, rows)) or draw(modalities, batch, generator, rows))
    names = step(train_pretrain, tmp_path, argv)

    # Each step has masks of its own, each pass its rows of those of the whole batch.
    assert drawn == [(k, 4, slice(row, row + 2)) for k in (1, 2) for row in (0, 2)]
    losses = names["losses"]
    assert losses.device == CUDA and losses.dtype == torch.float32
    assert names["out"].preds["video", "video"].dtype == torch.bfloat16
    assert all(p in names["optimizer"].state for p in names["model"].parameters())


@pytest.mark.parametrize(
    "task, num_classes", [("single", (5,)), ("many", (5,)), ("epic", (3, 4)), ("ave", (5,))])
def test_a_step_of_finetuning_makes_no_gpu_wait(tmp_path, task, num_classes, monkeypatch):
    seeds, mixed = [], train_finetune.mixed
    monkeypatch.setattr(train_finetune, "mixed", lambda *x: seeds.append(x[3:]) or mixed(*x))
    long = ["--frames", "20", "--seconds", "1.6"]  # AVE needs 10 patches in time
    argv = ["--fusion-layer", "1", *long]
    names = step(train_finetune, tmp_path, argv, task, num_classes)

    assert seeds == [(0, k, part) for k in (1, 2) for part in (0, 1)]  # (seed, step, part)
    assert names["total"].device == CUDA and names["total"].dtype == torch.float32
    assert names["inputs"]["video"].is_floating_point()  # mixed
    assert {x.dtype for x in names["logits"].values()} == {torch.bfloat16}
    assert names["optimizer"].found_inf.device == CUDA


def waits(x):
    """Of each of these, that it is noticed; x () is on the GPU, any other on the CPU."""
    cpu, row = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    for line in (
        x.item, x.tolist, x.isfinite().__bool__, x.cpu, x.double, x.nonzero,
        lambda: x.to("cpu", non_blocking=True), lambda: x + cpu, lambda: x[None][row],
        lambda: cpu.to(CUDA), lambda: cpu.to(CUDA, non_blocking=True), lambda: x[None].copy_(cpu)):
        with pytest.raises(NOTICED):
            line()
    cpu.pin_memory().to(CUDA, non_blocking=True)


@pytest.mark.parametrize(
    "script, old, new",
    [
        (train_pretrain, "optimizer.step()", "norm.item(); optimizer.step()"),
        (train_finetune, "optimizer.step()", "norm.item(); optimizer.step()"),
        (train_pretrain, "ids = run.to_device(ids)", "ids = ids"),
        (train_finetune, 'batch["label"], num_classes', 'batch["label"].cpu(), num_classes')],
    ids=lambda x: getattr(x, "__name__", "x"))
def test_a_mistake_in_a_step_is_noticed(tmp_path, monkeypatch, script, old, new):
    with pytest.raises(NOTICED):
        step(script, tmp_path, change=(old, new))

    if "norm" in new:
        monkeypatch.setattr(script, "waits", waits, raising=False)
        step(script, tmp_path, change=(old, "waits(norm); optimizer.step()"))


@pytest.mark.parametrize("script, more", [(train_pretrain, ()), (train_finetune, ((5,),))])
def test_evaluation_is_on_the_gpu(tmp_path, script, more):
    args, run = run_of(script, [], tmp_path)
    with CUDA:
        model = avmae.build(script.config_of(args, *more)).eval()
    batch = batch_of(model.config, 4)
    inputs = {m: batch[m] for m in model.config.modalities}

    with Watch(), torch.no_grad(), run.autocast:
        if more:
            inputs = {m: x.unflatten(0, (2, 2)) for m, x in inputs.items()}
            found = script.predict(model, inputs, views=2)
            assert found.shape == (2, 5)
        else:
            ids = run.to_device(avmae.random_masking(model.config.modalities, 4))
            found = model(inputs, ids).loss
    assert found.device == CUDA and found.dtype == torch.float32


def test_a_batch_goes_to_the_gpu_with_its_colors_changed():
    with fake_tensor.unset_fake_temporarily():
        color = torch.tensor([[1.0, 0.1, 1.2, 0.8, 0.1, 0.0], [0.0, 0.0, 1.0, 1.0, 0.0, 1.0]])
    loader = data.Loader([], [])
    loader.device = CUDA
    batch = {
        "video": torch.zeros(2, 4, 32, 32, 3, dtype=torch.uint8), "label": torch.zeros(2, 1),
        "audio": torch.zeros(2, 64, 32)}

    with Watch(pinned=False):  # torchvision copies a table of 18 numbers
        batch = {k: x.pin_memory() for k, x in batch.items()} | {"index": torch.arange(2)}
        found = loader.to_device(batch | {"color": color})
    assert {k: x.device.type for k, x in found.items()} == {
        "video": "cuda", "audio": "cuda", "label": "cuda", "index": "cpu"}
    assert found["video"].dtype == torch.uint8 and found["video"].shape == (2, 4, 32, 32, 3)
