"""Reinforcement jobs in an engine: their answers, the versions that give them, their graders."""
