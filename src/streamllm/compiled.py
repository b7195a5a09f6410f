"""A module, compiled once and kept on disk: the second start takes a second, not a minute.

On a processor it is exported and compiled ahead of time, to a file in the user's cache folder that holds code but no
weights. On an accelerator ``torch.compile`` does the same with CUDA graphs, and keeps its own cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import platformdirs
import torch
import transformers
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from streamllm.atomic import replacing
from streamllm.errors import ConfigError, UnsupportedModelError

MOST_SIZES = 64
"""Steps of other shapes that one process may compile on an accelerator."""

KEPT = 32
"""Compiled modules kept on disk; the one unused for longest makes room."""

_CONFIG = {
    "aot_inductor.package_constants_in_so": False,
    # Inputs of a matrix are computed once, not again for each of its rows.
    "realize_reads_threshold": 1,
    "realize_opcount_threshold": 1,
}


def compile_module(
    module: nn.Module, args: tuple[Any, ...], sizes: Any = None, *, anew: bool = False
) -> Callable[..., Any]:
    """Return ``module`` as a function of arguments with the shapes of ``args``; it may have been called with them.

    ``sizes``: those of the shapes that may vary on a processor, as ``dynamic_shapes`` of ``torch.export.export``.

    The weights stay where they are: a change in place is seen, a new tensor in its place is not. ``anew``: do not take
    what was compiled before.

    Raises:
        ConfigError: others can write to the folder of compiled code.
        UnsupportedModelError: on a processor: it cannot be exported, or the code would hold numbers that are no
            weights; the file has room for code alone.
        Exception: many kinds: no C++ compiler, no headers; on an accelerator whatever torch.compile() raises.
    """
    if next(module.parameters()).device.type != "cpu":
        compiled = torch.compile(module, dynamic=False, fullgraph=True, mode="reduce-overhead")
        with _grouped_attention(), torch._dynamo.config.patch(recompile_limit=MOST_SIZES):
            compiled(*args)  # compiles now, not at the first token
        return compiled
    path = folder() / f"{_digest(module, args, sizes)}.pt2"
    loaded = None if anew else _load(path)
    if loaded is None:
        _compile(module, args, sizes, path)
        loaded = torch._inductor.aoti_load_package(str(path))
    weights = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    # Detached: a parameter can be given other memory, by model.to() for one, and this would be freed under the code.
    names = loaded.get_constant_fqns()
    if strange := [name for name in names if name not in weights]:  # the file holds no numbers at all
        raise UnsupportedModelError(f"the compiler has made {min(strange)}, which is no weight of the model")
    constants = {name: weights[name].detach() for name in names}
    loaded.load_constants(constants, check_full_update=True, user_managed=True)

    def run(*args: Any) -> Any:
        return loaded(*args)

    run.weights = constants  # type: ignore[attr-defined]  # the code only borrows them
    return run


def folder() -> Path:
    """Where compiled modules are kept: ``$STREAMLLM_COMPILED``, or a folder in the user's cache."""
    named = os.environ.get("STREAMLLM_COMPILED")
    return Path(named) if named else platformdirs.user_cache_path("streamllm") / "compiled"


def _load(path: Path) -> Any:
    """What was compiled before; ``None``: nothing, or nothing whole."""
    if not zipfile.is_zipfile(path) or not (_is_private(path) and _is_private(path.parent)):
        return None
    with contextlib.suppress(OSError):  # a folder that may only be read
        os.utime(path)
    try:
        return torch._inductor.aoti_load_package(str(path))
    except RuntimeError:
        return None


def _compile(module: nn.Module, args: tuple[Any, ...], sizes: Any, path: Path) -> None:
    """Compile to ``path``, and let go of what was unused for longest."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_private(path.parent):
        raise ConfigError(
            f"others can write to {path.parent}, where code is kept that will be run; take their rights away "
            "(chmod go-w), or name another folder by STREAMLLM_COMPILED"
        )
    with torch.no_grad(), _grouped_attention(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the inside of the compiler
        try:
            exported = torch.export.export(module, args, dynamic_shapes=sizes, strict=False)
        except (MemoryError, OSError):
            raise
        except Exception as error:  # of many kinds
            why = str(error).strip().partition("\n")[0][:100]
            raise UnsupportedModelError(f"its step cannot be exported ({type(error).__name__}: {why})") from error
        strange = set(exported.constants) - {name for name, _ in module.named_buffers(remove_duplicate=False)}
        if strange:
            raise UnsupportedModelError(f"the step has {min(strange)}, which is no weight of the model")
        with replacing(path) as temporary:
            package = temporary.with_suffix(".pt2")
            config = dict(_CONFIG)  # the compiler writes into what it is given, and the digest must stay as it is
            try:
                torch._inductor.aoti_compile_and_package(exported, package_path=str(package), inductor_configs=config)
                package.replace(temporary)
            finally:
                package.unlink(missing_ok=True)
    path.chmod(0o600)
    with contextlib.suppress(OSError):  # another process may be quicker
        for file in sorted(path.parent.glob("[0-9a-f]" * 32 + ".pt2"), key=lambda file: file.stat().st_mtime)[:-KEPT]:
            file.unlink(missing_ok=True)


def _is_private(path: Path) -> bool:
    """Whether nobody else can write there: what lies there is run."""
    if not hasattr(os, "getuid"):  # pragma: no cover  # Windows: the user's own folder
        return True
    found = path.stat()
    return found.st_uid == os.getuid() and not found.st_mode & 0o022


@contextlib.contextmanager
def _grouped_attention() -> Iterator[None]:
    """Let transformers hand over keys as they are cached, not repeated for each query head that shares them."""
    name = "TRANSFORMERS_SDPA_FORCE_GQA"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _digest(module: nn.Module, args: tuple[Any, ...], sizes: Any) -> str:
    """Of everything that the code depends on: versions, machine, classes, configs, shapes."""
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    configs = [
        (child.config.to_dict(), str(child.config._attn_implementation))
        for child in module.modules()
        if isinstance(child, transformers.PreTrainedModel)
    ]
    facts = [
        torch.__version__,
        transformers.__version__,
        platform.machine(),
        _processor(),
        torch.get_num_threads(),
        _CONFIG,
        _sources(),
        [(name, type(child).__module__, type(child).__qualname__) for name, child in module.named_modules()],
        [(name, tensor.dtype, tensor.shape, tensor.stride()) for name, tensor in tensors],
        [(leaf.dtype, leaf.shape, leaf.stride()) for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)],
        [str(leaf) for leaf in pytree.tree_leaves(sizes)],
        configs,
    ]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:32]


def _processor() -> str:
    """What the compiler may make use of: it compiles for this very processor."""
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8") as file:
        return next((line for line in file if line.startswith(("flags", "Features"))), "")
    return f"{platform.processor()} {torch.backends.cpu.get_cpu_capability()}"


def _sources() -> str:
    """A digest of this package's own code, as far as it can be a part of what is compiled."""
    here = Path(__file__).parent
    names = ("compiled.py", "slots.py", "slot_step.py", "quick_forms.py", "store.py", "zero_sink.py", "quantize.py")
    found = hashlib.sha256()
    for name in names:
        found.update((here / name).read_bytes())
    return found.hexdigest()
