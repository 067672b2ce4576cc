"""A scikit-learn transformer: images in, an Image GPT's pooled features out. Needs scikit-learn: igpt-fast[probe]."""

from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from igpt_fast.errors import InputError
from igpt_fast.model import ImageGPT
from igpt_fast.ops._tensors import tensor_of

try:
    from sklearn.base import BaseEstimator, TransformerMixin
except ModuleNotFoundError as error:
    raise InputError("scikit-learn is not installed; run: pip install 'igpt-fast[probe]'") from error


class IGPTFeatures(TransformerMixin, BaseEstimator):
    """Means over positions of one layer, as the paper's linear probe reads them (`ImageGPT.features`).

    model: an ImageGPT; for images, rather than tokens, it needs a palette (`model.palette`)
    layer: 0 to model.config.layers; None: the middle one, where the best features are
    batch: images that go through the model side by side
    resize: how images come to the model's size, see igpt_fast.images.resize_image; None: as the model's own did, if it
        is known, else "paper"

    X is an array or a tensor: images [N, H, W, 3] or [N, 3, H, W], gray ones [N, H, W, 1], uint8 or float in [0, 1],
    or tokens [N, H, W] or [N, T] in integers. A clone shares the model, which is never changed: nothing is fitted.
    """

    def __init__(
        self, model: ImageGPT, layer: int | None = None, *, batch: int = 32, resize: str | None = None
    ) -> None:
        self.model = model
        self.layer = layer
        self.batch = batch
        self.resize = resize

    def fit(self, X: Any, y: Any = None) -> "IGPTFeatures":
        """Only checks the parameters. Raises InputError."""
        self._chosen()
        return self

    def transform(self, X: Any) -> np.ndarray:
        """float32 [N, width]. Raises InputError for parameters out of range and for what is no image and no token."""
        layer, device = self._chosen(), self.model.wte.device
        given = X if isinstance(X, Tensor | np.ndarray) else tensor_of(X, "IGPTFeatures: X is")
        kind = str(given.dtype).removeprefix("torch.")
        if given.ndim in (2, 3) and kind in ("uint8", "bfloat16", "float16", "float32", "float64"):
            raise InputError(
                f"IGPTFeatures: X is {kind} {list(given.shape)}, gray images or tokens; give gray images as "
                "[N, H, W, 1], and tokens as int64"
            )
        found = np.empty((len(given), self.model.config.width), np.float32)
        with torch.inference_mode():
            for start in range(0, len(given), self.batch):
                part = tensor_of(given[start : start + self.batch], "IGPTFeatures: X is").to(device)
                found[start : start + self.batch] = self.model.features(self._tokens(part), layer).float().cpu().numpy()
        return found

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """igpt0, igpt1, …: one a channel of the model's width."""
        return np.array([f"igpt{i}" for i in range(self.model.config.width)], dtype=object)

    def _chosen(self) -> int:
        if not isinstance(self.model, ImageGPT):
            raise InputError(f"IGPTFeatures: model is a {type(self.model).__name__}; give an igpt_fast.ImageGPT")
        if not isinstance(self.batch, Integral) or self.batch < 1:
            raise InputError(f"IGPTFeatures: batch is {self.batch!r}; use a whole number of at least 1")
        top = self.model.config.layers
        layer = top // 2 if self.layer is None else self.layer
        if not isinstance(layer, Integral) or not 0 <= layer <= top:
            raise InputError(f"IGPTFeatures: layer {layer!r} was asked; this model has layers 0 to {top}")
        return layer

    def _tokens(self, part: Tensor) -> Tensor:
        if part.ndim != 4:
            return part
        part = part.expand(-1, -1, -1, 3) if part.shape[3] == 1 else part  # gray
        return self.model.tokenize(part.permute(0, 3, 1, 2) if part.shape[3] == 3 else part, self.resize)

    def __sklearn_clone__(self) -> "IGPTFeatures":
        return type(self)(**self.get_params(deep=False))

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.no_validation = True
        tags.input_tags.three_d_array = True
        return tags
