"""The shared fixtures are what the other tests take them for."""

from __future__ import annotations

import torch


def test_tiny_tokenizer_is_one_id_a_character(tiny_tokenizer) -> None:
    text = "q: 12 + 7 = ?\n"
    ids = tiny_tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tiny_tokenizer.convert_ids_to_tokens(ids) == list(text)
    assert tiny_tokenizer.decode(ids) == text
    assert tiny_tokenizer("Q")["input_ids"] == tiny_tokenizer("q")["input_ids"]
    assert tiny_tokenizer("@")["input_ids"] == [tiny_tokenizer.unk_token_id]
    specials = [tiny_tokenizer.pad_token_id, tiny_tokenizer.bos_token_id, tiny_tokenizer.eos_token_id]
    assert specials == [0, 1, 2]


def test_tiny_llama_fits_its_tokenizer_and_is_peaked(tiny_llama, tiny_tokenizer) -> None:
    assert tiny_llama.config.vocab_size == len(tiny_tokenizer) == 64
    assert tiny_llama.config.num_key_value_heads < tiny_llama.config.num_attention_heads
    assert {p.dtype for p in tiny_llama.parameters()} == {torch.float32}
    ids = torch.tensor([tiny_tokenizer("1+2=")["input_ids"]])
    with torch.no_grad():
        logp = tiny_llama(ids).logits[0, -1].log_softmax(-1)
    entropy = float(-(logp.exp() * logp).sum())
    assert entropy < 0.9 * torch.log(
        torch.tensor(64.0)
    )  # far from uniform: a test can tell two contexts apart


def test_unit_tests_run_on_one_thread() -> None:
    assert torch.get_num_threads() == 1


def test_tiny_llama_is_the_same_for_every_test(tiny_llama) -> None:
    state = torch.random.get_rng_state()
    assert torch.equal(state, torch.Generator().manual_seed(0).get_state())  # building it drew nothing
    assert not tiny_llama.training
