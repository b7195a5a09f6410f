#!/bin/sh
# Says after every ten lines, or as many as are asked for, what a log tells: tail -F app.log | examples/watch_log.sh 10
# STREAMLLM_MODEL names an instruct model, such as Qwen/Qwen2.5-0.5B-Instruct.
exec streamllm pipe --every "${1:-10}" --on-error skip --max-tokens 60 --temperature 0 --system \
    'Every message is the next lines of a log. Say in one sentence what is new and wrong in them, or "all is well".'
