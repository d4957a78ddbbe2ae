"""Pictures and reports: overlays, heatmaps, galleries, report pages."""
