"""Speed and memory of the sink cache, beside its rivals and the limit of the machine."""
