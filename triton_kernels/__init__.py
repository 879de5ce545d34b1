"""The merges on a GPU, in Triton: the same bits as ``reference``, on packed sources, straight into slots."""

if __name__ == "triton_kernels":
    # vLLM looks for OpenAI's kernels under this name in whatever sys.path holds, and would take this folder
    # of a checkout for them.  It logs the error, and goes on.
    raise ImportError(
        "this folder is merged_lora.triton_kernels; it is not the package triton_kernels, which vLLM can do "
        "without; to look for that alone, start Python outside of this checkout, and leave it out of "
        "PYTHONPATH"
    )
