"""examples/serve_vllm.py, as a stranger runs it: the server answers, and the answer is right."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vllm.server import ENVIRONMENT, START_SECONDS, end_with_parent, free_port, stop, tail

EXAMPLE = Path(__file__).parents[2] / "examples" / "serve_vllm.py"


@pytest.mark.slow
def test_the_example_serves_and_asks(tmp_path):
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, str(EXAMPLE)], env=os.environ | ENVIRONMENT | {"PORT": str(free_port())},
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=end_with_parent,
        )  # fmt: skip
    try:
        status = process.wait(START_SECONDS)
    finally:
        stop(process)
    assert status == 0, tail(log)
    assert "right: True" in log.read_text()
