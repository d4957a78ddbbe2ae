"""From a slide to the index of its tiles: glass, ink and blur left out, nuclei counted."""
