"""Every file in configs/recipes/ that trains on traces: its keys are known, its first line is its command, and it
trains at toy size. test_bayes_commands.py has the others."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from vlm_reason.cli.wiring import load_section, sampling_config
from vlm_reason.config import RunConfig, from_dict, load_config
from vlm_reason.engines.make import engine_config
from vlm_reason.models.adapters import AdapterConfig
from vlm_reason.tasks.resolve import resolve_template
from vlm_reason.tasks.sources import TaskSpec
from vlm_reason.tasks.verifiers import VERIFIERS
from vlm_reason.traces.presets import build
from vlm_reason.traces.run import adapter_config, run_training, trace_config

REPO = Path(__file__).resolve().parents[2]
RECIPES = [
    path
    for path in sorted((REPO / "configs" / "recipes").glob("*.yaml"))
    if load_config(path).get("kind", "trace") == "trace"
]
pytestmark = pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)

ROWS = {
    "mathematics": [
        {"id": f"m{i}", "question": f"What is {i} + {i}?", "answer": str(2 * i), "rationale": f"{i} + {i} = {2 * i}."}
        for i in range(4)
    ],
    "choices": [
        {"id": f"c{i}", "question": f"Which is {i}?", "choices": [str(i), str(i + 1)], "label": i % 2} for i in range(4)
    ],
}  # fmt: skip


def test_the_first_line_is_the_command(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    name = re.escape(path.relative_to(REPO).as_posix())
    if path.stem == "quickstart":
        assert (
            first.startswith("# bash scripts/quickstart.sh ") and (REPO / "scripts/quickstart.sh").is_file()
        )
    command = re.search(rf"vlm-reason train {name}((?: [\w.]+=\S+)*)", first)
    assert first.startswith("# ") and command, f"no command of {path.name} in {first!r}"
    from_dict(RunConfig, load_config(path, command[1].split()))  # the overrides it shows are keys


def test_every_key_is_known_to_the_module_that_owns_it(path: Path, tmp_path: Path) -> None:
    config = from_dict(RunConfig, load_config(path, [f"output_dir={tmp_path}"]))
    recipe = build(config.preset, config.options)
    args = trace_config(dataclasses.replace(config, trainer=_cpu(config)))
    assert args.total_steps(recipe) >= 1 and args.max_trace_tokens == config.trainer["max_trace_tokens"]
    template = resolve_template(config.template)
    assert max(config.shots, args.proposal_shots) <= len(template.shots)
    assert config.verifier in VERIFIERS
    assert isinstance(adapter_config(config), AdapterConfig)
    engine_config(config.engine)
    for section in ("task", "eval_task"):
        if getattr(config, section):
            from_dict(TaskSpec, getattr(config, section), section)
    for section in ("sampling", "evaluation"):
        known = {
            f.name for f in dataclasses.fields(sampling_config(RunConfig(), section, {"temperature": 1.0}))
        }
        own = set(getattr(config, section))
        if path.stem.startswith("quickstart"):  # scripts/quickstart.py reads that section itself
            own -= {"base_shots", "bound_traces", "bound_problems", "rank_problems", "rank_traces"}
        assert own <= known


def test_it_trains_at_toy_size(path: Path, tmp_path: Path, toy_model: Path) -> None:
    """Sizes, model and data are replaced; the method, its options, the template and the verifier are the file's."""
    config = from_dict(RunConfig, load_config(path))
    task = config.task
    if task["kind"] != "reasoning_gym":
        rows = ROWS["choices" if config.template == "choices" else "mathematics"]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {"kind": "jsonl", "name": str(tmp_path / "rows.jsonl")}
    sizes = {
        "rounds": 1,
        "prompts_per_window": 2,
        "prompts_per_step": 1,
        "window_epochs": 1,
        "max_trace_tokens": 6,
        "max_answer_tokens": 2,
    }
    config = dataclasses.replace(
        config,
        model=str(toy_model),
        dtype="float32",
        task={**task, "size": 2} if task["kind"] == "reasoning_gym" else task,
        adapter={"r": 1, "alpha": 1},
        trainer={**_cpu(config), **sizes},
        output_dir=str(tmp_path / "run"),
    )
    summary = run_training(config, show_progress=False)
    recipe = build(config.preset, config.options)
    assert summary["steps"] == 2 * sum(phase.windows for phase in recipe.phases)
    assert (tmp_path / "run/adapters/reasoner/adapter_model.safetensors").is_file()
    resolved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (resolved["preset"], resolved["options"]) == (config.preset, dict(config.options))
    assert load_section(config, "task")[0].answer


def _cpu(config: RunConfig) -> dict[str, object]:
    return {**config.trainer, "use_cpu": True}


@pytest.fixture(scope="module")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one layer of width 8 and a tokenizer of single characters that has a chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ("<pad>", "<eos>", "<unk>", *(chr(c) for c in (10, *range(32, 127))))
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    chat = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:\n"
    folder = tmp_path_factory.mktemp("toy")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=chat,
    ).save_pretrained(folder)
    shape = LlamaConfig(
        vocab_size=len(characters), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(folder)
    return folder
