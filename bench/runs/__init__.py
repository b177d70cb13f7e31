"""What a command does with cases and providers: check, time and record them; the ladder; the comparison of commits."""
