"""Reports: one page of a run, or of several side by side, and plots."""
