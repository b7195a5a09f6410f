"""The fitness report says what the model is, what it will take, and whether it can stream."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, MptConfig, MptForCausalLM

from stories import STORIES
from streamllm import doctor, models
from streamllm.cache import SinkCache
from streamllm.checkpoint import EMBEDDED
from streamllm.config import CacheConfig
from streamllm.doctor import examine
from streamllm.errors import ConfigError, ModelFilesError


def save(model: torch.nn.Module, folder: Path) -> Path:
    """A folder with ``model`` and the embedded tokenizer."""
    model.save_pretrained(folder)  # type: ignore[operator]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(models.locate() / name, folder / name)
    return folder


def test_the_embedded_model_fits_and_the_report_has_its_facts() -> None:
    report = examine()
    assert report.is_fit
    assert report.verdict == "fit"
    facts = report.to_dict()
    assert facts["model"] == EMBEDDED
    assert facts["family"] == "llama"
    assert facts["positions"] == "rotary"
    assert facts["residual"] < 1e-3
    assert facts["trained_length"] == 512
    assert facts["layers"] == {"sink": 7}
    assert facts["bytes_per_token"] == 2 * 7 * 1 * 128 * 4  # keys and values, layers, heads, head size, float32
    assert (facts["sinks"], facts["window"], facts["block"]) == (4, 252, 64)
    assert facts["capacity"] == 4 + 252 + 63
    assert facts["weights_bytes"] == 2 * sum(  # stored in bfloat16, loaded in float32
        tensor.nbytes for tensor in load_file(models.locate() / "model.safetensors").values()
    )
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["devices"][0] == "cpu"
    assert facts["threads"] == torch.get_num_threads()
    json.dumps(facts)


def test_the_planned_bytes_are_those_that_the_full_cache_takes() -> None:
    model, _ = models.load(STORIES)
    cache = SinkCache(model, 2, 20, 5)
    with torch.no_grad():
        model(input_ids=torch.arange(3, 103)[None], past_key_values=cache)
    assert examine(STORIES, config=CacheConfig(2, 20, 5)).to_dict()["cache_bytes"] == cache.bytes


def test_a_person_reads_sums_and_units() -> None:
    rows = dict(examine(STORIES, config=CacheConfig(sinks=4, window=200, block=16)).rows())
    assert rows["cache"].startswith("4 sinks + 200 window + 15 block slack = 219 tokens, ")
    assert rows["cache"].endswith("kB")
    assert rows["trained length"] == "512 tokens"
    assert rows["weights"] == "1.0 MB, float32 on cpu"
    assert rows["layers"] == "5 sink"
    assert rows["verdict"] == "fit"


def test_learned_positions_fit_by_rereading(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=512, n_positions=64, n_embd=16, n_layer=2, n_head=2)
    report = examine(save(GPT2LMHeadModel(config), tmp_path), config=CacheConfig(4, 16, 4))
    assert report.verdict == "fit by re-reading"
    assert report.to_dict()["positions"] == "absolute"


def test_a_model_without_a_known_trained_length_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = MptConfig(vocab_size=512, d_model=16, n_heads=2, n_layers=2, max_seq_len=64)
    report = examine(save(MptForCausalLM(config), tmp_path), config=CacheConfig(4, 16, 4))
    assert report.facts["positions"] == "alibi"
    report.facts["trained_length"] = None
    assert dict(report.rows())["trained length"] == "unknown"


def test_a_model_that_cannot_stream_gets_the_verdict_and_the_reason(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models.locate(), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "model_type": "t5", "architectures": ["T5ForConditionalGeneration"]})
    )
    report = examine(folder)
    assert not report.is_fit
    assert report.verdict == "unfit"
    assert "an encoder-decoder" in str(report.reason)
    rows = dict(report.rows())
    assert rows["verdict"].startswith("unfit: ")
    assert "torch" in rows["versions"]
    assert "positions" not in rows


def test_missing_files_and_a_window_beyond_the_trained_length_are_errors_not_verdicts(tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match=r"no config\.json"):
        examine(tmp_path)
    with pytest.raises(ConfigError, match="trained on 512 positions, you asked for a window of 4096"):
        examine(STORIES, config=CacheConfig(window=4096))


def test_every_accelerator_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Card {index}")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert doctor._devices() == ["cpu", "cuda:0 (Card 0)", "cuda:1 (Card 1)", "mps"]


def test_a_library_without_metadata_does_not_stop_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", refuse)
    assert doctor._versions()["torch"] == "not installed as a package"
