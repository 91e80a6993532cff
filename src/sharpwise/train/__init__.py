"""Data, models, schedule and loop: what every experiment runs on."""
