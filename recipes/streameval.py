"""A small model that can do StreamEval: it learns to copy numbers from earlier lines of its context.

    python recipes/streameval.py --work FOLDER

Writes the text, which looks like the evaluation's stream but asks far more often, because of numbers only answers can
be foreseen, and never for the newest line, because where that stands is learnt instead of what it says; a tokenizer
that makes lines short and names each by one token (see ``make_tokenizer``); and trains with ``streamllm train``. The
model is FOLDER/model. A run that was broken off goes on.

What was tried in vain: single digits as tokens, which a model of this size did not learn to find again in three million
tokens, and documents that begin by asking for the newest line, which it learnt, and nothing else.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from streamllm.atomic import replacing
from streamllm.corpus import END_OF_TEXT
from streamllm.evaluate.registers import ASK, CLOSE, LINE, OPEN, PREFACE, draw_content, make_line, make_query

DIGITS = 5
"""Of a content, as in the paper."""

NUMBERS = 2000
"""A document's first line has any number below, so that those of the evaluation's first thousands of lines occur."""

LINE_TOKENS = 7
"""Of a line whose number has three or four digits; a query has one more."""

LINES = 40
"""Of a document."""

EVERY = (1, 1, 1, 1, 3, 10)
"""Lines from one query to the next; a document draws one of them."""

REACH = 200
"""Tokens between a query and the line it asks for, about at most: what a context holds, and some room."""

FLAGS = "--size toy --hidden 96 --layers 3 --heads 2 --kv-heads 2 --intermediate 128 --context 256 "
FLAGS += "--batch-tokens 8192 --learning-rate 1e-2 --measures 6 --save-dtype bfloat16"


def main(argv: Sequence[str] | None = None) -> None:
    """Write and train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the text, the tokenizer and the model")
    parser.add_argument("--documents", type=int, default=16_000, help="to train on (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=16_000_000, help="to train on (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the text and the training (default: %(default)s)")
    parser.add_argument("--flags", default=FLAGS, help="further flags of streamllm train (default: %(default)s)")
    options = parser.parse_args(argv)
    options.work.mkdir(parents=True, exist_ok=True)
    tokenizer, text, heldout = (options.work / name for name in ("tokenizer.json", "lines.txt", "heldout.txt"))
    make_tokenizer().save(str(tokenizer))
    for file, count, part in ((text, options.documents, "train"), (heldout, 60, "held out")):
        if not file.exists():
            write_text(file, random.Random(f"{options.seed} {part}"), count)
    model = options.work / "model"
    command = [sys.executable, "-m", "streamllm", "train", "--out", str(model), "--tokens", str(options.tokens)]
    command += ["--seed", str(options.seed), *options.flags.split(), "--data", str(text), "--heldout", str(heldout)]
    is_new = not (model / "training" / "run.json").exists()
    command += ["--tokenizer", str(tokenizer)] if is_new else ["--resume"]
    subprocess.run(command, check=True)


def make_tokenizer() -> Tokenizer:
    """A token for each constant phrase, for the end of a line's number with what follows, for two digits, and a byte.

    So the token before a content names its line among a hundred, and the tokens of a content seldom come twice in a
    window: what a model of few layers must find again is one token, and then the next.
    """
    names = [*(f"{n}{OPEN}" for n in range(10)), *(f"{n:02}{OPEN}" for n in range(100))]
    whole = [PREFACE, LINE, ASK, CLOSE, *names, *(f"{n:02}" for n in range(100))]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelt = [to_bytes.pre_tokenize_str(text)[0][0] for text in whole]
    vocabulary = {text: number for number, text in enumerate([*sorted(to_bytes.alphabet()), *spelt])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))
    phrases = "|".join(map(re.escape, (PREFACE, LINE, ASK, CLOSE)))
    pattern = rf"{phrases}|\d{{1,2}}{OPEN}|\d(?=\d\d{OPEN})|\d\d"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_text(file: Path, draw: random.Random, count: int) -> None:
    """``count`` documents."""
    with replacing(file) as part, part.open("w", encoding="utf-8") as out:
        for _ in range(count):
            out.writelines((*document(draw), END_OF_TEXT))


def document(draw: random.Random) -> Iterator[str]:
    """The texts of a document: lines from any number on, and queries about lines not too far back, each asked once."""
    first = draw.randrange(NUMBERS)
    every = draw.choice(EVERY)
    reach = REACH * every // (LINE_TOKENS * (every + 1) + 1)
    wait = draw.randrange(1, reach)
    near: deque[tuple[int, str]] = deque()
    yield PREFACE
    for number in range(first, first + LINES):
        content = draw_content(draw, DIGITS)
        near.append((number, content))
        if near[0][0] <= number - reach:
            near.popleft()
        yield from (piece.text for piece in make_line(number, content))
        if len(near) > 1 and number - first >= wait and (number - first - wait) % every == 0:
            asked = near[draw.randrange(len(near) - 1)]  # never the newest: where it stands would tell which it is
            near.remove(asked)
            yield from (piece.text for piece in make_query(*asked))


if __name__ == "__main__":
    main()
