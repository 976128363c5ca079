"""Tools of every room: words as people read them, locks, free memory, colours."""
