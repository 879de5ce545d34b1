"""The merges on a GPU, in Triton: the same bits as ``reference``, on packed sources, straight into slots."""

if __name__ == "triton_kernels":
    # vLLM looks for OpenAI's kernels under this name in whatever sys.path holds, and would take this folder
    # of a checkout for them.
    raise ImportError("this folder is merged_lora.triton_kernels; it is not the package triton_kernels")
