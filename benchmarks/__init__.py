"""Measurements of every op, of training, sampling and palettes, beside what a user would otherwise reach for."""
