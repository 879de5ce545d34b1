"""The merges on CPU cores, compiled by numba: same bits as ``reference``, at memory speed."""
