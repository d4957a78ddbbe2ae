"""The command ``cytossl``: the bundles' daily runs, a doctor, a converter. The bundle form stays the reference."""
