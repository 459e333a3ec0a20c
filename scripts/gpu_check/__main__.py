"""``python scripts/gpu_check``: needs only the packages that the parts import."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Python puts this folder first on the path, where its modules could shadow others of the same name.
sys.path[0] = str(ROOT)

from scripts.gpu_check.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
