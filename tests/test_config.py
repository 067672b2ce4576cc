"""Config: presets, a way through JSON and back, and a clear word for everything impossible."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from igpt_fast.config import Config
from igpt_fast.errors import InputError


def test_presets_and_derived_numbers():
    small = Config.preset("S")
    assert (small.tokens, small.head_dim, small.mlp_width, small.colors) == (1024, 64, 2048, 512)
    assert [Config.preset(name).head_dim for name in ("M", "L", "XL")] == [128, 96, 128]
    assert Config.preset("L", size=48, objective="bert").tokens == 2304
    assert dataclasses.FrozenInstanceError is type(_raised(lambda: setattr(small, "width", 3)))
    with pytest.raises(InputError, match="S, M, L, XL"):
        Config.preset("XXL")


def _raised(action) -> Exception | None:
    try:
        action()
    except Exception as error:
        return error
    return None


@settings(deadline=None, max_examples=50)
@given(
    layers=st.integers(1, 100),
    heads=st.integers(1, 32),
    head_dim=st.integers(1, 200),
    colors=st.integers(2, 5000),
    size=st.tuples(st.integers(1, 100), st.integers(1, 100)),
    objective=st.sampled_from(["ar", "bert"]),
    bias=st.booleans(),
    classes=st.integers(0, 1000),
    mlp_width=st.none() | st.integers(1, 9000),
)
def test_config_survives_json(heads, head_dim, **fields):
    config = Config(width=heads * head_dim, heads=heads, **fields)
    again = Config.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 100, "heads": 8}, r"width 100 does not divide into 8 heads .* use width 104 or heads 10"),
        ({"width": 7, "heads": 16}, r"use width 16 or heads 7"),
        ({"width": 510, "heads": 8}, r"use width 512 or heads 6"),
        ({"layers": 0}, "layers is 0"),
        ({"layers": 2.5}, "layers is 2.5"),
        ({"layers": True}, "layers is True"),
        ({"layers": 10**20}, "layers is 100000000000000000000; use at most 10,000"),
        ({"width": 10**20}, "width is 100000000000000000000; use at most 100,000"),
        ({"size": (32, 10**20)}, r"size \(width\) is 100000000000000000000; use at most 100,000"),
        ({"layers": "8"}, "layers is '8'"),
        ({"heads": -1}, "heads is -1"),
        ({"colors": 1}, "colors is 1; use a whole number of at least 2"),
        ({"size": (0, 8)}, r"size \(height\) is 0"),
        ({"size": (8, 8, 3)}, r"give \(height, width\)"),
        ({"size": "32"}, "size"),
        ({"objective": "gan"}, "use one of 'ar', 'bert'"),
        ({"bias": 1}, "bias is 1"),
        ({"classes": -1}, "classes is -1"),
        ({"mlp_width": 0}, "mlp_width is 0"),
        ({"eps": 0}, "eps is 0"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"hieght": 3, "depth": 3}, "unknown config field depth, hieght"),
    ],
)
def test_impossible_configs_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Config.from_dict({"layers": 2, "width": 64, "heads": 4, **fields})


def test_config_names_what_is_missing():
    with pytest.raises(InputError, match="lacks width, heads"):
        Config.from_dict({"layers": 3})
