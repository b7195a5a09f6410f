"""Finding and loading a model with its tokenizer: the embedded one, a local folder, or a Hub id.

Every failure is one sentence that says what to do. Weights come from safetensors only: pickled files are refused and
code from a model's repository is never run. Sizes are read from the files' headers, so that a model which does not
fit into memory is refused before it is loaded. Nothing here knows how a model streams (``spec`` does).
"""

from __future__ import annotations

import contextlib
import importlib.resources
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from streamllm import checkpoint
from streamllm.checkpoint import first_line, shown, size, weights_bytes
from streamllm.errors import ConfigError, ModelFilesError, ModelNotFoundError

if TYPE_CHECKING:
    import torch
    from huggingface_hub.errors import HfHubHTTPError
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")

SMALL = 1 << 28
"""Bytes of weights in float32 below which "auto" measures nothing."""

CLEARLY_FASTER = 1.2
"""Times as fast as float32 that half precision must be; a closer race would be won by chance."""

HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
HUB_FILES_UNUSED = ("*/*", "consolidated*")  # other formats of the same weights, which would be fetched in vain


def load(
    name: str | Path | None = None, *, device: str = "auto", dtype: str = "auto", quantize: str = "none"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, ready to run, and its tokenizer.

    Args:
        name: a folder, a Hub id such as ``"Qwen/Qwen3-0.6B"`` (fetched once, then cached by huggingface_hub), or
            ``None`` for the small story model that comes with streamllm.
        device: ``"auto"`` takes CUDA, else MPS, else the CPU; or any name that torch knows.
        dtype: one of ``DTYPES``. ``"auto"`` keeps the checkpoint's on an accelerator. On the CPU it takes float32, but
            for a large checkpoint in half precision that this machine, measured, runs clearly faster as it is.
        quantize: ``"int8"`` or ``"int4"`` keeps the weights of linear layers in so many bits (CPU only).

    Raises:
        ConfigError: no such device, dtype or quantisation, or not on this machine.
        ModelNotFoundError: no such model, no access to it, or no network to fetch it.
        ModelFilesError: a file is missing, damaged, pickled, or too large for the memory.
        UnsupportedModelError: not a causal language model that transformers itself can run, or not one that can be
            quantised.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"There is no dtype {dtype!r}; choose one of {', '.join(DTYPES)}.")
    from streamllm import quantize as quantisation
    from streamllm import zero_sink

    place = find_device(device)
    quantisation.check_kind(quantize, place)
    folder = resolve(name)
    if dtype == "auto" and place.type == "cpu":
        dtype = "float32" if quantize != "none" else _dtype_for_cpu(folder)
    _check_memory(folder, place, dtype)
    with quiet_libraries():
        tokenizer = _load_tokenizer(folder)
        model = _load_weights(folder, dtype)
        zero_sink.switch_on(model)
        quantisation.quantize(model, quantize)  # layer by layer, and each gives up its wide weight at once
        try:
            model.to(place)  # type: ignore[arg-type]
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"The model cannot be moved to the device {device!r}: {first_line(error)}") from error
    model.train(False)
    return model, tokenizer


def resolve(name: str | Path | None = None) -> Path:
    """Return the folder with the files of a model, fetched if need be, and checked to be complete and loadable.

    Raises:
        ModelNotFoundError, ModelFilesError, UnsupportedModelError: as ``load``.
    """
    folder = locate(name)
    with quiet_libraries():
        checkpoint.check(folder)
    return folder


def locate(name: str | Path | None = None) -> Path:
    """Return the folder of a model, fetched if need be, without a look into it. Does not load torch.

    Raises:
        ModelNotFoundError, ModelFilesError: as ``load``.
    """
    if name is None:
        return Path(str(importlib.resources.files("streamllm") / "assets" / checkpoint.EMBEDDED))
    if name == "":
        raise ModelNotFoundError("The name of the model is empty: give a folder, or a Hub id such as Qwen/Qwen3-0.6B.")
    try:
        folder = Path(name).expanduser()
        is_file, is_folder = folder.is_file(), folder.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such home, no right to look
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelNotFoundError(f"There is no model {str(name)[:80]!r}: {reason}.") from error
    if is_file:
        raise ModelFilesError(f"{name} is a file: give the folder with its config.json, weights and tokenizer.")
    return folder if is_folder else _fetch(str(name))


# ---- finding


def _fetch(name: str) -> Path:
    """Fetch a model from the Hub, or find it in the Hub's cache on this machine."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ModelNotFoundError(
            f"There is no folder {name}, and it is no Hub id either: give a folder that holds a model, or an id such "
            "as Qwen/Qwen3-0.6B."
        ) from error
    try:
        with quiet_downloads():
            return Path(snapshot_download(name, allow_patterns=[*HUB_FILES], ignore_patterns=[*HUB_FILES_UNUSED]))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        # Not in the cache of this machine either; the cause says what the Hub answered, if it did.
        answer = error if isinstance(error, HfHubHTTPError) else error.__cause__
        message = _refusal(name, answer) if isinstance(answer, HfHubHTTPError) else _silence(name, answer)
        raise ModelNotFoundError(message) from error
    except Exception as error:  # proxies, full disks, broken transfers: many kinds, one sentence
        raise ModelNotFoundError(f"{name} cannot be fetched: {first_line(error)}") from error


def _refusal(name: str, error: HfHubHTTPError) -> str:
    """What to do about the Hub's answer."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError

    status, page = error.response.status_code, f"{constants.ENDPOINT}/{name}"
    if isinstance(error, GatedRepoError):
        return f"{name} is gated: accept its licence at {page}, then set HF_TOKEN to a token of your account."
    if status == 403:
        return f"The Hub refuses access to {name} (403): ask for it at {page}, and check what HF_TOKEN may read."
    if status == 401 and "credentials" in error.response.headers.get("X-Error-Message", ""):
        return f"The Hub does not accept your token (401): set HF_TOKEN to a valid one to fetch {name}."
    if status in (401, 404):
        return (
            f"There is no folder {name} here and no public model of that name at {page}: check the spelling; if it is "
            "private, set HF_TOKEN to a token that may read it."
        )
    return f"{name} cannot be fetched, the Hub answered with status {status}: try again later, or give a folder."


def _silence(name: str, error: BaseException | None) -> str:
    """What to do when the Hub did not answer."""
    from huggingface_hub import constants

    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else type(error).__name__
    return (
        f"{name} is no folder here and not (wholly) in the cache of this machine, and the Hub cannot be reached "
        f"({why}): fetch it once while online, with hf download {name}, or give a folder."
    )


# ---- dtype and memory


def _dtype_for_cpu(folder: Path) -> str:
    """float32, or the checkpoint's half precision where that is clearly faster and worth it."""
    stored = checkpoint.stored_dtype(folder)
    # A small model is fast enough, and should give the same text on every machine.
    if stored not in ("bfloat16", "float16") or weights_bytes(folder, "float32") < SMALL:
        return "float32"
    from streamllm import matvec

    return stored if matvec.speedup(stored) >= CLEARLY_FASTER else "float32"


def _check_memory(folder: Path, device: torch.device, dtype: str) -> None:
    """Refuse weights that would not fit, and name the flag that helps."""
    need, free = weights_bytes(folder, dtype), free_bytes(device)
    if free is None or need <= free:
        return
    half = weights_bytes(folder, "bfloat16")
    remedy = f"pass --dtype bfloat16 ({size(half)}) or " if half < need and half <= free else ""
    raise ModelFilesError(
        f"The weights of {shown(folder)} take {size(need)} in {dtype}, and {size(free)} of memory are free on "
        f"{device}: {remedy}choose a smaller model."
    )


def free_bytes(device: torch.device) -> int | None:
    """Return the memory that is free for a model on ``device``; ``None`` where the system does not say."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    system = _numbers(Path("/proc/meminfo")).get("MemAvailable:")
    container = _container_free(Path("/sys/fs/cgroup"))
    return min((value for value in (system and system * 1024, container) if value is not None), default=None)


def _container_free(group: Path) -> int | None:
    """Bytes that a container's memory limit (cgroup v2) leaves; cached files are given up when needed."""
    limit = _numbers(group / "memory.max", key="limit").get("limit")
    used = _numbers(group / "memory.current", key="used").get("used")
    if limit is None or used is None:
        return None
    return limit - used + _numbers(group / "memory.stat").get("inactive_file", 0)


def _numbers(file: Path, key: str | None = None) -> dict[str, int]:
    """The numbers in a file of ``name number`` lines, or of one number, called ``key``; empty where there are none."""
    try:
        rows = [line.split() for line in file.read_text(encoding="ascii").splitlines()]
    except OSError:
        return {}
    pairs = [(key, row[0]) if key else (row[0], row[1]) for row in rows if key or len(row) > 1]
    return {name: int(value) for name, value in pairs if value.isdigit()}


# ---- loading


def find_device(name: str) -> torch.device:
    """Return the device that a name stands for, if this machine has it.

    Raises:
        ConfigError: there is no such device, here or anywhere.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"There is no device {name!r}; choose auto, cpu, cuda or mps.") from error
    present = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }.get(device.type)
    if present is not None and (device.index or 0) >= present:
        raise ConfigError(f"This machine has no device {name!r} that torch can use; choose --device auto or cpu.")
    return device


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers' own errors have no common base
        raise ModelFilesError(f"The tokenizer of {shown(folder)} cannot be loaded: {first_line(error)}") from error
    if not len(tokenizer):
        raise ModelFilesError(f"The tokenizer of {shown(folder)} is empty: fetch its files again.")
    return cast("PreTrainedTokenizerBase", tokenizer)


def _load_weights(folder: Path, dtype: str) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": "auto" if dtype == "auto" else getattr(torch, dtype)}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # bad configs raise nearly anything
        raise ModelFilesError(f"{shown(folder)} cannot be loaded: {first_line(error)}") from error
    model, found = loaded
    wrong = sorted(str(key) for key in (*found["missing_keys"], *found["mismatched_keys"]))
    if wrong:
        raise ModelFilesError(
            f"The weights of {shown(folder)} lack {len(wrong)} tensors of the model (such as {wrong[0]}), which would "
            "be random: fetch it again, or look whether config.json belongs to them."
        )
    return cast("PreTrainedModel", model)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep transformers from writing bars and warnings to stderr; every failure is raised as an error."""
    import huggingface_hub.utils
    import transformers.utils.logging

    theirs: Any = transformers.utils.logging
    hub: Any = huggingface_hub.utils
    verbosity, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    hub_is_quiet = hub.are_progress_bars_disabled()
    theirs.set_verbosity(logging.CRITICAL)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(verbosity)
        if bars:
            theirs.enable_progress_bar()  # and the Hub's with it
        if hub_is_quiet:
            hub.disable_progress_bars()


@contextlib.contextmanager
def quiet_downloads() -> Iterator[None]:
    """Show the Hub's progress bars only to a person, and its warnings to nobody: failures come as errors."""
    import huggingface_hub.utils

    hub: Any = huggingface_hub.utils
    logger = logging.getLogger("huggingface_hub")
    level, hides = logger.level, not (hub.are_progress_bars_disabled() or sys.stderr.isatty())
    logger.setLevel(logging.ERROR)
    if hides:
        hub.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if hides:
            hub.enable_progress_bars()
