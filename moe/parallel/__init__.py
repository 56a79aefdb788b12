"""Ranks and engines. Nothing is imported here: layers may use `ranks`, and only the trainer uses `engine`."""
