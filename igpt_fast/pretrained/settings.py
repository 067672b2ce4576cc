"""Hugging Face's config.json: what it asks of the forward pass, honoured or refused by name; and ours written as one.

Beside their fields, files of ours hold `igpt_fast`: the grid of pixels, which theirs does not know, the objective, a
sparse model's pattern, and how the images were read.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from igpt_fast.config import Config
from igpt_fast.errors import InputError, whole
from igpt_fast.images import NOTED, Preprocessing
from igpt_fast.palette import HF_CONFIG

log = logging.getLogger("igpt_fast")

OURS = "igpt_fast"

# Their fields that are shapes, with their defaults and other names.
_SHAPES = {"n_layer": 24, "n_embd": 512, "n_head": 8, "n_positions": 1024, "vocab_size": 513, "n_inner": None}
_ALIASES = {
    "num_hidden_layers": "n_layer",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}

# What ours does not compute: field → the one value that means "nothing of the kind".
_UNSUPPORTED = {
    "model_type": "imagegpt",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "tie_word_embeddings": False,
    "activation_function": "quick_gelu",
    "pruned_heads": {},
    "quantization_config": None,
    "auto_map": None,  # a forward pass written elsewhere
}

# What changes no output of a trained model. reorder_and_upcast_attn only says where theirs rounds: ours always
# accumulates attention in float32. The rest is of their training, of text generation and of their bookkeeping.
_HARMLESS = set(
    """
    reorder_and_upcast_attn attn_pdrop embd_pdrop resid_pdrop initializer_range use_cache layer_norm_epsilon
    _attn_implementation_autoset _commit_hash _name_or_path architectures attn_implementation bad_words_ids
    begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label is_decoder
    label2id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_labels
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix problem_type
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype
    torchscript transformers_version typical_p use_bfloat16
    """.split()  # noqa: SIM905
)


def read_settings(
    settings: Mapping[str, Any],
    where: str,
    grid: tuple[int, int] | None = None,
    asked: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Fields of Config (all but bias and classes, which the weights tell) that a config.json, read as JSON, asks for.

    where: its name, for errors. grid: (height, width) that the processor beside it has; its own size goes before a grid
    of 32x32, which is what a processor says that was never told. asked: see `grid_of`. Raises InputError that names the
    field whose value is not supported or makes no sense, or differs from `grid`; one that is not known is logged.
    """
    check_supported(settings, where)
    known = _UNSUPPORTED.keys() | _HARMLESS | _SHAPES.keys() | _ALIASES.keys() | {OURS}
    if unknown := sorted(map(str, settings.keys() - known)):
        log.warning("%s: not known to ImageGPT, and not used: %s", where, ", ".join(unknown))
    ours = settings.get(OURS, {})
    size = ours.get("size", [1, 1]) if isinstance(ours, dict) else None
    pair = isinstance(size, list) and len(size) == 2 and all(type(side) is int for side in size)
    if not pair or ours.keys() - {"objective", "size", "pattern", "reading"}:
        raise InputError(f"{where}: {OURS} is {ours!r}; it holds objective, size (height, width), pattern and reading")
    own = tuple(ours["size"]) if "size" in ours else None
    if own and grid and own != grid != (32, 32):
        says, beside = (f"{height}x{width}" for height, width in (own, grid))
        raise InputError(f"{where}: {OURS} has size {says} and {HF_CONFIG} beside it {beside}; correct either")
    shapes = {**_SHAPES, **{_ALIASES.get(name, name): value for name, value in settings.items()}}
    positions, rows = (whole(f"{where}: {name}", shapes[name], 1) for name in ("n_positions", "vocab_size"))
    objective = ours.get("objective", "ar")
    return {
        "layers": shapes["n_layer"],
        "width": shapes["n_embd"],
        "heads": shapes["n_head"],
        "colors": rows - (objective == "ar"),
        "size": grid_of(positions, own or grid, where, asked),
        "pattern": ours.get("pattern"),
        "objective": objective,
        "mlp_width": shapes["n_inner"],
        "eps": settings.get("layer_norm_epsilon", 1e-5),
    }


def check_supported(settings: Any, where: str) -> None:
    """Raises InputError naming the first field that asks for what ours does not compute.

    settings: config.json's fields, or transformers' own config object.
    """
    for field, nothing in _UNSUPPORTED.items():
        value = settings.get(field, nothing) if isinstance(settings, Mapping) else getattr(settings, field, nothing)
        if value != nothing and not (value is None and not nothing):
            raise InputError(f"{where} has {field}={value!r}, which is not supported; only {nothing!r} is")


def grid_of(
    positions: int, size: tuple[int, int] | list[int] | None, where: str, asked: tuple[int, int] | None = None
) -> tuple[int, int]:
    """`size` (height, width), which must have so many pixels; where it is None, `asked` if it has, or the square.

    asked: the size that a caller wants, be it that of the positions or one that they are to be brought to. Raises
    InputError.
    """
    if size is None and not (asked and math.prod(asked) == positions):
        side = math.isqrt(positions)
        if side * side == positions:
            return side, side
        if asked is None:
            raise InputError(f"{where}: {positions} positions are not a square; give the size, height x width")
    height, width = size or asked
    if height * width != positions:
        raise InputError(f"{where}: size {height}x{width} does not fit the {positions} positions")
    return height, width


def read_class_names(settings: Mapping[str, Any], classes: int, where: str) -> tuple[str, ...] | None:
    """The names in id2label, in the order of the head's rows; None, which is logged, where they do not fit its rows."""
    found = settings.get("id2label")
    if not classes or found is None:
        return None
    wanted = [str(row) for row in range(classes)]
    if not isinstance(found, dict) or sorted(found) != sorted(wanted) or len({*map(str, found.values())}) < classes:
        log.warning("%s: id2label does not name the %d classes of the head one by one, and is not used", where, classes)
        return None
    return tuple(str(found[row]) for row in wanted)


def read_preprocessing(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """How the images that the model has learned from were read, as far as a file says. Raises InputError."""
    found = settings.get(OURS, {}).get("reading") or {}
    try:
        if found.keys() <= set(NOTED) and Preprocessing(**found):
            return dict(found)
    except (AttributeError, TypeError, InputError) as error:
        raise InputError(f"{where}: {OURS} has reading {found!r}, by which no image can be read ({error})") from error
    raise InputError(f"{where}: {OURS} has reading {found!r}; it holds {', '.join(NOTED)}")


def write_settings(
    config: Config,
    dtype: str,
    headless: bool = False,
    class_names: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """The config.json with which transformers' ImageGPT computes what a model of `config` computes.

    headless: its output table is not among the weights. class_names: of a head; None: LABEL_0 and so on. A BERT model
    has no sos: its vocab_size is one less than transformers counts on, which therefore refuses its shapes.
    """
    ours = {"objective": config.objective, "size": list(config.size)}
    if config.pattern is not None:
        ours["pattern"] = config.to_dict()["pattern"]
    if preprocessing:
        ours["reading"] = dict(preprocessing)
    bare = "ImageGPTModel" if headless else "ImageGPTForCausalImageModeling"
    kind = "ImageGPTForImageClassification" if config.classes else bare
    settings = {
        "architectures": [kind],
        "model_type": "imagegpt",
        "vocab_size": config.colors + (config.objective == "ar"),
        "n_positions": config.tokens,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": None if config.mlp_width == 4 * config.width else config.mlp_width,
        "activation_function": "quick_gelu",
        "layer_norm_epsilon": config.eps,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "initializer_range": 0.02,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        # Until 5.12 at least, transformers drops the fraction of the head dim's root (M: 11, not 11.3), but not on
        # this path.
        "reorder_and_upcast_attn": math.isqrt(config.head_dim) ** 2 != config.head_dim,
        "tie_word_embeddings": False,
        "use_cache": True,
        "dtype": dtype,
        OURS: ours,
    }
    if config.classes:
        names = class_names or [f"LABEL_{index}" for index in range(config.classes)]
        settings |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    return settings
