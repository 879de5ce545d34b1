"""The vLLM plugin: ``vllm serve MODEL --enable-merged-lora``.

vLLM calls :func:`register` in every one of its processes, through the entry point ``vllm.general_plugins``.
"""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm.merged_lora")


def register() -> None:
    """Hook into vLLM; on a release that the hooks do not fit, say so in one line and leave vLLM as it is.

    Even then vLLM's command line knows the plugin's flags, and whoever sets one reads why it cannot be had.
    """
    try:
        from .compat_versions import refusals

        problems = refusals()
        if not problems:
            from . import compat

            problems = compat.problems()
    except ImportError as error:
        problems = [str(error)]
    if not problems:
        compat.install()
        return
    reason = f"merged-lora is not available: {'; '.join(problems)}"
    logger.warning(reason)
    from . import compat_off

    compat_off.install(reason)
