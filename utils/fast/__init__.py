"""Optional accelerations; without this room the suite runs, slower."""
