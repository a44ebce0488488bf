"""The models an evaluation runs: one, or M samples of a posterior over weights.

    p(y | x) = (1/M) sum_m p(y | x, theta_m),   theta_m ~ q(theta)

Any family of posteriors takes part by handing over its samples: as the folder it was saved in, as PEFT adapters, as
whole models, or as a class of its own that has what `Members` asks for.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..engines.base import Engine
from ..engines.make import check_engine, make_engine
from ..errors import UserError
from ..models.load import fingerprint_weights, load_model, load_tokenizer
from ..weights import Posterior
from ..weights.artefact import adapter_files
from .suite import Draws

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Member:
    """index: number of the draw in the store, None for a model that is no draw. name: the folder, or the model's name.
    adapter: of the law that samples it, None for the engine's own weights. weights: a hash of all of them."""

    index: int | None
    name: str
    adapter: str | None
    weights: str


class Members(Protocol):
    """M >= 1 models that share a tokenizer.

    resident  all of them stay in memory, so changing from one to another costs nothing; otherwise it is done seldom
    base      hash of the weights they share, None if they share none
    """

    resident: bool
    base: str | None
    tokenizer: Any

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Member]: ...
    def serve(self, member: Member) -> AbstractContextManager[Engine]:
        """The engine that samples and scores `member` under the law `member.adapter`."""
        ...


class ResidentMembers:
    """One engine for all: the model as it is, or under one of its adapters."""

    resident = True
    base: str | None

    def __init__(self, engine: Engine, tokenizer: Any, members: Sequence[Member], base: str) -> None:
        self.engine, self.tokenizer, self.members, self.base = engine, tokenizer, tuple(members), base

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members)

    def serve(self, member: Member) -> AbstractContextManager[Engine]:
        return nullcontext(self.engine)


class WholeModels:
    """Folders of whole models, one in memory at a time. The hash of each is taken once, on loading it."""

    resident = False
    base: str | None = None

    def __init__(self, folders: Sequence[str], dtype: str, options: Mapping[str, Any]) -> None:
        if check_engine(options, adapters=False).kind != "hf":
            raise UserError(
                "members that are whole models need engine.kind hf: vLLM serves adapters of one model"
            )
        self.dtype, self.options = dtype, options
        self.tokenizer = load_tokenizer(folders[0])
        self._loaded: tuple[str, Engine] | None = None
        self.members = tuple(Member(m, name, None, self._load(name)[1]) for m, name in enumerate(folders))

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members)

    @contextmanager
    def serve(self, member: Member) -> Iterator[Engine]:
        if self._loaded is None or self._loaded[0] != member.name:
            self._load(member.name)
        assert self._loaded is not None
        yield self._loaded[1]

    def _load(self, name: str) -> tuple[Engine, str]:
        self._loaded = None  # the one before leaves the memory first
        model, tokenizer = load_model(name, dtype=cast(Any, self.dtype))
        if tokenizer.get_vocab() != self.tokenizer.get_vocab():
            raise UserError(f"members must share a tokenizer: the vocabulary of {name!r} is another")
        engine = make_engine(model, tokenizer, self.options)
        self._loaded = (name, engine)
        return engine, fingerprint_weights(model)


def load_members(
    model: str, dtype: str, members: Sequence[str | Draws], options: Mapping[str, Any]
) -> Members:
    """What `members` of a suite names: nothing (the model alone), PEFT adapters of `model`, draws from posteriors over
    them, or whole models. A draw is the member that it would be as an exported adapter, with the same hash.

    UserError for a folder that is none of these, for a mixture of adapters and whole models, for an adapter that does
    not fit the model, and for a posterior of another base model.
    """
    entries = [str(Path(m).expanduser()) if isinstance(m, str) else m for m in members]
    kinds = {str(m): _kind(m) for m in entries}
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise UserError(f"members must be all adapters or all whole models: {listed}")
    if "model" in kinds.values():
        return WholeModels([m for m in entries if isinstance(m, str)], dtype, options)
    check_engine(options, adapters=bool(entries))  # what can be said before a model is loaded
    posteriors = {m: Posterior.load(m.posterior) for m in entries if isinstance(m, Draws)}
    loaded, tokenizer = load_model(model, dtype=cast(Any, dtype))
    base = fingerprint_weights(loaded)
    if not entries:
        only = [Member(None, model, None, base)]
        return ResidentMembers(make_engine(loaded, tokenizer, options), tokenizer, only, base)
    for posterior in posteriors.values():
        posterior.check_base(loaded)
    with_adapters, found = add_members(loaded, base, _folders(entries, posteriors))
    return ResidentMembers(make_engine(with_adapters, tokenizer, options), tokenizer, found, base)


def _folders(
    entries: Sequence[str | Draws], posteriors: Mapping[Draws, Posterior]
) -> Iterator[tuple[str, str]]:
    """(name, folder of a PEFT adapter) of every member; a draw's folder is there until the next one is asked for."""
    for entry in entries:
        if isinstance(entry, str):
            yield entry, entry
            continue
        posterior = posteriors[entry] if entry.temper == 1 else posteriors[entry].temper(entry.temper)
        cold = "" if entry.temper == 1 else f", temper {entry.temper:g}"
        for k, tree in enumerate(posterior.sample(entry.draws, entry.seed)):
            with tempfile.TemporaryDirectory() as folder:
                for file, content in adapter_files(posterior.adapter_config, tree):
                    (Path(folder) / file).write_bytes(content)
                yield f"{entry.posterior}: draw {k} of seed {entry.seed}{cold}", folder


def add_members(
    model: torch.nn.Module, base: str, folders: Iterable[tuple[str, str]]
) -> tuple[PeftModel, list[Member]]:
    """`model` with the m-th adapter under the name `member<m>`, frozen. folders: (name, folder). Every tensor of an
    adapter must have its place in the model, and every place its tensor."""
    wrapped: PeftModel | None = None
    members = []
    for m, (name, folder) in enumerate(folders):
        try:
            config = PeftConfig.from_pretrained(folder)
            config.inference_mode = True
            tensors = load_file(Path(folder) / ADAPTER_FILES[1])
            if wrapped is None:
                wrapped = cast(PeftModel, get_peft_model(cast(Any, model), config, adapter_name="member0"))
            else:
                wrapped.add_adapter(f"member{m}", config)
            outcome: Any = set_peft_model_state_dict(wrapped, tensors, adapter_name=f"member{m}")
        except (ValueError, TypeError, RuntimeError, OSError, SafetensorError) as error:
            raise UserError(f"the adapter in {name!r} does not fit the model: {_one_line(error)}") from error
        missing = [key for key in outcome.missing_keys if f".member{m}." in key]
        wrong = [*outcome.unexpected_keys, *missing]
        if wrong:
            raise UserError(f"the adapter in {name!r} does not fit the model: {len(wrong)} tensors are missing or "
                            f"have no place in it, the first is {wrong[0]!r}")  # fmt: skip
        members.append(Member(m, name, f"member{m}", f"{base}+{hash_adapter(folder)}"))
    assert wrapped is not None
    return wrapped.eval(), members


def hash_adapter(folder: str | Path) -> str:
    """16 hex digits of an adapter's config and tensors."""
    digest = hashlib.blake2b(digest_size=8)
    for name in ADAPTER_FILES:
        digest.update((Path(folder) / name).read_bytes())
    return digest.hexdigest()


def _kind(member: str | Draws) -> str:
    if isinstance(member, Draws):
        return "adapter"
    path, folder = Path(member), member
    if all((path / name).is_file() for name in ADAPTER_FILES):
        return "adapter"
    if (path / "config.json").is_file():
        return "model"
    if not path.is_dir():
        raise UserError(f"members: no folder {folder!r}")
    raise UserError(
        f"members: {folder!r} holds neither {' and '.join(ADAPTER_FILES)} nor a model's config.json"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
