"""What is done to weights before and while they are rounded."""
