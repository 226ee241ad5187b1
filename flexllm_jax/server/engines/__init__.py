"""The engines behind the HTTP process: their protocol, processes, clients and adapters."""
