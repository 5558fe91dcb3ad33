"""Files that people write or programs kept, as typed values; what is wrong is said with its place and its cure."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect

from parties.errors import LocalError
from parties.files import read_bytes

CURES = {  # what a reader expected and got, and what to write
    ("str", "number"): "write it in quotes",
    ("number", "str"): "write it without quotes",
    ("array", "str"): 'write it as a list: ["..."]',
}
NUMBERS = ("int", "float")


def parse_toml(path: Path, type: Any, what: str) -> Any:
    """A TOML file as `type`. Raises LocalError that names the file, the field and what may stand there."""
    return _parse(path, what, type, lambda data: msgspec.toml.decode(data, type=type), "TOML")


def parse_json(path: Path, type: Any, what: str) -> Any:
    """A JSON file as `type`. Raises LocalError that names the file, the field and what may stand there."""
    return _parse(path, what, type, lambda data: msgspec.json.decode(data, type=type), "JSON")


def _parse(path: Path, what: str, type: Any, decode: Callable[[bytes], Any], form: str) -> Any:
    data = read_bytes(path, what)
    try:
        return decode(data)
    except msgspec.ValidationError as error:
        text = str(error)
        shown = text.replace("$.", "").replace("`", "'")
        raise LocalError(f"{path}: {shown}{_cure(text, _type_info(type))}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise LocalError(f"{path} is not valid {form}: {error}") from None
    except RecursionError:
        raise LocalError(f"{path} is not valid {form}: it is nested too deeply") from None


_type_info = cache(inspect.type_info)


def _cure(text: str, whole: inspect.Type) -> str:
    """What may stand in the place that msgspec complains of: the nearest name, all of them where none is near."""
    place = re.search(r" - at (`key` in )?`\$(.*)`$", text)
    found = list(_at(whole, place[2] if place else ""))
    if place and place[1]:
        found = [one.key_type for one in found if isinstance(one, inspect.DictType)]
    if unknown := re.match(r"Object contains unknown field `(.*?)`", text):
        allowed = [field.encode_name for one in found if isinstance(one, inspect.StructType) for field in one.fields]
        return _nearest(unknown[1], allowed)
    if wrong := re.match(r"Invalid enum value '?(.*?)'?(?: - at |$)", text):
        values = [str(value) for one in found if isinstance(one, inspect.LiteralType) for value in one.values]
        return _nearest(wrong[1], values)
    if kinds := re.match(r"Expected `(\w+).*?`, got `(\w+)`", text):
        expected, got = ("number" if one in NUMBERS else one for one in kinds.groups())
        cure = CURES.get((expected, got))
        return f"; {cure}" if cure else ""
    if text.startswith("Expected `str` of length >= 1 "):
        return "; it is empty: fill it in"
    return "; add it" if text.startswith("Object missing required field") else ""


def _at(whole: inspect.Type, path: str) -> Iterator[inspect.Type]:
    """The types that a path such as `.parties[0].role` may lead to."""
    if isinstance(whole, inspect.UnionType):
        for one in whole.types:
            yield from _at(one, path)
    elif not path:
        yield whole
    elif step := re.match(r"\.(\w+)|\[[^\]]*\]", path):
        rest = path[step.end() :]
        if isinstance(whole, inspect.StructType):
            for field in whole.fields:
                if field.encode_name == step[1]:
                    yield from _at(field.type, rest)
        elif isinstance(whole, inspect.DictType):
            yield from _at(whole.value_type, rest)
        elif isinstance(whole, (inspect.ListType, inspect.VarTupleType)):
            yield from _at(whole.item_type, rest)


def _nearest(word: str, allowed: list[str]) -> str:
    near = difflib.get_close_matches(word, allowed, 1)
    if near or not allowed:
        return f"; did you mean {near[0]!r}?" if near else ""
    return f"; allowed are {', '.join(map(repr, allowed))}"
