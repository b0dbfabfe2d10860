"""Analyses, one file and one figure each; a new file here is found by itself."""
