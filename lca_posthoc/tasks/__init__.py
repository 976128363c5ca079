"""Define the user's part, `Task` and `Loss`, load it from a file, and bundle it for workers."""
