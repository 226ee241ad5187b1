"""What `make demo` runs on: a made-up world, a small model of it, and a task it does not know."""
