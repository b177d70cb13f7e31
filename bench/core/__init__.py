"""The measurement itself: cases, timing, the floor, and rows of results."""
