"""All metrics on all sets, exams, the harness, and how far differences are noise."""
