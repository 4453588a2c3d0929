"""A small grammar of English stories, seeded, so that a model can be trained and measured without any download.

Each story is a chain of random choices: who, where, what was found, who came by, what they did. Later sentences return to
earlier choices (names, pronouns, the thing and the place), so a model must look back to predict them. Every choice adds
its surprise to `Story.nats`: the sum is what an ideal reader who knows the grammar pays for the whole text, and divided by
the number of tokens it bounds the loss of any model on this text from below, in expectation.

    python examples/stories.py > examples/stories.jsonl

writes stories that the demo model's training never saw, each a JSON object {"text": ...} on a line of its own. A seed and a
count may follow the script's name.
"""

import json
import math
import random
import sys
from dataclasses import dataclass

HELD_OUT_SEED, HELD_OUT_COUNT = 2, 120
ANIMALS = (
    "fox",
    "rabbit",
    "bear",
    "mouse",
    "owl",
    "hedgehog",
    "frog",
    "badger",
    "duck",
    "goat",
    "squirrel",
    "otter",
    "mole",
    "cat",
    "turtle",
    "crow",
)
NAMES = {
    "she": ("Mina", "Lotte", "Rosa", "Ivy", "Nell", "Tilda", "Wren", "Ada", "Pia", "Hazel"),
    "he": ("Tom", "Oskar", "Finn", "Bruno", "Jonas", "Emil", "Gus", "Otto", "Rolf", "Ned"),
}
FORMS = {"she": ("She", "her", "her"), "he": ("He", "him", "his")}  # at the start, object, possessive
TEMPERS = ("shy", "brave", "curious", "sleepy", "cheerful", "clever", "grumpy", "gentle", "proud", "quiet")
HOMES = (
    "in a hollow tree",
    "under the old bridge",
    "at the edge of the forest",
    "beside the pond",
    "on a windy hill",
    "behind the mill",
    "in a burrow near the river",
    "in a little red house",
)
HOBBIES = (
    "count the stars",
    "bake bread",
    "paint stones",
    "sing to the moon",
    "collect feathers",
    "climb tall trees",
    "read old maps",
    "plant beans",
    "fly a kite",
    "sail paper boats",
)
TIMES = ("morning", "evening", "rainy day", "summer day", "cold night", "afternoon")
COLOURS = ("red", "blue", "golden", "green", "silver", "striped", "tiny", "rusty")
THINGS = ("key", "lantern", "button", "bell", "shell", "basket", "spoon", "drum", "ring", "umbrella", "scarf", "whistle")
SPOTS = (
    "under a leaf",
    "in the tall grass",
    "by the well",
    "on a flat stone",
    "near the fence",
    "inside an old boot",
    "between two roots",
    "at the bottom of the stream",
)
USES = {
    "key": "open the garden gate",
    "lantern": "light the dark path",
    "button": "mend a torn coat",
    "bell": "call friends home",
    "shell": "hear the sea",
    "basket": "carry ripe apples",
    "spoon": "stir the soup",
    "drum": "wake the whole valley",
    "ring": "make a wish",
    "umbrella": "keep dry in the rain",
    "scarf": "stay warm in the snow",
    "whistle": "scare the wolf away",
}
FOODS = ("honey cake", "warm milk", "berry pie", "carrot soup", "fresh bread", "nut cookies")
FEELINGS = ("happy", "proud", "glad", "calm")


@dataclass
class Story:
    """A text and the surprise of its choices, in nats."""

    text: str
    nats: float


class _Teller:
    def __init__(self, rng: random.Random):
        self.rng, self.nats = rng, 0.0

    def pick(self, options, weights=None):
        """One of `options`, paid for with -log of its probability."""
        options = tuple(options)
        weights = weights or (1,) * len(options)
        i = self.rng.choices(range(len(options)), weights)[0]
        self.nats -= math.log(weights[i] / sum(weights))
        return options[i]

    def tell(self) -> str:
        pronoun = self.pick(NAMES)
        name, animal = self.pick(NAMES[pronoun]), self.pick(ANIMALS)
        He, him, his = FORMS[pronoun]
        opening = self.pick(("Once upon a time there was", "Long ago there lived", "Once there was"), (6, 2, 2))
        if self.pick((True, False), (4, 1)):
            who = f"a {self.pick(TEMPERS)} {animal}"
        else:
            who = f"{'an' if animal[0] == 'o' else 'a'} {animal}"
        home, hobby = self.pick(HOMES), self.pick(HOBBIES)
        lines = [f"{opening} {who} named {name}.", f"The {animal} lived {home}, and {He.lower()} loved to {hobby}."]

        colour, thing, spot = self.pick(COLOURS), self.pick(THINGS), self.pick(SPOTS)
        lines.append(f"One {self.pick(TIMES)} {name} found a {colour} {thing} {spot}.")
        lines.append(
            self.pick(
                (
                    f'"With this {thing} I can {USES[thing]}," said {name}.',
                    f"{He} had never seen a {thing} before.",
                    f"{He} put the {thing} in {his} pocket.",
                ),
                (3, 1, 1),
            )
        )
        other = self.pick(NAMES)
        friend = self.pick(n for n in NAMES[other] if n != name)
        friend_animal = self.pick(a for a in ANIMALS if a != animal)
        them = FORMS[other][1]
        lines.append(f"Then {friend} the {friend_animal} came by and asked about the {thing}.")
        ending = self.pick(("share", "trade", "lose"), (2, 1, 1))
        if ending == "share":
            lines.append(f'"I lost that {colour} {thing} long ago," said {friend}.')
            lines.append(f"So {name} gave the {thing} back to {friend}, and {friend} thanked {him}.")
            lines.append(f"Together the {animal} and the {friend_animal} went to {USES[thing]}.")
        elif ending == "trade":
            food = self.pick(FOODS)
            lines.append(f"{friend} wanted the {thing} and offered {food} for it.")
            lines.append(f"{name} gave {them} the {colour} {thing} and enjoyed the {food}.")
        else:
            lines.append(f"But the {thing} fell from the hands of {friend} and was gone.")
            lines.append(f"{name} was not angry with {them}, and went back home {home}.")
        closing = self.pick(("hero", "both", "habit"), (2, 2, 1))
        if closing == "habit":
            lines.append(f"From then on {name} liked to {hobby} with {friend}.")
        elif closing == "both":
            lines.append(f"The {animal} and the {friend_animal} were {self.pick(FEELINGS)} ever after.")
        else:
            lines.append(f"That night the {animal} was {self.pick(FEELINGS)}.")
        return " ".join(lines)


def stories(seed: int, count: int) -> list[Story]:
    """`count` stories; another seed gives other stories of the same kind."""
    told = []
    rng = random.Random(seed)
    for _ in range(count):
        teller = _Teller(rng)
        text = teller.tell()
        told.append(Story(text, teller.nats))
    return told


def main(seed: str | int = HELD_OUT_SEED, count: str | int = HELD_OUT_COUNT) -> None:
    """Prints the stories as JSON lines."""
    for story in stories(int(seed), int(count)):
        print(json.dumps({"text": story.text}))


if __name__ == "__main__":
    main(*sys.argv[1:])
