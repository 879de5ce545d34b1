"""The playground is part of a server whose operator asked for it, and of no other."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from merged_lora.vllm_plugin.hooks.api_server import wrap_attach_router


def client(config: Any) -> TestClient:
    """A client of an API server with this ``additional_config``."""
    app = FastAPI()
    app.state.args = Namespace(additional_config=config, api_key=["s3cret"])
    wrap_attach_router(lambda app: None)(app)
    return TestClient(app)


def test_the_page_needs_no_key_and_no_engine() -> None:
    page = client({"merged_lora": {"enable": True, "playground": True}})
    assert "<title>merged-lora playground</title>" in page.get("/merged_lora/").text
    assert page.post("/merged_lora/api/form", json={"spec": "a + b"}).json()["spec"] == "sum(a, b)"


@pytest.mark.parametrize(
    "config",
    [None, {"merged_lora": {"enable": True}}, {"merged_lora": {"enable": False, "playground": True}}],
)
def test_without_the_flag_there_is_no_page(config: Any) -> None:
    assert client(config).get("/merged_lora/").status_code == 404
