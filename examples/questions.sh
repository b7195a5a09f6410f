#!/bin/sh
# Answers questions, one JSON object a line, with or without a context: examples/questions.sh < questions.jsonl
# STREAMLLM_MODEL names an instruct model, such as Qwen/Qwen2.5-0.5B-Instruct.
exec streamllm pipe --preset qa --split json --on-error skip --temperature 0
