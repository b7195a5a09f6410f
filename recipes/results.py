"""The page of all results: each record's verdict, table, figure and command, below what is written by hand.

    python recipes/results.py

Rewrites docs/results/README.md from the line ``MARK`` on, from the records in docs/results/ and docs/results/eval/;
with ``--figures`` the figures of the evaluations, too, which show nothing but their records.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from streamllm.atomic import write_atomically
from streamllm.bench.table import tables
from streamllm.bench.verdict import targets
from streamllm.evaluate.catalogue import EVALUATIONS
from streamllm.evaluate.figure import save_figure
from streamllm.evaluate.record import Record, load_record

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from place import RESULTS

MARK = "<!-- From here on this page is made by recipes/results.py. -->"


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records and the page")
    parser.add_argument("--figures", action="store_true", help="draw the figures anew, too")
    options = parser.parse_args(argv)
    for path, record in evaluated(options.results) if options.figures else ():
        save_figure(EVALUATIONS[record.name].draw(record.figures), path.with_suffix(""))
    page = options.results / "README.md"
    by_hand = page.read_text(encoding="utf-8").partition(MARK)[0]
    write_atomically(page, (by_hand + MARK + "\n" + "\n".join(sections(options.results)) + "\n").encode())


def evaluated(folder: Path) -> list[tuple[Path, Record]]:
    """The records of evaluations; those in folders of their own come last."""
    paths = sorted((folder / "eval").rglob("*.json"), key=lambda path: (len(path.parts), path))
    return [(path, load_record(path)) for path in paths]


def sections(folder: Path) -> Iterator[str]:
    """The lines of the page below the mark."""
    records = evaluated(folder)
    for name, kind in EVALUATIONS.items():
        for path, record in records:
            if record.name == name:
                place = path.parent.relative_to(folder / "eval").as_posix()
                title = f"{kind.title.rstrip('.')}: {record.model}{f' ({place})' if place != '.' else ''}"
                yield from ("", f"## {title}", "", kind.verdict(record.figures), "")
                yield from as_markdown(kind.rows(record.figures))
                yield from ("", f"![{kind.title}]({path.relative_to(folder).with_suffix('.png').as_posix()})", "")
                yield from described(record, path.relative_to(folder))
    for path in sorted(folder.glob("bench-*.json")):
        yield from benched(load_record(path), path.relative_to(folder))
    yield from ("", "## Benchmarks and recipes", "")
    rows = [("record", "model", "command")]
    for path in sorted(folder.glob("*.json")):
        record = load_record(path)
        rows.append((f"[{path.name}]({path.name})", record.model, f"`{record.command}`"))
    yield from as_markdown(rows)


def benched(record: Record, path: Path) -> Iterator[str]:
    """A record of ``streamllm bench``: its tables, its figure, and how to repeat it."""
    yield from ("", f"## Speed and memory: {record.model}, {record.dtype}")
    for title, rows in tables(record.figures, targets(record.figures)):
        yield from ("", f"{title[0].upper()}{title[1:]}:", "")
        yield from as_markdown(rows)
    yield from ("", f"![Time of a token against the size of the cache]({path.with_suffix('.png').as_posix()})", "")
    yield from described(record, path)


def described(record: Record, path: Path) -> Iterator[str]:
    """How to repeat it, and what it was measured on."""
    machine = record.machine
    load = machine["load_before"]
    noise = f"; others used the machine (load {load}), so times are noisy" if record.is_busy else ""
    yield from ("```console", f"$ {record.command}", "```", "")
    yield (
        f"[{path.name}]({path.as_posix()}): {record.began[:10]}, {record.dtype}, "
        f"{machine['device'] + ', ' if 'device' in machine else ''}{machine['cpu']}, "
        f"{machine['cores']} cores, "
        f"{machine['threads']} threads, torch {machine['torch']}, transformers {machine['transformers']}, commit "
        f"{record.commit}{noise}."
    )


def as_markdown(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table whose first row is the head."""
    head, *rest = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rest:
        yield f"| {' | '.join(row)} |"


if __name__ == "__main__":
    main()
