"""The engine: joins scheduler, executor, KV cache and tokenizer; used by the server, the CLI and users."""
