"""``longthink bench vllm`` with real engines, as small as they get."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow
ASKED = ["--policies", "raas", "--budget", "64", "--contexts", "192,400", "--rounds", "1", "--json"]


def test_engines_are_measured_and_filled(tmp_path):
    command = [sys.executable, "-m", "longthink.cli", "bench", "vllm", *ASKED]
    done = subprocess.run(
        command, env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found["ms"]) == ["192", "400"]
    assert all(len(times) == 1 and times[0] > 0 for at in found["ms"].values() for times in at.values())
    dense, bounded = (found["in_flight"][name] for name in ("dense", "raas"))
    # The pool holds two requests of 64 + 400 + 3 x 32 tokens and 256 to spare: 102 pages; a bounded one has 8.
    assert dense["in_flight"] == 2
    assert bounded == {"in_flight": 12, "waiting": 36, "preempted": 0}
