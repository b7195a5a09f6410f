"""The transcript: everything said is there, whatever happens to the process, and costs the same at any length."""

from __future__ import annotations

import contextlib
import random
import signal
import sqlite3
import subprocess
import sys
import tracemalloc
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from streamllm.errors import ConfigError, StateError
from streamllm.passages import LEAST, MOST, Place, cut
from streamllm.recall import WordIndex
from streamllm.transcript import MOST_IDS, Transcript
from talk import Talk, count, say


@dataclass
class Told:
    """A turn as the reference keeps it."""

    user: str
    preface: str
    prompt: list[int]
    reply: str = ""
    ids: list[int] = field(default_factory=list)
    end: tuple[str | None, int | None] = (None, None)


def check(transcript: Transcript, told: list[Told]) -> None:
    assert transcript.count() == len(told)
    assert transcript.tokens() == sum(len(turn.prompt) + len(turn.ids) for turn in told)
    for number, (turn, want) in enumerate(zip(transcript.turns(), told, strict=True), 1):
        assert (turn.number, turn.user, turn.reply, turn.preface) == (number, want.user, want.reply, want.preface)
        assert (turn.finish, turn.end_id) == want.end
        assert (turn.ended is None) == (want.end[0] is None)
        assert (turn.prompt_tokens, turn.reply_tokens) == (len(want.prompt), len(want.ids))
        assert transcript.prompt_ids(number) == want.prompt
        assert transcript.reply_ids(number) == want.ids
    assert [turn.number for turn in transcript.turns(2, newest_first=True)] == list(range(len(told), 1, -1))
    last = transcript.last()
    assert (last.number if last else 0) == len(told)


@pytest.mark.parametrize("seed", range(6))
def test_a_transcript_holds_what_was_said_through_any_course_of_events(seed: int, tmp_path: Path) -> None:
    """Reference: a list in memory, to which the same was done."""
    draw, talk = random.Random(seed), Talk(seed)
    sentences = {number: talk.text(number) for number in (0, 1, 30)}
    transcript, told = Transcript(tmp_path / "a.db"), list[Told]()
    used = set()
    for _ in range(120):
        event = draw.choice(["begin", "write", "write", "write", "end", "reopen", "undo", "open"])
        if event == "begin" or not told:
            assert transcript.tokens() == sum(len(turn.prompt) + len(turn.ids) for turn in told)
            prompt = [draw.randrange(-(2**31), 2**31) for _ in range(draw.randint(1, 9))]
            user, preface = sentences[draw.choice([0, 1, 30])], draw.choice(["", "quoted"])
            id = transcript.begin(user, prompt_ids=prompt, count=count, preface=preface)
            assert id not in used
            used.add(id)
            told.append(Told(user, preface, prompt))
        elif event == "write":
            for _ in range(draw.choice([1, 30, 100])):
                text, ids = (
                    draw.choice(["", " a", "b.", "\n", "世", sentences[draw.choice([1, 30])]]),
                    [draw.randrange(99)],
                )
                transcript.write(text, ids)
                told[-1].reply += text
                told[-1].ids += ids
        elif event == "end":
            told[-1].end = (draw.choice(["end", "length"]), draw.choice([None, 0, 7]))
            transcript.end(*told[-1].end)
        elif event == "reopen":
            transcript.reopen()
            told[-1].end = (None, None)
        elif event == "undo":
            turns = draw.randint(1, min(2, len(told)))
            transcript.undo(turns)
            del told[-turns:]
        else:
            transcript.close()
            transcript = Transcript(tmp_path / "a.db")
    check(transcript, told)


def test_a_reply_that_is_streamed_is_cut_as_the_whole_and_knows_where_each_passage_stops(tmp_path: Path) -> None:
    """Reference: ``cut`` of the whole reply, and the tokens that had brought the text up to there."""
    transcript, text = Transcript(tmp_path / "a.db"), Talk(4).text(100)
    tokens = [text[at : at + 3] for at in range(0, len(text), 3)]
    transcript.begin("Talk.", prompt_ids=range(7), count=count)
    for number, token in enumerate(tokens):
        transcript.write(token, [number])
    transcript.end("length")
    _, *passages = transcript.passages(range(1, 1000))
    assert [passage.text for passage in passages] == cut(text)
    end = 0
    for passage in passages:
        end += len(passage.text)
        assert passage.stop == 7 + -(-end // 3)
        assert (passage.turn, passage.role) == (1, "assistant")


def test_a_text_that_comes_at_once_or_late_is_counted_by_its_last_token() -> None:
    """A passage's ``stop`` is an upper bound: the text of a token may come with a later one."""
    transcript = Transcript()
    transcript.begin("", prompt_ids=[1, 2], count=count)
    transcript.write("", [5])
    transcript.write("Word. " * 300, [6, 7])
    transcript.write(" late", [])
    assert {passage.stop for passage in transcript.passages(range(1, 100))} == {5}
    assert transcript.reply_ids(1) == [5, 6, 7]


def test_no_passage_grows_without_bound_whatever_a_token_brings() -> None:
    """So that the cost of a token does not depend on how many came before it: a token writes one passage anew."""
    transcript = Transcript()
    transcript.begin("x" * 5000, prompt_ids=[1], count=count)
    for token in ["", " word", "世"]:
        for number in range(3000):
            transcript.write(token, [number])
    sizes = transcript.database.row("SELECT max(length(text)), max(length(ids)) FROM passages")
    assert sizes[0] <= MOST
    assert sizes[1] <= 4 * MOST_IDS
    assert transcript.reply_ids(1) == [*range(3000)] * 3


def test_memory_does_not_grow_with_what_is_said(tmp_path: Path) -> None:
    """Reference: the same transcript, a tenth as long."""
    transcript = Transcript(tmp_path / "a.db")

    def grown(turns: int) -> int:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(turns):
            say(transcript, f"Turn {number}.", "A few words. " * 100)
        return tracemalloc.get_traced_memory()[0] - before

    tracemalloc.start()
    try:
        grown(20)
        assert grown(400) < 50_000  # the text alone is 520 000 bytes
    finally:
        tracemalloc.stop()


WRITER = """
import sys
from pathlib import Path
from streamllm.transcript import Transcript

transcript = Transcript(Path(sys.argv[1]))
transcript.begin("Count.", prompt_ids=[1, 2, 3], count=len)
for number in range(10**9):
    transcript.write(f" n{number}", [number])
    sys.stdout.write(f"{number}\\n")
    sys.stdout.flush()
"""


@pytest.mark.parametrize("tokens", [1, 30, 999, 4000])
def test_killed_at_any_moment_a_transcript_lacks_at_most_the_token_being_written(tokens: int, tmp_path: Path) -> None:
    """Reference: what the killed process had said was written. 999 is where the log is written back, about."""
    path = tmp_path / "a.db"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(tokens):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        written = tokens + len(
            [line for line in process.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
        )
    transcript = Transcript(path)
    turn = transcript.last()
    assert turn is not None
    assert (turn.user, turn.finish, turn.ended) == ("Count.", None, None)
    assert turn.reply_tokens in (written, written + 1)
    assert transcript.prompt_ids(1) == [1, 2, 3]
    assert transcript.reply_ids(1) == list(range(turn.reply_tokens))
    assert turn.reply == "".join(f" n{number}" for number in range(turn.reply_tokens))
    newest = WordIndex(transcript).search(f"n{turn.reply_tokens - 1}")
    assert [f" n{turn.reply_tokens - 1}" in passage.text for passage in newest] == [True]
    transcript.reopen()
    transcript.write(" again", [-1])
    assert transcript.reply_ids(1)[-2:] == [turn.reply_tokens - 1, -1]


def test_a_full_disk_in_the_middle_of_a_turn_loses_the_token_and_nothing_else(tmp_path: Path) -> None:
    """Reference: the tokens that were written without an error."""
    transcript = Transcript(tmp_path / "a.db")
    transcript.begin("Talk.", prompt_ids=[1], count=count)
    (pages,) = transcript.database.row("PRAGMA page_count")
    transcript.database.rows(f"PRAGMA max_page_count = {pages + 2}")
    written, failed = list[int](), 0
    for number in range(5000):
        try:
            transcript.write(f" word{number}", [number])
        except StateError as error:
            assert "full; make room on the disk; what was written before is safe." in str(error)  # noqa: PT017
            failed += 1
            if failed == 3:
                break
        else:
            assert not failed
            written.append(number)
    assert written
    assert failed == 3
    assert transcript.reply_ids(1) == written
    with pytest.raises(StateError, match="full"):
        transcript.begin("x" * 100_000, prompt_ids=[1], count=count)
    transcript.database.rows("PRAGMA max_page_count = 100000")
    transcript.write(" again", [-1])
    transcript.end("length")
    transcript.close()
    transcript = Transcript(tmp_path / "a.db")
    assert transcript.reply_ids(1) == [*written, -1]
    turn = transcript.turn(1)
    assert turn.reply == "".join(f" word{number}" for number in written) + " again"
    assert transcript.count() == 1


def test_an_interrupt_while_a_token_is_written_leaves_the_token_whole_or_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transcript = Transcript(tmp_path / "a.db")
    transcript.begin("Talk.", prompt_ids=[1], count=count)
    transcript.write("one", [1])
    monkeypatch.setattr(transcript, "_store", interrupt)
    with pytest.raises(KeyboardInterrupt):
        transcript.write(" lost", [2])
    monkeypatch.undo()
    transcript.write(" two", [3])
    assert (transcript.turn(1).reply, transcript.reply_ids(1)) == ("one two", [1, 3])


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_turns_that_were_taken_back_are_kept_in_the_file_but_nowhere_else(tmp_path: Path) -> None:
    transcript = Transcript(tmp_path / "a.db")
    for name in ("first", "second", "third"):
        say(transcript, f"Say {name}, zebra.", f"It is {name}.")
    index = WordIndex(transcript)
    assert [passage.turn for passage in index.search("third")] == [3, 3]
    transcript.undo(2)
    assert index.search("second third") == []
    assert [passage.turn for passage in index.search("zebra third", limit=1)] == [1]  # nor is its place taken
    assert transcript.passages(range(100))[-1].turn == 1
    say(transcript, "Say fourth.", "It is fourth.")
    assert [turn.user for turn in transcript.turns()] == ["Say first, zebra.", "Say fourth."]
    assert {passage.turn for passage in index.search("fourth")} == {2}
    with pytest.raises(ConfigError, match="There are 2 turns to take back, you asked for 3"):
        transcript.undo(3)
    with pytest.raises(ConfigError, match="turns must be a whole number of at least 1"):
        transcript.undo(0)
    transcript.close()
    kept = sqlite3.connect(tmp_path / "a.db")
    assert kept.execute("SELECT count(*) FROM turns WHERE number IS NULL").fetchone() == (2,)
    assert kept.execute("SELECT count(*) FROM passages WHERE text LIKE '%third%'").fetchone() == (2,)
    kept.close()


def test_a_turn_that_is_taken_back_while_its_reply_grows_is_never_found() -> None:
    transcript = Transcript()
    transcript.begin("Say zebra.", prompt_ids=[1], count=count)
    transcript.write("It is zebra", [1])
    transcript.undo()
    assert WordIndex(transcript).search("zebra") == []
    assert transcript.last() is None


@pytest.mark.parametrize("name", ["b.db", "c.db", None])
def test_a_copy_and_its_original_go_on_apart(name: str | None, tmp_path: Path) -> None:
    transcript = Transcript(tmp_path / "a.db")
    transcript.put("sampling", {"seed": 7})
    say(transcript, "One.", "Yes.")
    transcript.begin("Two.", prompt_ids=[1], count=count)
    transcript.write("Well", [4])
    if name == "c.db":  # into one that is there already, and holds something else
        copy = Transcript(tmp_path / name)
        say(copy, "Three.", "Zebra.")
        copy.begin("Four.", prompt_ids=[1], count=count)
        transcript.copy_into(copy)
        assert WordIndex(copy).search("zebra") == []
    else:
        copy = transcript.copy(tmp_path / name if name else None)
    copy.write(", maybe.", [5])
    copy.end("end", 2)
    transcript.write(", no.", [6])
    assert (transcript.turn(2).reply, transcript.reply_ids(2)) == ("Well, no.", [4, 6])
    assert (copy.turn(2).reply, copy.reply_ids(2)) == ("Well, maybe.", [4, 5])
    assert copy.get("sampling") == {"seed": 7}
    assert [passage.turn for passage in WordIndex(copy).search("maybe")] == [2]
    assert WordIndex(transcript).search("maybe") == []
    if name:
        copy.close()
        assert Transcript(tmp_path / name).turn(2).reply == "Well, maybe."


def test_a_transcript_that_another_process_writes_can_be_looked_at_and_is_not_touched(tmp_path: Path) -> None:
    """The open passage stays the writer's: it is not closed, and the index has it once, when the writer closes it."""
    transcript = Transcript(tmp_path / "a.db")
    transcript.begin("Say zebra.", prompt_ids=[1, 2], count=count)
    transcript.write("It is", [3])
    looking = Transcript(tmp_path / "a.db", read_only=True)
    assert (looking.turn(1).reply, looking.count(), looking.tokens()) == ("It is", 1, 3)
    transcript.write(" a zebra", [4])
    assert (looking.turn(1).reply, looking.reply_ids(1)) == ("It is a zebra", [3, 4])
    assert [passage.role for passage in WordIndex(looking).search("zebra")] == ["user"]
    for change in (lambda: looking.put("a", 1), lambda: looking.write("b", [5]), looking.undo):
        with pytest.raises(StateError, match="readonly"):
            change()
    looking.close()
    transcript.end("end", 2)
    assert [passage.role for passage in WordIndex(transcript).search("zebra")] == ["user", "assistant"]
    transcript.close()
    with contextlib.closing(Transcript(tmp_path / "a.db", read_only=True)) as looking:
        assert looking.turn(1).finish == "end"
    left = {file.name: file.stat() for file in tmp_path.iterdir()}
    assert set(left) <= {"a.db", "a.db-wal", "a.db-shm"}
    assert {stat.st_mode & 0o777 for stat in left.values()} == {0o600}
    assert "a.db-wal" not in left or left["a.db-wal"].st_size == 0


def test_a_look_that_began_before_somebody_writes_sees_what_was_written(tmp_path: Path) -> None:
    """Reference: a look that begins afterwards. The log is written back into the file under the older look."""
    transcript = Transcript(tmp_path / "a.db")
    for number in range(100):
        transcript.begin(f"old {number} " + "x" * 500, prompt_ids=[1] * 50, count=count)
    transcript.close()
    older = Transcript(tmp_path / "a.db", read_only=True)
    assert len(list(older.turns())) == 100
    transcript = Transcript(tmp_path / "a.db")
    transcript.undo(80)
    for number in range(100):
        transcript.begin(f"new {number} " + "y" * 550, prompt_ids=[2] * 90, count=count)
    transcript.close()
    newer = Transcript(tmp_path / "a.db", read_only=True)
    assert list(older.turns()) == list(newer.turns())
    assert newer.turn(21).user.startswith("new 0 ")
    older.close()
    newer.close()


def test_who_only_looks_leaves_nothing_behind_where_there_is_nothing_to_see(tmp_path: Path) -> None:
    (tmp_path / "empty.db").touch()
    (tmp_path / "damaged.db").write_bytes(b"no database" * 99)
    for path in (tmp_path / "a.db", tmp_path / "empty.db", tmp_path / "damaged.db", None):
        with pytest.raises(StateError):
            Transcript(path, read_only=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["damaged.db", "empty.db"]


def test_settings_are_kept_and_replaced(tmp_path: Path) -> None:
    transcript = Transcript(tmp_path / "a.db")
    transcript.put("system", "Be brief. 世")
    transcript.put("sampling", {"top_p": 0.5, "seed": None})
    transcript.put("system", None)
    transcript.close()
    transcript = Transcript(tmp_path / "a.db")
    assert transcript.get("sampling") == {"top_p": 0.5, "seed": None}
    assert transcript.get("system", "default") is None
    assert transcript.get("nothing", "default") == "default"
    assert transcript.settings() == {"sampling": {"top_p": 0.5, "seed": None}, "system": None}


def test_a_turn_that_is_not_there_is_refused_with_its_number() -> None:
    transcript = Transcript()
    say(transcript, "One.", "Yes.")
    for ask in (transcript.turn, transcript.prompt_ids, transcript.reply_ids):
        with pytest.raises(ConfigError, match="There is no turn 2; the turns are 1 to 1"):
            ask(2)


def test_the_last_passage_that_left_the_window_is_the_one_that_comparing_all_finds() -> None:
    """Reference: ``Place.has_left`` of every passage."""
    draw, talk, transcript = random.Random(3), Talk(3), Transcript()
    for number in range(30):
        say(transcript, talk.text(draw.choice([0, 1, 30])), talk.text(draw.choice([0, 1, 30])))
        if number % 7 == 6:
            transcript.undo(draw.randint(1, 2))
    passages = transcript.passages(range(1, 1000))
    assert max(len(passage.text) for passage in passages) > LEAST
    places = [Place(passage.turn, passage.stop + by) for passage in passages for by in (-1, 0, 1)]
    for place in [*places, Place(0, 0), Place(1, 0), Place(99, 0), Place(transcript.count() + 1, 0)]:
        last = transcript.last_left(place)
        assert [passage.id <= last for passage in passages] == [place.has_left(passage) for passage in passages]
    assert transcript.last_left(None) >= passages[-1].id


@pytest.mark.parametrize("module", ["transcript", "recall", "embeddings"])
def test_what_was_said_is_read_without_loading_a_model_library(module: str) -> None:
    """In a process of its own, because this one has loaded them."""
    heavy = "{'torch', 'transformers', 'numpy'}"
    code = f"import sys, streamllm.{module}; sys.exit(' '.join({heavy} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
