"""Configuration: frozen dataclasses <-> YAML files and `key=value` arguments.

    data = load_config("recipe.yaml", ["trainer.learning_rate=1e-4", "seed=3"])  # a plain dict
    config = from_dict(RunConfig, data)                                          # checked, typed, frozen
    save_resolved(config, config.output_dir)                                     # config.yaml beside outputs

A key nobody knows is an error that names the nearest one; so is a value of the wrong type. Nothing is
dropped silently.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from .atomic import write_atomically
from .errors import UserError, nearest

T = TypeVar("T")


@dataclass(frozen=True)
class RunConfig:
    """One run, as the commands read it. The sections stay plain dicts here: each is built into the dataclass
    of the module that owns it (`task` by vlm_reason.tasks, `engine` by vlm_reason.engines, ...), with the
    same checks.

    kind        what is latent; `trace` is the chain of thought
    model       hub id, folder, or a built-in alias
    task        where the training problems come from; eval_task: the held-out ones (absent: none)
    template    how a problem becomes a prompt; shots: worked examples in the prompt
    verifier    what counts as right; auto: by the task
    preset      name of the method; options: its settings
    trainer     optimisation, schedule, lengths, K, checkpoints
    optim       ivon: learn a Gaussian over the adapter (docs/weights.md), with the settings in the section `ivon`;
                null: what trainer.optim names
    sampling    what `sample` draws: how many, how long, at what temperature; evaluation: the same for `eval`
    """

    kind: Literal["trace"] = "trace"
    model: str = "smollm2-135m"
    dtype: str = "float32"
    task: dict[str, Any] = field(default_factory=dict)
    eval_task: dict[str, Any] | None = None
    template: str | dict[str, Any] = field(default_factory=dict)
    shots: int = 0
    verifier: str = "auto"
    preset: str = "vr"
    options: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    optim: Literal["ivon"] | None = None
    ivon: dict[str, Any] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    output_dir: str = "runs/default"
    seed: int = 0

    def __post_init__(self) -> None:
        check_run_keys(self.shots, self.seed, self.output_dir)
        if self.ivon is not None and self.optim != "ivon":
            raise UserError("the section ivon has no meaning without optim: ivon")


def check_run_keys(shots: int, seed: int, output_dir: str) -> None:
    """What every kind of run has. UserError for the first out of range."""
    if shots < 0:
        raise UserError(f"shots must be >= 0, got {shots}")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed must be in [0, 2**32), got {seed}")
    if not output_dir.strip():
        raise UserError("output_dir is empty: name the folder of this run")


def check_same_run(config: Any, folder: Path, may_change: Collection[str]) -> None:
    """UserError naming the first key, but for `may_change`, in which `config` is not what `save_resolved` wrote into
    `folder`."""
    before = to_dict(yaml.safe_load((folder / "config.yaml").read_text()))
    now = to_dict(config)
    for key in sorted(now):
        if key not in may_change and before.get(key) != now[key]:
            raise UserError(
                f"{folder} holds a run with {key} = {before.get(key)!r}, this one has {now[key]!r}: "
                "choose another output_dir, or delete that folder to start over"
            )


# -------------------------------------------------------------------------------- reading


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping in a YAML (or JSON) file, with `key=value` and `a.b=value` overrides applied in order."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no config file {str(path)!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read config file {str(path)!r}: {error}") from None
    data = _parse_yaml(text, str(path))
    if data is None:
        raise UserError(f"config file {str(path)!r} is empty")
    if not isinstance(data, dict):
        raise UserError(f"config file {str(path)!r} must hold a mapping of keys, got {_kind(data)}")
    return apply_overrides(data, overrides)


def apply_overrides(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `data` with `a.b=value` set, the value read as YAML (`x=3`, `x=[1, 2]`, `x=null`, `x="3"`).
    Sections that do not exist are made; whether a key is known is checked by `from_dict`."""
    result = _copy(data)
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise UserError(f"override {override!r} is not of the form key=value (or section.key=value)")
        section = result
        for depth, part in enumerate(parts[:-1]):
            if section.get(part) is None:
                section[part] = {}
            section = section[part]
            if not isinstance(section, dict):
                where = ".".join(parts[: depth + 1])
                raise UserError(f"override {override!r}: {where} is {section!r}, not a section with keys")
        section[parts[-1]] = _parse_yaml(text, f"override {override!r}")
    return result


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice (YAML's own rule; PyYAML keeps the last one silently) and leaves a
    date as text (no config holds one, and a run may be named by it)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (str, int, float, bool)) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            if isinstance(key, (str, int, float, bool)):
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1} column {mark.column + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}{place}: not valid YAML: {problem}") from None


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _copy(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_copy(v) for v in value]
    return value


# -------------------------------------------------------------------------------- dict -> dataclass


def from_dict(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Build dataclass `cls` (nested ones too) from a plain mapping. `where` is the place named in errors.

    Numbers may be written as strings YAML does not read as numbers (`1e-3`); a float with an integral value
    is taken for an int; bools are never numbers. Raises UserError for an unknown key, a missing one, or a
    wrong type.
    """
    if not isinstance(data, Mapping):
        raise UserError(f"{where or 'config'}: expected a section with keys, got {data!r} ({_kind(data)})")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    hints: dict[str, Any] = _type_hints(cls)  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise UserError(f"unknown config key {_join(where, str(key))!r}{nearest(str(key), fields)}")
    values = {key: convert(hints[key], value, _join(where, key)) for key, value in data.items()}
    missing = [
        name
        for name, f in fields.items()
        if name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"missing config key {_join(where, missing[0])!r}; it has no default")
    try:
        return cls(**values)
    except ValueError as error:  # from __post_init__; say where, once
        raise UserError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


@functools.cache
def _type_hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as type `hint`, by the rules of `from_dict`; `where` is the place named in errors."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is Union or origin is types.UnionType:
        return _convert_union(args, value, where)
    if origin is Literal:
        return _convert_literal(args, value, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else from_dict(hint, value, where)
    base = origin or hint
    if base in (tuple, list, frozenset, set) or base is Sequence:
        return _convert_sequence(base, args, value, where)
    if isinstance(base, type) and issubclass(base, Mapping):
        return _convert_mapping(args, value, where)
    if base in _SCALARS:
        return _SCALARS[base](value, where)
    if isinstance(base, type) and issubclass(base, Enum):
        return base(_convert_literal(tuple(member.value for member in base), value, where))
    if isinstance(base, type) and isinstance(value, base):
        return value
    raise _wrong(where, getattr(hint, "__name__", str(hint)), value)


def _convert_union(arms: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in arms:
        return None
    arms = tuple(arm for arm in arms if arm is not type(None))
    if len(arms) == 1:  # Optional: keep the arm's own message, which knows the key that was wrong inside
        return convert(arms[0], value, where)
    # An arm of exactly the value's type comes first, so that `int | str` keeps "3" a string.
    for arm in sorted(arms, key=lambda arm: type(value) is not (typing.get_origin(arm) or arm)):
        try:
            return convert(arm, value, where)
        except UserError:
            if isinstance(value, Mapping) and dataclasses.is_dataclass(arm):
                raise
    raise _wrong(where, " or ".join(getattr(arm, "__name__", str(arm)) for arm in arms), value)


def _convert_literal(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
    hint = nearest(str(value), map(str, choices))
    raise UserError(f"{where}: {value!r} is not one of {', '.join(map(repr, choices))}{_only_close(hint)}")


def _only_close(hint: str) -> str:
    return hint if hint.startswith("; did") else ""


def _convert_sequence(base: Any, args: tuple[Any, ...], value: Any, where: str) -> Any:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, (Sequence, set, frozenset)):
        raise _wrong(where, "a list", value)
    if base is tuple and args and args[-1] is not Ellipsis:
        if len(value) != len(args):
            raise _wrong(where, f"a list of {len(args)}", value)
        return tuple(
            convert(arg, v, f"{where}[{i}]") for i, (arg, v) in enumerate(zip(args, value, strict=True))
        )
    item = args[0] if args else Any
    items = (convert(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    return tuple(items) if base is Sequence else base(items)


def _convert_mapping(args: tuple[Any, ...], value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(where, "a section with keys", value)
    key_hint, value_hint = args if args else (Any, Any)
    return {
        convert(key_hint, k, f"a key of {where}"): convert(value_hint, v, _join(where, str(k)))
        for k, v in value.items()
    }


def _to_float(value: Any, where: str) -> float:
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
        try:
            return float(value)
        except ValueError:
            raise _wrong(where, "a number", value) from None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _wrong(where, "a number", value)
    return float(value)


def _to_int(value: Any, where: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, (str, float)):
        try:
            number = float(value)
        except ValueError:
            number = 0.5
        if number.is_integer():
            return int(number)
    raise _wrong(where, "a whole number", value)


def _to_bool(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong(where, "true or false", value)
    return value


def _to_str(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _wrong(where, "text", value)
    return value


def _to_path(value: Any, where: str) -> Path:
    return Path(_to_str(str(value) if isinstance(value, Path) else value, where))


def _to_none(value: Any, where: str) -> None:
    if value is not None:
        raise _wrong(where, "null", value)


_SCALARS: dict[Any, Any] = {
    float: _to_float,
    int: _to_int,
    bool: _to_bool,
    str: _to_str,
    Path: _to_path,
    type(None): _to_none,
}


def _wrong(where: str, expected: str, value: Any) -> UserError:
    return UserError(f"{where}: expected {expected}, got {value!r} ({_kind(value)})")


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names: dict[type, str] = {dict: "a section", list: "a list", str: "text"}
    return names.get(type(value), type(value).__name__)


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


# -------------------------------------------------------------------------------- dataclass -> dict


def to_dict(config: Any) -> Any:
    """Plain dicts, lists and scalars, in the order of the fields: what YAML and JSON can write, and
    `from_dict` read."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {to_dict(k): to_dict(v) for k, v in config.items()}
    if isinstance(config, (set, frozenset)):
        return sorted(to_dict(v) for v in config)
    if isinstance(config, (list, tuple)):
        return [to_dict(v) for v in config]
    if isinstance(config, Enum):
        return config.value
    if isinstance(config, Path):
        return str(config)
    if config is None or isinstance(config, (str, int, float, bool)):
        return config
    raise TypeError(f"a config cannot hold {config!r}")


def save_resolved(config: Any, folder: str | Path) -> Path:
    """Write `folder/config.yaml`, every default filled in, atomically; it loads back to an equal config."""
    path = Path(folder) / "config.yaml"
    write_atomically(path, yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))
    return path
