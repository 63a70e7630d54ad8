"""Speech to discrete codes: linguistic, semantic, and their 2:3 merge."""
