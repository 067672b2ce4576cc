"""Labels and groups from a metadata.csv: read as written, kept whole in every split, wrong ones named."""

import logging
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from labelled import make
from PIL import Image
from test_labels import chosen_from

from igpt_fast import intervals
from igpt_fast.batches import fingerprint
from igpt_fast.classes import by_class, classes_of
from igpt_fast.data import open_source, tokenize
from igpt_fast.errors import InputError
from igpt_fast.joined import JoinedTokens
from igpt_fast.labels import choose_labelled, draw_validation
from igpt_fast.palette import Palette
from igpt_fast.probe import probe
from igpt_fast.regression import FOLDS, draw_folds
from igpt_fast.tokens import TokenDataset

GRAYS = Palette(np.linspace(-1, 1, 8, dtype=np.float32)[:, None].repeat(3, 1))


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png", "c.png", "sub/d.png", "sub/e.png"):
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "x" / name)
    return tmp_path / "x"


def write(folder, *lines: str, **options: str):
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n", **options)
    return open_source(folder)


TABLE = "file_name,label,group", "b.png,cat,1", "sub/d.png,dog,1", '"a.png",cat,', "sub/e.png,,2"


def test_labels_and_groups_are_those_of_the_table(folder, tmp_path):
    write(folder, *TABLE)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive, tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(path, f"wrapped/{path.relative_to(folder)}")
            tar.add(path, f"wrapped/{path.relative_to(folder)}")
    for path, prefix in ((folder, ""), (tmp_path / "x.zip", "wrapped/"), (tmp_path / "x.tar.gz", "wrapped/")):
        source = open_source(path)
        assert source.names == [prefix + n for n in ("a.png", "b.png", "c.png", "sub/d.png", "sub/e.png")]
        assert (source.labels.tolist(), source.classes) == ([0, 0, -1, 1, -1], ["cat", "dog"])
        alone = [f"image {prefix}{n}" for n in ("a.png", "c.png")]
        assert source.groups == [alone[0], "group 1", alone[1], "group 1", "group 2"] and not source.ignored


def test_how_a_table_may_be_written(folder):
    bom = write(folder, "file_name;label", "a.png;dog", "b.png;cat, or not", encoding="utf-8-sig")
    assert bom.classes == ["cat, or not", "dog"] and bom.groups is None
    assert write(folder, "n\tlabel\tfile_name", "1\t10\ta.png", "2\t9\t./b.png").classes == ["9", "10"]
    (folder / "metadata.csv").unlink()
    (folder / "sub" / "metadata.csv").write_text("file_name,label\nd.png,p\n../a.png,q\n")
    assert open_source(folder).labels.tolist() == [1, -1, -1, 0, -1]
    (folder / "metadata.csv").write_text("file_name,label\nb.png,p\n")  # and a second one
    assert open_source(folder).labels.tolist() == [1, 0, -1, 0, -1]


def test_what_a_table_may_hold_beside(folder, caplog):
    """Blanks in its first line, lines of several lines, and rows of nothing."""
    source = write(folder, "file_name , label,text", 'a.png,1,"two\nlines"', ",,", ",c,", "b.png,01,", "c.png,10,", "")
    assert source.labels.tolist() == [1, 0, 2, -1, -1] and source.classes == ["01", "1", "10"] and not caplog.records
    write(folder, "file_name,label", "a.png," + "1" * 5000, "b.png,2")
    (folder / "metadata.csv").unlink()
    (folder / "metadata.csv").mkdir()
    assert open_source(folder).classes is None


def test_a_changed_table_is_a_changed_source(folder):
    before = write(folder, *TABLE)
    after = write(folder, *TABLE[:-1])
    (folder / "metadata.csv").unlink()
    assert len({before.stamp, after.stamp, open_source(folder).stamp}) == 3


def test_tables_that_say_less_than_hoped(folder, caplog):
    caplog.set_level(logging.WARNING, "igpt_fast")
    for lines, said in (
        (("file_name,text", "a.png,a cat"), "has no column `label`, so folders are the classes"),
        (("id,label", "a,cat"), "is not used, for it has no column `file_name`"),
        (("file_name,label", "a.png,x", "b.png,y", "gone.png,z"), "1 of its 3 rows name no image here"),
    ):
        source = write(folder, *lines)
        assert [said in r.getMessage() for r in caplog.records] == [True] and "metadata.csv: " in caplog.text
        assert (source.classes is None) == ("gone" not in lines[-1])
        caplog.clear()
    one = write(folder, "file_name,label", "a.png,cat")
    assert one.classes == ["cat"] and one.labels.tolist()[0] == 0, "a test set may be of one class"
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "metadata.csv").write_text("file_name,label\n../a.png,z\n")
    assert write(folder, *TABLE).classes == ["cat", "dog"]


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (("file_name,label", "a,cat", "b,dog"), "metadata.csv: names none of the images here; file_name is their path"),
        (("file_name,label", "a.png,cat", "a.png,dog"), r"metadata.csv, line 3: says something else of a\.png"),
        (("file_name,label", "a.png,cat,", "b.png,cat, big"), "metadata.csv, line 3: has more columns than line 1"),
        (("file_name,label", 'a.png,"cat'), "metadata.csv: is no CSV file in UTF-8"),
        (("file_name,label,label", "a.png,cat,dog"), "metadata.csv: has two columns label; leave one of them out"),
    ],
)
def test_tables_that_are_wrong_are_named(folder, lines, reason):
    with pytest.raises(InputError, match=reason):
        write(folder, *lines)
    (folder / "metadata.csv").write_bytes("file_name,label\na.png,Bär\n".encode("latin-1"))
    with pytest.raises(InputError, match="is no CSV file in UTF-8"):
        open_source(folder)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory) -> TokenDataset:
    """240 images in 60 groups of one class each, four images a group, the classes told apart by their gray."""
    where, random = tmp_path_factory.mktemp("grouped"), np.random.default_rng(0)
    lines = ["file_name,label,group"]
    for k in range(240):
        value = 60 + 120 * (k // 4 % 2) + random.integers(-50, 51, (8, 8), dtype=np.int64)
        Image.fromarray(value.astype(np.uint8)).save(where / f"{k}.png")
        lines.append(f"{k}.png,{'ab'[k // 4 % 2]},{k // 4}")
    write(where, *lines)
    return tokenize(where, GRAYS, where / "tokens", (8, 8), resize="none", workers=0)


def whole(groups: np.ndarray, *parts: np.ndarray) -> bool:
    """Whether no group is in two of the parts."""
    seen = [set(groups[part]) for part in parts]
    return all(not a & b for i, a in enumerate(seen) for b in seen[:i])


def test_groups_stay_together_in_every_split(grouped):
    groups = np.array(grouped.groups)
    for fraction in (0.1, 0.3, 0.5):
        train, val = grouped.split("train", fraction), grouped.split("val", fraction)
        assert whole(groups, train, val) and len(val) % 4 == 0 and abs(len(val) / 240 - fraction) < 0.15
    chosen = choose_labelled(grouped, 0.3)
    mine = groups[chosen.indices]
    held_out = draw_validation(chosen, 0.25, 0)
    assert whole(mine, np.flatnonzero(chosen.test), np.flatnonzero(held_out), np.flatnonzero(~chosen.test & ~held_out))
    assert 0.2 < held_out.sum() / (~chosen.test).sum() < 0.35
    assert not np.array_equal(held_out, draw_validation(chosen, 0.25, 1))
    folds = draw_folds(chosen.labels, chosen.test, 0, chosen.groups)
    assert whole(mine, *(np.flatnonzero(folds == k) for k in range(-1, FOLDS)))
    assert np.bincount(folds + 1).min() > 10 and ((folds == -1) == chosen.test).all()


@given(st.lists(st.integers(1, 40), min_size=4, max_size=30), st.floats(0.05, 0.5), st.integers(0, 5))
def test_no_group_is_taken_beyond_the_share(sizes, fraction, seed):
    """But the smallest, for a class that would have none."""
    groups = np.repeat(np.arange(len(sizes)), sizes)
    labels = groups % 2
    chosen = chosen_from(labels, np.zeros(len(labels), bool), 2, groups)
    held_out = draw_validation(chosen, fraction, seed)
    for label in (0, 1):
        has, smallest = (labels == label).sum(), min(sizes[label::2])
        assert held_out[labels == label].sum() <= max(1, round(fraction * has), smallest)


def test_validation_of_nothing_is_said(caplog):
    labels = np.arange(20) % 2
    assert not draw_validation(chosen_from(labels, np.zeros(20, bool), 2, labels), 0.2, 0).any()
    assert "validation has no image: no group leaves every class something to learn from" in caplog.text


def test_groups_tell_data_apart(grouped, tmp_path):
    alone = shutil.copytree(grouped.path, tmp_path / "alone")
    (alone / "groups.json").unlink()
    with_groups, without = fingerprint(grouped), fingerprint(TokenDataset(alone))
    assert "groups" not in without and without.items() < with_groups.items()


def test_views_stay_in_their_image_s_group(grouped, tmp_path):
    views = tokenize(grouped.path.parent, GRAYS, tmp_path / "views", (8, 8), views=2, workers=0)
    assert views.groups == [group for group in grouped.groups for _ in range(2)]


def test_crops_of_an_image_stay_together_without_groups(tmp_path):
    folder = tmp_path / "photos"
    for k in range(60):
        (folder / "ab"[k % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 60 + 120 * (k % 2)).save(folder / "ab"[k % 2] / f"{k}.png")
    views = tokenize(folder, GRAYS, tmp_path / "views", (8, 8), views=3, workers=0)
    chosen = choose_labelled(views, 0.2)
    assert views.groups is None and len(np.unique(chosen.groups)) == 60
    names = np.array(views.names)[chosen.indices]
    held_out, folds = draw_validation(chosen, 0.2, 0), draw_folds(chosen.labels, chosen.test, 0, chosen.groups)
    parts = [held_out, ~held_out & ~chosen.test, chosen.test], [folds == k for k in range(-1, FOLDS)]
    for split in parts:
        assert all(part.any() for part in split) and sum(len(set(names[part])) for part in split) == 60
    assert choose_labelled(tokenize(folder, GRAYS, tmp_path / "one", (8, 8), workers=0), 0.2).groups is None


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(0, 9))
def test_images_by_class(labels, seed):
    labels = np.array(labels, np.int64)
    which = np.random.default_rng(seed).random(len(labels)) < 0.6
    found = by_class(labels, which)
    wanted = [np.flatnonzero((labels == label) & which) for label in np.unique(labels)]
    wanted = [part for part in wanted if len(part)]
    assert len(found) == len(wanted) and all(map(np.array_equal, found, wanted))


def test_tables_that_share_labels_and_groups_out(folder, caplog):
    for part, header in (("p", "label"), ("q", "group")):
        (folder / part).mkdir()
        for k in range(2):
            Image.new("L", (4, 4), 100 * k).save(folder / part / f"{k}.png")
        write(folder / part, f"file_name,{header}", *(f"{k}.png,{'xy'[k]}" for k in range(2)))
    caplog.clear()
    source = open_source(folder)
    assert source.classes == ["x", "y"] and "no column `label`" not in caplog.text


def test_a_probe_of_groups(grouped):
    result = probe(make(size=(8, 8), colors=8), grouped, layers=[1], test_fraction=0.3)
    groups = {grouped.groups[index] for index in grouped.split("val", 0.3)}
    assert result.test_groups == len(groups) < result.test
    alone = intervals.of_share(np.arange(result.test) < round(result.test * result.pixels.accuracy))
    assert result.pixels.high - result.pixels.low > alone[1] - alone[0]
    assert result.test == len(grouped.split("val", 0.3)) and result.pixels.accuracy > 0.9


def test_joined_tokens_have_the_groups_of_both(grouped, tmp_path, caplog):
    folder = tmp_path / "test"
    folder.mkdir()
    for k in range(4):
        Image.new("L", (8, 8), 60 + 120 * (k % 2)).save(folder / f"{k}.png")

    def tests(name, header, rows):
        write(folder, f"file_name,label{header}", *(f"{k}.png,{'ab'[k % 2]}{rows}" for k in range(4)))
        return tokenize(folder, GRAYS, tmp_path / name, (8, 8), resize="none", workers=0)

    alone, one, none = tests("alone", "", ""), tests("one", ",group", ",x"), tests("none", ",group", ",")
    for test, number in ((alone, 4), (one, 1), (none, 4)):
        joined = JoinedTokens(grouped, test)
        assert len(set(joined.groups)) == len(set(grouped.groups)) + number
        assert len(choose_labelled(joined, 0.5).groups) == 244
        assert len(set(JoinedTokens(test, grouped).groups)) == len(set(joined.groups))
    assert not caplog.text
    same = tests("same", ",group", ",0")
    assert len(set(JoinedTokens(grouped, same).groups)) == len(set(grouped.groups)) + 1
    assert "images of 1 group (0) are learned from too, which makes the test too easy" in caplog.text


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 12)), min_size=6, max_size=60), st.floats(0.05, 0.9))
def test_validation_by_groups_leaves_something_of_every_class(images, fraction):
    labels, groups = (np.array(part) for part in zip(*images, strict=True))
    labels = np.unique(labels, return_inverse=True)[1].reshape(-1)
    chosen = chosen_from(labels, np.zeros(len(labels), bool), labels.max() + 1, groups)
    held_out = draw_validation(chosen, fraction, 3)
    assert whole(groups, np.flatnonzero(held_out), np.flatnonzero(~held_out))
    assert set(labels[~held_out]) == set(labels)
    assert not draw_validation(chosen, 0.0, 3).any()


def test_too_few_groups_for_the_penalty_are_said(caplog):
    labels, groups = np.arange(40) % 2, np.arange(40) % 2
    folds = draw_folds(labels, np.zeros(40, bool), 0, groups)
    assert np.bincount(folds).tolist() == [8] * 5
    assert "too few groups" in caplog.text


@pytest.mark.parametrize(("number", "listed"), [(3, "0, 1, 2"), (4, "0, 1, 2, …")])
def test_groups_on_both_sides_are_listed_up_to_three(caplog, tmp_path, number, listed):
    parts = []
    for seed in range(2):
        images = np.random.default_rng(seed).integers(0, 256, (8, 8, 8), np.uint8)
        np.savez(tmp_path / f"{seed}.npz", images=images, labels=np.arange(8) % 2, groups=np.arange(8) % number)
        parts.append(tokenize(tmp_path / f"{seed}.npz", GRAYS, tmp_path / f"t{seed}", (8, 8), workers=0))
    JoinedTokens(*parts)
    assert f"images of {number} groups ({listed}) are learned from too" in caplog.text


def test_tables_without_labels_are_told_together(caplog):
    tables = {f"{name}/metadata.csv": f"file_name,group\n{k}.png,x".encode() for k, name in ((1, "a"), (2, "b"))}
    classes_of(["a/1.png", "b/2.png"], tables, "photos")
    assert "photos: has no column `label`" in caplog.text
