"""The Triton kernels and their launchers. Knows tensors and tables, not plans."""
