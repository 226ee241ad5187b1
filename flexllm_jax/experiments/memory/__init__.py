"""What finetuning keeps in memory: as compilers count it, as torch does, and plan by plan."""
