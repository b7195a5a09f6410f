"""``streamllm train`` as a user meets it: what it writes, how it goes on, and what it refuses."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import streamllm
from streamllm import SamplingConfig, SinkCache
from streamllm.console import Signals
from streamllm.train import course as course_module
from streamllm.train import job as job_module
from streamllm.train.saved_run import SavedRun
from streamllm.zero_sink import ZERO_SINK
from test_command import run, spawn
from toys import FLAGS, WORDS, train

pytestmark = pytest.mark.usefixtures("no_settings")


def log(out: Path) -> list[dict[str, Any]]:
    return list(SavedRun(out / "training").rows())


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what no two runs share."""
    return [{name: value for name, value in row.items() if name not in ("seconds", "tokens_per_s")} for row in rows]


class After(Signals):
    """Ctrl-C, noted when the training has logged so many lines."""

    lines = 0
    log: SavedRun

    @property
    def received(self) -> int | None:
        return signal.SIGINT if len(list(self.log.rows())) >= self.lines else None

    @received.setter
    def received(self, value: int | None) -> None:
        pass


@pytest.mark.parametrize("sink", ["token", "zero", "none"])
def test_a_toy_of_each_kind_is_an_ordinary_folder_that_streams(trained: dict[str, Path], sink: str) -> None:
    """Reference: what transformers loads by itself; only a zero sink needs our loader for its attention."""
    folder = trained[sink]
    model, tokenizer = streamllm.load(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert {name: p.shape for name, p in plain.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert all(torch.equal(one, two) for one, two in zip(plain.parameters(), model.parameters(), strict=True))
    assert (model.config._attn_implementation == ZERO_SINK) == (sink == "zero")
    begins = AutoTokenizer.from_pretrained(folder)("Lily saw a dog").input_ids
    assert (begins[0] == 1) == (sink == "token")
    assert tokenizer.decode(begins, skip_special_tokens=True) == "Lily saw a dog"
    cache = SinkCache(model, 1, 15, 4)
    sampling = SamplingConfig(seed=1)
    prompt = "Lily saw a big red ball and ran to the park"
    written = streamllm.generate(
        model, tokenizer, prompt, cache=cache, max_tokens=100, sampling=sampling, on_end="pass"
    )
    assert cache.tokens_evicted > 60
    words = [word.strip(".") for word in written.split()]
    assert sum(word in WORDS for word in words) > 0.7 * len(words)
    card = (folder / "README.md").read_text()
    assert "stories.txt" in card
    assert "## Limits" in card
    assert "Unfinished" not in card


def test_the_log_tells_the_loss_and_how_sinks_emerge(trained: dict[str, Path]) -> None:
    """Reference: what must hold of any run: the loss falls, shares are shares, and the log ends with the last step."""
    rows = log(trained["token"])
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] - 0.5
    measured = [row for row in rows if "sink_mass" in row]
    assert [measured[0]["step"], measured[-1]["step"]] == [0, rows[-1]["step"]]
    assert measured[-1]["held_out"]["held-out"]["loss"] < measured[0]["held_out"]["held-out"]["loss"] - 0.5
    for row in measured:
        assert len(row["sink_mass"]) == 2
        assert all(0 <= share <= 1 for share in row["sink_mass"] + row["nothing_mass"])
        assert set(row["perplexity"]) == {"0+16", "4+12"}
        assert row["ratio"] == pytest.approx(row["perplexity"]["0+16"] / row["perplexity"]["4+12"])
    assert max(log(trained["zero"])[-1]["nothing_mass"]) > 0
    for kind in ("png", "svg"):
        assert (trained["token"] / "training" / f"loss.{kind}").stat().st_size > 1000


def test_going_on_after_ctrl_c_equals_never_having_stopped(
    text: Path, tmp_path: Path, trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the uninterrupted run: its log, but for times, and its weights bit for bit."""
    out = tmp_path / "model"
    with monkeypatch.context() as patch:
        After.log, After.lines = SavedRun(out / "training"), 2
        patch.setattr(job_module, "Signals", After)
        code, _, err = train(text, out)
    assert code == 130
    assert "go on with --resume" in err
    stopped = log(out)[-1]["step"]
    assert 0 < stopped < log(trained["token"])[-1]["step"]
    assert "Unfinished" in (out / "README.md").read_text()
    with SavedRun(out / "training").log.open("a") as file:
        file.write(json.dumps({"step": stopped + 1, "tokens": 0, "loss": 9.9}) + "\n" + '{"step": 99')  # kill -9
    assert run("train", "--out", str(out), "--resume", *FLAGS)[0] == 0
    assert timeless(log(out)) == timeless(log(trained["token"]))
    one, two = (load_file(folder / "model.safetensors") for folder in (out, trained["token"]))
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_ctrl_c_in_a_process_of_its_own_leaves_a_run_to_go_on_with(text: Path, tmp_path: Path) -> None:
    """Reference: the exit code of an interrupt, and the checkpoint."""
    out = tmp_path / "model"
    process = spawn("train", "--data", str(text), "--out", str(out), "--tokens", "100000000", *FLAGS)
    saved = SavedRun(out / "training")
    for _ in range(600):
        if any("loss" in row for row in saved.rows()) or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert b"Traceback" not in err
    assert saved.checkpoint.exists()
    assert streamllm.load(out)


def test_minutes_become_tokens_once(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the plan on disk, which a resumed run keeps."""
    out = tmp_path / "model"
    monkeypatch.setattr(job_module, "_tokens_in", lambda trainer, seconds: round(seconds * 10))
    start = ("train", "--data", str(text), "--out", str(out), "--minutes", "2")
    assert run(*start, *FLAGS)[0] == 0
    plan = SavedRun(out / "training").read_plan()
    assert (plan["minutes"], plan["recipe"]["tokens"]) == (2, 1200)
    assert log(out)[-1]["tokens"] == pytest.approx(1200, abs=248)
    monkeypatch.setattr(job_module, "_tokens_in", lambda trainer, seconds: 1 / 0)
    assert run(*start, "--resume", *FLAGS)[0] == 0
    assert SavedRun(out / "training").read_plan() == plan
    code, _, err = run(*start[:-1], "3", "--resume")
    assert code == 2
    assert "--minutes 3.0 contradicts the run in" in err
    for wrong in ("-5", "inf", "nan"):
        code, _, err = run(*start[:-1], wrong, *FLAGS, "--out", str(tmp_path / "other"))
        assert (code, (tmp_path / "other").exists()) == (2, False)
        assert "--minutes must be a number above 0" in err


def test_the_speed_is_measured_on_a_trainer_that_is_thrown_away(text: Path, tmp_path: Path) -> None:
    """Reference: the same run by tokens: its first loss is the same."""
    out = tmp_path / "model"
    assert run("train", "--data", str(text), "--out", str(out), "--minutes", "0.02", *FLAGS)[0] == 0
    rows = log(out)
    again = tmp_path / "again"
    tokens = SavedRun(out / "training").read_plan()["recipe"]["tokens"]
    assert tokens > 0
    train(text, again, tokens=tokens)
    assert timeless(log(again)) == timeless(rows)


def test_json_lines_are_the_log(text: Path, tmp_path: Path) -> None:
    """Reference: the file."""
    code, out, _ = train(text, tmp_path / "model", "--json", tokens=1000)
    assert code == 0
    assert [json.loads(line) for line in out.splitlines()] == log(tmp_path / "model")


def test_a_given_tokenizer_and_held_out_text_are_used(text: Path, tmp_path: Path, trained: dict[str, Path]) -> None:
    """Reference: the tokenizer of the other model, and the name of the file."""
    held_out = tmp_path / "other.txt"
    held_out.write_text("Tom had a big dog. " * 200)
    flags = ("--tokenizer", str(trained["none"]), "--heldout", str(held_out))
    assert train(text, tmp_path / "model", *flags, tokens=1000)[0] == 0
    one, two = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "model", trained["none"]))
    assert one.get_vocab() == two.get_vocab()
    assert list(log(tmp_path / "model")[-1]["held_out"]) == ["other.txt"]
    code, _, err = train(text, tmp_path / "other", "--tokenizer", str(trained["none"]), "--vocabulary", "300")
    assert (code, (tmp_path / "other").exists()) == (2, False)
    assert "--vocabulary 300 contradicts the tokenizer" in err


def test_more_files_may_follow_without_a_flag(text: Path, tmp_path: Path) -> None:
    """Reference: the plan, which names all of them with their weights."""
    other = tmp_path / "b.txt"
    other.write_text(text.read_text())
    code, _, _ = train(text, tmp_path / "model", f"{other}:3", tokens=500)
    assert code == 0
    plan = SavedRun(tmp_path / "model" / "training").read_plan()
    assert plan["data"] == [[str(text), 1], [str(other), 3]]


# ---- what is refused


def test_a_folder_that_exists_is_refused_and_left_as_it_is(text: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("keep")
    code, _, err = train(text, tmp_path / "model")
    assert (code, [file.name for file in (tmp_path / "model").iterdir()]) == (2, ["mine.txt"])
    assert "exists already: go on with the run in it with --resume" in err


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--sink", "kitchen"), 2, "no sink 'kitchen' for training; choose one of token, zero, none"),
        (("--size", "huge"), 2, "no size 'huge'"),
        (("--minutes", "3"), 2, "either --minutes, or --tokens"),
        (("--learning-rate", "-1"), 2, "learning_rate must be a number above 0"),
        (("--heads", "3"), 2, "64, 3 heads"),
        (("--vocabulary", "60000"), 1, "too short for a vocabulary of 60000 ids"),
        (("--context", "100000", "--batch-tokens", "100000"), 1, "too few to hold 99999 out for measuring"),
        (("--context", "16"), 2, "context must be a whole number of at least 32"),
        (("--measures", "0"), 2, "measures must be a whole number of at least 1"),
        (("--tokenizer", "nowhere"), 2, "tokenizer.*nowhere cannot be read"),
        (("nowhere.txt",), 1, "The text nowhere.txt does not exist"),
        (("--save-dtype", "int8"), 2, "no dtype 'int8' to save"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    text: Path, tmp_path: Path, flags: tuple[str, ...], code: int, message: str
) -> None:
    found, _, err = train(text, tmp_path / "model", *flags)
    assert found == code
    assert len(err.strip().splitlines()) == 1
    assert re.search(message, err), err
    assert not (tmp_path / "model").exists()


def test_resuming_needs_a_run_and_the_same_recipe(text: Path, tmp_path: Path, trained: dict[str, Path]) -> None:
    """Reference: the words about what differs."""
    code, _, err = run("train", "--out", str(tmp_path / "none"), "--resume")
    assert code == 1
    assert "There is no run in" in err
    code, _, err = run("train", "--out", str(trained["zero"]), "--resume", "--sink", "token")
    assert code == 2
    assert "--sink token contradicts the run in" in err
    other = tmp_path / "other.txt"
    other.write_text("x")
    code, _, err = run("train", "--out", str(trained["zero"]), "--resume", "--data", str(other))
    assert code == 2
    assert "other files of data" in err


def test_a_loss_that_is_no_number_keeps_the_last_good_checkpoint(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the step of the checkpoint."""
    from streamllm.train.trainer import Trainer

    loss = Trainer.loss

    def spoil(self: Trainer, ids: torch.Tensor) -> torch.Tensor:
        return loss(self, ids) * (torch.nan if self.step >= 5 and torch.is_grad_enabled() else 1)

    monkeypatch.setattr(Trainer, "loss", spoil)
    monkeypatch.setattr(course_module, "CHECKPOINT_SECONDS", 0.0)
    code, _, err = train(text, tmp_path / "model")
    assert code == 1
    assert "The loss of step 6 is nan" in err
    assert f"The model of step 5, before it, is kept in {tmp_path / 'model'}" in err
    monkeypatch.undo()
    assert SavedRun(tmp_path / "model" / "training")._read()[0]["step"] == 5
    assert "broken off after 5 steps" in (tmp_path / "model" / "README.md").read_text()
    assert all(p.isfinite().all() for p in streamllm.load(tmp_path / "model")[0].parameters())


def test_a_full_disk_keeps_the_checkpoint_before(
    text: Path, tmp_path: Path, trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the run that went on when there was room again equals the uninterrupted one."""
    import streamllm.train.saved_run as module

    writes = []

    def save_file(*arguments: Any, **options: Any) -> None:
        writes.append(1)
        if len(writes) > 6:
            raise OSError(28, "No space left on device")
        real(*arguments, **options)

    real = module.save_file
    out = tmp_path / "model"
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", save_file)
        patch.setattr(course_module, "CHECKPOINT_SECONDS", 0.0)
        code, _, err = train(text, out)
    assert code == 1
    assert "No space left on device; the checkpoint before it is whole" in err
    assert run("train", "--out", str(out), "--resume", *FLAGS)[0] == 0
    assert timeless(log(out)) == timeless(log(trained["token"]))


def test_text_that_is_gone_is_named(text: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.txt"
    copy.write_text(text.read_text())
    assert train(copy, tmp_path / "model", tokens=500)[0] == 0
    copy.unlink()
    code, _, err = run("train", "--out", str(tmp_path / "model"), "--resume")
    assert code == 1
    assert "copy.txt, which the run in" in err


def test_text_that_has_changed_is_refused(text: Path, tmp_path: Path) -> None:
    """Reference: a text of the same length, with other words."""
    copy = tmp_path / "copy.txt"
    copy.write_text(text.read_text())
    assert train(copy, tmp_path / "model", tokens=500)[0] == 0
    copy.write_text(text.read_text().replace("Lily", "Ylil"))
    code, _, err = run("train", "--out", str(tmp_path / "model"), "--resume")
    assert code == 1
    assert "has changed; put it back" in err


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(
    text: Path, tmp_path: Path, trained: dict[str, Path]
) -> None:
    """Reference: the log of the uninterrupted run, in which nothing stands twice."""
    out = tmp_path / "model"
    assert train(text, out)[0] == 0
    (out / "training" / "checkpoint.safetensors").unlink()
    (out / "training" / ".checkpoint.safetensors.x1.part").write_text("half")
    assert run("train", "--out", str(out), "--resume", *FLAGS)[0] == 0
    assert timeless(log(out)) == timeless(log(trained["token"]))
    assert not list((out / "training").glob(".*.part"))


def test_one_folder_has_one_process(text: Path, trained: dict[str, Path]) -> None:
    """Reference: a lock that another one holds."""
    with FileLock(trained["none"] / "training" / ".lock"):
        code, _, err = run("train", "--out", str(trained["none"]), "--resume")
    assert code == 1
    assert "Another process is training in" in err


def test_the_folder_may_be_this_one_and_a_failed_start_leaves_it_as_it_was(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: an empty folder."""
    folder = tmp_path / "model"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert train(text, Path(), "--vocabulary", "60000")[0] == 1
    assert list(folder.iterdir()) == []
    assert train(text, Path(), tokens=500)[0] == 0
    assert streamllm.load(folder)


def test_a_model_that_cannot_be_written_is_one_sentence_and_can_be_written_later(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: safetensors' own error of a full disk."""
    from transformers import LlamaForCausalLM

    def fail(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "save_pretrained", fail)
        code, _, err = train(text, tmp_path / "model", tokens=500)
    assert code == 1
    assert "No space left on device" in err
    assert "go on with --resume" in err
    assert run("train", "--out", str(tmp_path / "model"), "--resume", *FLAGS)[0] == 0
    assert streamllm.load(tmp_path / "model")


def test_a_settings_file_for_running_does_not_disturb_training(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the recipe of a run without the file."""
    file = tmp_path / "settings.toml"
    file.write_text('dtype = "float16"\nwindow = 100\nmodel = "nowhere"\n')
    monkeypatch.setenv("STREAMLLM_CONFIG", str(file))
    assert train(text, tmp_path / "model", tokens=500)[0] == 0
    assert SavedRun(tmp_path / "model" / "training").read_plan()["recipe"]["dtype"] == "float32"


def test_environment_variables_can_be_set_in_a_shell() -> None:
    """Reference: the letters of a name."""
    _, out, _ = run("train", "--help")
    names = re.findall(r"STREAMLLM_[^\s,;\]:]+", out)
    assert "STREAMLLM_TRAIN_LEARNING_RATE" in names
    assert all(re.fullmatch(r"[A-Z0-9_]+", name) for name in names)
