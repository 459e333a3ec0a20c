"""The Triton kernels against the general route, in Triton's interpreter: the tests are in ``interpreted_*.py``.

Triton decides when it is imported whether it interprets, for the whole process; so these files have one of their own,
and one for all, because each imports torch anew.
By hand: ``TRITON_INTERPRET=1 pytest tests/kernels/interpreted_attention.py``.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
FILES = sorted(Path(__file__).parent.glob("interpreted_*.py"))


def test_there_are_tests():
    assert len(FILES) >= 3


@pytest.mark.slow
def test_kernels():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", *map(str, FILES)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
