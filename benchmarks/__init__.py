"""Speed and memory of every op in the table against torch and against the machine's ceilings."""
