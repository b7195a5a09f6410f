"""The evaluations that there are, in the order in which a newcomer would take them. Nothing here loads torch."""

from __future__ import annotations

from streamllm.evaluate.arc import Arc
from streamllm.evaluate.attention_maps import AttentionMaps
from streamllm.evaluate.cache_size import CacheSize
from streamllm.evaluate.drift import Drift
from streamllm.evaluate.evaluation import Evaluation
from streamllm.evaluate.perplexity import Perplexity
from streamllm.evaluate.recall import Recall
from streamllm.evaluate.sinks import Sinks
from streamllm.evaluate.streameval import StreamEval

EVALUATIONS: dict[str, type[Evaluation]] = {
    kind.name: kind
    for kind in (
        Perplexity,
        Sinks,
        CacheSize,
        StreamEval,
        Arc,
        AttentionMaps,
        Drift,
        Recall,
    )
}
