"""The server: the engine behind OpenAI's HTTP interface, with conversations that never end."""
