"""The page docs/models.md, from what happens to a tiny model of every family.

``python -m tests.families.page > docs/models.md`` writes the page anew, in a minute or two.
"""

import re

import transformers

from tests.families.compared import outcome
from tests.families.tiny import FAMILIES

SERVED, REFUSED, UNTRIED = "served", "refused", "not tried"
HEAD = """# Which models are served

Every line is a test (`tests/families`), and this page is written by `python -m tests.families.page`,
with transformers {version}.
It goes through every class that transformers lists for causal language modelling. A tiny random model of each, with
four layers and windows of 8 tokens where the family has some, is compared twice. With an ample budget its logits are
those of transformers with its own cache, for a row alone and for a left-padded pair, in the model's own loop and in
steps of longthink. With a tight one they are those of a slow computation over the tokens that were held. Names are
those of `model_type` in a checkpoint's `config.json`.
`longthink doctor --model ID_OR_FOLDER` says which layers a checkpoint has and what a budget costs and saves, before
any weights are loaded.

What it means:

- **full**: layers that attend to all of the text. They get pages, and the budget bounds them.
- **windowed**: a sliding window, or chunks. They are bounded by nature: the last tokens stand in slots of their own,
  as many as the window has. [Compiled steps](compile.md) and the [`Engine`](engine.md) serve them, but for Llama 4
  with `attn_temperature_tuning`: it scales queries by the number of columns in the cache, one number for rows of
  different lengths. For that use `generate`, also for batches.
- **recurrent**: a state, or a convolution, of fixed size, transformers' own as well. It has read every token, and
  none can be taken back, so a later turn whose mask hides the end of a row (padding after its end token) is refused.
- **Shared keys** (Gemma 3n, Gemma 4): layers that read the keys and values of another layer have none of their own,
  so they are not in the table. The policy sees the queries of the layer that has the keys. Steps of these models are
  not compiled, `kv_bits` is refused, and so are [forced decoding](fidelity.md) and a later turn for which something
  must be evicted.
- A later turn that is refused, because it does not fit or for the reason above, leaves a cache as it was only if the
  model's first layer has full attention. Behind a window or a state, which has read the turn by then, `reset()` the
  cache, or keep a copy.
- All of these can be [saved to a file](conversations.md#saving-and-loading) and loaded.
- Sinks (gpt-oss), soft caps (Gemma 2) and values of another size than keys are served on all routes but the fused GPU
  kernels, which leave such layers to the general route.
- **Latent attention** (MLA: DeepSeek, GLM-4.7-Flash, MiniCPM3): the keys and values that attention reads are kept, of
  all heads. Some versions of transformers keep the latent that they are computed from, which is much smaller: then a
  bound pays only on texts many times longer than the budget. `longthink doctor --model` shows it.

A checkpoint is a Hub id or a folder in safetensors, or a GGUF file (`--model FILE.gguf`, with
`pip install "longthink[gguf]"`). transformers turns the weights of a GGUF file into float32 each time it is loaded,
so they take their full size in memory: it saves disk, not memory and not time. `--dtype bfloat16` halves them.

A folder may hold a PEFT adapter (`--model FOLDER`, with `pip install "longthink[peft]"`): it is merged into the
weights of the base model that its `adapter_config.json` names, and what is left is an ordinary model. Prompt and
prefix tuning cannot be merged and are refused, as are adapters that are not in safetensors.
`--adapter FOLDER_OR_ID` (`load_model(name, adapter=...)`) merges an adapter into the model that `--model` names,
whichever the adapter's own configuration names, if it has weights for exactly its layers.
`generate`, `calibrate` and `analyze trace` take it; `eval` and `advise`, which compare results by the name of a
model, take the folder of an adapter as `--model`, and `bench` none: a merged adapter costs nothing.

A model that accelerate has spread (`from_pretrained(..., device_map=..., offload_folder=...)`, or `dispatch_model`)
is served by `generate`, `make_cache` and `Engine`: the pages of a layer lie where the layer computes. Weights in main
memory and on disk are tested on a CPU; a split over several GPUs has not been run. Its decode steps are not
compiled, because torch's compiler does not trace accelerate's hooks: `compile=True` is refused, and `"auto"` decodes
eagerly. The command line loads models whole, on one device.

Weights in int8 by torchao (`TorchAoConfig(Int8WeightOnlyConfig())`) are served eagerly, on a CPU with torchao 0.18.
Their decode steps are not compiled there: `compile=True` is refused, and `"auto"` decodes eagerly. In float32 the
tokens are those of transformers with the same weights; in bfloat16 near-ties may fall otherwise. The formats of
torchao's int4 that were tried on a CPU do not load: `plain_int32` is not implemented for it, `plain` needs the
package mslk. bitsandbytes, GPTQ and AWQ have not been tried.

"""


def page(found: dict[str, tuple[str, str]], version: str) -> str:
    """The page, from the result and the text of each family."""
    lines = ["| family | layers of the tiny model |", "|---|---|"]
    lines += [f"| `{name}` | {text} |" for name, (result, text) in found.items() if result == SERVED]
    lines += ["", "## Refused", "", "| family | message |", "|---|---|"]
    lines += [f"| `{name}` | {text} |" for name, (result, text) in found.items() if result == REFUSED]
    lines += ["", "## Not tried", "", "| family | why |", "|---|---|"]
    lines += [f"| `{name}` | {text} |" for name, (result, text) in found.items() if result == UNTRIED]
    return HEAD.replace("{version}", version) + "\n".join(lines) + "\n"


def written(text: str) -> tuple[dict[str, tuple[str, str]], str]:
    """What a page says of each family, and the version of transformers that it was written with."""
    found, result = {}, SERVED
    for line in text.splitlines():
        if line.startswith("## "):
            result = {"## Refused": REFUSED, "## Not tried": UNTRIED}[line]
        elif match := re.fullmatch(r"\| `(.*?)` \| (.*) \|", line):
            found[match[1]] = result, match[2]
    version = re.search(r"with transformers (\S+)\.$", text, re.MULTILINE)
    return found, "" if version is None else version[1]


def cell(text: str) -> str:
    """A message as it stands in a table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


if __name__ == "__main__":
    outcomes = {family: outcome(family) for family in FAMILIES}
    shown = {family: (one.result, cell(one.text)) for family, one in outcomes.items()}
    print(page(shown, transformers.__version__), end="")
