"""The grammar of a merge's text: from characters to the parts of a merge, in one pass.

    ties(0.7*sql, 0.3*chat, density=0.5)        a call: sources, then options by keyword
    ties(0.7 sql + 0.3 chat; density 0.5)       the same, without the characters that gateways change
    0.7*sql + 0.3*chat - 0.2*toxic              a sum, short for sum(0.7*sql, 0.3*chat, -0.2*toxic)

White space is free, except that a ``-`` between terms has it on both sides:

    spec   = call | sum
    call   = strategy "(" [(term | option) ("," (term | option))* [","]] ")"
           | strategy "(" sum (";" plain)* [";"] ")"
    sum    = term (("+" | "-") term)*
    term   = ["+" | "-"] [weight] name
    weight = number "*"  or a number and white space
    option = word "=" (value | "[" number ("," number)* "]")
    plain  = word ["="] (value | "[" number ([","] number)* "]")
    value  = number | "true" | "false" | string | dotted
    dotted = [A-Za-z_][A-Za-z0-9_.]*
    name   = [A-Za-z0-9_][A-Za-z0-9_./:-]*  or a JSON string in double quotes

A text that may be a plain name with a space in it, such as ``2024 release``, is refused.

Knows nothing of what options mean, nor of which names are allowed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection

from .errors import SpecError
from .recipe import Parts, Value
from .strategies import find

BARE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./:-]*")
CALL = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*)\s*\(")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
_UNSIGNED = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_NUMBER = re.compile(rf"[+-]?{_UNSIGNED}")
_WEIGHT = re.compile(rf"({_UNSIGNED})\s*\*\s*")
_SPACED_WEIGHT = re.compile(rf'({_UNSIGNED})\s+(?=["A-Za-z0-9_])')
_UNSTARRED = re.compile(rf"({_UNSIGNED})(.+)", re.DOTALL)
_STRING = re.compile(r'"(?:[^"\\\x00-\x1f]|\\.)*"')
_OPTION = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)\s*=")
_PLAIN_OPTION = re.compile(r'([A-Za-z_][A-Za-z0-9_]*)(?:\s*=|\s+|(?=["\[]))')
_SPACE = re.compile(r"\s*")

Term = tuple[str, float]
"""A source with its weight."""


def parts_of(text: str, may_be_name: bool) -> Parts:
    """The parts of a merge in a text; raises SpecError, which says what was expected and where.

    may_be_name: whether the text may be a plain name, so that white space joins nothing.
    """
    return _Parser(text, may_be_name).parts()


def meant_by(name: str, known: Collection[str]) -> str | None:
    """The terms that were meant by a name that nothing has, ``0.5a`` or ``a-b``; None unless names are known.

    known: the names that there are.
    """
    weight = _UNSTARRED.fullmatch(name)
    if weight and weight[2] in known:
        return f"{weight[1]}*{weight[2]}"
    halves = ((name[:i], name[i + 1 :]) for i, character in enumerate(name) if character == "-")
    return next((f"{one} - {two}" for one, two in halves if one in known and two in known), None)


class _Parser:
    """One pass over the text without recursion: any text is refused in time linear in its length."""

    def __init__(self, text: str, may_be_name: bool) -> None:
        self.text = text
        self.at = 0
        self.may_be_name = may_be_name

    def parts(self) -> Parts:
        call = CALL.match(self.text)
        if call is None:
            return self.sum()
        find(call[1])  # an unknown strategy is reported before any mistake in its sources
        self.at = call.end()
        sources: list[Term] = []
        options: list[tuple[str, Value]] = []
        while not self.take(")"):
            option = self.match(_OPTION)
            if option:
                options.append((option[1], self.value()))
            elif options:
                raise self.expected("an option (sources come before options)")
            else:
                sources.append(self.term())
                if len(sources) == 1 and self.next() in ("+", "-", ";"):
                    sources, options = self.joined(sources[0])
                    break
            if not self.take(","):
                if not self.take(")"):
                    mixed = self.next() in ("+", ";")
                    raise self.expected("',' or ')'" + " ('+' and ';' do not go with ',')" * mixed)
                break
        self.end()
        return call[1], sources, options

    def joined(self, first: Term) -> tuple[list[Term], list[tuple[str, Value]]]:
        """The rest of a call whose sources are joined by ``+`` and whose options follow a ``;``."""
        sources = self.terms(first)
        options: list[tuple[str, Value]] = []
        while self.take(";") and self.next() != ")":
            option = self.match(_PLAIN_OPTION)
            if not option:
                raise self.expected("an option and its value")
            options.append((option[1], self.value(plain=True)))
        if not self.take(")"):
            between = "" if options else "'+', '-' with white space around it, "
            mixed = self.next() == ","
            raise self.expected(f"{between}';' or ')'" + " (',' does not go with '+' and ';')" * mixed)
        return sources, options

    def sum(self) -> Parts:
        sources = self.terms(self.term())
        if self.skip() < len(self.text):
            weight = re.match(rf"\s*{_UNSIGNED}\s+[A-Za-z0-9_]", self.text)
            hint = " (a weight is written 0.5*a)" * bool(weight)
            raise self.expected(f"'+', or '-' with white space around it, between terms{hint}")
        return "sum", sources, []

    def terms(self, first: Term) -> list[Term]:
        """The terms of a sum, of which the first has been read."""
        sources = [first]
        while (sign := self.sign_between()) is not None:
            name, weight = self.term(signed=False)
            sources.append((name, sign * weight))
        return sources

    def sign_between(self) -> int | None:
        self.skip()
        spaced = self.text[self.at - 1 : self.at].isspace() and self.text[self.at + 1 : self.at + 2].isspace()
        sign = {"+": 1, "-": -1 if spaced else None}.get(self.text[self.at : self.at + 1])
        if sign is not None:
            self.at += 1
        return sign

    def term(self, signed: bool = True) -> Term:
        sign = -1.0 if signed and self.take("-") else 1.0
        if sign > 0 and signed:
            self.take("+")
        weight = self.match(_WEIGHT)
        if not weight and not self.may_be_name:
            weight = self.match(_SPACED_WEIGHT)
        name = self.name()
        if self.text[self.at : self.at + 1] == "(":
            if self.text.lstrip().startswith(f"{name}("):
                find(name)
            raise SpecError(f"{name!r} is used as a merge within a merge; merge it first and name the result")
        if self.next() == "*":
            if name.lower() in ("nan", "inf", "infinity"):
                raise SpecError(f"a weight must be a finite number, got {name}")
            hint = f"; a '-' between terms needs white space around it ({name!r} was read as one name)"
            raise SpecError(
                f"write the weight before the name: 0.5*{name[:64]}" + (hint if "-" in name else "")
            )
        return name, sign * float(weight[1]) if weight else sign

    def name(self) -> str:
        self.skip()
        quoted = self.match(_STRING)
        if quoted:
            return self.unquoted(quoted[0])
        bare = self.match(BARE)
        if not bare:
            weight = re.match(rf"{_UNSIGNED}[A-Za-z0-9_]", self.text[self.at :])
            raise self.expected("an adapter's name" + " (a weight is written 0.5*a)" * bool(weight))
        return bare[0]

    def value(self, plain: bool = False) -> Value:
        """The value of an option; if ``plain``, white space alone may separate the numbers of a list."""
        self.skip()
        if self.take("["):
            numbers: list[float] = []
            while not self.take("]"):
                self.skip()
                number = self.match(_NUMBER)
                if not number:
                    raise self.expected("a number")
                numbers.append(float(number[0]))
                if not self.take(","):
                    if self.take("]"):
                        break
                    if not (plain and self.text[self.at - 1].isspace()):
                        raise self.expected("',' or ']'")
            return tuple(numbers)
        quoted = self.match(_STRING)
        if quoted:
            return self.unquoted(quoted[0])
        number = self.match(_NUMBER)
        if number:
            # A whole number stays exact (a seed has up to 63 bits); one with more digits is out of any range.
            return int(number[0]) if re.fullmatch(r"[+-]?[0-9]{1,30}", number[0]) else float(number[0])
        word = self.match(_WORD)
        if not word:
            other = self.next() not in ("", ")", ",", ";")
            raise self.expected("a value" + " (in double quotes, unless it is a word or a number)" * other)
        return {"true": True, "True": True, "false": False, "False": False}.get(word[0], word[0])

    def unquoted(self, text: str) -> str:
        try:
            return str(json.loads(text))
        except ValueError:
            raise SpecError(f"{text[:64]} is not a JSON string") from None

    def match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        found = pattern.match(self.text, self.skip())
        if found:
            self.at = found.end()
        return found

    def take(self, character: str) -> bool:
        if self.next() != character:
            return False
        self.at += 1
        return True

    def next(self) -> str:
        """The next character after white space; empty at the end."""
        return self.text[self.skip() : self.at + 1]

    def skip(self) -> int:
        self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
        return self.at

    def end(self) -> None:
        if self.skip() < len(self.text):
            raise self.expected("the end")

    def expected(self, what: str) -> SpecError:
        found = repr(self.text[self.at : self.at + 24]) if self.at < len(self.text) else "the end"
        return SpecError(f"at character {self.at + 1} of the spec: expected {what}, found {found}")
