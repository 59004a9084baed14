"""A report on runs: the question, the answer as far as the seeds give one, and what it rests on."""
