"""Loading the model of a command, with progress."""

import os
import sys

from longthink import models
from longthink.cli.options import ModelOptions
from longthink.cli.progress import progress
from longthink.cli.terminal import is_terminal


def load_model(options: ModelOptions) -> models.Loaded:
    with progress(f"loading {options.model}"):
        if not is_terminal(sys.stderr):
            # Read when transformers is imported, which is next.
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        return models.load_model(
            options.model, adapter=options.adapter, device=options.device, dtype=options.dtype
        )
