"""What a program for a pod would need and cost, read from what XLA compiled: no device needed."""
