"""Which type each tensor gets, and the file that results."""
