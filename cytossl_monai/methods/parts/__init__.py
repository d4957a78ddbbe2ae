"""What several methods are made of: heads, momentum encoders, masks, schedules."""
