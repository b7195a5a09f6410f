"""The commands of the chat prompt: a table of names, arguments and what they do, and how a line finds its command.

Each acts on a ``Talk``. Where lines come from, and what becomes of errors, is known elsewhere (``repl``).
"""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from streamllm import strip
from streamllm.chat_settings import NAMES, change, in_force
from streamllm.checkpoint import size
from streamllm.errors import ConfigError
from streamllm.passages import Passage
from streamllm.stats import grouped
from streamllm.talk import Talk, glimpse, whose

SHOWN_TURNS = 5
"""Turns that /history shows unless it is told."""

FOUND = 3
"""Passages that /recall puts in front of the next message."""

PIPE_WIDTH = 80
"""Width of the strip where there is no terminal."""


@dataclass(frozen=True)
class Command:
    """One command.

    Args:
        arguments: as the help shows them; those in brackets may be left out.
        help: one line.
        run: does it, given the rest of the line.
        choices: what its argument can be completed to.
    """

    arguments: str
    help: str
    run: Callable[[Talk, str], None]
    choices: Callable[[Talk], Iterable[str]] = lambda _: ()

    @property
    def needs_argument(self) -> bool:
        """Whether something must follow its name."""
        return bool(self.arguments) and not self.arguments.startswith("[")


def carry_out(talk: Talk, line: str) -> None:
    """Carry out a line that begins with a slash.

    Raises:
        ConfigError: there is no such command, or it cannot be used so.
        StreamLLMError: what the command itself raises.
    """
    name, rest = _parted(line.strip()[1:])
    command = COMMANDS.get(ALIASES.get(name, name))
    if command is None:
        begun = [known for known in COMMANDS if name and known.startswith(name)]
        near = begun or difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean /{near[0]}?" if near else "/help lists them."
        raise ConfigError(f"There is no command /{glimpse(name)}: {hint} Begin with // to say a slash.")
    if rest and not command.arguments:
        raise ConfigError(f"/{name} takes nothing more, you gave {glimpse(rest)!r}.")
    if not rest and command.needs_argument:
        raise ConfigError(f"/{name} needs more: /{name} {command.arguments}.")
    command.run(talk, rest)


def completions(talk: Talk, text: str) -> Iterator[tuple[str, str]]:
    """What the last word of a text before the cursor can become, with a few words about it."""
    name, space, rest = text.partition(" ")
    if not name.startswith("/"):
        return
    if not space:
        for known, command in COMMANDS.items():
            if known.startswith(name[1:]):
                yield f"/{known}", command.help
    elif " " not in rest and (found := COMMANDS.get(name[1:])):
        for choice in found.choices(talk):
            if choice.startswith(rest):
                yield choice, ""


# ---- the conversation


def _help(talk: Talk, _: str) -> None:
    rows = [(f"/{name} {command.arguments}".strip(), command.help) for name, command in COMMANDS.items()]
    keys = [
        ('"""', "Begins a message of several lines, and ends it; Alt-Enter is a line end too."),
        ("//", "Begins a message with a slash."),
        ("Ctrl-X Ctrl-E", "Writes the message in $EDITOR."),
        ("Ctrl-C", "Stops the reply, which stays as far as it has come."),
        ("Ctrl-D", "Leaves."),
    ]
    talk.table([*rows, *keys])


def _clear(talk: Talk, _: str) -> None:
    talk.chat.clear()
    talk.found = None
    talk.note("the conversation begins anew")


def _system(talk: Talk, text: str) -> None:
    if not text:
        talk.tell(talk.chat.system or "(no system prompt)")
        return
    talk.chat.set_system(None if text == "-" else text)
    talk.note("the window was read anew behind the system prompt" if talk.chat.turns else "the system prompt is set")


def _undo(talk: Talk, text: str) -> None:
    count, rebuild = _count_and_rebuild("undo", text)
    talk.chat.undo(count, rebuild=rebuild)
    talk.found = None
    talk.note(f"{'1 turn' if count == 1 else f'{count} turns'} taken back; {talk.place()}")


def _regen(talk: Talk, text: str) -> None:
    talk.show(talk.chat.regenerate(rebuild=_is_rebuild("regen", text)))


def _continue(talk: Talk, _: str) -> None:
    talk.show(talk.chat.resume(progress=talk.reading))


def _edit(talk: Talk, text: str) -> None:
    number, said = _parted(text)
    turn = _number("edit", number)
    if not said:
        raise ConfigError(f"/edit {turn} needs what to say instead: /edit {turn} TEXT.")
    talk.show(talk.chat.edit(turn, said))


def _history(talk: Talk, text: str) -> None:
    gone = talk.chat.turns_evicted
    for row in talk.chat.history(_number("history", text) if text else SHOWN_TURNS):
        where = " (left the window)" if row.number <= gone else ""
        talk.tell(f"turn {row.number}{where}\n>>> {row.user}\n{row.reply.strip()}\n")


def _recall(talk: Talk, words: str) -> None:
    if not words:
        talk.found = None
        talk.note("nothing will be put in front of the next message")
        return
    found = talk.chat.search(words, limit=FOUND)
    for passage in found:
        talk.tell(f"{whose(passage)}: {' '.join(passage.text.split())}")
    talk.found = _fitting(talk, found) or None
    if talk.found is None:
        talk.note("none of them fits into a third of the window" if found else "nothing was found")
        return
    which = "they go" if len(talk.found) == len(found) else f"as many as fit, {len(talk.found)} of them, go"
    talk.note(f"{which} in front of the next message; /recall alone drops them")


def _fitting(talk: Talk, found: Sequence[Passage]) -> Sequence[Passage]:
    """As many passages as a message may have in front of it, or they would drive each other out of the window."""
    from streamllm.recall import fitting
    from streamllm.session import RECALL_SHARE

    chat = talk.chat

    def count(text: str) -> int:
        return len(chat.tokenizer(text, add_special_tokens=False)["input_ids"])

    return fitting(found, count=count, budget_tokens=(chat.cache.config.window or 0) // RECALL_SHARE)


# ---- what is in force


def _cache(talk: Talk, _: str) -> None:
    chat, answer = talk.chat, talk.answer
    cache = chat.cache
    pinned, capacity = cache.rows[0].pinned, cache.capacity
    width = shutil.get_terminal_size().columns if answer.is_terminal else PIPE_WIDTH
    held = min(pinned, cache.tokens_cached)
    line = strip.draw(
        width,
        pinned=pinned,
        cached=cache.tokens_cached,
        capacity=capacity,
        evicted=chat.tokens_evicted,
        signs=strip.BLOCKS if answer.is_unicode else strip.ASCII,
    )
    window = f"window {grouped(cache.tokens_cached - held)} of {grouped(capacity - pinned)}"
    left = f", {chat.turns_evicted} of {chat.turns} turns" if chat.turns_evicted else ""
    talk.tell(f"{line}\npinned {pinned}, evicted {grouped(chat.tokens_evicted)}{left}, {window} tokens")


def _show(talk: Talk, _: str) -> None:
    from streamllm.doctor import sizes

    chat = talk.chat
    about = [
        ("model", talk.model),
        ("conversation", talk.place()),
        ("system", glimpse(chat.system or "none")),
        ("cache", sizes(chat.cache)),
    ]
    talk.table([*about, *in_force(chat)])


def _stats(talk: Talk, _: str) -> None:
    record, stats = talk.chat.record, talk.chat.stats
    if record is None or stats is None:
        talk.tell("there is no reply yet since this began, or it was taken back")
        return
    # Speeds are told with the first token; those of a reply that has none are not known.
    read, generated = (
        (f", {stats.prefill_tokens_per_s:.0f} tok/s", f", {stats.decode_tokens_per_s:.1f} tok/s")
        if record.tokens_generated
        else ("", "")
    )
    talk.table(
        [
            ("turn", str(record.turn)),
            ("read", f"{record.tokens_read} tokens{read}"),
            ("generated", f"{record.tokens_generated} tokens{generated}"),
            ("took", f"{record.seconds:.2f} s, ended by {record.finish or 'nothing'}"),
            ("seen", f"{grouped(record.tokens_seen)} tokens in the whole conversation"),
            ("cached", f"{grouped(record.tokens_cached)} tokens, {record.occupancy:.0%} of the cache"),
            ("evicted", f"{grouped(record.tokens_evicted)} tokens, {record.tokens_evicted_now} by this turn"),
            ("recalled", "; ".join(whose(passage) for passage in record.recalled) or "nothing"),
            ("memory", f"{size(stats.cache_bytes)} of keys and values, {size(stats.peak_rss_bytes)} at most in all"),
        ]
    )


def _set(talk: Talk, text: str) -> None:
    name, given = _parted(text)
    change(talk.chat, name, given)
    talk.note(f"{name} {dict(in_force(talk.chat))[name]}")


# ---- sessions


def _save(talk: Talk, name: str) -> None:
    _must_be_another(talk, name)
    talk.switch(talk.chat.fork(session=name))
    talk.note(f"kept from here on as {talk.place()}")


def _fork(talk: Talk, name: str) -> None:
    _must_be_another(talk, name)
    talk.chat.fork(session=name).close()
    talk.note(f"a copy is kept as session {name!r}; here it goes on as before")


def _load(talk: Talk, name: str) -> None:
    chat = talk.chat
    _must_be_another(talk, name)
    if chat.session is None and chat.turns:
        raise ConfigError("This conversation is not kept: /save NAME keeps it, /clear gives it up; then /load.")
    talk.switch(talk.open_chat(name))
    talk.note(talk.place())


def _must_be_another(talk: Talk, name: str) -> None:
    """Refuse the name of the session that goes on; or it would be refused as one that another process has."""
    if talk.chat.session is not None and talk.chat.session.name == name:
        raise ConfigError(f"This is session {name!r} already.")


def _bye(talk: Talk, _: str) -> None:
    talk.is_leaving = True


# ---- arguments


def _parted(text: str) -> tuple[str, str]:
    """The first word, and what follows; a line end parts them as a blank does."""
    first, *rest = [*text.split(None, 1), ""]
    return first, rest[0].strip() if rest else ""


def _number(command: str, text: str) -> int:
    """A whole number from 1.

    Raises:
        ConfigError: it is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"/{command} takes a whole number of at least 1, you gave {glimpse(text)!r}.")
    return int(text)


def _is_rebuild(command: str, text: str) -> bool:
    if text not in ("", "rebuild"):
        raise ConfigError(f"/{command} takes nothing more than rebuild, you gave {glimpse(text)!r}.")
    return bool(text)


def _count_and_rebuild(command: str, text: str) -> tuple[int, bool]:
    words = text.split()
    rebuild = words[-1:] == ["rebuild"]
    rest = " ".join(words[:-1] if rebuild else words)
    return (_number(command, rest) if rest else 1), rebuild


COMMANDS: dict[str, Command] = {
    "help": Command("", "Shows this.", _help),
    "clear": Command("", "Begins anew.", _clear),
    "system": Command(
        "[TEXT]", "Sets the system prompt, which never leaves; - takes it away; alone shows it.", _system
    ),
    "set": Command(
        "NAME VALUE",
        "Sets what /show lists, from temperature on; none takes a limit away.",
        _set,
        lambda _: NAMES,
    ),
    "show": Command("", "Shows all that is in force.", _show),
    "stats": Command("", "Shows what the last reply has cost.", _stats),
    "cache": Command("", "Draws the cache: what is pinned, what has left, and the window.", _cache),
    "history": Command("[N]", f"Shows the last N turns, {SHOWN_TURNS} if left out.", _history),
    "recall": Command("[WORDS]", "Finds what was said, and puts it in front of the next message.", _recall),
    "continue": Command("", "Goes on with a reply that was cut off.", _continue),
    "regen": Command("[rebuild]", "Takes the last reply back and draws another one.", _regen, lambda _: ("rebuild",)),
    "undo": Command("[N] [rebuild]", "Takes the last N turns back; rebuild reads the window anew.", _undo),
    "edit": Command("N TEXT", "Says something else in turn N; all later turns are taken back.", _edit),
    "save": Command("NAME", "Keeps the conversation as a session, and goes on in it.", _save),
    "fork": Command("NAME", "Keeps a copy as a session, and goes on here.", _fork),
    "load": Command("NAME", "Goes on with a session.", _load, lambda talk: talk.list_names()),
    "bye": Command("", "Leaves.", _bye),
}

ALIASES = {"exit": "bye", "quit": "bye", "?": "help"}
