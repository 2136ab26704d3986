"""Candidates for a caption that is not known: names of things that people photograph, in captions of 3 to 7 words."""

from __future__ import annotations

from pathlib import Path

from fedtap.simulator.data.documents import read_documents
from fedtap.simulator.errors import FedtapError, short

BLANK = "*"
"""Stands for a word of a caption that is not known."""

FRAMES = (
    "photo of *",
    "a photo of *",
    "a photo of sks *",
    "a photo of one sks *",
    "a close photo of one sks *",
)
"""Captions that people tune under, of 3 to 7 words; `sks` is DreamBooth's identifier."""

NOUNS = tuple(
    """airplane ambulance anchor apple armchair astronaut avocado axe backpack badge bag balloon banana barn barrel
    basket bat bathtub beach bear bed bee beetle bell belt bench bicycle bird blanket boat book boot bottle bowl box
    bracelet bread bridge broom bucket building bus butterfly button cabin cactus cake camel camera can candle cannon
    canoe cap car carpet carrot cart castle cat chain chair cherry chicken church clock cloud coffee coin
    compass computer cookie corn couch cow crab cradle crane cross crown cup curtain deer desk diamond dish dog doll
    dolphin donkey door dragon dress drill drum duck eagle egg elephant envelope face fan feather fence field fish flag
    flower flute fork fountain fox frog fruit galaxy garden ghost giraffe glass glasses globe glove goat goose grape
    guitar hammer hamster harbor harp hat hedgehog helicopter helmet hill horse house jacket jar jellyfish kettle key
    kite knife ladder lake lamp leaf lemon lighthouse lion lizard map mask mirror monkey moon motorcycle mountain
    mouse mug mushroom necklace nest notebook onion orange owl painting palace panda parrot peach pear pencil penguin
    piano pig pillow pineapple pizza plant plate plushie pumpkin rabbit rocket shark sheep ship shirt shoe sneaker
    teapot toy vase violin watch wolf zebra""".split()  # noqa: SIM905 (a list would fill two hundred lines)
)
"""200 nouns."""


def filled_in(caption: str, names: tuple[str, ...] = NOUNS) -> list[str]:
    """The caption with each name in the place of the word that is not known; every frame so, where nothing is known."""
    frames = (caption,) if caption else FRAMES
    return [frame.replace(BLANK, name) for frame in frames for name in names]


def read_candidates(path: str) -> tuple[str, ...]:
    """The lines of a text, each once.

    Raises:
        FedtapError: it cannot be read, or has fewer than two.
    """
    lines = tuple(dict.fromkeys(read_documents(Path(path))))
    if len(lines) < 2:
        raise FedtapError(
            f"{short(path, 120)} has fewer than two candidates for a caption, so there is nothing to choose: give one "
            "a line."
        )
    return lines
