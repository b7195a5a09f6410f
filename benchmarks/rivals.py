"""Servers of others on the same weights: how each is started, and why one is left out.

Knows their commands only: all of them take OpenAI's completions, so the clients are the same as ours.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from served import Served, environment
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from streamllm.bench.gguf_file import write_gguf

LLAMA = "llama.cpp's server"

IMPORT_SECONDS = 300
"""That an interpreter may take to say whether it has a package."""


@dataclass(frozen=True)
class Rival:
    """A server of others.

    Args:
        name: for people.
        needs: modules that its interpreter must have.
        python: the interpreter.
        start: starts it.
    """

    name: str
    needs: tuple[str, ...]
    python: Path
    start: Callable[[], Served]

    def why_not(self) -> str | None:
        """Why it is left out; ``None``: it is there."""
        code = f"import {', '.join(self.needs)}"
        try:
            done = subprocess.run(
                [self.python, "-c", code], env=environment(), capture_output=True, text=True, check=False,
                timeout=IMPORT_SECONDS,
            )  # fmt: skip
        except OSError as error:
            return f"{self.python} cannot be run: {error.strerror}"
        return None if done.returncode == 0 else done.stderr.strip().rpartition("\n")[2] or "it cannot be imported"


def rivals(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, python: Path) -> list[Rival]:
    """All that are known; their files are written into a folder when they start.

    Args:
        python: interpreter that may have them, and may be another than this.
    """

    def exported() -> str:
        path = folder / "model"
        if not path.exists():
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
        return str(path)

    def transformers(name: str, *flags: str) -> Rival:
        def start() -> Served:
            code = "from transformers.cli.transformers import main; main()"
            command = [str(python), "-c", code, "serve", exported(), "--host=127.0.0.1", "--port={port}"]
            command += ["--device=cpu", "--dtype=float32", *flags]
            return Served(name, command, model=exported(), is_foreign=True)

        return Rival(name, ("fastapi", "uvicorn", "openai", "accelerate"), python, start)

    def llama() -> Served:
        path = folder / "model.gguf"
        write_gguf(model, path, "F32", tokenizer)
        command = [str(python), "-m", "llama_cpp.server", f"--model={path}", "--host=127.0.0.1", "--port={port}"]
        command += ["--model_alias=stories", "--n_ctx=512", "--interrupt_requests=False"]  # it answers one by one
        return Served(LLAMA, command, model="stories", health="/v1/models", is_foreign=True)

    return [
        transformers("transformers serve"),
        transformers("transformers serve, continuous batching", "--continuous-batching"),
        Rival(LLAMA, ("llama_cpp.server.app",), python, llama),
    ]
