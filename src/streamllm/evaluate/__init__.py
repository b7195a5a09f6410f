"""The paper's evaluations, on the library's own stream."""
