"""The exceptions of streamllm, their exit codes and HTTP statuses.

::

    StreamLLMError                    exit 1, HTTP 500
    ├── ConfigError                   exit 2, HTTP 400   a value that cannot be used (also a ValueError)
    │   └── TakenError                exit 2, HTTP 409   a name that something else has
    ├── ModelNotFoundError            exit 1, HTTP 404   no such model, no access, or no network to fetch it
    ├── ModelFilesError               exit 1, HTTP 422   the model's folder lacks something or is damaged
    ├── UnsupportedModelError         exit 1, HTTP 422   this model's positions cannot be moved
    ├── CacheError                    exit 1, HTTP 409   the cache was asked for something it cannot do rightly
    ├── StateError                    exit 1, HTTP 422   a saved stream that cannot be used
    ├── UnknownSessionError           exit 1, HTTP 404   no such session
    ├── InputError                    exit 1, HTTP 400   a prompt that cannot be read
    └── BusyError                     exit 1, HTTP 429   more streams than can be served

    StreamLLMWarning                  something works, but not as it was asked for

Every message says what happened (with the caller's own value), why, and what to do next, in that order and in
one sentence where one will do. Nothing here knows about torch or the command line.
"""


class StreamLLMError(Exception):
    """Base of every error that streamllm raises on purpose."""

    exit_code: int = 1
    http_status: int = 500


class ConfigError(StreamLLMError, ValueError):
    """An option has a value that cannot be used."""

    exit_code = 2
    http_status = 400


class TakenError(ConfigError):
    """Something has this name already."""

    http_status = 409


class ModelNotFoundError(StreamLLMError):
    """The model is no folder and cannot be had from the Hub."""

    http_status = 404


class ModelFilesError(StreamLLMError):
    """The model's folder exists, but something in it is missing or cannot be read."""

    http_status = 422


class UnsupportedModelError(StreamLLMError):
    """The model's positions cannot be moved, so it cannot stream."""

    http_status = 422


class CacheError(StreamLLMError):
    """The cache was asked for something that it cannot do rightly."""

    http_status = 409


class StateError(StreamLLMError):
    """A saved stream is truncated, foreign, or belongs to another model."""

    http_status = 422


class UnknownSessionError(StreamLLMError):
    """No session has this name."""

    http_status = 404


class InputError(StreamLLMError):
    """The prompt cannot be read."""

    http_status = 400


class BusyError(StreamLLMError):
    """More streams are there than can be served, or the engine is closing."""

    http_status = 429


class StreamLLMWarning(UserWarning):
    """Something works, but not as it was asked for: slower, or in another way."""
