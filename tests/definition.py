"""The model written out from its definition in float64 numpy; it shares only the names of weights with the package."""

import math

import numpy as np
import torch

from igpt_fast.patterns import BlockMask


def opinionated(model, std=0.3):
    """The model, no parameter of it zero, so that nothing hides behind a zero head or zero biases."""
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=std)
    return model


def pixels(model, n, seed=1):
    """Tokens [n, H, W] as the model reads them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.colors, (n, *model.config.size), generator=generator)


def assert_defined(model, tokens):
    """Logits, features and, of an autoregressive model, the loss equal the definition, whose logits are returned."""
    logits, features = transcript(model, tokens)
    np.testing.assert_allclose(model(tokens).detach().numpy(), logits, rtol=0, atol=1e-9)
    np.testing.assert_allclose(model.features(tokens).detach().numpy(), features, rtol=0, atol=1e-9)
    if model.config.objective == "ar":
        want = cross_entropy(logits, tokens).mean()
        np.testing.assert_allclose(model.loss(tokens).item(), want, rtol=0, atol=1e-6)  # the op returns float32
    return logits


def transcript(model, tokens, keep=None):
    """The forward pass from its definition in float64 numpy: logits [N, T, V] and features [layers + 1, N, d]."""
    p = {name: value.detach().double().numpy() for name, value in model.state_dict().items()}
    c, x = model.config, tokens.flatten(1).numpy()

    def norm(h, g):
        return g * h / np.sqrt((h**2).mean(-1, keepdims=True) + c.eps)

    def linear(h, name):
        return np.einsum("nti,oi->nto", h, p[name + ".weight"]) + p.get(name + ".bias", 0.0)

    h = p["wte"][x]
    if c.objective == "ar":
        h = np.concatenate([np.broadcast_to(p["sos"], (len(x), 1, c.width)), h[:, :-1]], axis=1)
    elif keep is not None:
        h = h * keep.flatten(1).numpy()[..., None]
    if c.positions == "axial":  # pixel (y, x) has those of row y and of column x
        h = h + np.stack([p["wpe_row"][i // c.size[1]] + p["wpe_col"][i % c.size[1]] for i in range(c.tokens)])
    else:
        h = h + p["wpe"]
    features = []
    for layer in range(c.layers):
        at = f"blocks.{layer}."
        y = norm(h, p[at + "ln_1"])
        features.append(y.mean(1))
        q, k, v = linear(y, at + "attn.qkv").reshape(len(x), c.tokens, 3, c.heads, c.head_dim).transpose(2, 0, 1, 3, 4)
        scores = np.einsum("nqhe,nkhe->nhqk", q, k) / math.sqrt(c.head_dim)
        if c.objective == "ar":
            scores = np.where(np.tril(np.ones((c.tokens, c.tokens), bool)), scores, -np.inf)
        texts = c.patterns(layer)
        for head in range(c.heads):
            if text := texts[head % len(texts)]:
                mask = BlockMask.compile(text, c.size, causal=c.objective == "ar")
                scores[:, head] = np.where(mask.dense().numpy(), scores[:, head], -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("nhqk,nkhe->nqhe", weights, v).reshape(h.shape)
        h = h + linear(mixed, at + "attn.proj")
        z = linear(norm(h, p[at + "ln_2"]), at + "mlp.fc")
        h = h + linear(z / (1 + np.exp(-1.702 * z)), at + "mlp.proj")
    h = norm(h, p["ln_f"])
    return np.einsum("ntd,vd->ntv", h, p["wtet"]), np.stack([*features, h.mean(1)])


def cross_entropy(logits, tokens):
    """float64 [N, T]"""
    high = logits.max(-1, keepdims=True)
    lse = np.log(np.exp(logits - high).sum(-1)) + high[..., 0]
    return lse - np.take_along_axis(logits, tokens.flatten(1).numpy()[..., None], -1)[..., 0]
