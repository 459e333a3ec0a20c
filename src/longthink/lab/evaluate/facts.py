"""The task ``fact``: ordinary sentences, one of which states what is asked some tokens later.

A problem is a prompt and a text of the model's side, given to it: a few sentences, the fact, `distance` tokens of
other sentences with distractors of the same form, and a question. Where words are not cut into many tokens, the texts
of a task have one length, so that they are read side by side.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

PROMPT = (
    "Write a long report about a small town and its people. "
    "At the end, ask a question about one of the details and answer it."
)
DISTANCES = (50, 200, 500, 1000, 2000)
"""Those of the plain name ``fact``."""
SHORTEST, LONGEST = 16, 8192
"""Allowed distances."""
MAX_NEW_TOKENS = 8
"""Enough for every value where a word is not cut into letters; what follows the value does not count."""

_LEAD = 16  # fewest tokens before the fact
_ROUND = 64  # lead, fact and question together are a multiple of this
_DISTRACTORS = 0.25  # share of the sentences that state a value, half of them of the kind that is asked for
_TRIES = 400  # endings drawn in search of one that ends at the exact token

PLACES = (
    "station|bakery|library|school|harbour|mill|chapel|hotel|brewery|museum|hospital|theatre|market|"
    "pharmacy|lighthouse|sawmill|cinema|castle|barracks|dairy|foundry|orphanage|observatory|vineyard|"
    "monastery|quarry|prison|shipyard|greenhouse|post office|town hall|fire house|tannery|swimming pool|"
    "tennis club|bus depot|flower shop|toy shop|book shop|fish shop|north tower|south tower|boat house|"
    "guest house"
).split("|")
NAMES = (
    "Abigail Albert Amanda Andrew Barbara Bernard Bridget Caroline Charles Christine Claire Clara Daniel "
    "Deborah Dorothy Douglas Edgar Edith Edward Eleanor Elizabeth Emily Eric Ethan Felix Florence Frances "
    "Frank George Gloria Harold Harriet Helen Henry Howard Isabel Jacob Janet Jennifer Jessica Joseph Julia "
    "Karen Kevin Laura Lawrence Leonard Linda Louise Marcus Margaret Martha Martin Matthew Michael Nancy "
    "Natalie Nathan Nicholas Oliver Oscar Patricia Patrick Pauline Philip Rachel Raymond Rebecca Richard "
    "Robert Roger Ruth Samuel Sandra Sarah Simon Sophie Stephen Susan Theodore Thomas Timothy Ursula Victor "
    "Victoria Vincent Walter William"
).split()
COLOURS = (
    "amber beige black blue brown copper cream crimson gold gray green indigo ivory lavender lime magenta "
    "maroon navy olive orange pink purple red scarlet silver teal turquoise violet white yellow"
).split()


@dataclass(frozen=True)
class Kind:
    """A form of statement about a place, the question that asks for its value, and the values."""

    statement: str
    question: str
    values: Sequence[Any]

    def begin(self, place: str) -> str:
        """The statement without the value."""
        return self.statement.format(place=place)

    def ask(self, place: str) -> str:
        """The question, and the beginning of its answer."""
        return f"{self.question.format(place=place)} {self.begin(place)}"


KINDS = (
    Kind(
        "The code of the locker at the {place} is", "What is the code of the locker at the {place}?",
        range(1000, 10_000),
    ),
    Kind("The name of the keeper of the {place} is", "What is the name of the keeper of the {place}?", NAMES),
    Kind("The colour of the door of the {place} is", "What is the colour of the door of the {place}?", COLOURS),
    Kind(
        "The number on the gate of the {place} is", "What is the number on the gate of the {place}?", range(100, 1000)
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Fact:
    kind: Kind
    place: str
    value: str

    def __str__(self) -> str:
        return f"{self.kind.begin(self.place)} {self.value}."


# No colour, no digit and no name of a keeper: the value of a fact is in the text once.
_SLOTS = {
    "who": "the teacher|the farmer|the nurse|the carpenter|the postman|the gardener|the tailor|the "
    "fisherman|the painter|the doctor|the cook|the driver|a young girl|an old man|the widow|the musician|"
    "the butcher|the student|a stranger|the miller's son|the choir|the mayor's wife|a tired clerk|the new "
    "neighbour|the watchmaker",
    "thing": "a basket of apples|a wooden chair|an old map|a letter|a broken clock|a bag of flour|a pair of "
    "boots|a long rope|a lamp|a bottle of cider|a bicycle|a violin|a heavy trunk|a loaf of bread|a woollen "
    "coat|a box of candles|a garden tool|a wet umbrella|a jar of honey|a sack of coal|a small radio|a "
    "picture frame|a stack of newspapers",
    "where": "near the river|behind the church|on the hill|under the old oaks|by the well|in the narrow "
    "street|beside the canal|at the edge of the forest|along the railway|in the back yard|outside the walls|"
    "next to the fountain|on the village green|below the dam|across the square|at the crossroads|in front "
    "of the barn",
    "when": "in the morning|after lunch|before sunset|late in the evening|on the first day of spring|during "
    "the storm|in early autumn|at noon|every week|once a month|on market day|after the harvest|in the "
    "middle of winter|last summer|when the bells rang|shortly before dinner|as soon as the rain stopped",
    "animal": "dog|cat|horse|goat|goose|donkey|sheep|rabbit|duck|hen|calf|crow",
    "food": "soup|cheese|plum cake|roast potatoes|fresh bread|apple pie|smoked fish|pancakes|bean stew|"
    "mushrooms|dumplings|rice pudding",
    "mood": "happy|tired|curious|quiet|nervous|proud|cheerful|worried|surprised|calm|angry|patient",
    "weather": "rain|snow|wind|fog|frost|sunshine|thunder|hail",
}
_TEMPLATES = (
    "{Who} carried {thing} home {when}.",
    "{Who} left {thing} {where}.",
    "{When}, {who} sat down {where} and rested.",
    "There was {weather} {when}, so {who} stayed at home.",
    "{Who} bought {thing} and forgot it {where}.",
    "A {animal} slept {where} {when}.",
    "{Who} cooked {food} for everybody {when}.",
    "{When}, {who} looked for {thing} without success.",
    "{Who} felt {mood} and walked alone {where}.",
    "Nobody knew why {who} kept {thing} {where}.",
    "{Who} and {who} talked about the {weather} {when}.",
    "The {animal} of a neighbour ran away {when} and was found {where}.",
    "{Who} was {mood}, because the {food} had burned.",
    "{When} people gathered {where} to sing.",
    "{Who} repaired {thing} {when}.",
    "After the {weather}, {who} swept the path {where}.",
    "{Who} gave {thing} to a friend {when}.",
    "The smell of {food} drifted over the roofs {when}.",
    "{Who} fed the {animal} and then went for a walk {where}.",
    "It was {when} that {who} first heard the story.",
    "{Who} promised to bring {food} and {thing}.",
    "{Where_} there used to be a bench, where {who} often waited.",
    "{Who} read the newspaper {where} and seemed {mood}.",
    "Children played {where} until {who} called them in.",
    "{Who} sold {thing} for very little money {when}.",
    "The {weather} lasted for days, and even the {animal} became {mood}.",
    "{Who} wrote a long letter {when} and never sent it.",
    "Somebody had hidden {thing} {where}.",
    "{Who} asked for more {food}, but there was none left.",
    "{When}, the {animal} followed {who} all the way home.",
    "{Who} has lived {where} for many years.",
    "{Who} dropped {thing} and laughed about it.",
    "The road {where} was closed {when}.",
    "{Who} planted vegetables {where}, and {who} helped.",
    "{Who} told a joke, but {who} only looked {mood}.",
    "A cart with {thing} stopped {where} {when}.",
    "{Who} prefers {food} to anything else.",
    "Everybody was {mood} when the {weather} finally ended.",
    "{Who} painted a picture of the {animal} {where}.",
    "{When} the water rose {where}, and {who} moved {thing} upstairs.",
)


def _sentence(rng: random.Random) -> str:
    """One sentence without a value in it."""
    words = rng.choice(_TEMPLATES)
    for slot, texts in _SLOTS.items():
        choices = texts.split("|")
        for name in (slot, slot.capitalize(), f"{slot.capitalize()}_"):
            while (hole := f"{{{name}}}") in words:
                chosen = rng.choice(choices)
                chosen = chosen[0].upper() + chosen[1:] if name != slot else chosen
                words = words.replace(hole, chosen, 1)
    return words


def make_fact(seed: int) -> Fact:
    """The fact of a problem: the same at every distance."""
    rng = random.Random(f"fact/{seed}")
    kind = KINDS[seed % len(KINDS)]
    return Fact(kind, rng.choice(PLACES), str(rng.choice(kind.values)))


def given_ids(seed: int, distance: int, tokenizer: Any) -> list[int]:
    """Tokens of the text that is given: between the fact and the question exactly `distance` of them."""
    fact, rng = make_fact(seed), random.Random(f"fact/{seed}/text")

    def encode(text: str) -> list[int]:
        return _ids_within(text, tokenizer)

    # The lead takes up what facts and questions differ in, for texts of one length.
    told, asked = encode(str(fact)), encode(fact.kind.ask(fact.place))
    lead = -(len(told) + len(asked) + _LEAD) % _ROUND + _LEAD
    plain = _sentences(rng)
    others = _distractors(fact, rng)
    before = _fill(lead, [], lambda: encode(next(plain)))
    first = [encode(next(plain)), encode(str(next(others)))]
    between = _fill(distance, first, lambda: encode(_mixed(plain, others, rng)))
    return [*before, *told, *between, *asked]


def _ids_within(text: str, tokenizer: Any) -> list[int]:
    """Tokens of a sentence behind another one."""
    before: list[int] = tokenizer(".", add_special_tokens=False)["input_ids"]
    both: list[int] = tokenizer(f". {text}", add_special_tokens=False)["input_ids"]
    if both[: len(before)] == before:
        return both[len(before) :]
    alone: list[int] = tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
    return alone


def _fill(count: int, first: Sequence[list[int]], draw: Callable[[], list[int]]) -> list[int]:
    """Exactly `count` tokens of whole sentences, beginning with `first` if those take at most two thirds.

    If no sentences fit, as in a very short text, the last one is cut.
    """
    tokens = [token for piece in first for token in piece]
    if 3 * len(tokens) > 2 * count:
        tokens = []
    while 4 * len(piece := draw()) < count - len(tokens):
        tokens += piece
    for _ in range(_TRIES):
        end: list[int] = []
        while len(tokens) + len(end) < count:
            end += draw()
        if len(tokens) + len(end) == count:
            break
    return (tokens + end)[:count]


def _mixed(plain: Iterator[str], others: Iterator[Fact], rng: random.Random) -> str:
    other = next(others, None) if rng.random() < _DISTRACTORS else None
    return next(plain) if other is None else str(other)


def _distractors(fact: Fact, rng: random.Random) -> Iterator[Fact]:
    """Yield statements with other values, first one of the same kind, and half of the rest."""
    pools = {}
    for kind in KINDS:
        places = [place for place in PLACES if kind is not fact.kind or place != fact.place]
        values = [value for value in map(str, kind.values) if value != fact.value]
        count = min(len(places), len(values))
        chosen = zip(rng.sample(places, count), rng.sample(values, count), strict=True)
        pools[kind.statement] = [Fact(kind, place, value) for place, value in chosen]
    same = pools.pop(fact.kind.statement)
    rest = [other for pool in pools.values() for other in pool]
    rng.shuffle(rest)
    yield same.pop()
    while same or rest:
        yield (same if same and (not rest or rng.random() < 0.5) else rest).pop()


def _sentences(rng: random.Random) -> Iterator[str]:
    """Yield sentences without a value in them, each once."""
    used: set[str] = set()
    while True:
        if (sentence := _sentence(rng)) not in used:
            used.add(sentence)
            yield sentence
