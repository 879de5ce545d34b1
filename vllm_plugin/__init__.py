"""The vLLM plugin: ``vllm serve MODEL --enable-merged-lora``.

vLLM calls :func:`register` in every one of its processes, through the entry point ``vllm.general_plugins``.
"""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm.merged_lora")


def register() -> None:
    """Hook into vLLM; on a release that the hooks do not fit, log one line and leave vLLM as it is.

    Even then vLLM's command line knows the plugin's flags, and refuses them with the reason, unless that
    command line is what has changed.
    """
    problems = _problems()
    if not problems:
        from merged_lora.vllm_plugin.hooks import table

        table.install()
        return
    reason = f"merged-lora is not available: {'; '.join(problems)}"
    try:
        from merged_lora.vllm_plugin.hooks import off

        off.install(reason)
    except Exception as error:  # the release may lack what refusing the flags takes, too
        why = _sentence(error)
        reason += "; vLLM does not know its flags either" + (f": {why}" if why not in problems else "")
    logger.warning(reason)


def _problems() -> list[str]:
    """Why the plugin stays off; empty if it fits."""
    try:
        from merged_lora.vllm_plugin.hooks.versions import refusals

        problems = refusals()
        if not problems:
            from merged_lora.vllm_plugin.hooks import table

            problems = table.problems()
    except Exception as error:  # vLLM catches nothing that a plugin raises, and would not start
        return [_sentence(error)]
    return problems


def _sentence(error: Exception) -> str:
    """What was raised, in words; a failed import says by itself what is missing."""
    return str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
