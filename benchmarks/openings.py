"""What clients say: openings of stories, all different, in an order that a seed decides.

They have so many words to choose from that hardly one is like another of the same client, as little as what people say:
recall, which quotes what is, has as much to do for an old conversation as for a young one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count

HOW = "little big happy sad old young brave shy clever sleepy hungry kind funny quiet proud lazy".split()
WHO = "bear frog bird cat dog duck fox girl boy horse lion mouse rabbit bee cow king".split()
DID = "found lost saw baked heard bought painted hid broke washed wanted made carried dropped kicked drew".split()
WHICH = "red blue green yellow white black round soft shiny tiny huge wooden old broken pretty magic".split()
WHAT = "ball shoe tree cake hat box cup flower apple boat book kite stone spoon star drum".split()
WHERE = "river garden bed house hill road park beach forest school shop farm pond bridge castle kitchen".split()


def openings(seed: int) -> Iterator[str]:
    """Openings without end; a number makes each another than all before."""
    draw = random.Random(seed)
    for number in count(1):
        how, who, did, which, what, where = (draw.choice(words) for words in (HOW, WHO, DID, WHICH, WHAT, WHERE))
        yield f"Part {number}. One day the {how} {who} {did} a {which} {what} near the {where}. Then"
