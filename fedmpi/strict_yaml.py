"""YAML as people mean it: YAML 1.2's core schema, each key once, and a bound on what a file may grow to.

PyYAML reads YAML 1.1, in which ``on`` and ``no`` are booleans, ``0100`` is 64, ``1:30`` is 90 and ``1e-3`` is text,
and of two equal keys it takes the last without a word. Here ``true`` and ``false`` alone are booleans; what the two
versions read as different numbers (``0100``, ``1_000``, ``0b11``) is refused, since either may be meant.
"""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar

import yaml
from yaml.constructor import ConstructorError, SafeConstructor
from yaml.nodes import MappingNode, Node, ScalarNode

DEEPEST = 100  # levels of keys in keys
_ALIASED = 10_000  # values that all aliases of a text may stand for
_WORDS = ("yes", "no", "on", "off")

_TAG = "tag:yaml.org,2002:"
_AMBIGUOUS = re.compile(r"[-+]?(0[0-9][0-9_]*|[1-9][0-9_]*_[0-9_]*|0b[01_]+|0x[0-9a-fA-F_]*_[0-9a-fA-F_]*)")
_INT = re.compile(r"[-+]?([0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_SCHEMA = (
    ("int", re.compile(f"(?:{_AMBIGUOUS.pattern}|{_INT.pattern})$"), "-+0123456789"),
    ("float", re.compile(f"(?:{_FLOAT.pattern})$"), "-+.0123456789"),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("merge", re.compile(r"(?:<<)$"), "<"),
)


class Word(str):
    """A bare ``yes``, ``no``, ``on`` or ``off``: text, which whoever wrote it may have meant as a boolean."""

    __slots__ = ()


class NotYaml(ValueError):
    """One sentence with the line; ``syntax`` when the text is no YAML at all."""

    def __init__(self, text: str, line: int | None = None, syntax: bool = False) -> None:
        super().__init__(text)
        self.line, self.syntax = line, syntax


class _Refusal(yaml.MarkedYAMLError):
    """What YAML allows and this reader does not."""

    def __init__(self, problem: str, at: Any) -> None:
        super().__init__(problem=problem, problem_mark=at)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 (as PyYAML's classes have it: not those of its base)
    yaml_constructors: ClassVar[dict[str | None, Any]] = {
        f"{_TAG}{name}": SafeConstructor.yaml_constructors[f"{_TAG}{name}"] for name in ("null", "seq", "map")
    } | {None: SafeConstructor.construct_undefined}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._aliased = 0
        self._measured: dict[int, tuple[int, int]] = {}  # of a finished node: values in it, levels in it
        self._checked: set[int] = set()

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._measured:
                raise _Refusal(
                    f"the alias *{event.anchor} stands inside its own anchor",
                    event.start_mark,
                )
            size, levels = self._measured[id(node)]
            self._aliased += size
            if self._aliased > _ALIASED:
                text = f"aliases stand for more than {_ALIASED:,} values; write out what is meant"
                raise _Refusal(text, event.start_mark)
            self._at_most(self._depth + levels, event.start_mark)
            return node
        self._depth += 1
        self._at_most(self._depth, event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        parts = (
            []
            if isinstance(node, ScalarNode) or node is None
            else [
                self._measured[id(part)]
                for item in node.value
                for part in (item if isinstance(item, tuple) else (item,))
            ]
        )
        self._measured[id(node)] = (1 + sum(s for s, _ in parts), 1 + max((d for _, d in parts), default=0))
        return node

    def _at_most(self, depth: int, mark: Any) -> None:
        if depth > DEEPEST:
            raise _Refusal(f"more than {DEEPEST} levels of nesting", mark)

    def flatten_mapping(self, node: MappingNode) -> None:
        """Before merge keys are laid under a mapping's own, none of these may stand twice."""
        if id(node) not in self._checked:
            self._checked.add(id(node))
            lines: dict[str, int] = {}
            for key, _ in node.value:
                if not isinstance(key, ScalarNode) or key.tag not in (f"{_TAG}str", f"{_TAG}merge"):
                    said = repr(key.value[:40]) if isinstance(key, ScalarNode) else f"a {key.id}"
                    raise _Refusal(
                        f"expected text as a key, got {said}; put it into quotes",
                        key.start_mark,
                    )
                line = key.start_mark.line + 1
                if key.value in lines:
                    text = (
                        f"the key {key.value[:80]!r} stands twice, first in line {lines[key.value]}; keep one"
                    )
                    raise _Refusal(text, key.start_mark)
                lines[key.value] = line
        super().flatten_mapping(node)

    def _text(self, node: ScalarNode) -> str:
        bare = node.style is None and node.value.lower() in _WORDS
        return Word(node.value) if bare else str(node.value)

    def _bool(self, node: ScalarNode) -> bool:
        return _words(node, "true or false", {"true": True, "false": False})

    def _int(self, node: ScalarNode) -> int:
        text = node.value
        if _AMBIGUOUS.fullmatch(text):
            problem = (
                f"{text[:40]} is one number in YAML 1.1 and another or text in 1.2; write it without leading "
            )
            problem += "zeros and underscores (octal: 0o17), or in quotes if it is text"
            raise _Refusal(problem, node.start_mark)
        if not _INT.fullmatch(text):
            raise _Refusal(f"expected an integer, got {text[:40]!r}", node.start_mark)
        found = int(text, 0) if len(text) <= 24 else 1 << 64
        if not -(2**63) <= found < 2**63:
            problem = f"expected an integer of 64 bits, got {text[:40]}{'…' if len(text) > 40 else ''}"
            raise _Refusal(problem, node.start_mark)
        return found

    def _float(self, node: ScalarNode) -> float:
        found = (
            float(node.value)
            if _FLOAT.fullmatch(node.value) and node.value[-1:].lower() not in "fn"
            else math.nan
        )
        if not math.isfinite(found):
            raise _Refusal(f"expected a finite number, got {node.value[:40]}", node.start_mark)
        return found


def _words(node: ScalarNode, expected: str, table: dict[str, bool]) -> bool:
    if node.value.lower() not in table:
        raise _Refusal(f"expected {expected}, got {node.value[:40]!r}", node.start_mark)
    return table[node.value.lower()]


for _name, _pattern, _first in _SCHEMA:
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, list(_first))
_Loader.add_constructor(f"{_TAG}str", _Loader._text)
_Loader.add_constructor(f"{_TAG}bool", _Loader._bool)
_Loader.add_constructor(f"{_TAG}int", _Loader._int)
_Loader.add_constructor(f"{_TAG}float", _Loader._float)


class _Dumper(yaml.SafeDumper):
    """Puts into quotes what either version of YAML would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern, _first in _SCHEMA:
    _Dumper.add_implicit_resolver(_TAG + _name, _pattern, list(_first))
_Dumper.add_representer(Word, lambda dumper, word: dumper.represent_str(str(word)))


def parse(text: str) -> Any:
    """What a YAML text holds: dicts with text as keys, lists, text, finite numbers, booleans and None.

    No two places share a dict or list, though aliases name them: each may be changed alone.

    Raises:
      NotYaml: it is no YAML, or is one of the things above; one sentence.
    """
    try:
        return _apart(_Loader(text).get_single_data())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or error.context or "no YAML"
        if "'\\t'" in problem:
            problem = "found a tab where an indent or a value begins; expected spaces"
        syntax = not isinstance(error, _Refusal | ConstructorError)
        raise NotYaml(problem[:300], mark.line + 1 if mark else None, syntax) from None
    except yaml.YAMLError as error:  # a character that no YAML has
        raise NotYaml(str(error).splitlines()[0][:300], syntax=True) from None
    except (ValueError, RecursionError) as error:
        raise NotYaml(str(error)[:300], syntax=True) from None


def dump(value: Any, **options: Any) -> str:
    """YAML that :func:`parse`, and a reader of YAML 1.1, read as ``value``."""
    return str(yaml.dump(value, Dumper=_Dumper, **options))


def _apart(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _apart(part) for key, part in value.items()}
    return [_apart(part) for part in value] if isinstance(value, list) else value
