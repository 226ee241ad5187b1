"""Jobs that learn from rewards: prompts, answers in groups, advantages, environments."""
