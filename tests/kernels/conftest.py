"""Kernels are tested with the fused ``tl.fma`` that hardware has, whatever the interpreter comes with."""

import triton

from kernels import rounding

if triton.knobs.runtime.interpret and not rounding.rounds_once():
    rounding.replace_fma(setattr, rounding.fuse)
