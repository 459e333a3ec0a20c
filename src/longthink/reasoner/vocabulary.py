"""The vocabulary of the reasoning task.

A name such as ``bee`` has five forms, each a token of its own, because the form determines what follows:

======== ================================ =====================
form     use                              example
======== ================================ =====================
``bee``  first operand                    ``cow= bee +cat``
``+bee`` second operand, added            ``cow= cat +bee``
``-bee`` second operand, subtracted       ``cow= cat -bee``
``bee=`` head of a rule or of a line      ``bee= cow +cat``
``bee:`` a value, given or just computed  ``bee: 47``
======== ================================ =====================

This module is pure Python, so that generating and grading problems do not import torch.
"""

NAMES: tuple[str, ...] = tuple(
    """
    ant ape arm axe bag ball barn bat bean bear bed bee bell belt bird boat bone book boot bowl box bread
    brick broom bus cake camp cap car cat chair clock cloud coat coin corn cow crab crow cup deer desk dog
    door drum duck eagle egg fan farm fern fish flag flute fork fox frog gate glove goat grape ham hat hawk
    hen hill horn horse jar kite knife lake lamb lamp leaf lemon lion map moon mouse nest oak onion owl pear
    pen piano pig pine plum pond ring rose ship shoe snail sock spoon star swan tent tiger tree wolf
    """.split()
)

FORMS: tuple[str, ...] = ("{}", "+{}", "-{}", "{}=", "{}:")

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
BRIEF, CHECKED = "#", "#check"
"""Last token of a prompt: requests the brief or the checked (longer) chain of thought."""

SPECIAL: tuple[str, ...] = (PAD, BOS, EOS, UNK)
SIGNS: tuple[str, ...] = (BRIEF, CHECKED, "?", "check", ";", "=", "+", "-")
DIGITS: tuple[str, ...] = tuple(str(i) for i in range(10))
NUMBERS: tuple[str, ...] = tuple(f"{i:02d}" for i in range(100))

TOKENS: tuple[str, ...] = (
    SPECIAL + SIGNS + DIGITS + NUMBERS + tuple(form.format(name) for form in FORMS for name in NAMES)
)
"""The tokens in id order; the names come last, form by form."""

TOKEN_IDS: dict[str, int] = {token: i for i, token in enumerate(TOKENS)}
FIRST_NAME_ID: int = TOKEN_IDS[FORMS[0].format(NAMES[0])]
"""Ids from here on are names: ``FIRST_NAME_ID + form * len(NAMES) + name``."""


def token_ids(text: str) -> list[int]:
    return [TOKEN_IDS[token] for token in text.split()]
