"""Files of requests that are answered in what others leave, and kept whatever is killed."""
