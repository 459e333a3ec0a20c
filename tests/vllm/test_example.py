"""examples/serve_vllm.py, as a stranger runs it: the server answers, and the answer is right."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vllm.server import ENVIRONMENT, free_port

EXAMPLE = Path(__file__).parents[2] / "examples" / "serve_vllm.py"


@pytest.mark.slow
def test_the_example_serves_and_asks():
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)], env=os.environ | ENVIRONMENT | {"PORT": str(free_port())},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "right: True" in done.stdout
