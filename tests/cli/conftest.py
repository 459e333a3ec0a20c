"""A small random model with a real tokenizer in a folder, and ways to run the command line."""

import os
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from longthink.cli import main
from tests.bpe import byte_level_bpe
from tests.models import build

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
TEMPLATE = (
    "{% for m in messages %}user {{ m.content }} {% endfor %}{% if add_generation_prompt %}bot{% endif %}"
)
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "100", "PYTHONUTF8": "1"}


def save_model(folder, words, *, template=None, **config):
    """Save a random model whose tokens are ``words``, after the special tokens.

    It is a Qwen3: for a Qwen2 folder transformers builds byte-level BPE whatever the tokenizer file says.
    """
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
    build("qwen3", vocab_size=len(vocabulary), **config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def words():
    return ["user", "bot", "hello", "there", *(f"w{i}" for i in range(60))]


@pytest.fixture(scope="session")
def plain_model(tmp_path_factory, words):
    """Model folder without a chat template."""
    return save_model(tmp_path_factory.mktemp("plain"), words)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory, words):
    """The same model with a chat template."""
    return save_model(tmp_path_factory.mktemp("chat"), words, template=TEMPLATE)


@pytest.fixture(scope="session")
def bpe_model(tmp_path_factory):
    """Random Qwen2 with byte-level BPE, whose tokens may be parts of a character."""
    folder = tmp_path_factory.mktemp("bpe")
    fast = byte_level_bpe(["größe 数学 🧠 hello there " * 5], vocab_size=300, special=["<|endoftext|>"])
    fast.save_pretrained(folder)
    build("qwen2", vocab_size=len(fast)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch):
    """Fixed width and threads; what the command line sets in the environment goes away after the test."""
    for name, value in {
        **ENVIRONMENT,
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        monkeypatch.setenv(name, value)
    # The hub library read its environment when it was imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def call(capsys):
    """Run the command line in this process; returns exit code, stdout and stderr."""

    def run(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def start():
    """Start the command line as a user would, in a process of its own."""
    started = []

    def run(*arguments, **options):
        command = [sys.executable, "-m", "longthink.cli", *map(str, arguments)]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, env=os.environ | ENVIRONMENT, **pipes | options))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
