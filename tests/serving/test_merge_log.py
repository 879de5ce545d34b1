"""The log line of a merge is read back to what was written."""

from __future__ import annotations

import logging

import pytest

from merged_lora.spec import parse
from merged_lora.vllm_plugin.identity import MergeIdentity
from merged_lora.vllm_plugin.merge_log import LoggedMerge, log_merge, parse_log_line
from merged_lora.vllm_plugin.rpc import Facts


@pytest.mark.parametrize(
    "spec",
    [
        "ties(0.3*sql, tone)",
        'knots(json, sql, tone, weights="auto")',
        'sum("it\'s", b)',
        'sum("a \' and \\"b\\"", c)',
    ],
)
@pytest.mark.parametrize("by_module", [{}, {"model.layers.0.mlp": 0.5, "model.layers.1.mlp": 0.25}])
def test_a_line_is_read_back(
    spec: str, by_module: dict[str, float], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = MergeIdentity(parse(spec), tuple(f"{i}" * 32 for i in range(len(parse(spec).names))))
    logger = logging.getLogger("vllm.merged_lora")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    caplog.set_level(logging.INFO, logger="vllm.merged_lora")
    log_merge(identity, Facts("cpu", 8, 210, 0.920833351471823, by_module, 0.0163, 0.01, 1000))
    line = f"(APIServer pid=7) INFO 11-28 02:00:00 [merge_log.py:50] {caplog.messages[-1]}\n"
    expected = LoggedMerge(str(parse(spec)), identity.digest, "cpu", 8, 210, 0.920833351471823, 16.3)
    assert parse_log_line(line) == expected
    assert ("lowest=0.2500 lowest_in='model.layers.1.mlp'" in line) == bool(by_module)


@pytest.mark.parametrize(
    "line", ["", "INFO something else ms=7", "not merged spec='sum(a)' digest=0 error='x'"]
)
def test_another_line_is_about_no_merge(line: str) -> None:
    assert parse_log_line(line) is None
