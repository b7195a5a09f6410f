"""Streams on disk: going on equals never having stopped, and nothing but a whole, matching file is accepted."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from families import FAMILIES, REFUSED_OR_EXTRA, VOCAB
from streamllm import state as state_module
from streamllm.cache import SinkCache
from streamllm.config import SamplingConfig
from streamllm.errors import StateError
from streamllm.sampling import Sampler
from streamllm.state import load_state, save_state

S, W, B = 3, 9, 4


@pytest.fixture
def model() -> PreTrainedModel:
    return FAMILIES["llama"].make(trained=24)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, VOCAB, (1, 90), generator=torch.Generator().manual_seed(9))


def read(model: PreTrainedModel, cache: SinkCache, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits[0] for i in range(ids.shape[1])])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bloom", "deepseek-v2", "lfm2"])
@pytest.mark.parametrize("stop", [0, 5, 15, 16, 44])
def test_going_on_from_a_file_equals_never_having_stopped_bit_for_bit(family: str, stop: int, tmp_path: Path) -> None:
    """Reference: the uninterrupted stream; and a fork taken at the same place. 15 is where an eviction is due."""
    model = {**FAMILIES, **REFUSED_OR_EXTRA}[family].make(trained=24)
    ids = torch.randint(3, VOCAB, (1, 70), generator=torch.Generator().manual_seed(1))
    cache = SinkCache(model, S, W, B)
    read(model, cache, ids[:, :stop]) if stop else None
    cache.unread = [11]
    fork = cache.fork()
    save_state(tmp_path / "a.stream", cache)
    saved = load_state(tmp_path / "a.stream", model).cache
    assert saved.unread == [11]
    assert saved.config == cache.config
    want = read(model, cache, ids[:, stop:])
    assert torch.equal(read(model, saved, ids[:, stop:]), want)
    assert torch.equal(read(model, fork, ids[:, stop:]), want)
    assert (saved.tokens_seen, saved.tokens_evicted) == (cache.tokens_seen, cache.tokens_evicted)


def test_a_batch_of_rows_of_different_age_is_saved_and_resumed(
    model: PreTrainedModel, ids: Tensor, tmp_path: Path
) -> None:
    """Reference: the uninterrupted batch."""
    cache = SinkCache(model, S, W, B, batch_size=2)
    cache.pin(5, row=1)
    mask = torch.tensor([[0] * 8 + [1] * 2, [1] * 10])
    with torch.no_grad():
        model(ids[:, :10].repeat(2, 1), attention_mask=mask, past_key_values=cache)
        save_state(tmp_path / "b.stream", cache)
        other = load_state(tmp_path / "b.stream", model).cache
        for i in range(10, 50):
            token = ids[:, i : i + 1].repeat(2, 1)
            assert torch.equal(model(token, past_key_values=cache).logits, model(token, past_key_values=other).logits)


def test_sampler_and_metadata_come_back_as_they_were(model: PreTrainedModel, ids: Tensor, tmp_path: Path) -> None:
    """Reference: the draws of the sampler that was saved."""
    cache, sampler = SinkCache(model, S, W, B), Sampler(SamplingConfig(seed=3, repetition_penalty=1.2))
    logits = read(model, cache, ids[:, :20])
    for row in logits:
        sampler(row)
    save_state(tmp_path / "s.stream", cache, sampler=sampler, metadata={"turn": 7})
    saved = load_state(tmp_path / "s.stream", model)
    assert saved.metadata == {"turn": 7}
    assert saved.sampler is not None
    assert [saved.sampler(row) for row in logits] == [sampler(row) for row in logits]


def test_a_file_has_the_size_of_what_is_cached_not_of_what_was_seen(model: PreTrainedModel, tmp_path: Path) -> None:
    """Reference: the file of a stream five times younger."""
    cache = SinkCache(model, S, W, B)
    sizes = []
    for _ in range(2):
        with torch.no_grad():
            model(torch.randint(3, VOCAB, (1, 12 + 4 * 50)), past_key_values=cache)
        save_state(tmp_path / "c.stream", cache)
        sizes.append((tmp_path / "c.stream").stat().st_size)
    assert abs(sizes[1] - sizes[0]) < 100


@pytest.mark.parametrize("left", [0, 3, 100, -1])
def test_a_truncated_file_is_refused(model: PreTrainedModel, ids: Tensor, tmp_path: Path, left: int) -> None:
    """Reference: the whole file, which loads."""
    path = tmp_path / "t.stream"
    cache = SinkCache(model, S, W, B)
    read(model, cache, ids[:, :20])
    save_state(path, cache)
    load_state(path, model)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(StateError, match="truncated or no saved stream"):
        load_state(path, model)


def rewrite(path: Path, change: dict[str, object]) -> None:
    """Change fields of a file's header."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["streamllm"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header.update(change)
    save_file(tensors, path, metadata={"streamllm": json.dumps(header)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format 99"),
        ({"cache": {}}, "damaged"),
        ({"cache": None}, "damaged"),
        ({"model": None}, "saved with"),
        ({"sampler": {"nonsense": 1}}, "damaged"),
    ],
)
def test_a_file_with_a_strange_header_is_refused(
    model: PreTrainedModel, ids: Tensor, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    """Reference: the unchanged file, which loads."""
    path = tmp_path / "h.stream"
    cache = SinkCache(model, S, W, B)
    read(model, cache, ids[:, :20])
    save_state(path, cache)
    load_state(path, model)
    rewrite(path, change)
    with pytest.raises(StateError, match=message):
        load_state(path, model)


@pytest.mark.parametrize("missing", ["1.keys", "0.head_values"])
def test_a_file_that_lacks_a_tensor_is_refused(
    model: PreTrainedModel, ids: Tensor, tmp_path: Path, missing: str
) -> None:
    """Reference: the whole file, which loads."""
    path = tmp_path / "l.stream"
    cache = SinkCache(model, S, W, B)
    read(model, cache, ids[:, :20])
    save_state(path, cache)
    load_state(path, model)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != missing}  # noqa: SIM118
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(StateError, match="damaged"):
        load_state(path, model)


def test_a_file_is_refused_when_the_models_weights_have_changed_since(ids: Tensor, tmp_path: Path) -> None:
    """Reference: the unchanged model, which loads it."""
    model = copy.deepcopy(FAMILIES["llama"].make(trained=24))
    cache = SinkCache(model, S, W, B)
    read(model, cache, ids[:, :20])
    save_state(tmp_path / "w.stream", cache)
    load_state(tmp_path / "w.stream", model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1)
    with pytest.raises(StateError, match="other weights"):
        load_state(tmp_path / "w.stream", model)


def test_missing_and_foreign_files_are_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    """Reference: none."""
    with pytest.raises(StateError, match="no saved stream at"):
        load_state(tmp_path / "none", model)
    (tmp_path / "text").write_text("not a stream at all, but long enough to have a header")
    with pytest.raises(StateError, match="truncated or no saved stream"):
        load_state(tmp_path / "text", model)
    save_file({"a": torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(StateError, match="but no saved stream"):
        load_state(tmp_path / "weights.safetensors", model)
    save_file({"a": torch.zeros(2)}, tmp_path / "odd", metadata={"streamllm": "{"})
    with pytest.raises(StateError, match="header"):
        load_state(tmp_path / "odd", model)
    save_file({"a": torch.zeros(2)}, tmp_path / "list", metadata={"streamllm": "[]"})
    with pytest.raises(StateError, match="header"):
        load_state(tmp_path / "list", model)


def test_a_file_of_another_model_is_refused(model: PreTrainedModel, ids: Tensor, tmp_path: Path) -> None:
    """Reference: the model that the file belongs to, which loads it."""
    path = tmp_path / "m.stream"
    cache = SinkCache(model, S, W, B)
    read(model, cache, ids[:, :5])
    save_state(path, cache)
    with pytest.raises(StateError, match="a model of type 'llama'"):
        load_state(path, FAMILIES["qwen3"].make(trained=24))
    with pytest.raises(StateError, match="other weights or another dtype"):
        load_state(path, FAMILIES["llama"].make(trained=24, dtype=torch.float32))
    with pytest.raises(StateError, match="other weights or another dtype"):
        load_state(path, FAMILIES["llama-linear"].make(trained=24))


def test_a_folder_that_cannot_be_written_is_reported(model: PreTrainedModel, tmp_path: Path) -> None:
    """Reference: none."""
    with pytest.raises(StateError, match="Cannot save the stream"):
        save_state(tmp_path / "missing" / "x.stream", SinkCache(model, S, W, B))


def test_a_full_disk_leaves_the_old_file_and_no_other(
    model: PreTrainedModel, ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the old file, byte for byte. The write itself fails half-way, as a full disk makes it."""
    path = tmp_path / "d.stream"
    cache = SinkCache(model, S, W, B)
    read(model, cache, ids[:, :5])
    save_state(path, cache)
    before = path.read_bytes()

    def full(tensors, filename, metadata):
        Path(filename).write_bytes(before[: len(before) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state_module, "save_file", full)
    with pytest.raises(StateError, match="No space left on device"):
        save_state(path, cache)
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["d.stream"]


@pytest.mark.parametrize("umask", [0, 0o22, 0o777])
def test_a_private_file_is_its_owners_alone_whatever_the_umask(
    model: PreTrainedModel, tmp_path: Path, umask: int
) -> None:
    """Reference: mode 0600; an ordinary file keeps to the umask."""
    before = os.umask(umask)
    try:
        save_state(tmp_path / "private.stream", SinkCache(model, S, W, B), private=True)
        save_state(tmp_path / "ordinary.stream", SinkCache(model, S, W, B))
    finally:
        os.umask(before)
    modes = {path.stem: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"private": 0o600, "ordinary": 0o666 & ~umask}


@pytest.mark.skipif(not Path("/dev/full").exists() or os.geteuid() != 0, reason="needs root to mount a tiny disk")
def test_a_really_full_disk_is_one_sentence(model: PreTrainedModel, ids: Tensor, tmp_path: Path) -> None:
    """Reference: a file system of 64 KiB, which a stream of 200 rows does not fit."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        cache = SinkCache(model, S, W, B, batch_size=200)
        read(model, cache, ids[:, :3].repeat(200, 1))
        with pytest.raises(StateError, match="Cannot save the stream"):
            save_state(disk / "x.stream", cache)
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_stream_resumes_in_another_process(model: PreTrainedModel, ids: Tensor, tmp_path: Path) -> None:
    """Reference: this process going on; the other one starts from the file alone."""
    cache = SinkCache(model, S, W, B)
    read(model, cache, ids[:, :33])
    save_state(tmp_path / "p.stream", cache)
    want = read(model, cache, ids[:, 33:50])
    script = (
        "import sys, torch\n"
        "from families import FAMILIES\n"
        "from streamllm.state import load_state\n"
        "from test_state import read\n"
        "model = FAMILIES['llama'].make(trained=24)\n"
        "saved = load_state(sys.argv[1], model).cache\n"
        "ids = torch.load(sys.argv[2], weights_only=True)\n"
        "torch.save(read(model, saved, ids), sys.argv[3])\n"
    )
    torch.save(ids[:, 33:50], tmp_path / "ids")
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), *sys.path])}
    subprocess.run(
        [sys.executable, "-c", script, *(str(tmp_path / name) for name in ("p.stream", "ids", "out"))],
        check=True,
        env=environment,
    )
    assert torch.equal(torch.load(tmp_path / "out", weights_only=True), want)
