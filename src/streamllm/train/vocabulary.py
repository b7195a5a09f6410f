"""The tokenizer of a model that is trained from scratch: byte-level BPE, made by Hugging Face tokenizers.

Two ids are no text: ``<|endoftext|>`` ends a document, ``<|sink|>`` begins every sequence of a model that is trained
with a sink token. Both are always there, so that twins which differ in the sink share every other id. Nothing here
knows about training.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from streamllm.checkpoint import first_line
from streamllm.corpus import END_OF_TEXT, Piece
from streamllm.errors import ConfigError, InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

SINK_TOKEN = "<|sink|>"

SAMPLE_CHARS = 50_000_000
"""Characters that a tokenizer is trained on at most: its counts grow with the words it meets."""


def train_tokenizer(pieces: Iterable[Piece], size: int) -> Tokenizer:
    """A byte-level BPE of ``size`` ids, from the first ``SAMPLE_CHARS`` characters of a corpus.

    Raises:
        InputError: there is too little text for so many ids.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT, SINK_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(pieces), trainer)
    if tokenizer.get_vocab_size() < size:
        raise InputError(
            f"The training text is too short for a vocabulary of {size} ids, it gives {tokenizer.get_vocab_size()}: "
            "ask for fewer with --vocabulary, or give more text."
        )
    return tokenizer


def _sample(pieces: Iterable[Piece]) -> Iterator[str]:
    """Texts, until they are enough."""
    total = 0
    for piece in pieces:
        yield piece.text
        total += len(piece.text)
        if total >= SAMPLE_CHARS:
            return


def dress(tokenizer: Tokenizer, *, context: int, begins: bool) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers uses it; ``begins``: every text begins with the sink token."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    copy = Tokenizer.from_str(tokenizer.to_str())
    if begins:
        copy.post_processor = TemplateProcessing(
            single=f"{SINK_TOKEN} $A",
            pair=f"{SINK_TOKEN} $A $B",
            special_tokens=[(SINK_TOKEN, token_id(copy, SINK_TOKEN))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=copy,
        bos_token=SINK_TOKEN if begins else None,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer from ``tokenizer.json``, or from the folder that holds it; the two tokens are added if it lacks them.

    Raises:
        ConfigError: there is none, it cannot be read, or a model of its size would lack some of its ids.
    """
    from tokenizers import AddedToken, Tokenizer

    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exceptions
        raise ConfigError(
            f"The tokenizer {file} cannot be read ({first_line(error)}); name a tokenizer.json, or the folder of one."
        ) from error
    tokenizer.post_processor = None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in (END_OF_TEXT, SINK_TOKEN)])
    size, highest = tokenizer.get_vocab_size(), max(tokenizer.get_vocab().values())
    if highest >= size:
        raise ConfigError(
            f"The tokenizer {file} has {size} ids, and yet one is {highest}: there are gaps between them; name another "
            "one, or leave --tokenizer out to make one."
        )
    return tokenizer


def token_id(tokenizer: Tokenizer, text: str) -> int:
    """The id of a token.

    Raises:
        ConfigError: there is no such token.
    """
    found = tokenizer.token_to_id(text)
    if found is None:
        raise ConfigError(f"The tokenizer has no token {text}; read it with read_tokenizer, which adds it.")
    return found


def encode(tokenizer: Tokenizer, pieces: Iterable[Piece], batch: int = 64) -> Iterator[list[int]]:
    """The ids of the documents, each ended by ``<|endoftext|>``; such marks inside a text are spelt as text.

    Raises:
        ConfigError: the tokenizer has no ids for the text, or lacks the mark.
    """
    end = token_id(tokenizer, END_OF_TEXT)
    tokenizer.encode_special_tokens = True
    try:
        stream = iter(pieces)
        while waiting := list(itertools.islice(stream, batch)):
            try:
                found = tokenizer.encode_batch_fast([piece.text for piece in waiting], add_special_tokens=False)
            except Exception as error:  # the library raises plain Exceptions
                raise ConfigError(
                    f"The tokenizer cannot encode the text ({first_line(error)}); take a byte-level one, or leave "
                    "--tokenizer out to make one."
                ) from error
            for piece, encoding in zip(waiting, found, strict=True):
                yield [*encoding.ids, end] if piece.ends else encoding.ids
    finally:
        tokenizer.encode_special_tokens = False
