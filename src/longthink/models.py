"""Loading a model by name: the built-in one, a local folder or a model on the Hub."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from longthink.errors import needs_extra

if TYPE_CHECKING:
    import torch

REASONER = "reasoner"

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, kw_only=True)
class Loaded:
    model: Any
    tokenizer: Any
    name: str  # as given to `load_model`
    revision: str | None  # commit or revision on the Hub; a hash of the built-in weights; None for a folder
    builtin: bool
    seconds: float  # loading time
    adapter: str | None = None  # as given to `load_model`

    @property
    def context(self) -> int | None:
        """Context length in tokens, or None if the model's configuration does not give one."""
        return getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            **({} if self.adapter is None else {"adapter": self.adapter}),
            "architecture": type(self.model).__name__,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
        }


def load_model(
    name: str = REASONER, *, adapter: str | None = None, device: str = "auto", dtype: str = "auto",
    revision: str | None = None,
) -> Loaded:  # fmt: skip
    """Load a model and its tokenizer, from safetensors or GGUF only and without remote code.

    `name` is ``reasoner`` (the built-in model), a local folder, a GGUF file, or the id of a model on the Hub. A
    folder may hold a PEFT adapter: it is merged into the weights of the base model that it names. `adapter`, a folder
    or an id on the Hub, is a PEFT adapter to merge into the model `name`, whichever its configuration names.
    ``auto`` takes the first accelerator, if any, and the checkpoint's own dtype, or float32 for a GGUF file.
    `ValueError` or `OSError` if the model does not exist, cannot be reached, or is not a causal language model in
    these formats.
    """
    started = time.monotonic()
    import torch
    from transformers.utils import logging

    # Its progress bar counts tensors, and would interrupt a command's own output.
    logging.disable_progress_bar()
    place = pick_device(torch, device)
    if name == REASONER:
        from longthink.reasoner.pretrained import load_reasoner, weights_revision

        model, tokenizer = load_reasoner()
        # Results of different weights must not be mixed up.
        revision = weights_revision()
        if "OMP_NUM_THREADS" not in os.environ:
            # Too small to gain from threads; a second one would only wait where cores are busy.
            torch.set_num_threads(1)
        if dtype != "auto":
            model = model.to(getattr(torch, dtype))
    else:
        model, tokenizer = _from_pretrained(name, dtype, revision)
    if adapter is not None:
        model, tokenizer = _merged(model, tokenizer, name, _adapter_folder(adapter))
    # The commit of a branch or tag, if the Hub reported it.
    revision = getattr(model.config, "_commit_hash", None) or revision
    return Loaded(
        model=model.to(place).eval(), tokenizer=tokenizer, name=name, revision=revision,
        builtin=name == REASONER, seconds=time.monotonic() - started, adapter=adapter,
    )  # fmt: skip


def load_empty(name: str = REASONER, *, dtype: str = "auto", revision: str | None = None) -> Any:
    """The model that `load_model` loads, for its sizes and formats: on the meta device, so no weights are read.

    The built-in one is small, and comes as it is.
    """
    if name == REASONER:
        return load_model(name, device="cpu", dtype=dtype).model
    if base := _adapter_base(name):
        return load_empty(base.name, dtype=dtype, revision=base.revision)
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(name, revision)
    kind = AutoModelForCausalLM if name.endswith(".gguf") else _model_class(_source(name), revision)
    with torch.device("meta"):
        return kind.from_config(config, dtype=config.dtype if dtype == "auto" else getattr(torch, dtype))


def pick_device(torch: Any, name: str) -> torch.device:
    """Return the named device, or `ValueError` if it cannot be used; ``auto`` is the first accelerator or the CPU."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def load_config(name: str = REASONER, revision: str | None = None) -> Any:
    """Load the configuration of a model alone, by the same names and with the same errors as `load_model`."""
    if name == REASONER:
        from longthink.reasoner.pretrained import load_reasoner

        return load_reasoner()[0].config
    if base := _adapter_base(name):
        return load_config(*base)
    from transformers import AutoConfig

    try:
        if name.endswith(".gguf"):
            folder, given = _gguf_file(name)
            return AutoConfig.from_pretrained(folder, **given)
        return AutoConfig.from_pretrained(_source(name), revision=revision, trust_remote_code=False)
    except OSError as error:
        raise OSError(f"model {name!r}: {_why_not(error)}") from error


def _source(name: str, kind: str = "model", config: str = "config.json") -> str:
    """What a model or an adapter is loaded from: the path of a folder, or an id on the Hub."""
    folder = Path(name).expanduser()
    local = folder.is_dir()
    if not local and (folder.is_absolute() or name.startswith((".", "~")) or not _HUB_ID.fullmatch(name)):
        raise ValueError(
            f"{kind} {name!r}: there is no such folder, and it is not a valid id of a model on the Hub"
        )
    if local and not (folder / config).is_file():
        raise ValueError(f"{kind} folder {name!r} has no {config}")
    return str(folder) if local else name


def _from_pretrained(name: str, dtype: str, revision: str | None) -> tuple[Any, Any]:
    if name.endswith(".gguf"):
        return _from_gguf(name, dtype)
    if base := _adapter_base(name):
        model, tokenizer = _from_pretrained(base.name, dtype, base.revision)
        return _merged(model, tokenizer, base.name, Path(name).expanduser())
    source = _source(name)
    try:
        tokenizer = _tokenizer(source, revision)
        model = _model_class(source, revision).from_pretrained(
            source, dtype=dtype, revision=revision, use_safetensors=True, trust_remote_code=False
        )
    except OSError as error:
        raise OSError(f"model {name!r}: {_why_not(error)}") from error
    return model, tokenizer


def _gguf_file(name: str) -> tuple[str, dict[str, Any]]:
    """Folder of a GGUF file, and the arguments with which transformers reads it."""
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"model {name!r}: there is no such file")
    with needs_extra("gguf"):
        import gguf  # noqa: F401 - transformers reads the file with it
    return str(path.parent), {"gguf_file": path.name, "trust_remote_code": False}


def _from_gguf(name: str, dtype: str) -> tuple[Any, Any]:
    """Load a GGUF file. transformers turns its weights into ordinary ones, which takes their full size in memory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, given = _gguf_file(name)
    wanted = "float32" if dtype == "auto" else dtype
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **given)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=wanted, **given)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model {name!r} cannot be read as GGUF by transformers: {error}") from error
    return model, tokenizer


class _Base(NamedTuple):
    """The model that an adapter was trained for."""

    name: str
    revision: str | None


def _adapter_base(name: str) -> _Base | None:
    """Base of the PEFT adapter in a folder, which may be one as well; None if the name is no such folder."""
    found = following = _named_base(name)
    passed = [name]
    while following is not None:
        if Path(following.name).expanduser().resolve() in [
            Path(one).expanduser().resolve() for one in passed
        ]:
            chain = " -> ".join([*passed, following.name])
            raise ValueError(f"adapter {name!r}: its base models go round in a circle, {chain}")
        passed.append(following.name)
        following = _named_base(following.name)
    return found


def _named_base(name: str) -> _Base | None:
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file() or not (folder / "adapter_config.json").is_file():
        return None
    base, revision = (_adapter_facts(folder).get(key) for key in ("base_model_name_or_path", "revision"))
    if not isinstance(base, str) or not base:
        raise ValueError(f"adapter {name!r}: its adapter_config.json names no base model")
    return _Base(base, revision)


def _adapter_facts(folder: Path) -> dict[str, Any]:
    """What an adapter's configuration says; nothing if it cannot be read."""
    try:
        facts = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _adapter_folder(name: str) -> Path:
    """Folder of an adapter, which is fetched from the Hub if there is none of that name."""
    source = _source(name, "adapter", "adapter_config.json")
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        # No pickled weights: they are not even fetched.
        return Path(snapshot_download(source, allow_patterns=["*.json", "adapter_model.safetensors"]))
    except OSError as error:
        raise OSError(f"adapter {name!r}: {_why_not(error)}") from error


def _merged(model: Any, tokenizer: Any, base: str, folder: Path) -> tuple[Any, Any]:
    """Merge an adapter into a model: what is left is an ordinary one, which all policies serve."""
    if not (folder / "adapter_model.safetensors").is_file():
        raise ValueError(
            f"adapter {str(folder)!r} has no adapter_model.safetensors: other formats can run code when they are read"
        )
    with needs_extra("peft"):
        from peft import PeftModel
    try:
        adapted = PeftModel.from_pretrained(model, str(folder))
        if adapted.active_peft_config.is_prompt_learning:
            raise ValueError(
                f"{adapted.active_peft_config.peft_type.value} adds vectors that belong to no token, and cannot be "
                "merged into the weights"
            )
        _check_fit(adapted, folder)
        merged = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
        named = _adapter_facts(folder).get("base_model_name_or_path")
        other = f" (it was made for {named!r})" if named and named != base else ""
        raise ValueError(f"adapter {str(folder)!r} cannot be merged into {base!r}{other}: {error}") from error
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = _tokenizer(str(folder), None)
    return merged, tokenizer


def _check_fit(adapted: Any, folder: Path) -> None:
    """Raise `ValueError` if an adapter is of other layers than the model: PEFT only warns, and merges the rest."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        saved = set(file.keys())
    wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if missing := sorted(wanted - saved):
        raise ValueError(f"it has no weights for {missing[0]}")
    # Embeddings that were saved along are of the model, not of the adapter.
    if superfluous := sorted(saved - wanted - set(adapted.state_dict())):
        raise ValueError(f"the model has no place for {superfluous[0]}")


def _model_class(source: str, revision: str | None) -> Any:
    """The auto class for text models, or for models that also take images."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    kind = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False).model_type
    vision = (
        kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    )
    return AutoModelForImageTextToText if vision else AutoModelForCausalLM


def _tokenizer(source: str, revision: str | None) -> Any:
    """Load the tokenizer with the class that its configuration names.

    `AutoTokenizer` overrides that class for some model types, Qwen2 among them, and reads any tokenizer.json as a
    byte-level one: a word-level tokenizer would silently give wrong ids.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    declared = get_tokenizer_config(source, revision=revision).get("tokenizer_class")
    # The second is what transformers 5 calls the first.
    generic = declared in ("PreTrainedTokenizerFast", "TokenizersBackend")
    loader = PreTrainedTokenizerFast if generic else AutoTokenizer
    return loader.from_pretrained(source, revision=revision, trust_remote_code=False)


def _why_not(error: BaseException) -> str:
    reasons = {
        "GatedRepoError": "it is gated: accept its terms on the Hub, then run `hf auth login`",
        "RepositoryNotFoundError": "the Hub has no such model, or it is private: then run `hf auth login`",
        "LocalEntryNotFoundError": "it is not on this machine and the Hub cannot be reached",
        "OfflineModeIsEnabled": "it is not on this machine and HF_HUB_OFFLINE forbids asking the Hub",
    }
    cause: BaseException | None = error
    while cause is not None:
        for kind in type(cause).__mro__:
            if kind.__name__ in reasons:
                return reasons[kind.__name__]
        cause = cause.__cause__ or cause.__context__
    return str(error)
