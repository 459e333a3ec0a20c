"""Where requests come in: what an engine could not serve is refused before it gets there.

vLLM builds one renderer, which turns the text of requests into tokens, before it starts an engine, and looks its
class up by name. The plugin stands in under each name. Asked for nothing, it hands out vLLM's own renderer; asked for
a bounded cache, it checks the whole configuration first, and every prompt's length later. Metrics begin here as well:
no sooner is it known in the front end who asks for what.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from longthink.vllm.checks import check_config, options_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.renderers import BaseRenderer

_theirs: dict[str, tuple[str, str]] = {}
"""Name of each of vLLM's renderers: where its class is."""


def register_renderers() -> None:
    """Stand in for every renderer that vLLM has. May be called again."""
    from vllm.renderers.registry import RENDERER_REGISTRY

    for name, place in RENDERER_REGISTRY.renderers.items():
        if place != (__name__, name):
            _theirs[name] = place
            # `register` would warn about what is meant: that the name is taken.
            RENDERER_REGISTRY.renderers[name] = (__name__, name)


def __getattr__(name: str) -> Any:
    """Return what vLLM takes for the renderer's class."""
    if name not in _theirs:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return partial(_make_renderer, name)


def _make_renderer(name: str, config: VllmConfig, tokenizer: Any) -> BaseRenderer[Any]:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    renderer_class = resolve_obj_by_qualname(".".join(_theirs[name]))
    options = options_of(config)
    if options is not None:
        check_config(config)
        _keep_metrics()
        fields = {"max_prompt_tokens": options.max_prompt_tokens}
        renderer_class = type(f"Limited{renderer_class.__name__}", (_PromptLimit, renderer_class), fields)
    return renderer_class(config, tokenizer)


def _keep_metrics() -> None:
    from longthink.vllm.metrics import register_metrics

    register_metrics()


class _PromptLimit:
    """Refuses a prompt that no engine of this configuration will ever have the pages for; it would wait for ever."""

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
                f"The prompt has {length} tokens, and this server takes at most {self.max_prompt_tokens} "
                "(max_prompt_tokens of its longthink options).",
                parameter="prompt",
                value=length,
            )
        return prompt
