"""The Triton kernels and their launchers. Knows tensors, tables and rules, but no modules or plans."""
