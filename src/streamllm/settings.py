r"""The settings of the command line: their names, environment variables, and the one optional TOML file.

A flag wins over its environment variable, that over the file, and that over the default. The order itself is the
command line library's own; this file only names the settings and reads the file, strictly: an unknown name or a value
of the wrong kind is an error, never ignored. Nothing here knows about a model or torch.

The file is ``$STREAMLLM_CONFIG`` or ``config.toml`` in the user's configuration folder, one setting a line::

    model = "Qwen/Qwen3-0.6B"
    window = 1020
    temperature = 0.7
    stop = ["\n\n"]
"""

from __future__ import annotations

import difflib
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from streamllm.config import CacheConfig, SamplingConfig
from streamllm.errors import ConfigError

CONFIG_ENV = "STREAMLLM_CONFIG"
"""Names the settings file. Set but empty: read no file."""

ENV_PREFIX = "STREAMLLM_"


@dataclass(frozen=True)
class Setting:
    """One setting.

    Args:
        name: as in the file.
        kind: what its value must be; ``list`` is a list of text.
        help: one sentence for ``--help``.
        default: its value when nobody sets it; ``None`` where that depends on the model or the machine.
        short: its one-letter flag, if it has one.
    """

    name: str
    kind: type
    help: str
    default: Any = None
    short: str | None = None

    @property
    def flag(self) -> str:
        """The long flag, such as ``--top-k``."""
        return "--" + self.name.replace("_", "-")

    @property
    def env(self) -> str:
        """The environment variable, such as ``STREAMLLM_TOP_K``."""
        return ENV_PREFIX + self.name.upper()

    def check(self, value: object, file: Path) -> object:
        """Return a value of the file as it is used, or say why it cannot be.

        Raises:
            ConfigError: the value is of the wrong kind.
        """
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if self.kind is float and is_number:
            return value
        if self.kind is list and isinstance(value, str):
            return [value]
        if self.kind is list and isinstance(value, list) and all(isinstance(item, str) for item in value):
            return value
        if self.kind is not list and type(value) is self.kind:
            return value
        raise ConfigError(f"{self.name} in {file} must be {_KINDS[self.kind]}, it is {value!r}; correct that line.")


_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", list: "a list of text"}

_CACHE = CacheConfig()
_DRAW = SamplingConfig()

SETTINGS: dict[str, Setting] = {
    setting.name: setting
    for setting in (
        Setting("model", str, "A folder, or a Hub id; the embedded story model if left out.", short="-m"),
        Setting("device", str, "auto, cpu, cuda, cuda:1, mps, ...", "auto"),
        Setting("dtype", str, "auto, float32, bfloat16, float16 or float64.", "auto"),
        Setting("quantize", str, "none, int8 or int4: fewer bits a weight, on the CPU.", "none"),
        Setting("sinks", int, "Tokens at the head of the stream that never leave.", _CACHE.sinks),
        Setting("window", int, "Most recent tokens seen; half the trained length, at most 1020."),
        Setting("block", int, "Tokens that leave together when the cache is full.", _CACHE.block),
        Setting("kv_dtype", str, "auto, as the model; or int8: the cache in eight bits.", _CACHE.kv_dtype),
        Setting("compile", bool, "Compile the decode step: faster, after a minute the first time.", False),
        Setting("temperature", float, "0 takes the most likely token.", _DRAW.temperature),
        Setting("top_k", int, "Keep the K most likely tokens; 0 keeps all.", _DRAW.top_k),
        Setting("top_p", float, "Keep the most likely tokens that add up to P.", _DRAW.top_p),
        Setting("min_p", float, "Drop tokens below P times the most likely one.", _DRAW.min_p),
        Setting("repetition_penalty", float, "Above 1 repeats less; 1 is off.", _DRAW.repetition_penalty),
        Setting("seed", int, "Same seed, same text."),
        Setting("max_tokens", int, "Stop after so many new tokens; no limit if left out.", short="-n"),
        Setting("stop", list, "Stop before this text; may be given several times.", ()),
        Setting(
            "recall", str, "auto or off: in a chat, quote what left the window where a message asks for it.", "auto"
        ),
        Setting("endless", bool, "Go on past the end of a text or reply, until Ctrl-C.", False),
        Setting("stats", bool, "Print one line of statistics on stderr at the end.", False),
        Setting("json", bool, "Print JSON, one object a line, for other programs.", False),
        Setting("quiet", bool, "Print the answer and errors, nothing else.", False, "-q"),
        Setting("verbose", bool, "Say on stderr what is loaded, also when it is no terminal.", False, "-v"),
    )
}


def settings_file() -> Path | None:
    """Return the path of the settings file, or ``None`` if there is none.

    Raises:
        ConfigError: ``$STREAMLLM_CONFIG`` names a file that does not exist.
    """
    named = os.environ.get(CONFIG_ENV)
    if named is not None:
        if named and not Path(named).expanduser().is_file():
            raise ConfigError(f"{CONFIG_ENV} names {named}, which is no file; correct or unset it.")
        return Path(named).expanduser() if named else None
    file = platformdirs.user_config_path("streamllm") / "config.toml"
    return file if file.is_file() else None


def read_settings() -> dict[str, Any]:
    """Return what the settings file sets; empty where there is no file.

    Raises:
        ConfigError: the file cannot be read, or has an unknown setting or a value of the wrong kind.
    """
    file = settings_file()
    if file is None:
        return {}
    try:
        with file.open("rb") as opened:
            found = tomllib.load(opened)
    except OSError as error:
        raise ConfigError(f"The settings file {file} cannot be read: {error.strerror}.") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise ConfigError(f"The settings file {file} is not valid TOML: {error}.") from error
    for name in found:
        if name not in SETTINGS:
            near = difflib.get_close_matches(name.replace("-", "_"), SETTINGS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(SETTINGS)}."
            raise ConfigError(f"The settings file {file} has no setting called {name!r}: {hint}")
    return {name: SETTINGS[name].check(value, file) for name, value in found.items()}
