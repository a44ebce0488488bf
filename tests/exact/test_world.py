"""The enumerable world itself: probabilities add up, tables and models agree with brute force, bad input is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vlm_reason.errors import UserError
from vlm_reason.exact import EnumerableWorld, Strings


def tiny_llama(vocab_size: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize(("vocab", "longest"), [(1, 3), (2, 0), (2, 3), (3, 2)])
def test_strings_are_all_strings_numbered_consistently(vocab: int, longest: int) -> None:
    strings = Strings(vocab, longest)
    every = [s for t in range(longest + 1) for s in itertools.product(range(vocab), repeat=t)]
    assert list(strings.symbols) == every
    assert strings.count == len(every)
    assert strings.open_prefixes == sum(len(s) < longest for s in every)
    for i, s in enumerate(every):
        assert strings.index[s] == i
        assert strings.length[i] == len(s) + 1
        assert strings.tokens[i].tolist() == [*s, vocab, *[-1] * (longest - len(s))]
        assert strings.prefix_of[i, : len(s) + 1].tolist() == [every.index(s[:t]) for t in range(len(s) + 1)]


@pytest.mark.parametrize(
    "world", [EnumerableWorld.random(2, 3, 3, seed=1), EnumerableWorld.random(3, 2, 2, seed=2)]
)
def test_everything_sums_to_one(world: EnumerableWorld) -> None:
    answers = range(world.n_answers)
    assert world.logp_prior().exp().sum().item() == pytest.approx(1)
    assert sum(world.log_marginal(y).exp().item() for y in answers) == pytest.approx(1)
    assert world.log_marginal(tuple(answers)).item() == pytest.approx(0)
    for y in answers:
        assert world.logq(y).exp().sum().item() == pytest.approx(1)
        assert world.posterior(y).sum().item() == pytest.approx(1)
    assert torch.allclose(world.logp_answers().exp().sum(1), torch.ones(world.strings.count).double())


def test_table_log_probabilities_by_hand() -> None:
    world = EnumerableWorld.random(2, 2, 2, seed=3)
    table = world.laws.prior().detach()
    strings = world.strings
    z = strings.index[(1, 0)]
    # prefix () is row 0, prefix (1,) row 2; the end behind two symbols is forced.
    assert world.logp_prior()[z].item() == pytest.approx((table[0, 1] + table[2, 0]).item())
    z = strings.index[(1,)]
    assert world.logp_prior()[z].item() == pytest.approx((table[0, 1] + table[2, 2]).item())
    assert world.token_logps_prior()[z].tolist() == pytest.approx(
        [table[0, 1].item(), table[2, 2].item(), 0.0]
    )


def test_posterior_is_bayes_rule() -> None:
    world = EnumerableWorld.random(2, 2, 3, seed=4)
    joint = world.logp_prior().exp() * world.logp_answers().exp()[:, [0, 2]].sum(1)
    assert torch.allclose(world.posterior({0, 2}), joint / joint.sum())
    assert world.log_marginal([2, 0]).exp().item() == pytest.approx(joint.sum().item())


def test_gradient_of_the_marginal_is_the_posterior_expectation_of_the_score() -> None:
    # Fisher's identity: grad log P = E_posterior grad log pi(z, y).
    world = EnumerableWorld.random(2, 2, 2, seed=5)
    direct = world.gradient(world.log_marginal(1))
    fisher = world.gradient((world.posterior(1).detach() * world.log_joint(1)).sum())
    for name in direct:
        assert torch.allclose(direct[name], fisher[name], atol=1e-14)
    assert direct["posterior"].abs().max() == 0
    step = 1e-6
    with torch.no_grad():
        bumped = world.laws.prior_logits.clone()  # type: ignore[attr-defined]
        bumped[0, 1] += step
    moved = EnumerableWorld.from_tables(
        world.strings,
        bumped,
        world.laws.posterior_logits,
        world.laws.answer_logits,  # type: ignore[attr-defined]
    )
    slope = (moved.log_marginal(1) - world.log_marginal(1)).item() / step
    assert direct["prior"][0, 1].item() == pytest.approx(slope, abs=1e-6)


def test_model_world_matches_plain_forwards() -> None:
    model = tiny_llama(2 + 1 + 2 + 1)
    world = EnumerableWorld.from_model(model, vocab=2, max_tokens=3, answers=2)

    def next_logps(ids: tuple[int, ...], allowed: list[int]) -> torch.Tensor:
        return model(torch.tensor([ids])).logits[0, -1, allowed].log_softmax(0)

    symbols, answers = [0, 1, 2], [3, 4]
    for i, z in enumerate(world.strings.symbols):
        for law, prompt in ((world.logp_prior(), (5,)), (world.logq(1), (4, 5))):
            total = 0.0
            for t, token in enumerate((*z, 2)):
                if t < 3:
                    total += next_logps((*prompt, *z[:t]), symbols)[token].item()
            assert law[i].item() == pytest.approx(total, abs=1e-10)
        expected = next_logps((5, *z, 2), answers)
        assert torch.allclose(world.logp_answers()[i], expected, atol=1e-10)
    assert world.logp_prior().exp().sum().item() == pytest.approx(1)


def test_model_world_has_gradients() -> None:
    world = EnumerableWorld.from_model(tiny_llama(6), vocab=2, max_tokens=2, answers=2)
    direct = world.gradient(world.log_marginal(0))
    fisher = world.gradient((world.posterior(0).detach() * world.log_joint(0)).sum())
    assert direct.keys() == dict(world.laws.model.named_parameters()).keys()  # type: ignore[attr-defined]
    for name in direct:
        assert torch.allclose(direct[name], fisher[name], atol=1e-12)


def test_text_round_trip_and_prompts() -> None:
    world = EnumerableWorld.random(2, 2, 2)
    assert world.decode((0, 1, 2, 3, 4, 5)) == "ab.AB?"
    assert world.encode("ab.AB?") == (0, 1, 2, 3, 4, 5)
    assert world.prior_prompt == (5,) and world.hinted_prompt(1) == (4, 5)
    problem = world.problem(1)
    assert (problem.question, problem.answer) == ("?", "B")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: Strings(10, 9), "too many to enumerate"),
        (lambda w: Strings(0, 1), "vocab >= 1"),
        (lambda w: w.log_marginal(2), "answer must be 0..1, got 2"),
        (lambda w: w.log_marginal(()), "no answer given"),
        (lambda w: w.iwae_bound(0, 0), "K .* >= 1, got 0"),
        (lambda w: w.iwae_bound(0, 12), "too many groups"),
        (lambda w: w.cubo(0, proposal=torch.zeros(3)), r"shape \[7\], got \[3\]"),
        (lambda w: w.encode("xyz"), "has no token for"),
        (lambda w: EnumerableWorld.from_model(tiny_llama(5), 2, 2, 2), "has 5 tokens, this world needs 6"),
        (lambda w: EnumerableWorld.from_model(tiny_llama(6).train(), 2, 2, 2), "training mode"),
        (
            lambda w: EnumerableWorld.from_tables(w.strings, *[torch.zeros(1)] * 3),
            "prior_logits must have shape",
        ),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(EnumerableWorld.random(2, 2, 2))
