"""The main job: preparation, requests to workers, resume, events, plan."""
