"""An independent reader of problems: works from the text alone and shares no code with the generator."""

import re
from dataclasses import dataclass

FACT = re.compile(r"^([a-z]+): (\d\d)$")
RULE = re.compile(r"^([a-z]+)= ([a-z]+) ([+-])([a-z]+)$")
WORK = r"(\d) ([+-]) (\d) = (\d\d) ; (\d) ([+-]) (\d) ([+-]) (\d) = (\d\d)"
LINE = re.compile(
    rf"^([a-z]+)= ([a-z]+) (\d\d) ([+-])([a-z]+) (\d\d) ; {WORK} ; (?:check ; ({WORK}) ; )?([a-z]+): (\d\d)$"
)


@dataclass
class Read:
    """A problem as the prompt states it."""

    facts: dict[str, int]
    rules: dict[str, tuple[str, str, str]]
    query: str
    mode: str


def read_prompt(prompt: str) -> Read:
    *body, query, mode = prompt.split("\n")
    facts, rules = {}, {}
    for line in body:
        if match := FACT.match(line):
            assert not rules, "facts come first"
            assert match[1] not in facts
            facts[match[1]] = int(match[2])
        else:
            match = RULE.match(line)
            assert match, line
            assert match[1] not in rules and match[1] not in facts
            rules[match[1]] = (match[2], match[3], match[4])
    assert query.startswith("? ")
    return Read(facts, rules, query[2:], mode)


def value_of(name: str, read: Read, known: dict[str, int]) -> int:
    """The value of a name, worked out backwards from the query by plain integers."""
    if name not in known:
        if name in read.facts:
            known[name] = read.facts[name]
        else:
            left, op, right = read.rules[name]
            a, b = value_of(left, read, known), value_of(right, read, known)
            known[name] = (a + b if op == "+" else a - b) % 100
    return known[name]


def check_line(line: str, read: Read, known: dict[str, int]) -> tuple[str, str, str]:
    """Recompute a line of the chain of thought; return (result, left, right)."""
    match = LINE.match(line)
    assert match, line
    name, left, left_value, op, right, right_value, *work = match.groups()
    assert read.rules[name] == (left, op, right)
    assert value_of(left, read, known) == int(left_value)
    assert value_of(right, read, known) == int(right_value)
    x0, op0, y0, low, x1, op1, y1, op2, carry, high = work[:10]
    assert (x1 + x0, y1 + y0) == (left_value, right_value)
    assert {op0, op1, op2} == {op}
    # Schoolbook arithmetic: the carry or borrow is what the last digits leave over.
    if op == "+":
        assert int(low) == int(x0) + int(y0)
        assert int(high) == int(x1) + int(y1) + int(carry)
        assert int(carry) == (int(x0) + int(y0) > 9)
    else:
        assert int(low[1]) == (int(x0) - int(y0)) % 10
        assert int(high[1]) == (int(x1) - int(y1) - int(carry)) % 10
        assert int(low[0]) == int(carry) == (int(x0) < int(y0))
        assert int(high[0]) == (int(x1) < int(y1) + int(carry))
    again, result, value = work[10], *match.groups()[-2:]
    assert (again is not None) == (read.mode == "#check")
    if again is not None:
        assert again == line.split(" ; check ; ")[0].partition(" ; ")[2]
    assert result == name
    assert value == high[1] + low[1]
    assert int(value) == value_of(name, read, known)
    return name, left, right
