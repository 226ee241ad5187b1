"""Training by calls: a client hands over every batch and every optimizer step itself."""
