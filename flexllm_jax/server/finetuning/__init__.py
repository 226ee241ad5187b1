"""Finetuning jobs and the files they are made of, kept in a database."""
