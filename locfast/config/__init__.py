"""All settings as frozen dataclasses: one file for what every run shares, one file a method."""
