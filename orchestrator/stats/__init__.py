"""The exact, mergeable Summary, and what is built of it."""
