"""Whole models to compare with: Image GPT in plain torch, and Hugging Face's, with the weights of ours."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Call, Missing
from benchmarks.peers import SDPA, optional, quick_gelu
from igpt_fast.config import Config
from igpt_fast.model import ImageGPT
from igpt_fast.weights import to_hf_state_dict


class PlainGPT(nn.Module):
    """Image GPT as a careful user would write it in torch alone: SDPA, F.rms_norm, fused qkv, no biases.

    Parameters have our names with _ for ., but that wte [colors + 1, d] ends with sos.
    """

    def __init__(self, config: Config, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        named = {name.replace(".", "_"): tensor.clone() for name, tensor in state.items()}
        named["wte"] = torch.cat((named["wte"], named.pop("sos")[None]))
        self.p = nn.ParameterDict(named)
        self.seen: Tensor | None = None  # bool [T, T]: who sees whom, instead of everything before

    def forward(self, tokens: Tensor, start: int = 0, cache: Tensor | None = None) -> Tensor:
        """tokens [N, K], sos of token number `colors` included, for the slots start.. → logits [N, K, colors].

        cache [layers, 2, N, heads, T, head_dim] holds the slots before, and is given these.
        """
        c, p, stop = self.config, self.p, start + tokens.shape[1]
        h = F.embedding(tokens, p["wte"]) + p["wpe"][start:stop]
        for layer in range(c.layers):
            at = f"blocks_{layer}_"
            x = F.rms_norm(h, (c.width,), p[at + "ln_1"], c.eps)
            q, k, v = F.linear(x, p[at + "attn_qkv_weight"]).unflatten(-1, (3, c.heads, -1)).permute(2, 0, 3, 1, 4)
            if cache is not None:
                cache[layer, 0, :, :, start:stop], cache[layer, 1, :, :, start:stop] = k, v
                k, v = cache[layer, :, :, :, :stop]
            mixed = SDPA(q, k, v, attn_mask=self.seen, is_causal=start == 0 and self.seen is None)
            mixed = mixed.transpose(1, 2).flatten(2)
            h = h + F.linear(mixed, p[at + "attn_proj_weight"])
            x = F.rms_norm(h, (c.width,), p[at + "ln_2"], c.eps)
            h = h + F.linear(quick_gelu(F.linear(x, p[at + "mlp_fc_weight"])), p[at + "mlp_proj_weight"])
        return F.linear(F.rms_norm(h, (c.width,), p["ln_f"], c.eps), p["wtet"])

    def loss(self, tokens: Tensor) -> Tensor:
        """Nats per pixel.   tokens [N, T]"""
        return F.cross_entropy(self(shifted(tokens, self.config.colors)).flatten(0, 1), tokens.flatten())

    def new_cache(self, batch: int) -> Tensor:
        """An empty cache for forward."""
        c, like = self.config, self.p["wte"]
        return torch.zeros(
            c.layers, 2, batch, c.heads, c.tokens, c.head_dim, dtype=like.dtype, device=like.device
        )  # fmt: skip


def shifted(tokens: Tensor, colors: int) -> Tensor:
    """What a model that knows sos as token number `colors` reads: sos, then all but the last.   tokens [N, T]"""
    return torch.cat((torch.full_like(tokens[:, :1], colors), tokens[:, :-1]), 1)


def hf_model(model: ImageGPT, dropout: float = 0.0) -> Any:
    """transformers' ImageGPT with our model's weights; its attention is eager, it has no other. Or Missing.

    dropout: 0.1 everywhere unless a user asks for none, as Image GPT itself was trained.
    """
    transformers = optional("transformers")
    if isinstance(transformers, Missing):
        return transformers
    transformers.utils.logging.set_verbosity_error()
    c = model.config
    config = transformers.ImageGPTConfig(
        vocab_size=c.colors + 1, n_positions=c.tokens, n_embd=c.width, n_layer=c.layers, n_head=c.heads,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, attn_implementation="eager",
        bos_token_id=c.colors, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    hf = transformers.ImageGPTForCausalImageModeling(config)
    hf.load_state_dict(to_hf_state_dict(model))
    return hf.to(model.wte.device)


def hf_loss(hf: Any, tokens: Tensor) -> Tensor:
    """Nats per pixel of all pixels: the labels= of theirs would score one less.   tokens [N, T]"""
    logits = hf(input_ids=shifted(tokens, hf_colors(hf)), use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def draw(logits: Tensor, top_k: int | None = None) -> Tensor:
    """One token a row of logits [N, V], as anybody would draw it."""
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1).squeeze(1)


def hf_step(hf: Any, known: Tensor, pixel: Tensor) -> Call | Missing:
    """One cached step of HF's model after sos and the known pixels [N, K], and a draw → logits [N, colors]."""
    if isinstance(hf, Missing):
        return hf
    cache = hf(input_ids=shifted(F.pad(known, (0, 1)), hf_colors(hf)), use_cache=True).past_key_values

    def run() -> Tensor:
        logits = hf(input_ids=pixel[:, None], past_key_values=cache, use_cache=True).logits[:, -1]
        cache.crop(-1)  # the same step again
        draw(logits)
        return logits

    return run


def plain_step(plain: PlainGPT, known: Tensor, pixel: Tensor) -> Call:
    """The same of the plain torch model."""
    cache, start = plain.new_cache(len(known)), known.shape[1] + 1
    plain(shifted(F.pad(known, (0, 1)), plain.config.colors), 0, cache)

    def run() -> Tensor:
        logits = plain(pixel[:, None], start, cache)[:, -1]
        draw(logits)
        return logits

    return run


def plain_images(plain: PlainGPT, known: Tensor) -> Call:
    """Whole images from the plain torch model and its cache, behind known pixels [N, K] → tokens [N, T]."""
    config = plain.config

    @torch.inference_mode()
    def run() -> Tensor:
        cache, last = plain.new_cache(len(known)), shifted(F.pad(known, (0, 1)), config.colors)
        slot, tokens = 0, [known]
        while slot < config.tokens:
            token = draw(plain(last, slot, cache)[:, -1])[:, None]
            slot, last = slot + last.shape[1], token
            tokens.append(token)
        return torch.cat(tokens, 1)

    return run


def hf_colors(hf: Any) -> int:
    """Colours of HF's model: one token less than it knows, the last being sos."""
    return hf.config.vocab_size - 1


def generate(hf: Any, known: Tensor, steps: int) -> Call | Missing:
    """HF generate with its key-value cache: `steps` pixels behind sos and known ones [N, K] → tokens [N, K + steps]."""
    if isinstance(hf, Missing):
        return hf
    start = shifted(F.pad(known, (0, 1)), hf_colors(hf))
    options = {"do_sample": True, "top_k": 0, "use_cache": True, "attention_mask": torch.ones_like(start)}

    def run() -> Tensor:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # it has something to say about the length and about pad tokens
            return hf.generate(start, max_new_tokens=steps, **options)[:, 1:]

    return run
