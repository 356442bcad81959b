"""From encoded images to patches, many at a time: one interface, with Pillow or DALI behind it."""
