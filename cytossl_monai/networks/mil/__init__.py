"""Multiple-instance classifiers, one file a method, all with one contract."""
