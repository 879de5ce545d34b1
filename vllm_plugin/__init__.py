"""The vLLM plugin: ``vllm serve MODEL --enable-merged-lora``.

vLLM calls :func:`register` in every one of its processes, through the entry point ``vllm.general_plugins``.
"""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm.merged_lora")


def register() -> None:
    """Hook into vLLM; on a release that the hooks do not fit, log one line and leave vLLM as it is.

    Even then vLLM's command line knows the plugin's flags, and refuses them with the reason.
    """
    try:
        from merged_lora.vllm_plugin.hooks.versions import refusals

        problems = refusals()
        if not problems:
            from merged_lora.vllm_plugin.hooks import table

            problems = table.problems()
    except ImportError as error:
        problems = [str(error)]
    if not problems:
        table.install()
        return
    reason = f"merged-lora is not available: {'; '.join(problems)}"
    logger.warning(reason)
    from merged_lora.vllm_plugin.hooks import off

    off.install(reason)
