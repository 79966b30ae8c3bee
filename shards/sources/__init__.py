"""Read sources of images. A `Scan` lists the images of every layout in the same form."""
