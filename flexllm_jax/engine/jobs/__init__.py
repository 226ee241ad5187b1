"""Jobs in an engine: trained beside requests, written, followed, tracked."""
