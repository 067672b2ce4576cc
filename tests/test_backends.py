"""What all ops share: registration with torch, the choice of a backend and its reasons, bits that no thread changes."""

import json
import os
import subprocess
import sys
import types

import pytest
import torch
from torch.library import opcheck

from igpt_fast import Config, ImageGPT, ops
from igpt_fast.cli import info
from igpt_fast.ops import _native, _tensors
from igpt_fast.ops._native import BACKENDS, use_backend
from igpt_fast.patterns import compiled


def floats(*shape, grad=True):
    return torch.randn(*shape).requires_grad_(grad)


def step_call(*masks, of=(), pages=None, slots=9):
    d, biases = 16, (None, floats(4 * 16, grad=False))
    layers = []
    for fc_bias in biases:
        layers += [floats(d, grad=False), floats(3 * d, d, grad=False), None, floats(d, d, grad=False), None]
        layers += [floats(d, grad=False), floats(4 * d, d, grad=False), fc_bias, floats(d, 4 * d, grad=False), None]
    tables = [floats(rows, d, grad=False) for rows in (7, 9, 7)]
    cache = floats(2, 3, 2, 2, slots, 8, grad=False)
    return (
        cache,
        torch.arange(3),
        tables[0],
        tables[1],
        layers,
        floats(d, grad=False),
        tables[2],
        list(masks),
        list(of),
        5,
        1e-5,
        pages,
    )


def decode_call(slots=9):
    return floats(1, 2, 1, 16, grad=False), *(floats(1, 2, slots, 16, grad=False) for _ in range(2))


def calls():
    q, k, v = (floats(1, 2, 70, 16) for _ in range(3))
    mask = list(compiled("row", (7, 10)).tensors)
    pages, kept = torch.tensor([0, 0], dtype=torch.int32), compiled("row", (3, 3)).tensors
    bits = torch.zeros(5, 3, dtype=torch.uint8), torch.rand(4, 3)
    return {
        "rms_norm": [
            (floats(3, 8), floats(8), None, 1e-5, torch.float32),
            (floats(3, 8), floats(8), floats(3, 8), 1e-5, torch.float32),
        ],
        "bias_quick_gelu": [(floats(3, 8), None), (floats(3, 8), floats(8))],
        "cross_entropy": [(floats(5, 7), torch.arange(5))],
        "linear_cross_entropy": [(floats(5, 8), floats(7, 8), torch.arange(5))],
        "attention": [(q, k, v, [], True, 0.25), (q, k, v, mask, True, 0.25)],
        "attention_dropout": [(floats(1, 9, 3, 2, 16), 0.25, 0.5, 3)],
        "dropout": [(floats(3, 8), 0.5, 3)],
        "attention_decode": [
            (*decode_call(), 7, 0.25, None, [], [], []),
            (*decode_call(), 7, 0.25, torch.tensor([4], dtype=torch.int32), mask, list(decode_call()[1:]), []),
            (*decode_call(64), 7, 0.25, None, mask, [], [], pages),
        ],
        "cache_append": [(*decode_call()[1:], *decode_call(2)[1:], 5, None, [])],
        "decode_step": [
            step_call(),
            step_call(*kept, of=[0, -1, 0, 0]),
            step_call(*kept, of=[0, 0], pages=pages, slots=64),
        ],
        "sample_tokens": [
            (floats(3, 8, grad=False), torch.rand(3, dtype=torch.float64), 1.0, 4, 0.9),
            (floats(3, 8, grad=False), torch.rand(3, dtype=torch.float64), 0.0, None, None),
        ],
        "linear": [
            (floats(2, 8, grad=False), floats(4, 8, grad=False), None),
            (*(floats(*n, grad=False) for n in ((2, 8), (4, 8), (4,), (8,), (2, 4))), 1e-5, True),
        ],
        "projection": [(floats(2, 3, 8), floats(4, 8), None), (floats(3, 8), floats(4, 8, grad=False), floats(4))],
        "palette_assign": [(*bits, torch.int64)],
        "kmeans_step": [(bits[0], torch.ones(5, dtype=torch.int64), bits[1])],
        "palette_decode": [(torch.arange(5), bits[0])],
        "color_histogram": [(bits[0],)],
    }


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", calls())
def test_opcheck(name, backend):
    with use_backend(backend):
        for args in calls()[name]:
            opcheck(getattr(torch.ops.igpt, name).default, args)


@pytest.mark.parametrize("backend", [n for n in BACKENDS if n in _native.CPU_TABLES])
def test_threads_do_not_change_a_bit(backend):
    model = ImageGPT(Config(layers=1, width=48, heads=3, colors=20, size=(10, 13), bias=True))
    torch.nn.init.normal_(model.wtet)
    qkv = torch.randn(3, 130, 3, 3, 16, requires_grad=True)
    x, bias, weight = (
        torch.randn(260, 48, requires_grad=True),
        torch.randn(48, requires_grad=True),
        torch.ones(48, requires_grad=True),
    )
    targets = torch.arange(260) % 48

    def everything():
        a = ops.attention_packed(qkv)
        b = ops.bias_quick_gelu(ops.rms_norm(x, weight), bias)
        loss = (a * a).sum() + ops.cross_entropy(b, targets)
        return [a, b, *torch.autograd.grad(loss, (qkv, x, bias, weight))]

    before = torch.get_num_threads()
    try:
        with use_backend(backend):
            torch.set_num_threads(1)
            one = everything()
            torch.set_num_threads(3)
            three = everything()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True)


def test_best_table_of_this_processor_is_used():
    cpu = [n for n in _native.CPU_TABLES if not _native._C.cpu_why_not(n)]
    assert [n for n in BACKENDS if n in _native.CPU_TABLES] == cpu and cpu[-1] == "baseline"
    with use_backend("auto"):
        assert _native.backend_for("rms_norm_fwd", (torch.ones(1),)).name == cpu[0]


def test_a_missing_extension_leaves_the_reference_and_a_reason():
    code = (
        "import sys; sys.modules['igpt_fast._C'] = None\n"
        "import torch, igpt_fast\n"
        "print(igpt_fast.ops.bias_quick_gelu(torch.ones(2)).tolist())"
    )
    done = python(code)
    assert done.returncode == 0 and "not built" in done.stderr and done.stdout.startswith("[0.84"), done.stderr


def test_strict_raises_what_would_be_logged():
    code = "import torch, igpt_fast\nigpt_fast.ops.bias_quick_gelu(torch.ones(2, dtype=torch.float64))"
    assert python(code).returncode == 0
    done = python(code, IGPT_STRICT="1")
    assert done.returncode != 0 and "float64" in done.stderr


def test_named_backend_serves_or_raises():
    assert python("import igpt_fast", IGPT_BACKEND="abacus").returncode != 0
    name = next(iter(BACKENDS))
    with use_backend(name), pytest.raises(RuntimeError, match="float64"):
        ops.bias_quick_gelu(torch.ones(2, dtype=torch.float64))


class Abacus:
    """A backend that registers from outside."""

    def has(self, op):
        return op == "bias_quick_gelu_fwd"

    def bias_quick_gelu_fwd(self, y, x, bias, stream):
        y.fill_(7)


def test_a_registered_backend_serves_by_name_only(monkeypatch):
    for name in ("BACKENDS", "_SERVES"):
        monkeypatch.setattr(_native, name, dict(getattr(_native, name)))
    _native.register_backend("abacus", Abacus(), device="cpu", dtypes=[torch.float64])
    x = torch.ones(2, dtype=torch.float64)
    with use_backend("abacus"):
        assert ops.bias_quick_gelu(x).tolist() == [7, 7]
        with pytest.raises(RuntimeError, match="abacus has no rms_norm_fwd"):
            ops.rms_norm(x, x)
        with pytest.raises(RuntimeError, match="float32"):
            ops.bias_quick_gelu(x.float())
    assert ops.bias_quick_gelu(x).tolist() != [7, 7]
    with pytest.raises(ValueError, match="already"):
        _native.register_backend("abacus", Abacus(), device="cpu")


def test_poison_fills_outputs():
    with use_backend("auto", poison=True):
        assert _tensors.empty((3,), torch.ones(1)).isnan().all()
        assert _tensors.empty((3,), torch.ones(1), torch.int16).eq(-(2**15)).all()


def test_info_names_every_op():
    done = subprocess.run([sys.executable, "-m", "igpt_fast.cli", "info", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["cpu backend"] == next(iter(BACKENDS)) and set(facts["ops"]) == set(_native._C.Backend.ops)
    for op, (on_cpu, on_gpu) in facts["ops"].items():
        assert on_cpu in BACKENDS or on_cpu == info.UNMISSED.get(op) or "has no" in on_cpu
        assert on_gpu == "cuda" or on_gpu == info.UNMISSED.get(op) or on_gpu.startswith("plain torch: ")
    assert facts["ops"]["linear_cross_entropy_fwd"][0] == "composed of other ops"
    assert facts["ops"]["palette_table"][0] == "not used on a CPU"
    if _native._C.cuda_why_not():  # which is then the reason of every op
        assert all(_native._C.cuda_why_not() in on_gpu for _, on_gpu in facts["ops"].values())


@pytest.mark.parametrize("archs, runs, not_on", [
    ("80,90a-real", (80, 86, 89, 90, 100, 120), (75, 70, 61)),
    ("80-real,90a-real", (80, 86, 90), (75, 100, 120)),
    ("86-real", (86, 89), (80, 90)),
    ("90a", (90,), (80, 100)),
    ("75-virtual", (75, 80, 120), (70,)),
    ("native", (75, 120), ()),
])  # fmt: skip
def test_which_gpus_run_what_was_built(archs, runs, not_on):
    assert all(_native.runs_on(archs, gpu) for gpu in runs)
    assert not any(_native.runs_on(archs, gpu) for gpu in not_on)


def test_an_older_gpu_runs_plain_torch_and_says_so(monkeypatch):
    """A backend of the name cuda, as on a machine with a GPU, and what it asks of a tensor there."""
    monkeypatch.setitem(BACKENDS, "cuda", types.SimpleNamespace(name="cuda", has=lambda op: True))
    monkeypatch.setitem(_native._SERVES, "cuda", ("cuda", (torch.float32, torch.bfloat16)))
    built = {"cuda_archs": "80,90a-real", "cuda_why_not": "", "cuda_takes_ptx": False, "cuda_versions": "13.1, 13.0"}
    functions = {name: lambda value=value: value for name, value in built.items()}
    monkeypatch.setattr(_native, "_C", types.SimpleNamespace(**functions))
    names = {"T4": (7, 5), "A100": (8, 0), "H200": (9, 0), "B200": (10, 0)}
    cards = {torch.device("cuda", place): card for place, card in enumerate(names.items())}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: cards[d][1])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: cards[d][0])
    _native.gpu_why_not.cache_clear()
    there = [types.SimpleNamespace(device=d, dtype=torch.float32, is_floating_point=lambda: True) for d in cards]
    assert "T4 has compute capability 7.5" in _native.why_not("cuda", "rms_norm_fwd", there[:1])
    assert _native.why_not("cuda", "rms_norm_fwd", there[1:2]) is None
    assert _native.why_not("cuda", "rms_norm_fwd", there[2:3]) is None
    why = "B200 has to compile the kernels' PTX, for which its driver is too old (13.1, 13.0); update it"
    assert _native.why_not("cuda", "rms_norm_fwd", there[3:]) == why
    _native._C.cuda_takes_ptx = lambda: True
    _native.gpu_why_not.cache_clear()
    assert _native.why_not("cuda", "rms_norm_fwd", there[3:]) is None
    _native.gpu_why_not.cache_clear()


def test_info_describes_each_gpu(monkeypatch):
    card = types.SimpleNamespace(name="H200", major=9, minor=0, multi_processor_count=132, total_memory=150 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: card)
    facts = info.gather()
    assert facts["gpu"] == "; ".join(["H200, compute capability 9.0, 132 multiprocessors, 150.0 GiB"] * 2)
    assert facts["cuda"].startswith("driver ") and "torch's runtime" in facts["cuda"]
