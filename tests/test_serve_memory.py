"""How a server takes memory and gives it back, each in a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

GNU = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="that is how GNU's C library allocates")


def test_what_requests_leave_behind_is_collected_soon() -> None:
    """Reference: a cycle, and not many objects later; the command line itself looks for cycles seldom."""
    code = (
        "import gc, weakref; from streamllm.__main__ import COLLECT; gc.set_threshold(*COLLECT); "
        "from streamllm.server.memory import collect_often; collect_often()\n"
        "class Request: pass\n"
        "made = Request(); made.itself = made; known = weakref.ref(made); del made\n"
        "more = [[] for _ in range(20_000)]; print(known() is None, gc.get_freeze_count() > 1_000)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]


@GNU
@pytest.mark.parametrize("call", ["", "allocate_together(); "])
def test_threads_take_memory_from_one_place(call: str) -> None:
    """Reference: the C library's own account of its places, which are several without the call."""
    code = (
        "import ctypes, threading; from streamllm.server.memory import allocate_together; "
        f"libc = ctypes.CDLL(None); {call}held = threading.Barrier(9)\n"
        "libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]\n"
        "def take(): libc.malloc(100_000); held.wait(); held.wait()\n"
        "for _ in range(8): threading.Thread(target=take).start()\n"
        "held.wait()\n"
        "libc.fdopen.restype = ctypes.c_void_p\n"
        "libc.malloc_info(0, ctypes.c_void_p(libc.fdopen(1, b'w'))); libc.fflush(None); held.wait()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    places = done.stdout.count("<heap nr=")
    assert places == 1 if call else places > 1


@GNU
def test_gaps_between_what_is_kept_are_given_back() -> None:
    """Reference: the resident pages of the process; small things are kept, each behind a large one that is not."""
    code = (
        "import ctypes, psutil; from streamllm.server.memory import allocate_together, give_back; allocate_together()\n"
        "libc, process, size = ctypes.CDLL(None), psutil.Process(), 100_000\n"
        "libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]\n"
        "libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]\n"
        "libc.free.argtypes = [ctypes.c_void_p]\n"
        "def take(size): place = libc.malloc(size); libc.memset(place, 1, size); return place\n"
        "begun = process.memory_info().rss\n"
        "taken = [(take(size), take(100))[0] for _ in range(1000)]\n"
        "for place in taken: libc.free(place)\n"
        "before = process.memory_info().rss; give_back(); print(before - begun, process.memory_info().rss - begun)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 90_000_000
    assert after < 15_000_000
