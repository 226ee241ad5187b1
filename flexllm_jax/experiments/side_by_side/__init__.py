"""The engine beside transformers + PEFT, in one run on one machine."""
