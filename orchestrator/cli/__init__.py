"""The command line `orc`: one module a verb, or a family of verbs."""
