"""The processes that run trials: jobs in Python, alone, in ranks or in packs, and commands."""
