"""Chat templates that were set up a moment ago: many conversations begin with the same instructions.

To set a template up, a trial conversation is spelt twice, which takes longer than to begin a chat. What is handed out
is a copy, for a template may find out later that its head has changed. Knows neither chats nor sessions.
"""

from __future__ import annotations

import copy
import json
import threading
import time
from collections import OrderedDict
from typing import Any

from transformers import PreTrainedTokenizerBase

from streamllm.template import ChatTemplate

MOST = 64
"""Templates that are kept; the least recently used go."""

SECONDS = 60.0
"""A template is set up anew after so long: it may put the date or the time into its head."""


class Templates:
    """Makes chat templates; called like ``ChatTemplate``. Threads may share it.

    Args:
        longest: a template with more tokens in its head is not kept: no conversation can begin with it.
    """

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._kept: OrderedDict[tuple[str | None, str], tuple[float, ChatTemplate]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, tokenizer: PreTrainedTokenizerBase, system: str | None = None, **options: Any) -> ChatTemplate:
        """The template of a conversation with these instructions; all calls have the same tokenizer.

        Raises:
            ConfigError, InputError: as ``ChatTemplate``.
        """
        key = (system, json.dumps(options, sort_keys=True, default=repr))
        now = time.monotonic()
        with self._lock:
            made, template = self._kept.get(key, (0.0, None))
            if template is not None and now - made < SECONDS:
                self._kept.move_to_end(key)
                return copy.copy(template)
        template = ChatTemplate(tokenizer, system, **options)
        if len(template.head) <= self._longest:
            with self._lock:
                self._kept[key] = (now, copy.copy(template))
                self._kept.move_to_end(key)
                while len(self._kept) > MOST:
                    self._kept.popitem(last=False)
        return template
