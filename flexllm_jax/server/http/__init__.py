"""What every route stands on: keys, bodies, errors, event streams, logs, OpenAPI."""
