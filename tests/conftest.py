"""Where there is no GPU, the kernels run under Triton's interpreter, in this process and only in this one."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it while it is imported, for its own functions
    import triton

    triton.knobs.runtime.interpret = True  # and here whenever a kernel is defined
    del os.environ["TRITON_INTERPRET"]  # processes that a test starts decide for themselves
