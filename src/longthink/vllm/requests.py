"""Checks what a request asks for, where vLLM checks its sampling parameters: a bad budget is an HTTP 400 at once.

vLLM has one hook for that, `validate_params` of custom logits processors, which do nothing else here. A processor is
named, not passed, and knows only the parameters, so the name says which budgets a server allows.
"""

from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import LogitsProcessor

from longthink.config import check_int
from longthink.vllm import compat
from longthink.vllm.checks import get_options
from longthink.vllm.config import KEY, requested_budget

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_PREFIX = "DecodeBudget"


def register_request_checks(config: "VllmConfig") -> None:
    """Have vLLM check the options of requests, in the process that reads this configuration. Idempotent."""
    options, model = get_options(config), config.model_config
    assert options is not None
    least, most = options.request_budgets(config.cache_config.block_size)
    name, before = f"{__name__}:{_PREFIX}_{least}_{most}", list(model.logits_processors or ())
    if name not in before:
        model.logits_processors = [*before, name]


def __getattr__(name: str) -> Any:
    prefix, *limits = name.split("_")
    if prefix != _PREFIX or len(limits) != 2:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _processor(*map(int, limits))


@cache
def _processor(least: int, most: int) -> type:
    """Logits processor for either model runner of vLLM, whose requests may have budgets in this range."""
    bases = (_RequestCheck, LogitsProcessor, *compat.second_logits_processor())
    return type(f"{_PREFIX}_{least}_{most}", bases, {"limits": (least, most)})


class _RequestCheck:
    limits: ClassVar[tuple[int, int]]

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        budget = None
        try:
            budget = requested_budget(sampling_params.extra_args)
            if budget is not None:
                check_int("decode_budget", budget, *cls.limits)
        except ValueError as error:
            raise VLLMValidationError(str(error), parameter=KEY, value=budget) from error

    def __init__(self, *args: Any) -> None:
        pass

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        pass

    def add_request(self, *args: Any) -> bool:
        """False: the second model runner need not apply it."""
        return False

    def apply(self, logits: Tensor, *args: Any) -> Tensor:
        return logits
