"""Does a conversation of thousands of turns stay whole, in flat memory, through kills and in a terminal?

The embedded model talks greedily, with the same seeded messages, three times side by side, each on one thread: without
interruption; killed with ``kill -9`` twice on the way, resumed each time; and through ``streamllm chat`` in a terminal.
Each keeps a session on disk, and at the end the transcripts are compared turn by turn. Memory is read after a garbage
collection, four times in the first, whose first quarter is the warm-up: libraries keep what they have once made.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pexpect
from place import begin, finish
from target import Target, print_targets

import streamllm
from streamllm import Chat, SamplingConfig
from streamllm.checkpoint import EMBEDDED
from streamllm.evaluate.memory import rss_bytes
from streamllm.sessions import FOLDER_ENV, Session

REPLY = 16
"""Tokens of a reply at most."""

WHO = ("Lily", "Tom", "the dog", "a little bird", "the old bear", "Mia", "the green frog", "Ben and his friend")
DID = ("found a red ball", "lost a shoe", "went to the park", "saw a big tree", "baked a cake", "heard a funny sound")
WHERE = ("near the river", "in the garden", "under the bed", "behind the house", "on the hill", "by the road")


def messages(turns: int, seed: int) -> Iterator[str]:
    """What is said, turn by turn."""
    draw = random.Random(seed)
    for number in range(1, turns + 1):
        yield (
            f"Part {number}. One day {draw.choice(WHO)} {draw.choice(DID)} {draw.choice(WHERE)}. "
            f"Then {draw.choice(WHO)} {draw.choice(DID)} too."
        )


def talk(name: str, turns: int, seed: int) -> None:
    """Talk to the end in a session, from where it stands; says how far it is."""
    model, tokenizer = streamllm.load(dtype="float32")
    with Chat(model, tokenizer, session=name, max_tokens=REPLY, sampling=SamplingConfig(temperature=0)) as chat:
        for note in chat.notes:
            print("note", note, flush=True)
        if chat.can_resume and (left := REPLY - chat.transcript.turn(chat.turns).reply_tokens):
            chat.resume(max_tokens=left).text()
        for number, text in enumerate(messages(turns, seed), 1):
            if number <= chat.turns:
                continue
            chat.send(text).text()
            print("turn", number, flush=True)
            if number % (turns // 4) == 0:
                gc.collect()
                print("memory", rss_bytes(), flush=True)


def run(name: str, turns: int, seed: int, kill_at: int | None = None) -> tuple[list[int], int, list[str]]:
    """A process that talks; ``kill_at``: it is killed soon after that turn.

    Returns the memory that it told of, in bytes, the turns that it came through, and what it noted.
    """
    command = [sys.executable, __file__, "--talk", name, f"--turns={turns}", f"--seed={seed}"]
    memory, last, notes = [], 0, []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            kind, _, said = line.strip().partition(" ")
            if kind == "memory":
                memory.append(int(said))
            elif kind == "note":
                notes.append(said)
            elif kind == "turn":
                last = int(said)
                if last == kill_at:
                    time.sleep(random.Random(seed).uniform(0.02, 0.1))
                    process.send_signal(signal.SIGKILL)
                    break
    if process.returncode != (0 if kill_at is None else -signal.SIGKILL):
        raise RuntimeError(f"The conversation {name!r} ended with {process.returncode}.")
    return memory, last, notes


def run_through_kills(name: str, turns: int, seed: int) -> list[str]:
    """Processes that talk, of which two are killed; what they noted."""
    return [note for kill_at in (turns // 3, turns * 2 // 3, None) for note in run(name, turns, seed, kill_at)[2]]


def type_in(name: str, turns: int, seed: int) -> None:
    """Say it all to ``streamllm chat`` in a terminal."""
    flags = ["--session", name, "--dtype=float32", "--temperature=0", f"--max-tokens={REPLY}", "--stats"]
    environment = {
        **os.environ,
        "TERM": "xterm",
        "STREAMLLM_HISTORY": os.environ[FOLDER_ENV] + "/history",
        "PROMPT_TOOLKIT_NO_CPR": "1",  # nobody here answers where the cursor is, and each question would wait a second
    }
    chat = pexpect.spawn(sys.executable, ["-m", "streamllm", "chat", *flags], env=environment, timeout=120)
    chat.setwinsize(50, 200)
    chat.expect_exact(">>> ")
    for text in messages(turns, seed):
        chat.send(text + "\r")
        chat.expect_exact("seen ")
        chat.expect_exact(">>> ")
    chat.sendeof()
    chat.expect(pexpect.EOF)
    chat.close()
    if chat.exitstatus:
        raise RuntimeError(f"streamllm chat ended with {chat.exitstatus}.")


def said(name: str) -> Iterator[tuple[str, str, str | None, list[int]]]:
    """What a session's transcript has: message, reply, why it ended, and ids."""
    with Session(name, create=False) as session:
        for row in session.transcript.turns():
            yield row.user, row.reply, row.finish, session.transcript.reply_ids(row.number)


def equal(one: str, other: str) -> int:
    """In how many turns, from the first on, two sessions say the same."""
    count = 0
    for mine, theirs in zip(said(one), said(other), strict=False):
        if mine != theirs:
            break
        count += 1
    return count


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=2000, help="of the conversation (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what is said (default: %(default)s)")
    parser.add_argument("--talk", metavar="SESSION", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="40 turns; writes only to --out")
    parser.add_argument("--out", type=Path, help="where the record goes (default: docs/results/conversation.json)")
    options = parser.parse_args(argv)
    turns, seed = 40 if options.quick else options.turns, options.seed
    if options.talk:
        talk(options.talk, options.turns, seed)
        return

    record = begin("conversation", argv, f"{EMBEDDED}, embedded", "float32")
    with tempfile.TemporaryDirectory() as folder:
        os.environ[FOLDER_ENV], os.environ["OMP_NUM_THREADS"] = folder, "1"
        with ThreadPoolExecutor() as pool:
            whole = pool.submit(run, "whole", turns, seed)
            killed = pool.submit(run_through_kills, "killed", turns, seed)
            pool.submit(type_in, "typed", turns, seed).result()
            (memory, _, _), notes = whole.result(), killed.result()
        with Session("whole", create=False) as session:
            tokens = session.transcript.tokens()
        same, typed = equal("whole", "killed"), equal("whole", "typed")

    growth = memory[-1] / memory[0] - 1
    targets = [
        Target("tokens of the conversation", tokens, 100_000 * turns // 2000, at_least=True, unit="tokens"),
        Target("turns equal after two kills", same, turns, at_least=True, unit="turns"),
        Target("turns equal through the terminal", typed, turns, at_least=True, unit="turns"),
        Target("growth of memory after a quarter", growth, 0.01, unit="of what it was"),
    ]
    record.figures.update(
        turns=turns,
        tokens=tokens,
        reply=REPLY,
        kills=2,
        equal_after_kills=same,
        equal_in_terminal=typed,
        memory_bytes=memory,
        notes=notes,
        targets=[target.to_dict() for target in targets],
    )
    print_targets(targets)
    finish(record, options.out, quick=options.quick)


if __name__ == "__main__":
    main()
