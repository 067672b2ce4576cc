"""Drawing tokens: the right distribution, cut where top_k and top_p say, one uniform to one token."""

import math

import numpy as np
import pytest
import torch
from check import CUDA_KERNELS, backends, served
from hypothesis import given, settings
from hypothesis import strategies as st

from igpt_fast.errors import InputError
from igpt_fast.ops import _native
from igpt_fast.ops._native import use_backend
from igpt_fast.ops.sampling import sample_tokens

# Few distinct values, so that ties are common.
LOGITS = st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 2.0, -math.inf]), min_size=1, max_size=9)


HERE = ["auto", *(b for b in backends("sample_tokens") if b in ("reference", *CUDA_KERNELS))]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(params=HERE, scope="module", autouse=True)
def _every_test_on(request):
    with use_backend(request.param):
        yield request.param


def brute(logits, uniform, temperature=1.0, top_k=None, top_p=None):
    """One row in plain Python: softmax, sort, cut, walk."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if temperature == 0:
        return order[0]
    weight = [math.exp((z - max(logits)) / temperature) for z in logits]
    kept = order[:top_k]
    if top_p is not None and top_p < 1:
        mass, size = 0.0, 0
        for i in kept:
            if mass >= top_p * math.fsum(weight[j] for j in kept):
                break
            mass, size = mass + weight[i], size + 1
        kept = kept[:size]
    total, walked = sum(weight[i] for i in sorted(kept)), 0.0
    for i in sorted(kept):
        walked += weight[i]
        if walked > uniform * total:
            return i
    return max(kept)  # rounding has left the walk an ulp short of the total


@settings(deadline=None, max_examples=300)
@given(
    logits=LOGITS.filter(lambda z: max(z) > -math.inf),
    uniform=st.floats(0, 1, exclude_max=True),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    top_k=st.none() | st.integers(1, 12),
    top_p=st.none() | st.floats(0.01, 1),
)
def test_equals_brute_force(logits, uniform, temperature, top_k, top_p):
    got = sample_tokens(
        torch.tensor([logits]), torch.tensor([uniform], dtype=torch.float64), temperature, top_k, top_p
    ).item()
    want = brute(logits, uniform, temperature, top_k, top_p)
    if got != want:  # only where rounding could decide: a boundary of the walk or of top_p within a few ulp
        near = {brute(logits, min(max(uniform + e, 0), 1 - 2**-53), temperature, top_k, top_p) for e in (-1e-12, 1e-12)}
        if top_p is not None:
            near |= {brute(logits, uniform, temperature, top_k, min(1, max(0, top_p + e))) for e in (-1e-12, 1e-12)}
        assert got in near


def test_a_top_k_beyond_every_number_keeps_all_colours():
    logits, uniforms = torch.randn(9, 7), torch.rand(9, dtype=torch.float64)
    assert torch.equal(sample_tokens(logits, uniforms, top_k=10**22), sample_tokens(logits, uniforms))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.6}, {"top_k": 9, "top_p": 0.9}]
)
def test_draws_the_distribution(dtype, options, _every_test_on):
    kernel, slow = _every_test_on in CUDA_KERNELS, _every_test_on == "simt"
    if kernel and dtype is torch.float64:
        return  # no kernel takes it
    n, colors = 3_000 if slow else 40_000, 12
    logits = torch.randn(colors, generator=torch.Generator().manual_seed(0)).to(dtype)
    uniforms = torch.from_numpy(np.random.default_rng(1).random(n))
    drawn = np.bincount(sample_tokens(logits.expand(n, -1), uniforms, **options), minlength=colors)
    p = np.exp(logits.double().numpy() / options.get("temperature", 1.0))
    order = np.argsort(-p, kind="stable")[: options.get("top_k")]
    share = np.cumsum(p[order]) / p[order].sum()
    order = order[: np.searchsorted(share, options.get("top_p", 1.0)) + 1]
    expected = np.zeros(colors)
    expected[order] = n * p[order] / p[order].sum()
    live = expected > 0
    assert not drawn[~live].any()
    chi2 = ((drawn - expected)[live] ** 2 / expected[live]).sum()
    assert chi2 < len(order) + 5 * math.sqrt(2 * len(order))  # five sigma, and the seeds are fixed


@pytest.mark.parametrize(("backend", "dtype"), served("sample_tokens", F32, BF16, F16))
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0}, {"temperature": 0.5, "top_k": 100}, {"top_p": 0.9}, {"top_k": 40, "top_p": 0.5}]
)
def test_every_backend_draws_the_same(backend, dtype, options):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(301, 513, generator=generator).mul(3).to(dtype)  # in bf16 there are ties
    uniforms = torch.rand(301, generator=generator, dtype=torch.float64)
    with use_backend("reference"):
        want = sample_tokens(logits, uniforms, **options)
    with use_backend(backend, poison=True):
        assert torch.equal(sample_tokens(logits, uniforms, **options), want)


@pytest.mark.parametrize("backend", backends("sample_tokens"))
@pytest.mark.parametrize("colors", [1, 2, 255, 257, 4096, 8192])
def test_any_number_of_colours(backend, colors):
    """Rows of one level in three and of steep slopes, so that ranks, ties and weights of nothing all meet the cuts."""
    generator = torch.Generator().manual_seed(colors)
    logits = torch.randint(-3, 4, (6, colors), generator=generator).float()
    logits[3:] = torch.randn(3, colors, generator=generator) * 300
    uniforms = torch.rand(6, generator=generator, dtype=torch.float64)
    for options in ({}, {"top_k": 1 + colors // 3}, {"top_p": 0.8}, {"top_k": 1 + colors // 2, "top_p": 0.3}):
        with use_backend("reference"):
            want = sample_tokens(logits, uniforms, **options)
        with use_backend(backend, poison=True):
            assert torch.equal(sample_tokens(logits, uniforms, **options), want), options


@pytest.mark.parametrize("backend", [b for b in backends("sample_tokens") if b in CUDA_KERNELS])
def test_more_colours_than_shared_memory_holds_are_refused(backend):
    with use_backend(backend), pytest.raises(RuntimeError, match="8193 columns are more than 8192"):
        sample_tokens(torch.zeros(1, 8193), torch.zeros(1, dtype=torch.float64))
    given = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 8193), torch.zeros(1, dtype=torch.float64)
    with pytest.raises(ValueError, match="at most 8192 columns, got 8193"):  # nor does the kernel trust whoever asks
        _native.BACKENDS[backend].sample_tokens(*given, 1.0, 0, 1.0, 0)


def test_each_row_stands_alone():
    generator = torch.Generator().manual_seed(0)
    logits, uniforms = torch.randn(7, 512, generator=generator), torch.rand(7, generator=generator, dtype=torch.float64)
    every = sample_tokens(logits, uniforms, 1.1, 100, 0.95)
    assert every.dtype == torch.int64
    for row in range(7):
        assert sample_tokens(logits[row : row + 1], uniforms[row : row + 1], 1.1, 100, 0.95).item() == every[row]


def test_ties_keep_the_lowest_indices():
    logits = torch.zeros(64, 6)
    uniforms = torch.linspace(0, 1 - 2**-53, 64, dtype=torch.float64)
    assert set(sample_tokens(logits, uniforms, top_k=2).tolist()) == {0, 1}
    assert set(sample_tokens(logits, uniforms, top_p=0.5).tolist()) == {0, 1, 2}
    assert set(sample_tokens(logits, uniforms, temperature=0).tolist()) == {0}


def test_temperature_goes_from_greedy_to_uniform():
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0]]).expand(1000, -1)
    uniforms = torch.arange(1000, dtype=torch.float64) / 1000
    assert set(sample_tokens(logits, uniforms, temperature=0).tolist()) == {1}
    assert set(sample_tokens(logits, uniforms, temperature=1e-300).tolist()) == {1, 3}
    hot = sample_tokens(logits, uniforms, temperature=1e9)
    assert torch.bincount(hot).tolist() == [250] * 4


def test_the_last_uniform_gives_the_last_possible_token():
    logits = torch.tensor([[0.0, 1.0, -math.inf, -2000.0, -math.inf]])
    assert sample_tokens(logits, torch.tensor([1 - 2**-53], dtype=torch.float64)).item() == 1
    assert sample_tokens(logits, torch.tensor([0.0], dtype=torch.float64)).item() == 0
    # 1 is outside the range, but no uniform may ever lead past the last possible token.
    assert sample_tokens(logits, torch.tensor([1.0], dtype=torch.float64)).item() == 1


@pytest.mark.parametrize("bad", [[0.0, math.nan], [math.inf, 0.0], [-math.inf, -math.inf]])
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 1}, {"top_p": 0.5}])
def test_rows_that_are_not_finite_give_minus_one_and_spare_the_others(bad, options):
    logits = torch.tensor([[0.0, 9.0], bad, [9.0, 0.0]])
    assert sample_tokens(logits, torch.full((3,), 0.5, dtype=torch.float64), **options).tolist() == [1, -1, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": None}, "temperature is None; use a number"),
        ({"temperature": "1"}, "temperature is '1'; use a number"),
        ({"top_p": "a"}, "top_p is 'a'; use a number"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": math.nan}, "top_p is nan"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        sample_tokens(torch.zeros(1, 3), torch.zeros(1, dtype=torch.float64), **options)


def test_shapes_that_do_not_fit_are_refused():
    for logits, uniforms in (
        (torch.zeros(3), torch.zeros(3, dtype=torch.float64)),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.float64)),
        (torch.zeros(2, 3), torch.zeros(2)),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.float64)),
        (torch.zeros(2, 0), torch.zeros(2, dtype=torch.float64)),
    ):
        with pytest.raises(InputError, match="sample_tokens reads"):
            sample_tokens(logits, uniforms)


@pytest.mark.parametrize("options", [(1.0, None, None), (0.0, 3, None), (0.8, 5, 0.9)])
def test_torch_library_knows_the_op(options):
    logits, uniforms = torch.randn(3, 7), torch.rand(3, dtype=torch.float64)
    torch.library.opcheck(torch.ops.igpt.sample_tokens.default, (logits, uniforms, *options))
    compiled = torch.compile(lambda: sample_tokens(logits, uniforms, *options), backend="eager", fullgraph=True)
    assert torch.equal(compiled(), sample_tokens(logits, uniforms, *options))
