"""Small tools that every other part stands on: errors, atomic files, run reports, worker processes."""
