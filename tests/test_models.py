"""Finding and loading models: each way it can fail is one sentence, and nothing runs code or guesses weights.

The Hub is a real HTTP server on this machine (``hub_stub``); the models are stories260K and copies of it with one
thing wrong.
"""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from hub_stub import hub
from stories import STORIES
from streamllm import models
from streamllm.checkpoint import shown, size, weights_bytes
from streamllm.errors import ConfigError, ModelFilesError, ModelNotFoundError, UnsupportedModelError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of stories260K, to break."""
    return Path(shutil.copytree(STORIES, tmp_path / "model"))


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """A Hub that serves ``someone/stories``, and an empty cache; the value is the list of what was asked of it."""
    source = Path(shutil.copytree(STORIES, tmp_path / "served"))
    (source / "pytorch_model.bin").write_bytes(b"pickled")
    (source / "onnx").mkdir()
    (source / "onnx" / "model.safetensors").write_bytes(b"another format")
    with hub({"someone/stories": source}) as (address, asked):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield asked


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


# ---- what works


def test_without_a_name_the_embedded_model_loads_in_eval_mode_and_float32(capfd: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = models.load()
    assert model.config.max_position_embeddings == 512
    assert not model.training
    assert model.dtype == torch.float32
    ids = tokenizer("Once upon a time")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "Once upon a time"
    out, err = capfd.readouterr()
    assert out == err == ""


def test_a_local_folder_loads_in_the_dtype_asked_for(folder: Path) -> None:
    model, _ = models.load(str(folder), dtype="bfloat16", device="cpu")
    assert model.dtype == torch.bfloat16


def test_sharded_weights_load(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in halves.items():
        save_file({key: tensors[key] for key in keys}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: file for file, keys in halves.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    model, _ = models.load(folder)
    assert torch.equal(model.get_input_embeddings().weight, tensors["model.embed_tokens.weight"])
    (folder / "b.safetensors").unlink()
    with pytest.raises(ModelFilesError, match=r"lacks b\.safetensors, which model\.safetensors\.index\.json names"):
        models.resolve(folder)


@pytest.mark.parametrize("bars", [True, False])
def test_the_progress_bars_of_the_hub_are_for_a_person_and_come_back(
    online: list[str], monkeypatch: pytest.MonkeyPatch, bars: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    (enable_progress_bars if bars else disable_progress_bars)()
    models.resolve("someone/stories")
    assert capsys.readouterr().err == ""
    assert are_progress_bars_disabled() is not bars
    enable_progress_bars()


def test_loading_leaves_the_verbosity_of_transformers_as_it_was(folder: Path) -> None:
    transformers_logging.set_verbosity_info()
    transformers_logging.disable_progress_bar()
    try:
        models.resolve(folder)
        assert transformers_logging.get_verbosity() == transformers_logging.INFO
        assert not transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.set_verbosity_warning()
        transformers_logging.enable_progress_bar()


# ---- names that lead nowhere


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("./no/such/folder", "no folder ./no/such/folder, and it is no Hub id"),
        ("../elsewhere", "no Hub id"),
        ("two words", "no Hub id"),
        ("", "empty"),
        ("x" * 5000, "There is no model 'xxx"),
        ("~nobody-of-this-name/model", "There is no model '~nobody"),
        ("nul\0byte", "no"),
    ],
)
def test_a_name_that_is_no_folder_and_no_hub_id_is_refused_without_asking_the_hub(
    online: list[str], name: str, says: str
) -> None:
    with pytest.raises(ModelNotFoundError, match=says) as caught:
        models.resolve(name)
    assert len(str(caught.value)) < 300
    assert online == []


def test_a_file_is_refused_with_the_advice_to_name_its_folder(folder: Path) -> None:
    with pytest.raises(ModelFilesError, match="is a file: give the folder"):
        models.resolve(folder / "model.safetensors")


# ---- the Hub


def test_a_hub_model_is_fetched_once_and_then_found_without_the_hub(
    online: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = models.resolve("someone/stories")
    assert shown(found) == "someone/stories"
    fetched = {path.split("/")[-1] for path in online if "/resolve/" in path}
    assert fetched == {file.name for file in STORIES.iterdir()} - {"LICENSE"}
    assert not (found / "pytorch_model.bin").exists()
    assert not (found / "onnx").exists()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    again, _ = models.load("someone/stories")
    assert again.config.hidden_size == 64


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("someone/missing", "no folder someone/missing here and no public model .* check the spelling"),
        ("someone/private", "if it is private, set HF_TOKEN"),
        ("someone/gated", "is gated: accept its licence at http://127.0.0.1:[0-9]+/someone/gated, then set HF_TOKEN"),
        ("someone/gated-anonymous", "is gated: accept its licence"),
        ("someone/forbidden", "refuses access to someone/forbidden"),
        ("someone/bad-token", "does not accept your token"),
        ("someone/broken", "answered with status 418"),
    ],
)
def test_each_refusal_of_the_hub_says_what_to_do(online: list[str], name: str, says: str) -> None:
    with pytest.raises(ModelNotFoundError, match=says) as caught:
        models.load(name)
    assert "\n" not in str(caught.value)
    assert online


def test_without_a_network_the_message_says_that_the_hub_cannot_be_reached(
    online: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelNotFoundError, match=r"cannot be reached \(ConnectError\): fetch it once while online"):
        models.resolve("someone/stories")


def test_offline_mode_is_named_and_nothing_is_asked(online: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE is set"):
        models.resolve("someone/stories")
    assert online == []


def test_a_transfer_that_breaks_for_another_reason_is_one_sentence(
    online: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file where the cache should be")
    with pytest.raises(ModelNotFoundError, match="someone/stories cannot be fetched: ") as caught:
        models.resolve("someone/stories")
    assert "\n" not in str(caught.value)


# ---- folders with something wrong


def remove(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500_000])


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def empty_the_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer.json"
    written = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    file.write_text(json.dumps(written))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "without config": (remove("config.json"), "has no config.json"),
    "config is no json": (write("config.json", "{"), "config.json cannot be read"),
    "config is a list": (write("config.json", "[]"), "names no model_type"),
    "config without type": (lambda folder: edit_config(folder, model_type=None), "names no model_type"),
    "config with bad values": (lambda folder: edit_config(folder, hidden_size="wide"), "config.json cannot be used"),
    "without weights": (remove("model.safetensors"), "has no weights"),
    "pickled weights": (pickle_only, "pickled ones are never loaded.*convert"),
    "truncated weights": (truncate, "is damaged or cut short .* fetch it again"),
    "weights of zeros": (write("model.safetensors", "\0" * 64), "is damaged or cut short"),
    "weights lack a tensor": (drop_a_tensor, "lack 1 tensors .*layers.3.mlp.up_proj.weight"),
    "weights of another shape": (lambda folder: edit_config(folder, intermediate_size=100), "cannot be loaded|lack"),
    "without tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), "has no tokenizer"),
    "empty tokenizer": (empty_the_tokenizer, "tokenizer of .* is empty"),
    "damaged tokenizer": (write("tokenizer.json", "{]"), "tokenizer of .* cannot be loaded"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_folder_with_something_wrong_is_refused_in_one_sentence(
    folder: Path, case: str, capfd: pytest.CaptureFixture[str]
) -> None:
    change, says = BROKEN[case]
    change(folder)
    with pytest.raises(ModelFilesError, match=says) as caught:
        models.load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    out, err = capfd.readouterr()
    assert out == err == ""


def test_a_damaged_index_of_shards_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(ModelFilesError, match="is damaged"):
        models.resolve(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "T5.*an encoder-decoder"),
        ({"model_type": "bart", "architectures": None, "is_encoder_decoder": True}, "bart, an encoder-decoder"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "BertForMaskedLM, no causal language model"),
        ({"model_type": "clip", "architectures": ["CLIPModel"]}, "CLIPModel, no causal language model"),
        ({"model_type": "homemade"}, "'homemade': the installed transformers does not know it"),
        ({"model_type": "homemade", "auto_map": {"AutoConfig": "evil.Config"}}, "its own code, which .* never runs"),
    ],
)
def test_what_is_no_causal_model_of_transformers_is_refused_by_name(
    folder: Path, changes: dict[str, Any], says: str
) -> None:
    edit_config(folder, **changes)
    with pytest.raises(UnsupportedModelError, match=says):
        models.load(folder)


def test_code_in_the_folder_of_a_known_type_is_not_run(folder: Path, tmp_path: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    edit_config(folder, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    model, _ = models.load(folder)
    assert type(model).__module__.startswith("transformers.")
    assert not (tmp_path / "ran").exists()


# ---- device, dtype, memory


@pytest.mark.parametrize("device", ["nonsense", "cuda:9", "cpu:3"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match=device):
        models.load(device=device)


def test_a_device_that_torch_names_but_cannot_use_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be moved to the device 'xpu'"):
        models.load(device="xpu")


def test_an_unknown_dtype_is_refused_with_the_list_of_known_ones() -> None:
    with pytest.raises(ConfigError, match="no dtype 'int3'; choose one of auto, float32"):
        models.load(dtype="int3")


def test_the_size_of_the_weights_is_known_from_the_headers() -> None:
    model, _ = models.load(STORIES)
    real = sum(p.numel() * p.element_size() for p in model.parameters())
    assert weights_bytes(STORIES) == weights_bytes(STORIES, "float32") == real
    assert weights_bytes(STORIES, "bfloat16") * 2 == real


@pytest.mark.parametrize(
    ("free", "says"),
    [
        (900_000, r"1.0 MB in float32, and 900.0 kB .* pass --dtype bfloat16 \(520.1 kB\) or choose"),
        (90, "cpu: choose"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_loading(
    monkeypatch: pytest.MonkeyPatch, free: int, says: str
) -> None:
    monkeypatch.setattr(models, "free_bytes", lambda device: free)
    monkeypatch.setattr(models, "_load_weights", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ModelFilesError, match=says):
        models.load(STORIES, device="cpu")


def test_where_the_free_memory_is_unknown_loading_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "free_bytes", lambda device: None)
    assert models.load()[0].config.model_type == "llama"


def test_the_free_memory_of_an_accelerator_is_asked_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (123, 456))
    assert models.free_bytes(torch.device("cuda")) == 123


def test_the_limit_of_a_container_counts(tmp_path: Path) -> None:
    assert models._container_free(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 10\ninactive_file 200\n")
    assert models._container_free(tmp_path) == 500
    (tmp_path / "memory.max").write_text("max\n")
    assert models._container_free(tmp_path) is None


def test_auto_takes_the_accelerator_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    Backend = namedtuple("Backend", "is_available")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends, "mps", Backend(lambda: True))
    assert models.find_device("auto").type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert models.find_device("auto").type == "cuda"


def test_sizes_are_written_with_a_unit() -> None:
    assert [size(n) for n in (0, 999, 1040, 14_200_000_000, 3 * 10**15)] == [
        "0 bytes",
        "999 bytes",
        "1.0 kB",
        "14.2 GB",
        "3000.0 TB",
    ]
