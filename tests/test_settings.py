"""The settings file is optional and strict, and its names are those of the flags."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import platformdirs
import pytest

from streamllm.errors import ConfigError
from streamllm.settings import SETTINGS, read_settings, settings_file


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The settings file in force."""
    path = tmp_path / "settings.toml"
    monkeypatch.setenv("STREAMLLM_CONFIG", str(path))
    return path


def test_each_setting_names_its_flag_and_its_environment_variable() -> None:
    assert SETTINGS["top_k"].flag == "--top-k"
    assert SETTINGS["top_k"].env == "STREAMLLM_TOP_K"


def test_values_of_the_file_are_read_as_written(file: Path) -> None:
    file.write_text(
        'model = "someone/small"\nwindow = 100\ntemperature = 1\ntop_p = 0.5\nstop = ["a", "b"]\nendless = true\n'
    )
    assert read_settings() == {
        "model": "someone/small",
        "window": 100,
        "temperature": 1,
        "top_p": 0.5,
        "stop": ["a", "b"],
        "endless": True,
    }


def test_a_single_stop_string_needs_no_list(file: Path) -> None:
    file.write_text('stop = "END"')
    assert read_settings() == {"stop": ["END"]}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("windw = 100", "no setting called 'windw': did you mean window"),
        ("top-k = 1", "no setting called 'top-k': did you mean top_k"),
        ("zzzzzzz = 100", "no setting called 'zzzzzzz': known are model, device"),
        ('window = "100"', "window in .*settings.toml must be a whole number, it is '100'"),
        ("window = 1.5", "window in .* must be a whole number, it is 1.5"),
        ("window = true", "window in .* must be a whole number, it is True"),
        ("temperature = true", "temperature in .* must be a number, it is True"),
        ("endless = 1", "endless in .* must be true or false, it is 1"),
        ("model = 7", "model in .* must be text, it is 7"),
        ("stop = [1]", r"stop in .* must be a list of text, it is \[1\]"),
        ("window", "is not valid TOML"),
    ],
)
def test_what_the_file_gets_wrong_is_named_with_the_file(file: Path, text: str, says: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        read_settings()
    assert str(file) in str(caught.value)


def test_a_file_that_is_not_utf8_is_refused(file: Path) -> None:
    file.write_bytes(b'model = "\xff"')
    with pytest.raises(ConfigError, match="is not valid TOML"):
        read_settings()


def test_a_file_that_cannot_be_opened_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ConfigError, match=r"cannot be read: Permission denied"):
        read_settings()


def test_a_named_file_must_exist(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"STREAMLLM_CONFIG names .*settings\.toml, which is no file"):
        read_settings()


def test_an_empty_name_means_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMLLM_CONFIG", "")
    assert settings_file() is None
    assert read_settings() == {}


def test_without_a_name_the_file_of_the_user_is_read_if_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STREAMLLM_CONFIG", raising=False)
    monkeypatch.setattr(platformdirs, "user_config_path", lambda name: tmp_path / name)
    assert settings_file() is None
    (tmp_path / "streamllm").mkdir()
    (tmp_path / "streamllm" / "config.toml").write_text("sinks = 2")
    assert read_settings() == {"sinks": 2}


def test_the_settings_never_load_torch() -> None:
    code = "import sys, streamllm.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
