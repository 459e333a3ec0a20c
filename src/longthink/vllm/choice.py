"""Names that vLLM looks up when it builds a model: which backend serves it.

On a CPU vLLM asks for its CPU backend whatever ``--attention-backend`` says, so the choice is made here: ours where
CUSTOM was asked for, else vLLM's own class, untouched.
"""

from __future__ import annotations

from typing import Any

from longthink.vllm import compat


def __getattr__(name: str) -> Any:
    if name == "CpuBackend":
        chosen = compat.get_current_vllm_config().attention_config.backend
        if chosen is not compat.AttentionBackendEnum.CUSTOM:
            from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

            return CPUAttentionBackend
    elif name != "Backend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from longthink.vllm.backend import BoundedBackend

    return BoundedBackend
