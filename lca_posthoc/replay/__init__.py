"""Replay a training: prepare, send requests to workers, resume, report events, plan."""
