"""Learners, the loop's parts, optimisers, partitioning and checkpoints."""
