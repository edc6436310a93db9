"""The parser's messages in words for those who wrote the settings. Standard library only."""

from __future__ import annotations

import re

# How the parser says that a setting does not exist, with the parts of its name.
_NOT_A_SETTING = (
    re.compile(r"unrecognized arguments: --(?P<name>[^\s=]+)"),
    re.compile(r"Group '(?P<group>[\w.]+)' does not accept option '(?P<name>[\w.]+)'"),
    re.compile(r'Parser key "(?P<group>[\w.]+)": .*Option \'(?P<name>[\w.]+)\' is not accepted'),
)
# How it says that a value of an optional setting is refused: what each of its types says, and the value at length.
_OF_EACH_TYPE = re.compile(
    r"Does not validate against any of the Union subtypes Subtypes: .*? Errors: - (?P<errors>.*) Given value type: "
    r".* Given value: (?P<value>.*)"
)
_NOT_NULL = "Expected a <class 'NoneType'>"
# And where the value of one setting of a section is wrong: that of the section, as it was passed on, says nothing to anyone.
_INSIDE = re.compile(
    r'Parser key "(?P<group>[\w.]+)": .*Parser key "(?P<name>[\w.]+)": (?P<said>.*?)\.? Got value: NestedArg\('
)


def explained(error: Exception) -> str:
    """What a parser found wrong, in one line, made short where it is about a name, a value, or an optional setting."""
    message = " ".join(str(error).split())
    for pattern in _NOT_A_SETTING:
        found = pattern.search(message)
        if found is not None:
            return f"{'.'.join(found.groupdict().values())}: fit has no such setting"
    message = _OF_EACH_TYPE.sub(_of_each_type, message)
    inside = _INSIDE.search(message)
    return message if inside is None else f"{inside['group']}.{inside['name']}: {inside['said']}"


def _of_each_type(match: re.Match[str]) -> str:
    """A section is left out: what is wrong inside is said already, and it is written as Python."""
    value = "" if match["value"].startswith("Namespace(") else f". Got value: {match['value']}"
    return match["errors"].replace(f" - {_NOT_NULL}", "") + value
