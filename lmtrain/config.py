"""YAML and `a.b=c` into frozen pydantic models. Unknown keys are refused, with the nearest known one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from lmtrain.errors import ConfigError


class Config(BaseModel):
    """Base of every configuration model: frozen, strict about names, beside the class that it configures."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())


C = TypeVar("C", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 3e-4 is a number, `on` and `no` are words, and a repeated key is an error."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {  # type: ignore[misc]  # the stubs say an instance's
        first: [(tag, pattern) for tag, pattern in rules if tag != "tag:yaml.org,2002:bool"]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)

_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise ConfigError(f"line {key_node.start_mark.line + 1}: the key {key!r} is given twice; keep one")
        seen.add(key)
    return dict(yaml.SafeLoader.construct_mapping(loader, node, deep=deep))


def _construct_map(loader: _Loader, node: yaml.MappingNode) -> Any:
    data: dict[Any, Any] = {}
    yield data
    data.update(_mapping(loader, node, deep=False))


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_map)


def parse_yaml(text: str, *, where: str) -> Any:
    """A YAML document as plain Python values; ConfigError names `where` and the line."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where}{line}: not valid YAML: {problem}") from None
    except ConfigError as error:
        raise ConfigError(f"{where} {error}") from None
    finally:
        loader.dispose()


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; ConfigError when the file is missing, unreadable or no mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no config file {path}; configs/ holds ready ones") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a config: {error}") from None
    value = parse_yaml(text, where=str(path))
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a {type(value).__name__}, wanted `key: value` lines")
    return value


def override(tree: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """The tree with `a.b=c` applied in order; values are YAML (`[1, 2]`, `3e-4`, `null`)."""
    out: dict[str, Any] = _copy(tree)
    for text in assignments:
        name, sign, raw = text.partition("=")
        keys = name.strip().split(".")
        if not sign or not all(keys):
            raise ConfigError(f"override {text!r} is not of the form key.sub=value")
        value = parse_yaml(raw, where=f"override {name}=")
        at = out
        for depth, key in enumerate(keys[:-1]):
            nested = at.get(key)
            if nested is None:
                nested = at[key] = {}
            if not isinstance(nested, dict):
                name = ".".join(keys[: depth + 1])
                raise ConfigError(f"override {text!r}: {name} is a value, it has no key {keys[depth + 1]!r}")
            at = nested
        at[keys[-1]] = value
    return out


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _copy(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_copy(v) for v in value]
    return value


def build(model: type[C], tree: Mapping[str, Any], *, where: str) -> C:
    """Validate a tree into a config model; all faults in one ConfigError line with key, value and what was wanted."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(model, dict(item)) for item in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(lines)) from None


def _explain(model: type[BaseModel], item: dict[str, Any]) -> str:
    loc = tuple(item["loc"])
    path = ".".join(str(p) for p in loc)
    if item["type"] == "extra_forbidden":
        known = _keys_at(model, loc[:-1])
        near = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "known: " + ", ".join(sorted(known))
        return f"unknown key {path!r}; {hint}"
    if item["type"] == "missing":
        return f"{path} is not given"
    message = str(item["msg"]).removeprefix("Value error, ")
    given = item.get("input")
    if isinstance(given, Mapping | list | tuple) or item["type"] == "value_error":
        return f"{path}: {message}" if path else message
    return f"{path} = {given!r}: {message[:1].lower()}{message[1:]}"


def _keys_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    at: Any = model
    for part in loc:
        if isinstance(part, int):
            continue
        fields = getattr(at, "model_fields", {})
        if part in fields:
            at = _model_in(fields[part].annotation)
    return list(getattr(at, "model_fields", {}))


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for arg in get_args(annotation):
        found = _model_in(arg)
        if found is not None:
            return found
    return None


def dump(config: BaseModel) -> str:
    """A config as YAML that `build` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
