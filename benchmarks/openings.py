"""What clients say: openings of stories, all different, in an order that a seed decides."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count

WHO = ("Lily", "Tom", "the dog", "a little bird", "the old bear", "Mia", "the green frog", "Ben and his friend")
DID = ("found a red ball", "lost a shoe", "went to the park", "saw a big tree", "baked a cake", "heard a funny sound")
WHERE = ("near the river", "in the garden", "under the bed", "behind the house", "on the hill", "by the road")


def openings(seed: int) -> Iterator[str]:
    """Openings without end; a number makes each another than all before."""
    draw = random.Random(seed)
    for number in count(1):
        yield f"Part {number}. One day {draw.choice(WHO)} {draw.choice(DID)} {draw.choice(WHERE)}. Then"
