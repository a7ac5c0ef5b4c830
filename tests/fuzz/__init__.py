"""Fuzzing of every reader: damaged files and lies, each replayable from reader and seed."""
