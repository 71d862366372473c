"""The real code, run under one virtual time with everything around it simulated."""
