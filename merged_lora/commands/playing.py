"""``merged-lora playground``: the page on which merges are tried, for a server that is elsewhere."""

from __future__ import annotations

import argparse
import socket
from typing import Any

from merged_lora.checks import whole_number
from merged_lora.errors import EvaluationError

from .arguments import ExamplesFormatter
from .running import UsageError, terminated_cleanly

HOST = "127.0.0.1"
PORT = 8900
STOP_SECONDS = 3
"""How long answers under way may go on after Ctrl-C."""
BASE_URL = "http://localhost:8000/v1"

EXAMPLES = """\
examples:
  merged-lora playground
  merged-lora playground --base-url http://gpu-box:8000/v1 --port 8901
"""


def add(added: Any) -> None:
    """Add the command ``playground``."""
    playground = added.add_parser(
        "playground",
        help="try merges on a page: drag the weights, see the answers",
        description="Serve a page on this machine alone, on which merges of a server's adapters are tried: "
        "sliders for the weights and options, and the answers of the base model, the adapters and the merge "
        "beside each other. The page asks the server through this command, with the key that is typed there.",
        epilog=EXAMPLES,
        formatter_class=ExamplesFormatter,
        allow_abbrev=False,
    )
    playground.add_argument(
        "--base-url",
        metavar="URL",
        default=BASE_URL,
        help=f"address of the server's API, which serves the adapters with --enable-merged-lora; {BASE_URL} "
        "by default",
    )
    playground.add_argument(
        "--port", metavar="N", type=int, default=PORT, help=f"where the page is served; {PORT} by default"
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C."""
    try:
        whole_number(0, 65535)(arguments.port)
    except ValueError as error:
        raise UsageError(f"--port {error}, got {arguments.port}") from None
    try:
        import uvicorn

        from merged_lora.playground.pages import PATH
        from merged_lora.playground.proxy import address, application
    except ImportError as error:
        raise EvaluationError(
            f"the playground needs packages of the extra playground ({error}): "
            "pip install 'vllm-merged-lora[playground]'"
        ) from None
    server = address(arguments.base_url)
    with terminated_cleanly(), socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOST, arguments.port))
        except OSError as error:
            raise UsageError(
                f"port {arguments.port} cannot be used ({error.strerror}); name another, --port N"
            ) from None
        listening.listen()  # who reads the line below may ask at once
        port = listening.getsockname()[1]
        app = application(server, port)
        print(f"http://{HOST}:{port}{PATH}/ asks {server}; Ctrl-C ends it", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=STOP_SECONDS)).run(
            [listening]
        )
    return 0
