"""The vLLM plugin: ``vllm serve MODEL --enable-merged-lora``.

vLLM calls :func:`register` in every one of its processes, through the entry point ``vllm.general_plugins``.
"""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm.merged_lora")


def register() -> None:
    """Hook into vLLM; on a release that the hooks do not fit, say so in one line and leave vLLM as it is."""
    try:
        from .compat_versions import untested

        problems = untested()
        if not problems:
            from . import compat

            problems = compat.problems()
    except ImportError as error:
        problems = [str(error)]
    if problems:
        logger.warning("merged-lora is not available: %s", "; ".join(problems))
        return
    compat.install()
