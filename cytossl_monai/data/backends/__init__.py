"""One file a library that reads slides. They share `base.Backend`; `data.slides.open_slide` picks among them."""
