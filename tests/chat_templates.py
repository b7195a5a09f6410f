"""Chat templates of every shape that the tests need, written for them, on the small tokenizers; no network.

The shapes are those of real models: who opens and closes a turn, where the system prompt goes, what is trimmed.
"""

from __future__ import annotations

from tokenizers import Tokenizer
from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tokenizers_for_tests import byte_level, metaspace, stories

KINDS = ("gpt2", "llama3", "first", "always", "legacy", "stories")
"""Byte-level tokenizers, those with a metaspace whose tokens reach over blanks, and one that sentencepiece made."""

CHATML = """\
{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are kind.<|im_end|>\\n' }}{% endif %}
{% for message in messages %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

THINKING = """\
{% for message in messages %}
{% if message.role != 'assistant' %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{% else %}
{% set content = message.content %}
{% if '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
{% if loop.last %}{% set content = '<think>\\n\\n</think>\\n\\n' + content %}{% endif %}
{{ '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{% endif %}
"""

DATED = """\
{{ '<|im_start|>system\\nToday is ' + strftime_now('%d %B %Y') + '.\\n' }}
{% if messages[0].role == 'system' %}
{{ messages[0].content }}{% set turns = messages[1:] %}{% else %}{% set turns = messages %}
{% endif %}
{{ '<|im_end|>\\n' }}
{% for message in turns %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

HEADERS = """\
{{ bos_token }}
{% for message in messages %}
{{ '<|head|>' + message.role + '<|end_head|>\\n\\n' + message.content | trim + '<|eot|>' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|head|>assistant<|end_head|>\\n\\n' }}{% endif %}
"""

INSTRUCTIONS = """\
{% if messages[0].role == 'system' %}
{% set block = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}{% set turns = messages[1:] %}
{% else %}{% set block = '' %}{% set turns = messages %}{% endif %}
{% for message in turns %}
{% if message.role == 'user' %}
{{ bos_token + '[INST] ' + (block if loop.first else '') + message.content | trim + ' [/INST]' }}
{% else %}{{ ' ' + message.content | trim + ' ' + eos_token }}{% endif %}
{% endfor %}
"""

REFUSING = """\
{{ bos_token }}
{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{{ '<|turn|>' + ('model' if message.role == 'assistant' else 'user') + '\\n' + message.content | trim + '<|end|>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|turn|>model\\n' }}{% endif %}
"""

DROPPING = """\
{% for message in messages %}
{% if message.role == 'user' %}{{ 'User: ' + message.content + '\\n' }}
{% elif message.role == 'assistant' %}{{ 'Bot: ' + message.content + eos_token + '\\n' }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ 'Bot:' }}{% endif %}
"""

LAST_TURN = """\
{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\\n\\n' %}{% set turns = messages[1:] %}
{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}
{{ bos_token }}
{% for message in turns %}
{% if message.role == 'user' %}{{ '[INST] ' + (system if loop.last else '') + message.content + '[/INST]' }}
{% else %}{{ ' ' + message.content + eos_token }}{% endif %}
{% endfor %}
"""

COUNTING = """\
{% for message in messages %}
{{ '<|im_start|>' + message.role + ' ' + loop.index | string + '\\n' + message.content + '<|im_end|>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

COUNTED = """\
{{ 'A talk of ' + messages | length | string + ' messages.\\n' }}
{% for message in messages %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

COLONS = """\
{% for message in messages %}
{% if message.role == 'system' %}{{ message.content + ' ' }}
{% elif message.role == 'user' %}{{ 'USER: ' + message.content + ' ' }}
{% else %}{{ 'ASSISTANT: ' + message.content + eos_token }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}
"""

MARKDOWN = """\
{% for message in messages %}
{{ '### ' + message.role + ':\\n' + message.content + '\\n\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '### assistant:\\n' }}{% endif %}
"""

PARTS = """\
{% for message in messages %}
{{ '<|im_start|>' + message.role + '\\n' }}
{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}
{{ '<|im_end|>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|head|>", "<|end_head|>", "<|eot|>", "<|turn|>", "<|end|>"]


def chat_tokenizer(template: str | dict[str, str] | None, kind: str = "llama3") -> PreTrainedTokenizerBase:
    """A tokenizer of this kind that knows the special tokens of all templates here, and reasoning tokens besides.

    The templates above are broken into lines to be read; a model's template has no line ends between its blocks.
    """
    base = stories() if kind == "stories" else byte_level(kind) if kind in ("gpt2", "llama3") else metaspace(kind)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(base.backend_tokenizer.to_str()),  # type: ignore[attr-defined]
        bos_token=base.bos_token or "<|begin|>",
        eos_token=base.eos_token,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    if isinstance(template, dict):
        tokenizer.chat_template = {name: "".join(text.splitlines()) for name, text in template.items()}
    elif template is not None:
        tokenizer.chat_template = "".join(template.splitlines())
    return tokenizer
