"""Our models behind lm-eval: against lm-eval's own backend, against members run one by one, and against its traps."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

pytest.importorskip("lm_eval", reason="lm-eval is not installed (bash scripts/setup.sh eval)")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from vlm_reason.cli.lm_eval import LMEvalConfig
from vlm_reason.cli.main import main
from vlm_reason.engines.base import Law, SampleRequest, ScoreRequest, StopRule
from vlm_reason.engines.token_mixture import MIXTURE, TokenMixtureEngine
from vlm_reason.errors import UserError
from vlm_reason.evaluation.lm_eval import RationaleConfig, Responses, VLMReasonLM, adapter_folders
from vlm_reason.evaluation.lm_eval.mixture import Written
from vlm_reason.evaluation.lm_eval.run import RunOptions, run
from vlm_reason.evaluation.lm_eval.tasks import task_of
from vlm_reason.evaluation.members import Members, load_members
from vlm_reason.models.adapters import (
    AdapterConfig,
    adapter_parameters,
    add_adapters,
    save_adapters,
    use_adapter,
)
from vlm_reason.store import SampleStore
from vlm_reason.tasks.sources import TaskSpec

PAIRS = [
    ("question: what is 1+2?\nanswer:", " 3"),
    ("question: what is 1+2?\nanswer:", " 14"),
    ("question: what is 1+2?\nanswer: ", "-1"),
    ("", "a lone continuation"),
    ("the sky is", " blue and so is the sea"),
    ("x", "y"),
]  # fmt: skip
ROWS = [
    {"q": f"what is {a}+{b}?", "choices": [str(a + b), str(a + b + 1), str(a - b)][: 2 + a % 2], "gold": 0}
    for a, b in ((1, 2), (3, 4), (6, 1), (2, 2), (5, 3))
]
COMMON = {
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "question: {{q}}\nanswer:",
    "num_fewshot": 0,
}
TASKS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "texts": {
        "output_type": "generate_until", "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["\n", "z"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{q}}" * 60,
        "metric_list": [{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    files = {}
    for name, own in TASKS.items():
        task = {
            "task": f"tiny_{name}",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            **COMMON,
            **own,
        }
        files[name] = str(folder / f"{name}.yaml")
        Path(files[name]).write_text(json.dumps(task))  # JSON is YAML
    return files


@pytest.fixture
def folder(tiny_llama, tiny_tokenizer, tmp_path: Path) -> str:
    tiny_llama.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def adapters(folder: str, tiny_llama, tmp_path: Path) -> list[str]:
    """Three members of a posterior, far enough from one another that a mixture is none of them."""
    names = ("m0", "m1", "m2")
    wrapped = add_adapters(tiny_llama, AdapterConfig(r=2, alpha=4), names=names)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in names:
            for parameter in adapter_parameters(wrapped, name).values():
                parameter.add_(0.25 * torch.randn(parameter.shape, generator=generator))
    save_adapters(wrapped, tmp_path / "posterior")
    return [str(tmp_path / "posterior" / name) for name in names]


@pytest.fixture
def members(folder: str, adapters: list[str]) -> Members:
    return load_members(folder, "float32", adapters, {})


def asked(pairs: Sequence[tuple[Any, ...]], kind: Any = "loglikelihood", repeats: int = 1) -> list[Instance]:
    made = [Instance(kind, {}, tuple(pair), 0, ("t", i, repeats)) for i, pair in enumerate(pairs)]
    return [instance for instance in made for _ in range(repeats)]


def token_laws(members: Members, context: Sequence[int], target: Sequence[int]) -> list[list[float]]:
    """[M][T] log p_m(y_t | x, y_<t), from a plain forward pass each."""
    model = members.engine.model  # type: ignore[attr-defined]
    ids = torch.tensor([[*context, *target]])
    found = []
    for member in members:
        with use_adapter(model, member.adapter), torch.no_grad():
            logp = model(ids).logits[0].float().log_softmax(-1)
        found.append([float(logp[len(context) + t - 1, y]) for t, y in enumerate(target)])
    return found


# ---- against lm-eval's own backend ---------------------------------------------------------------------------


def test_the_plain_model_gives_what_lm_eval_gives(folder, tiny_llama, tiny_tokenizer, task_files) -> None:
    ours = VLMReasonLM(folder, dtype="float32")
    theirs = HFLM(
        pretrained=tiny_llama, tokenizer=tiny_tokenizer, backend="causal", device="cpu", batch_size=2
    )
    for mine, other in zip(ours.loglikelihood(asked(PAIRS)), theirs.loglikelihood(asked(PAIRS)), strict=True):
        assert mine[0] == pytest.approx(other[0], abs=1e-4)
        assert mine[1] == other[1]
    results = [
        simple_evaluate(
            model=model, tasks=list(task_files.values()), bootstrap_iters=0,
            task_manager=TaskManager(include_defaults=False),
        )
        for model in (ours, theirs)
    ]  # fmt: skip
    compared = 0
    for name, samples in results[0]["samples"].items():
        for mine, other in zip(samples, results[1]["samples"][name], strict=True):
            for a, b in zip(np.ravel(mine["resps"]), np.ravel(other["resps"]), strict=True):
                assert a == b if isinstance(a, str) else a == pytest.approx(b, abs=1e-3, rel=1e-5)
                compared += 1
    assert compared == 2 * sum(len(row["choices"]) for row in ROWS) + 2 * len(ROWS)
    for name in ("tiny_choices", "tiny_texts"):
        a, b = ({k: v for k, v in r["results"][name].items() if k != "alias"} for r in results)
        assert a == b


def test_a_greedy_continuation_is_told(folder) -> None:
    lm = VLMReasonLM(folder, dtype="float32")
    (text,) = lm.generate_until(asked([("abc", {"until": [], "max_gen_toks": 4})], "generate_until"))
    other = "?" if text[0] != "?" else "!"
    (first, second, empty) = lm.loglikelihood(asked([("abc", text), ("abc", other + text[1:]), ("abc", "")]))
    assert first[1] is True and second[1] is False and empty == (0.0, True)


def test_the_name_is_registered_and_takes_a_string(folder, task_files) -> None:
    assert get_model("vlm-reason") is VLMReasonLM
    found = simple_evaluate(
        model="vlm-reason", model_args=f"pretrained={folder},dtype=float32,seed=3", tasks=[task_files["choices"]],
        task_manager=TaskManager(include_defaults=False), bootstrap_iters=0, limit=2,
    )  # fmt: skip
    assert found["config"]["seed"] == 3 and found["n-samples"]["tiny_choices"]["effective"] == 2
    assert len(found["config"]["weights"][0]) == 16


# ---- mixtures over weights -----------------------------------------------------------------------------------


def test_levels_of_mixing_equal_brute_force(members) -> None:
    sequence, token = VLMReasonLM.over(members), VLMReasonLM.over(members, "token")
    whole, stepwise = sequence.loglikelihood(asked(PAIRS)), token.loglikelihood(asked(PAIRS))
    apart = 0.0
    for i, pair in enumerate(PAIRS):
        rows = np.array(token_laws(members, *sequence.encoder.pair(*pair)))
        assert whole[i][0] == pytest.approx(logsumexp(rows.sum(1)) - math.log(3), abs=1e-4)
        assert stepwise[i][0] == pytest.approx((logsumexp(rows, axis=0) - math.log(3)).sum(), abs=1e-4)
        apart = max(apart, abs(whole[i][0] - stepwise[i][0]))
        np.testing.assert_allclose(sequence.kept[f"t/{i}", 0, 0].members, rows.sum(1), atol=1e-4)
        np.testing.assert_allclose(token.kept[f"t/{i}", 0, 0].members, rows.sum(1), atol=1e-4)
    assert apart > 0.1  # they are different models


def test_rolling_mixes_whole_texts_or_tokens(members) -> None:
    text = "one text that is longer than a window. " * 30
    sequence, token = VLMReasonLM.over(members), VLMReasonLM.over(members, "token")
    windows = sequence.encoder.windows(text)
    assert len(windows) == 3 and sum(len(target) for _, target in windows) == len(text)
    rows = np.array([sum((token_laws(members, *w)[m] for w in windows), []) for m in range(3)])
    request = asked([(text,)], "loglikelihood_rolling")
    assert sequence.loglikelihood_rolling(request)[0] == pytest.approx(
        logsumexp(rows.sum(1)) - math.log(3), rel=1e-5
    )
    assert token.loglikelihood_rolling(request)[0] == pytest.approx(
        (logsumexp(rows, axis=0) - math.log(3)).sum(), rel=1e-5
    )
    assert sequence.loglikelihood_rolling(asked([("",)], "loglikelihood_rolling")) == [0.0]


def test_one_member_is_the_plain_model(folder, adapters) -> None:
    one = load_members(folder, "float32", adapters[:1], {})
    asks = asked([(c, {"until": ["."], "max_gen_toks": 10}) for c, _ in PAIRS], "generate_until")
    plain = VLMReasonLM.over(one)
    token = VLMReasonLM.over(one, "token")
    assert plain.loglikelihood(asked(PAIRS)) == token.loglikelihood(asked(PAIRS))
    assert plain.generate_until(asks) == token.generate_until(asks)
    twice = VLMReasonLM.over(load_members(folder, "float32", [adapters[0], adapters[0]], {}))
    for a, b in zip(plain.loglikelihood(asked(PAIRS)), twice.loglikelihood(asked(PAIRS)), strict=True):
        assert a[0] == pytest.approx(b[0], abs=1e-5)
    assert twice.generate_until(asks) == plain.generate_until(asks)


def test_token_mixture_writes_the_likeliest_token_of_the_mean(members) -> None:
    lm = VLMReasonLM.over(members, "token")
    model = members.engine.model  # type: ignore[attr-defined]
    (text,) = lm.generate_until(asked([("the sky is", {"until": [], "max_gen_toks": 12})], "generate_until"))
    ids = list(lm.encoder.prompt("the sky is"))
    start = len(ids)
    while len(ids) < start + 12:
        laws = []
        for member in members:
            with use_adapter(model, member.adapter), torch.no_grad():
                laws.append(model(torch.tensor([ids])).logits[0, -1].softmax(-1))
        ids.append(int(torch.stack(laws).mean(0).argmax()))
        if ids[-1] == lm.eot_token_id:
            break
    assert text == lm.encoder.text(ids[start:], ())


def test_token_mixture_engine_scores_what_it_samples(members) -> None:
    engine = TokenMixtureEngine(members.engine.model, members.tokenizer, [m.adapter for m in members])  # type: ignore[attr-defined]
    law = Law(MIXTURE)
    requests = [
        SampleRequest((5 + i, 9, 30), 77 + i, 6 + 2 * i, law, StopRule((".",), (2,))) for i in range(8)
    ]
    drawn = engine.sample(requests)
    assert len({c.ids for c in drawn}) > 6
    for request, completion in zip(requests, drawn, strict=True):
        rows = np.array(token_laws(members, request.prompt_ids, completion.ids))
        expected = logsumexp(rows, axis=0) - math.log(3)
        np.testing.assert_allclose(completion.logps, expected, atol=1e-4)
        (scored,) = engine.score([ScoreRequest(request.prompt_ids, completion.ids, law)])
        np.testing.assert_allclose(scored, expected, atol=1e-4)
    alone = TokenMixtureEngine(engine.model, members.tokenizer, engine.members, batch_size=1).sample(requests)
    assert [c.ids for c in alone] == [c.ids for c in drawn]
    with pytest.raises(UserError, match="law of a token-level mixture is 'mixture'"):
        engine.sample([SampleRequest((5,), 0, 1, Law("member0"))])
    with pytest.raises(UserError, match="temperature 0 or 1"):
        engine.score([ScoreRequest((5,), (6,), Law(MIXTURE, 0.5))])


def test_greedy_text_of_a_sequence_mixture_is_the_likeliest_of_the_members(members) -> None:
    lm = VLMReasonLM.over(members)
    asks = asked([(c, {"until": [], "max_gen_toks": 6}) for c, _ in PAIRS], "generate_until")
    lm.generate_until(asks)
    for i in range(len(PAIRS)):
        written = lm.kept[f"t/{i}", 0, 0]
        assert isinstance(written, Written) and len(written.drafts) == 3
        values = [logsumexp(np.array(token_laws(members, d.prompt, d.ids)).sum(1)) for d in written.drafts]
        assert values[written.chosen] == pytest.approx(max(values), abs=1e-5)


def test_a_sampled_text_of_a_sequence_mixture_is_one_members(members) -> None:
    lm = VLMReasonLM.over(members)
    options = {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0}
    lm.generate_until(asked([("ab", options)], "generate_until", repeats=60))
    who = [lm.kept["t/0", 0, r].drafts[0].member for r in range(60)]
    assert all(10 <= who.count(m) <= 30 for m in range(3))


def test_whole_models_cannot_be_mixed_by_token(folder, tmp_path, tiny_llama, tiny_tokenizer) -> None:
    for name in ("a", "b"):
        tiny_llama.save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    models = load_members(folder, "float32", [str(tmp_path / "a"), str(tmp_path / "b")], {})
    plain = VLMReasonLM(folder, dtype="float32").loglikelihood(asked(PAIRS))
    for a, b in zip(VLMReasonLM.over(models).loglikelihood(asked(PAIRS)), plain, strict=True):
        assert a[0] == pytest.approx(b[0], abs=1e-5)
    with pytest.raises(UserError, match="PEFT adapters of one model"):
        VLMReasonLM.over(models, "token")


# ---- rationales ----------------------------------------------------------------------------------------------

LATENT = RationaleConfig(4, max_tokens=40, opening=" so", end=".", cue="answer:", on_cut="direct")


def test_rationale_mixture_is_the_mean_over_rationales_and_members(members) -> None:
    lm = VLMReasonLM.over(members, rationales=LATENT, seed=5)
    questions = [PAIRS[0], PAIRS[1]]
    requests = [Instance("loglikelihood", {}, pair, i, ("t", 0, 1)) for i, pair in enumerate(questions)]
    values = lm.loglikelihood(requests)
    law, encoder = lm.rationales, lm.encoder
    assert law is not None
    from vlm_reason.evaluation.lm_eval.asking import Asker
    from vlm_reason.evaluation.lm_eval.rationales import Choice, Prompts, _problem

    prompts = Prompts(encoder, LATENT, ())
    for i, (context, continuation) in enumerate(questions):
        problem = _problem(Choice("t/0", context, continuation))
        assert prompts.prior_ids(problem) == tuple(encoder.encode("question: what is 1+2? so"))
        per_member = []
        for m, member in enumerate(members):
            asker = Asker(members.engine, member, Responses())  # type: ignore[attr-defined]
            group = law._traces(asker, member, m, [problem])[problem.id]
            assert len({t.ids for t in group.traces}) > 1
            logps = []
            for trace in group.traces:
                if trace.complete:
                    shown = (*trace.prompt_ids, *trace.ids, *encoder.encode("answer:"))
                    logps.append(sum(token_laws(members, shown, encoder.encode(continuation))[m]))
                else:
                    logps.append(-math.inf)
            per_member.append(logsumexp(logps) - math.log(4))
        assert np.isfinite(per_member).any()
        assert values[i][0] == pytest.approx(logsumexp(per_member) - math.log(3), abs=1e-4)
        np.testing.assert_allclose(lm.kept["t/0", i, 0].members, per_member, atol=1e-4)


def test_rationales_do_not_depend_on_company(folder) -> None:
    pairs = [(f"question: {i}\nanswer:", " 3") for i in range(6)]
    settings = {"rationales": 3, "max_rationale_tokens": 30, "rationale_end": ".", "cue": "answer:"}
    one = VLMReasonLM(folder, dtype="float32", on_cut="direct", **settings)  # type: ignore[arg-type]
    together = one.loglikelihood(asked(pairs))
    alone = [one.loglikelihood([request])[0] for request in asked(pairs)]
    np.testing.assert_allclose([v for v, _ in together], [v for v, _ in alone], atol=1e-4)
    assert len({round(v, 3) for v, _ in together}) == 6


def test_items_whose_rationales_are_all_cut_are_told(folder) -> None:
    settings: dict[str, Any] = {
        "rationales": 2,
        "max_rationale_tokens": 1,
        "rationale_end": "@@",
        "dtype": "float32",
    }
    with pytest.raises(UserError, match=r"t/0: all 2 rationales were cut at 1 tokens.*on_cut=direct"):
        VLMReasonLM(folder, **settings).loglikelihood(asked(PAIRS[:1]))
    direct = VLMReasonLM(folder, **settings, on_cut="direct")
    assert math.isfinite(direct.loglikelihood(asked(PAIRS[:1]))[0][0])
    assert direct.get_model_info()["without_rationale"] == 1
    (text,) = direct.generate_until(asked([("ab", {"until": ["\n"]})], "generate_until"))
    assert text == "" and direct.kept["t/0", 0, 0].chosen is None


def test_the_ranked_answer_is_returned(members) -> None:
    lm = VLMReasonLM.over(members, rationales=LATENT)
    asks = asked(
        [(c, {"until": [".", "a", "e"], "max_gen_toks": 20}) for c, _ in PAIRS[:3]], "generate_until"
    )
    texts = lm.generate_until(asks)
    assert texts == lm.generate_until(asks)
    for i, text in enumerate(texts):
        written = lm.kept[f"t/{i}", 0, 0]
        assert len(written.drafts) == 12
        if written.chosen is not None:
            assert written.drafts[written.chosen].canonical is not None
            assert lm.encoder.text(written.drafts[written.chosen].ids, [".", "a", "e"]) == text
    assert any(texts)


# ---- traps ---------------------------------------------------------------------------------------------------


def test_repeats_differ_and_come_again(folder) -> None:
    options = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    requests = asked([("ab", options), ("cd", options)], "generate_until", repeats=6)
    first = VLMReasonLM(folder, dtype="float32").generate_until(requests)
    assert len(set(first[:6])) == 6 and len(set(first)) == 12
    assert VLMReasonLM(folder, dtype="float32", batch_size=2).generate_until(requests) == first
    backwards = VLMReasonLM(folder, dtype="float32").generate_until([*requests[6:], *requests[:6]])
    assert backwards == [*first[6:], *first[:6]]
    assert VLMReasonLM(folder, dtype="float32", seed=1).generate_until(requests) != first


def test_one_result_a_request_in_order(folder) -> None:
    pairs = [*PAIRS, *reversed(PAIRS), PAIRS[0], PAIRS[0]]
    found = VLMReasonLM(folder, dtype="float32").loglikelihood(asked(pairs))
    assert found == [*found[:6], *found[5::-1], found[0], found[0]]
    assert VLMReasonLM(folder, dtype="float32").loglikelihood([]) == []


def test_stored_responses_are_those_of_their_weights(folder, adapters, tmp_path) -> None:
    store = str(tmp_path / "responses")
    plain = VLMReasonLM(folder, dtype="float32", store=store)
    before = plain.loglikelihood(asked(PAIRS))
    again = VLMReasonLM(folder, dtype="float32", store=store)
    again.members.engine = None  # type: ignore[attr-defined]

    class Silent:
        context = 512

        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"asked the engine to {name}")

    silent = Silent()
    silent.__class__ = type("HFEngine", (Silent,), {})  # the name is part of the key
    again.members.engine = silent  # type: ignore[attr-defined]
    assert again.loglikelihood(asked(PAIRS)) == before
    other = VLMReasonLM(folder, adapters=adapters[0], dtype="float32", store=store)
    fresh = VLMReasonLM(folder, adapters=adapters[0], dtype="float32")
    assert other.loglikelihood(asked(PAIRS)) == fresh.loglikelihood(asked(PAIRS)) != before
    (file, *_) = sorted((tmp_path / "responses").glob("*.jsonl"))
    whole = len(Responses(store))
    file.write_bytes(file.read_bytes()[:-20])  # a writer that was killed
    assert len(Responses(store)) == whole - 1
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([lines[0][:-30] + "\n", *lines[1:]]))
    with pytest.raises(UserError, match=r"responses-.*:1 is damaged"):
        Responses(store)


def test_lm_evals_cache_of_another_model_is_refused(folder, adapters, tmp_path) -> None:
    path = str(tmp_path / "cache.db")
    plain = CachingLM(VLMReasonLM(folder, dtype="float32"), path)
    before = plain.loglikelihood(asked(PAIRS))
    assert CachingLM(VLMReasonLM(folder, dtype="float32"), path).loglikelihood(asked(PAIRS)) == before
    with pytest.raises(UserError, match="responses of another model"):
        CachingLM(VLMReasonLM(folder, adapters=adapters[1], dtype="float32"), path)
    sampled = {"until": [], "max_gen_toks": 4, "temperature": 1.0}
    with pytest.raises(UserError, match=r"t/0: with use_cache, lm-eval answers all 4 repeats with one"):
        plain.generate_until(asked([("ab", sampled)], "generate_until", repeats=4))
    marked = asked([("ab", {**sampled, "do_sample": True})], "generate_until", repeats=4)
    assert len(set(plain.generate_until(marked))) == 4


def test_members_stay_out_of_lm_evals_cache(members, tmp_path) -> None:
    cached = CachingLM(VLMReasonLM.over(members), str(tmp_path / "cache.db"))
    values = cached.loglikelihood(asked(PAIRS))
    assert values == VLMReasonLM.over(members).loglikelihood(asked(PAIRS))
    kept = [value for value in cached.dbdict.values() if isinstance(value, tuple)]
    assert sorted(kept) == sorted(set(values))


def test_damaged_weights_are_an_error(folder) -> None:
    lm = VLMReasonLM(folder, dtype="float32")
    with torch.no_grad():
        lm.members.engine.model.lm_head.weight[7] = math.nan  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="log-probability nan"):
        lm.loglikelihood(asked(PAIRS))


def test_a_prompt_that_is_too_long_is_an_error(folder) -> None:
    lm = VLMReasonLM(folder, dtype="float32")
    long = "x" * 512
    assert math.isfinite(lm.loglikelihood(asked([(long, "y")]))[0][0])
    with pytest.raises(UserError, match=r"t/1: 513 tokens, and the model's context is 512"):
        lm.loglikelihood(asked([PAIRS[0], (long, "yz")]))
    with pytest.raises(UserError, match=r"t/0: 513 tokens"):
        lm.generate_until(asked([(long, {"until": []})], "generate_until"))
    with pytest.raises(UserError, match=r"generation_kwargs.num_beams=4 is not supported"):
        lm.generate_until(asked([("x", {"until": [], "num_beams": 4})], "generate_until"))


def test_bad_settings(folder, adapters, tmp_path) -> None:
    for settings, message in (
        ({"mixture": "tokens"}, "did you mean 'token'"),
        ({"rationales": 2, "mixture": "token"}, "rationales mix whole answers"),
        ({"rationales": -1}, "rationales must be >= 1"),
        ({"rationales": 2, "ranker": "mixtur"}, "did you mean 'mixture'"),
        ({"device": "cuda:3"}, "CUDA_VISIBLE_DEVICES"),
        ({"adapters": str(tmp_path / "*nothing*")}, "no PEFT adapter folders"),
        ({"adapters": str(tmp_path / "nothing")}, "no folder"),
    ):
        with pytest.raises(UserError, match=message):
            VLMReasonLM(folder, **settings)
    root = Path(adapters[0]).parent
    assert adapter_folders(str(root)) == adapter_folders(f"{root}/m*") == tuple(adapters)
    assert adapter_folders(";".join(adapters[1:])) == tuple(adapters[1:])


def test_chat_templates(folder) -> None:
    lm = VLMReasonLM(folder, dtype="float32")
    with pytest.raises(UserError, match="no chat template"):
        lm.apply_chat_template([{"role": "user", "content": "hi"}])
    name = lm.tokenizer_name
    lm.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<bot>{% endif %}"
    )
    assert lm.apply_chat_template([{"role": "user", "content": "hi"}]) == "<user>hi\n<bot>"
    assert lm.chat_template(True) == lm.tokenizer.chat_template and lm.tokenizer_name != name


# ---- whole runs ----------------------------------------------------------------------------------------------


def test_a_run_leaves_every_member_in_the_store(members, task_files, tmp_path) -> None:
    lm = VLMReasonLM.over(members)
    found = run(lm, [task_files["choices"], task_files["texts"]], RunOptions(samples=tmp_path / "samples"))
    records = list(SampleStore.open(tmp_path / "samples").records())
    choices = [r for r in records if r.proposal == "lm_eval/choice"]
    assert len(choices) == 4 * len(ROWS)
    by_item: dict[str, dict[int | None, list[float]]] = {}
    for record in choices:
        by_item.setdefault(record.problem_id, {})[record.member] = record.extra["choice_logps"]
        best = int(np.argmax(record.extra["choice_logps"]))
        assert record.extra["choice_gold"] == 0 and record.correct == (best == 0)
        assert record.canonical == "ABC"[best]
    for own in by_item.values():
        expected = logsumexp([own[m] for m in range(3)], axis=0) - math.log(3)
        np.testing.assert_allclose(own[None], expected, atol=1e-9)
    accuracy = np.mean([r.correct for r in choices if r.member is None])
    assert accuracy == pytest.approx(found["results"]["tiny_choices"]["acc,none"])
    texts = [r for r in records if r.proposal.startswith("lm_eval/text")]
    assert len(texts) == 4 * len(ROWS) and all(r.correct is not None and r.answer_ids for r in texts)
    assert {r.temperature for r in texts} == {0.0}
    assert not any("\n" in r.answer_text or "z" in r.answer_text for r in texts)  # up to the stop string
    assert run(lm, [task_files["choices"]], RunOptions(samples=tmp_path / "samples"))  # nothing twice
    assert len(list(SampleStore.open(tmp_path / "samples").records())) == len(records)


def test_every_rationale_is_in_the_store(folder, task_files, tmp_path) -> None:
    lm = VLMReasonLM(
        folder, dtype="float32", rationales=3, max_rationale_tokens=30, rationale_end=".", cue="answer:",
        rationale_opening=" so",
    )  # fmt: skip
    run(lm, [task_files["texts"]], RunOptions(samples=tmp_path / "s", limit=3))
    records = list(SampleStore.open(tmp_path / "s").records())
    drawn = [r for r in records if r.proposal == "lm_eval/rationale"]
    assert len(drawn) == 9 and all(r.trace_ids for r in drawn)
    assert {r.finish for r in drawn} <= {"stop", "length", "eos"}
    assert all((r.m == 1) == r.complete for r in drawn)
    assert len([r for r in records if r.proposal == "lm_eval/rationale/mixture"]) == 3


def test_our_problems_as_a_task(folder) -> None:
    task = task_of(TaskSpec("reasoning_gym", "chain_sum", size=4, seed=7), max_tokens=5)
    judged = [task.process_results(doc, [f" {doc['answer']}"]) for doc in task.test_docs()]
    assert judged == [{"acc": 1.0}] * 4
    assert task.process_results(task.test_docs()[0], ["no"]) == {"acc": 0.0}
    found = run(VLMReasonLM(folder, dtype="float32"), ["reasoning_gym/chain_sum"], RunOptions(problems=3))
    assert found["n-samples"]["reasoning_gym/chain_sum"]["original"] == 3
    with pytest.raises(UserError, match="must hold"):
        task_of(TaskSpec("reasoning_gym", "chain_sum", size=4), prompt="?")


def test_every_repeat_is_judged_by_the_task(folder, task_files, tmp_path) -> None:
    options = {"do_sample": True, "temperature": 1.0}
    task = json.loads(Path(task_files["texts"]).read_text())
    path = tmp_path / "repeated.yaml"
    metric = {
        **task["metric_list"][0],
        "ignore_case": True,
        "regexes_to_ignore": [".*"],
    }  # everything is right
    generation = {**task["generation_kwargs"], **options}
    path.write_text(
        json.dumps({**task, "repeats": 4, "metric_list": [metric], "generation_kwargs": generation})
    )
    run(VLMReasonLM(folder, dtype="float32"), [str(path)], RunOptions(samples=tmp_path / "s", limit=2))
    records = list(SampleStore.open(tmp_path / "s").records())
    assert sorted((r.problem_id.split("/")[1], r.k) for r in records) == [
        (d, k) for d in "01" for k in range(4)
    ]
    assert len({r.answer_ids for r in records}) == 8 and len({r.seed for r in records}) == 8
    assert {r.temperature for r in records} == {1.0}
    assert all(r.score == 1.0 and r.correct == (r.canonical is not None) for r in records)


def test_the_page_names_every_key() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "lm_eval.md").read_text()
    table = page[page.index("| key | default |") :].split("\n\n")[0]
    named = {key for row in table.splitlines()[2:] for key in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == {field.name for field in dataclasses.fields(LMEvalConfig)}


def test_the_command(folder, adapters, task_files, tmp_path, capfd) -> None:
    out = tmp_path / "out"
    arguments = [
        "lm-eval",
        task_files["choices"],
        f"model={folder}",
        "dtype=float32",
        "limit=3",
        "-o",
        str(out),
    ]
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed["results"]["tiny_choices"]["sample_len"] == 3
    assert json.loads((out / "result.json").read_text())["settings"]["limit"] == 3
    assert len(list(SampleStore.open(out / "samples").records())) == 3
    assert main([*arguments[:-2], f"adapters={Path(adapters[0]).parent}", "-o", str(tmp_path / "bayes")]) == 0
    assert "tiny_choices" in capfd.readouterr().out
    task = json.loads(Path(task_files["choices"]).read_text())
    lost = tmp_path / "lost.yaml"
    lost.write_text(
        json.dumps({**task, "dataset_kwargs": {"data_files": {"test": str(tmp_path / "no.jsonl")}}})
    )
    for wrong, message in (
        (
            ["lm-eval", str(lost), f"model={folder}", "-o", str(out)],
            "lm-eval cannot load the tasks (FileNotFound",
        ),
        (["lm-eval", "model=x", "-o", str(out)], "no task: name one"),
        (["lm-eval", "no.yaml", "model=x", "-o", str(lost)], "is a file; give a folder"),
        (["lm-eval", "no.yaml", "-o", str(out), f"model={folder}"], "task file 'no.yaml' does not exist"),
        (
            ["lm-eval", task_files["choices"], f"model={folder}", "rationale=3", "-o", str(out)],
            "did you mean",
        ),
    ):
        assert main(wrong) == 2
        said = capfd.readouterr().err.splitlines()[-1]
        assert said.startswith("vlm-reason: ") and message in said
