"""YAML files as ``fit`` reads them, but strict: no key twice, plain values only, and every refusal is one line with file and line.

YAML keeps the last of two equal keys, and half of what somebody wrote would silently be nothing. YAML and the standard library only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
_VALUES = tuple(_TAG + kind for kind in ("null", "bool", "int", "float", "str", "seq", "map"))
_MERGE = _TAG + "merge"
_EXPONENT = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
_EXPECTED = "text (quoted), a number, true, false, null, a list or a mapping"


def read_yaml(path: str | Path) -> Any:
    """The plain data of a file: text, numbers, truth values, None, lists and dictionaries; merge keys (``<<``) are merged.

    Raises:
        ValueError: in one line, if the file is not YAML, has a key twice, or has values of other kinds.
    """
    try:
        return _parsed(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8 text") from error
    except _Refused as error:
        raise ValueError(f"{path}: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {_one_line(error)}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: too many brackets inside each other; is one not closed?") from error
    except (ValueError, LookupError, ArithmeticError) as error:  # from a constructor: !!int x, 0b_
        raise ValueError(f"{path}: a value that is not what its tag or form says ({_one_line(error)})") from error


def check_config_files(arguments: Sequence[str], *defaults: str | Path) -> None:
    """ValueError as of ``read_yaml`` for a file that a command line gives as ``--config``, or that is read before all of them.

    The command's own parser reads them again.
    """
    for path in (*defaults, *_config_files(arguments)):
        if os.path.isfile(path):  # else it is for the parser to say what it thinks of it
            read_yaml(path)


def _config_files(arguments: Sequence[str]) -> Iterator[str]:
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument == "--config":
            yield following
        elif argument.startswith("--config="):
            yield argument.removeprefix("--config=")


def require_plain(value: Any, where: str, name: str = "") -> None:
    """Refuse, in one line, what no setting can have: dates, bytes and sets, and keys that are not text.

    Args:
        where: the file, and the place in it, for the message.
        name: of the setting that has the value.
    """
    place = f"{where}: {name}" if name else where
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{place}: got the key {key!r}, expected text; quote it if it is a name")
            require_plain(item, where, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            require_plain(item, where, f"{name}[{index}]")
    elif value is not None and not isinstance(value, str | int | float):
        raise ValueError(f"{place}: got {value!r:.80}, expected {_EXPECTED}")


class _Refused(ValueError):
    """YAML that another reader would take; the message names the line."""


class _Loader(yaml.SafeLoader):
    """Forms of scalars as in the parser of ``fit``: 1e-3 is a number, a date is text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag != f"{_TAG}timestamp"]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(f"{_TAG}float", _EXPONENT, list("-+0123456789"))


def _parsed(text: str) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        # Before anything is constructed: merging writes the merged keys into the node, beside those that override them.
        _check(node, loader, above=(), done=set())
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _check(node: yaml.Node, loader: _Loader, *, above: tuple[yaml.Node, ...], done: set[yaml.Node]) -> None:
    if node in above:
        raise _Refused(f"{_line(node)}: this anchor contains an alias of itself; write out what is meant")
    if node.tag not in _VALUES:
        raise _Refused(f"{_line(node)}: got a value of the kind {node.tag.removeprefix(_TAG)}, expected {_EXPECTED}")
    if node in done:
        return
    done.add(node)
    children = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        _check_keys(node, loader)
        children = [value for _, value in node.value]
    for child in children:
        _check(child, loader, above=(*above, node), done=done)


def _check_keys(node: yaml.MappingNode, loader: _Loader) -> None:
    first: dict[Any, yaml.Node] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag not in (*_VALUES, _MERGE):
            raise _Refused(f"{_line(key)}: got a key that is neither text nor a number; write a name")
        name = (_MERGE,) if key.tag == _MERGE else loader.construct_object(key, deep=True)
        if name in first:
            cure = "write <<: [*one, *other]" if key.tag == _MERGE else "remove one"
            raise _Refused(f"{_line(key)}: the key {key.value} appears twice (first in {_line(first[name])}); {cure}")
        first[name] = key


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


def _one_line(error: Exception) -> str:
    text = str(error)
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f"line {mark.line + 1}: "
        text = place + ": ".join(part for part in (error.context, error.problem) if part)
    return " ".join(text.split())
