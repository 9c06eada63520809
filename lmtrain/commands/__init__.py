"""The verbs of the command line, a file a family; each builds on what does the work and only then imports it."""
