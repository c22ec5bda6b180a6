"""Evidence that the numbers are right: each file makes some rows of docs/proof.md.

`python tests/proof` runs all of it and writes the page; tests/test_proof.py runs a sample of each part,
and plants a failure of its class that must be seen.
"""
