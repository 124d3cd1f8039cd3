"""Typed YAML configuration: strict, frozen, with every problem located and named at once.

YAML in, frozen pydantic models out. Only plain YAML is accepted: no tags, anchors or duplicate keys; `1e-4` is a
number, `off` and `010` are text (and so are refused where a flag or a number is wanted).
"""

import difflib
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from shared.errors import ConfigError

Location = tuple[str | int, ...]
MAX_DEPTH = 20  # nesting of a configuration; deeper is an error, not a recursion limit
MAX_BYTES = 1 << 20


class Section(BaseModel):
    """Base of every configuration section: frozen, strict types, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


Model = TypeVar("Model", bound=Section)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2: true/false, decimal integers, floats with or without a dot."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes the texts which `_Loader` would take for numbers, such as `1e4`."""


for _first_letter, _resolvers in _Loader.yaml_implicit_resolvers.items():
    for _tag, _regexp in _resolvers:
        _Dumper.add_implicit_resolver(_tag, _regexp, [_first_letter])


def load(path: Path | str, model: type[Model], overrides: Sequence[str] = ()) -> Model:
    """Read one YAML file, apply `dotted.key=value` overrides and validate.

    Raises:
        ConfigError: with one line a problem, `file:line: key: what was found and what is wanted`.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: {len(raw)} bytes are too many for a configuration (limit {MAX_BYTES})")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    return parse(text, model, overrides, source=str(path))


def parse(text: str, model: type[Model], overrides: Sequence[str] = (), source: str = "<text>") -> Model:
    """As `load`, from text; `source` names it in errors."""
    data, lines = _read(text, source)
    where: dict[Location, str] = {loc: f"{source}:{line}" for loc, line in lines.items()}
    for override in overrides:
        _override(data, where, override)
    _same_paper(data, model, where, source)
    problems = [f"{_at(where, loc, source)}: {_dotted(loc)}: {text}" for loc, text in _not_finite(data)]
    if not problems:
        try:
            return model.model_validate_json(json.dumps(data))
        except ValidationError as error:
            problems = [_explain(model, data, dict(item), where, source) for item in error.errors(include_url=False)]
        except (ValueError, RecursionError) as error:
            problems = [f"{source}: {error}"]
    raise ConfigError("\n".join(dict.fromkeys(problems)))


def dump(config: Section) -> str:
    """The resolved configuration as YAML that `parse` reads back to an equal one."""
    data = config.model_dump(mode="json")
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110))


def schema(model: type[Section]) -> str:
    """JSON schema of a configuration, for editors."""
    return json.dumps(model.model_json_schema(), indent=1) + "\n"


def differences(old: Section, new: Section) -> list[str]:
    """One line a leaf that differs between two configurations: `key: old -> new`."""
    before, after = _leaves(old.model_dump(mode="json")), _leaves(new.model_dump(mode="json"))
    keys = dict.fromkeys([*before, *after])
    return [f"{k}: {before.get(k)!r} -> {after.get(k)!r}" for k in keys if before.get(k) != after.get(k)]


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, item in value.items() for k, v in _leaves(item, f"{prefix}.{key}".lstrip(".")).items()}


def _read(text: str, source: str) -> tuple[dict[str, Any], dict[Location, int]]:
    try:
        loader = _Loader(text)
        try:
            _refuse_aliases(text, source)
            root = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise ConfigError(f"{source}{line}: is not valid YAML: {problem}") from None
    except RecursionError:
        raise ConfigError(f"{source}: is nested more than {MAX_DEPTH} deep") from None
    if root is None:
        raise ConfigError(f"{source}: is empty; a configuration is a mapping of keys to values")
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{source}:1: a configuration is a mapping of keys to values, not {_kind(root)}")
    lines: dict[Location, int] = {}
    data = _construct(root, (), lines, source)
    assert isinstance(data, dict)
    return data, lines


def _refuse_aliases(text: str, source: str) -> None:
    """Anchors and aliases can blow a small file up; no configuration here needs them."""
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        if isinstance(token, yaml.AnchorToken | yaml.AliasToken | yaml.TagToken):
            line = token.start_mark.line + 1
            raise ConfigError(f"{source}:{line}: anchors, aliases and tags are not supported; write the value out")


def _construct(node: yaml.Node, loc: Location, lines: dict[Location, int], source: str) -> Any:
    if len(loc) > MAX_DEPTH:
        raise ConfigError(f"{source}:{node.start_mark.line + 1}: is nested more than {MAX_DEPTH} deep")
    lines[loc] = node.start_mark.line + 1
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, loc, source)
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, (*loc, i), lines, source) for i, item in enumerate(node.value)]
    data: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{source}:{line}: a key must be a plain word, not {_kind(key_node)}")
        key = str(key_node.value)
        if key in data:
            raise ConfigError(f"{source}:{line}: {_dotted((*loc, key))}: is given twice; keep one of them")
        data[key] = _construct(value_node, (*loc, key), lines, source)
        lines[(*loc, key)] = line
    return data


def _scalar(node: yaml.ScalarNode, loc: Location, source: str) -> Any:
    kind, text = node.tag.rpartition(":")[2], str(node.value)
    if kind == "bool":
        return text.lower() == "true"
    if kind == "null":
        return None
    if kind in ("int", "float"):
        if len(text) > 300:
            raise ConfigError(f"{source}:{node.start_mark.line + 1}: {_dotted(loc)}: a number of {len(text)} digits")
        return int(text) if kind == "int" else float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _override(data: dict[str, Any], where: dict[Location, str], override: str) -> None:
    place = f"{_one_line(override)} (command line)"
    key, equals, text = override.partition("=")
    parts: Location = tuple(key.strip().split("."))
    if not equals or not all(parts):
        raise ConfigError(f"{place}: an override is dotted.key=value, for example seed=1 or data.name=sample")
    holder, lines = _read(f"value: {text}" if text.strip() else "value: ''", place)
    if set(holder) != {"value"}:
        raise ConfigError(f"{place}: holds more than one value")
    target = data
    for depth, part in enumerate(parts[:-1]):
        section = target.get(str(part))
        if not isinstance(section, dict):  # `optimizer: sgd` is short for `optimizer: {name: sgd}`
            target[str(part)] = {"name": section} if isinstance(section, str) else {}
            where[parts[: depth + 1]] = place
        target = target[str(part)]
    target[str(parts[-1])] = holder["value"]
    for loc in [loc for loc in where if loc[: len(parts)] == parts]:
        del where[loc]
    where.update({(*parts, *loc[1:]): place for loc in lines if loc})


def _same_paper(data: dict[str, Any], model: type[Section], where: dict[Location, str], source: str) -> None:
    field = model.model_fields.get("paper")
    found = data.get("paper")
    if field is None or found is None or found in get_args(field.annotation):
        return
    wanted = get_args(field.annotation)[0]
    at = _at(where, ("paper",), source)
    raise ConfigError(f"{at}: paper: this is a configuration of {found!r}; this command takes those of {wanted!r}")


def _not_finite(value: Any, loc: Location = ()) -> Iterable[tuple[Location, str]]:
    if isinstance(value, float) and not math.isfinite(value):
        yield loc, f"{value} is not a finite number"
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _not_finite(item, (*loc, key))


def _explain(model: type[Section], data: Any, item: dict[str, Any], where: dict[Location, str], source: str) -> str:
    """One problem of pydantic's in the words of the file: place, key, what was found, what is wanted."""
    loc = _in_data(data, item["loc"])
    kind, context, found = item["type"], item.get("ctx", {}), item.get("input")
    place = f"{_at(where, loc, source)}: {_dotted(loc)}"
    if kind == "json_invalid":
        return f"{source}: holds text that is not Unicode ({context.get('error', item['msg'])})"
    if kind == "extra_forbidden":
        known = _keys(model, item["loc"][:-1])
        close = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"{place}: there is no such key; {hint}"
    if kind in ("missing", "union_tag_not_found"):
        missing = loc if kind == "missing" else (*loc, context["discriminator"].strip("'"))
        return f"{_at(where, loc, source)}: {_dotted(missing)}: is missing"
    if kind in ("literal_error", "union_tag_invalid", "enum"):
        if kind == "union_tag_invalid":
            place, found = f"{place}.{context['discriminator'].strip(chr(39))}", context["tag"]
        choices = re.findall(r"'([^']*)'", str(context.get("expected") or context.get("expected_tags")))
        close = difflib.get_close_matches(str(found), choices, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"{place}: unknown value {_short(found)}; {hint}choose from {', '.join(choices)}"
    bounds = {"greater_than": ("gt", "must be above"), "greater_than_equal": ("ge", "is below"),
              "less_than": ("lt", "must be below"), "less_than_equal": ("le", "is above")}  # fmt: skip
    description = _description(model, item["loc"])
    if kind in bounds:
        name, words = bounds[kind]
        return f"{place}: {found} {words} {context[name]:g}{description}"
    if kind in ("value_error", "assertion_error"):
        return f"{place}: {context.get('error', item['msg'])}"
    wanted = item["msg"][0].lower() + item["msg"][1:]
    return f"{place}: {_short(found)} does not fit: {wanted}{description}"


def _in_data(data: Any, loc: Location) -> Location:
    """Drop the tags that pydantic puts into the location of a union's members."""
    kept: list[str | int] = []
    for i, part in enumerate(loc):
        if isinstance(data, dict) and part not in data and i + 1 < len(loc):
            continue
        kept.append(part)
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            data = None
    return tuple(kept)


def _models(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [found for arg in get_args(annotation) for found in _models(arg)]


def _step(models: list[type[Section]], part: str | int) -> tuple[list[type[Section]], Any]:
    """Follow one part of a location: a field's name, or the tag of a union's member."""
    for model in models:
        if part in model.model_fields:
            field = model.model_fields[str(part)]
            return _models(field.annotation), field
    tagged = [m for m in models if any(part in get_args(f.annotation) for f in m.model_fields.values())]
    return tagged or models, None


def _keys(model: type[Section], loc: Location) -> list[str]:
    models = [model]
    for part in loc:
        models = _step(models, part)[0]
    return list(dict.fromkeys(name for m in models for name in m.model_fields))


def _description(model: type[Section], loc: Location) -> str:
    models, text = [model], None
    for part in loc:
        models, field = _step(models, part)
        text = field.description if field is not None else text
    return f"; it is {text}" if text else ""


def _at(where: dict[Location, str], loc: Location, source: str) -> str:
    while loc and loc not in where:
        loc = loc[:-1]
    return where.get(loc, source)


def _dotted(loc: Location) -> str:
    return _one_line(".".join(str(part) for part in loc)) or "(top)"


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _kind(node: yaml.Node | None) -> str:
    return {"ScalarNode": "a single value", "SequenceNode": "a list"}.get(type(node).__name__, "a mapping")
