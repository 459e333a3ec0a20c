"""Loading the model that a command runs, with a sign of life while it takes time."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from longthink.cli.options import ModelOptions
from longthink.cli.progress import progress
from longthink.cli.terminal import is_terminal

if TYPE_CHECKING:
    from longthink.models import Loaded


def load_model(options: ModelOptions) -> Loaded:
    """Load the model that the options name; see `longthink.models.load_model`."""
    with progress(f"loading {options.model}"):
        if not is_terminal(sys.stderr):
            # Read when the library is imported, which is next.
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        from longthink import models

        return models.load_model(options.model, device=options.device, dtype=options.dtype)
