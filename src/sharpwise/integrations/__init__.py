"""Thin adapters to other people's trainers, one file per host; none of them imports its host."""
