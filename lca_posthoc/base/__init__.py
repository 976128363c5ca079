"""Share small tools with every room: text for people, locks, free memory, colours."""
