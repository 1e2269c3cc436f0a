"""What lasts beyond a process: step profiles and shared pools."""
