"""Pixels to measure palettes on: synthetic photographs, since a benchmark should need no download."""

import numpy as np


def photographs(count: int, size: int = 32, seed: int = 0) -> np.ndarray:
    """uint8 [count, size, size, 3]: noise with the spectrum of natural images (amplitude 1/f), mostly in brightness.

    Every image has a mean colour, a contrast and a tint of its own, as photographs do. A million pixels hold several
    hundred thousand distinct colours.
    """
    rng = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :]
    amplitude = 1 / np.maximum(np.hypot(fy, fx), 1 / size)
    images = np.empty((count, size, size, 3), np.uint8)
    mix = np.array([[1.0, 0.6, 0.2], [1.0, 0.0, -0.4], [1.0, -0.6, 0.2]])  # brightness, red-blue, green-purple
    for begin in range(0, count, 256):
        n = min(256, count - begin)
        noise = np.fft.rfft2(rng.standard_normal((n, 3, size, size))) * amplitude
        planes = np.fft.irfft2(noise, (size, size))
        planes /= planes.std(axis=(2, 3), keepdims=True) + 1e-9
        contrast = rng.uniform(0.3, 1.2, (n, 1, 1, 1)) * np.array([55.0, 14.0, 10.0])[:, None, None]
        means = rng.normal(0, 1, (n, 3, 1, 1)) * np.array([45.0, 22.0, 14.0])[:, None, None]
        colors = 120 + np.einsum("cp,nphw->nhwc", mix, planes * contrast + means)
        images[begin : begin + n] = colors.round().clip(0, 255)
    return images
