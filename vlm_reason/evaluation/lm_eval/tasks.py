"""Our problems as an lm-eval task: reasoning-gym generators and JSONL files, judged by our verifiers.

    task = task_of(TaskSpec("reasoning_gym", "chain_sum", size=100, seed=7))
    simple_evaluate(model=lm, tasks=[task])

so that the same problems can be asked of any model that lm-eval can run. Nothing is fetched from a hub.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask

from ...errors import UserError
from ...tasks.sources import TaskSpec, load_problems
from ...tasks.templates import plain_question
from ...tasks.verifiers import make_verifier

PREFIX = "reasoning_gym/"


def task_of(
    spec: TaskSpec,
    verifier: str | None = None,
    prompt: str = "{question}\nAnswer:",
    until: Sequence[str] = ("\n",),
    max_tokens: int = 64,
    name: str | None = None,
) -> ConfigurableTask:
    """The problems of `spec`, asked by `prompt` (which holds {question}) and answered up to one of `until`.

    verifier: a name of tasks.verifiers; by default the generator's own for reasoning-gym, else `exact`. The metric is
    `acc`, the mean verdict. UserError as `load_problems`, and for a prompt without {question}.
    """
    if "{question}" not in prompt:
        raise UserError(f"prompt must hold {{question}}, got {prompt!r}")
    problems = {problem.id: problem for problem in load_problems(spec)}
    judge = make_verifier(verifier or ("reasoning_gym" if spec.kind == "reasoning_gym" else "exact"))
    rows = [
        {"id": p.id, "prompt": prompt.replace("{question}", plain_question(p)), "answer": p.answer}
        for p in problems.values()
    ]

    def data(**_: Any) -> dict[str, datasets.Dataset]:
        return {"test": datasets.Dataset.from_list(rows)}

    def verdict(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
        return {"acc": float(judge.verify(problems[doc["id"]], results[0]).correct)}

    return ConfigurableTask(
        config={
            "task": name or (PREFIX + spec.name if spec.kind == "reasoning_gym" else spec.name),
            "custom_dataset": data,
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{answer}}",
            "process_results": verdict,
            "generation_kwargs": {"until": list(until), "max_gen_toks": max_tokens},
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            "num_fewshot": 0,
        }
    )
