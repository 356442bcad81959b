"""ORION's image decoder (section 3.3.2): from visual tokens to a picture."""
