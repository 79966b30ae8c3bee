"""From image files to JPEG samples: formats, limits and pixel depths."""
