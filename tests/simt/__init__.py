"""The bench that needs no GPU: csrc/cuda on this processor. See README.md."""
