"""``python scripts/gpu_check``: needs nothing installed but what a part imports."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Python has put this folder first, where a module here could hide one of another name elsewhere.
sys.path[0] = str(ROOT)

from scripts.gpu_check.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
