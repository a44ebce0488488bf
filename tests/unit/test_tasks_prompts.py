"""Templates and prompt builders: the splice of ids, the boundary check, reading a sampled answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vlm_reason.errors import UserError
from vlm_reason.tasks.prompts import PromptBuilder
from vlm_reason.tasks.templates import (
    ARITHMETIC,
    CHAT,
    CHOICES,
    STEPS,
    TEMPLATES,
    Shot,
    Template,
    template_named,
)
from vlm_reason.types import Problem, StopRule

SUM = Problem("s", "State the final answer to the following arithmetic problem: 58 + 26 =", "84")
WORDS = Problem("w", "How many {hint}s are in {question}?", "2", metadata={"context": "C."})
CHOICE = Problem("c", "Which?", "B", metadata={"choices": ("x", "y", "x")})
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
QWEN2 += r"|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_bpe(pattern: str, merges: list[tuple[str, str]], chat: bool = False) -> Any:
    """Byte-level BPE with the given pre-tokeniser and exactly these merges; 'Ġ' is a space, 'Ċ' a newline."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *dict.fromkeys(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = CHATML if chat else None
    return fast


ALL_MERGES = [(":", "Ċ"), ("Ġ", "A"), ("Ċ", "Ċ"), ("Ġ", "t"), ("Ġ", "-"), (".", "Ċ"), (">", "B"), (".", "<")]


@pytest.fixture
def tokenizer() -> Any:
    return byte_bpe(GPT2, ALL_MERGES, chat=True)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("pattern", [GPT2, QWEN2])
def test_joined_ids_are_the_ids_of_the_joined_text(name: str, pattern: str) -> None:
    tok = byte_bpe(pattern, ALL_MERGES, chat=True)
    problem = {"arithmetic": SUM, "choices": CHOICE}.get(name, WORDS)
    for shots in range(len(TEMPLATES[name].shots) + 1):
        b = PromptBuilder(tok, TEMPLATES[name], shots)
        for prompt in (b.prior_ids(problem), b.hinted_ids(problem)):
            ids = (*prompt, *b.trace_ids("First this, then that."), *b.cue_ids, *b.answer_ids(problem.answer))
            assert tuple(tok.encode(b.decode(ids), add_special_tokens=False)) == ids
        direct = b.direct_ids(problem)
        assert direct == b.prior_ids(problem) + b.empty_trace_ids + b.cue_ids
        assert tuple(tok.encode(b.decode(direct), add_special_tokens=False)) == direct


def test_empty_trace_is_literal_unless_it_would_merge_into_the_prompt() -> None:
    assert PromptBuilder(byte_bpe(GPT2, ALL_MERGES), STEPS).empty_trace == "\n"
    assert PromptBuilder(byte_bpe(QWEN2, ALL_MERGES), STEPS).empty_trace == " None.\n"
    with pytest.raises(
        UserError, match=r"prompt\|empty trace merges .* token ':\\n'; give the template another"
    ):
        PromptBuilder(byte_bpe(QWEN2, ALL_MERGES), replace(STEPS, empty_traces=("",)))


def test_arithmetic_text_exactly(tokenizer: Any) -> None:
    b = PromptBuilder(tokenizer, ARITHMETIC, shots=1)
    shot = "Steps: 47 + 35 = 82.\nAnswer: 82\n\n"
    assert b.decode(b.prior_ids(SUM)) == f"Problem: 47 + 35\n{shot}Problem: 58 + 26\nSteps:"
    assert b.decode(b.hinted_ids(SUM)) == f"Problem: 47 + 35 = 82\n{shot}Problem: 58 + 26 = 84\nSteps:"
    assert b.decode(b.hinted_ids(SUM, hint="85")).endswith("Problem: 58 + 26 = 85\nSteps:")
    assert (
        b.decode(PromptBuilder(tokenizer, ARITHMETIC).direct_ids(SUM)) == "Problem: 58 + 26\nSteps:\nAnswer:"
    )


def test_question_formats(tokenizer: Any) -> None:
    """Slots are filled in one pass: braces inside a question stay."""
    steps = PromptBuilder(tokenizer, STEPS)
    assert steps.decode(steps.hinted_ids(WORDS)) == (
        "Problem: C.\nHow many {hint}s are in {question}?\nKnown answer: 2\nSteps:"
    )
    choices = PromptBuilder(tokenizer, CHOICES)
    assert choices.decode(choices.prior_ids(CHOICE)) == "Question: Which?\nA) x\nB) y\nC) x\nReasoning:"
    labelled = Problem("l", "T", "pos", metadata={"labels": ("neg", "pos")})
    assert steps.decode(steps.prior_ids(labelled)) == "Problem: T\nLabels: neg, pos\nSteps:"
    calculate = Problem("b", "Calculate 2 - -1.", "3")
    arithmetic = PromptBuilder(tokenizer, ARITHMETIC)
    assert arithmetic.decode(arithmetic.prior_ids(calculate)) == "Problem: 2 - -1\nSteps:"


def test_chat_goes_through_the_chat_template(tokenizer: Any) -> None:
    b = PromptBuilder(tokenizer, replace(CHAT, system="Be brief."), shots=1)
    text = b.decode(b.hinted_ids(SUM))
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nA box holds 6 pens.")
    assert "19 left.\n<answer> 19</answer><|im_end|>\n" in text
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert text.count("known to be: ") == 2
    assert "known to be" not in b.decode(b.prior_ids(SUM))
    assert b.prior_ids(SUM)[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_plain_prompts_get_the_start_token_and_only_that() -> None:
    from tokenizers import processors

    tok = byte_bpe(GPT2, [])
    plain = PromptBuilder(tok, STEPS).prior_ids(WORDS)
    bos, eos = (tok.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|im_end|>"))
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>", special_tokens=[("<|endoftext|>", bos), ("<|im_end|>", eos)]
    )
    b = PromptBuilder(tok, STEPS)
    assert b.prior_ids(WORDS) == (bos, *plain)
    assert bos not in b.answer_ids("7") + b.cue_ids + b.trace_ids("x")


def test_stop_rules(tokenizer: Any) -> None:
    ends = tuple(sorted(tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])))
    b = PromptBuilder(tokenizer, STEPS)
    assert b.trace_stop == StopRule(("\n",), ends, eos_is_stop=False)
    assert b.answer_stop == StopRule(("\n",), ends, eos_is_stop=True)
    assert PromptBuilder(tokenizer, CHAT).answer_stop.strings == ("</answer>",)


def test_parse_answer(tokenizer: Any) -> None:
    b, chat = PromptBuilder(tokenizer, STEPS), PromptBuilder(tokenizer, CHAT)
    assert b.parse_answer(b.decode(b.answer_ids("84"))) == "84"
    assert b.parse_answer(" 84<|im_end|>") == "84"
    assert b.parse_answer(" 84\n\nProblem: 3") == "84"
    assert b.parse_answer(" \n") is None
    assert b.parse_answer("<|endoftext|>") is None
    assert chat.parse_answer(" 84</answer>") == "84"


def test_a_rationale_ends_only_once(tokenizer: Any) -> None:
    b = PromptBuilder(tokenizer, STEPS)
    assert b.decode(b.trace_ids("One.\n\n Two.\n")) == " One. Two.\n"
    with pytest.raises(UserError, match="holds trace_end '<answer'"):
        PromptBuilder(tokenizer, CHAT).trace_ids("a <answer b")
    with pytest.raises(UserError, match=r"holds answer_end '\\n'"):
        b.answer_ids("1 2\n3 4")


@pytest.mark.parametrize(
    ("change", "merges", "message"),
    [
        (
            {"prior": "Q: {question}\nSteps: "},
            [("Ġ", "A")],
            r"prompt\|trace merges.*token ' A'; let the prompt end without",
        ),
        (
            {"cue": "Answer: ", "answer_prefix": ""},
            [("Ġ", "-")],
            r"cue\|answer .*'Answer: ' \| '-24\\n'.*token ' -'",
        ),
        (
            {"trace_end": " END", "cue": "ING:"},
            [("D", "I")],
            r"trace\|cue merges.*token 'DI'; let the cue start",
        ),
        (
            {"cue": "", "trace_end": " A:", "answer_prefix": ")"},
            [(":", ")")],
            r"trace\|answer merges.*token ':\)'",
        ),
    ],
)
def test_merging_boundaries_are_named(
    change: dict[str, str], merges: list[tuple[str, str]], message: str
) -> None:
    template = replace(STEPS, **change)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        PromptBuilder(byte_bpe(GPT2, merges), template)
    PromptBuilder(byte_bpe(GPT2, []), template)  # the same template is fine where nothing merges


def test_template_names() -> None:
    assert template_named("steps") is STEPS
    with pytest.raises(UserError, match="unknown template 'stpes'; did you mean 'steps'"):
        template_named("stpes")


def test_refusals(tokenizer: Any) -> None:
    with pytest.raises(
        UserError, match="needs a chat template, and the tokenizer .* has none; use an instruct model"
    ):
        PromptBuilder(byte_bpe(GPT2, []), CHAT)
    with pytest.raises(UserError, match="shots must be 0 to 4 for template 'arithmetic', got 5"):
        PromptBuilder(tokenizer, ARITHMETIC, shots=5)
    with pytest.raises(UserError, match="needs a bare expression"):
        PromptBuilder(tokenizer, ARITHMETIC).prior_ids(Problem("x", "How many?", "3"))
    with pytest.raises(UserError, match="needs problems with choices"):
        PromptBuilder(tokenizer, CHOICES).prior_ids(SUM)
    with pytest.raises(UserError, match="has images"):
        PromptBuilder(tokenizer, STEPS).prior_ids(Problem("x", "Q", "3", images=("i",)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prior": "no slot"}, r"prior must hold \{question\} once"),
        ({"posterior": "{question}"}, r"posterior must hold \{hint\} once"),
        ({"prior": "{question} {hint}"}, "reveal the answer"),
        ({"trace_end": ""}, "trace_end is empty"),
        ({"shots": (Shot("q", "a\nb", "c"),)}, "its own end marker"),
        ({"empty_traces": ()}, "empty_traces needs"),
    ],
)
def test_bad_templates(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(STEPS, **change)


def test_fingerprint_follows_what_decides_ids(tokenizer: Any) -> None:
    base = PromptBuilder(tokenizer, STEPS, 1).fingerprint()
    assert base == PromptBuilder(byte_bpe(GPT2, ALL_MERGES, chat=True), STEPS, 1).fingerprint()
    others: list[Template] = [
        replace(STEPS, cue="So:"),
        replace(STEPS, prior="P: {question}\nSteps:"),
        CHOICES,
    ]
    different = [PromptBuilder(tokenizer, t, 1).fingerprint() for t in others]
    different += [PromptBuilder(tokenizer, STEPS, 2).fingerprint()]
    different += [PromptBuilder(byte_bpe(GPT2, [("Ġ", "A")]), STEPS, 1).fingerprint()]
    assert len({base, *different}) == 6


def test_character_tokenizer(tiny_tokenizer: Any) -> None:
    b = PromptBuilder(tiny_tokenizer, ARITHMETIC)
    assert b.decode(b.hinted_ids(SUM) + b.trace_ids("58 + 26 = 84.") + b.cue_ids + b.answer_ids("84")) == (
        "problem: 58 + 26 = 84\nsteps: 58 + 26 = 84.\nanswer: 84\n"
    )


@pytest.mark.integration
def test_builtin_tokenizer_splits_at_every_boundary(builtin_model_dir: Any) -> None:
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(builtin_model_dir)
    for name, template in TEMPLATES.items():
        problem = {"arithmetic": SUM, "choices": CHOICE}.get(name, WORDS)
        b = PromptBuilder(tok, template, shots=2)
        ids = (*b.prior_ids(problem), *b.trace_ids("So it is."), *b.cue_ids, *b.answer_ids(problem.answer))
        assert tuple(tok.encode(b.decode(ids), add_special_tokens=False)) == ids
        assert len(b.empty_trace_ids) in (1, 2)
    b = PromptBuilder(tok, ARITHMETIC)
    assert b.empty_trace == "\n"
    assert tok.convert_ids_to_tokens(b.trace_ids("58 + 26 = 84.")[-4:]) == ["8", "4", ".", "Ċ"]
    assert tok.convert_ids_to_tokens(b.cue_ids) == ["Answer", ":"]
    assert tok.convert_ids_to_tokens(b.answer_ids("84")) == ["Ġ", "8", "4", "Ċ"]
    assert tok.convert_ids_to_tokens(b.trace_stop.eos) == ["<|endoftext|>", "<|im_end|>"]
    with pytest.raises(UserError, match=r"prompt\|trace merges .* let the prompt end without a space"):
        PromptBuilder(tok, replace(STEPS, prior="Problem: {question}\nSteps: "))
