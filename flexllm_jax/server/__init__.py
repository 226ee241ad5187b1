"""The HTTP server: OpenAI's interfaces in a process, the engine in another (design, section 8)."""
