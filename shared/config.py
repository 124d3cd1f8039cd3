"""Typed YAML configuration: strict, frozen, with every problem located and named at once.

YAML in, frozen pydantic models out. Only plain YAML is accepted: no tags, anchors or duplicate keys; `1e-4` is a
number, `off` and `010` are text (and so are refused where a flag or a number is wanted).
"""

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from shared.errors import ConfigError

Location = tuple[str | int, ...]
MAX_DEPTH = 20  # nesting of a configuration; deeper is an error, not a recursion limit
MAX_BYTES = 1 << 20

# pydantic's kinds of error in our words; every other kind is told in pydantic's
CHOICE = "unknown value {found}; {close}choose from {choices}"
MESSAGES = {
    "missing": "is missing", "union_tag_not_found": "is missing",
    "extra_forbidden": "there is no such key; {hint}",
    "literal_error": CHOICE, "enum": CHOICE, "union_tag_invalid": CHOICE,
    "finite_number": "{found} is not a finite number",
    "greater_than": "{found} must be above {gt:g}{note}", "greater_than_equal": "{found} is below {ge:g}{note}",
    "less_than": "{found} must be below {lt:g}{note}", "less_than_equal": "{found} is above {le:g}{note}",
    "value_error": "{error}", "assertion_error": "{error}",
    "json_invalid": "holds text that is not Unicode ({error})",
}  # fmt: skip


class Section(BaseModel):
    """Base of every configuration section: frozen, strict types, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


Model = TypeVar("Model", bound=Section)


class _Loader(yaml.SafeLoader):
    """SafeLoader of plain YAML with the scalars of 1.2: true/false, decimal integers, floats with or without a dot."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """As in YAML, but for what is not plain or nested too deep."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or event.anchor or event.tag:  # they can blow a small file up
            raise ConfigError(f"{_place(event)}: anchors, aliases and tags are not supported; write the value out")
        if self.depth > MAX_DEPTH:
            raise ConfigError(f"{_place(event)}: is nested more than {MAX_DEPTH} deep")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def plain(self, node: yaml.Node, loc: Location, where: dict[Location, str]) -> Any:
        """The value of a node; `where` takes the place, `file:line`, of everything in it."""
        where[loc] = _place(node)
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(item, (*loc, i), where) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            if len(node.value) > 300 and node.tag.endswith((":int", ":float")):
                raise ConfigError(f"{where[loc]}: {_dotted(loc)}: a number of {len(node.value)} digits")
            return self.construct_object(node)
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, place = key_node.value, _place(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{place}: a key must be a plain word, not a list or a mapping")
            if key in data:
                raise ConfigError(f"{place}: {_dotted((*loc, key))}: is given twice; keep one of them")
            data[key] = self.plain(value_node, (*loc, key), where)
            where[(*loc, key)] = place
        return data


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes the texts which `_Loader` would take for numbers, such as `1e4`."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def load(path: Path | str, model: type[Model], overrides: Sequence[str] = ()) -> Model:
    """Read one YAML file, apply `dotted.key=value` overrides and validate.

    Raises ConfigError with one line a problem, `file:line: key: what was found and what is wanted`.
    """
    try:
        raw = Path(path).read_bytes()
        text = raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: {len(raw)} bytes are too many for a configuration (limit {MAX_BYTES})")
    return parse(text, model, overrides, source=str(path))


def parse(text: str, model: type[Model], overrides: Sequence[str] = (), source: str = "<text>") -> Model:
    """As `load`, from text; `source` names it in errors."""
    data, where = _read(text, source)
    for override in overrides:
        _override(data, where, override, model)
    field, paper = model.model_fields.get("paper"), data.get("paper")
    if field is not None and paper is not None and paper not in (ours := get_args(field.annotation)):
        place = f"{where[('paper',)]}: paper"
        raise ConfigError(f"{place}: this is a configuration of {paper!r}; this command takes those of {ours[0]!r}")
    try:
        return model.model_validate_json(json.dumps(data))
    except ValidationError as error:
        problems = [_explain(model, dict(item), where) for item in error.errors(include_url=False)]
        raise ConfigError("\n".join(dict.fromkeys(problems))) from None


def dump(config: Section) -> str:
    """The resolved configuration as YAML that `parse` reads back to an equal one."""
    data = config.model_dump(mode="json")
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110))


def schema(model: type[Section]) -> str:
    """JSON schema of a configuration, for editors: of what a file may say, a kind by its name alone included."""
    found = model.model_json_schema()
    by_name = {f for v in model.__pydantic_decorators__.field_validators.values() for f in v.info.fields}
    for name, field in found["properties"].items():
        if name in by_name and "discriminator" in field:  # the model takes the name for {name: ...}
            short = {"type": "string", "enum": sorted(field["discriminator"]["mapping"])}
            field["anyOf"] = [short, {"oneOf": field.pop("oneOf")}]
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **found}, indent=1) + "\n"


def differences(old: Section, new: Section) -> list[str]:
    """One line a leaf that differs between two configurations: `key: old -> new`."""
    before, after = _leaves(old.model_dump(mode="json")), _leaves(new.model_dump(mode="json"))
    return [f"{k}: {before.get(k)!r} -> {after.get(k)!r}" for k in {**before, **after} if before.get(k) != after.get(k)]


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, item in value.items() for k, v in _leaves(item, f"{prefix}.{key}".lstrip(".")).items()}


def _read(text: str, source: str) -> tuple[dict[str, Any], dict[Location, str]]:
    """The data, and for each location in it the place in the source."""
    where: dict[Location, str] = {}
    try:
        loader = _Loader(text)
        loader.name = source
        root = loader.get_single_node()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        place = f"{source}:{mark.line + 1}" if mark else source
        raise ConfigError(f"{place}: is not valid YAML: {problem}") from None
    if not isinstance(root, yaml.MappingNode):
        found = "nothing" if root is None else "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
        raise ConfigError(f"{source}: holds {found}; a configuration is a mapping of keys to values")
    data = loader.plain(root, (), where)
    return data, {**where, (): source}


def _override(data: dict[str, Any], where: dict[Location, str], override: str, model: type[Section]) -> None:
    place = f"{_one_line(override)} (command line)"
    key, equals, text = override.partition("=")
    parts = tuple(key.strip().split("."))
    if not equals or not all(parts):
        raise ConfigError(f"{place}: an override is dotted.key=value, for example seed=1 or data.name=sample")
    holder, lines = _read(f"value: {text}" if text.strip() else "value: ''", place)
    if set(holder) != {"value"}:
        raise ConfigError(f"{place}: holds more than one value")
    for depth, part in enumerate(parts[:-1], 1):
        section = data.get(part)
        if not isinstance(section, dict):  # `optimizer: sgd` is short for `optimizer: {name: sgd}`
            data[part] = section = {"name": section} if isinstance(section, str) else {}
            where[parts[:depth]] = place
        data = section
    old, value = data.get(parts[-1]), holder["value"]
    if len(parts) == 1 and isinstance(old, dict) and isinstance(value, str) and parts[0] in model.model_fields:
        # Another kind by its name alone: what the file says of keys that both kinds have stays.
        kinds = [m for m in _models(model.model_fields[parts[0]].annotation) if value in _names(m)]
        data[parts[0]] = {k: v for k, v in old.items() if any(k in m.model_fields for m in kinds)} | {"name": value}
        where[(*parts, "name")] = where[parts] = place
        return
    data[parts[-1]] = value
    for loc in [loc for loc in where if loc[: len(parts)] == parts]:
        del where[loc]
    where.update({(*parts, *loc[1:]): place for loc in lines if loc})


def _explain(model: type[Section], item: dict[str, Any], where: dict[Location, str]) -> str:
    """One problem of pydantic's in the words of the file: place, key, what was found, what is wanted."""
    loc, known, note = _locate(model, item["loc"])
    kind, context, found = item["type"], item.get("ctx", {}), item["input"]
    if kind.startswith("union_tag"):  # pydantic names the section; the key that chooses its kind is meant
        loc, found = (*loc, context["discriminator"].strip("'")), context.get("tag")
    choices = re.findall(r"'([^']*)'", str(context.get("expected") or context.get("expected_tags")))
    wanted, given = (known, loc[-1]) if kind == "extra_forbidden" else (choices, found)
    close = difflib.get_close_matches(str(given), wanted, n=1, cutoff=0.5)
    if kind == "extra_forbidden":  # a key of another section is named whole
        close = [key for key in _keys(model) if key.rpartition(".")[2] == given and key != _dotted(loc)] or close
    meant = f"did you mean {' or '.join(map(repr, close))}?" if close else ""
    text = MESSAGES.get(kind, "{found} does not fit: {message}{note}").format_map({
        **context, "found": repr(found)[:60], "message": item["msg"][0].lower() + item["msg"][1:],
        "note": f"; it is {note}" if note else "", "hint": meant or f"known keys: {', '.join(known)}",
        "close": f"{meant} ".lstrip(), "choices": ", ".join(choices),
    })  # fmt: skip
    place = next(where[loc[:n]] for n in range(len(loc), -1, -1) if loc[:n] in where)
    return f"{place}: {_dotted(loc)}: {text}" if loc else f"{place}: {text}"


def _locate(model: type[Section], loc: Location) -> tuple[Location, list[str], str | None]:
    """Of a location of pydantic's: the one in the file, the keys that are known there, and the field's description."""
    models, kept, note = [model], list[str | int](), None
    for part in loc:
        fields = [m.model_fields[str(part)] for m in models if part in m.model_fields]
        members = [m for m in models if any(part in get_args(f.annotation) for f in m.model_fields.values())]
        if fields:
            models, note = _models(fields[0].annotation), fields[0].description
        elif members and len(models) > 1:  # the tag of a union's member: pydantic names it, the file does not
            models = members
            continue
        kept.append(part)
    return tuple(kept), list(dict.fromkeys(name for m in models for name in m.model_fields)), note


def _keys(model: type[Section]) -> list[str]:
    """The dotted names of all keys that a configuration may have."""
    deeper = [f"{name}.{key}" for name, field in model.model_fields.items()
              for inner in _models(field.annotation) for key in _keys(inner)]  # fmt: skip
    return list(dict.fromkeys([*model.model_fields, *deeper]))


def _models(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [found for arg in get_args(annotation) for found in _models(arg)]


def _names(model: type[Section]) -> tuple[Any, ...]:
    """The names by which a configuration chooses this kind of section."""
    return get_args(model.model_fields["name"].annotation) if "name" in model.model_fields else ()


def _place(found: Any) -> str:
    """`file:line` of a YAML node or event."""
    return f"{found.start_mark.name}:{found.start_mark.line + 1}"


def _dotted(loc: Location) -> str:
    return _one_line(".".join(str(part) for part in loc))


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
