"""The user's part: `Task` and `Loss`, loaded from a file and bundled for workers."""
