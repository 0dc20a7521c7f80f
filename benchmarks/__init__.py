"""Benchmarks: each prints a table for people, and one line of JSON as the last line of standard output."""
