"""The settings of the bundles: what each may be, and the check that a run makes before it reads or writes anything."""
