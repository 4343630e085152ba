"""What the library promises to survive, put to the test."""
