"""Made-up cytology slides with known cells, for demos and tests."""
