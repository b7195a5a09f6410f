"""The server: an OpenAI-compatible interface to conversations that never end, on bounded memory."""
