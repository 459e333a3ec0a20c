"""Checks in the front end: unsupported configurations before an engine starts, then the length of each prompt.

Before it starts an engine, vLLM builds a renderer from a class that it looks up by name in a registry. The plugin
takes the place of each entry and hands out vLLM's own class, with checks and metrics if longthink is enabled.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from longthink.vllm.checks import check_config, get_options

# vLLM is imported in functions only: `register_renderers` must work with as many versions as possible, because it is
# what refuses the unsupported ones.
if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.renderers import BaseRenderer

_originals: dict[str, tuple[str, str]] = {}
"""Module and class of each of vLLM's renderers, by its name in the registry."""


def register_renderers() -> None:
    """Take the place of every renderer in vLLM's registry. Idempotent."""
    from vllm.renderers.registry import RENDERER_REGISTRY

    for name, entry in RENDERER_REGISTRY.renderers.items():
        if entry != (__name__, name):
            _originals[name] = entry
            # Not by `register`, which would warn every user of vLLM that the name is taken.
            RENDERER_REGISTRY.renderers[name] = (__name__, name)


def __getattr__(name: str) -> Any:
    """What vLLM takes for the class of a renderer."""
    if name not in _originals:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return partial(_make_renderer, name)


def _make_renderer(name: str, config: VllmConfig, tokenizer: Any) -> BaseRenderer[Any]:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    renderer_class = resolve_obj_by_qualname(".".join(_originals[name]))
    options = get_options(config)
    if options is not None:
        check_config(config)
        from longthink.vllm.metrics import register_metrics
        from longthink.vllm.requests import register_request_checks

        register_metrics()
        # Before vLLM reads which checks there are, which it does once it has its renderer.
        register_request_checks(config)
        fields = {"max_prompt_tokens": options.max_prompt_tokens}
        renderer_class = type(f"Limited{renderer_class.__name__}", (_PromptLimit, renderer_class), fields)
    return renderer_class(config, tokenizer)


class _PromptLimit:
    """Rejects a prompt that the pool is not sized for: the request might wait forever."""

    max_prompt_tokens: int | None

    def process_for_engine(self, *args: Any, **kwargs: Any) -> Any:
        return self._checked(super().process_for_engine(*args, **kwargs))  # type: ignore[misc]

    async def process_for_engine_async(self, *args: Any, **kwargs: Any) -> Any:
        return self._checked(await super().process_for_engine_async(*args, **kwargs))  # type: ignore[misc]

    def _checked(self, prompt: Any) -> Any:
        from vllm.exceptions import VLLMValidationError

        length = len(prompt["prompt_token_ids"])
        if self.max_prompt_tokens is not None and length > self.max_prompt_tokens:
            raise VLLMValidationError(
                f"The prompt has {length} tokens; this server accepts at most {self.max_prompt_tokens} "
                "(longthink option max_prompt_tokens).",
                parameter="prompt",
                value=length,
            )
        return prompt
