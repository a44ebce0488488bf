"""TraceTrainer on a tiny model and character tokens: what a step computes, and that nothing else decides it."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch

from vlm_reason.errors import UserError
from vlm_reason.models.adapters import AdapterConfig, adapter_parameters
from vlm_reason.tasks.templates import Shot, Template
from vlm_reason.traces import PRESETS, TraceConfig, TraceTrainer, build
from vlm_reason.traces.recipe import HINTED
from vlm_reason.types import Problem

SMALL = AdapterConfig(r=2)
TEMPLATE = Template(
    name="tiny",
    prior="{question}=",
    posterior="{question}={hint}=",
    cue="a:",
    trace_end="\n",
    answer_end="\n",
    answer_prefix=" ",
    shots=(Shot("1+1", " 1+1", "2"),),
)
PROBLEMS = [
    Problem(f"p{i}", f"{i}+{i + 1}", str(2 * i + 1), metadata={"rationale": f"{i} and {i + 1}"})
    for i in range(8)
]


def make(tiny_llama, tiny_tokenizer, folder, recipe, **args) -> TraceTrainer:
    settings = {
        "prompts_per_window": 4,
        "prompts_per_step": 2,
        "max_trace_tokens": 16,
        "max_answer_tokens": 4,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "use_cpu": True,
        "seed": 7,
    }
    return TraceTrainer(
        tiny_llama,
        TraceConfig(output_dir=str(folder), **{**settings, **args}),
        recipe,
        PROBLEMS,
        template=TEMPLATE,
        verifier="number",
        tokenizer=tiny_tokenizer,
        adapter=AdapterConfig(r=2, alpha=4),
        show_progress=False,
    )


def rows_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def snapshot(trainer, name: str) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in adapter_parameters(trainer.model, name).items()}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_runs_and_writes_a_row_a_step(tiny_llama, tiny_tokenizer, tmp_path, name):
    """The evidence is made dense (y* likelihood) where a random model would never be right."""
    options = {"vr": {"evidence": "logp", "ratio": "none"}, "vr_released": {"evidence": "mean_logp"}}.get(
        name, {}
    )
    trainer = make(tiny_llama, tiny_tokenizer, tmp_path, build(name, options), rounds=1, traces_per_prompt=2)
    steps = len(trainer.recipe.phases) * 2
    trainer.train()
    rows = rows_of(tmp_path)
    assert [r["step"] for r in rows] == list(range(1, steps + 1))
    assert {r["phase"] for r in rows} == {p.name for p in trainer.recipe.phases}
    needed = {"loss", "bound", "ess", "null_rate", "weight_length_corr", "answer_copied", "unhinted_accuracy",
              "seconds/generate", "seconds/score", "seconds/train", "tokens/generated", "useful_tokens"}  # fmt: skip
    assert all(needed <= r.keys() for r in rows)
    windows = sorted((tmp_path / "completions").glob("window_*.jsonl"))
    assert len(windows) == len(trainer.recipe.phases)


def test_training_one_adapter_leaves_the_other_and_its_moments_alone(tiny_llama, tiny_tokenizer, tmp_path):
    recipe = build("vr", {"evidence": "logp", "ratio": "none"})
    trainer = make(tiny_llama, tiny_tokenizer, tmp_path, recipe, rounds=2, traces_per_prompt=6)
    seen: list[tuple[str, dict, dict, dict]] = []
    original = trainer.training_step

    def moments(name: str) -> dict[str, torch.Tensor]:
        state = trainer.optimizer.optimizer.state
        own = adapter_parameters(trainer.model, name)
        return {f"{k}.{s}": v.clone() for k, p in own.items() for s, v in state.get(p, {}).items()}

    def spy(model, inputs, n=None):
        phase = recipe.phases[0 if len(seen) % 4 < 2 else 1].name
        other = "reasoner" if phase == "posterior" else "posterior"
        seen.append((other, snapshot(trainer, other), moments(other), snapshot(trainer, phase)))
        return original(model, inputs, n)

    trainer.training_step = spy

    checks = []

    from transformers import TrainerCallback

    class After(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            other, weights, state_before, trained_before = seen[-1]
            after = snapshot(trainer, other)
            assert all(torch.equal(after[k], v) for k, v in weights.items())
            now = moments(other)
            assert now.keys() == state_before.keys()
            assert all(torch.equal(now[k], v) for k, v in state_before.items())
            trained = snapshot(trainer, "posterior" if other == "reasoner" else "reasoner")
            checks.append(any(not torch.equal(trained[k], v) for k, v in trained_before.items()))

    trainer.add_callback(After())
    trainer.train()
    rows = rows_of(tmp_path)
    assert checks == [row["rows"] > 0 for row in rows]  # a step without signal changes nothing
    assert {row["phase"] for row in rows if row["rows"]} == {"posterior", "reasoner"}


def test_gradient_checkpointing_changes_nothing_but_memory(tiny_llama, tiny_tokenizer, tmp_path):
    """The backward pass recomputes under the adapter and the attention of the forward pass."""
    recipe = build("vr", {"evidence": "logp", "ratio": "none", "wake": "same"})
    results = []
    for checkpointing in (False, True):
        trainer = make(
            copy.deepcopy(tiny_llama), tiny_tokenizer, tmp_path / str(checkpointing), recipe, traces_per_prompt=6,
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        trainer.train()
        assert any(row["rows"] for row in rows_of(tmp_path / str(checkpointing)))
        results.append({**snapshot(trainer, "reasoner"), **snapshot(trainer, "posterior")})
    plain, recomputed = results
    assert all(torch.allclose(plain[k], v, atol=1e-6) for k, v in recomputed.items())


@pytest.mark.parametrize("name", ["vr", "grpo", "jepo"])
def test_micro_batches_never_change_the_loss(tiny_llama, tiny_tokenizer, tmp_path, name):
    """One forward of everything equals one forward a row: the gradient of each step agrees to rounding."""
    options = {"vr": {"evidence": "logp", "ratio": "none"}, "grpo": {"kl": 0.1}, "jepo": {}}[name]
    results = []
    for budget in (100_000, 1):
        folder = tmp_path / str(budget)
        trainer = make(
            copy.deepcopy(tiny_llama), tiny_tokenizer, folder, build(name, options), traces_per_prompt=3,
            tokens_per_microbatch=budget, window_epochs=2,
        )  # fmt: skip
        trainer.train()
        results.append((rows_of(folder), snapshot(trainer, "reasoner")))
    (rows, weights), (rows_split, weights_split) = results
    assert [r["loss"] for r in rows] == pytest.approx([r["loss"] for r in rows_split], rel=1e-4, abs=1e-6)
    assert [r["grad_norm"] for r in rows] == pytest.approx(
        [r["grad_norm"] for r in rows_split], rel=1e-3, abs=1e-6
    )
    for key, value in weights.items():
        assert torch.allclose(value, weights_split[key], atol=2e-5)


def test_a_windows_loss_is_minus_the_coefficients_times_the_log_probabilities(
    tiny_llama, tiny_tokenizer, tmp_path
):
    """Recomputed from the completions table by an ordinary forward pass of the plain model (B = 0 at step 1)."""
    plain = copy.deepcopy(tiny_llama)
    trainer = make(
        tiny_llama, tiny_tokenizer, tmp_path, build("jepo"), traces_per_prompt=3, prompts_per_window=2
    )
    trainer.train()
    table = [
        json.loads(s) for s in (tmp_path / "completions" / "window_00000.jsonl").read_text().splitlines()
    ]
    prompts = trainer.training_prompts
    by_id = {p.id: p for p in PROBLEMS}
    total = 0.0
    for row in table:
        problem = by_id[row["problem"]]
        z = tuple(row["ids"])
        context, y = prompts.prior_ids(problem), prompts.answer_ids(problem.answer)
        ids = torch.tensor([[*context, *z, *prompts.cue_ids, *y]])
        with torch.no_grad():
            logp = plain(ids).logits.float().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        start = len(context) - 1
        end = start + len(z) + len(prompts.cue_ids)
        total -= row["c_z"] * float(logp[start : start + len(z)].sum())
        total -= row["c_y"] * float(logp[end : end + len(y)].sum())
    assert rows_of(tmp_path)[0]["loss"] == pytest.approx(total / 2, rel=1e-4)


def test_bad_data_and_recipes_are_refused_before_anything_starts(tiny_llama, tiny_tokenizer, tmp_path):
    def attempt(problems=PROBLEMS, recipe=None, adapter=SMALL, **args):
        values = {"prompts_per_window": 2, "prompts_per_step": 1, "use_cpu": True, **args}
        return TraceTrainer(
            tiny_llama, TraceConfig(output_dir=str(tmp_path), **values), recipe or build("rloo"), problems,
            template=TEMPLATE, tokenizer=tiny_tokenizer, adapter=adapter, show_progress=False,
        )  # fmt: skip

    with pytest.raises(UserError, match="train_dataset is empty"):
        attempt([])
    with pytest.raises(UserError, match="'p0' occurs twice"):
        attempt([PROBLEMS[0], PROBLEMS[0]])
    with pytest.raises(UserError, match="prompts_per_window is 9, but there are only 8 problems"):
        attempt(prompts_per_window=9)
    with pytest.raises(UserError, match="needs 'posterior' beside the reasoner"):
        attempt(recipe=build("rws"), adapter=None)
    with pytest.raises(UserError, match="leave none for the proposal component"):
        attempt(recipe=build("vr", {"proposal": "mixture"}), traces_per_prompt=1)
    bare = [Problem("bare", "1+2", "3", metadata={"rationale": None}), *PROBLEMS]
    with pytest.raises(UserError, match="null_group 'dataset' needs a rationale .* 'bare' has none"):
        attempt(bare, build("rft", {"null_group": "dataset"}))
    with pytest.raises(UserError, match="unknown preset 'vrr'; did you mean 'vr'"):
        build("vrr")
    with pytest.raises(UserError, match="no option 'ratios'; did you mean 'ratio'"):
        build("vr", {"ratios": "none"})
    with pytest.raises(UserError, match="option 'wake' of preset 'vr' is 'prio'; did you mean 'prior'"):
        build("vr", {"wake": "prio"})
    with pytest.raises(UserError, match="report_to names 'abacus', which is not installed"):
        attempt(report_to="abacus")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["chi2", "grpo", "jepo", "latro", "nover", "rloo", "rlpr", "rws", "verifree"]
)
def test_methods_that_compare_traces_refuse_one_trace_a_problem(tiny_llama, tiny_tokenizer, tmp_path, name):
    """With K = 1 their baseline or normaliser has nothing to compare with: no gradient, or only noise."""
    with pytest.raises(UserError, match=rf"'{name}' .*traces_per_prompt \(K\) must be >= 2, got 1"):
        make(tiny_llama, tiny_tokenizer, tmp_path, build(name), traces_per_prompt=1)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("temperature", 0), ("temperature", float("nan")), ("top_p", 0), ("top_p", 1.5), ("answer_temperature", -1),
        ("shots", -1), ("proposal_shots", -1), ("proposal_shot_rounds", -1), ("loss_scale", float("inf")),
        ("learning_rate", -1), ("weight_decay", -1), ("max_grad_norm", -1), ("seed", -1), ("seed", 2**32),
        ("max_steps", 5), ("num_train_epochs", 1), ("eval_strategy", "steps"), ("save_strategy", "epoch"),
        ("save_only_model", True), ("auto_find_batch_size", True),
    ],
)  # fmt: skip
def test_settings_that_would_fail_late_or_be_ignored_are_refused(tmp_path, setting, value):
    with pytest.raises(UserError, match=f"trainer.*{setting}"):
        TraceConfig(output_dir=str(tmp_path), use_cpu=True, **{setting: value})


@pytest.mark.parametrize(
    ("preset", "options", "message"),
    [
        ("grpo", {"kl": "much"}, "option 'kl' of preset 'grpo': expected a number, got 'much'"),
        ("grpo", {"kl": -0.1}, "kl must be >= 0, got -0.1"),
        ("grpo", {"clip": 0}, "clip must be > 0"),
        ("sft", {"trace": "no"}, "option 'trace' of preset 'sft': expected true or false, got 'no'"),
        ("vr", {"samples": 2.5}, "option 'samples' of preset 'vr': expected a whole number"),
        ("vr", {"samples": None}, "option 'samples' of preset 'vr': expected a whole number"),
        (
            "vr",
            {"min_token": 0.5},
            "'min_token' of preset 'vr' is a log-probability in nats: it must be <= 0",
        ),
        (
            "vr",
            {"min_joint": 1},
            "'min_joint' of preset 'vr' is a log-probability in nats: it must be <= 0",
        ),
        ("vr", {"min_weight": -1}, "'min_weight' of preset 'vr' must be >= 0"),
    ],
)
def test_options_of_a_preset_are_checked_when_it_is_built(preset, options, message):
    with pytest.raises(UserError, match=message):
        build(preset, options)


def test_options_are_read_as_yaml_writes_them():
    """YAML 1.1 reads 1e-3 as text."""
    assert build("grpo", {"kl": "1e-3", "clip": None}).phases[0].kl == 1e-3
    assert build("vr", {"samples": 4.0}).phases[0].evidence.samples == 4


def test_a_retry_behind_the_hint_is_refused_where_it_would_repeat_or_falsify_the_draws():
    phase = build("rft", {"proposal": "prior", "null_group": "hint_retry"}).phases[0]
    with pytest.raises(UserError, match="saw it already"):
        replace(phase, proposal=HINTED)
    with pytest.raises(UserError, match="logq would be wrong"):
        replace(phase, needs=frozenset({"logq"}))


@pytest.mark.parametrize(
    ("preset", "args"),
    [
        ("rloo", {"max_trace_tokens": 500}),  # 4 of the prompt, 2 of the cue, 4 of the answer: 510
        ("rloo", {"max_trace_tokens": 490, "proposal_shots": 1, "proposal_shot_rounds": 1}),
        ("vr", {"max_trace_tokens": 504}),
    ],
)
def test_what_would_outgrow_the_context_in_mid_run_is_found_before_it(
    tiny_llama, tiny_tokenizer, tmp_path, preset, args
):
    """A trace that closes itself just below the context leaves no room for the answer behind it."""
    tiny_llama.config.max_position_embeddings = 509
    with pytest.raises(UserError, match="problem 'p0' may take 5.. tokens .* the model's context is 509"):
        make(copy.deepcopy(tiny_llama), tiny_tokenizer, tmp_path, build(preset), **args)
    make(tiny_llama, tiny_tokenizer, tmp_path, build(preset), **{**args, "max_trace_tokens": 480})


@pytest.mark.parametrize(
    ("preset", "bad", "message"),
    [
        ("sft", Problem("bare", "1+2", "3"), "'bare' has no trace to learn from"),
        ("jepo", Problem("grid", "1+2", "3\n4"), "the answer '3.+4' holds answer_end"),
        ("rloo", Problem("picture", "1+2", "3", images=("x.png",)), "'picture' has images"),
    ],
)
def test_a_problem_that_cannot_be_written_is_found_before_the_run(
    tiny_llama, tiny_tokenizer, tmp_path, preset, bad, message
):
    args = TraceConfig(
        output_dir=str(tmp_path / "run"), prompts_per_window=4, prompts_per_step=2, use_cpu=True
    )
    with pytest.raises(UserError, match=message):
        TraceTrainer(
            tiny_llama, args, build(preset), [*PROBLEMS, bad], template=TEMPLATE, tokenizer=tiny_tokenizer
        )
    assert not (tmp_path / "run").exists()
