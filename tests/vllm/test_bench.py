"""``python -m bench.vllm`` with real engines, as small as they get."""

import json
import os
import subprocess
import sys

import pytest
import torch

from longthink.policies import make_policy
from longthink.vllm.pool import page_bytes

pytestmark = pytest.mark.slow
ARGUMENTS = ["--policies", "raas", "--budget", "64", "--contexts", "400,1000", "--rounds", "1", "--json"]


def test_engines_are_measured_and_filled(tmp_path):
    command = [sys.executable, "-m", "bench.vllm", *ARGUMENTS]
    done = subprocess.run(
        command, env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found["ms"]) == ["400", "1000"]
    assert all(len(times) == 1 and times[0] > 0 for at in found["ms"].values() for times in at.values())
    dense, bounded = (found["in_flight"][name] for name in ("dense", "raas"))
    assert dense["in_flight"] == 2
    # Memory for two requests of 64 + 1000 + 192 tokens and 256 more. A bounded request holds 8 pages, which are
    # larger than dense ones since they include their state; one page is the null block.
    kv_bytes = 2 * 2 * 64 * 4 * 16
    page = page_bytes(make_policy("raas"), 2, 64, torch.float32, kv_bytes)
    pages = 2 * (64 + 1000 + 192 + 256) * (kv_bytes // 16) // page
    fit = (pages - 1) // 8
    assert bounded == {"in_flight": fit, "waiting": 48 - fit, "preempted": 0}
    assert fit > 5 * dense["in_flight"]
    full = found["full_pool"]
    assert full["running"] == {"400": {"dense": 4, "raas": fit}, "1000": {"dense": 2, "raas": fit}}
    assert all(rate > 0 for at in full["tokens_per_s"].values() for rates in at.values() for rate in rates)
