"""Two LoRA adapters, `reasoner` and `posterior`, on one frozen base model (Hu et al. 2021, through PEFT).

    W' = W + (alpha / r) B A        A [r, in] ~ kaiming uniform, B [out, r] = 0: both start as the base model

One set of base weights serves three models: pi (reasoner), q (posterior), and the reference (no adapter). Adapter
weights are fp32 whatever the base is, so that small updates are not lost to rounding.

Full weights: a model without adapters is accepted as the one and only `reasoner`. Until `trainable` marks it for
training it also serves as its own base (name None); after that the base no longer exists, and asking for it, or for a
posterior, is an error, never the wrong weights.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import UserError, nearest
from .sharding import set_whole, whole_shape

REASONER = "reasoner"
POSTERIOR = "posterior"

_FULL_WEIGHTS: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models without adapters whose own weights are being trained: they have no frozen base any more."""


@dataclass(frozen=True)
class AdapterConfig:
    """r: rank. alpha: scale (the update is multiplied by alpha / r). target_modules: `all-linear` (every linear layer
    except the LM head) or module names. layers: numbers of the decoder layers that get one, None for all; needs module
    names. seed: of the initial A; adapter names enter the seed, so the two differ."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    layers: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"adapter rank r must be >= 1, got {self.r}")
        if self.alpha < 1:
            raise UserError(
                f"adapter alpha must be >= 1 (the update is multiplied by alpha / r), got {self.alpha}"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"adapter dropout must be in [0, 1), got {self.dropout}")
        if self.layers is not None and isinstance(self.target_modules, str):
            raise UserError(f"adapter.layers needs target_modules by name, not {self.target_modules!r}")
        if self.layers is not None and not self.layers:
            raise UserError("adapter.layers is empty: name a layer, or leave it out for all of them")


def add_adapters(
    model: nn.Module, config: AdapterConfig | None = None, names: Sequence[str] = (REASONER, POSTERIOR)
) -> PeftModel:
    """Wrap `model` with one adapter a name; the first becomes active. The base is frozen, every adapter trainable."""
    inside = getattr(model, "peft_config", None)  # PEFT puts its layers into the given model itself
    if inside:
        raise UserError(f"the model already has adapters {sorted(inside)}: load it anew")
    config = config or AdapterConfig()
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices):  # PEFT draws initial values of its own; ours replace them
        try:
            wrapped = get_peft_model(
                model, _lora_config(config, config.target_modules), adapter_name=names[0]
            )
        except ValueError as error:  # PEFT's: a target module that the model has not
            raise UserError(f"adapter.target_modules: {' '.join(str(error).split())}") from error
        found = cast(LoraConfig, wrapped.peft_config[names[0]]).target_modules or ()
        resolved = found if isinstance(found, str) else tuple(sorted(found))  # a regular expression stays one
        for name in names[1:]:
            wrapped.add_adapter(name, _lora_config(config, resolved))
    for name in names:
        reset_adapter(wrapped, name, config.seed)
    trainable(wrapped, names)
    return wrapped


def reset_adapter(model: PeftModel, name: str, seed: int) -> None:
    """Initial values of adapter `name`: B = 0, A ~ U(-b, b) with b = 1 / sqrt(in), the law PEFT itself uses.

    Every matrix has its own generator, seeded by (seed, its full name): the values depend neither on the global RNG
    state nor on what was initialised before, and the two adapters differ.
    """
    for key, parameter in adapter_parameters(model, name).items():
        value = torch.zeros(whole_shape(parameter))
        if ".lora_A." in key:
            digest = hashlib.blake2b(f"{seed}\x1f{key}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            bound = value.shape[1] ** -0.5
            value.uniform_(-bound, bound, generator=generator)
        set_whole(parameter, value)


@contextmanager
def use_adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """Run the block under adapter `name`; None is the frozen base. Afterwards (also after an error) whatever was
    active before is active again.

    `requires_grad` stays the caller's business throughout: PEFT's own switch makes the active adapter trainable and
    freezes the others, which is undone at once. With gradient checkpointing, run `backward` inside the block too: the
    recomputation uses whichever adapter is active then.
    """
    if not isinstance(model, PeftModel):
        if name != REASONER and (name is not None or model in _FULL_WEIGHTS):
            what = "frozen base" if name is None else f"adapter {name!r}"
            raise UserError(
                f"a model with full weights has no {what}, only {REASONER!r}: "
                "add adapters to have a posterior and a base reference"
            )
        yield
        return
    active, disabled = model.active_adapter, _is_disabled(model)
    target = active if name is None else _known(model, name)
    try:
        _switch(model, target, disabled=name is None)
        yield
    finally:
        _switch(model, active, disabled=disabled)


def trainable(model: nn.Module, names: Iterable[str]) -> None:
    """Exactly these adapters require grad; the base and the other adapters do not. With full weights `reasoner`
    stands for every weight, and an empty `names` freezes them all."""
    names = tuple(names)
    if names and not isinstance(model, PeftModel):
        _FULL_WEIGHTS.add(model)
    chosen = {id(p) for name in names for p in adapter_parameters(model, name).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The parameters of adapter `name` by their full name, in module order (all parameters, with full weights)."""
    if not isinstance(model, PeftModel):
        if name != REASONER:
            raise UserError(f"a model with full weights has no adapter {name!r}, only {REASONER!r}")
        return dict(model.named_parameters())
    _known(model, name)
    return {k: p for k, p in model.named_parameters() if "lora_" in k and name in k.split(".")}


def save_adapters(
    model: PeftModel,
    folder: str | Path,
    names: Iterable[str] | None = None,
    whole: Mapping[str, Tensor] | None = None,
) -> None:
    """Write every adapter to `folder/<name>/`, a stock PEFT folder (`adapter_config.json` and
    `adapter_model.safetensors`) that `PeftModel.from_pretrained(base, folder / name)` loads. `whole`: the tensors of a
    sharded model's adapters by parameter name, already gathered."""
    names = list(model.peft_config) if names is None else [_known(model, name) for name in names]
    # "auto" would ask the hub for the base model's vocabulary size; adapters here never touch the embeddings.
    state = None if whole is None else dict(whole)
    model.save_pretrained(str(folder), selected_adapters=names, save_embedding_layers=False, state_dict=state)


def load_adapters(model: PeftModel, folder: str | Path, names: Iterable[str] | None = None) -> None:
    """Copy the adapters saved under `folder` into `model` in place, bit for bit; flags and active adapter stay.
    All of them fit, or none is touched. Collective where the model is sharded."""
    pairs: list[tuple[nn.Parameter, Tensor]] = []
    for name in list(model.peft_config) if names is None else names:
        pairs += _matched(model, _known(model, name), Path(folder))
    for own, saved in pairs:
        set_whole(own, saved)


def _matched(model: PeftModel, name: str, folder: Path) -> list[tuple[nn.Parameter, Tensor]]:
    """(parameter of the model, tensor on disk) of one adapter."""
    path = folder / name / "adapter_model.safetensors"
    if not path.is_file():
        raise UserError(f"no adapter {name!r} in {folder}: {path.name} is missing there")
    saved = load_file(path)
    own = {key.replace(f".{name}.", "."): p for key, p in adapter_parameters(model, name).items()}
    both = own.keys() & saved.keys()
    wrong = sorted(
        (own.keys() ^ saved.keys()) | {key for key in both if whole_shape(own[key]) != saved[key].shape}
    )
    if wrong:
        raise UserError(
            f"adapter {name!r} in {folder} does not fit the model: {len(wrong)} of {len(own)} tensors differ in "
            f"name or shape, the first is {wrong[0]!r}; use the rank and target modules it was trained with"
        )
    return [(own[key], saved[key]) for key in own]


def _lora_config(config: AdapterConfig, target_modules: str | tuple[str, ...]) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        bias="none",
        layers_to_transform=None if config.layers is None else list(config.layers),
    )


def _known(model: PeftModel, name: str) -> str:
    if name not in model.peft_config:
        raise UserError(f"the model has no adapter {name!r}{nearest(name, model.peft_config)}")
    return name


def _is_disabled(model: PeftModel) -> bool:
    return next(m.disable_adapters for m in model.modules() if isinstance(m, BaseTunerLayer))


def _switch(model: PeftModel, active: str, disabled: bool) -> None:
    flags = [(p, p.requires_grad) for p in model.parameters()]
    layers = cast(BaseTuner, model.base_model)
    layers.enable_adapter_layers()
    model.set_adapter(active)
    if disabled:
        layers.disable_adapter_layers()
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
