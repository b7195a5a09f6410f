#!/usr/bin/env python3
"""A coding helper: does tasks and looks through code that come on standard input, blank lines between them.

Answers keep their line breaks. STREAMLLM_MODEL names an instruct model, such as Qwen/Qwen2.5-0.5B-Instruct.
"""

import os
import sys

import streamllm
from streamllm.form import preset
from streamllm.pipe import Pipe
from streamllm.records import split_records

code = preset("code")
form = code.form()
model, tokenizer = streamllm.load(os.environ.get("STREAMLLM_MODEL"))
pipe = Pipe(model, tokenizer, system=code.system, sampling=streamllm.SamplingConfig(temperature=0))
for record in split_records(sys.stdin.buffer, form.split):
    for chunk in pipe.answer(form.fill(record)):
        print(chunk.text, end="", flush=True)
    print("\n")
