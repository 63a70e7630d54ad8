"""SeqIO task registrations, one module a family."""
