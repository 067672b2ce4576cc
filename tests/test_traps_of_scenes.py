"""What tiles of scenes come with: files that nothing refuses, by which a test is too easy or an image unreadable."""

import io
import subprocess
import sys

import numpy as np
import pytest
from labelled import PALETTE, make, write_tokens
from PIL import Image

from igpt_fast import decode
from igpt_fast.checkpoint import save_checkpoint
from igpt_fast.errors import InputError
from igpt_fast.image_files import OUTSIDE, read_image
from igpt_fast.sources import open_source

tifffile = pytest.importorskip("tifffile", reason="TIFFs of several bands need the [tiff] extra")
LEFT = np.arange(8) < 4  # what was measured


def tiff(*pages):
    """A file of pages (numbers, options)."""
    data = io.BytesIO()
    with tifffile.TiffWriter(data) as file:
        for numbers, options in pages:
            file.write(numbers, **options)
    return data.getvalue()


def masked(numbers, **options):
    options = {"photometric": "rgb" if numbers.shape[2:] == (3,) else "minisblack", **options}
    small = numbers[::2, ::2]
    seen = np.broadcast_to(LEFT, numbers.shape[:2])
    mask = {"photometric": "mask", "subfiletype": 4}
    return tiff(
        (numbers, options),
        (small, options | {"subfiletype": 1}),
        (seen, mask),
        (~seen[::2, ::2], mask | {"subfiletype": 5}),
    )


BANDS = {"bands": (4, 3, 2), "value_range": (0, 200)}
OPAQUE = np.full((6, 8, 5), 100, np.uint16)
OPAQUE[..., 4] = 65535


@pytest.mark.parametrize(("numbers", "more", "how", "gray"), [
    (np.full((6, 8, 3), 200, np.uint8), None, {}, 200),
    (np.full((6, 8), 200, np.uint8), None, {}, 200),
    (np.full((6, 8), 3000, np.uint16), None, {"value_range": (0, 6000)}, 128),
    (np.full((6, 8, 5), 100, np.uint16), [0] * 4, BANDS, 128),
    (np.full((6, 8, 5), 100, np.int16), [0] * 4, BANDS, 128),
    (OPAQUE, [0, 0, 0, 2], BANDS, 128),
    (np.full((6, 8, 2), 0.5, np.float32), [0], {"bands": (2,), "value_range": (0, 1)}, 128),
])  # fmt: skip
def test_what_a_mask_hides_is_transparent(numbers, more, how, gray):
    options = {"planarconfig": "contig" if numbers.ndim == 3 else None, "extrasamples": more}
    image = read_image(masked(numbers, **options), "x", "#102030", **how)
    seen, hidden = np.asarray(image)[:, :4], np.asarray(image)[:, 4:]
    assert (seen == gray).all() and (hidden == [16, 32, 48]).all() and not image.info


def test_a_mask_is_no_band_and_belongs_to_the_page_before_it(tmp_path):
    colours, gray = np.full((6, 8, 3), 200, np.uint8), {"photometric": "minisblack"}
    with pytest.raises(InputError, match="it has 3 bands, so there is no band 4"):
        read_image(masked(colours, planarconfig="contig"), "x", bands=(4,))
    seen = np.broadcast_to(LEFT, (6, 8)), {"photometric": "mask", "subfiletype": 4}
    for numbers, how in (
        (np.full((6, 8), 200, np.uint8), {}),
        (np.full((6, 8), 0.5, np.float32), {"value_range": (0, 1)}),
    ):
        image = np.asarray(read_image(tiff((numbers, gray), (numbers, gray), seen), "x", **how))
        assert (image == image[0, 0]).all(), "the mask is of the second image"


def test_a_mask_of_a_palettes_image_that_lies_on_its_side():
    numbers = np.resize(np.arange(2, dtype=np.uint8), (6, 8))
    table = np.zeros((3, 256), np.uint16)
    table[:, 1] = 65535
    options = {"photometric": "palette", "colormap": table, "extratags": [(274, "H", 1, 6, True)]}
    data = tiff((numbers, options), (np.broadcast_to(LEFT, (6, 8)), {"photometric": "mask", "subfiletype": 4}))
    image = np.asarray(read_image(data, "x", "#102030"))
    assert image.shape == (8, 6, 3) and (image[4:] == [16, 32, 48]).all() and (image[:4] != [16, 32, 48]).any(-1).all()


def test_damage_behind_the_first_page_is_nobodys():
    page = np.full((6, 8), 200, np.uint8), {"photometric": "minisblack"}
    data = tiff(page, page)
    assert (np.asarray(read_image(data[:-20], "x")) == 200).all()


def test_opacity_behind_other_bands():
    bands = np.full((6, 8, 5), 100, np.uint16)
    bands[..., 4] = np.where(LEFT, 65535, 0)
    data = tiff((bands, {"photometric": "minisblack", "extrasamples": [0, 0, 0, 2], "planarconfig": "contig"}))
    image = np.asarray(read_image(data, "x", "#102030", (0, 200), (3, 2, 1)))
    assert (image[:, :4] == 128).all() and (image[:, 4:] == [16, 32, 48]).all()


@pytest.mark.parametrize(("values", "told"), [
    ([0.1, 0.9], True), ([4000, 9000], True), ([1, 400], False), ([0, 0], False), ([3000, 3000], False),
])  # fmt: skip
def test_a_range_that_misses_an_images_values_is_told(values, told, tmp_path, caplog):
    numbers = np.resize(np.array(values, np.float32), (4, 4))
    info = read_image(numbers, "x", value_range=(0, 3000)).info
    assert info == ({OUTSIDE: True} if told else {})
    decode._told.clear()
    decode.tell_lost("here", decode.Counter(info))
    assert ("here: 1 images lie outside --value-range" in caplog.text) == told


def picture(path, shade=9):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (5, 4), (shade,) * 3).save(path)


@pytest.mark.parametrize(("folders", "told"), [
    (["a/s1", "a/s2", "b/s3"], "a/s"), (["a/s1", "b/s2"], None), (["a", "b"], None), (["a", "a/s1", "b"], "a/s1"),
    (["train/a", "train/b", "Test/a", "Test/b"], None),
])  # fmt: skip
def test_folders_below_a_class_are_told(tmp_path, caplog, folders, told):
    for folder in folders:
        picture(tmp_path / folder / "x.png")
    assert open_source(tmp_path).classes == ["a", "b"]
    caplog.records[:] = [record for record in caplog.records if "parts of a data set" not in record.getMessage()]
    assert (f"lie in folders below their class, as {told}" in caplog.text) if told else not caplog.records
    caplog.clear()
    (tmp_path / "metadata.csv").write_text(f"file_name,group\n{folders[0]}/x.png,s\n")
    open_source(tmp_path)
    assert "below their class" not in caplog.text
    assert f"{len(folders) - 1} of {len(folders)} images have no group, and count as one each" in caplog.text


@pytest.mark.parametrize("name", ["METADATA.CSV", "metadata.jsonl"])
def test_a_table_of_another_name_is_told(tmp_path, caplog, name):
    picture(tmp_path / "a.png")
    (tmp_path / name).write_text("file_name,label\na.png,x\n")
    assert open_source(tmp_path).classes is None and f"{name}: is not used" in caplog.text


def test_a_table_that_is_gone_is_an_error(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.csv").symlink_to(tmp_path / "gone.csv")
    with pytest.raises(InputError, match=r"metadata\.csv: is no file, or a link to nothing"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "key, array", [("label", np.eye(4, 2)), ("group", np.array(["a", "b"])), ("label", [None] * 4)]
)
def test_arrays_that_are_none_of_each_image_are_told_and_left(tmp_path, caplog, key, array):
    np.savez(tmp_path / "x.npz", images=np.zeros((4, 3, 3, 3), np.uint8), **{key: array})
    source = open_source(tmp_path / "x.npz")
    assert source.labels is None and source.groups is None
    assert [record.getMessage().split("x.npz: ")[1] for record in caplog.records] == [
        f"its array {key} is not used: it does not hold an integer or a text for each image"
    ]


@pytest.mark.parametrize(("names", "groups", "told"), [
    (["images", "labels", "groups"], True, None), (["x", "label", "group"], True, None),
    (["images", "y", "scene"], False, "its array `scene` is not used"), (["data", "y", "names"], False, None),
    (["images", "data", "labels"], False, "its array data is not used: images is read"),
    (["images", "labels", "groups", "scene"], True, None),
])  # fmt: skip
def test_arrays_beside_images_are_used_or_told(tmp_path, caplog, names, groups, told):
    images, beside = np.zeros((4, 3, 3, 3), np.uint8), np.array(["p", "q", "p", "q"])
    images[:] = np.arange(4, dtype=np.uint8)[:, None, None, None]
    np.savez(tmp_path / "x.npz", **{name: images if name in ("images", "x", "data") else beside for name in names})
    source = open_source(tmp_path / "x.npz")
    assert (source.groups == ["group p", "group q"] * 2) if groups else source.groups is None
    assert (source.labels is not None) == any(name in ("labels", "label", "y") for name in names)
    assert (told in caplog.text) if told else not caplog.records


def test_eval_counts_held_out_images_that_were_learned_from_by_another_name(igpt, tmp_path):
    dataset = write_tokens(tmp_path, np.arange(60) % 3)
    learned, held_out = dataset.split("train"), dataset.split("val")
    shard = np.load(dataset.path / "shard-00000.npy")
    shard[held_out[:2]] = shard[learned[:2]]
    np.save(dataset.path / "shard-00000.npy", shard)
    shape = "--layers", "1", "--width", "8", "--heads", "1", "--batch", "2", "--steps", "1"
    assert igpt("train", dataset.path, "--out", tmp_path / "run", *shape)[0] == 0
    code, _, said = igpt("eval", tmp_path / "run", dataset.path, "--split", "val")
    assert code == 0 and "the model had learned from 2 of these images: what decides the split" in said


def test_a_class_that_is_not_tested_is_named(igpt, tmp_path):
    labels = np.arange(60) % 3
    dataset = write_tokens(tmp_path, labels)
    labels[dataset.split("val", 0.2)] = 0
    np.save(dataset.path / "labels.npy", labels.astype(np.int32))
    save_checkpoint(tmp_path / "run", 3, make(), PALETTE)
    code, _, said = igpt("finetune", tmp_path / "run", dataset.path, "--out", tmp_path / "tuned", "--steps", "1")
    assert code == 0 and f"not tested: {dataset.classes[1]}, {dataset.classes[2]}: no image of them was kept" in said


def test_a_model_that_has_moved_is_no_other_one(igpt, tmp_path):
    dataset = write_tokens(tmp_path, np.arange(60) % 3)
    save_checkpoint(tmp_path / "run", 3, make(), PALETTE)
    tuned = "--out", tmp_path / "tuned"
    assert igpt("finetune", tmp_path / "run", dataset.path, *tuned, "--steps", "1")[0] == 0
    code, _, said = igpt("finetune", tmp_path / "other", dataset.path, *tuned, "--steps", "2", "--resume")
    assert code == 2 and "--resume with another MODEL" in said
    (tmp_path / "run").rename(tmp_path / "moved")
    code, _, said = igpt("finetune", tmp_path / "moved", dataset.path, *tuned, "--steps", "2", "--resume")
    assert code == 0 and f"is gone from {tmp_path / 'run'}, so {tmp_path / 'moved'} is not compared" in said


@pytest.mark.parametrize("beside", ["tokens", "checkpoint"])
def test_a_palette_never_replaces_that_of_tokens_or_a_checkpoint(igpt, tmp_path, beside):
    dataset = write_tokens(tmp_path, np.arange(9) % 3)
    folder = dataset.path if beside == "tokens" else save_checkpoint(tmp_path / "run", 3, make(), PALETTE)
    before = (folder / "palette.npy").read_bytes()
    picture(tmp_path / "photos" / "a.png")
    code, _, said = igpt("palette", tmp_path / "photos", "--colors", "2", "--size", "2", "-o", folder / "palette.npy")
    assert code == 2 and "lies among tokens or in a checkpoint" in said
    assert (folder / "palette.npy").read_bytes() == before


def test_a_table_of_labels_is_never_replaced(igpt, tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,label\n")
    dataset = write_tokens(tmp_path / "made", np.arange(9) % 3)
    code, _, said = igpt("eval", tmp_path / "run", dataset.path, "-o", tmp_path / "metadata.csv")
    assert code == 2 and "says which classes images have, and would be replaced" in said


def test_who_reads_the_log_may_go(tmp_path):
    """All of the work is done, and saved."""
    dataset = write_tokens(tmp_path, np.arange(30) % 3)
    words = ["train", dataset.path, "--out", tmp_path / "run", "--layers", "1", "--width", "8", "--heads", "1"]
    line = [sys.executable, "-m", "igpt_fast", *map(str, words), "--batch", "2", "--steps", "3"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(line, stderr=full, stdout=subprocess.DEVNULL)
    assert done.returncode == 0 and (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()
