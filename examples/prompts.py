"""Prompts and the stories that they ask for, for `qcli finetune`.

    python examples/prompts.py build/prompts

writes train.jsonl (512 examples) and valid.jsonl (64) into the folder. A prompt names the animal, its name and the thing of a story
that examples/stories.py tells. The demo model was trained on stories, not on prompts: it has to learn what the words before a
story are for.
"""

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from stories import ANIMALS, NAMES, THINGS, stories

FILES = {"train": (100, 512), "valid": (101, 64)}  # name -> seed and number of stories, which the demo model's training never saw


def first(words: Iterable[str], text: str) -> str:
    """The word that comes first in a text."""
    found = re.search(rf"\b({'|'.join(words)})\b", text)
    assert found, text
    return found[1]


def example(story: str) -> dict[str, str]:
    """A prompt with its completion."""
    names = (name for some in NAMES.values() for name in some)
    prompt = f"A story about a {first(ANIMALS, story)} named {first(names, story)} and a {first(THINGS, story)}:"
    return {"prompt": prompt, "completion": f" {story}"}


def main(folder: str) -> None:
    """Writes both files."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, (seed, count) in FILES.items():
        lines = (json.dumps(example(story.text)) + "\n" for story in stories(seed, count))
        Path(folder, f"{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
