"""What a machine with a GPU says about the kernels: `make gpu-check`."""
