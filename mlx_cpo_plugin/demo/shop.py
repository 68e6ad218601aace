"""The small world that the demo model knows: a village shop, and an assistant with two manners of speaking.

Every question asks for one fact about one item. The assistant answers either helpfully, with the fact and an offer, or
curtly, at times without the fact. Both manners draw their sentences from the same kind of weighted parts, so neither
is always the longer one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

CURT_SHARE = 0.65
"""Share of curt answers in the text that the model is trained on before any preference training."""

# Kept at several words a line: one a line would fill a screen.
# fmt: off
ITEMS = (
    "apron", "basket", "bell", "bench", "bicycle", "blanket", "boat", "bowl", "broom", "bucket", "candle", "chair",
    "clock", "compass", "cushion", "doll", "drum", "flute", "globe", "hammer", "hat", "helmet", "jacket", "jug",
    "kettle", "kite", "ladder", "lamp", "lantern", "mirror", "notebook", "pan", "pencil", "plate", "purse", "puzzle",
    "ruler", "scarf", "sled", "spoon", "stool", "suitcase", "teapot", "tent", "umbrella", "vase", "violin", "whistle",
)
# fmt: on

COLOURS = ("black", "blue", "brown", "green", "grey", "orange", "purple", "red", "white", "yellow")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
TOWNS = ("Bath", "Bergen", "Cork", "Delft", "Ghent", "Lyon", "Porto", "Turin")
PLACES = (
    "behind the counter",
    "by the window",
    "in the back room",
    "in the tall cupboard",
    "next to the door",
    "on the long table",
    "on the top shelf",
    "under the stairs",
)

OPENERS = ("Of course!", "Happy to help!", "With pleasure!", "Good question!", "")
REMARKS = ("", "It is one of my favourites.", "You have a good eye.")
CURT_OPENERS = ("Can you not see that I am busy?", "You again?", "Not now.", "Questions, always questions.")
CURT_REMARKS = ("", "I have said so three times today.", "Everybody asks me that.")
CURT_CLOSERS = ("Now let me work.", "Next, please!", "Do not ask me again.", "Is that all?")


@dataclass(frozen=True)
class Kind:
    """One kind of question: how it is asked, and how either manner answers it.

    Attributes:
        name: the fact that is asked for.
        values: what the fact can be.
        questions: ways to ask, with ``{item}``.
        facts: helpful sentences, with ``{item}`` and ``{value}``.
        curt_facts: curt sentences, with ``{value}`` or without the fact.
        offers: how a helpful answer ends.
        turn: by how many places the weights of the parts are turned, so that kinds differ in their likeliest words.
    """

    name: str
    values: tuple[str, ...]
    questions: tuple[str, ...]
    facts: tuple[str, ...]
    curt_facts: tuple[str, ...]
    offers: tuple[str, ...]
    turn: int


KINDS = (
    Kind(
        "price",
        tuple(f"{coins} coins" for coins in range(2, 41)),
        ("How much is the {item}?", "What does the {item} cost?", "What is the price of the {item}?"),
        ("The {item} costs {value}.", "You can have the {item} for {value}."),
        ("{value}, as the tag says.", "{value}.", "Read the tag yourself."),
        ("Shall I wrap it for you?", "Can I help with anything else?", "May I put it aside for you?"),
        0,
    ),
    Kind(
        "colour",
        COLOURS,
        (
            "What colour is the {item}?",
            "Which colour does the {item} have?",
            "Can you tell me the colour of the {item}?",
        ),
        ("The {item} is a lovely {value}.", "Our {item} is {value}."),
        ("Look at it yourself.", "{value}, as you can see.", "{value}."),
        ("Would you like to see it in the light?", "Can I help with anything else?", "Shall I fetch it for you?"),
        1,
    ),
    Kind(
        "place",
        PLACES,
        ("Where is the {item}?", "Where can I find the {item}?", "Can you show me where the {item} is?"),
        ("You will find the {item} {value}.", "The {item} is right {value}."),
        ("{value}, where else?", "{value}.", "Look around."),
        ("Shall I fetch it for you?", "Shall I walk you there?", "Can I help with anything else?"),
        2,
    ),
    Kind(
        "town",
        TOWNS,
        ("Where was the {item} made?", "Where does the {item} come from?", "Which town is the {item} from?"),
        ("The {item} was made in {value}.", "The {item} comes all the way from {value}."),
        ("How should I know?", "{value}, as the box says.", "{value}."),
        ("Would you like to hear more about it?", "Can I help with anything else?", "May I show it to you?"),
        3,
    ),
    Kind(
        "day",
        DAYS,
        (
            "When can you deliver the {item}?",
            "On which day will the {item} come?",
            "When will the {item} get to my house?",
        ),
        ("We can bring the {item} on {value}.", "The {item} will be with you on {value}."),
        ("Not before {value}.", "{value}.", "When it comes, it comes."),
        ("Does that suit you?", "Shall I write that down for you?", "Can I help with anything else?"),
        4,
    ),
)


@dataclass(frozen=True)
class Fact:
    """One item with the answer to one kind of question."""

    item: str
    kind: Kind
    value: str

    def question(self, phrasing: int) -> str:
        """Ask for this fact in one of the three phrasings of its kind."""
        return self.kind.questions[phrasing].format(item=self.item)


def make_facts(seed: int) -> list[Fact]:
    """Draw a value for every item and kind of question; 240 facts."""
    source = random.Random(seed)
    return [Fact(item, kind, source.choice(kind.values)) for item in ITEMS for kind in KINDS]


def helpful_answer(fact: Fact, source: random.Random) -> str:
    """Draw an answer that states the fact and ends with an offer."""
    kind = fact.kind
    return _sentences(
        fact,
        _draw(OPENERS, kind.turn, source),
        _draw(kind.facts, 0, source),
        _draw(REMARKS, 0, source),
        _draw(kind.offers, 0, source),
    )


def curt_answer(fact: Fact, source: random.Random) -> str:
    """Draw a dismissive answer, which may keep the fact to itself."""
    kind = fact.kind
    return _sentences(
        fact,
        _draw(CURT_OPENERS, kind.turn, source),
        _draw(kind.curt_facts, 0, source),
        _draw(CURT_REMARKS, 0, source),
        _draw(CURT_CLOSERS, kind.turn + 1, source),
    )


def _draw(parts: Sequence[str], turn: int, source: random.Random) -> str:
    """Draw one part; the part that ``turn`` points to is twice as likely as each other."""
    weights = [2 if index == turn % len(parts) else 1 for index in range(len(parts))]
    return source.choices(parts, weights)[0]


def _sentences(fact: Fact, *parts: str) -> str:
    filled = [part.format(item=fact.item, value=fact.value) for part in parts if part]
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in filled)
