"""What a step sees: every image once an epoch, in an order, mirrored and masked, that seed and step alone decide."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import write_tokens

from igpt_fast import batches as module
from igpt_fast.batches import Batches, images_of_step, shifted
from igpt_fast.data import tokenize
from igpt_fast.errors import InputError
from igpt_fast.options import Options
from igpt_fast.palette import Palette
from igpt_fast.tokens import TokenDataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> TokenDataset:
    return write_tokens(tmp_path_factory.mktemp("data"))


@given(count=st.integers(1, 30), batch=st.integers(1, 40), seed=st.integers(0, 9))
def test_every_epoch_holds_every_image_once_in_an_order_of_its_own(count, batch, seed):
    indices = np.arange(100, 100 + count)
    stream = np.concatenate([images_of_step(indices, batch, seed, step) for step in range(2 * count // batch + 1)])
    for epoch in range(len(stream) // count):
        assert np.array_equal(np.sort(stream[epoch * count : (epoch + 1) * count]), indices)
    if count > 20 and len(stream) >= 2 * count:
        assert not np.array_equal(stream[:count], stream[count : 2 * count])
        assert not np.array_equal(stream[:count], indices)


def test_steps_are_the_same_in_any_order_and_differ_between_seeds(dataset):
    options = Options(batch=16, flip=True, seed=3)
    forward, backward, other = (Batches(dataset, o, "bert") for o in (options, options, Options(batch=16, flip=True)))
    wanted = [forward.of_step(step) for step in range(4)]
    for step in (3, 1, 2, 0):
        tokens, keep, _ = backward.of_step(step)
        assert torch.equal(tokens, wanted[step][0]) and torch.equal(keep, wanted[step][1])
    assert not torch.equal(other.of_step(0)[0], wanted[0][0]) and not torch.equal(other.of_step(0)[1], wanted[0][1])
    masked = 1 - torch.stack([batch.keep for batch in wanted]).float().mean()
    assert 0.1 < masked < 0.2 and wanted[0][1].shape == (16, 4, 6)


def test_flips_mirror_about_half_of_the_images(dataset):
    plain, flipped = (Batches(dataset, Options(batch=200, flip=flip), "ar").of_step(7)[0] for flip in (False, True))
    mirrored = [not torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    assert 70 < sum(mirrored) < 130
    assert all(torch.equal(b, a.flip(1) if m else a) for a, b, m in zip(plain, flipped, mirrored, strict=True))


def test_a_held_out_image_has_one_mask_however_they_are_batched(dataset):
    batches = Batches(dataset, Options(val_fraction=0.5, val_images=0), "bert")
    whole, parts = next(batches.validation(len(batches.held_out))), list(batches.validation(3))
    for n in (0, 1):
        assert torch.equal(torch.cat([part[n] for part in parts]), whole[n])
    assert len(parts) > 2 and 0.05 < 1 - whole[1].float().mean() < 0.25
    assert next(Batches(dataset, Options(val_fraction=0.5), "ar").validation(4))[1] is None


@given(
    height=st.integers(2, 7), width=st.integers(2, 7), count=st.integers(1, 4), seed=st.integers(0, 99), data=st.data()
)
def test_shifting_tokens_is_padding_and_cropping_pixels(height, width, count, seed, data):
    reach = data.draw(st.integers(1, min(height, width) - 1))
    random = np.random.default_rng(seed)
    tokens, by = random.integers(0, 16, (count, height, width)), random.integers(-reach, reach + 1, (2, count))
    padded = np.pad(tokens, ((0, 0), (reach, reach), (reach, reach)), mode="reflect")
    wanted = [
        image[reach + down : reach + down + height, reach + right : reach + right + width]
        for image, down, right in zip(padded, *by, strict=True)
    ]
    assert np.array_equal(shifted(torch.from_numpy(tokens), by).numpy(), np.stack(wanted))


def test_shifts_reach_as_far_either_way(dataset, monkeypatch):
    drawn = []
    monkeypatch.setattr(module, "shifted", lambda tokens, by: drawn.append(by) or tokens)
    Batches(dataset, Options(batch=200, shift=2), "ar").of_step(0)
    ((rows, columns),) = drawn
    assert set(rows) == set(columns) == {-2, -1, 0, 1, 2}


def test_shifts_are_drawn_anew_for_each_image_and_step(dataset):
    plain, some, again = (Batches(dataset, Options(batch=200, shift=reach), "ar") for reach in (0, 2, 2))
    assert torch.equal(some.of_step(5).tokens, again.of_step(5).tokens)
    first = plain.of_step(5).tokens
    same = [torch.equal(a, b) for a, b in zip(first, some.of_step(5).tokens, strict=True)]
    assert 0 < sum(same) < 30, "about one in 25 stays where it is"
    with pytest.raises(InputError, match="--shift is 4; use less than the 4 pixels of a side"):
        Batches(dataset, Options(shift=4), "ar")


def test_whatever_is_drawn_has_a_stream_of_its_own_of_the_seed(dataset, monkeypatch):
    drawn, real = [], module._random
    monkeypatch.setattr(module, "_random", lambda *key: drawn.append(key) or real(*key))
    module._permutation.cache_clear()
    batches = Batches(dataset, Options(batch=4, flip=True, shift=1, seed=3, val_fraction=0.3), "bert")
    batches.of_step(7)
    of_step = {(3, module.FLIP, 7), (3, module.MASK, 7), (3, module.SHIFT, 7)}
    assert of_step <= set(drawn) and {key[1] for key in set(drawn) - of_step} == {module.ORDER}
    drawn.clear()
    list(batches.validation(2))
    assert drawn == [(3, module.VALIDATION, number) for number in range(len(batches.held_out))]


def test_no_image_is_validated_twice_where_fewer_are_held_out_than_asked_for(dataset):
    held_out = Batches(dataset, Options(val_fraction=0.3, val_images=500), "ar").held_out
    assert np.array_equal(held_out, dataset.split("val", 0.3))


def test_a_fingerprint_knows_the_last_name_and_images_from_all_over(tmp_path):
    names = [f"{number}.png" for number in range(150)]
    assert module._digest_of_texts(names) != module._digest_of_texts([*names[:-1], "x.png"])
    first = write_tokens(tmp_path / "first", count=150)
    pixels = np.load(tmp_path / "first" / "images.npy")
    np.save(tmp_path / "images.npy", np.concatenate([pixels[:100], pixels[50:100]]))
    other = tokenize(tmp_path / "images.npy", first.palette, tmp_path / "other", (4, 6), resize="none", workers=0)
    assert module.fingerprint(first)["tokens"] != module.fingerprint(other)["tokens"]


def test_a_fingerprint_tells_what_splits_the_images(tmp_path):
    """Names, or groups: of the same images others would be held out."""
    dataset = write_tokens(tmp_path)
    found = module.fingerprint(dataset)
    groups, colours = [f"group {row // 2}" for row in range(len(dataset))], Palette(-dataset.palette.centers)
    for name, value in (("names", [*dataset.names[:-1], "other.png"]), ("groups", groups), ("palette", colours)):
        other = copy.copy(dataset)
        vars(other)[name] = value
        told = module.fingerprint(other)
        assert {key for key in {*found, *told} if found.get(key) != told.get(key)} == {name}


def test_a_seed_means_the_same_images_from_version_to_version():
    assert images_of_step(np.arange(12), 8, 3, 2).tolist() == [8, 4, 7, 1, 2, 0, 10, 5]
