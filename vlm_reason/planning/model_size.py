"""How big a model is, from its config alone: parameters, FLOPs a token, bytes of key-value cache. No weights are read.

    forward(T tokens, mean context c, R head rows) = T (2 N + 2 N_adapter + 4 n_h d_h sum_l min(c, w_l)) + 2 R H V

N: parameters of the matrices that every token meets (of a mixture of experts, those it is routed to); n_h d_h: width of
the queries; w_l: the sliding window of layer l; R: rows that meet the LM head. A multiplication with an addition is two
FLOPs (Kaplan et al. 2020, arXiv 2001.08361, section 2.1, who leave the head out).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ..errors import UserError
from ..models.adapters import AdapterConfig
from ..models.load import load_model_config


@dataclass(frozen=True)
class Linear:
    """A matrix that LoRA can adapt: its name inside a layer, its input and output width, and how many there are."""

    name: str
    inputs: int
    outputs: int
    count: int


@dataclass(frozen=True)
class ModelSize:
    """total: every parameter, tied ones once. body: matrix parameters that one token meets in the decoder layers.
    windows: attention span of each layer, None where it is all of the context. qk_norm: whether queries and keys are
    normalised."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    total: int
    body: int
    linears: tuple[Linear, ...]
    windows: tuple[int | None, ...]
    context: int | None = None
    qk_norm: bool = False

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def head(self) -> int:
        """Parameters of the LM head, tied to the embedding or not."""
        return self.vocab * self.hidden

    def attention_flops(self, context: float) -> float:
        """FLOPs of one token's scores and values over `context` tokens, all layers."""
        seen = sum(context if window is None else min(context, window) for window in self.windows)
        return 4 * self.query_width * seen

    def forward_flops(self, tokens: float, context: float, head_rows: float = 0, adapter: int = 0) -> float:
        """The equation above. context: tokens that one attends to on average, half the length of a causal sequence."""
        per_token = 2 * self.body + 2 * adapter + self.attention_flops(context)
        return tokens * per_token + 2 * head_rows * self.head

    def kv_bytes(self, width: int) -> int:
        """Key-value cache of one token, `width` bytes a number."""
        return 2 * len(self.windows) * self.kv_width * width

    def adapter_parameters(self, config: AdapterConfig) -> int:
        """Parameters of one LoRA adapter: sum over adapted matrices of r (in + out). UserError if none is adapted."""
        adapted = self.adapted(config)
        return sum(config.r * (linear.inputs + linear.outputs) * linear.count for linear in adapted)

    def adapted(self, config: AdapterConfig) -> tuple[Linear, ...]:
        """The matrices that `config` names, by PEFT's rules: all but the head, or endings of names."""
        targets = config.target_modules
        if targets == "all-linear":
            return self.linears
        endings = (targets,) if isinstance(targets, str) else targets
        chosen = tuple(li for li in self.linears if any(_ends(li.name, ending) for ending in endings))
        if not chosen:
            names = ", ".join(sorted({linear.name.rsplit(".", 1)[-1] for linear in self.linears}))
            raise UserError(
                f"adapter.target_modules {targets!r} names no layer of {self.name}; there are: {names}"
            )
        return chosen


def model_size(name_or_path: str) -> ModelSize:
    """Of a hub id, a folder with a config.json, or a built-in. UserError where the config cannot be had."""
    config = load_model_config(name_or_path)
    _check_said(config, name_or_path)
    return size_of_config(config, name_or_path)


SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def _check_said(config: PreTrainedConfig, name: str) -> None:
    """UserError for a config.json without sizes: transformers would fill in those of some model of the family, and the
    plan would be of that one. Only of the part that belongs to the text: there a family's defaults are meant."""
    said, _ = type(config).get_config_dict(config._name_or_path, local_files_only=True)
    if config.get_text_config() is not config:
        return
    names = config.attribute_map
    missing = [names.get(size, size) for size in SIZES if not {size, names.get(size, size)} & said.keys()]
    if missing:
        raise UserError(
            f"the config.json of {name!r} does not say {', '.join(missing)}: a plan needs the model's sizes"
        )


def size_of_config(config: PreTrainedConfig, name: str) -> ModelSize:
    """Builds the model on the meta device, where tensors have shapes and no memory, and counts. UserError for an
    architecture that is no causal language model."""
    text: Any = config.get_text_config()
    for size in SIZES:
        if not (isinstance(value := getattr(text, size, None), int) and value > 0):
            what = f"it has no {size}" if value is None else f"its {size} is {value!r}"
            raise UserError(f"no plan for {name!r}: {what}, where a transformer has a whole number > 0")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(text)
    except ValueError as error:
        raise UserError(f"{name!r} is no causal language model: {str(error).splitlines()[0]}") from error
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return ModelSize(
        name=name,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        vocab=text.vocab_size,
        total=sum(p.numel() for p in model.parameters()),  # tied parameters come once
        body=_body(model.get_decoder(), text),
        linears=_linears(model),
        windows=_windows(text),
        context=getattr(text, "max_position_embeddings", None),
        qk_norm=any(".q_norm." in name for name, _ in model.named_parameters()),
    )


def _body(decoder: nn.Module, text: Any) -> int:
    """Matrix parameters a token meets, embedding excluded: of n experts, the k it is routed to."""
    embedding = {id(p) for m in decoder.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    matrices = [(n, p) for n, p in decoder.named_parameters() if p.ndim >= 2 and id(p) not in embedding]
    experts = sum(p.numel() for n, p in matrices if ".experts." in n)
    dense = sum(p.numel() for n, p in matrices if ".experts." not in n)
    if not experts:
        return dense
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    there = next((getattr(text, n) for n in names if getattr(text, n, None)), None)
    if there is None:
        raise UserError("the model has experts, but its config does not say how many (num_experts)")
    return dense + experts * text.num_experts_per_tok // there


def _linears(model: nn.Module) -> tuple[Linear, ...]:
    """Every linear layer but the head, equal ones of different layers counted together."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    found: Counter[tuple[str, int, int]] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            inside = re.sub(r"^.*?\.\d+\.", "", name)
            found[inside, module.in_features, module.out_features] += 1
    return tuple(Linear(*key, count) for key, count in found.items())


def _windows(text: Any) -> tuple[int | None, ...]:
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        return (window,) * text.num_hidden_layers
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise UserError(f"no cost model for layers of kind {', '.join(unknown)}; only attention is known")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
