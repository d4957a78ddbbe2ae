"""A slide to a report: tiles, features, bag, prediction, evidence; one file a station."""
