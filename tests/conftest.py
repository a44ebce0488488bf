"""What all tests share: one thread, fixed seeds, no hub, a tiny model and tokenizer, the built-in model, the data."""

from __future__ import annotations

import gc
import os

# Before any import that reads them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

REPO = Path(__file__).resolve().parent.parent

# The same examples on every run and every machine; a time limit per example would fail on a busy one.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Every Trainer collects garbage when it begins: what is imported by now need not be looked through each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _repeatable(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fixed seeds. One thread too, except where the built-in model runs: tiny tensors are faster without a pool."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    before = torch.get_num_threads()
    if not request.node.get_closest_marker("integration"):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def builtin_model_dir() -> Path:
    """Folder of the built-in model as bf16 safetensors with its tokenizer; made in the cache when it is not there."""
    from vlm_reason.models.builtin import ensure_builtin

    return Path(ensure_builtin())


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real data sets: $VLM_REASON_DATA, else shared/data beside the repository."""
    named = os.environ.get("VLM_REASON_DATA")
    folder = Path(named) if named else REPO.parent / "shared" / "data"
    if not folder.is_dir():
        if named:
            pytest.fail(f"VLM_REASON_DATA names no folder: {named}")
        pytest.skip("no data: neither VLM_REASON_DATA nor ../shared/data is there")
    return folder


TINY_SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
TINY_CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz \n+-*/=().,:;?!'\"<>_#%&|"


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """A Llama with grouped-query attention, 64 tokens, 2 layers, width 32, fp32, eval mode; the same weights always.

    Initialised ten times wider than the default, so that its next-token law is far from uniform and a wrong
    position, mask or temperature shows. Built anew for each test: a test may train it.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(TINY_SPECIALS) + len(TINY_CHARACTERS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20240)
        return LlamaForCausalLM(config).float().eval()


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character (so one a digit), lower-cased, "\\n" kept, 64 ids as in `tiny_llama`; no chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate((*TINY_SPECIALS, *TINY_CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
