"""One run of the engine from a configuration: replay, progress, report, plot, summary."""
