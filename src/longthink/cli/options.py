"""Options that several commands share, each declared once.

The string below a field is its help text. Annotations are objects, not strings: commands in other modules inherit
these fields, and names in a string would be unknown there.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from longthink.config import check_int, check_sampling
from longthink.models import REASONER
from longthink.reasoner.profiles import PROFILES
from longthink.reasoner.task import SIZES

if TYPE_CHECKING:
    from longthink.policies import Policy

Switch = Annotated[bool, Parameter(negative="", show_default=False)]
"""A flag without a ``--no-`` form, off by default."""

SizeName = Annotated[str, Parameter(choices=tuple(SIZES))]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Model, adapter, device and number format."""

    model: str = REASONER
    """Hub id, local folder (safetensors, or a PEFT adapter) or GGUF file of a causal language model, or "reasoner",
    the built-in one."""
    adapter: str | None = None
    """Hub id or local folder of a PEFT adapter (safetensors), which is merged into the model."""
    device: str = "auto"
    """Device such as cpu or cuda:1; auto takes the first accelerator, if any."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of weights and cache; auto takes the checkpoint's own."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class BudgetOptions:
    """How many tokens the cache keeps per layer."""

    budget: int | None = None
    """Tokens kept per layer, including the prompt."""
    decode_budget: int | None = None
    """Tokens kept per layer on top of the prompt, which is then kept whole."""

    @property
    def given_budget(self) -> dict[str, int]:
        given = {"budget": self.budget, "decode_budget": self.decode_budget}
        return {name: value for name, value in given.items() if value is not None}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the next token is sampled, and when to stop."""

    max_new_tokens: int | None = None
    """Largest number of tokens to generate [default: 2048; the built-in model: until it ends]."""
    temperature: float = 0.0
    """Softmax temperature; 0 takes the most likely token."""
    top_p: float | None = None
    """Sample from the smallest set of tokens with this probability (needs a temperature above 0)."""
    top_k: int | None = None
    """Sample from this many of the most likely tokens (needs a temperature above 0)."""

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_p, self.top_k)
        if self.max_new_tokens is not None:
            check_int("max_new_tokens", self.max_new_tokens, 1)

    def generate_kwargs(self) -> dict[str, Any]:
        """Return arguments of ``model.generate`` that override all defaults of the checkpoint."""
        if self.temperature == 0:
            return {"do_sample": False, "num_beams": 1}
        # 0 and 1.0 mean "off" in transformers; leaving them out would apply the checkpoint's defaults.
        return {
            "do_sample": True,
            "num_beams": 1,
            "temperature": self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "top_k": self.top_k or 0,
        }


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ProblemOptions:
    """Problem for the built-in model."""

    profile: Annotated[str, Parameter(choices=tuple(PROFILES))] = "chain"
    """When earlier values are needed again."""
    size: SizeName = "m"
    """Length of the chain of thought."""
    seed: int = 0
    """Seed of the problem, and of sampling."""


def words(text: str) -> list[str]:
    """Split a comma-separated option."""
    return [word.strip() for word in text.split(",") if word.strip()]


def policy_list(text: str) -> "list[Policy]":
    from longthink.policies import make_policy

    policies = [make_policy(spec) for spec in words(text)]
    if not policies:
        raise ValueError("policies is empty: name at least one")
    return policies


def policy_specs(text: str) -> list[str]:
    """Specs of the policies of a list, each in its shortest form."""
    from longthink.policies import policy_spec

    return [policy_spec(policy) for policy in policy_list(text)]
