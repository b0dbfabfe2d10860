"""One command a file; the only place that parses arguments, prints or exits."""
