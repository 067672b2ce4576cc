"""Patterns: the tile tables against definitions on two pixels, by brute force; the parser; orders; the command."""

import copy
import dataclasses
import json
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from igpt_fast import BlockMask, InputError, ops
from igpt_fast.patterns import PATTERNS, Rows, compiled, parse, parts_of, row, unpack
from igpt_fast.patterns.orders import ORDERS, tiles_by_order
from igpt_fast.patterns.predicates import _drawn

SIZES = [(1, 1), (8, 8), (5, 13), (20, 9), (16, 16)]


# What a pattern means for the pixel at (r, c) and the pixel at (s, d), i and j in raster order, on a grid h × w.
MEANING = {
    "row": lambda r, c, s, d, i, j, h, w: r == s,
    "column": lambda r, c, s, d, i, j, h, w: c == d,
    "axial": lambda r, c, s, d, i, j, h, w: r == s or c == d,
    "strided": lambda r, c, s, d, i, j, h, w: abs(i - j) < w or (i - j) % w == 0,
    "strided(5)": lambda r, c, s, d, i, j, h, w: abs(i - j) < 5 or (i - j) % 5 == 0,
    "fixed": lambda r, c, s, d, i, j, h, w: r == s or d >= w - 8,
    "fixed(10, 3)": lambda r, c, s, d, i, j, h, w: i // 10 == j // 10 or j % 10 >= 7,
    "local": lambda r, c, s, d, i, j, h, w: abs(i - j) <= 128,
    "local(3)": lambda r, c, s, d, i, j, h, w: abs(i - j) <= 3,
    "neighborhood": lambda r, c, s, d, i, j, h, w: max(abs(r - s), abs(c - d)) <= 3,
    "neighborhood(3)": lambda r, c, s, d, i, j, h, w: max(abs(r - s), abs(c - d)) <= 1,
    "dilated": lambda r, c, s, d, i, j, h, w: abs(r - s) in (0, 2, 4, 6) and abs(c - d) in (0, 2, 4, 6),
    "dilated(3, 5)": lambda r, c, s, d, i, j, h, w: abs(r - s) in (0, 5) and abs(c - d) in (0, 5),
    "blocks": lambda r, c, s, d, i, j, h, w: (r // 8, c // 8) == (s // 8, d // 8),
    "blocks(2, 3)": lambda r, c, s, d, i, j, h, w: (r // 2, c // 3) == (s // 2, d // 3),
    "global_tokens": lambda r, c, s, d, i, j, h, w: min(i, j) < 16,
    "global_tokens(1)": lambda r, c, s, d, i, j, h, w: min(i, j) < 1,
    "random_blocks(2, 10)": lambda r, c, s, d, i, j, h, w: bool(
        _drawn(-(-h * w // 10), 2, 0)[max(i, j) // 10, min(i, j) // 10]
    ),
    "row | column & local(7)": lambda r, c, s, d, i, j, h, w: r == s or (c == d and abs(i - j) <= 7),
    "(row | column) & local(7)": lambda r, c, s, d, i, j, h, w: (r == s or c == d) and abs(i - j) <= 7,
}


def brute(meaning, size, causal):
    n, width = size[0] * size[1], size[1]
    expected = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        for slot in range(i + 1) if causal else range(n):
            j = slot - 1 if causal else slot
            always = slot == i or (causal and slot == 0)  # itself, or the neighbour in raster order; sos
            expected[i, slot] = always or meaning(*divmod(i, width), *divmod(j, width), i, j, *size)
    return expected


def test_every_pattern_has_a_meaning_here():
    assert {text.split("(")[0] for text in MEANING if "|" not in text} == set(PATTERNS)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("text", MEANING)
def test_tables_hold_the_pattern(text, size, causal):
    mask = compiled(text, size, causal)
    expected = brute(MEANING[text], size, causal)
    assert torch.equal(mask.dense(), expected)
    assert torch.equal(unpack(list(mask.tensors), mask.tokens), expected)
    assert mask.pairs == int(expected.sum())
    assert mask.pair_density() == pytest.approx(float(expected.sum() / torch.ones_like(expected).tril().sum()
                                                      if causal else expected.float().mean()))  # fmt: skip


@given(tokens=st.integers(1, 200), density=st.floats(0, 1))
def test_both_directions_hold_any_matrix(tokens, density):
    seen = torch.rand(tokens, tokens, generator=torch.Generator().manual_seed(tokens)) <= density
    t = BlockMask.from_dense(seen).tensors
    assert torch.equal(unpack(list(t), tokens), seen)
    queries = torch.tensor([0, tokens - 1, tokens // 2])
    assert torch.equal(Rows(t)[queries, :tokens], seen[queries])
    assert torch.equal(unpack([*t[3:6], *t[:3], t[7], t[6], t[8]], tokens), seen.T)


def test_full_tiles_carry_no_bits():
    mask = BlockMask.from_dense(torch.ones(100, 100, dtype=torch.bool))
    assert mask.parts[0].bits.numel() == 0 and mask.density() == 1.0


def test_a_pattern_is_compiled_once():
    assert compiled("row|neighborhood(7)", (6, 6)) is compiled(parse(" row | neighborhood(7)"), (6, 6))
    assert compiled("row", (6, 6)) is compiled(row(), (6, 6))
    assert compiled("local(3)", (6, 6)) is not compiled("local(4)", (6, 6))


def test_either_and_both_are_two_patterns():
    either, both = (parse(f"row {sign} column") for sign in "|&")
    assert either != both
    assert compiled(either, (8, 8)).pairs > compiled(both, (8, 8)).pairs


def test_a_predicate_of_ones_own():
    def above(q, k):
        return (q.col == k.col) & (k.index < q.index)

    mask = BlockMask.compile(above, (6, 7))
    assert torch.equal(mask.dense(), compiled("column", (6, 7)).dense())
    assert torch.equal(BlockMask.compile(above, (6, 7)).dense(), mask.dense())
    with pytest.raises(InputError, match=r"looks ahead: pixel \(0, 0\) may not see pixel \(0, 0\).*k.index < q.index"):
        BlockMask.compile(lambda q, k: q.col == k.col, (6, 7))
    with pytest.raises(InputError, match=r"pixel \(0, 0\) may not see pixel \(7, 0\)"):  # which is in another tile
        BlockMask.compile(lambda q, k: k.index == q.index + 70, (10, 10))
    BlockMask.compile(lambda q, k: q.col == k.col, (6, 7), causal=False)
    with pytest.raises(InputError, match="gives int; it must give a bool"):
        BlockMask.compile(lambda q, k: 1, (6, 7))


def test_parts_that_look_ahead_are_found_in_unions():
    from igpt_fast.patterns import Pattern

    with pytest.raises(InputError, match="looks ahead"):
        BlockMask.compile(row() | Pattern.own(lambda q, k: q.col == k.col), (6, 7))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("diagonal", "no pattern named 'diagonal'. There are row, column"),
        ("neighborhod(7)", r"did you mean 'neighborhood\(7\)'\?"),
        ("row|", "cannot be read; write names joined by"),
        ("", "cannot be read"),
        ("row + column", "'row \\+ column' is not a pattern"),
        ("'row'", "is not a pattern"),
        ("neighborhood(6)", "neighborhood: side is 6; use an odd whole number of at least 1, such as 7"),
        ("local(0)", "local: window is 0; use a whole number of at least 1, such as 1"),
        ("local(-3)", "local: window is -3"),
        ("local(99999999999999999999)", "local: window is 99999999999999999999; use at most 2,147,483,647"),
        ("local(1.5)", "1.5 is not a whole number"),
        ("row(3)", r"row\(3\): row takes no numbers"),
        ("local(far=3)", r"local takes window \(128\)"),
        ("strided(1, 2)", r"strided takes stride \(the width\)"),
        ("|".join(["row"] * 3000), r"pattern 'row\|row.* has 11,999 characters; use at most 1,000"),
        (f"{'(' * 400}row{')' * 400}", "cannot be read"),
        ("local(True)", "True is not a whole number"),
        ("row|\udcff", "cannot be read"),
    ],
)
def test_texts_that_are_no_pattern(text, message):
    with pytest.raises(InputError, match=message):
        parse(text)


def test_refusals():
    with pytest.raises(InputError, match="later slot"):
        BlockMask.from_dense(torch.ones(3, 3, dtype=torch.bool), causal=True)
    with pytest.raises(InputError, match="no token order 'diagonal'; use one of raster, transposed"):
        BlockMask.compile("row", (3, 3), order="diagonal")
    with pytest.raises(InputError, match="square"):
        BlockMask.from_dense(torch.ones(3, 4, dtype=torch.bool))


@pytest.mark.parametrize("size", [*SIZES, (3, 40)])
@pytest.mark.parametrize("name", ORDERS)
def test_an_order_has_every_slot_once(name, size):
    assert torch.equal(ORDERS[name](size).sort().values, torch.arange(size[0] * size[1]))


def test_hilberts_curve_never_jumps():
    at = ORDERS["Hilbert"]((16, 16))
    row, column = at // 16, at % 16
    assert torch.equal(row.diff().abs() + column.diff().abs(), torch.ones(255, dtype=torch.long))


@pytest.mark.parametrize("text", ["column", "neighborhood(5)", "global_tokens(3)"])
@pytest.mark.parametrize("size", [(12, 20), (5, 13)])
def test_tiles_by_order_are_those_of_the_permuted_matrix(text, size):
    mask = compiled(text, size).raster
    counts = tiles_by_order(mask.tensors, size)
    assert counts.keys() == ORDERS.keys()
    for name, count in counts.items():
        order = ORDERS[name](size)
        tables = BlockMask.from_dense(mask.dense()[order][:, order]).tensors
        assert count == len(tables[1]) == BlockMask.compile(text, size, order=name).tiles()
        for ours, theirs in zip(BlockMask.compile(text, size, order=name).tensors[:8], tables[:8], strict=True):
            assert torch.equal(ours, theirs)
    most = sorted(counts.values())[1]
    assert tiles_by_order(mask.tensors, size, most) == {name: n for name, n in counts.items() if n <= most}


@pytest.mark.parametrize(
    ("text", "size", "order"),
    [
        ("column", (24, 24), "transposed"),
        ("row", (64, 64), "raster"),
        ("axial", (64, 64), "raster + transposed"),
        ("strided", (64, 64), "raster + transposed"),
        ("row | column | neighborhood(3)", (64, 64), "raster + transposed"),
        ("blocks", (64, 64), "8x8 tiles"),
        ("local(2000)", (48, 64), "raster"),
    ],
)
def test_the_order_with_clearly_the_fewest_tiles_is_taken(text, size, order):
    mask = compiled(text, size)
    assert mask.order == order
    assert torch.equal(unpack(mask.tensors, mask.tokens), mask.dense())
    assert torch.equal(unpack(mask.raster.tensors, mask.tokens), mask.dense())
    parts = [unpack(tables, mask.tokens) for tables in parts_of(mask.tensors)]
    assert len(parts) == order.count("+") + 1
    assert sum(int(part.sum()) for part in parts) == mask.pairs, "no pair is in two parts"
    assert mask.tiles() <= mask.raster.tiles()
    start = mask.first(500)
    assert start.order == order and torch.equal(unpack(start.tensors, 500), mask.dense()[:500, :500])
    assert start.raster.order == "raster" and torch.equal(unpack(start.raster.tensors, 500), start.dense())


def test_parts_hold_only_what_those_before_do_not(monkeypatch):
    """On a small grid, where another part is not worth it unless that is said to be free."""
    monkeypatch.setattr("igpt_fast.patterns.block_mask.PART", 0)
    monkeypatch.setattr("igpt_fast.patterns.block_mask.WORTH_PARTS", 9)
    monkeypatch.setattr("igpt_fast.patterns.orders.WORTH", 0.99)
    for text, causal in (("row | column", True), ("column | row | column", True), ("row | column", False)):
        mask = BlockMask.compile(text, (24, 20), causal)
        assert mask.order == "raster + transposed" and torch.equal(unpack(mask.tensors, 480), mask.dense())
        assert sum(int(unpack(tables, 480).sum()) for tables in parts_of(mask.tensors)) == mask.pairs


def test_the_command(igpt, tmp_path):
    out = tmp_path / "p.png"
    code, printed, said = igpt("pattern", "row|neighborhood(7)", "--size", "12x20", "-o", out)
    assert code == 0 and "row | neighborhood(7) on 12 x 20: 240 tokens" in printed and "Hilbert" in printed
    assert Image.open(out).size == (1096, 588) and said == f"wrote {out}\n"
    code, printed, _ = igpt("pattern", "column", "--size", "8", "--json", "-o", out)
    costs = json.loads(printed)
    assert code == 0 and costs["tiles"]["transposed"] == costs["masks"] == 1 and costs["picture"] == str(out)
    assert costs["order"] == "raster" and costs["pair_density"] < 0.25
    both = json.loads(igpt("pattern", "column", "--size", "8", "--objective", "bert", "--json", "-o", out)[1])
    assert both["tiles_of_dense"] == 1 and both["pair_density"] == 8 / 64
    for wrong in (
        ["colum"],
        ["row", "--size", "0"],
        ["row", "--size", "1x2x3"],
        ["row", "-o", out / "p.png"],
        ["row", "--size", "257"],
    ):
        code, printed, said = igpt("pattern", *wrong)
        assert code == 2 and not printed and said.startswith("error: ") and said.count("\n") == 1


def test_what_is_made_of_a_mask_for_a_device_is_made_once(monkeypatch):
    mask, meta = BlockMask.compile("column", (6, 7)), torch.device("meta")
    with torch.inference_mode():
        moved, seen = mask.to(meta), mask.dense_on(torch.device("cpu"))
    assert not any(t.is_inference() for t in (*moved.tensors, seen[0]))
    assert mask.to(meta) is moved and moved.tensors[0].device == meta and moved.raster is mask.raster.to(meta)
    turned = compiled("column", (24, 24)).to(meta)
    assert turned.raster is not turned and turned.raster.tensors[0].device == meta, "both of its orders are there"
    monkeypatch.setattr(BlockMask, "dense", None)
    assert mask.dense_on(torch.device("cpu")) is seen and seen[1] is True
    assert (fresh := dataclasses.replace(mask, pairs=3))._kept == {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert fresh.to(meta).tensors[0].device == meta and fresh._kept == {}


def test_the_start_of_a_mask_keeps_the_order_that_has_the_fewest_tiles():
    start = compiled("column", (24, 24)).first(500)
    assert start.order == "transposed" and start.tiles() < start.raster.tiles()


@pytest.mark.parametrize("make", [
    lambda: BlockMask.compile("axial", (16, 17)),
    lambda: BlockMask.compile("row", (9, 9), causal=False),
    lambda: BlockMask.compile(lambda q, k: (k.row >= q.row - 2) & (k.index < q.index), (8, 9)),
    lambda: BlockMask.from_dense(torch.arange(130 * 130).view(130, 130) % 7 < 2),
    lambda: compiled("column", (24, 24)),  # in another order
    lambda: compiled("row|column", (32, 32)),  # in two parts
])  # fmt: skip
def test_copies_and_pickles_of_a_mask_show_the_same(make):
    mask = make()
    q = torch.randn(1, 1, mask.tokens, 8)
    wanted = ops.attention(q, q, q, mask)
    for other in (copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert (other.tokens, other.causal, other.pairs, other.order) == (
            mask.tokens, mask.causal, mask.pairs, mask.order)  # fmt: skip
        assert torch.equal(other.dense(), mask.dense()) and torch.equal(other.raster.dense(), mask.dense())
        assert torch.equal(ops.attention(q, q, q, other), wanted)
        if mask.causal:
            assert torch.equal(other.first(40).dense(), mask.first(40).dense())
    copy.deepcopy(mask.to(torch.device("meta")))
