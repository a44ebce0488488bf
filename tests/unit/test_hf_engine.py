"""The hf engine against enumeration, a plain forward pass, and itself in other batches."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from vlm_reason.engines import hf
from vlm_reason.engines.base import Engine, Law, SampleRequest, ScoreRequest, StopRule
from vlm_reason.engines.cache import new_cache
from vlm_reason.engines.draw import StopDetector, draw, inverse_cdf, uniforms
from vlm_reason.engines.hf import HFEngine
from vlm_reason.errors import UserError
from vlm_reason.models.adapters import POSTERIOR, REASONER, AdapterConfig, adapter_parameters, add_adapters
from vlm_reason.types import Completion


@pytest.fixture
def engine(tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> HFEngine:
    return HFEngine(tiny_llama, tiny_tokenizer)


def mixed_requests(adapters: tuple[str | None, ...] = (None,), count: int = 48) -> list[SampleRequest]:
    """Ragged prompts: some with a common header, some alone, some repeated; several laws, caps and stop rules."""
    rng = random.Random(7)
    header = tuple(rng.randrange(4, 64) for _ in range(12))
    laws = [Law(a, t, p) for a in adapters for t, p in ((1.0, 1.0), (0.7, 1.0), (1.3, 0.8), (0.0, 1.0))]
    requests: list[SampleRequest] = []
    for i in range(count):
        own = tuple(rng.randrange(4, 64) for _ in range(rng.randrange(1, 15)))
        prompt = requests[-1].prompt_ids if i % 5 == 4 else (header if i % 3 else ()) + own
        stop = StopRule((".", "a1"), eos=(2,)) if i % 2 else StopRule()
        requests.append(
            SampleRequest(prompt, rng.randrange(2**63), rng.randrange(1, 40), laws[i % len(laws)], stop)
        )
    return requests


def ids(completions: list[Completion]) -> list[tuple[int, ...]]:
    return [c.ids for c in completions]


# --- independence of the batch ------------------------------------------------------------------------------------


def test_is_an_engine(engine: HFEngine) -> None:
    assert isinstance(engine, Engine)
    assert engine.sample([]) == [] and engine.score([]) == []


def test_samples_do_not_depend_on_batch_order_or_company(tiny_llama, tiny_tokenizer) -> None:
    model = add_adapters(tiny_llama, AdapterConfig(r=4))
    with torch.no_grad():
        for name in (REASONER, POSTERIOR):
            for parameter in adapter_parameters(model, name).values():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    requests = mixed_requests((None, REASONER, POSTERIOR))
    reference = HFEngine(model, tiny_tokenizer, batch_size=1).sample(requests)
    assert len({c.ids for c in reference}) > 40  # they do differ from one another
    for batch_size in (4, 64):
        batched = HFEngine(model, tiny_tokenizer, batch_size=batch_size).sample(requests)
        assert ids(batched) == ids(reference)
        assert [c.finish for c in batched] == [c.finish for c in reference]
        for ours, theirs in zip(batched, reference, strict=True):
            np.testing.assert_allclose(ours.logps, theirs.logps, atol=2e-5)
    engine = HFEngine(model, tiny_tokenizer)
    order = random.Random(1).sample(range(len(requests)), len(requests))
    shuffled = engine.sample([requests[i] for i in order])
    assert ids(shuffled) == [reference[i].ids for i in order]
    assert ids(engine.sample(requests[10:13])) == ids(reference[10:13])


def test_a_longer_cap_continues_the_same_text(engine: HFEngine) -> None:
    short = SampleRequest((5, 6, 7), seed=11, max_tokens=6)
    one, two = engine.sample([short])[0], engine.sample([replace(short, max_tokens=20)])[0]
    assert two.ids[:6] == one.ids and len(two.ids) == 20


def test_same_seed_same_text_other_seed_other_text(engine: HFEngine) -> None:
    a, b, c = engine.sample([SampleRequest((5, 6), seed, 16) for seed in (1, 1, 2**32 + 1)])
    assert a.ids == b.ids and a.ids != c.ids  # a seed is used whole, not modulo 2^32
    assert (a.seed, c.seed) == (1, 2**32 + 1)


def test_shared_prompts_are_run_once(engine: HFEngine, tiny_llama: LlamaForCausalLM) -> None:
    seen: list[tuple[int, ...]] = []
    tiny_llama.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    header = tuple(range(4, 24))
    prompts = [(*header, 30), (*header, 31, 32)]
    engine.sample([SampleRequest(prompt, seed, 2) for prompt in prompts for seed in range(8)])
    assert seen == [(1, 20), (2, 2), (16, 1)]  # header once, two endings once, one step of 16 rows


def test_finished_rows_leave_the_batch(engine: HFEngine, tiny_llama: LlamaForCausalLM) -> None:
    rows: list[int] = []
    tiny_llama.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    engine.sample([SampleRequest((5, 6, 7 + i), i, 1 + i) for i in range(8)])
    assert rows == [8, 7, 6, 5, 4, 3, 2, 1]  # the prefill, then one row less a step


# --- the law ------------------------------------------------------------------------------------------------------


def test_sampled_logprobs_are_what_score_says(engine: HFEngine) -> None:
    requests = mixed_requests()
    completions = engine.sample(requests)
    scores = engine.score(
        [ScoreRequest(r.prompt_ids, c.ids, r.law) for r, c in zip(requests, completions, strict=True)]
    )
    for completion, score in zip(completions, scores, strict=True):
        np.testing.assert_allclose(completion.logps, score, atol=2e-5)
        assert sum(completion.logps) == pytest.approx(sum(score), abs=1e-4)


def exact_law(model: LlamaForCausalLM, prompt: tuple[int, ...], law: Law) -> Tensor:
    """Probabilities [V, V] of the first two tokens, written out."""

    def step(context: tuple[int, ...]) -> Tensor:
        p = (model(torch.tensor([context])).logits[0, -1].double() / law.temperature).softmax(-1)
        keep = torch.zeros_like(p, dtype=torch.bool)
        mass = 0.0
        for token in p.argsort(descending=True).tolist():
            if mass >= law.top_p:
                break
            keep[token] = True
            mass += p[token].item()
        p = torch.where(keep, p, 0.0)
        return p / p.sum()

    with torch.no_grad():
        first = step(prompt)
        return torch.stack([first[a] * step((*prompt, a)) for a in range(len(first))])


@pytest.mark.parametrize("law", [Law(), Law(temperature=0.5), Law(temperature=1.5, top_p=0.7)])
def test_frequencies_match_the_exact_law(engine: HFEngine, tiny_llama: LlamaForCausalLM, law: Law) -> None:
    prompt, draws = (5, 9, 30), 4096
    exact = exact_law(tiny_llama, prompt, law)
    counts = torch.zeros_like(exact)
    for completion in HFEngine(tiny_llama, engine.tokenizer, 512).sample(
        [SampleRequest(prompt, seed, 2, law) for seed in range(draws)]
    ):
        counts[completion.ids] += 1
        assert sum(completion.logps) == pytest.approx(exact[completion.ids].log().item(), abs=1e-4)
    distance = 0.5 * (counts / draws - exact).abs().sum().item()
    # E TV <= 1/2 sum_v sqrt(p (1 - p) / n); it concentrates within sqrt(log(1/delta) / 2n), here delta = 1e-4
    bound = 0.5 * (exact * (1 - exact) / draws).sqrt().sum().item() + (np.log(1e4) / (2 * draws)) ** 0.5
    assert distance < bound
    assert counts[exact == 0].sum() == 0


def test_greedy_is_the_argmax_with_untempered_logprobs(
    engine: HFEngine, tiny_llama: LlamaForCausalLM
) -> None:
    prompt = (5, 9, 30)
    (completion,) = engine.sample([SampleRequest(prompt, 0, 6, Law(temperature=0.0, top_p=0.5))])
    context = list(prompt)
    for token, logp in zip(completion.ids, completion.logps, strict=True):
        law = tiny_llama(torch.tensor([context])).logits[0, -1].log_softmax(-1)
        assert token == law.argmax().item()
        assert logp == pytest.approx(law.max().item(), abs=1e-5)
        context.append(token)


def test_plain_qwen2(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    requests = mixed_requests(count=16)
    together = HFEngine(model, tiny_tokenizer).sample(requests)
    alone = HFEngine(model, tiny_tokenizer, batch_size=1).sample(requests)
    assert ids(together) == ids(alone)
    assert ids(together)[3] == greedy(
        model, requests[3].prompt_ids, len(together[3].ids)
    )  # the fourth law is greedy


def greedy(model, prompt: tuple[int, ...], steps: int) -> tuple[int, ...]:
    context = list(prompt)
    for _ in range(steps):
        context.append(model(torch.tensor([context])).logits[0, -1].argmax().item())
    return tuple(context[len(prompt) :])


def test_sliding_window_model(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, sliding_window=8, initializer_range=0.2,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    requests = [replace(r, law=Law(temperature=0.0), stop=StopRule()) for r in mixed_requests(count=10)]
    for request, completion in zip(requests, HFEngine(model, tiny_tokenizer).sample(requests), strict=True):
        assert completion.ids == greedy(model, request.prompt_ids, request.max_tokens)


def test_recurrent_state_is_refused() -> None:
    from transformers import MambaConfig

    with pytest.raises(UserError, match="'mamba'"):
        new_cache(MambaConfig(num_hidden_layers=2, hidden_size=16))


# --- drawing ------------------------------------------------------------------------------------------------------


def test_uniforms_are_prefixes_of_one_stream() -> None:
    assert np.array_equal(uniforms(5, 3), uniforms(5, 9)[:3])
    long = uniforms(123, 20000)
    assert abs(long.mean() - 0.5) < 0.01 and 0 <= long.min() and long.max() < 1


def test_inverse_cdf_against_a_plain_scan() -> None:
    torch.manual_seed(0)
    mass = torch.rand(40, 700) * (torch.rand(40, 700) < 0.02)
    mass[:, 699] = 1e-6
    u = torch.rand(40, dtype=torch.float64)
    u[0], u[1] = 0.0, 1.0 - 2.0**-53
    tokens, total = inverse_cdf(mass, u)
    for row in range(40):
        running = list(itertools.accumulate(mass[row].double().tolist()))
        assert tokens[row] == next(v for v, c in enumerate(running) if c > u[row] * running[-1])
        assert total[row] == pytest.approx(running[-1], rel=1e-12)
    assert (mass[torch.arange(40), tokens] > 0).all()


def test_inverse_cdf_never_lands_on_mass_zero() -> None:
    mass = torch.zeros(3, 1000)
    mass[0, 17], mass[1, 999], mass[2, [3, 600]] = 0.3, 1e-30, 0.1
    for u in (0.0, 0.4999, 0.5001, 1 - 2.0**-53):
        tokens, _ = inverse_cdf(mass, torch.full((3,), u, dtype=torch.float64))
        assert tokens.tolist() == [17, 999, 3 if u < 0.5 else 600]


def test_draw_keeps_the_nucleus_and_its_ties() -> None:
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log().expand(400, 4)
    u = torch.linspace(0, 0.9999, 400, dtype=torch.float64)
    tokens, logps = draw(logits, u, Law(top_p=0.6))
    assert set(tokens.tolist()) == {0, 1, 2}  # 0.5 < 0.6, so one of the two ties is needed, and both stay
    expected = torch.tensor([0.5, 0.2, 0.2]) / 0.9
    torch.testing.assert_close(logps.exp(), expected[tokens])


# --- when a text ends ---------------------------------------------------------------------------------------------


def completion_of(engine: HFEngine, stop: StopRule, cap: int = 40) -> Completion:
    return engine.sample([SampleRequest((5, 9, 30), 3, cap, Law(), stop)])[0]


def test_finish_reasons(engine: HFEngine) -> None:
    free = completion_of(engine, StopRule())
    assert free.finish == "length" and len(free.ids) == 40 and not free.complete
    text = engine.tokenizer.decode(free.ids, skip_special_tokens=False)
    spelled = [engine.tokenizer.decode([i]) for i in free.ids]
    at = next(t for t in range(6, 40) if free.ids[t] > 3 and free.ids[t - 1] > 3)
    pair = spelled[at - 1] + spelled[at]
    stopped = completion_of(engine, StopRule((pair, "never written")))
    assert stopped.finish == "stop" and stopped.complete
    first = min(t for t in range(40) if pair in "".join(spelled[: t + 1]))
    assert stopped.ids == free.ids[: first + 1]  # it ends with the token that completed the string
    assert text.startswith(engine.tokenizer.decode(stopped.ids, skip_special_tokens=False))

    last = free.ids[10]
    ended = completion_of(engine, StopRule(eos=(last,)))
    assert ended.finish == "eos" and ended.ids == free.ids[: free.ids.index(last) + 1] and not ended.complete
    closed = completion_of(engine, StopRule(eos=(last,), eos_is_stop=True))
    assert closed.finish == "stop" and closed.ids == ended.ids
    capped = completion_of(engine, StopRule(eos=(last,)), cap=len(ended.ids))
    assert capped.finish == "eos"  # ended and capped by the same token: it ended


def test_stop_string_over_many_tokens_and_bytes() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast as Fast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = Fast(tokenizer_object=tokenizer)
    detector = StopDetector(fast)
    for text, stops in (
        ("ab → c", ("→",)),
        ("x </think> y", ("</think>", "zz")),
        ("one  two", ("  ",)),
        ("né!", ("é!",)),
    ):
        tokens = fast(text).input_ids
        hits = [t for t in range(1, len(tokens) + 1) if detector.hit(tokens[:t], stops)]
        end = text.index(stops[0]) + len(stops[0])
        assert hits[0] == len(
            text[:end].encode()
        )  # one token a byte here: found at the byte that completes it


def test_generation_stops_at_the_context(tiny_llama: LlamaForCausalLM, tiny_tokenizer) -> None:
    tiny_llama.config.max_position_embeddings = 16
    engine = HFEngine(tiny_llama, tiny_tokenizer)
    prompt = tuple(range(4, 16))
    full, short = engine.sample([SampleRequest(prompt, 1, 99), SampleRequest(prompt[:3], 1, 5)])
    assert (len(full.ids), full.finish) == (4, "length")
    assert (len(short.ids), short.finish) == (5, "length")


# --- bad requests, state left behind ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (SampleRequest((), 0, 4), "request 1 has an empty prompt"),
        (SampleRequest((5,), 0, 0), "max_tokens must be >= 1, got 0"),
        (SampleRequest((5,) * 512, 0, 4), "the prompt has 512 tokens and the model's context is 512"),
        (SampleRequest((5,), 0, 4, stop=StopRule(("",))), "empty stop string"),
    ],
)
def test_bad_sample_requests(engine: HFEngine, request_: SampleRequest, message: str) -> None:
    with pytest.raises(UserError, match=message):
        engine.sample([SampleRequest((5,), 0, 1), request_])


def test_bad_score_requests_and_settings(engine: HFEngine) -> None:
    with pytest.raises(UserError, match="empty context"):
        engine.score([ScoreRequest((), (5,))])
    with pytest.raises(UserError, match="have 514 tokens"):
        engine.score([ScoreRequest((5,) * 500, (5,) * 14)])
    assert len(engine.score([ScoreRequest((5,) * 500, (5,) * 13)])[0]) == 13
    with pytest.raises(UserError, match="batch_size must be >= 1, got 0"):
        HFEngine(engine.model, engine.tokenizer, batch_size=0)


def test_modes_flags_and_randomness_are_left_as_found(tiny_llama, tiny_tokenizer) -> None:
    model = add_adapters(tiny_llama, AdapterConfig(r=2))
    model.train()
    model.get_base_model().model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    engine = HFEngine(model, tiny_tokenizer)
    engine.sample([SampleRequest((5, 6), 1, 3, Law(POSTERIOR)), SampleRequest((5, 6), 1, 3, Law(None))])
    engine.score([ScoreRequest((5, 6), (7,), Law(POSTERIOR))])
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert model.active_adapter == REASONER
    with pytest.raises(UserError, match="no adapter 'other'"):
        engine.sample([SampleRequest((5,), 1, 1, Law("other"))])


def test_progress_goes_to_stderr_and_only_when_named(
    engine: HFEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.sample([SampleRequest((5, 6), 1, 3)])
    assert capsys.readouterr() == ("", "")
    engine.sample([SampleRequest((5, 6), 1, 3)], progress="traces")
    out, err = capsys.readouterr()
    assert out == "" and "traces" in err


def test_common_prefix_leaves_a_token_to_every_prompt() -> None:
    assert hf._common_prefix([(1, 2, 3), (1, 2, 4, 5)]) == 2
    assert hf._common_prefix([(1, 2), (1, 2, 4, 5)]) == 1
    assert hf._common_prefix([(1,), (2, 3)]) == 0
