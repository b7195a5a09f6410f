#!/bin/sh
# Translates every line of standard input as it comes: examples/translate.sh German < letter.txt
# STREAMLLM_MODEL names an instruct model, such as Qwen/Qwen2.5-0.5B-Instruct.
exec streamllm pipe --preset translate --to "${1:-German}" --temperature 0
