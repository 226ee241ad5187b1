"""PEFT adapters: their types, their slots on the device, and the PEFT file format."""
