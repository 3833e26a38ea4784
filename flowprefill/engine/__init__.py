"""The engine: joins scheduler, executor, KV cache and tokenizer; used by server, CLI and users."""
