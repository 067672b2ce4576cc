"""ImageGPT on one page: a pre-norm transformer over the pixels of an image, each pixel one of a palette's colours.

Autoregressive ("ar"): slot 0 holds the learned sos, slot i holds pixel i-1, and logit row i predicts pixel i, seeing
the slots 0..i. BERT ("bert"): slot i holds pixel i or, when masked, nothing but its position; every slot sees every
slot.

Shapes: N images, T = H·W pixels, d = width. The residual stream h is never normalised itself; each branch's output,
delta, waits until the next norm adds it, so that one kernel reads and writes the stream once per branch. Under autocast
the stream stays float32 and the norms hand autocast's dtype to the linears.
"""

import math
from collections.abc import Callable, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from igpt_fast import ops
from igpt_fast.config import Config
from igpt_fast.device import dtype_of
from igpt_fast.errors import InputError
from igpt_fast.image_tensors import tokens_of, visible
from igpt_fast.modules import is_plain, tensors_to_save
from igpt_fast.ops._native import why_plain
from igpt_fast.ops._tensors import tensor_of
from igpt_fast.palette import Palette
from igpt_fast.patterns import masks_of
from igpt_fast.positions import summed
from igpt_fast.pretrained import read_pretrained, write_pretrained

Store = Callable[[Tensor], None]  # what takes a layer's keys and values
MASKED = 0.15  # BERT: the share of pixels that is hidden from the model and scored


class ImageGPT(nn.Module):
    """The whole model. With `activation_checkpointing` the backward pass recomputes blocks: less memory, same bits."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.palette: Palette | None = None  # the colours that pretrained weights came with
        self.class_names: tuple[str, ...] | None = None  # those of wclf's rows
        self.preprocessing: dict[str, Any] = {}  # of its images, as far as it is known: TokenDataset.preprocessing
        d = config.width
        self.wte = _table(config.colors, d, std=0.02)
        if config.objective == "ar":
            self.sos = _table(d, std=0.02)
        if config.positions == "learned":
            self.wpe = _table(config.tokens, d, std=0.01)
        else:  # the sum has the same spread
            self.wpe_row, self.wpe_col = (_table(side, d, std=0.01 / math.sqrt(2)) for side in config.size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.ln_f = nn.Parameter(torch.ones(d))
        self.wtet = nn.Parameter(torch.zeros(config.colors, d))  # zero: a fresh model's loss is exactly ln(colors)
        if config.classes:
            self.wclf = nn.Parameter(torch.zeros(config.classes, d))

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, size: tuple[int, int] | None = None, heads: int | None = None,
        dtype: torch.dtype | str | None = None, device: str | torch.device = "cpu",
    ) -> "ImageGPT":  # fmt: skip
        """Published weights: a directory in Hugging Face's layout, a name on their hub, an OpenAI checkpoint's prefix.

        `model.palette`, `.class_names` and `.preprocessing` lay with them, or are empty. dtype: None, or "auto", is
        theirs. size: (height, width) that their positions are brought to, by `igpt_fast.positions.resized`. heads: see
        `igpt_fast.pretrained.read_pretrained`. Raises InputError that names the file and the key.
        """
        wanted, found = dtype_of(dtype, device), read_pretrained(source, size, heads)
        model = cls.empty(found.config, wanted or found.tensors["wte"].dtype, device)
        model.load_state_dict(found.tensors)
        model.palette, model.class_names, model.preprocessing = found.palette, found.class_names, found.preprocessing
        return model

    @classmethod
    def empty(cls, config: Config, dtype: torch.dtype, device: str | torch.device) -> "ImageGPT":
        """A model whose numbers are still to be written: none is drawn, and the random state stays as it is."""
        with torch.device("meta"):
            model = cls(config)
        return model.to(dtype).to_empty(device=device)

    def save_pretrained(self, path: str | Path, palette: Palette | None = None, overwrite: bool = False) -> None:
        """Writes a directory that transformers' ImageGPT loads, and `from_pretrained` too; whole or not at all.

        palette: None writes `self.palette`, if any. overwrite: replaces such a directory. Axial positions are written
        as their sums, and come back as learned ones. A BERT model is written too, whose shapes transformers refuses,
        and a pattern, where it would compute dense attention, of which a warning is logged. Raises InputError.
        """
        beside = self.class_names, self.preprocessing
        write_pretrained(path, self.config, tensors_to_save(self), palette or self.palette, overwrite, *beside)

    def forward(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits [N, T, colors]; row i predicts pixel i.   tokens [N, H, W] or [N, T], integers of torch or NumPy

        keep (BERT only): bool, shaped as the tokens, True = visible; None = all visible. Raises InputError for tokens
        of a wrong shape or dtype, and, on the CPU, outside the palette (on a GPU that check would wait for the device).
        """
        return ops.projection(self.hidden(tokens, keep), self.wtet)

    def loss(
        self, tokens: Tensor, keep: Tensor | None = None, generator: torch.Generator | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Nats per pixel, a scalar.   tokens [N, H, W] or [N, T]

        AR: the mean over all N·T pixels; nothing is drawn. BERT: the mean cross-entropy of each image's masked pixels,
        then the mean over the images; an image without a masked pixel counts as 0. `keep` (True = visible) is drawn as
        uniform > 0.15 from `generator` when it is not given. hidden: `hidden(tokens, keep)`, where it is known already.
        """
        tokens = self.check_tokens(tokens)
        bert = self.config.objective == "bert"
        if bert and keep is None and hidden is not None:
            raise InputError("loss: hidden was given without the keep that it was computed with; give both")
        if bert and keep is None:
            where = getattr(generator, "device", tokens.device)
            keep = torch.rand(tokens.shape, generator=generator, device=where) > MASKED
        keep = visible(keep, tokens, self.config)
        hidden = self.hidden(tokens, keep) if hidden is None else hidden
        if not bert:
            return ops.linear_cross_entropy(hidden, self.wtet, tokens).mean()
        nats = ops.cross_entropy(ops.projection(hidden, self.wtet), tokens, reduction="none")
        masked = ~keep
        return ((nats * masked).sum(1) / masked.sum(1).clamp(min=1)).mean()

    def classify(self, tokens: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Class logits [N, classes]: the mean of the final norm's output (`hidden`, where it is known), times wclf.

        Raises InputError for a model without a head.
        """
        if not self.config.classes:
            raise InputError("this model has no classifier head: igpt-fast finetune, or Config(classes=...), gives one")
        return ops.projection((self.hidden(tokens) if hidden is None else hidden).mean(1), self.wclf)

    def features(self, tokens: Tensor, layer: int | Sequence[int] | None = None, pool: bool = True) -> Tensor:
        """The paper's probe features: means over positions, float32 or wider.   tokens [N, H, W] or [N, T]

        Layer l < layers is the ln_1 output of block l (what its attention reads), `layers` the final norm's. Returns
        [N, width] for one layer, [k, N, width] for k of them or, with None, for all; blocks above the last do not run.
        pool=False: of every position, [..., N, T, width]. BERT models see all.
        """
        last = self.config.layers
        wanted = range(last + 1) if layer is None else layer if isinstance(layer, Sequence) else [layer]
        if not len(wanted) or not all(isinstance(one, Integral) and 0 <= one <= last for one in wanted):
            raise InputError(f"features of layer {layer} were asked for; this model has layers 0 to {last}")
        h, delta, pooled = self._start(self.check_tokens(tokens)), None, {}
        for index, weight in enumerate([*(block.ln_1 for block in self.blocks), self.ln_f]):
            if index in wanted:
                x, _ = _norm(h, delta, weight, self.config.eps, torch.promote_types(h.dtype, torch.float32))
                pooled[index] = x.mean(1) if pool else x
            if index < max(wanted):
                h, delta = self.blocks[index](h, delta)
        return pooled[layer] if isinstance(layer, Integral) else torch.stack([pooled[index] for index in wanted])

    def forward_features(self, images: Tensor, resize: str | None = None) -> Tensor:
        """As timm's: the final norm's output [B, T, width] of images [B, 3, H, W], as `tokenize` takes them."""
        return self.hidden(self.tokenize(images, resize))

    def tokenize(self, images: Tensor, resize: str | None = None) -> Tensor:
        """Tokens int64 [B, H, W] of images [B, 3, any, any], uint8 or float in [0, 1], by `self.palette`.

        resize: see images.resize_image; None: as `self.preprocessing` has it, or "paper". InputError without a palette.
        """
        return tokens_of(images, self.palette, self.config, resize or self.preprocessing.get("resize"), self.wte.device)

    def hidden(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """The final norm's output [N, T, width], which both heads read. Arguments as in `forward`."""
        tokens = self.check_tokens(tokens)
        h, delta = self._start(tokens, visible(keep, tokens, self.config)), None
        for block in self.blocks:
            again = self.activation_checkpointing and torch.is_grad_enabled()
            h, delta = checkpoint(block, h, delta, use_reentrant=False) if again else block(h, delta)
        return _norm(h, delta, self.ln_f, self.config.eps)[0]

    def embed(self, pixels: Tensor, keep: Tensor | None = None) -> Tensor:
        """AR: the first K pixels [N, K] fill K + 1 slots, sos first. BERT: [N, T] fill T. → [N, slots, width]"""
        h = F.embedding(pixels, self.wte)
        if self.config.objective == "ar":
            h = torch.cat((self.sos.expand(pixels.shape[0], 1, -1), h), dim=1)
        h = h if keep is None else h * keep.unsqueeze(-1)
        return h + self.position_table()[: h.shape[1]]

    def position_table(self) -> Tensor:
        """What is added to the slots [T, width]; slot i has that of the place of pixel i, which it predicts."""
        return self.wpe if self.config.positions == "learned" else summed(self.wpe_row, self.wpe_col)

    def num_parameters(self) -> int:
        """How many numbers the model learns."""
        return sum(p.numel() for p in self.parameters())

    def _start(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        # The last pixel is never an input of an autoregressive model.
        return self.embed(tokens[:, :-1] if self.config.objective == "ar" else tokens, keep)

    def check_tokens(self, tokens: Any) -> Tensor:
        """tokens as int64 [N, T], or an InputError that says what is wrong with them."""
        tokens = tokens if isinstance(tokens, Tensor) else tensor_of(tokens, "tokens are").to(self.wte.device)
        c, shape = self.config, tuple(tokens.shape)
        if len(shape) not in (2, 3) or shape[1:] not in (c.size, (c.tokens,)):
            raise InputError(f"tokens have shape {list(shape)}, not [N, {c.tokens}] or [N, {str(c.size)[1:-1]}]")
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise InputError(f"tokens are {tokens.dtype}; give integers, such as Palette.encode returns")
        tokens = tokens.flatten(1).long()
        if tokens.device.type == "cpu" and tokens.numel() and not (torch.compiler.is_compiling() or why_plain()):
            low, high = (int(end) for end in tokens.aminmax())
            if (bad := low if low < 0 else high) not in range(c.colors):
                raise InputError(f"token {bad} is out of range: a palette of {c.colors} has tokens 0 to {c.colors - 1}")
        return tokens


class Block(nn.Module):
    """h, delta → h + delta + attention, MLP output: a pre-norm block whose last residual add is the next norm's."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.eps = config.eps
        self.ln_1 = nn.Parameter(torch.ones(config.width))
        self.attn = Attention(config, layer)
        self.ln_2 = nn.Parameter(torch.ones(config.width))
        self.mlp = MLP(config)

    def forward(self, h: Tensor, delta: Tensor | None, store: Store | None = None) -> tuple[Tensor, Tensor]:
        x, h = _norm(h, delta, self.ln_1, self.eps)
        x, h = _norm(h, self.attn(x, store), self.ln_2, self.eps)
        return h, self.mlp(x)


class Attention(nn.Module):
    """One linear makes q, k and v; they stay where it wrote them, as strided views."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        d, self.heads, self.causal = config.width, config.heads, config.objective == "ar"
        self.size, self.patterns = config.size, config.patterns(layer)
        self.qkv = Linear(d, 3 * d, config.bias, std=1 / math.sqrt(d))
        self.proj = Linear(d, d, config.bias, std=1 / math.sqrt(d * config.layers))

    def forward(self, x: Tensor, store: Store | None = None) -> Tensor:
        """x [N, K, d] → [N, K, d]. store is given k and v of the slots 0..K-1, a view [N, 2, heads, K, head_dim]."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [N, K, 3, heads, head_dim]
        if store is not None:
            store(qkv[:, :, 1:].permute(0, 2, 3, 1, 4))
        masks = masks_of(self.patterns, self.size, self.causal, x.shape[1], x.device)
        return self.proj(ops.attention_packed(qkv, mask=masks, causal=self.causal).flatten(2))


class MLP(nn.Module):
    """proj(quick_gelu(fc(x))); fc's bias is added by the activation, which touches every element anyway."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.fc = Linear(config.width, config.mlp_width, config.bias, std=0.02)
        self.proj = Linear(config.mlp_width, config.width, config.bias, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        plain = is_plain(self.fc)  # or else it is to be called
        x, bias = (ops.projection(x, self.fc.weight), self.fc.bias) if plain else (self.fc(x), None)
        return self.proj(ops.bias_quick_gelu(x, bias))


class Linear(nn.Linear):
    """nn.Linear that starts as N(0, std), its bias at zero."""

    def __init__(self, fan_in: int, fan_out: int, bias: bool, std: float) -> None:
        self.std = std
        super().__init__(fan_in, fan_out, bias)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return ops.projection(x, self.weight, self.bias)


def _table(*shape: int, std: float) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape).normal_(std=std))


def _norm(
    h: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """norm(h + delta) in `dtype` (None: the one the linears want), and h + delta itself."""
    kind = h.device.type
    if dtype is None and kind != "meta" and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    if delta is None:
        return ops.rms_norm(h, weight, eps, dtype=dtype), h
    return ops.rms_norm(delta, weight, eps, residual=h, dtype=dtype)
