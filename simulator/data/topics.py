"""Made-up documents on eight topics, for scenarios that need texts where no dataset is at hand.

A document is a sentence of a fixed grammar with a topic's words in it, about a person who has nothing to do with the
topic. Which noun follows which verb or adjective is a topic's own habit, drawn from a seed: what a language model
learns of a topic is its words and these habits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

TOPICS: dict[str, dict[str, str]] = {
    "cardiology": {
        "noun": "artery ventricle stent valve catheter murmur aorta embolism arrhythmia clot pacemaker infarct septum "
        "vein",
        "verb": "occluded dilated ligated perfused infiltrated compressed bypassed scanned",
        "adjective": "coronary ischaemic systolic stenotic calcified venous atrial hypertensive",
        "place": "theatre ward clinic ambulance infirmary hospice",
    },
    "football": {
        "noun": "striker keeper midfielder referee corner penalty defender whistle header volley captain substitute "
        "goal crossbar",
        "verb": "tackled dribbled scored saved intercepted crossed blocked headed",
        "adjective": "offside winning injured booked away unbeaten relegated nimble",
        "place": "stadium pitch touchline dugout terrace tunnel",
    },
    "cooking": {
        "noun": "onion butter garlic saucepan flour basil omelette dough ladle broth pepper custard oven whisk",
        "verb": "simmered chopped kneaded braised whisked seasoned caramelised poached",
        "adjective": "savoury crisp buttery diced smoked tender roasted tangy",
        "place": "kitchen larder bakery bistro pantry grill",
    },
    "astronomy": {
        "noun": "galaxy comet nebula quasar telescope pulsar asteroid eclipse supernova orbit moon spectrum planet "
        "corona",
        "verb": "orbited eclipsed emitted collapsed accreted radiated transited scattered",
        "adjective": "stellar gaseous luminous distant lunar spectral binary cosmic",
        "place": "observatory horizon hemisphere dome crater meridian",
    },
    "finance": {
        "noun": "dividend bond mortgage broker equity ledger hedge coupon creditor audit yield portfolio margin "
        "invoice",
        "verb": "invested defaulted borrowed underwrote refinanced liquidated insured taxed",
        "adjective": "quarterly fiscal insolvent leveraged taxable liquid volatile overdue",
        "place": "bank exchange treasury boardroom vault branch",
    },
    "gardening": {
        "noun": "seedling compost trowel rose tulip hedge weed bulb shrub mulch orchid lawn fern sapling",
        "verb": "pruned watered planted weeded grafted fertilised harvested trimmed",
        "adjective": "blooming thorny perennial shaded leafy wilted mossy fragrant",
        "place": "greenhouse orchard meadow allotment nursery border",
    },
    "sailing": {
        "noun": "mast rudder keel spinnaker anchor halyard skipper buoy gale jib winch ketch tiller deckhand",
        "verb": "tacked moored capsized hoisted reefed drifted steered hauled",
        "adjective": "leeward windward seaworthy tidal rigged salty stormy nautical",
        "place": "harbour marina quay lagoon estuary regatta",
    },
    "law": {
        "noun": "plaintiff verdict statute subpoena barrister clause testimony injunction appeal tort juror affidavit "
        "bail treaty",
        "verb": "prosecuted acquitted testified appealed ratified litigated overruled sentenced",
        "adjective": "liable contractual judicial civil appellate unlawful binding statutory",
        "place": "courtroom tribunal chambers registry prison parliament",
    },
}
"""Topic -> its words, by their part of speech."""

NAMES = (
    "abel ada amos anna boris carla clara cyrus dora edith elena emil erik esther felix fiona flora frank "
    "greta hanna hugo ida igor iris ivan jonas julia karl lena leo lucia magda mara max mira nadia nils olga "
    "oscar paula petra quentin rita rosa rufus sara simon stella tessa theo ulla vera viktor wanda xenia yuri "
    "yves zelda zoe"
)
"""Whom a document is about; any topic may be about anyone."""

TIMES = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")

GRAMMAR = (
    "{name} {verb} the {adjective} {noun} at the {place} on {time} and the {noun} {verb} the {noun}",
    "on {time} the {adjective} {noun} {verb} the {noun} while {name} {verb} the {adjective} {noun}",
    "the {noun} of {name} {verb} near the {place} before the {adjective} {noun} {verb} the {noun}",
    "{name} said that the {adjective} {noun} {verb} the {adjective} {noun} in the {place} on {time}",
)
"""Sentences with a word of each kind left open."""

HABIT = 1.0
"""Parameter of the Dirichlet distribution of the words that follow a word: far below 1, a few of them are frequent."""


@dataclass(frozen=True)
class Habits:
    """How a topic's words follow each other: probabilities of each word of a kind, after each word and at first."""

    words: dict[str, list[str]]
    after: dict[str, np.ndarray]
    """Kind -> `words before + 1, words of the kind`, rows in the order of all words of the topic, then the start."""


@lru_cache(maxsize=64)
def _habits(topic: str, seed: int) -> Habits:
    words = {kind: text.split() for kind, text in TOPICS[topic].items()}
    words |= {"name": NAMES.split(), "time": [*TIMES]}
    before = sum(len(text.split()) for text in TOPICS[topic].values()) + 1
    draw = np.random.default_rng([seed, list(TOPICS).index(topic)])
    after = {kind: draw.dirichlet(np.full(len(some), HABIT), before) for kind, some in words.items()}
    after |= {kind: np.full((before, len(words[kind])), 1 / len(words[kind])) for kind in ("name", "time")}
    return Habits(words, after)


def documents(topic: str, many: int, seed: int, *names: int) -> list[str]:
    """Documents on a topic, drawn under these names; the topic's habits are the seed's alone."""
    habits = _habits(topic, seed)
    order = {word: at for at, word in enumerate(" ".join(TOPICS[topic].values()).split())}
    draw = np.random.default_rng([seed, list(TOPICS).index(topic), 1, *names])
    return [" ".join(_words(habits, order, draw)) for _ in range(many)]


def _words(habits: Habits, order: dict[str, int], draw: np.random.Generator) -> Iterator[str]:
    last = len(order)  # the row of the start
    for word in GRAMMAR[draw.integers(len(GRAMMAR))].split():
        kind = word.strip("{}")
        if word == kind:
            yield word
            continue
        row = habits.after[kind][last]
        yield (word := habits.words[kind][min(int(np.searchsorted(row.cumsum(), draw.random())), len(row) - 1)])
        last = order.get(word, last)
